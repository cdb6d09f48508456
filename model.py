"""One decoder-only transformer for Llama, Qwen2 and Qwen3 weights, and for the tiny model.

Reading order: `Transformer` (tokens -> logits), `LanguageAgent` (text -> tokens that are sampled,
then scored), and, below a line, what saves time and memory, and the file formats: config.json,
safetensors, tokenizer, chats, load and save. Modules bear the names of Hugging Face's state dicts,
so that weights load by a strict match of names.
"""

import contextlib
import dataclasses
import json
import os
import re
import time
import unicodedata
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import tiktoken
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from msgrpo import Answer, shared_length

# `TokenLogprobs` makes tables (tokens, vocabulary) of at most so many numbers: 16 and 256 MiB in
# float32. On a GPU small ones are slow
SLICE_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}

CHUNK = 256  # tokens; `sample` finds the chunk first


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


def rotary(config, positions, dtype):
    """cos and sin of the angles of positions (batch, time); each (batch, time, 1, head_dim).

    The sines of the first half are negative, as `rotate` needs them.
    """
    steps = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequencies = config.rope_theta ** -(steps / config.head_dim)  # (head_dim / 2,)
    if config.rope_scaling:
        frequencies = scale_frequencies(frequencies, config.rope_scaling)
    angles = positions[:, :, None, None] * frequencies
    cos = torch.cat([angles.cos(), angles.cos()], -1)
    sin = torch.cat([-angles.sin(), angles.sin()], -1)
    return cos.to(dtype), sin.to(dtype)


