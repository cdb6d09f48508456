"""One decoder-only transformer for Llama, Qwen2 and Qwen3 weights, and for the tiny model that is born here.

Reading order: `Transformer` (tokens -> logits), `LanguageAgent` (text -> tokens that are sampled, then
scored), `Tokenizer` (text <-> tokens), checkpoints in and out. Modules bear the names of Hugging Face's state
dicts, so that weights load by a strict match of names.

Files come from strangers: what is malformed or not supported raises ValueError with the file and the reason,
and nothing is allocated that the sizes of the files do not justify.
"""
import contextlib
import json
import math
import os
import re
import unicodedata
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
          "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
          "BOOL": torch.bool}
SIDE_FILES = """config.json generation_config.json tokenizer.json tokenizer_config.json added_tokens.json
             special_tokens_map.json vocab.json merges.txt chat_template.jinja""".split()
SUPPORTED = {"model_type": ("llama", "qwen2", "qwen3"), "hidden_act": ("silu",), "full_attention": (),
             "rope_type": ("default", "llama3"), "type": ("default", "llama3"), "partial_rotary_factor": (1,),
             "use_sliding_window": (False,), "quantization_config": ()}  # where config.json has them


@dataclass(frozen=True)
class Config:
    """Architecture, by the names of config.json."""
    model_type: str  # qwen3: q and k have norms
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # of Llama 3
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k, v and o; qwen2: of q, k and v whatever this is
    mlp_bias: bool = False
    files: dict = field(default_factory=dict, repr=False, compare=False)  # SIDE_FILES read, name -> bytes


class RMSNorm(nn.RMSNorm):
    """x / rms(x), computed in float32 and cast back, times the weight."""

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


def rotary(c, positions, dtype):
    """cos and sin of the angles of positions (batch, time), each (batch, time, 1, head_dim), for `rotate`.

    Llama 3's scaling stretches long waves by `factor`, keeps short ones and mixes both between.
    """
    frequencies = 1 / c.rope_theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)
    if s := c.rope_scaling:
        turns = s["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        frequencies = frequencies * (keep.clamp(0, 1) + (1 - keep.clamp(0, 1)) / s["factor"])
    angles = positions[..., None, None] * frequencies.to(positions.device)
    return torch.cat([angles, angles], -1).cos().to(dtype), torch.cat([-angles, angles], -1).sin().to(dtype)


def rotate(x, cos, sin):
    """Rotary positions in the split-halves form of these weights: x (batch, time, heads, head_dim)."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def causal(layer, q, k, v):
    """Each token sees its row up to itself: q (batch, time, heads, head_dim), k and v (kv_heads, batch, time,
    head_dim) -> (batch, time, heads * head_dim)."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(0, 1), v.transpose(0, 1),
                                          is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


def attention(q, k, v, hidden, prefix):
    """Each token sees its row's slots of k and v, but those `hidden` (batch or 1, time, slots) from it, and
    all of a prefix that the rows share: keys and values of batch size one. Shapes as for `causal`."""
    (batch, _, _, d), heads, lengths = q.shape, len(k), [prefix[0].shape[2], k.shape[2]]
    q = (q * d ** -.5).unflatten(2, (heads, -1)).permute(2, 0, 3, 1, 4)  # (kv_heads, batch, group, time, d)
    shape, q = q.shape, q.reshape(heads, -1, d)
    shared = (q @ prefix[0][:, 0].mT).view(*shape[:4], lengths[0])
    own = (q.view(heads, batch, -1, d) @ k.mT).view(*shape[:4], lengths[1])
    scores = torch.cat([shared, own.masked_fill_(hidden[:, None], -torch.inf)], -1)
    shared, own = scores.softmax(-1).view(heads, batch, -1, sum(lengths)).split(lengths, -1)
    out = (own @ v).view(shape) + (shared.flatten(1, 2) @ prefix[1][:, 0]).view(shape)
    return out.permute(1, 3, 0, 2, 4).flatten(2)


class Attention(nn.Module):
    """Grouped-query attention; `attend` says what each token sees."""

    def __init__(self, c):
        super().__init__()
        self.head_dim, bias = c.head_dim, c.attention_bias or c.model_type == "qwen2"
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias)
        size = c.num_key_value_heads * c.head_dim
        self.k_proj, self.v_proj = (nn.Linear(c.hidden_size, size, bias) for _ in "kv")
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, c.attention_bias)
        norm = RMSNorm if c.model_type == "qwen3" else nn.Identity
        self.q_norm, self.k_norm = (norm(c.head_dim, c.rms_norm_eps) for _ in "qk")

    def forward(self, x, cos, sin, attend):
        shape = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(shape)), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(shape)), cos, sin)
        k, v = (x.permute(2, 0, 1, 3) for x in (k, self.v_proj(x).view(shape)))
        return self.o_proj(attend(q, k, v))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c):
        super().__init__()
        size = c.hidden_size, c.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(*size, c.mlp_bias) for _ in range(2))
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(c.hidden_size, c.rms_norm_eps) for _ in range(2))

    def forward(self, x, *context):
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    recompute = False  # activations in the backward pass, where memory is short

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids, positions=None, attend=causal, rows=None):
        """Logits of the next token: ids (batch, time) int64 -> (batch, time, vocabulary).

        positions: (batch or 1, time), by default 0, 1, ...; attend(layer, q, k, v): what each token sees;
        rows: indices into the flattened (batch * time), to have logits of these alone, (rows, vocabulary).
        """
        x, tied = self.model["embed_tokens"](ids), self.config.tie_word_embeddings
        positions = torch.arange(ids.shape[1], device=ids.device)[None] if positions is None else positions
        cos, sin = rotary(self.config, positions, x.dtype)
        for i, layer in enumerate(self.model["layers"]):
            again = self.recompute and x.requires_grad
            run = partial(checkpoint, layer, use_reentrant=False) if again else layer
            x = run(x, cos, sin, partial(attend, i))
        x = self.model["norm"](x if rows is None else x.flatten(0, 1)[rows])
        return F.linear(x, self.model["embed_tokens"].weight if tied else self.lm_head.weight)


