"""One decoder-only transformer for Llama, Qwen2 and Qwen3 weights, and for the tiny model that is born here.

Reading order: `Transformer` (tokens -> logits), `LanguageAgent` (text -> tokens that are sampled, then
scored), `Tokenizer` (text <-> tokens), checkpoints in and out. Modules bear the names of Hugging Face's state
dicts, so that weights load by a strict match of names.

Files come from strangers: what is malformed or not supported raises ValueError with the file and the reason,
and nothing is allocated that the sizes of the files do not justify.
"""
import contextlib
import json
import os
import re
import unicodedata
from collections import namedtuple
from functools import lru_cache, partial
from pathlib import Path

import tiktoken
import torch
from torch import nn

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
          "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
          "BOOL": torch.bool}
SUPPORTED = {"model_type": ("llama", "qwen2", "qwen3"), "hidden_act": ("silu",), "full_attention": (),
             "rope_type": ("default", "llama3"), "type": ("default", "llama3"), "partial_rotary_factor": (1,),
             "use_sliding_window": (False,), "quantization_config": ()}  # as far as given; (): refused
FIELDS = dict.fromkeys("""vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim""".split(), int) | {"rms_norm_eps": float, "rope_theta": float,
    "tie_word_embeddings": bool, "mlp_bias": bool, "attention_bias": bool}
# The architecture, by the names of config.json. Of the model types, qwen3 has norms of q and k, and qwen2 has
# biases of q, k and v whatever attention_bias (of q, k, v and o) is. rope_scaling is Llama 3's.
Config = namedtuple("Config", ["model_type", *FIELDS, "rope_scaling"],
                    defaults=[1e-6, 10000.0, False, False, False, None])


class RMSNorm(nn.RMSNorm):
    """x / rms(x), computed in float32 and cast back, times the weight."""

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


def rotary(c, positions, dtype):
    """cos and sin of the angles of positions (batch, time), each (batch, 1, time, head_dim), for `rotate`.
    Llama 3's scaling stretches long waves by `factor`, keeps short ones and mixes both between."""
    frequencies = 1 / c.rope_theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)
    if s := c.rope_scaling:
        turns = s["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
        keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        frequencies = frequencies * (keep.clamp(0, 1) + (1 - keep.clamp(0, 1)) / s["factor"])
    angles = positions[:, None, :, None] * frequencies.to(positions.device)
    return torch.cat([angles, angles], -1).cos().to(dtype), torch.cat([-angles, angles], -1).sin().to(dtype)


def rotate(x, cos, sin):
    """Rotary positions in the split-halves form of these weights: x (batch, heads, time, head_dim)."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def causal(q, k, v):
    """Each token sees its row up to itself: q (batch, heads, time, head_dim), k and v (batch, kv_heads, time,
    head_dim) -> (batch, time, heads * head_dim)."""
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def attention(q, k, v, seen, common):
    """Each token sees what is `seen` (batch, 1, time, slots) of its row's keys and values, and all of those
    `common` to the rows, of batch size 1, which are not copied. Shapes as for `causal`."""
    q, n = (q * q.shape[3] ** -.5).unflatten(1, (k.shape[1], -1)), common[0].shape[2]
    own = torch.einsum("bkgtd,bksd->bkgts", q, k).masked_fill_(~seen[:, None], -torch.inf)
    weights = torch.cat([torch.einsum("bkgtd,xksd->bkgts", q, common[0]), own], -1).softmax(-1)
    out = torch.einsum("bkgts,xksd->btkgd", weights[..., :n], common[1])
    return (out + torch.einsum("bkgts,bksd->btkgd", weights[..., n:], v)).flatten(2)


class Block(nn.Module):
    """Grouped-query attention, where `attend` says what each token sees, then SwiGLU."""

    def __init__(self, c):
        super().__init__()
        width, inner, eps, self.head_dim = c.hidden_size, c.intermediate_size, c.rms_norm_eps, c.head_dim
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        bias = c.attention_bias or c.model_type == "qwen2"
        norm = RMSNorm if c.model_type == "qwen3" else nn.Identity
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(width, q, bias), "k_proj": nn.Linear(width, kv, bias),
            "v_proj": nn.Linear(width, kv, bias), "o_proj": nn.Linear(q, width, c.attention_bias),
            "q_norm": norm(c.head_dim, eps), "k_norm": norm(c.head_dim, eps)})
        self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(width, inner, c.mlp_bias),
            "up_proj": nn.Linear(width, inner, c.mlp_bias), "down_proj": nn.Linear(inner, width, c.mlp_bias)})
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width, eps), RMSNorm(width, eps)

    def forward(self, x, cos, sin, attend):
        attn, mlp, normed = self.self_attn, self.mlp, self.input_layernorm(x)
        q, k, v = (attn[f"{x}_proj"](normed).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for x in "qkv")
        q, k = rotate(attn["q_norm"](q), cos, sin), rotate(attn["k_norm"](k), cos, sin)
        x = x + attn["o_proj"](attend(q, k, v))
        normed = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](nn.functional.silu(mlp["gate_proj"](normed)) * mlp["up_proj"](normed))


class Transformer(nn.Module):
    """A Config's decoder: token embeddings, blocks, a norm, and a head that may be the embeddings again."""
    recompute = False  # True: the backward pass computes activations again, for less memory
    files = {}  # small files that came with the weights, {name: bytes}

    def __init__(self, config):
        super().__init__()
        self.config, size = config, (config.vocab_size, config.hidden_size)
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(*size), "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))})
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(*size[::-1], bias=False)

    def forward(self, ids, positions=None, attend=None, rows=None):
        """Logits of the next token: ids (batch, time) int64 -> (batch, time, vocabulary).
        positions: (batch or 1, time), by default 0, 1, ...; attend(layer, q, k, v): instead of `causal`;
        rows: indices into the flattened (batch * time), to have logits of these alone, (rows, vocabulary)."""
        x = self.model["embed_tokens"](ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None] if positions is None else positions
        cos, sin = rotary(self.config, positions, x.dtype)
        for i, layer in enumerate(self.model["layers"]):
            again = self.recompute and x.requires_grad
            run = partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False) if again else layer
            x = run(x, cos, sin, partial(attend, i) if attend else causal)
        x = self.model["norm"](x if rows is None else x.flatten(0, 1)[rows])
        return nn.functional.linear(x, (self.lm_head or self.model["embed_tokens"]).weight)