def scale_frequencies(frequencies, scaling):
    """Llama 3's scaling: long waves are stretched by `factor`, short ones kept, others mixed."""
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def rotate(x, cos, sin):
    """Rotary positions in these weights' split-halves form: x (batch, time, heads, head_dim).

    The halves (a, b) of a head become (a cos - b sin, b cos + a sin).
    """
    swapped = x.roll(x.shape[-1] // 2, -1)  # the second half first
    return torch.addcmul(x * cos, swapped, sin)


def causal_attention(q, k, v):
    """Grouped-query attention, causal: the queries stand at the last places of the keys.

    q (batch, heads, time, head_dim), k and v (batch, kv_heads, slots, head_dim) -> as q. Several
    heads in a row share a kv_head.
    """
    from torch.nn.attention.bias import causal_lower_right  # importing it takes a second

    mask = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class Attention(nn.Module):
    def __init__(self, config, layer_index):
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        width = config.hidden_size
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        qkv_bias = config.attention_bias or config.model_type == "qwen2"
        self.q_proj = nn.Linear(width, q_width, bias=qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.o_proj = nn.Linear(q_width, width, bias=config.attention_bias)
        norm = nn.RMSNorm if config.model_type == "qwen3" else nn.Identity
        self.q_norm = norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = norm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, context, run):
        """x (batch, time, width) -> the same shape.

        context: see `Decoder.forward`. run(function, *inputs) calls a function that takes more
        memory than time: it is `checkpointed` or `plain`.
        """
        heads = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(2, heads)  # (batch, time, heads, head_dim)
        k = self.k_proj(x).unflatten(2, heads)  # (batch, time, kv_heads, head_dim)
        v = self.v_proj(x).unflatten(2, heads)  # (batch, time, kv_heads, head_dim)
        q = rotate(self.q_norm(q), cos, sin).transpose(1, 2)  # (batch, heads, time, head_dim)
        k = rotate(self.k_norm(k), cos, sin).transpose(1, 2)  # (batch, kv_heads, time, head_dim)
        v = v.transpose(1, 2)  # (batch, kv_heads, time, head_dim)
        if context is None:
            out = run(causal_attention, q, k, v)
        else:
            out = run(context.attend, self.layer_index, q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def checkpointed(function, *inputs):
    """function(*inputs). What it keeps inside for the backward pass is computed again there."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    # Nothing here is random
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def plain(function, *inputs):
    return function(*inputs)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        inner = config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(width, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, width, bias=config.mlp_bias)

    def forward(self, x, run):
        return run(self.down, self.gate_proj(x), self.up_proj(x))

    def down(self, gate, up):
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config, layer_index):
        super().__init__()
        self.self_attn = Attention(config, layer_index)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, context, run):
        normed = run(self.input_layernorm, x)
        x = x + self.self_attn(normed, cos, sin, context, run)
        normed = run(self.post_attention_layernorm, x)
        return x + self.mlp(normed, run)


class Decoder(nn.Module):
    """Token embeddings, blocks, a norm."""

    recompute = "parts"  # what the backward pass computes again: "nothing", "parts" or "layers"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids, positions, context=None):
        """ids (batch, time), positions (batch or 1, time) -> hidden states (batch, time, width).

        context: what attends, where that is more than causal rows: a `Tree` or a `Cache`.
        """
        x = self.embed_tokens(ids)
        cos, sin = rotary(self.config, positions, x.dtype)
        run_layer = checkpointed if self.recompute == "layers" else plain
        run_part = checkpointed if self.recompute == "parts" else plain
        for layer in self.layers:
            x = run_layer(layer, x, cos, sin, context, run_part)
        return self.norm(x)


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
        x = self.hidden(ids, torch.arange(ids.shape[1], device=ids.device)[None])
        return self.head(x)

    def hidden(self, ids, positions, context=None):
        """As `Decoder.forward`; several processes need it as a method of the whole model."""
        return self.model(ids, positions, context)

    def head(self, x):
        """Hidden states (..., width) -> logits (..., vocabulary)."""
        return F.linear(x, self.head_weight())

    def head_weight(self):
        layer = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return layer.weight

    def token_logprobs(self, x, targets, size, temperature):
        """Log-probabilities of targets (tokens,) after x (tokens, width), and entropies.

        Those of `log_probabilities` with the first `size` rows of the head, though no whole table
        is ever there.
        """
        return TokenLogprobs.apply(x, self.head_weight(), targets, size, temperature)


def log_probabilities(x, weight, temperature):
    """Of the next tokens: hidden states x (rows, width), weight (size, width) -> (rows, size)."""
    return F.linear(x / temperature, weight).float().log_softmax(-1)


class Cache:
    """Keys and values of a batch of answers while they are sampled.

    A row is an answer so far; several answers may share it until they differ. A token's slot is its
    position, and it sees the slots up to its own:

        instructions and prompt, padded | new tokens

    An answer to a short prompt is written over the prompt's padding: so padding is never seen. All
    slots are there from the start. Between two `take`, no shape changes and tokens are written in
    place, so that `capture` can record a step.
    """

    def __init__(self, tree, new_tokens):
        """tree: of the prompts, with their keys and values. A prompt is a row at first."""
        rows, width = tree.paths.shape
        size = width + new_tokens
        self.size = size + -size % 16  # else each layer's attention would pad the mask
        self.positions = tree.lengths - 1  # (rows,) of the last token so far
        self.row_ids = torch.arange(rows, device=tree.paths.device)
        room = (0, 0, 0, self.size - width)
        self.keys_values = [  # of each layer, two (rows, kv_heads, slots, head_dim)
            [F.pad(gather(x, tree.paths), room) for x in pair] for pair in tree.keys_values
        ]

    def advance(self):
        """Go on to the next token: its position, and the mask that lets it see the slots so far."""
        self.positions += 1
        keys = self.keys_values[0][0]
        slots = torch.arange(self.size, device=keys.device)
        is_later = slots > self.positions[:, None]  # (rows, slots)
        mask = keys.new_zeros(is_later.shape).masked_fill(is_later, -torch.inf)
        self.mask = mask.repeat_interleave(keys.shape[1], 0)[:, None, None]

    def attend(self, layer, q, k, v):
        """Write a new token's k and v (rows, kv_heads, 1, head_dim), and attend to all slots.

        q (rows, heads, 1, head_dim) -> the same shape. A kv_head is run as if it were a row
        of its own, and the heads that share it as if they were tokens: so no key is copied.
        """
        all_k, all_v = self.keys_values[layer]
        all_k[self.row_ids, :, self.positions] = k[:, :, 0]
        all_v[self.row_ids, :, self.positions] = v[:, :, 0]
        all_k = all_k.flatten(0, 1)[:, None]  # (rows * kv_heads, 1, slots, head_dim)
        all_v = all_v.flatten(0, 1)[:, None]
        heads = q.reshape(len(all_k), 1, -1, q.shape[3])  # (..., 1, heads that share, head_dim)
        out = F.scaled_dot_product_attention(heads, all_k, all_v, attn_mask=self.mask)
        return out.reshape(q.shape)

    def take(self, rows):
        """Keep these rows, in this order; one can be taken several times."""
        if torch.equal(rows, self.row_ids):
            return
        # In a loop, so that one layer is held twice, not all
        for layer, (k, v) in enumerate(self.keys_values):
            self.keys_values[layer] = k[rows], v[rows]
        self.positions = self.positions[rows]
        self.row_ids = torch.arange(len(rows), device=rows.device)


def sample(table, rows, uniforms):
    """The token of each answer where the cumulative distribution of its row passes its uniform.

    table (rows, size) of log-probabilities, rows (answers,), uniforms (answers,) in [0, 1), None:
    greedy -> (answers,). An answer's token does not depend on the other answers.
    """
    if uniforms is None:
        return table.argmax(-1)[rows]
    # First the chunk, then the token in it: sums along the whole table would take a GPU long
    missing = -table.shape[1] % CHUNK
    chunks = F.pad(table.exp(), (0, missing)).unflatten(1, (-1, CHUNK))  # (rows, chunks, CHUNK)
    cumulative = chunks.sum(2).cumsum(1)[rows]  # (answers, chunks)
    total = cumulative[:, -1:]
    thresholds = torch.minimum(uniforms[:, None] * total, just_below(total))
    chunk = torch.searchsorted(cumulative, thresholds, right=True)  # (answers, 1)
    before = F.pad(cumulative, (1, 0)).gather(1, chunk)
    inside = chunks[rows, chunk[:, 0]].cumsum(1)  # (answers, CHUNK)
    thresholds = torch.minimum(thresholds - before, just_below(inside[:, -1:]))
    token = chunk * CHUNK + torch.searchsorted(inside, thresholds, right=True)
    return token[:, 0]


def just_below(x):
    """The next smaller numbers: rounding must not reach a whole sum."""
    return x.nextafter(torch.zeros_like(x))


def pad(rows, value):
    """Rows of integers as (rows, longest), each filled up on the right."""
    width = max(len(row) for row in rows)
    return [[*row] + [value] * (width - len(row)) for row in rows]


class LanguageAgent:
    """A language-agent policy (msgrpo.Policy): a transformer that reads instructions and a state.

    What texts begin with in common is run once (see the drawing in `Tree`): the instructions,
    equal prompts and, when scoring, equal answers. All of this is exact, gradients included.

    Of a tokenizer it uses `prompt(text, think) -> ids`, `decode(ids) -> text`, `size` (all ids are
    below it) and `end_ids` (those that end an answer). The model is on its device already.
    """

    def __init__(
        self, model, tokenizer, instructions, temperature=1.0, max_new_tokens=16, think=False
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.device = next(model.parameters()).device
        self.captures = self.device.type == "cuda"  # a step is captured as one graph
        self.end_ids = torch.tensor(sorted(tokenizer.end_ids), device=self.device)
        # encode(state) -> the tokens of its prompt, a tuple. States come again and again
        self.encode = lru_cache(65536)(
            lambda state: tuple(tokenizer.prompt(f"{instructions}\n\n{state}", think))
        )

    def next_logprobs(self, x):
        """Log-probabilities of the next token after hidden states x (rows, width): (rows, size).

        A model may have rows beyond its tokenizer's tokens. They take no part.
        """
        weight = self.model.head_weight()[: self.tokenizer.size]
        return log_probabilities(x, weight, self.temperature)

    @torch.inference_mode()
    def act(self, observations, uniforms):
        """As msgrpo.Policy says."""
        if uniforms is not None:
            uniforms = torch.tensor(uniforms, dtype=torch.float32, device=self.device)
        prompts = [self.encode(state) for state in observations]
        distinct, row_of = unique(prompts)
        row_of = torch.tensor(row_of, device=self.device)  # of table and cache, by answer
        table, tree = self.read_prompts(distinct)  # table (rows, size): log-probabilities
        cache = Cache(tree, self.max_new_tokens)
        ensure(not table.isnan().any(), "probabilities are not numbers; lower --learning-rate")

        tokens = torch.full((len(prompts), self.max_new_tokens), -1, device=self.device)
        logprobs = torch.zeros(len(prompts), self.max_new_tokens, device=self.device)
        in_batch = torch.arange(len(prompts), device=self.device)  # answers in the batch
        unfinished = torch.ones_like(in_batch, dtype=torch.bool)  # those that have not ended
        read_next = None
        # Of the answers in the batch, those that are equal so far share a row of table and cache
        for t in range(self.max_new_tokens):
            token = sample(table, row_of, None if uniforms is None else uniforms[in_batch, t])
            tokens[in_batch, t] = torch.where(unfinished, token, -1)
            logprobs[in_batch, t] = table[row_of, token]
            unfinished = unfinished & ~torch.isin(token, self.end_ids)
            count = int(unfinished.sum())
            if t + 1 == self.max_new_tokens or count == 0:
                break
            # Answers that ended leave the batch. A captured step has a fixed size: they leave it
            # when half of them have ended
            if read_next is None or not self.captures or count <= len(in_batch) // 2:
                kept = unfinished.nonzero()[:, 0]
                in_batch = in_batch[kept]
                unfinished = unfinished[kept]
                origin, token, row_of = self.branch(row_of[kept], token[kept])
                cache.take(origin)
                read_next = self.read_token
                if self.captures:
                    read_next = capture(self.read_token, token, cache)
            table = read_next(token, cache)
        return self.answers(prompts, tokens.tolist(), logprobs.tolist())

    def branch(self, rows, tokens):
        """The next batch, for answers in these rows that go on with these tokens (answers,).

        Returns where each of its rows comes from, its token, and the row of each answer. Answers
        that are equal so far share a row, unless a step is captured: then the batch keeps its size.
        """
        if self.captures:
            return rows, tokens, torch.arange(len(rows), device=self.device)
        pairs, rows = (rows * self.tokenizer.size + tokens).unique(return_inverse=True)
        return pairs // self.tokenizer.size, pairs % self.tokenizer.size, rows

    def read_prompts(self, prompts):
        """Run prompts: the table of each one's first new token, and their tree for a `Cache`."""
        tree = Tree(prompts, self.device, keep=True)
        x = self.model.hidden(tree.ids, tree.positions, tree)
        last = tree.paths.gather(1, tree.lengths[:, None] - 1)[:, 0]
        return self.next_logprobs(x[0, last]), tree

    def read_token(self, token, cache):
        """Run the next token (rows,) of each row: the table of the one after it."""
        cache.advance()
        x = self.model.hidden(token[:, None], cache.positions[:, None], cache)
        return self.next_logprobs(x[:, 0])

    def answers(self, prompts, tokens, logprobs):
        """Answers of the sampled tokens, whose rows end in -1 where the answer ended earlier."""
        answers = []
        for prompt, row, row_logprobs in zip(prompts, tokens, logprobs):
            response = tuple(token for token in row if token >= 0)
            text = self.tokenizer.decode(response)
            truncated = response[-1] not in self.tokenizer.end_ids
            answers.append(Answer(prompt, response, row_logprobs[: len(response)], text, truncated))
        return answers

    def score(self, answers):
        """As msgrpo.Policy says: the numbers that `act` gave, up to rounding, with gradient."""
        pairs, rows = unique([(answer.prompt, answer.response) for answer in answers])
        # texts     p0 p1 p2 r0 r1    prompt and response, but for the last token
        # targets   -1 -1 r0 r1 r2    what is predicted behind each token; -1 does not count
        texts, text_of = unique([prompt + response[:-1] for prompt, response in pairs])
        targets = [(-1,) * (len(prompt) - 1) + response for prompt, response in pairs]
        targets = torch.tensor(pad(targets, -1), device=self.device)  # (pairs, longest)
        tree = Tree(texts, self.device)
        x = self.model.hidden(tree.ids, tree.positions, tree)
        is_response = targets >= 0
        x = x[0, tree.paths[text_of][is_response]]  # (response tokens, width)
        logprobs, entropies = self.model.token_logprobs(
            x, targets[is_response], self.tokenizer.size, self.temperature
        )
        lengths = [len(response) for _, response in pairs]
        return pick(logprobs.split(lengths), rows), pick(entropies.split(lengths), rows)


def unique(items):
    """The distinct items, and the row of each item among them."""
    row_of = {item: row for row, item in enumerate(dict.fromkeys(items))}
    return list(row_of), [row_of[item] for item in items]


def pick(parts, order):
    """Parts of a tensor in this order, joined."""
    return torch.cat([parts[i] for i in order])


# Below: what saves time and memory, what is for a kind of machine, and file formats


class Tree:
    """Texts, in which what begins alike is run once.

        texts        I A B C, I A B D, I E
        ids          I A B C D E              one long row of nodes: tokens with all before them
        positions    0 1 2 3 3 1
        paths        0 1 2 3, 0 1 2 4, 0 5    each text's nodes, by their places in the row
        groups       0 | 1 2 3, 5 | 4         what attends together: what begins all texts (the
                                              instructions), new texts, and the ends of others

    Only attention takes the texts apart: it gathers each one's nodes, and a node that several texts
    share takes the result of one of them.
    """

    def __init__(self, texts, device, keep=False):
        """keep: have `attend` add each layer's keys and values, for a `Cache`."""
        self.keys_values = [] if keep else None  # two a layer, (1, kv_heads, nodes, head_dim)
        start = shared_length([text[:-1] for text in texts])  # so no text's own part is empty
        ids = list(texts[0][:start])
        positions = list(range(start))
        nodes = {}  # {(the node before, token): node}
        own = []  # of each text, its nodes behind what begins all
        known = []  # of each text, the place of the first new node in these, else of the last
        for text in texts:
            path = []
            before = len(ids)
            node = None  # what begins all texts is the same for all
            for token in text[start:]:
                node = nodes.setdefault((node, token), len(ids))
                if node == len(ids):  # a new one
                    ids.append(token)
                    positions.append(start + len(path))
                path.append(node)
            own.append(path)
            known.append(len(path) - max(1, len(ids) - before))

        self.lengths = torch.tensor([len(text) for text in texts], device=device)
        self.ids = torch.tensor([ids], device=device)
        self.positions = torch.tensor([positions], device=device)
        own = torch.tensor(pad(own, 0), device=device)  # (texts, some); none sees the padding
        shared = torch.arange(start, device=device)[None]
        self.paths = torch.cat([shared.expand(len(texts), -1), own], 1)  # (texts, longest)
        self.groups = [(shared, shared), *self.split(own, torch.tensor(known, device=device))]
        attended = torch.cat([nodes.flatten() for nodes, _ in self.groups])
        _, first_places = np.unique(attended.cpu(), return_index=True)  # never that of padding
        self.places = torch.tensor(first_places[None], device=device)  # (1, nodes) in `attended`

    def split(self, own, known):
        """The texts in groups, each as (nodes that attend, nodes that they see, both by text).

        Texts that begin as an earlier one does for long, such as answers to one prompt, are a group
        of their own. They attend from the first node on that is new in one of them.
        """
        late = known > own.shape[1] // 2  # (texts,)
        groups = [(own[~late], self.paths[~late])]
        if late.any():
            groups.append((own[late, known[late].min() :], self.paths[late]))
        return groups

    def attend(self, layer, q, k, v):
        """`causal_attention` of each node: q (1, heads, nodes, head_dim)."""
        if self.keys_values is not None:
            self.keys_values.append((k, v))
        parts = []
        for nodes, seen in self.groups:
            out = causal_attention(gather(q, nodes), gather(k, seen), gather(v, seen))
            parts.append(out.transpose(0, 1).flatten(1, 2))  # (heads, texts * some, head_dim)
        return gather(torch.cat(parts, 1)[None], self.places)


def gather(x, nodes):
    """x (1, heads, all nodes, head_dim), nodes (texts, some) -> (texts, heads, some, head_dim).

    What comes back to a node is added up in float32: thousands of texts may share one, and in
    bfloat16 a sum of so many would stop growing.
    """
    rows = x[0].transpose(0, 1).flatten(1).float()  # (all nodes, heads * head_dim)
    found = rows.index_select(0, nodes.flatten()).to(x.dtype)
    return found.view(*nodes.shape, x.shape[1], x.shape[3]).transpose(1, 2)


def bfloat16_is_fast(device):
    """Whether passes in bfloat16 are worth it.

    On a CPU they are with AMX. Without it half of float32's rate was measured (results/bench*), or,
    where AVX-512 has bfloat16, 1.6 times as much (results/smollm2): too little for what it loses.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported()


class TokenLogprobs(torch.autograd.Function):
    """log p of target tokens, and entropies H of their distributions, with gradient by hand.

    Of logits z = W x / T and p = softmax z:

        d log p(target) / dz = 1[target] - p        dH / dz = -p (log p + H)

    A table over the vocabulary can take more memory than the rest of an update. So tables exist for
    a slice of the tokens at a time, and the backward pass makes them again. (So do Liger's and
    cut-cross-entropy's losses.)
    """

    @staticmethod
    def slices(x, size):
        rows = max(1, SLICE_ELEMENTS[x.device.type] // size)
        return [slice(i, i + rows) for i in range(0, len(x), rows)]

    @staticmethod
    def forward(ctx, x, weight, targets, size, temperature):
        logprobs = x.new_empty(len(x), dtype=torch.float32)
        entropies = torch.empty_like(logprobs)
        for part in TokenLogprobs.slices(x, size):
            table = log_probabilities(x[part], weight[:size], temperature)
            logprobs[part] = table.gather(1, targets[part, None])[:, 0]
            entropies[part] = torch.special.entr(table.exp()).sum(-1)
        ctx.save_for_backward(x, weight, targets, entropies)
        ctx.size = size
        ctx.temperature = temperature
        return logprobs, entropies

    @staticmethod
    def backward(ctx, of_logprobs, of_entropies):
        x, weight, targets, entropies = ctx.saved_tensors
        of_x = torch.empty_like(x)
        of_weight = torch.zeros_like(weight)
        weight = weight[: ctx.size]
        for part in TokenLogprobs.slices(x, ctx.size):
            table = log_probabilities(x[part], weight, ctx.temperature)
            p = table.exp()
            a = of_logprobs[part, None] / ctx.temperature
            b = of_entropies[part, None] / ctx.temperature
            # a (1[target] - p) - b p (log p + H), in few passes over the table
            of_z = torch.addcmul(-a - b * entropies[part, None], table, -b).mul_(p)
            of_z = of_z.scatter_add_(1, targets[part, None], a).to(x.dtype)
            of_x[part] = of_z @ weight
            of_weight[: ctx.size].addmm_(of_z.T, x[part])
        return of_x, of_weight, None, None, None


def capture(step, token, cache):
    """A step of sampling as one CUDA graph: a replay launches all of its kernels at once.

    step(token, cache) is `LanguageAgent.read_token`. The graph is for this cache and this number of
    answers. Weights are updated in place, so it would outlive updates.
    """
    static_token = token.clone()
    step(static_token, cache)  # what happens at a first time cannot be captured
    cache.positions -= 1  # take that step back; its slot is written again
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table = step(static_token, cache)

    def replay(token, cache):
        static_token.copy_(token)
        graph.replay()
        return table

    return replay


# File formats
#
# Files come from strangers. What is malformed or not supported raises ValueError with the file and
# the reason, and no memory is allocated that the size of a file does not justify.


class BadInput(ValueError):
    """What a user can mend: train.py tells it in one line, without a traceback."""


def ensure(good, reason):
    if not good:
        raise BadInput(reason)


def out_of_memory(error):
    """Whether this exception is a want of memory. On a CPU, torch raises a bare RuntimeError."""
    if type(error) is RuntimeError:
        return "can't allocate memory" in str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError))


@contextlib.contextmanager
def blaming(path):
    """Errors inside, of a file's contents or of what else is called `path`, become a BadInput that
    names it."""
    try:
        yield
    except (OSError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of tiktoken's is no Exception
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:500]
        if type(error) not in (ValueError, BadInput):
            reason = f"malformed or not supported, {type(error).__name__}: {reason}"
        raise BadInput(f"{path}: {reason}") from None


@contextlib.contextmanager
def replacing(path):
    """A file that takes path's place once it is complete and on the disk. An error leaves path as
    it was; where the disk is full or the like, it is an OSError that names a file."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        # torch.save hides a full disk behind a RuntimeError of its own.
        cause = error
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, cause.filename or str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


LFS_POINTER = "a git-lfs pointer stands in the file's place: run `git lfs pull` in its folder"


def parse_json(data, **options):
    """The object in a JSON file's bytes. Call it inside `blaming`. options: json.loads's."""
    ensure(not data.startswith(b"version https://git-lfs"), LFS_POINTER)
    found = json.loads(data.decode(), **options)
    ensure(isinstance(found, dict), "it holds no JSON object")
    return found


# config.json

LLAMA3_ROPE = "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()
SUPPORTED = {  # where a key is given, its value must be one of these
    "model_type": ("llama", "qwen2", "qwen3"),
    "hidden_act": ("silu",),
    "rope_type": ("default", "llama3"),
    "type": ("default", "llama3"),  # the older name of rope_type
    "partial_rotary_factor": (1,),
    "use_sliding_window": (False,),
    "quantization_config": (),
    "full_attention": (),  # rope_parameters that differ from layer to layer
}


def config_keys(data):
    """{key: value} of a config.json, in one dialect.

    transformers 5 writes `rope_parameters`; before, `rope_theta` and `rope_scaling` stood at the
    top. A key with null is as good as absent, but for qwen3's `head_dim`.
    """
    raw = parse_json(data)
    if raw.get("model_type") == "qwen3":
        raw.setdefault("head_dim", 128)
    for rope in ("rope_parameters", "rope_scaling"):
        raw.update(raw.get(rope) or {})
    return {key: value for key, value in raw.items() if value is not None}


def check_config(raw):
    """Refuses what the Transformer does not do, naming the key and its value."""
    for key, values in SUPPORTED.items():
        good = key not in raw or raw[key] in values
        ensure(good, f"{key} {raw.get(key)!r:.99} is not supported (of this key: {values})")
    layers = set(raw.get("layer_types", []))
    ensure(layers <= {"full_attention"}, f"layer_types {layers!r:.99} are not supported")
    kinds = {f.name: f.type for f in dataclasses.fields(Config)} | dict.fromkeys(LLAMA3_ROPE, float)
    for key, value in raw.items():
        kind = kinds.get(key)
        if kind is bool:
            ensure(type(value) is bool, f"{key} is {value!r:.99}, not true or false")
        elif kind in (int, float):
            good = type(value) in (int, kind) and 0 < value < 1e15  # to isinstance, True is an int
            ensure(good, f"{key} is {value!r:.99}, not a positive number that fits")


def parse_config(data):
    """Config of config.json's bytes, with transformers' defaults. Call it inside `blaming`."""
    raw = config_keys(data)
    check_config(raw)
    heads = raw["num_attention_heads"]
    raw.setdefault("num_key_value_heads", heads)
    raw.setdefault("head_dim", raw["hidden_size"] // heads)
    if raw["model_type"] == "qwen2":
        raw["attention_bias"] = False  # its q, k and v have biases whatever the key says
    scaling = None
    if "llama3" in (raw.get("rope_type"), raw.get("type")):
        scaling = {"rope_type": "llama3"} | {key: raw[key] for key in LLAMA3_ROPE}
        rising = raw["low_freq_factor"] < raw["high_freq_factor"]
        ensure(rising, "high_freq_factor is not above low_freq_factor")
    given = {f.name: raw[f.name] for f in dataclasses.fields(Config) if f.name in raw}
    config = Config(**given | {"rope_scaling": scaling})
    ensure(config.num_hidden_layers <= 1000, "num_hidden_layers is above 1000")
    rest = config.num_attention_heads % config.num_key_value_heads
    ensure(rest == 0, "num_key_value_heads does not divide num_attention_heads")
    even = config.head_dim > 0 and config.head_dim % 2 == 0
    ensure(even, "head_dim is odd or 0: it cannot be rotated in halves")
    return config


def end_token_ids(data):
    """The ids in a config.json's or generation_config.json's eos_token_id: one, a list or none."""
    found = parse_json(data).get("eos_token_id")
    if found is None:
        return []
    ids = found if isinstance(found, list) else [found]
    good = all(type(i) is int and 0 <= i < 1 << 31 for i in ids)
    ensure(good, f"eos_token_id is {found!r:.99}")
    return ids


# Weights: safetensors
#
# The format: 8 little-endian bytes with the header's length; the header, JSON of
# {name: {dtype, shape, data_offsets: [begin, end]}}; the data, tensor after tensor without gaps.

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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it


def each_key_once(pairs):
    found = dict(pairs)
    ensure(len(found) == len(pairs), "a JSON object has a key twice")
    return found


def read_header(file, size):
    """{name: entry} of a safetensors file of this size in bytes, and where its data begin."""
    first = file.read(8)
    ensure(first != b"version ", LFS_POINTER)
    length = int.from_bytes(first, "little")
    start = 8 + length
    fits = start <= size and length <= LARGEST_HEADER
    ensure(fits, f"a header of {length} bytes is too long for a file of {size}")
    header = parse_json(file.read(length), object_pairs_hook=each_key_once)
    # Raises on NaN and on names that are no valid Unicode
    json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
    metadata = header.pop("__metadata__", None)
    texts = metadata is None or all(isinstance(value, str) for value in metadata.values())
    ensure(texts, "__metadata__ does not map to strings")
    return header, start


def layout(header, start, size):
    """{name: tensor} in the order of the file, on the meta device, which takes no memory. Raises
    where their bytes leave a gap, overlap or do not end with the file, which has this size."""
    tensors = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        what = f"tensor {name!r:.99} is {entry!r:.199}"
        ensure(entry["dtype"] in DTYPES, f"{what}, a dtype that is not supported")
        shape = entry["shape"]
        offsets = entry["data_offsets"]
        ensure(all(type(n) is int for n in shape + offsets), what)  # True is no 1
        tensors[name] = torch.empty(shape, dtype=DTYPES[entry["dtype"]], device="meta")
        begin = end
        end += tensors[name].nbytes
        ensure(offsets == [begin, end], f"{what}, its bytes are {begin} to {end}")
    ensure(start + end == size, f"its tensors end at byte {start + end}, the file at {size}")
    return tensors


def read_tensor(file, meta):
    """A tensor like this one, allocated once and read into."""
    tensor = torch.empty_like(meta, device="cpu")
    data = tensor.reshape(-1).view(torch.uint8).numpy()  # the same memory
    ensure(file.readinto(data) == data.nbytes, "the file ends within a tensor")
    if meta.dtype == torch.bool:
        ensure(data.max(initial=0) <= 1, "a BOOL is neither 0 nor 1")
    return tensor


def read_safetensors(path):
    """{name: tensor} of a safetensors file. Raises ValueError, with file and reason, if it is
    malformed. The header is checked before memory is allocated."""
    with blaming(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = read_header(file, size)
        tensors = layout(header, start, size)
        return {name: read_tensor(file, meta) for name, meta in tensors.items()}


def write_safetensors(path, tensors):
    """Write {name: tensor} as a safetensors file, sorted by name, one tensor at a time."""
    header = {"__metadata__": {"format": "pt"}}  # transformers 4 insists on it
    names = sorted(tensors)
    end = 0
    for name in names:
        tensor = tensors[name]
        kind = DTYPE_NAMES.get(tensor.dtype)
        ensure(kind, f"{path}: safetensors cannot hold {name!r:.99} of {tensor.dtype}")
        begin = end
        end += tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name].detach().cpu().reshape(-1)
            file.write(flat.view(torch.uint8).numpy())


def read_shards(index):
    """{name: tensor} of the files that model.safetensors.index.json names, and the names in it."""
    tensors = {}
    with blaming(index):
        home = parse_json(index.read_bytes())["weight_map"]
        for shard in sorted(set(home.values())):
            ensure(Path(shard).name == shard, f"{shard!r:.99} is no bare file name")
            part = read_safetensors(index.parent / shard)
            missing = {name for name in home if home[name] == shard} - part.keys()
            twice = tensors.keys() & part.keys()
            ensure(not missing, f"{shard} lacks {sorted(missing)!r:.199}")
            ensure(not twice, f"{shard} holds again {sorted(twice)!r:.199}")
            tensors |= part
    return tensors, set(home)


def read_weights(directory):
    """{name: tensor} of model.safetensors or of its shards, and the names of those that must fit
    the model. As with transformers, a shard may hold others, which its index does not name."""
    whole = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if whole.exists():
        tensors = read_safetensors(whole)
        return tensors, set(tensors)
    if index.exists():
        return read_shards(index)
    raise BadInput(f"{directory}: model.safetensors is missing, and no other weights are read")


# Tokenizer: how text is cut into pieces, within which bytes are merged

GPT2_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after every digit was cut out (SmolLM2): white space before a digit stays whole.
DIGIT_PIECES = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
}

# tokenizer.json spells bytes as printable characters: these as themselves, the others, in turn, as
# those from U+0100 on (GPT-2).
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHAR_OF = {byte: chr(byte) for byte in PRINTABLE}
for other in range(256):
    CHAR_OF.setdefault(other, chr(256 - len(PRINTABLE) + len(CHAR_OF)))
BYTE_OF = {char: byte for byte, char in CHAR_OF.items()}


def token_bytes(name):
    """Bytes of a token that tokenizer.json spells so. Another way of spelling is taken as UTF-8."""
    if all(char in BYTE_OF for char in name):
        return bytes(BYTE_OF[char] for char in name)
    return name.encode()


def split_by(regex):
    """A pre-tokenizer of tokenizer.json that cuts by a regular expression."""
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}


def split_pattern(pre_tokenizer):
    """The regular expression of the pieces into which tokenizer.json's pre_tokenizer cuts text."""
    *first, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    plain = last.get("type") == "ByteLevel" and last.get("add_prefix_space") is False
    match plain, last.get("use_regex", True), first:
        case True, True, []:
            return GPT2_PIECES
        case True, True, [{"type": "Digits", "individual_digits": True}]:
            return DIGIT_PIECES
        case True, False, [
            {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"}
        ]:
            # What it does not match is a piece as well; tiktoken would lose it.
            return rf"{regex}|(?:(?!{regex})[\s\S])+"
    raise BadInput(f"pre_tokenizer {pre_tokenizer!r:.299} is not supported")


def normal_form(normalizer):
    """What is done to text first: "NFC", or None for nothing."""
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    for step in steps:
        ensure(step["type"] == "NFC", f"normalizer {step!r:.199} is not supported")
    return "NFC" if steps else None


SENTENCEPIECE = (
    "a sentencepiece tokenizer (Llama 2, TinyLlama, Mistral) is not supported; take a model of "
    "Llama 3, Qwen2, Qwen2.5, Qwen3, SmolLM2 or R1-Distill"
)


def check_bpe(bpe):
    """Refuses what is not GPT-2's byte-level BPE."""
    kind = bpe.get("type", "BPE")
    pieces = kind == "Unigram" or bpe.get("byte_fallback") or "\u2581" in bpe["vocab"]
    ensure(not pieces, SENTENCEPIECE)
    affixes = bpe.get("continuing_subword_prefix") or bpe.get("end_of_word_suffix")
    ensure(kind == "BPE" and not affixes, f"a tokenizer of type {kind!r:.99} is not supported")


def mergeable_tokens(bpe, rows):
    """{bytes: id} in the order in which a tokenizer.json's merges make them, the single bytes
    first.

    The id of a byte that the vocabulary lacks is None. A token that no merge makes is left out, and
    its text stays in parts; with ignore_merges it is made where it is a whole piece. A token whose
    id is not below `rows` is left out as well: the model has no embedding for it.
    """
    vocab = bpe["vocab"]
    tokens = {bytes([byte]): vocab.get(char) for char, byte in BYTE_OF.items()}
    highest = max(i or 0 for i in tokens.values())
    ensure(highest < rows, f"{rows} embeddings are too few for this tokenizer's single bytes")
    names = []
    for merge in bpe["merges"]:
        pair = merge.split(" ") if isinstance(merge, str) else merge  # the former is older
        names.append("".join(pair))
        known = len(pair) == 2 and vocab.keys() >= {*pair, names[-1]}
        ensure(known, f"merge {merge!r:.99} is of tokens that the vocabulary lacks")
    if bpe.get("ignore_merges"):
        names += vocab
    for name in names:
        if vocab[name] < rows:
            tokens.setdefault(token_bytes(name), vocab[name])
    return tokens


def any_of(names):
    """A regular expression for any of these names, the longest first."""
    longest_first = sorted(names, key=len, reverse=True)
    return "|".join(re.escape(name) for name in longest_first) or "(?!)"  # which finds nothing


def named_tokens(settings):
    """{"bos_token": "<s>", ...}: the tokens to which tokenizer_config.json gives a part to play."""
    named = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            value = value.get("content")
        if key.endswith("_token") and isinstance(value, str):
            named[key] = value
    return named


def first_tokens(post_processor):
    """Names of the tokens, such as BOS, that tokenizer.json's post_processor puts before a text."""
    names = []
    for step in post_processor.get("processors", [post_processor]):
        for part in step.get("single", []):
            if "SpecialToken" not in part:
                break
            names.append(part["SpecialToken"]["id"])
    return names


# Chats: a model's own template is what it was tuned on and will be served with.

# Two code points that are no characters, by Unicode's promise:
QUOTE = "\ufdd0"  # breaks what spells a control token in a user's text
MARK = "\ufdd1"  # stands for a text whose place in a chat is looked for


def raise_exception(message):
    raise BadInput(message)


def compile_template(text):
    """A chat template, ready to render, with what transformers offers to one. A stranger wrote it:
    jinja2's sandbox keeps it from files and from Python, though not from taking its time."""
    # {% generation %} to {% endgeneration %} mark what is trained, and mean nothing to a prompt.
    text = re.sub(r"({%[-+]?\s*(end)?)generation\b", r"\1with", text)
    chat = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    chat.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's own escapes HTML
    chat.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
    return chat.from_string(text)


class Tokenizer:
    """Text <-> token ids, and the prompt around a user's text.

    size      a policy samples ids below it; never more than `rows`, the number of embeddings
    end_ids   they end an answer
    special   control tokens, {name: id}: tokens in a template, letters in the game's text

    data is tokenizer.json's content, named the {"bos_token": "<s>", ...} of tokenizer_config.json.
    Make it inside `blaming`.
    """

    def __init__(self, data, named=None, end_ids=(), rows=1 << 31):
        self.json = data
        raw = parse_json(data)
        bpe = raw["model"]
        check_bpe(bpe)
        self.form = normal_form(raw.get("normalizer"))
        tokens = mergeable_tokens(bpe, rows)
        self.id_of_rank = list(tokens.values())
        ranks = {token: rank for rank, token in enumerate(tokens)}
        pieces = split_pattern(raw.get("pre_tokenizer") or {})
        self.encoding = tiktoken.Encoding(
            "", pat_str=pieces, mergeable_ranks=ranks, special_tokens={}
        )
        ids = self.add_tokens(bpe["vocab"], raw.get("added_tokens") or [], rows)

        self.template = None  # until `use_template`
        self.first_ids = [ids[name] for name in first_tokens(raw.get("post_processor") or {})]
        ensure(all(i < rows for i in self.first_ids), "a token before all text has no embedding")
        self.named = named or {}
        eos = ids.get(self.named.get("eos_token"))
        self.end_ids = frozenset({*end_ids, eos} - {None})

    def add_tokens(self, vocab, added, rows):
        """Takes in the vocabulary, and the added tokens, which are found in text before it is cut
        into pieces. Those of them without an embedding stay text. Returns {name: id} of all."""
        for token in added:
            strips = token.get("lstrip") or token.get("rstrip") or token.get("single_word")
            ensure(token["content"] and not strips, f"added token {token!r:.150} is not supported")
        names = {token["content"]: token["id"] for token in added}
        ids = {**vocab, **names}
        self.bytes_of = {i: token_bytes(name) for name, i in ids.items()}
        good = all(type(i) is int and i >= 0 for i in self.bytes_of)
        ensure(good and len(self.bytes_of) == len(ids), "a token has no id of its own")
        self.size = min(rows, 1 + max(self.bytes_of))

        self.added = {name: i for name, i in names.items() if i < rows}
        control = {token["content"] for token in added if token.get("special")}
        self.special = {name: i for name, i in self.added.items() if name in control}
        self.around_added = re.compile(f"({any_of(self.added)})")  # its split keeps them
        self.begin_of_special = re.compile(f"(?={any_of(self.special)}).", re.DOTALL)
        return ids

    def use_template(self, text):
        """From now on prompts are chats by this jinja2 template. Call it inside `blaming`."""
        self.template = compile_template(text)
        self.first_ids = []  # the template writes them itself
        ensure(MARK in self.chat(MARK), "the chat template does not give the user's text")
        answer = {"role": "assistant", "content": MARK}
        chat = self.render([{"role": "user", "content": "Go."}, answer])
        after = self.encode_chat(chat.partition(MARK)[2])
        self.end_ids |= {*after[:1]} & {*self.special.values()}  # what ends the assistant's turn

    def render(self, messages, think=False, add_generation_prompt=False):
        """Text of a chat as the template has it, with the same variables as transformers'."""
        with blaming("chat template"):
            return self.template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=think,
                **self.named,
            )

    def quote(self, text):
        """Text in which control tokens are broken, so that `encode_chat` takes them as text."""
        return self.begin_of_special.sub(rf"\g<0>{QUOTE}", text)

    def encode_pieces(self, text):
        """Ids of text without added tokens. Bytes that the vocabulary lacks are dropped."""
        text = text.replace(QUOTE, "")
        if self.form:
            text = unicodedata.normalize(self.form, text)
        ids = [self.id_of_rank[rank] for rank in self.encoding.encode_ordinary(text)]
        return [i for i in ids if i is not None]

    def encode_chat(self, text):
        """Ids of a chat: what names an added token is that token."""
        ids = []
        for part in self.around_added.split(text):
            if part in self.added:
                ids.append(self.added[part])
            else:
                ids += self.encode_pieces(part)
        return ids

    def encode(self, text):
        """Ids of text; what spells a control token is text like any other."""
        return self.encode_chat(self.quote(text))

    def decode(self, ids):
        """Text of ids. Ids of no token are left out, and broken UTF-8 becomes U+FFFD."""
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode("utf-8", "replace")

    def chat(self, text, think=False):
        """A prompt as text. Without a template it is the user's text and a newline (ours)."""
        text = self.quote(text)
        if self.template is None:
            return text + "\n"
        messages = [{"role": "user", "content": text}]
        return self.render(messages, think, add_generation_prompt=True)

    def prompt(self, text, think=False):
        """Ids of the whole prompt around a user's text. think is the template's enable_thinking."""
        return self.first_ids + self.encode_chat(self.chat(text, think))

    def describe_prompt(self):
        """One line that says what stands around a user's text."""
        if self.template is not None:
            return "prompts follow the model's own chat template"
        first = self.decode(self.first_ids) or "no BOS"
        return f"the model has no chat template: a prompt is {first}, plain text and a newline"


def tokenizer_json(vocab, merges, added, pre_tokenizer, normalizer=None, whole_pieces=False):
    """The bytes of a tokenizer.json, which the tokenizers library reads as well."""
    model = {"type": "BPE", "ignore_merges": whole_pieces, "vocab": vocab, "merges": merges}
    raw = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": BYTE_LEVEL,
        "model": model,
    }
    return json.dumps(raw).encode()


def tiny_tokenizer(texts, ends, pieces):
    """A Tokenizer of the 256 bytes and the pieces of some texts, of which `ends` end an answer.

    pieces: the regular expression that cuts a text into them.
    """
    vocab = {CHAR_OF[byte]: byte for byte in range(256)}
    for text in texts:
        for piece in re.findall(pieces, text):
            name = "".join(CHAR_OF[byte] for byte in piece.encode())
            vocab.setdefault(name, len(vocab))
    merges = []  # all ways to make a token of two, so that other libraries cut as tiktoken does
    for name in vocab:
        pairs = [(name[:i], name[i:]) for i in range(1, len(name))]
        merges += [pair for pair in pairs if vocab.keys() >= set(pair)]
    data = tokenizer_json(vocab, merges, [], split_by(pieces), whole_pieces=True)
    return Tokenizer(data, end_ids=[vocab[end] for end in ends])


def chat_template(files, settings):
    """A model's chat template, or None, and the name of the file that holds it."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode(), "chat_template.jinja"
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}["default"]
    return template, "tokenizer_config.json"


def older_tokenizer(files, settings, model_type):
    """tokenizer.json's content, made of vocab.json and merges.txt, as older folders have them."""
    vocab = parse_json(files["vocab.json"])
    lines = files["merges.txt"].decode().split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    decoder = settings.get("added_tokens_decoder", {})
    added = [{**token, "id": int(i)} for i, token in decoder.items()]
    control = {"<|endoftext|>", *named_tokens(settings).values()}  # GPT-2's, where none is named
    for name in control & vocab.keys():
        added.append({"content": name, "id": vocab[name], "special": True})
    kind = settings.get("tokenizer_class", model_type)
    if kind.lower().startswith("qwen"):
        return tokenizer_json(vocab, merges, added, split_by(QWEN_PIECES), {"type": "NFC"})
    return tokenizer_json(vocab, merges, added, BYTE_LEVEL | {"use_regex": True})


def load_tokenizer(directory, files, end_ids, config):
    """Tokenizer of a Hugging Face directory with these files; None where there is none."""
    with blaming(directory / "tokenizer_config.json"):
        settings = parse_json(files.get("tokenizer_config.json", b"{}"))
        template, holder = chat_template(files, settings)
    data = files.get("tokenizer.json")
    if data is None and "merges.txt" in files:
        with blaming(directory / "merges.txt"):
            data = older_tokenizer(files, settings, config.model_type)
    with blaming(directory / "tokenizer.json"):
        ensure(data or not (directory / "tokenizer.model").exists(), f"absent; {SENTENCEPIECE}")
        if data is None:
            return None
        tokenizer = Tokenizer(data, named_tokens(settings), end_ids, config.vocab_size)
    with blaming(directory / holder):
        if template is not None:
            tokenizer.use_template(template)
    return tokenizer


# A directory as Hugging Face's: config.json, model.safetensors, tokenizer.json and other small
# files


def missing_config(directory):
    """Why this path is no model's folder, and what to give in its place."""
    snapshots = sorted(path.parent for path in directory.glob("snapshots/*/config.json"))
    if not directory.exists():
        name = directory.as_posix()
        hub = f"; of a hub's model, `hf download {name} --local-dir DIR` makes one"
        return "no such folder" + (hub if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) else "")
    if not directory.is_dir():
        return "it is no folder"
    if snapshots:
        return f"a cache folder of the hub: give the snapshot in it, {snapshots[-1]}"
    if (directory / "adapter_config.json").exists():
        return "a LoRA adapter: merge it into its base (peft's merge_and_unload) and give that"
    return "no config.json is there: give the folder with config.json and model.safetensors in it"


