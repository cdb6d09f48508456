"""One decoder-only transformer for Llama, Qwen2 and Qwen3 weights, and for the tiny model that is born here.

Reading order: `Transformer` (tokens -> logits), `generate` and `score` (sampling, and scoring what was
sampled), `Tokenizer` (text <-> tokens), checkpoints in and out. Modules bear the names of Hugging Face's
state dicts, so that weights load by a strict match of names.

Every prompt of a batch is a branch of one tree: instructions that all share, a state that many share, an
answer of a few tokens. `generate` and `score` run each node of that tree once: the instructions' keys and
values are a `prefix` of batch size one, the states' are gathered for the answers that follow them. This is
exact, gradients included.

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
from functools import partial
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
          "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
          "BOOL": torch.bool}
SIDE_FILES = """config.json generation_config.json tokenizer.json tokenizer_config.json added_tokens.json
             special_tokens_map.json vocab.json merges.txt chat_template.jinja""".split()


@dataclass(frozen=True)
class Config:
    """Architecture; the names are those of config.json.

    q, k and v have biases with attention_bias or in qwen2, o with attention_bias; qwen3 has q and k norms.
    """
    model_type: str  # of FAMILIES
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
    attention_bias: bool = False
    mlp_bias: bool = False
    files: dict = field(default_factory=dict, repr=False, compare=False)  # SIDE_FILES read, name -> bytes


class RMSNorm(nn.RMSNorm):
    """x / rms(x) in float32, cast back, times the weight."""

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def rope_frequencies(c):
    """Angle per position of each pair of a head's dimensions, (head_dim / 2,), with Llama 3's scaling where
    it is set."""
    frequencies = 1 / c.rope_theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)
    if s := c.rope_scaling:  # long waves are stretched by `factor`, short ones kept, between them a mixture
        turns = s["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        frequencies = frequencies * (keep.clamp(0, 1) + (1 - keep.clamp(0, 1)) / s["factor"])
    return frequencies


def rotate(x, cos, sin):
    """Rotary positions in the split-halves form of these weights: x (batch, time, heads, head_dim)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    """Grouped-query attention to a prefix that all rows share, to each row's past, and to the tokens
    themselves.

    Keys and values are (kv_heads, batch, slots, head_dim): the shared part is one matrix product per kv head.
    """

    def __init__(self, c):
        super().__init__()
        self.head_dim, bias = c.head_dim, c.attention_bias or c.model_type == "qwen2"
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias)
        size = c.num_key_value_heads * c.head_dim
        self.k_proj, self.v_proj = (nn.Linear(c.hidden_size, size, bias) for _ in "kv")
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, c.attention_bias)
        norm = RMSNorm if c.model_type == "qwen3" else nn.Identity
        self.q_norm, self.k_norm = (norm(c.head_dim, c.rms_norm_eps) for _ in "qk")

    def forward(self, x, cos, sin, bias, slots, prefix, past):
        (batch, time, _), d = x.shape, self.head_dim
        q = rotate(self.q_norm(self.q_proj(x).view(batch, time, -1, d)), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(batch, time, -1, d)), cos, sin).permute(2, 0, 1, 3)
        v = self.v_proj(x).view(batch, time, -1, d).permute(2, 0, 1, 3)  # (kv_heads, batch, time, head_dim)
        if past:  # in place while sampling; out of place where autograd needs the old values
            put = torch.Tensor.scatter if torch.is_grad_enabled() else torch.Tensor.scatter_
            index = slots[None, :, :, None].expand_as(k)
            k, v = put(past[0], 2, index, k), put(past[1], 2, index, v)
        if not (prefix or past):
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(0, 1), v.transpose(0, 1),
                                                 is_causal=True, enable_gqa=True)
            return self.o_proj(out.transpose(1, 2).reshape(batch, time, -1)), (k, v)
        heads, length = len(k), prefix[0].shape[2]
        q = (q * d ** -.5).unflatten(2, (heads, -1)).permute(2, 0, 3, 1, 4)  # (kv, batch, groups, time, d)
        shape, q = q.shape, q.reshape(heads, -1, d)
        shared = q @ prefix[0][:, 0].mT  # (kv_heads, batch * groups * time, length)
        own = (q.view(heads, batch, -1, d) @ k.mT).view(*shape[:4], -1) + bias
        weights = torch.cat([shared.view(*shape[:4], length), own], -1).softmax(-1)
        shared, own = weights.view(heads, batch, -1, weights.shape[-1]).split([length, own.shape[-1]], -1)
        out = (own @ v).view(shape) + (shared.flatten(1, 2) @ prefix[1][:, 0]).view(shape)
        return self.o_proj(out.permute(1, 3, 0, 2, 4).reshape(batch, time, -1)), (k, v)


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
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, *context):
        attended, kv = self.self_attn(self.input_layernorm(x), *context)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kv


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

    def forward(self, ids, prefix=None, past=None, lengths=0, rows=None, keep=False):
        """Logits of the next token: ids (batch, time) int64 -> (batch, time, vocabulary).

        prefix: keys and values per layer of tokens that stand before every row (batch size one); past: those
        of each row, with free slots behind its `lengths` (batch,) tokens, where the new ones go; rows:
        indices into the flattened (batch * time) positions, to have logits of these alone, (rows,
        vocabulary); keep: return (logits, keys and values per layer). Rows are padded at their end: what
        stands behind a token never reaches it.
        """
        x, c, device = self.model["embed_tokens"](ids), self.config, ids.device
        steps = torch.arange(ids.shape[1], device=device)
        slots = torch.as_tensor(lengths, device=device).view(-1, 1) + steps  # (batch or 1, time)
        positions = slots + (prefix[0][0].shape[2] if prefix else 0)  # (batch or 1, time)
        angles = positions[..., None] * rope_frequencies(c).to(device)
        angles = torch.cat([angles, angles], -1)[:, :, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        later = torch.arange(past[0][0].shape[2] if past else ids.shape[1], device=device) > slots[..., None]
        bias = torch.zeros(later.shape, dtype=x.dtype, device=device).masked_fill(later, -torch.inf)[:, None]
        kept = []
        for i, layer in enumerate(self.model["layers"]):
            again = self.recompute and x.requires_grad
            run = partial(checkpoint, layer, use_reentrant=False) if again else layer
            x, kv = run(x, cos, sin, bias, slots, prefix and prefix[i], past and past[i])
            kept.append(kv)
        x = self.model["norm"](x if rows is None else x.flatten(0, 1)[rows])
        head = self.model["embed_tokens"] if c.tie_word_embeddings else self.lm_head
        logits = F.linear(x, head.weight)
        return (logits, kept) if keep else logits


def pad(sequences, device):
    """Lists of ids -> (batch, longest) int64, zeros behind each, and their lengths (batch,)."""
    lengths = torch.tensor([len(s) for s in sequences])
    ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    ids[within(lengths, ids.shape[1])] = torch.tensor([token for s in sequences for token in s])
    return ids.to(device), lengths.to(device)


def within(lengths, width):
    """Which of `width` positions are within each length: (batch,) -> (batch, width) bool."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def encode_prefix(model, ids):
    """Keys and values per layer of the instructions that every prompt begins with."""
    device = model.model["embed_tokens"].weight.device
    none = torch.empty(0, dtype=torch.long, device=device)
    return model(torch.tensor([ids], device=device), rows=none, keep=True)[1]


def encode_prompts(model, prefix, prompts, room):
    """Equal prompts once: (each prompt's row, next-token logits, keys and values with `room` free slots,
    lengths)."""
    rows = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    ids, lengths = pad(list(rows), prefix[0][0].device)
    last = torch.arange(len(rows), device=ids.device) * ids.shape[1] + lengths - 1
    logits, past = model(ids, prefix, rows=last, keep=True)
    past = [tuple(F.pad(x, (0, 0, 0, room)) for x in kv) for kv in past]
    return torch.tensor([rows[tuple(p)] for p in prompts], device=ids.device), logits, past, lengths


@torch.no_grad()
def generate(model, prefix, prompts, uniforms, limit, end_ids, vocabulary, temperature=1.0):
    """Continue each prompt (a list of ids after the prefix) until an end token, which belongs to the answer,
    or the limit.

    uniforms: (prompts, limit) numbers in [0, 1), one per token, so that what a row samples does not depend on
    its batch; None picks the likeliest token. Returns ids and log-probabilities at `temperature` over the
    first `vocabulary` tokens, a list of lists each. Rows that have said the same so far share one row of the
    batch; ended ones leave it.
    """
    parent, logits, past, lengths = encode_prompts(model, prefix, prompts, limit - 1)
    device, ends = logits.device, torch.tensor(sorted(end_ids), device=logits.device)
    uniforms = None if uniforms is None else torch.as_tensor(uniforms, dtype=torch.float32, device=device)
    tokens = torch.full((len(prompts), limit), -1, device=device)
    logprobs = torch.zeros(len(prompts), limit, device=device)
    alive = torch.arange(len(prompts), device=device)  # rows that go on; parent: their row of the batch
    for t in range(limit):
        table = (logits[:, :vocabulary].float() / temperature).log_softmax(-1)
        if uniforms is None:
            token = table.argmax(-1)[parent]
        else:  # the inverse of the cumulative distribution
            cumulative = table.exp().cumsum(-1)[parent]
            target = uniforms[alive, t:t + 1] * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=table.shape[1] - 1)
        tokens[alive, t], logprobs[alive, t] = token, table[parent, token]
        going = ~torch.isin(token, ends)
        alive, parent, token = alive[going], parent[going], token[going]
        if t + 1 == limit or not len(alive):
            break
        branches, parent = (parent * vocabulary + token).unique(return_inverse=True)
        source = branches // vocabulary
        if not torch.equal(source, torch.arange(len(lengths), device=device)):
            past, lengths = [(k[:, source], v[:, source]) for k, v in past], lengths[source]
        logits = model(branches[:, None] % vocabulary, prefix, past, lengths)[:, 0]
        lengths = lengths + 1
    counts = (tokens >= 0).sum(1).tolist()
    return tuple([row[:n] for row, n in zip(x.tolist(), counts)] for x in (tokens, logprobs))


def score(model, prefix, prompts, responses, vocabulary, temperature=1.0):
    """Log-probabilities and entropies of the responses' tokens, each (tokens of all responses in their
    order,).

    The same numbers as `generate` gave, with gradient. Logits are computed at response positions alone.
    """
    pairs = {pair: i for i, pair in enumerate(dict.fromkeys(zip(map(tuple, prompts), map(tuple, responses))))}
    ids, counts = pad([response for _, response in pairs], prefix[0][0].device)  # (unique, time)
    unique, room = [prompt for prompt, _ in pairs], ids.shape[1] - 1
    parent, logits, past, lengths = encode_prompts(model, prefix, unique, room)
    table = (logits[:, :vocabulary].float() / temperature).log_softmax(-1)  # (prompts, vocabulary)
    logprobs, entropies = table[parent, ids[:, 0]][:, None], -(table.exp() * table).sum(-1)[parent, None]
    if ids.shape[1] > 1:
        past = [(k[:, parent], v[:, parent]) for k, v in past]
        logits = model(ids[:, :-1], prefix, past, lengths[parent])[..., :vocabulary]
        table = (logits.float() / temperature).log_softmax(-1)  # (unique, time - 1, vocabulary)
        logprobs = torch.cat([logprobs, table.gather(2, ids[:, 1:, None])[..., 0]], 1)
        entropies = torch.cat([entropies, -(table.exp() * table).sum(-1)], 1)
    row = torch.tensor([pairs[tuple(p), tuple(r)] for p, r in zip(prompts, responses)], device=ids.device)
    real = within(counts, ids.shape[1])[row]
    return logprobs[row][real], entropies[row][real]


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
        os.replace(temporary, path)
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
    """Config of config.json's bytes, from transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

    An absent or null key has transformers' default. Call it inside `blaming`.
    """
    raw = parse_json(data)
    raw |= (raw.get("rope_parameters") or {}) | (raw.get("rope_scaling") or {})
    kinds = "llama3", "default", None  # `type` is the older name, `full_attention` a rope of its own
    for key, *allowed in (("model_type", *FAMILIES), ("rope_type", *kinds), ("type", *kinds),
                          ("hidden_act", "silu", None), ("partial_rotary_factor", 1, None),
                          ("full_attention", None), ("use_sliding_window", False, None),
                          ("quantization_config", None)):
        ensure(raw.get(key) in allowed, f"{key} is {raw.get(key)!r:.99}, where {allowed} are supported")
    layers = set(re.findall(r"\w+", str(raw.get("layer_types"))))
    ensure(layers <= {"None", "full_attention"}, f"layer_types is {layers!r:.99}, not full_attention")

    def get(key, kind, default=None):
        value = default if raw.get(key) is None else raw[key]
        good = type(value) in (kind, int if kind is float else kind)  # to isinstance, True is an int
        ensure(good and (kind is bool or 0 < value <= (1e15 if kind is float else 1 << 24)),
               f"{key} is {value!r:.99}, which is no {kind.__name__} in range")
        return value

    heads, qwen3 = get("num_attention_heads", int), raw["model_type"] == "qwen3"
    defaults = {"num_key_value_heads": heads,
                "head_dim": 128 if qwen3 and "head_dim" not in raw else get("hidden_size", int) // heads}
    shape = {f.name: get(f.name, f.type, defaults.get(f.name, f.default)) for f in fields(Config)
             if f.type in (int, float, bool)}
    shape["attention_bias"] &= raw["model_type"] != "qwen2"  # which has its own way
    shape["mlp_bias"] &= raw["model_type"] == "llama"
    ensure(heads % shape["num_key_value_heads"] == 0, f"num_key_value_heads does not divide {heads} heads")
    ensure(shape["head_dim"] % 2 == 0, f"head_dim is {shape['head_dim']}, which is odd")
    if "llama3" in (raw.get("rope_type"), raw.get("type")):
        keys = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
        shape["rope_scaling"] = {"rope_type": "llama3"} | {key: get(key, float) for key in keys}
        ensure(raw["low_freq_factor"] < raw["high_freq_factor"], "high_freq_factor is below low_freq_factor")
    return Config(raw["model_type"], **shape)


def format_config(config, dtype, end_ids):
    """config.json's bytes in the older dialect, which transformers 4 and 5 and vLLM all read."""
    raw = {"bos_token_id": None, "eos_token_id": min(end_ids, default=None)}  # else transformers takes 1, 2
    raw |= json.loads(config.files.get("config.json", b"{}"))
    raw |= {f.name: getattr(config, f.name) for f in fields(config)} | {
        "hidden_act": "silu", "architectures": [FAMILIES[config.model_type]], "torch_dtype": str(dtype)[6:]}
    raw = {key: value for key, value in raw.items() if key not in ("files", "rope_parameters", "dtype")}
    return json.dumps(raw, indent=2).encode()


