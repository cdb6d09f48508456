"""One decoder-only transformer for Llama, Qwen2 and Qwen3 weights, and for the tiny model born here.

Reading order: `Transformer` (tokens -> logits), `LanguageAgent` (text -> tokens that are sampled, then
scored), and, below a line, the file formats: tokenizer, config.json, safetensors, load and save.
Modules bear the names of Hugging Face's state dicts, so that weights load by a strict match of names.
"""

import contextlib
import json
import os
import re
import unicodedata
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import tiktoken
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from msgrpo import Answer

TABLE_ELEMENTS = 2**26  # of one table over the vocabulary while scoring: 256 MiB in float32


@dataclass(frozen=True)
class Config:
    """The architecture, by the names of config.json."""

    model_type: str  # "llama", "qwen2" (biases of q, k, v) or "qwen3" (norms of q and k)
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k, v and o
    mlp_bias: bool = False
    rope_scaling: dict | None = None  # Llama 3's


class RMSNorm(nn.RMSNorm):
    """x / rms(x), computed in float32 and cast back, times the weight."""

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


def rotary(config, positions, dtype):
    """cos and sin of the angles of positions (batch, time); each (batch, 1, time, head_dim)."""
    steps = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequencies = config.rope_theta ** -(steps / config.head_dim)  # (head_dim / 2,)
    if config.rope_scaling:
        frequencies = scale_frequencies(frequencies, config.rope_scaling)
    angles = positions[:, None, :, None] * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def scale_frequencies(frequencies, scaling):
    """Llama 3's scaling: long waves are stretched by `factor`, short ones kept, those between mixed."""
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def rotate(x, cos, sin):
    """Rotary positions in the split-halves form of these weights: x (batch, heads, time, head_dim)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def attention_mask(config, positions, slots, dtype):
    """What `attention` adds to its scores: 0 where a token sees a slot, -inf where it does not.

    A token's slot is its position, and it sees all slots up to its own. positions (batch, time) ->
    (batch, 1, heads of a group * time, slots).
    """
    visible = torch.arange(slots, device=positions.device) <= positions[:, :, None]
    mask = torch.zeros(visible.shape, dtype=dtype, device=positions.device)
    mask = mask.masked_fill(~visible, -torch.inf)  # (batch, time, slots)
    heads_of_a_group = config.num_attention_heads // config.num_key_value_heads
    return mask.repeat(1, heads_of_a_group, 1)[:, None]


def attention(q, k, v, mask):
    """Grouped-query attention: the heads of a group have queries of their own, and share keys and values.

    q (batch, heads, time, head_dim), k and v (batch, groups, slots, head_dim) -> (batch, time, width).
    A group's heads are laid behind each other in time, as if they were one head with more queries.
    """
    batch, heads, time, head_dim = q.shape
    groups = k.shape[1]
    q = q.reshape(batch, groups, heads // groups * time, head_dim)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = out.view(batch, heads, time, head_dim)
    return out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        width = config.hidden_size
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        qkv_bias = config.attention_bias or config.model_type == "qwen2"
        self.q_proj = nn.Linear(width, q_width, bias=qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.o_proj = nn.Linear(q_width, width, bias=config.attention_bias)
        norm = RMSNorm if config.model_type == "qwen3" else nn.Identity
        self.q_norm = norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = norm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, past):
        """x (batch, time, width) -> the same shape, and the tokens' own keys and values."""
        q = self.heads(self.q_proj(x))  # (batch, heads, time, head_dim)
        k = self.heads(self.k_proj(x))  # (batch, groups, time, head_dim)
        v = self.heads(self.v_proj(x))  # (batch, groups, time, head_dim)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        all_k = k
        all_v = v
        if past is not None:
            all_k, all_v = past.extend(self.layer, k, v)  # (batch, groups, slots, head_dim)
        return self.o_proj(attention(q, all_k, all_v, mask)), k, v

    def heads(self, x):
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        inner = config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(width, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, width, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, past):
        attended, k, v = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        x = x + attended
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, k, v