def numbered(items):
    """{item: its number}, each of them once, in order."""
    return {item: i for i, item in enumerate(dict.fromkeys(items))}


class LanguageAgent:
    """A language-agent policy (msgrpo.Policy): a transformer that reads the instructions before every state.
    Prompts are branches of one tree: instructions that all share, a state that many share, an answer of a few
    tokens. Each node is run once, when sampling and when scoring alike; this is exact, gradients included."""

    def __init__(self, model, tokenizer, instructions, temperature=1.0, max_new_tokens=16, think=False):
        self.model, self.tokenizer, device = model, tokenizer, next(model.parameters()).device
        self.tensor, self.range = (partial(f, device=device) for f in (torch.tensor, torch.arange))
        self.instructions, self.ends = tokenizer.prefix(instructions), self.tensor(sorted(tokenizer.end_ids))
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.encode = lru_cache(65536)(lambda state: tuple(tokenizer.suffix(state, think)))
        self.decode = lru_cache(65536)(tokenizer.decode)
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        """After an update: run the instructions through the weights as they are, and keep what it gives."""
        self.prefix, self.greedy = [], {}
        self.model(self.tensor([self.instructions]), rows=[], attend=lambda layer, q, *kv: (
            self.prefix.append(kv) or causal(q, *kv)))

    def log_probabilities(self, *tree):
        """Of the tokenizer's tokens (a model may have further rows) at this temperature: (rows, size)."""
        return (self.model(*tree)[:, :self.tokenizer.size].float() / self.temperature).log_softmax(-1)

    def rows(self, prompts):
        """Each prompt once, (batch, width), zeros to its left, how many (batch,), and each prompt's row."""
        index, width = numbered(prompts), max(map(len, prompts))
        ids = self.tensor([[-1] * (width - len(prompt)) + [*prompt] for prompt in index])
        return ids.clamp(min=0), (ids < 0).sum(1), self.tensor([index[prompt] for prompt in prompts])

    def view(self, padding, begin, end):
        """Of slots begin to end of rows that begin with so much padding (batch,), behind the instructions:
        their positions (batch, time), and what they see of all slots (batch, 1, time, end)."""
        slots, padding = self.range(end), padding[:, None]
        seen = (slots >= padding)[:, None] & (slots <= slots[begin:, None])
        return len(self.instructions) + slots[begin:] - padding, seen[:, None]

    def act(self, observations, uniforms):
        """Answers, as `msgrpo.Policy` says; greedy ones are remembered until `refresh`."""
        if uniforms is not None:
            return self.answer(observations, uniforms)
        new = [state for state in dict.fromkeys(observations) if state not in self.greedy]
        self.greedy |= zip(new, self.answer(new) if new else ())
        return [self.greedy[state] for state in observations]

    @torch.no_grad()
    def answer(self, observations, uniforms=None):
        """`act` without the memory. Prompts that have been continued alike so far share one row of the batch,
        ended ones leave it. A uniform picks its token by the inverse of the cumulative distribution, so that
        an answer does not depend on its batch."""
        prompts = [self.encode(state) for state in observations]
        new, padding, parent = self.rows(prompts)
        size, limit, past, end = self.tokenizer.size, self.max_new_tokens, [], 0
        alive, room = self.range(len(prompts)), new.shape[1] + limit - 1

        def attend(layer, q, *kv):
            if layer == len(past):
                past.append([x.new_empty(*x.shape[:2], room, x.shape[3]) for x in kv])
            for kept, x in zip(past[layer], kv):
                kept[:, :, end - x.shape[2]:end] = x
            return attention(q, *(kept[:, :, :end] for kept in past[layer]), seen, self.prefix[layer])

        tokens, logprobs = (torch.full((len(prompts), limit), x, device=new.device) for x in (-1, 0.0))
        for t in range(limit):
            time, end = new.shape[1], end + new.shape[1]
            positions, seen = self.view(padding, end - time, end)
            table = self.log_probabilities(new, positions, attend, self.range(time - 1, new.numel(), time))
            token = table.argmax(-1)[parent]
            if uniforms is not None:
                cumulative = table.exp().cumsum(-1)[parent]
                target = self.tensor(uniforms[:, t:t + 1], dtype=torch.float32)[alive] * cumulative[:, -1:]
                token = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=size - 1)
            tokens[alive, t], logprobs[alive, t] = token, table[parent, token]
            on = ~torch.isin(token, self.ends)
            alive = alive[on]
            if t + 1 == limit or not len(alive):
                break
            branches, parent = (parent[on] * size + token[on]).unique(return_inverse=True)
            rows, new = branches // size, branches[:, None] % size
            if not torch.equal(rows, self.range(len(padding))):
                past, padding = [[x[rows] for x in kv] for kv in past], padding[rows]
        replies = [tuple(row[:n]) for row, n in zip(tokens.tolist(), (tokens >= 0).sum(1).tolist())]
        return [(prompt, said, logs[:len(said)], self.decode(said), said[-1] not in self.tokenizer.end_ids)
                for prompt, said, logs in zip(prompts, replies, logprobs.tolist())]

    def score(self, steps):
        """As `msgrpo.Policy` says: the numbers that `act` gave, with gradient, by one pass over one row that
        packs the tree: the instructions, the prompts, and the answers to them without their last tokens."""
        answers = numbered((step.prompt, step.response) for step in steps)
        prompts, padding, parent = self.rows([prompt for prompt, _ in answers])
        longest = max(len(response) for _, response in answers)
        replies = self.tensor([[*response] + [-1] * (longest - len(response)) for _, response in answers])
        nodes = self.tensor([self.instructions]), prompts, replies[:, :-1].clamp(min=0)
        shapes, sizes = [node.shape for node in nodes], [node.numel() for node in nodes]
        (_, head), (_, width), (_, time) = shapes
        p1, seen1 = self.view(padding, 0, width)
        p2, seen2 = self.view(padding[parent], width, width + time)

        def attend(layer, *qkv):
            parts = zip(*(x[0].split(sizes, 1) for x in qkv))
            (q, *kv), (q1, *kv1), (q2, *kv2) = (
                [x.unflatten(1, shape).transpose(0, 1) for x in part] for part, shape in zip(parts, shapes))
            # Not x[parent], whose gradient threads add up in the order in which they happen to come.
            kv2 = [torch.cat([x.index_select(0, parent), y], 2) for x, y in zip(kv1, kv2)]
            out = causal(q, *kv), attention(q1, *kv1, seen1, kv), attention(q2, *kv2, seen2, kv)
            return torch.cat([x.flatten(0, 1) for x in out])[None]

        first = head + (parent[:, None] + 1) * width - 1  # a token is predicted at its prompt's last place,
        later = sum(sizes[:2]) + self.range(sizes[2]).view(shapes[2])  # or at the one before it
        order = self.tensor([answers[step.prompt, step.response] for step in steps])
        real = (replies >= 0)[order]
        places, at = torch.cat([first, later], 1)[order][real].unique(return_inverse=True)
        ids, positions = (torch.cat([x.flatten() for x in parts])[None] for parts in
                          (nodes, (self.range(head), p1, p2)))
        table = self.log_probabilities(ids, positions, attend, places)
        return table[at, replies[order][real]], -(table.exp() * table).sum(-1)[at]


