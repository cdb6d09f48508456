"""What a training run needs on each device, in GiB, from a config.json alone.

    python results/memory.py results/configs/qwen2.5-3b.json --new 256    --think
    python results/memory.py results/configs/qwen2.5-3b.json --new 16     without
    python results/memory.py --check        small models, beside what they take on this CPU

P parameters take float32 weights 4 P, gradients 4 P and Adam's moments 8 P, all divided by
--processes, and the copy that plays 2 P in bfloat16 (in float32, on one process, there is none).
Then comes the largest of four, each at its peak:

    rollout     one step of all episodes of an iteration: the cache of keys and values, twice while
                rows that have ended are taken out of it, and the tables to sample from
    evaluation  the same for the 256 episodes that an evaluation plays at once
    update      the gradients, what the forward pass of a micro-batch keeps, and the larger of the
                tables over the vocabulary of one slice and of one layer's backward pass
    optimizer   the gradients alone

It assumes the worst: no two states are alike, no episode and no answer ends early. It leaves out a
GPU's context, its libraries' workspaces and the allocator's fragments, and with several processes
the layers that are gathered for a pass.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # before torch, whose threads it sets

import numpy as np
import torch

import model as lm
import msgrpo

GIB = 2**30
FLAGS = {  # name: default and meaning
    "episodes": (32, "played at once: groups * group size"),
    "eval-episodes": (256, "played at once in an evaluation"),
    "update-episodes": (16, "of one optimiser step"),
    "steps": (8, "of an episode"),
    "shared": (120, "tokens of the instructions"),
    "state": (60, "tokens of a state, behind the instructions"),
    "new": (16, "tokens of an answer; with --think 256"),
    "micro-batch-tokens": (16384, "as in train.py"),
    "processes": (1, "that share the float32 state"),
}
CHECKS = [  # slice: tokens of a table over the vocabulary
    {"hidden_size": 384, "num_hidden_layers": 4, "new": 16, "slice": 4096},
    {"hidden_size": 384, "num_hidden_layers": 4, "new": 64, "slice": 256, "recompute": "layers"},
    {"hidden_size": 256, "num_hidden_layers": 8, "new": 64, "slice": 256},
    {"hidden_size": 256, "num_hidden_layers": 8, "new": 64, "slice": 256, "recompute": "nothing"},
    {"hidden_size": 256, "num_hidden_layers": 8, "new": 128, "slice": 512, "recompute": "layers"},
]


def rollout(c, args, episodes):
    """Peak bytes of playing one step of so many episodes."""
    slots = args.shared + args.state + args.new
    layer = 2 * c.num_key_value_heads * c.head_dim * args.size  # keys and values of a token
    cache = episodes * slots * c.num_hidden_layers * layer
    tables = 3 * 4 * episodes * c.vocab_size  # log-probabilities, probabilities, their sum so far
    return 2 * cache + tables


def update(c, args):
    """Peak bytes of a forward and a backward pass, beyond the gradients."""
    # Rounded up: the answer that fills a micro-batch still belongs to it
    at_most = math.ceil(args.micro_batch_tokens / (args.state + args.new))
    rows = min(at_most, args.update_episodes * args.steps)
    read = args.state + args.new - 1  # tokens of a row; an answer's last one is not read
    tokens = args.shared + rows * read
    in_texts = rows * read  # each text's queries, keys and values, gathered for its attention
    slots = args.shared + in_texts + rows * args.shared
    q = c.num_attention_heads * c.head_dim
    kv = c.num_key_value_heads * c.head_dim

    # What a layer keeps of a token: both norms' inputs and outputs; attention's output as o_proj
    # wants it; gate and up. Of a text's token: queries and attention's output
    of_token = 4 * c.hidden_size + q + 2 * c.intermediate_size
    gathered = (args.shared + in_texts) * 2 * q + slots * 2 * kv
    inner = 2 * c.hidden_size + 2 * c.intermediate_size  # within the norms; silu, and product
    # Gradients in a layer's backward pass: of product, silu and up; of what goes in and comes out
    backward = tokens * (3 * c.intermediate_size + 2 * c.hidden_size)
    if args.recompute == "layers":
        kept = c.num_hidden_layers * tokens * c.hidden_size
        backward += tokens * (of_token + inner) + gathered
    elif args.recompute == "parts":  # queries, keys and values, not what is gathered of them
        kept = c.num_hidden_layers * tokens * (of_token + q + 2 * kv)
        in_attention = 2 * gathered + tokens * (q + 2 * kv)
        backward = max(backward + tokens * inner, in_attention)
    else:
        kept = c.num_hidden_layers * (tokens * (of_token + inner) + gathered)
    kept += 3 * tokens * c.hidden_size  # the last norm

    head = c.vocab_size * c.hidden_size  # its gradient in the numbers of the pass
    elements = rows * args.new * c.vocab_size
    of_slice = min(elements, lm.SLICE_ELEMENTS[args.device])
    # Logits, log-probabilities, their exp, gradients; and those of the slice before
    tables = (4 if elements == of_slice else 5) * 4 * of_slice
    at_the_head = tables + args.size * head
    in_a_layer = args.size * backward
    return args.size * (kept + head) + max(at_the_head, in_a_layer)


def estimate(c, args):
    """{what: bytes}"""
    with torch.device("meta"):
        model = lm.Transformer(c)
    parameters = sum(weight.numel() for weight in model.parameters())
    has_copy = args.dtype == "bfloat16" or args.processes > 1
    sizes = {
        "weights": 4 * parameters / args.processes,
        "moments": 8 * parameters / args.processes,
        "copy": args.size * parameters if has_copy else 0,
    }
    state = sum(sizes.values())
    gradients = 4 * parameters / args.processes
    peaks = {
        "rollout": rollout(c, args, args.episodes),
        "evaluation": rollout(c, args, args.eval_episodes),
        "update": gradients + update(c, args),
        "optimizer": gradients,
    }
    return sizes | peaks | {"total": state + max(peaks.values())}


def measure(c, args):
    """Peak resident bytes of a rollout and two updates with random weights, less those before."""
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    model = lm.Transformer(c)
    tokenizer = SimpleNamespace(size=c.vocab_size, end_ids=(), decode=str)
    settings = train.Settings(
        dtype=args.dtype, device="cpu", recompute=args.recompute, max_new_tokens=args.new, threads=1
    )
    learner = train.Learner(settings, model, tokenizer)
    count = args.update_episodes * args.steps
    prompts = [(0,) * args.shared + (1 + i,) * args.state for i in range(count)]
    uniforms = np.random.default_rng(0).random((args.episodes, args.new))
    player = learner.player("")
    player.encode = tuple  # it is given prompts in the place of states
    player.act(prompts[: args.episodes], uniforms)
    steps = []
    for prompt in prompts:
        response = tuple(torch.randint(c.vocab_size, (args.new,)).tolist())
        steps.append(msgrpo.Step(msgrpo.Answer(prompt, response, [0.0] * args.new), credit=1.0))
    for _ in range(2):  # the first one makes the moments
        budget = args.micro_batch_tokens
        msgrpo.accumulate_gradient(learner.trainee(""), [steps], entropy_coef=0.001, budget=budget)
        learner.update(1e-6)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def check():
    """Print prediction and measurement of small models, each in a process of its own."""
    for number, case in enumerate(CHECKS):
        command = [sys.executable, __file__, "--case", str(number)]
        # So that glibc gives back at once what is freed
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        print(done.stdout, end="", flush=True)


def check_case(case, args):
    """One case of `check`: its small model and its sizes."""
    args.dtype = "float32"
    args.size = 4
    args.recompute = case.get("recompute", "parts")
    args.new = case["new"]
    args.episodes = 8
    args.eval_episodes = 8
    args.steps = 3  # at least two full micro-batches: in the second one, gradients are there
    args.micro_batch_tokens = 1500
    args.device = "cpu"
    lm.SLICE_ELEMENTS["cpu"] = case["slice"] * 16384
    width = case["hidden_size"]
    c = lm.Config("llama", 16384, width, 3 * width, case["num_hidden_layers"], 8, 2, width // 8)
    predicted = estimate(c, args)["total"]
    measured = measure(c, args)
    figures = {
        "predicted": predicted / GIB,
        "measured": measured / GIB,
        "ratio": predicted / measured,
    }
    print(json.dumps(case | {name: round(figure, 3) for name, figure in figures.items()}))


def predict(args):
    """Print the estimate for a config.json."""
    try:
        config = lm.parse_config(args.config.read_bytes())
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"memory.py: {args.config}: {error}")
    for name, size in estimate(config, args).items():
        print(f"{name:12s} {size / GIB:8.2f} GiB")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, nargs="?", help="a model's config.json")
    for name, (default, text) in FLAGS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    choices = ("nothing", "parts", "layers")
    parser.add_argument("--recompute", choices=choices, default="layers", help="as in train.py")
    parser.add_argument("--check", action="store_true", help="measure small models; Linux alone")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = "cuda"
    args.size = 2 if args.dtype == "bfloat16" else 4  # bytes of a number in a pass
    if args.check:
        check()
    elif args.case is not None:
        check_case(CHECKS[args.case], args)
    elif args.config is None:
        parser.error("whose config.json?")
    else:
        predict(args)


if __name__ == "__main__":
    main()