class Decoder(nn.Module):
    """Token embeddings, blocks, a norm."""

    recompute = False  # True: the backward pass computes activations again, for less memory

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids, positions, past=None):
        """ids (batch, time), positions (batch or 1, time) -> hidden states (batch, time, width).

        past: a `Prefix` or `Cache` of earlier tokens that these see. Also returned: the tokens' own
        keys and values, one (keys, values) per layer, each (batch, groups, time, head_dim).
        """
        x = self.embed_tokens(ids)
        cos, sin = rotary(self.config, positions, x.dtype)
        time = ids.shape[1]
        slots = time if past is None else past.slots(time)
        mask = attention_mask(self.config, positions, slots, x.dtype)
        recompute = self.recompute and torch.is_grad_enabled()
        keys_values = []
        for layer in self.layers:
            if recompute:
                x, k, v = checkpoint(layer, x, cos, sin, mask, past, use_reentrant=False)
            else:
                x, k, v = layer(x, cos, sin, mask, past)
            keys_values.append((k, v))
        return self.norm(x), keys_values


class Transformer(nn.Module):
    """A decoder and its head, which may be the token embeddings again."""

    files = {}  # small files that came with the weights, {name: bytes}

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids):
        """Logits of the next token: ids (batch, time) int64 -> (batch, time, vocabulary)."""
        x, _ = self.hidden(ids, torch.arange(ids.shape[1], device=ids.device)[None])
        return self.head(x)

    def hidden(self, ids, positions, past=None):
        """As `Decoder.forward`; several processes need it as a method of the whole model."""
        return self.model(ids, positions, past)

    def head(self, x):
        """Hidden states (..., width) -> logits (..., vocabulary)."""
        layer = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(x, layer.weight)

    def log_probabilities(self, x, size, temperature):
        """Of the first `size` tokens, next after hidden states x (rows, width): (rows, size).

        A model may have rows beyond its tokenizer's tokens. They take no part.
        """
        return (self.head(x)[:, :size].float() / temperature).log_softmax(-1)

    def token_logprobs(self, x, targets, size, temperature):
        """Log-probabilities of targets (tokens,) after hidden states x (tokens, width), and entropies.

        Exact, in slices of tokens. A table over the vocabulary takes more memory than the rest of an
        update: so there is one slice's at a time, computed again in the backward pass.
        """

        def one_slice(x, targets):
            table = self.log_probabilities(x, size, temperature)
            logprobs = table.gather(1, targets[:, None])[:, 0]
            entropies = -(table.exp() * table).sum(-1)
            return logprobs, entropies

        rows = max(1, TABLE_ELEMENTS // size)
        if len(targets) <= rows:
            return one_slice(x, targets)
        slices = zip(x.split(rows), targets.split(rows))
        parts = [checkpoint(one_slice, *part, use_reentrant=False) for part in slices]
        logprobs, entropies = zip(*parts)
        return torch.cat(logprobs), torch.cat(entropies)


class Prefix:
    """Keys and values of the instructions, which are computed once and seen by every row.

    keys_values: one (keys, values) per layer, each (1, groups, tokens, head_dim).
    """

    def __init__(self, keys_values):
        self.keys_values = keys_values

    def __len__(self):
        return self.keys_values[0][0].shape[2]

    def slots(self, time):
        return len(self) + time

    def extend(self, layer, k, v):
        """The rows' own k and v (batch, groups, time, head_dim), behind those of the instructions."""
        prefix_k, prefix_v = self.keys_values[layer]
        batch = k.shape[0]
        k = torch.cat([prefix_k.expand(batch, -1, -1, -1), k], 2)
        v = torch.cat([prefix_v.expand(batch, -1, -1, -1), v], 2)
        return k, v


class Cache:
    """Keys and values of a batch of rows while their answers are sampled.

    A token's slot is its position. All slots are there from the start: no shape changes from token
    to token, so a step can be captured as one graph.
    """

    def __init__(self, prefix, prompts, lengths, new_tokens):
        """prompts: one (keys, values) per layer, each (rows, groups, width, head_dim), padded on the right.

        lengths (rows,): tokens of each prompt. A row's answer begins behind its last one: it
        overwrites the padding before anything has seen it.
        """
        self.size = len(prefix) + prompts[0][0].shape[2] + new_tokens
        self.positions = len(prefix) + lengths - 1  # (rows,) of the last token so far
        self.rows = torch.arange(len(lengths), device=lengths.device)
        self.keys_values = [
            (self.allocate(prefix_k, k), self.allocate(prefix_v, v))
            for (prefix_k, prefix_v), (k, v) in zip(prefix.keys_values, prompts)
        ]

    def allocate(self, of_prefix, of_prompts):
        rows, groups, width, head_dim = of_prompts.shape
        start = of_prefix.shape[2]
        slots = of_prompts.new_zeros(rows, groups, self.size, head_dim)
        slots[:, :, :start] = of_prefix
        slots[:, :, start : start + width] = of_prompts
        return slots

    def slots(self, time):
        return self.size

    def extend(self, layer, k, v):
        """Write the new token's k and v (rows, groups, 1, head_dim); returns those of all slots."""
        all_k, all_v = self.keys_values[layer]
        all_k[self.rows, :, self.positions] = k[:, :, 0]
        all_v[self.rows, :, self.positions] = v[:, :, 0]
        return all_k, all_v

    def take(self, rows):
        """Keep these rows, in this order."""
        self.keys_values = [(k[rows], v[rows]) for k, v in self.keys_values]
        self.positions = self.positions[rows]
        self.rows = self.rows[: len(self.positions)]


def sample(table, uniforms):
    """The token of each row where the cumulative distribution passes the row's uniform.

    table (rows, size) of log-probabilities, uniforms (rows,) in [0, 1) -> (rows,). So a row's token
    does not depend on the other rows.
    """
    cumulative = table.exp().cumsum(-1)
    thresholds = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, thresholds, right=True)[:, 0]
    return tokens.clamp(max=table.shape[1] - 1)