def ensure(good, reason):
    if not good:
        raise ValueError(reason)


def out_of_memory(error):
    """Is this exception a want of memory? Of a CPU's, torch makes a bare RuntimeError."""
    cpu = type(error) is RuntimeError and "can't allocate memory" in str(error)
    return cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError))


@contextlib.contextmanager
def blaming(path):
    """Whatever the contents of the file at path do wrong inside is raised as a ValueError that names it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or out_of_memory(error):
            raise
        kind = "" if type(error) is ValueError else f"malformed or not supported, {type(error).__name__}: "
        raise ValueError(f"{path}: {kind}{' '.join(str(error).split())[:500]}") from None


@contextlib.contextmanager
def replacing(path):
    """A file that takes path's place once it is complete and on the disk; an error leaves path as it was."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def parse_json(data):
    """The object in a JSON file's bytes: strict UTF-8, no NaN, no key twice. Call it inside `blaming`."""
    return {} | json.loads(data.decode(), parse_constant={}.__getitem__, object_pairs_hook=lambda pairs: (
        ensure(len(dict(pairs)) == len(pairs), "a JSON object has a key twice") or dict(pairs)))


def parse_config(data):
    """Config of config.json's bytes in either dialect, with transformers' defaults."""
    raw = parse_json(data)
    raw = {"head_dim": 128} | raw if raw.get("model_type") == "qwen3" else raw
    raw |= (raw.get("rope_parameters") or {}) | (raw.get("rope_scaling") or {})
    raw = {key: value for key, value in raw.items() if value is not None}
    for key, values in SUPPORTED.items():  # `type` is the older name of rope_type
        ensure(key not in raw or raw[key] in values, f"{key} is {raw.get(key)!r:.99}, not among {values}")
    ensure({*raw.get("layer_types", ())} <= {"full_attention"}, "layer_types are not all full_attention")
    heads, llama3 = raw["num_attention_heads"], "llama3" in (raw.get("rope_type"), raw.get("type"))
    raw = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads} | raw
    raw["attention_bias"] = raw["model_type"] != "qwen2" and raw.get("attention_bias", False)
    rope_keys = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    for key, kind in (FIELDS | dict.fromkeys(rope_keys, float)).items():
        value = raw.get(key, kind(1))
        good = type(value) in (kind, int if kind is float else kind)  # to isinstance, True is an int
        ensure(good and (kind is bool or 0 < value < 1e15), f"{key} is {value!r:.99}, no fit {kind.__name__}")
    fits = heads % raw["num_key_value_heads"] == raw["head_dim"] % 2 == 0
    fits = fits and (not llama3 or raw["low_freq_factor"] < raw["high_freq_factor"])
    ensure(fits, "num_key_value_heads divides no heads, head_dim is odd or high_freq_factor is too low")
    scaling = {"rope_type": "llama3"} | {key: raw[key] for key in rope_keys} if llama3 else None
    return Config(raw["model_type"], rope_scaling=scaling, **{key: raw[key] for key in FIELDS if key in raw})