def numbered(items):
    """{item: its number}, each of them once, in order."""
    return {item: i for i, item in enumerate(dict.fromkeys(items))}


def pad(sequences, device):
    """Lists of ids -> (batch, longest) int64, zeros behind each, and their lengths (batch,)."""
    lengths = torch.tensor([len(s) for s in sequences])
    ids = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.long)
    ids[within(lengths, ids.shape[1])] = torch.tensor([token for s in sequences for token in s])
    return ids.to(device), lengths.to(device)


def within(lengths, width):
    """Which of `width` positions are within each length: (batch,) -> (batch, width) bool."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def ahead(width):
    """Which of `width` positions are ahead of each of them: (1, width, width) bool."""
    return torch.ones(1, width, width, dtype=torch.bool).triu(1)


class LanguageAgent:
    """A language-agent policy (msgrpo.Policy): a transformer that reads the instructions before every state.

    Prompts are branches of one tree: instructions that all share, a state that many share, an answer of a few
    tokens. Each node is run once, when sampling and when scoring alike; this is exact, gradients included.
    """

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

        def attend(layer, q, k, v):
            self.prefix.append((k, v))
            return causal(layer, q, k, v)
        self.model(self.tensor([self.instructions]), attend=attend, rows=[])

    def log_probabilities(self, logits):
        """Of the tokenizer's tokens, (rows, size), at this temperature; a model may have further rows."""
        return (logits[:, :self.tokenizer.size].float() / self.temperature).log_softmax(-1)

    def act(self, observations, uniforms):
        """Answers, as `msgrpo.Policy` says; greedy ones are remembered until the next `refresh`."""
        prompts = [self.encode(state) for state in observations]
        if uniforms is not None:
            return self.generate(prompts, self.tensor(uniforms, dtype=torch.float32))
        if new := [prompt for prompt in numbered(prompts) if prompt not in self.greedy]:
            self.greedy |= zip(new, self.generate(new, None))
        return [self.greedy[prompt] for prompt in prompts]

    @torch.no_grad()
    def generate(self, prompts, uniforms):
        """Continue prompts until an end token or the limit. Those that have said the same so far share one
        row of the batch, ended ones leave it. A uniform picks its token by the inverse of the cumulative
        distribution, so that an answer does not depend on its batch."""
        index, size, limit = numbered(prompts), self.tokenizer.size, self.max_new_tokens
        new, lengths = pad(index, self.ends.device)
        head, (count, width), past = len(self.instructions), new.shape, []

        def attend(layer, q, k, v):
            if layer == len(past):  # room for the answer's tokens too
                past.append([x.new_empty(*x.shape[:2], width + limit - 1, x.shape[3]) for x in (k, v)])
            for kept, x in zip(past[layer], (k, v)):
                kept[:, :, end - x.shape[2]:end] = x
            return attention(q, *(kept[:, :, :end] for kept in past[layer]), hidden, self.prefix[layer])

        hidden, end, positions = ahead(width).to(new.device), width, head + self.range(width)[None]
        places = self.range(count) * width + lengths - 1  # of the logits: each prompt's last token
        alive, parent = self.range(len(prompts)), self.tensor([index[prompt] for prompt in prompts])  # row
        tokens, logprobs = (torch.full((len(prompts), limit), x, device=new.device) for x in (-1, 0.0))
        for t in range(limit):
            table = self.log_probabilities(self.model(new, positions, attend, places))
            token = table.argmax(-1)[parent]
            if uniforms is not None:
                cumulative = table.exp().cumsum(-1)[parent]
                target = uniforms[alive, t:t + 1] * cumulative[:, -1:]
                token = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=size - 1)
            tokens[alive, t], logprobs[alive, t] = token, table[parent, token]
            on = ~torch.isin(token, self.ends)
            alive = alive[on]
            if t + 1 == limit or not len(alive):
                break
            branches, parent = (parent[on] * size + token[on]).unique(return_inverse=True)
            rows, new, places = branches // size, branches[:, None] % size, self.range(len(branches))
            if not torch.equal(rows, self.range(len(lengths))):
                past, lengths = [[x[:, rows] for x in kv] for kv in past], lengths[rows]
            end, positions = width + t + 1, head + lengths[:, None] + t
            hidden = F.pad(~within(lengths, width), (0, t + 1))[:, None]
        replies = [tuple(i for i in row if i >= 0) for row in tokens.tolist()]
        return [(prompt, reply, logs[:len(reply)], self.decode(reply),
                 reply[-1] not in self.tokenizer.end_ids)
                for prompt, reply, logs in zip(prompts, replies, logprobs.tolist())]

    def score(self, steps):
        """As `msgrpo.Policy` says: the numbers that `act` gave, with gradient, by one pass over one row that
        packs the tree: the instructions, the prompts, and the answers to them without their last tokens."""
        answers = numbered((step.prompt, step.response) for step in steps)
        prompts = numbered(prompt for prompt, _ in answers)
        ids, lengths = pad(prompts, self.ends.device)
        replies, counts = pad([response for _, response in answers], self.ends.device)
        parent = self.tensor([prompts[prompt] for prompt, _ in answers])
        shapes = (1, len(self.instructions)), tuple(ids.shape), (len(replies), replies.shape[1] - 1)
        (_, head), (_, width), (_, time) = shapes
        seen = ahead(width).to(ids.device)
        hidden = torch.cat([~within(lengths, width)[parent, None].expand(-1, time, -1),
                            ahead(time).to(ids.device).expand(len(replies), -1, -1)], 2)

        def split(x, dim):
            parts = x.split([rows * columns for rows, columns in shapes], dim)
            return [part.unflatten(dim, shape) for part, shape in zip(parts, shapes)]

        def attend(layer, q, k, v):
            (q0, q1, q2), (k0, k1, k2), (v0, v1, v2) = split(q[0], 0), split(k[:, 0], 1), split(v[:, 0], 1)
            k2, v2 = torch.cat([k1[:, parent], k2], 2), torch.cat([v1[:, parent], v2], 2)
            out = (causal(layer, q0, k0, v0), attention(q1, k1, v1, seen, (k0, v0)),
                   attention(q2, k2, v2, hidden, (k0, v0)))
            return torch.cat([x.flatten(0, 1) for x in out])[None]

        packed = torch.cat([self.tensor(self.instructions), ids.flatten(), replies[:, :-1].flatten()])
        positions = torch.cat([self.range(head), (head + self.range(width)).repeat(len(ids)),
                               (head + lengths[parent, None] + self.range(time)).flatten()])
        first = head + parent * width + lengths[parent] - 1  # the place before each reply's tokens
        later = head + ids.numel() + self.range(replies[:, :-1].numel()).view(len(replies), time)
        order = self.tensor([answers[step.prompt, step.response] for step in steps])
        real = within(counts, time + 1)[order]
        places, at = torch.cat([first[:, None], later], 1)[order][real].unique(return_inverse=True)
        table = self.log_probabilities(self.model(packed[None], positions[None], attend, places))
        return table[at, replies[order][real]], -(table.exp() * table).sum(-1)[at]