def pad(rows, value):
    """Rows of integers as (rows, longest), each filled up on the right."""
    width = max(len(row) for row in rows)
    return [[*row] + [value] * (width - len(row)) for row in rows]


class LanguageAgent:
    """A language-agent policy (msgrpo.Policy): a transformer that reads the instructions before every state.

    The instructions are the same in every prompt: they are run once, and all rows see their keys and
    values. Equal prompts, and when scoring equal answers to them, are run once too. All of this is
    exact, gradients included.
    """

    def __init__(
        self, model, tokenizer, instructions, temperature=1.0, max_new_tokens=16, think=False
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.device = next(model.parameters()).device
        self.instructions = torch.tensor([tokenizer.prefix(instructions)], device=self.device)
        self.end_ids = torch.tensor(sorted(tokenizer.end_ids), device=self.device)
        self.encode = lru_cache(65536)(lambda state: tuple(tokenizer.suffix(state, think)))
        self.decode = lru_cache(65536)(tokenizer.decode)
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        """Call it when the weights have changed: what was computed with the old ones is forgotten."""
        self.prefix = self.read_instructions()
        self.greedy_answers = {}

    def read_instructions(self):
        positions = torch.arange(self.instructions.shape[1], device=self.device)
        _, keys_values = self.model.hidden(self.instructions, positions[None])
        return Prefix(keys_values)

    def read_rows(self, rows, prefix):
        """Run rows of tokens behind the instructions: hidden states (rows, longest, width), keys, values."""
        ids = torch.tensor(pad(rows, 0), device=self.device)
        positions = len(prefix) + torch.arange(ids.shape[1], device=self.device)
        return self.model.hidden(ids, positions[None], prefix)

    def table(self, x):
        """Log-probabilities of the next token after hidden states x (rows, width): (rows, size)."""
        return self.model.log_probabilities(x, self.tokenizer.size, self.temperature)

    def act(self, observations, uniforms):
        """As msgrpo.Policy says. Greedy answers are remembered until `refresh`."""
        if uniforms is not None:
            uniforms = torch.tensor(uniforms, dtype=torch.float32, device=self.device)
            return self.generate(observations, uniforms)
        new = [state for state in dict.fromkeys(observations) if state not in self.greedy_answers]
        if new:
            self.greedy_answers.update(zip(new, self.generate(new, None)))
        return [self.greedy_answers[state] for state in observations]

    @torch.no_grad()
    def generate(self, observations, uniforms):
        """An answer to each observation; uniforms (observations, max_new_tokens), None: greedy."""
        prompts = [self.encode(state) for state in observations]
        table, cache = self.read_prompts(prompts)
        tokens = torch.full((len(prompts), self.max_new_tokens), -1, device=self.device)
        logprobs = torch.zeros(len(prompts), self.max_new_tokens, device=self.device)
        alive = torch.arange(len(prompts), device=self.device)  # rows whose answers go on
        for t in range(self.max_new_tokens):
            if uniforms is None:
                token = table.argmax(-1)
            else:
                token = sample(table, uniforms[alive, t])
            tokens[alive, t] = token
            logprobs[alive, t] = table.gather(1, token[:, None])[:, 0]
            going = ~torch.isin(token, self.end_ids)
            alive = alive[going]
            if t + 1 == self.max_new_tokens or len(alive) == 0:
                break
            if len(alive) < len(token):
                token = token[going]
                cache.take(going)
            table = self.table(self.read_token(token, cache))
        return self.answers(prompts, tokens.tolist(), logprobs.tolist())

    def read_prompts(self, prompts):
        """Run the prompts: the table of each one's first new token, and a cache to go on from."""
        distinct = list(dict.fromkeys(prompts))
        x, keys_values = self.read_rows(distinct, self.prefix)
        lengths = torch.tensor([len(prompt) for prompt in distinct], device=self.device)
        last = x[torch.arange(len(distinct), device=self.device), lengths - 1]
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        rows = torch.tensor([row_of[prompt] for prompt in prompts], device=self.device)
        expanded = [(k[rows], v[rows]) for k, v in keys_values]  # a row for each observation
        cache = Cache(self.prefix, expanded, lengths[rows], self.max_new_tokens)
        return self.table(last)[rows], cache

    def read_token(self, token, cache):
        """Run the next token (rows,) of each row: hidden states (rows, width)."""
        cache.positions += 1
        x, _ = self.model.hidden(token[:, None], cache.positions[:, None], cache)
        return x[:, 0]

    def answers(self, prompts, tokens, logprobs):
        """Answers of the sampled tokens, whose rows end in -1 where the answer ended earlier."""
        answers = []
        for prompt, row, row_logprobs in zip(prompts, tokens, logprobs):
            response = tuple(token for token in row if token >= 0)
            truncated = response[-1] not in self.tokenizer.end_ids
            text = self.decode(response)
            answers.append(Answer(prompt, response, row_logprobs[: len(response)], text, truncated))
        return answers

    def score(self, answers):
        """As msgrpo.Policy says: the numbers that `act` gave, with gradient."""
        pairs = list(dict.fromkeys((answer.prompt, answer.response) for answer in answers))
        # The last token of an answer is predicted, not read; a token is predicted one place earlier.
        inputs = [prompt + response[:-1] for prompt, response in pairs]
        targets = [(-1,) * (len(prompt) - 1) + response for prompt, response in pairs]
        targets = torch.tensor(pad(targets, -1), device=self.device)  # (rows, longest)
        x, _ = self.read_rows(inputs, self.read_instructions())
        is_response = targets >= 0
        logprobs, entropies = self.model.token_logprobs(
            x[is_response], targets[is_response], self.tokenizer.size, self.temperature
        )
        row_of = {pair: row for row, pair in enumerate(pairs)}
        rows = [row_of[answer.prompt, answer.response] for answer in answers]
        lengths = [len(response) for _, response in pairs]
        return pick(logprobs.split(lengths), rows), pick(entropies.split(lengths), rows)


def pick(parts, order):
    return torch.cat([parts[i] for i in order])


# Below: file formats.

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
SUPPORTED = {
    "model_type": ("llama", "qwen2", "qwen3"),
    "hidden_act": ("silu",),
    "full_attention": (),
    "rope_type": ("default", "llama3"),
    "type": ("default", "llama3"),
    "partial_rotary_factor": (1,),
    "use_sliding_window": (False,),
    "quantization_config": (),
}  # as far as given; (): refused
FIELDS = dict.fromkeys(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim""".split(),
    int,
) | {
    "rms_norm_eps": float,
    "rope_theta": float,
    "tie_word_embeddings": bool,
    "mlp_bias": bool,
    "attention_bias": bool,
}


def numbered(items):
    """{item: its number}, each of them once, in order."""
    return {item: i for i, item in enumerate(dict.fromkeys(items))}


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
        kind = (
            ""
            if type(error) is ValueError
            else f"malformed or not supported, {type(error).__name__}: "
        )
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
    return {} | json.loads(
        data.decode(),
        parse_constant={}.__getitem__,
        object_pairs_hook=lambda pairs: (
            ensure(len(dict(pairs)) == len(pairs), "a JSON object has a key twice") or dict(pairs)
        ),
    )


def parse_config(data):
    """Config of config.json's bytes in either dialect, with transformers' defaults."""
    raw = parse_json(data)
    raw = {"head_dim": 128} | raw if raw.get("model_type") == "qwen3" else raw
    raw |= (raw.get("rope_parameters") or {}) | (raw.get("rope_scaling") or {})
    raw = {key: value for key, value in raw.items() if value is not None}
    for key, values in SUPPORTED.items():  # `type` is the older name of rope_type
        ensure(
            key not in raw or raw[key] in values,
            f"{key} is {raw.get(key)!r:.99}, not among {values}",
        )
    ensure(
        {*raw.get("layer_types", ())} <= {"full_attention"},
        "layer_types are not all full_attention",
    )
    heads, llama3 = raw["num_attention_heads"], "llama3" in (raw.get("rope_type"), raw.get("type"))
    raw = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads} | raw
    raw["attention_bias"] = raw["model_type"] != "qwen2" and raw.get("attention_bias", False)
    rope_keys = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    for key, kind in (FIELDS | dict.fromkeys(rope_keys, float)).items():
        value = raw.get(key, kind(1))
        good = type(value) in (
            kind,
            int if kind is float else kind,
        )  # to isinstance, True is an int
        ensure(
            good and (kind is bool or 0 < value < 1e15),
            f"{key} is {value!r:.99}, no fit {kind.__name__}",
        )
    fits = heads % raw["num_key_value_heads"] == raw["head_dim"] % 2 == 0
    fits = fits and (not llama3 or raw["low_freq_factor"] < raw["high_freq_factor"])
    ensure(
        fits, "num_key_value_heads divides no heads, head_dim is odd or high_freq_factor is too low"
    )
    scaling = {"rope_type": "llama3"} | {key: raw[key] for key in rope_keys} if llama3 else None
    return Config(
        raw["model_type"], rope_scaling=scaling, **{key: raw[key] for key in FIELDS if key in raw}
    )


def read_safetensors(path):
    """{name: tensor} of a safetensors file. Raises ValueError, with file and reason, if it is malformed.
    The format: 8 little-endian bytes N; N bytes of JSON, {name: {dtype, shape, data_offsets}}; the data.
    All is checked before a tensor is allocated, once, and read into."""
    with blaming(path), open(path, "rb") as file:
        size, tensors, end = Path(path).stat().st_size, {}, 0
        start = 8 + int.from_bytes(file.read(8), "little")
        ensure(
            start <= min(size, 100_000_008), f"a header of {start - 8} bytes in {size} is too long"
        )
        header = parse_json(file.read(start - 8))
        metadata = header.pop("__metadata__", None)
        ensure(
            metadata is None or {*map(type, metadata.values())} <= {str},
            "__metadata__ maps no strings",
        )
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            x = torch.empty([] + entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
            tensors[name], span = x, [end, end := end + x.nbytes]
            good = repr(entry["data_offsets"]) == repr(span)  # as text, where true is not 1
            ensure(good, f"tensor {name!r:.99} is {entry!r:.199}, where its bytes are {span}")
        ensure(start + end == size, f"its tensors end at byte {start + end}, the file at {size}")
        for name, x in tensors.items():
            tensors[name] = torch.empty_like(x, device="cpu")
            data = tensors[name].reshape(-1).view(torch.uint8).numpy()  # the same memory
            good = file.readinto(data) == data.nbytes and (
                x.dtype != torch.bool or data.max(initial=0) <= 1
            )
            ensure(good, f"the file ends within tensor {name!r:.99}, or a BOOL is not 0 or 1")
    return tensors


def write_safetensors(path, tensors):
    """Write {name: tensor} as a safetensors file, sorted by name, one tensor at a time."""
    names, header, end = {dtype: name for name, dtype in DTYPES.items()}, {}, 0
    for name, x in sorted(tensors.items()):
        ensure(x.dtype in names, f"{path} cannot hold {name!r} of {x.dtype}")
        span = [end, end := end + x.nbytes]
        header[name] = {"dtype": names[x.dtype], "shape": [*x.shape], "data_offsets": span}
    text = json.dumps(
        {"__metadata__": {"format": "pt"}} | header
    ).encode()  # transformers 4 insists on it
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            file.write(tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy())


def read_weights(directory):
    """{name: tensor} of model.safetensors, or of all shards that model.safetensors.index.json names."""
    path, index, tensors = (
        directory / "model.safetensors",
        directory / "model.safetensors.index.json",
        {},
    )
    if path.exists() or not index.exists():
        return read_safetensors(path)
    with blaming(index):
        home = parse_json(index.read_bytes())["weight_map"]
        for shard in {*home.values()}:
            ensure(Path(shard).name == shard, f"{shard!r:.99} is no bare file name")
            tensors |= (part := read_safetensors(directory / shard))
            ensure(
                part.keys() == {name for name in home if home[name] == shard},
                f"{shard} holds others",
            )
    return tensors


# How GPT-2 cuts text into pieces; the same after every digit was cut out, where white space before a digit
# stays whole; the tiny tokenizer's way: a line of prose, whole, as attention to constants costs time; a tag;
# a word, number or symbol with the space before it; white space.
GPT2_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT_PIECES = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
TINY_PIECES = (
    r"[A-Z][a-z][^\n]*|</?[a-z]+>|\n[A-Z_](?= )| ?[A-Za-z]+| ?[0-9]+| ?[^\s<A-Za-z0-9]|\s|<"
)
# Chat templates around the user's text; the first whose control tokens are all in the vocabulary is taken.
CHATS = [
    ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    ("", "\n"),
]
# tokenizer.json spells bytes as printable characters: these as themselves, the others from U+0100 on (GPT-2).
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CODE_OF = dict(
    zip([*PRINTABLE, *sorted({*range(256)} - {*PRINTABLE})], [*PRINTABLE, *range(256, 324)])
)
BYTE_OF = {chr(code): byte for byte, code in CODE_OF.items()}


def split_pattern(pre_tokenizer):
    """The regular expression of the pieces into which a tokenizer.json's pre_tokenizer cuts text."""
    *first, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    plain = last["type"] == "ByteLevel" and last["add_prefix_space"] is False
    match plain, last.get("use_regex", True), first:
        case True, True, [] | [{"type": "Digits", "individual_digits": True}]:
            return DIGIT_PIECES if first else GPT2_PIECES
        case True, False, [
            {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"}
        ]:
            return regex
    raise ValueError(f"pre_tokenizer {pre_tokenizer!r:.299} is not supported")


class Tokenizer:
    """Text <-> token ids, of tokenizer.json's bytes, and the chat around a prompt. Make it inside `blaming`.
    A policy samples ids below `size`; `end_ids` end an answer; `special` are the control tokens, {name: id},
    which no text becomes."""

    def __init__(self, data, end_ids=(), model_type="llama"):
        self.json, raw = data, parse_json(data)
        bpe, vocab, self.normalizer = raw["model"], raw["model"]["vocab"], raw["normalizer"]
        made = [
            vocab["".join(merge).replace(" ", "")] for merge in bpe["merges"]
        ]  # first by id in tiktoken
        good = (
            bpe["type"] == "BPE"
            and made == sorted(made)
            and self.normalizer in (None, {"type": "NFC"})
        )
        ensure(
            good, "not a BPE whose merges are in the order of the ids, after no normalizer or NFC"
        )
        self.special = {token["content"]: token["id"] for token in raw["added_tokens"]}
        ranks = {
            bytes(map(BYTE_OF.get, name)): i
            for name, i in vocab.items()
            if name not in self.special
        }
        names = ranks | {name.encode(): i for name, i in self.special.items()}
        self.bytes_of = {i: name for name, i in names.items()}
        good = all(type(i) is int and 0 <= i < 1 << 24 for i in self.bytes_of) and b"" not in names
        ensure(
            good and len(self.bytes_of) == len(names), "a token is without text or an id of its own"
        )
        self.size = max(self.bytes_of) + 1
        # Bytes that the vocabulary lacks: transformers drops them, tiktoken panics. They get ids above size;
        # runs of symbols are rid of them before, as transformers merges what is left of a run.
        lacking = {bytes([byte]) for byte in range(256)} - ranks.keys()
        ranks |= {byte: self.size + byte[0] for byte in lacking}
        lost = "".join(f"\\x{byte[0]:02x}" for byte in lacking if byte.isascii()) or "^\\S\\s"
        self.lost = re.compile(
            rf"(?:(?<=[^\w\s])|(?<=[_\x1c-\x1f ]))[{lost}]+(?=[^\w\s]|[_\x1c-\x1f])"
        )
        self.encoding = tiktoken.Encoding(
            "",
            pat_str=split_pattern(raw["pre_tokenizer"]),
            mergeable_ranks=ranks,
            special_tokens=self.special,
        )
        before, after = next(
            chat for chat in CHATS if {*re.findall("<.*?>", str(chat))} <= {*self.special}
        )
        thought = (
            "<think>\n\n</think>\n\n" if model_type == "qwen3" and "<think>" in self.special else ""
        )
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
    vocab = numbered(
        x.decode("latin-1").translate(CODE_OF) for x in [*map(bytes, zip(range(256))), *pieces]
    )
    pairs = [(name[:i], name[i:]) for name in vocab for i in range(1, len(name))]
    bytes_ = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": TINY_PIECES},
        "behavior": "Isolated",
        "invert": False,
    }
    return Tokenizer(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "normalizer": None,
                "decoder": bytes_,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
                "model": {
                    "type": "BPE",
                    "ignore_merges": True,
                    "vocab": vocab,  # all merges that tiktoken finds:
                    "merges": [pair for pair in pairs if vocab.keys() >= {*pair}],
                },
            }
        ).encode(),
        [vocab[end]],
    )