def read_header(path):
    """{name: (path, dtype, shape, offset)} of a safetensors file, in the order of the data, which is not
    read.

    The format: 8 little-endian bytes N; N bytes of JSON, {name: {dtype, shape, data_offsets}}; the data.
    """
    with blaming(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        end = start = 8 + int.from_bytes(file.read(8), "little")
        ensure(start <= min(size, 100_000_008), f"a header of {start - 8} bytes in {size} is too long")
        header, entries = parse_json(file.read(start - 8)), {}
        metadata = header.pop("__metadata__", None)
        ensure(metadata is None or {*map(type, metadata.values())} <= {str}, "__metadata__ maps no strings")
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            good = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in [*shape, begin, stop])
            good = good and len(shape) <= 64 and math.prod(max(n, 1) for n in shape) < 1 << 63  # strides
            good = good and start + begin == end and math.prod(shape) * dtype.itemsize == stop - begin
            ensure(good, f"tensor {name!r:.99} is {entry!r:.199}, where byte {end - start} is next")
            entries[name], end = (path, dtype, shape, start + begin), start + stop
        ensure(end == size, f"its tensors end at byte {end}, the file at {size}")
    return entries


def read_tensor(path, dtype, shape, offset):
    """A tensor of `read_header`, allocated once and read into."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    data = tensor.reshape(-1).view(torch.uint8).numpy()  # the same memory
    with blaming(path), open(path, "rb") as file:
        file.seek(offset)
        ensure(file.readinto(data) == data.nbytes, "the file ends within a tensor")
        ensure(dtype != torch.bool or data.max(initial=0) <= 1, "a BOOL is not 0 or 1")
    return tensor


def read_safetensors(path):
    """{name: tensor} of a safetensors file. Raises ValueError, with file and reason, if it is malformed."""
    return {name: read_tensor(*entry) for name, entry in read_header(path).items()}


def write_safetensors(path, tensors):
    """Write {name: tensor} as a safetensors file, sorted by name, one tensor at a time."""
    names, tensors = {dtype: name for name, dtype in DTYPES.items()}, dict(sorted(tensors.items()))
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers 4 insists on it
    for name, tensor in tensors.items():
        ensure(tensor.dtype in names and name not in header, f"{path} cannot hold {name!r} of {tensor.dtype}")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())


def find_tensors(directory):
    """`read_header` of model.safetensors, or of the shards that model.safetensors.index.json names,
    together."""
    path, index, entries = directory / "model.safetensors", directory / "model.safetensors.index.json", {}
    if path.exists() or not index.exists():
        return read_header(path)
    with blaming(index):
        home = parse_json(index.read_bytes())["weight_map"]
        for shard in set(home.values()):
            ensure(re.fullmatch(r"[^/\\\0]+\.safetensors", shard), f"{shard!r:.99} is no bare file name")
            found = read_header(directory / shard)
            wrong = found.keys() ^ {name for name in home if home[name] == shard}
            ensure(not wrong, f"it and {shard} disagree on {sorted(wrong)!r:.199}")
            entries |= found
    return entries


# How GPT-2 cuts text into pieces; the same after every digit was cut out, where white space before a digit
# stays whole; the tiny tokenizer's way: a line of prose, whole, as attention to constants costs time; a tag;
# a word, number or symbol with the space before it; white space.
GPT2_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT_PIECES = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
TINY_PIECES = r"[A-Z][a-z][^\n]*|</?[a-z]+>| ?[A-Za-z]+| ?[0-9]+| ?[^\s<A-Za-z0-9]|\s|<"
CHATS = {  # a control token that tells a template: (before the user's text, end of turn, start of the answer)
    "<|im_start|>": ("<|im_start|>user\n", "<|im_end|>", "\n<|im_start|>assistant\n"),
    "<|start_header_id|>": ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>",
                            "<|start_header_id|>assistant<|end_header_id|>\n\n"), None: ("", None, "\n")}
# tokenizer.json spells bytes as printable characters: these as themselves, the others from U+0100 on (GPT-2).
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in PRINTABLE)}
CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}


def split_pattern(pre_tokenizer):
    """The regular expression of the pieces into which a tokenizer.json's pre_tokenizer cuts text."""
    *first, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    plain = last["type"] == "ByteLevel" and last["add_prefix_space"] is False
    match plain, last.get("use_regex", True), first:
        case True, True, []:
            return GPT2_PIECES
        case True, True, [{"type": "Digits", "individual_digits": True}]:
            return DIGIT_PIECES
        case True, False, [{"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"}]:
            return regex
    raise ValueError(f"pre_tokenizer {pre_tokenizer!r:.299} is not supported")