def ensure(good, reason):
    if not good:
        raise ValueError(reason)


@contextlib.contextmanager
def blaming(path):
    """Whatever the contents of the file at path do wrong inside is raised as a ValueError that names it."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
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
    def unique(pairs):
        ensure(len(dict(pairs)) == len(pairs), "a JSON object has a key twice")
        return dict(pairs)

    value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant={}.__getitem__)
    ensure(isinstance(value, dict), "not a JSON object")
    return value


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
    kinds = {f.name: f.type for f in fields(Config) if f.type in (int, float, bool)}
    for key, kind in (kinds | dict.fromkeys(rope_keys, float)).items():
        value = raw.get(key, kind(1))
        good = type(value) in (kind, int if kind is float else kind)  # to isinstance, True is an int
        ensure(good and (kind is bool or 0 < value < 1e15), f"{key} is {value!r:.99}, no fit {kind.__name__}")
    fits = heads % raw["num_key_value_heads"] == raw["head_dim"] % 2 == 0
    fits = fits and raw.get("low_freq_factor", 0) < raw.get("high_freq_factor", 1e15)
    ensure(fits, "num_key_value_heads divides no heads, head_dim is odd or high_freq_factor is too low")
    scaling = {"rope_type": "llama3"} | {key: raw[key] for key in rope_keys} if llama3 else None
    return Config(raw["model_type"], rope_scaling=scaling, **{key: raw[key] for key in kinds if key in raw})


def read_header(path):
    """{name: (path, its offset, an empty tensor of its dtype and shape)} of a safetensors file.

    The format: 8 little-endian bytes N; N bytes of JSON, {name: {dtype, shape, data_offsets}}; the data.
    """
    with blaming(path), open(path, "rb") as file:
        size = Path(path).stat().st_size
        start = 8 + int.from_bytes(file.read(8), "little")
        ensure(start <= min(size, 100_000_008), f"a header of {start - 8} bytes in {size} is too long")
        header, entries, end = parse_json(file.read(start - 8)), {}, 0
        metadata = header.pop("__metadata__", None)
        ensure(metadata is None or {*map(type, metadata.values())} <= {str}, "__metadata__ maps no strings")
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            empty = torch.empty([] + entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
            entries[name], span = (path, start + end, empty), [end, end := end + empty.nbytes]
            good = repr(entry["data_offsets"]) == repr(span)  # as text, where true is not 1
            ensure(good, f"tensor {name!r:.99} is {entry!r:.199}, where its bytes are {span}")
        ensure(start + end == size, f"its tensors end at byte {start + end}, the file at {size}")
    return entries


def read_tensor(path, offset, empty):
    """A tensor of `read_header`, allocated once and read into."""
    tensor = torch.empty_like(empty, device="cpu")
    data = tensor.reshape(-1).view(torch.uint8).numpy()  # the same memory
    with open(path, "rb") as file:
        file.seek(offset)
        good = file.readinto(data) == data.nbytes and (tensor.dtype != torch.bool or data.max(initial=0) <= 1)
    ensure(good, f"{path} ends within a tensor, or a BOOL is not 0 or 1")
    return tensor


def read_safetensors(path):
    """{name: tensor} of a safetensors file. Raises ValueError, with file and reason, if it is malformed."""
    return {name: read_tensor(*entry) for name, entry in read_header(path).items()}


def write_safetensors(path, tensors):
    """Write {name: tensor} as a safetensors file, sorted by name, one tensor at a time."""
    names, tensors = {dtype: name for name, dtype in DTYPES.items()}, dict(sorted(tensors.items()))
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers 4 insists on it
    for name, tensor in tensors.items():
        ensure(tensor.dtype in names, f"{path} cannot hold {name!r} of {tensor.dtype}")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())


def find_tensors(directory):
    """`read_header` of model.safetensors, or of all shards that model.safetensors.index.json names."""
    path, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if path.exists() or not index.exists():
        return read_header(path)
    with blaming(index):
        home = parse_json(index.read_bytes())["weight_map"]
        ensure(all(Path(shard).name == shard for shard in home.values()), "a shard's name is not a bare one")
        found = {(name, shard): entry for shard in {*home.values()}
                 for name, entry in read_header(directory / shard).items()}
        ensure(not (wrong := found.keys() ^ home.items()), f"it and the shards disagree on {wrong!r:.199}")
    return {name: entry for (name, _), entry in found.items()}


# How GPT-2 cuts text into pieces; the same after every digit was cut out, where white space before a digit
# stays whole; the tiny tokenizer's way: a line of prose, whole, as attention to constants costs time; a tag;
# a word, number or symbol with the space before it; white space.
GPT2_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT_PIECES = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
TINY_PIECES = r"[A-Z][a-z][^\n]*|</?[a-z]+>|\n[A-Z_](?= )| ?[A-Za-z]+| ?[0-9]+| ?[^\s<A-Za-z0-9]|\s|<"
# Chat templates around the user's text: the first of whose control tokens the vocabulary lacks none.
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
    which no text becomes.
    """

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
        """Tokens of a prompt up to its state; the x that comes off again cuts them as the state will."""
        return self.before + self.encode(instructions + "\n\nx")[:-1]

    def suffix(self, state, think=False):
        """Tokens of a prompt from its state on; without think, Qwen3 expects an empty thought."""
        return self.encode(state) + self.after[think]


