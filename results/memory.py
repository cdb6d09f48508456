"""What a training run needs in GiB, from a config.json alone.

    python results/memory.py results/configs/qwen2.5-3b.json --recompute
    python results/memory.py CONFIG --dtype float32 --measure      runs it with random weights here, and compares

With P parameters, in bytes (train.Learner): float32 weights 4 P, gradients 4 P, Adam's two moments 8 P, all divided by
--processes where they are sharded; the bfloat16 copy that plays and is differentiated 2 P, whole on each. A gradient is
there from an update's first backward pass to its end.

What comes and goes is not written as formulas, which would age: model.py itself runs on torch's meta device, where
tensors have sizes and no contents, and every allocation is counted while it lives.

    KV cache    2 layers kv_heads head_dim (shared + rows (prompt - shared + new - 1)), in the model's dtype
    rollout     peak of prompts and one token for all episodes at once, the cache gathered into a new one, and four
                float32 tables (rows, vocabulary) for sampling
    activations what the forward pass of the largest micro-batch keeps for its backward pass: all of a layer for each
                token, with its attention weights (heads, tokens, shared + own slots); with --recompute the input of
                each layer, keys and values; and the logits and float32 tables (response tokens, vocabulary)
    update      peak of this forward and backward pass, with the gradients on their way
The total is the larger of rollout and update. The worst is assumed: no two states or answers are equal, no episode ends
early. What the sizes cannot tell: a few hundred MB of a GPU's context, and a tenth or so of its fragments.
"""
import argparse
import resource
import sys
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as lm
import msgrpo
import train

torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True  # a mask without contents is all True
GIB = 2 ** 30


class Allocations(TorchDispatchMode):
    """Bytes of the meta tensors that were made inside and live, and their peak."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.storages = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)):
            if storage.device.type == "meta" and storage._cdata not in {*old, *self.storages}:
                self.storages[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.live)
        return result

    def free(self, key):
        self.live -= self.storages.pop(key)


def rollout(model, args):
    """Peak of a batch's prompts and of one more token each, without gradient."""
    prompts, state = args.episodes, args.prompt - args.shared
    with torch.no_grad(), Allocations() as memory:
        prefix = lm.encode_prefix(model, [0] * args.shared)
        *_, past, lengths = lm.encode_prompts(model, prefix, [(i,) * state for i in range(prompts)], args.new - 1)
        past = [(k.clone(), v.clone()) for k, v in past]
        model(torch.zeros(prompts, 1, dtype=torch.long, device="meta"), prefix, past, lengths)
    return memory.peak + 16 * prompts * model.config.vocab_size


def micro_batch(model, args):
    """(what the forward pass keeps, peak with the backward pass) of as many answers as the budget holds."""
    prompt, response = args.prompt - args.shared, args.new
    n = min(args.update_episodes * args.steps, max(1, args.micro_batch_tokens // (prompt + response)))
    with Allocations() as memory:
        prefix = lm.encode_prefix(model, [0] * args.shared)
        logprobs, entropies = lm.score(model, prefix, [(i,) * prompt for i in range(n)], [(i,) * response for i in range(n)],
                                       model.config.vocab_size)
        loss, kept = (logprobs.exp() + entropies).sum(), memory.live
        loss.backward()
    return kept, memory.peak


def estimate(config, args):
    """{name: bytes}"""
    with torch.device("meta"):
        model = lm.Transformer(config).to(getattr(torch, args.dtype))
    model.recompute = args.recompute
    for weight in model.parameters():  # float32 gradients are counted apart
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    count, copies = sum(weight.numel() for weight in model.parameters()), args.dtype != "float32"
    size = 2 if copies else 4
    slots = args.shared + args.episodes * (args.prompt - args.shared + args.new - 1)
    sizes = {"weights": 4 * count / args.processes, "gradients": 4 * count / args.processes,
             "moments": 8 * count / args.processes, "copy": 2 * count * copies,
             "KV cache": 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * slots * size,
             "rollout": rollout(model, args)}
    sizes["activations"], sizes["update"] = micro_batch(model, args)
    state = sizes["weights"] + sizes["moments"] + sizes["copy"]
    return sizes | {"total": state + max(sizes["rollout"], sizes["gradients"] + sizes["update"])}


def measure(config, args):
    """Peak resident bytes of an iteration of train.Learner with random weights, less what was there before."""
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    prompts = [(i,) * (args.prompt - args.shared) for i in range(args.episodes * args.steps)]
    before = resident()
    learner = train.Learner(lm.Transformer(config), train.Settings(
        dtype=args.dtype, device="cpu", recompute=args.recompute))
    for weight in learner.master.parameters():
        torch.nn.init.normal_(weight, std=.02)
    learner.refresh()
    prefix, uniforms = lm.encode_prefix(learner.model, [0] * args.shared), torch.rand(args.episodes, args.new)
    lm.generate(learner.model, [tuple(x.detach() for x in kv) for kv in prefix], prompts[:args.episodes],
                uniforms, args.new, (), config.vocab_size)
    del prefix

    class Agent:
        def score(self, steps):
            return lm.score(learner.model, lm.encode_prefix(learner.model, [0] * args.shared),
                            [step.prompt for step in steps], [step.response for step in steps], config.vocab_size)

    rng = torch.randint(config.vocab_size, (args.update_episodes * args.steps, args.new)).tolist()
    steps = [msgrpo.Step(prompt, tuple(ids), [0.0] * len(ids)) for prompt, ids in zip(prompts, rng, strict=False)]
    msgrpo.accumulate_gradient(Agent(), [msgrpo.Episode(steps)], [1.0], entropy_coef=.001, budget=args.micro_batch_tokens)
    learner.update(1e-6)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a model's config.json")
    for name, default, text in (
            ("episodes", 32, "played at once"), ("update-episodes", 16, "of one optimiser step"),
            ("steps", 8, "of an episode"), ("prompt", 180, "tokens of a prompt"),
            ("shared", 120, "of them in the instructions"), ("new", 16, "tokens of an answer"),
            ("micro-batch-tokens", 16384, "as in train.py"), ("processes", 1, "devices that share the float32 state")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--measure", action="store_true", help="run it on this machine's CPU as well")
    args = parser.parse_args()
    try:
        config = lm.parse_config(args.config.read_bytes())
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"memory.py: {args.config}: {error}")
    sizes = estimate(config, args)
    for name, size in sizes.items():
        print(f"{name:12s} {size / GIB:8.2f} GiB")
    if args.measure:
        print(f"{'measured':12s} {measure(config, args) / GIB:8.2f} GiB")


if __name__ == "__main__":
    main()