def merge_ranks(model, special):
    """{bytes: id} of a tokenizer.json's BPE model without the control tokens.

    tiktoken merges the pair whose result has the lowest id, the file the pair that it lists first: the same
    where the merges are in the order of the ids.
    """
    ensure(model["type"] == "BPE", f"model type {model['type']!r:.99} is not BPE")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    made = [model["vocab"]["".join(merge)] for merge in merges]
    ensure(made == sorted(made), "merges that are not in the order of the ids are not supported")
    vocab = {token: i for token, i in model["vocab"].items() if token not in special}
    return {bytes(BYTE_OF[char] for char in token): i for token, i in vocab.items()}


class Tokenizer:
    """Text <-> token ids by a tiktoken.Encoding made of tokenizer.json's bytes, and the chat around a prompt.

    size: a policy samples ids below it; end_ids: those that end an answer; special: {name: id} of the control
    tokens, which no text becomes. Call it inside `blaming`.
    """

    def __init__(self, data, end_ids=(), model_type="llama"):
        self.json, raw = data, parse_json(data)
        self.special = {token["content"]: token["id"] for token in raw["added_tokens"]}
        self.normalizer, ranks = raw["normalizer"], merge_ranks(raw["model"], self.special)
        ensure(self.normalizer in (None, {"type": "NFC"}), f"normalizer {self.normalizer!r:.99} is not NFC")
        self.bytes_of = {i: token for token, i in ranks.items()}
        self.bytes_of |= {i: name.encode() for name, i in self.special.items()}
        good = all(type(i) is int and 0 <= i < 1 << 24 for i in self.bytes_of) and b"" not in ranks
        ensure(good and len(self.bytes_of) == len(ranks) + len(self.special), "a token is without text or id")
        self.size = max(self.bytes_of) + 1
        # Bytes that the vocabulary lacks: transformers drops them, tiktoken panics. They get ids above size.
        lacking = [byte for byte in (bytes([i]) for i in range(256)) if byte not in ranks]
        ranks |= {byte: self.size + i for i, byte in enumerate(lacking)}
        lost = "".join(f"\\x{byte[0]:02x}" for byte in lacking if byte[0] < 128) or "^\\S\\s"
        before, behind = r"(?:(?<=[^\w\s])|(?<=[_\x1c-\x1f]))", r"(?=[^\w\s]|[_\x1c-\x1f])"
        self.lost = re.compile(f"{before}[{lost}]+|[{lost}]+{behind}")
        self.encoding = tiktoken.Encoding("", pat_str=split_pattern(raw["pre_tokenizer"]),
                                          mergeable_ranks=ranks, special_tokens={})
        before, end, after = next(chat for marker, chat in CHATS.items() if marker in {*self.special, None})
        self.before, self.after = self._template(before), self._template((end or "") + after)
        thinks = model_type == "qwen3" and "<think>" in self.special
        self.no_thought = self._template("<think>\n\n</think>\n\n") if thinks else []
        self.end_ids = frozenset({*end_ids, self.special.get(end)} - {None})

    def _template(self, text):
        parts = re.split("(<[^<>]*>)", text)
        return [i for part in parts for i in ([self.special[part]] if "<" in part else self.encode(part))]

    def encode(self, text):
        """Token ids of text; what spells a control token is text like any other."""
        text = unicodedata.normalize("NFC", text) if self.normalizer else text
        text = self.lost.sub("", text)  # within runs of symbols, which are merged without them
        return [i for i in self.encoding.encode_ordinary(text) if i < self.size]

    def decode(self, ids):
        """Text of token ids, control tokens by name; ids of no token are left out, broken UTF-8 is U+FFFD."""
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode("utf-8", "replace")

    def prefix(self, instructions):
        """Tokens of a prompt up to its state; the x that comes off again cuts them as the state will."""
        return self.before + self.encode(instructions + "\n\nx")[:-1]

    def suffix(self, state, think=False):
        """Tokens of a prompt from its state on; without think, Qwen3 expects an empty thought."""
        return self.encode(state) + self.after + ([] if think else self.no_thought)