def read_safetensors(path):
    """{name: tensor} of a safetensors file. Raises ValueError, with file and reason, if it is malformed.
    The format: 8 little-endian bytes N; N bytes of JSON, {name: {dtype, shape, data_offsets}}; the data.
    All is checked before a tensor is allocated, once, and read into."""
    with blaming(path), open(path, "rb") as file:
        size, tensors, end = Path(path).stat().st_size, {}, 0
        start = 8 + int.from_bytes(file.read(8), "little")
        ensure(start <= min(size, 100_000_008), f"a header of {start - 8} bytes in {size} is too long")
        header = parse_json(file.read(start - 8))
        metadata = header.pop("__metadata__", None)
        ensure(metadata is None or {*map(type, metadata.values())} <= {str}, "__metadata__ maps no strings")
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            x = torch.empty([] + entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
            tensors[name], span = x, [end, end := end + x.nbytes]
            good = repr(entry["data_offsets"]) == repr(span)  # as text, where true is not 1
            ensure(good, f"tensor {name!r:.99} is {entry!r:.199}, where its bytes are {span}")
        ensure(start + end == size, f"its tensors end at byte {start + end}, the file at {size}")
        for name, x in tensors.items():
            tensors[name] = torch.empty_like(x, device="cpu")
            data = tensors[name].reshape(-1).view(torch.uint8).numpy()  # the same memory
            good = file.readinto(data) == data.nbytes and (x.dtype != torch.bool or data.max(initial=0) <= 1)
            ensure(good, f"the file ends within tensor {name!r:.99}, or a BOOL is not 0 or 1")
    return tensors


def write_safetensors(path, tensors):
    """Write {name: tensor} as a safetensors file, sorted by name, one tensor at a time."""
    names, header, end = {dtype: name for name, dtype in DTYPES.items()}, {}, 0
    for name, x in sorted(tensors.items()):
        ensure(x.dtype in names, f"{path} cannot hold {name!r} of {x.dtype}")
        span = [end, end := end + x.nbytes]
        header[name] = {"dtype": names[x.dtype], "shape": [*x.shape], "data_offsets": span}
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()  # transformers 4 insists on it
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            file.write(tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy())


def read_weights(directory):
    """{name: tensor} of model.safetensors, or of all shards that model.safetensors.index.json names."""
    path, index, tensors = directory / "model.safetensors", directory / "model.safetensors.index.json", {}
    if path.exists() or not index.exists():
        return read_safetensors(path)
    with blaming(index):
        home = parse_json(index.read_bytes())["weight_map"]
        for shard in {*home.values()}:
            ensure(Path(shard).name == shard, f"{shard!r:.99} is no bare file name")
            tensors |= (part := read_safetensors(directory / shard))
            ensure(part.keys() == {name for name in home if home[name] == shard}, f"{shard} holds others")
    return tensors


# How GPT-2 cuts text into pieces; the same after every digit was cut out, where white space before a digit
# stays whole; the tiny tokenizer's way: a line of prose, whole, as attention to constants costs time; a tag;
# a word, number or symbol with the space before it; white space.
GPT2_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT_PIECES = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
TINY_PIECES = r"[A-Z][a-z][^\n]*|</?[a-z]+>|\n[A-Z_](?= )| ?[A-Za-z]+| ?[0-9]+| ?[^\s<A-Za-z0-9]|\s|<"
# Chat templates around the user's text; the first whose control tokens are all in the vocabulary is taken.
CHATS = [("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
         ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
          "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"), ("", "\n")]
# tokenizer.json spells bytes as printable characters: these as themselves, the others from U+0100 on (GPT-2).
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CODE_OF = dict(zip([*PRINTABLE, *sorted({*range(256)} - {*PRINTABLE})], [*PRINTABLE, *range(256, 324)]))
BYTE_OF = {chr(code): byte for byte, code in CODE_OF.items()}


def split_pattern(pre_tokenizer):
    """The regular expression of the pieces into which a tokenizer.json's pre_tokenizer cuts text."""
    *first, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    plain = last["type"] == "ByteLevel" and last["add_prefix_space"] is False
    match plain, last.get("use_regex", True), first:
        case True, True, [] | [{"type": "Digits", "individual_digits": True}]:
            return DIGIT_PIECES if first else GPT2_PIECES
        case True, False, [{"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"}]:
            return regex
    raise ValueError(f"pre_tokenizer {pre_tokenizer!r:.299} is not supported")


class Tokenizer:
    """Text <-> token ids, of tokenizer.json's bytes, and the chat around a prompt. Make it inside `blaming`.
    A policy samples ids below `size`; `end_ids` end an answer; `special` are the control tokens, {name: id},
    which no text becomes."""

    def __init__(self, data, end_ids=(), model_type="llama"):
        self.json, raw = data, parse_json(data)
        bpe, vocab, self.normalizer = raw["model"], raw["model"]["vocab"], raw["normalizer"]
        made = [vocab["".join(merge).replace(" ", "")] for merge in bpe["merges"]]  # first by id in tiktoken
        good = bpe["type"] == "BPE" and made == sorted(made) and self.normalizer in (None, {"type": "NFC"})
        ensure(good, "not a BPE whose merges are in the order of the ids, after no normalizer or NFC")
        self.special = {token["content"]: token["id"] for token in raw["added_tokens"]}
        ranks = {bytes(map(BYTE_OF.get, name)): i for name, i in vocab.items() if name not in self.special}
        names = ranks | {name.encode(): i for name, i in self.special.items()}
        self.bytes_of = {i: name for name, i in names.items()}
        good = all(type(i) is int and 0 <= i < 1 << 24 for i in self.bytes_of) and b"" not in names
        ensure(good and len(self.bytes_of) == len(names), "a token is without text or an id of its own")
        self.size = max(self.bytes_of) + 1
        # Bytes that the vocabulary lacks: transformers drops them, tiktoken panics. They get ids above size;
        # runs of symbols are rid of them before, as transformers merges what is left of a run.
        lacking = {bytes([byte]) for byte in range(256)} - ranks.keys()
        ranks |= {byte: self.size + byte[0] for byte in lacking}
        lost = "".join(f"\\x{byte[0]:02x}" for byte in lacking if byte.isascii()) or "^\\S\\s"
        self.lost = re.compile(rf"(?:(?<=[^\w\s])|(?<=[_\x1c-\x1f ]))[{lost}]+(?=[^\w\s]|[_\x1c-\x1f])")
        self.encoding = tiktoken.Encoding("", pat_str=split_pattern(raw["pre_tokenizer"]),
                                          mergeable_ranks=ranks, special_tokens=self.special)
        before, after = next(chat for chat in CHATS if {*re.findall("<.*?>", str(chat))} <= {*self.special})
        thought = "<think>\n\n</think>\n\n" if model_type == "qwen3" and "<think>" in self.special else ""
        template = partial(self.encoding.encode, allowed_special="all")
        self.before, *self.after = map(template, (before, after + thought, after))
        self.end_ids = frozenset({*end_ids} | ({self.after[1][0]} & {*self.special.values()}))

    def encode(self, text):
        """Token ids of text; what spells a control token is text like any other."""
        text = self.lost.sub("", unicodedata.normalize("NFC", text) if self.normalizer else text)
        return [i for i in self.encoding.encode_ordinary(text) if i < self.size]

    def decode(self, ids):
        """Text of token ids, control tokens by name; ids of no token are left out, broken UTF-8 is U+FFFD."""
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode("utf-8", "replace")

    def prefix(self, instructions):
        """Tokens of a prompt up to its state; the x, dropped again, lets them end as before a state."""
        return self.before + self.encode(instructions + "\n\nx")[:-1]

    def suffix(self, state, think=False):
        """Tokens of a prompt from its state on; without think, Qwen3 expects an empty thought."""
        return self.encode(state) + self.after[think]


def tiny_tokenizer(texts, end):
    """A Tokenizer of the 256 bytes and of the pieces of some texts, of which `end` ends an answer."""
    pieces = [piece.encode() for text in texts for piece in re.findall(TINY_PIECES, text)]
    vocab = numbered(x.decode("latin-1").translate(CODE_OF) for x in [*map(bytes, zip(range(256))), *pieces])
    pairs = [(name[:i], name[i:]) for name in vocab for i in range(1, len(name))]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": TINY_PIECES}, "behavior": "Isolated", "invert": False}
    return Tokenizer(json.dumps({
        "version": "1.0", "added_tokens": [], "normalizer": None, "decoder": bytes_,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab,  # all merges that tiktoken finds:
                  "merges": [pair for pair in pairs if vocab.keys() >= {*pair}]}}).encode(), [vocab[end]])