def load_pretrained(directory, dtype=torch.float32):
    """(Transformer in dtype, Tokenizer) of a Hugging Face directory; the second None without tokenizer.json.
    Memory peaks at the weights' own size: each tensor is read into its place and converted by itself, and the
    model has no memory of its own. Raises ValueError, with file and reason, on what is not supported."""
    directory, ends, tokenizer = Path(directory), [], None
    files = {
        p.name: p.read_bytes()
        for p in directory.iterdir()
        if p.suffix in (".json", ".txt", ".jinja")
    }
    for name in ("generation_config.json", "config.json"):
        with blaming(directory / name):
            found = parse_json(files.get(name, b"{}")).get("eos_token_id")
            ends += found if isinstance(found, list) else [] if found is None else [found]
            ensure({*map(type, ends)} <= {int}, f"eos_token_id is {found!r:.99}")
            config = name == "config.json" and parse_config(
                files.get(name, b"")
            )  # before gigabytes are read
    tensors = read_weights(directory)
    with blaming(directory / "config.json"), torch.device("meta"):
        ensure(9 * config.num_hidden_layers <= len(tensors), "num_hidden_layers exceeds the files")
        model = Transformer(config)
    spare = (
        "rotary_emb.inv_freq",
        *["lm_head.weight"] * config.tie_word_embeddings,
    )  # old buffer; a copy
    tensors = {name: x for name, x in tensors.items() if not name.endswith(spare)}
    has = {(name, x.shape, x.is_floating_point()) for name, x in tensors.items()}
    wrong = has ^ {(name, weight.shape, True) for name, weight in model.state_dict().items()}
    ensure(
        not wrong,
        f"{directory}: files and model differ in (name, shape, float): {sorted(wrong)!r:.199}",
    )
    if "tokenizer.json" in files:
        with blaming(directory / "tokenizer.json"):
            tokenizer = Tokenizer(files["tokenizer.json"], ends, config.model_type)
            ensure(
                tokenizer.size <= config.vocab_size,
                f"{tokenizer.size} tokens exceed the vocab_size",
            )
    model.load_state_dict({name: tensors.pop(name).to(dtype) for name in [*tensors]}, assign=True)
    model.files = files
    return model, tokenizer