def small_files(directory):
    """{name: bytes} of what is not weights."""
    files = {}
    for path in directory.iterdir():
        is_small = path.suffix in (".json", ".txt", ".jinja") and ".index" not in path.suffixes
        if is_small and path.stat().st_size <= LARGEST_HEADER:
            files[path.name] = path.read_bytes()
    return files


def untie(config, tensors):
    """The config, untied where these tensors hold a head that is not the embeddings, as in
    transformers. A head that is equal goes; one without embeddings beside it is the embeddings."""
    if not config.tie_word_embeddings or "lm_head.weight" not in tensors:
        return config
    head = tensors.pop("lm_head.weight")
    embeddings = tensors.setdefault("model.embed_tokens.weight", head)
    if head.dtype == embeddings.dtype and torch.equal(head, embeddings):
        return config
    tensors["lm_head.weight"] = head
    return dataclasses.replace(config, tie_word_embeddings=False)


def load_pretrained(directory, dtype=torch.float32, weights=None):
    """(Transformer in dtype, Tokenizer or None) of a Hugging Face directory.

    weights: {name: tensor}, in the place of those in the directory, which then needs none.
    Memory peaks at the weights' own size: tensors are converted one by one. Config and tokenizer
    are checked before the weights are read, names and shapes after. Raises ValueError with file and
    reason.
    """
    directory = Path(directory)
    if not (directory / "config.json").exists():
        raise BadInput(f"{directory}: {missing_config(directory)}")
    files = small_files(directory)
    with blaming(directory / "config.json"):
        config = parse_config(files["config.json"])
        end_ids = end_token_ids(files["config.json"])
    with blaming(directory / "generation_config.json"):
        end_ids += end_token_ids(files.get("generation_config.json", b"{}"))
    tokenizer = load_tokenizer(directory, files, end_ids, config)

    if weights is None:
        tensors, named = read_weights(directory)
    else:
        tensors = dict(weights)
        named = set(weights)
    config = untie(config, tensors)
    with blaming(directory / "config.json"), torch.device("meta"):  # which takes no memory
        model = Transformer(config)
    for name in tensors.keys() - model.state_dict().keys():
        # What neither the model nor the index names; and a buffer of old Llama files.
        if name not in named or name.endswith("rotary_emb.inv_freq"):
            del tensors[name]
    with blaming(directory):
        model.load_state_dict(tensors, assign=True)
    tensors.clear()  # the model alone holds a tensor, which goes when it is converted
    model.to(dtype)
    for name, weight in model.named_parameters():
        low, high = weight.aminmax()  # without a copy; both are NaN where one number is
        ensure(low.isfinite() and high.isfinite(), f"{directory}: {name} is not finite")
    model.files = files
    return model, tokenizer