def tiny_tokenizer(texts, end):
    """A Tokenizer of the 256 bytes and of the pieces of some texts, of which `end` ends an answer."""
    pieces = [piece for text in texts for piece in re.findall(TINY_PIECES, text)]
    spelt = ["".join(CHAR_OF[byte] for byte in piece.encode()) for piece in pieces]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*map(CHAR_OF.get, range(256)), *spelt]))}
    pairs = [(token[:i], token[i:]) for token in vocab for i in range(1, len(token))]
    merges = [pair for pair in pairs if vocab.keys() >= set(pair)]  # all those that tiktoken finds
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": TINY_PIECES}, "behavior": "Isolated", "invert": False}
    data = json.dumps({
        "version": "1.0", "added_tokens": [], "normalizer": None, "decoder": bytes_,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges}})
    return Tokenizer(data.encode(), [vocab[end]])


def load_pretrained(directory, dtype=torch.float32):
    """(Transformer in dtype, Tokenizer) of a Hugging Face directory; the second None without tokenizer.json.

    Memory peaks at about the weights' own size: a model on the meta device tells which names and shapes the
    files must have, then each tensor is allocated once and converted by itself. Raises ValueError, with file
    and reason, on what is malformed or another kind of model.
    """
    directory, ends = Path(directory), []
    files = {name: (directory / name).read_bytes() for name in SIDE_FILES if (directory / name).exists()}
    for name in ("generation_config.json", "config.json"):
        with blaming(directory / name):
            found = parse_json(files.get(name, b"{}")).get("eos_token_id")
            ends += found if isinstance(found, list) else [found]
            ensure(all(i is None or type(i) is int for i in ends), f"eos_token_id is {found!r:.99}")
    with blaming(directory / "config.json"):
        config = replace(parse_config(files.get("config.json", b"")), files=files)
    entries = find_tensors(directory)
    ensure(9 * config.num_hidden_layers <= len(entries),  # before making them: a layer has 9 tensors or more
           f"{directory}: num_hidden_layers {config.num_hidden_layers} against {len(entries)} tensors")
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: [*tensor.shape] for name, tensor in model.state_dict().items()}
    for name in [*entries]:  # the embedding once more, and what old Llama files repeat of rope_theta
        if name == "lm_head.weight" and config.tie_word_embeddings or name.endswith("rotary_emb.inv_freq"):
            del entries[name]
    wrong = sorted(shapes.keys() ^ entries.keys())
    ensure(not wrong, f"{directory}: tensors that the files lack or the model does not know: {wrong!r:.199}")
    for name, (path, kind, shape, _) in entries.items():
        ensure(shape == shapes[name] and kind.is_floating_point,
               f"{path}: {name} is {kind} {shape}, where the model has floats {shapes[name]}")
    state = {name: read_tensor(*entry).to(dtype) for name, entry in entries.items()}
    model.load_state_dict(state, assign=True)
    if "tokenizer.json" not in files:
        return model, None
    with blaming(directory / "tokenizer.json"):
        tokenizer = Tokenizer(files["tokenizer.json"], ends, config.model_type)
        ensure(tokenizer.size <= config.vocab_size, f"{tokenizer.size} tokens exceed the model's vocab_size")
    return model, tokenizer


def save_pretrained(directory, model, tokenizer):
    """Write a directory that load_pretrained, transformers and vLLM read; tokenizer may be None.

    The files that the model was loaded with are carried over. All are complete beside their places before the
    first takes its own, so an interruption leaves an earlier checkpoint whole.
    """
    directory, files = Path(directory), dict(model.config.files)
    end_ids = tokenizer.end_ids if tokenizer else set()
    if tokenizer:
        ends = [name for name, i in tokenizer.special.items() if i in end_ids]  # a word stays a word
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": ends[0] if ends else None}
        files = {"tokenizer_config.json": json.dumps(settings).encode()} | files
        files["tokenizer.json"] = tokenizer.json
    files["config.json"] = format_config(model.config, next(model.parameters()).dtype, end_ids)
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for name, data in files.items():
            stack.enter_context(replacing(directory / name)).write(data)
        write_safetensors(directory / "model.safetensors", model.state_dict())
    shards = [path.name for path in directory.glob("model-*-of-*.safetensors")]
    for name in {*shards, *SIDE_FILES, "model.safetensors.index.json"} - files.keys():
        (directory / name).unlink(missing_ok=True)