def save_pretrained(directory, model, tokenizer, weights=None):
    """Write a directory that load_pretrained, transformers and vLLM read; tokenizer may be None, weights be
    given in the place of the model's own. config.json is in the older dialect, which all read; the other
    files that came with the model are carried over. Each file is complete before it takes its place."""
    directory, files, config = Path(directory), dict(model.files), asdict(model.config)
    if tokenizer:
        files.setdefault("tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast"}')
        files["tokenizer.json"] = tokenizer.json
    end = (
        min(tokenizer.end_ids, default=None) if tokenizer else None
    )  # without it transformers takes 2
    raw = (
        {"bos_token_id": None, "eos_token_id": end}
        | json.loads(files.get("config.json", b"{}"))
        | config
    )
    raw |= {
        "architectures": [f"{config['model_type'].title()}ForCausalLM"],
        "torch_dtype": str(next(model.parameters()).dtype)[6:],
    }
    raw = {key: value for key, value in raw.items() if key not in ("rope_parameters", "dtype")}
    files["config.json"] = json.dumps(raw, indent=2).encode()
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", weights or model.state_dict())
    for name, data in files.items():
        with replacing(directory / name) as file:
            file.write(data)
    for path in [*directory.glob("model-*-of-*.safetensors"), *directory.glob("*.index.json")]:
        path.unlink()