def config_json(model, tokenizer):
    """config.json's bytes in the older dialect, which all libraries read. Other keys that came with
    the model are kept."""
    ends = sorted(tokenizer.end_ids) if tokenizer else []
    eos = ends if len(ends) > 1 else min(ends, default=None)
    raw = {"bos_token_id": None, "eos_token_id": eos}  # if absent, transformers takes 1 and 2
    raw |= json.loads(model.files.get("config.json", b"{}"))
    raw |= dataclasses.asdict(model.config)
    raw["architectures"] = [f"{model.config.model_type.title()}ForCausalLM"]
    raw["torch_dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    for newer in ("rope_parameters", "dtype"):
        raw.pop(newer, None)
    return json.dumps(raw, indent=2).encode()


def save_small_files(directory, model, tokenizer):
    """Write all of a Hugging Face directory but the weights; tokenizer may be None.

    Small files that came with the model are carried over. Each is complete before it takes its
    place.
    """
    directory = Path(directory)
    files = dict(model.files)
    files["config.json"] = config_json(model, tokenizer)
    if tokenizer:
        files.setdefault("tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast"}')
        files["tokenizer.json"] = tokenizer.json
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        with replacing(directory / name) as file:
            file.write(data)


def save_pretrained(directory, model, tokenizer, weights=None):
    """Write a directory that load_pretrained, transformers and vLLM read.

    tokenizer may be None, and weights be given in the place of the model's own.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", weights or model.state_dict())
    save_small_files(directory, model, tokenizer)
    for pattern in ("model-*-of-*.safetensors", "*.index.json"):  # weights that were there before
        for old in directory.glob(pattern):
            old.unlink()