def load_pretrained(directory, dtype=torch.float32):
    """(Transformer in dtype, Tokenizer) of a Hugging Face directory; the second None without tokenizer.json.
    Memory peaks at the weights' own size: each tensor is read into its place and converted by itself, and the
    model has no memory of its own. Raises ValueError, with file and reason, on what is not supported."""
    directory, ends, tokenizer = Path(directory), [], None
    files = {p.name: p.read_bytes() for p in directory.iterdir() if p.suffix in (".json", ".txt", ".jinja")}
    for name in ("generation_config.json", "config.json"):
        with blaming(directory / name):
            found = parse_json(files.get(name, b"{}")).get("eos_token_id")
            ends += found if isinstance(found, list) else [] if found is None else [found]
            ensure({*map(type, ends)} <= {int}, f"eos_token_id is {found!r:.99}")
            config = name == "config.json" and parse_config(files.get(name, b""))  # before gigabytes are read
    tensors = read_weights(directory)
    with blaming(directory / "config.json"), torch.device("meta"):
        ensure(9 * config.num_hidden_layers <= len(tensors), "num_hidden_layers exceeds the files")
        model = Transformer(config)
    spare = ("rotary_emb.inv_freq", *["lm_head.weight"] * config.tie_word_embeddings)  # old buffer; a copy
    tensors = {name: x for name, x in tensors.items() if not name.endswith(spare)}
    has = {(name, x.shape, x.is_floating_point()) for name, x in tensors.items()}
    wrong = has ^ {(name, weight.shape, True) for name, weight in model.state_dict().items()}
    ensure(not wrong, f"{directory}: files and model differ in (name, shape, float): {sorted(wrong)!r:.199}")
    if "tokenizer.json" in files:
        with blaming(directory / "tokenizer.json"):
            tokenizer = Tokenizer(files["tokenizer.json"], ends, config.model_type)
            ensure(tokenizer.size <= config.vocab_size, f"{tokenizer.size} tokens exceed the vocab_size")
    model.load_state_dict({name: tensors.pop(name).to(dtype) for name in [*tensors]}, assign=True)
    model.files = files
    return model, tokenizer


def save_pretrained(directory, model, tokenizer, weights=None):
    """Write a directory that load_pretrained, transformers and vLLM read; tokenizer may be None, weights be
    given in the place of the model's own. config.json is in the older dialect, which all read; the other
    files that came with the model are carried over. Each file is complete before it takes its place."""
    directory, files, config = Path(directory), dict(model.files), model.config._asdict()
    if tokenizer:
        files.setdefault("tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast"}')
        files["tokenizer.json"] = tokenizer.json
    end = min(tokenizer.end_ids, default=None) if tokenizer else None  # without it transformers takes 2
    raw = {"bos_token_id": None, "eos_token_id": end} | json.loads(files.get("config.json", b"{}")) | config
    raw |= {"architectures": [f"{config['model_type'].title()}ForCausalLM"],
            "torch_dtype": str(next(model.parameters()).dtype)[6:]}
    raw = {key: value for key, value in raw.items() if key not in ("rope_parameters", "dtype")}
    files["config.json"] = json.dumps(raw, indent=2).encode()
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", weights or model.state_dict())
    for name, data in files.items():
        with replacing(directory / name) as file:
            file.write(data)
    for path in [*directory.glob("model-*-of-*.safetensors"), *directory.glob("*.index.json")]:
        path.unlink()