def tiny_tokenizer(texts, end):
    """A Tokenizer of the 256 bytes and of the pieces of some texts, of which `end` ends an answer."""
    pieces = [piece.encode() for text in texts for piece in re.findall(TINY_PIECES, text)]
    names = [piece.decode("latin-1").translate(CODE_OF) for piece in [*map(bytes, zip(range(256))), *pieces]]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
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

    Memory peaks at the weights' own size: files are compared with a model that has no memory, then each
    tensor is read and converted by itself. Raises ValueError, with file and reason, on what is not supported.
    """
    directory, ends, tokenizer = Path(directory), [], None
    files = {name: (directory / name).read_bytes() for name in SIDE_FILES if (directory / name).exists()}
    for name in ("generation_config.json", "config.json"):
        with blaming(directory / name):
            found = parse_json(files.get(name, b"{}")).get("eos_token_id")
            ends += found if isinstance(found, list) else [] if found is None else [found]
            ensure({*map(type, ends)} <= {int}, f"eos_token_id is {found!r:.99}")
    entries = find_tensors(directory)
    with blaming(directory / "config.json"), torch.device("meta"):
        config = replace(parse_config(files.get("config.json", b"")), files=files)
        ensure(9 * config.num_hidden_layers <= len(entries), "num_hidden_layers exceeds the files")
        model = Transformer(config)
    spare = ("rotary_emb.inv_freq", *["lm_head.weight"] * config.tie_word_embeddings)  # of old; the embedding
    entries = {name: entry for name, entry in entries.items() if not name.endswith(spare)}
    has = {(name, empty.shape, empty.is_floating_point()) for name, (_, _, empty) in entries.items()}
    wrong = has ^ {(name, weight.shape, True) for name, weight in model.state_dict().items()}
    ensure(not wrong, f"{directory}: files and model differ in (name, shape, float): {sorted(wrong)!r:.199}")
    if "tokenizer.json" in files:
        with blaming(directory / "tokenizer.json"):
            tokenizer = Tokenizer(files["tokenizer.json"], ends, config.model_type)
            ensure(tokenizer.size <= config.vocab_size, f"{tokenizer.size} tokens exceed the vocab_size")
    state = {name: read_tensor(*entry).to(dtype) for name, entry in entries.items()}
    model.load_state_dict(state, assign=True)
    return model, tokenizer


def save_pretrained(directory, model, tokenizer, weights=None):
    """Write a directory that load_pretrained, transformers and vLLM read; tokenizer may be None, weights be
    given in the place of the model's own.

    config.json is in the older dialect, which all read; the other files that came with the model are carried
    over. All are complete before the first takes its place: an interruption leaves an older checkpoint whole.
    """
    directory, config, files = Path(directory), model.config, dict(model.config.files)
    if tokenizer:
        files.setdefault("tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast"}')
        files["tokenizer.json"] = tokenizer.json
    end_id = min(tokenizer.end_ids, default=None) if tokenizer else None
    raw = {"bos_token_id": None, "eos_token_id": end_id}  # else transformers takes 1 and 2
    raw |= json.loads(files.get("config.json", b"{}")) | vars(config)
    raw |= {"architectures": [f"{config.model_type.title()}ForCausalLM"],
            "torch_dtype": str(next(model.parameters()).dtype)[6:]}
    raw = {key: value for key, value in raw.items() if key not in ("files", "rope_parameters", "dtype")}
    files["config.json"] = json.dumps(raw, indent=2).encode()
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for name, data in files.items():
            stack.enter_context(replacing(directory / name)).write(data)
        write_safetensors(directory / "model.safetensors", weights or model.state_dict())
    shards = [path.name for path in directory.glob("model-*-of-*.safetensors")]
    for name in {*shards, *SIDE_FILES, "model.safetensors.index.json"} - files.keys():
        (directory / name).unlink(missing_ok=True)
