"""What a training run needs in GiB, from a config.json alone.

    python results/memory.py results/configs/qwen2.5-3b.json --recompute
    MALLOC_MMAP_THRESHOLD_=65536 python results/memory.py CONFIG --measure    also runs it here, to compare

With P parameters, in bytes (train.Learner): float32 weights 4 P, gradients 4 P, Adam's two moments 8 P, all
divided by --processes, which share them; the copy that plays (and, with one process, learns) 2 P in bfloat16,
whole on each. Gradients are there from an update's first backward pass to its end. The layers that FSDP2
gathers for a pass are not counted. --episodes and --update-episodes are those of one process.

What comes and goes is not written as formulas, which would age: model.py itself runs on torch's meta device,
where tensors have sizes and no contents, and every allocation is counted while it lives.

    KV cache     2 layers kv_heads head_dim (shared + episodes (prompt - shared + new - 1)), dtype of the copy
    rollout      peak of the answers of all episodes, with the tables (episodes, vocabulary) to sample from
    activations  what the forward pass of the largest micro-batch keeps for its backward pass: the insides of
                 every layer, and each answer's copy of the keys and values before it, among them; or, with
                 --recompute, each layer's input; and tables (response tokens, vocabulary)
    update       peak of this forward and backward pass; each weight's gradient is handed on as it comes

The total is the larger of rollout and update. It assumes the worst: no two states are equal, no episode ends
early. An earlier layout of the update pass measured .86 to 1.09 of it (a CPU, 60 million parameters; up to
1.26 where glibc keeps fragments); the present one was not measured against it. A GPU's context and fragments
come on top, and its other kernels keep less or more.
"""
import argparse
import resource
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as lm
import msgrpo
import train

# What depends on contents, which meta tensors lack: masks are all True, no two rows are equal.
torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True
UNIQUE, EQUAL, TOLIST = torch.Tensor.unique, torch.equal, torch.Tensor.tolist
torch.Tensor.unique = lambda x, **kwargs: (x, torch.arange(len(x), device="meta")) if x.is_meta else (
    UNIQUE(x, **kwargs))
torch.equal = lambda a, b: not a.is_meta and EQUAL(a, b)
torch.Tensor.tolist = lambda x: TOLIST(torch.ones(x.shape, dtype=x.dtype) if x.is_meta else x)
GIB = 2 ** 30


class Allocations(TorchDispatchMode):
    """Bytes of the meta tensors that were made inside and live now, and their peak."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.storages = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = ([t.untyped_storage() for t in tree_leaves(x) if isinstance(t, torch.Tensor)]
                       for x in ((args, kwargs), result))
        old = {storage._cdata for storage in given} | self.storages.keys()
        for storage in made:
            if storage.device.type == "meta" and storage._cdata not in old:
                self.storages[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.live)
        return result

    def free(self, key):
        self.live -= self.storages.pop(key)


def agent(model, args):
    """An agent whose prompts are given as tokens."""
    tokenizer = SimpleNamespace(size=model.config.vocab_size, end_ids=(), decode=str,
                                prefix=lambda text: [0] * args.shared, suffix=lambda prompt, think: prompt)
    return lm.LanguageAgent(model, tokenizer, "", max_new_tokens=args.new)


def rollout(model, args):
    """Peak of a batch's answers."""
    prompts = [(i,) * (args.prompt - args.shared) for i in range(args.episodes)]
    with Allocations() as memory:
        agent(model, args).act(prompts, np.zeros((args.episodes, args.new)))
    return memory.peak


def micro_batch(model, args):
    """(kept by the forward pass, peak with the backward pass) of as many answers as the budget holds."""
    prompt = args.prompt - args.shared
    n = min(args.update_episodes * args.steps, max(1, args.micro_batch_tokens // (prompt + args.new)))
    steps = [msgrpo.Step((i,) * prompt, (i,) * args.new) for i in range(n)]
    policy = agent(model, args)
    with Allocations() as memory:
        logprobs, entropies = policy.score(steps)
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
    count, size = sum(weight.numel() for weight in model.parameters()), 4 if args.dtype == "float32" else 2
    slots = args.shared + args.episodes * (args.prompt - args.shared + args.new - 1)
    kv_size = config.num_key_value_heads * config.head_dim * size
    sizes = {"weights": 4 * count / args.processes, "gradients": 4 * count / args.processes,
             "moments": 8 * count / args.processes, "copy": size * count,
             "KV cache": 2 * config.num_hidden_layers * kv_size * slots, "rollout": rollout(model, args)}
    sizes["activations"], sizes["update"] = micro_batch(model, args)
    state = sizes["weights"] + sizes["moments"] + sizes["copy"]
    return sizes | {"total": state + max(sizes["rollout"], sizes["gradients"] + sizes["update"])}


def measure(config, args):
    """Peak resident bytes of a rollout and two updates with random weights, less those before."""
    prompts = [(i,) * (args.prompt - args.shared) for i in range(args.episodes * args.steps)]
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    master = lm.Transformer(config)
    for weight in master.parameters():
        torch.nn.init.normal_(weight, std=.02)
    train.tiny_start = lambda settings: (master, True)
    learner = train.Learner(train.Settings(dtype=args.dtype, device="cpu", recompute=args.recompute))
    policy = agent(learner.model, args)
    policy.act(prompts[:args.episodes], np.random.default_rng(0).random((args.episodes, args.new)))
    prompts = prompts[:args.update_episodes * args.steps]
    ids = torch.randint(config.vocab_size, (len(prompts), args.new)).tolist()
    steps = [msgrpo.Step(prompt, tuple(ids[i]), [0.0] * args.new) for i, prompt in enumerate(prompts)]
    msgrpo.assign_credit([steps], torch.ones(1))
    for _ in range(2):  # the first makes the moments
        msgrpo.accumulate_gradient(policy, [steps], entropy_coef=.001, budget=args.micro_batch_tokens)
        learner.update(1e-6)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("config", type=Path, help="a model's config.json")
    for name, default, text in (
            ("episodes", 32, "played at once"), ("update-episodes", 16, "of one optimiser step"),
            ("steps", 8, "of an episode"), ("prompt", 180, "tokens of a prompt"),
            ("shared", 120, "of them in the instructions"), ("new", 16, "tokens of an answer"),
            ("micro-batch-tokens", 16384, "as in train.py"), ("processes", 1, "that share float32 state")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--measure", action="store_true", help="run it on this machine's CPU as well")
    args = parser.parse_args()
    try:
        config = lm.parse_config(args.config.read_bytes())
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"memory.py: {args.config}: {error}")
    for name, size in estimate(config, args).items():
        print(f"{name:12s} {size / GIB:8.2f} GiB")
    if args.measure:
        print(f"{'measured':12s} {measure(config, args) / GIB:8.2f} GiB")


if __name__ == "__main__":
    main()
