"""This commit against 3743012, before issues of speed and memory: one core, SmolLM2's shape.

    git worktree add OLD 3743012 && python results/before.py OLD

32 answers of 8 tokens, float32, random weights, states as in bench.py. CPU seconds of rollouts and
updates, medians of five, the two commits in turns; and the peak memory of an update beyond what is
there before it, in a process of its own. A JSON line per case.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NEW = 8
REPEATS = 5


def make_side(home, directory):
    """(bench.py of a commit, its side of the comparison, calls of a rollout and an update)."""
    sys.path[:0] = [f"{home}/results", home]
    import bench

    bench.torch.set_num_threads(1)
    work = json.loads((directory / "work.json").read_text())
    prompts = [tuple(prompt) for prompt in work["prompts"]]
    if hasattr(bench, "turns"):  # the old one
        shared = work["shared"]  # tokens that begin all prompts
        side = bench.Ours(directory, bench.torch.float32, prompts[0][:shared], NEW)
        prompts = [prompt[shared:] for prompt in prompts]
        pairs = zip(prompts, work["responses"] or side.rollout(prompts))
        update = [[bench.msgrpo.Step(p, tuple(r), [-1.0] * NEW) for p, r in pairs]]
        update.append([(-1.0) ** i for i in range(len(prompts))])
    else:
        model, _ = bench.lm.load_pretrained(directory)
        work |= {"new": NEW, "recompute": "parts", "micro_batch_tokens": 16384}
        side = bench.Ours(model, work)
        pairs = zip(prompts, work["responses"] or side.rollout(prompts))
        update = [[bench.msgrpo.Answer(p, tuple(r), [-1.0] * NEW) for p, r in pairs]]
    return bench, side, {"rollout": [prompts], "update": update}


def worker(home, directory):
    """Run what the standard input names, and print its CPU seconds; `memory`: peak bytes."""
    bench, side, given = make_side(home, directory)
    for line in sys.stdin:
        what = line.strip()
        if what == "memory":
            print(bench.peak_memory(side, *given["update"]), flush=True)
            continue
        side.model.zero_grad()
        start = time.process_time()
        getattr(side, what)(*given[what])
        print(time.process_time() - start, flush=True)


def start(home, directory):
    command = [sys.executable, __file__, str(home), str(directory)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes)


def ask(process, what):
    process.stdin.write(what + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compare(homes, directory):
    """{figure: of the old commit, of this one, ratio}"""
    found = {}
    processes = [start(home, directory) for home in homes]
    for what in ("rollout", "update"):
        rounds = [[ask(process, what) for process in processes] for _ in range(REPEATS + 1)]
        found[what] = [statistics.median(seconds) for seconds in zip(*rounds[1:])]
    for process in processes:
        process.communicate()
    fresh = [start(home, directory) for home in homes]
    found["memory"] = [ask(process, "memory") / 1e6 for process in fresh]
    for process in fresh:
        process.communicate()
    return {what: [old, new, new / old] for what, (old, new) in found.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="a checkout of commit 3743012")
    parser.add_argument("work", type=Path, nargs="?", help=argparse.SUPPRESS)  # for a worker
    args = parser.parse_args()
    if args.work:
        worker(str(args.old), args.work)
        return
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import bench
    import numpy as np

    model, words = bench.make_model("smollm2-135m", "")
    model.files = {"config.json": (HERE / "configs/smollm2-135m.json").read_bytes()}
    for states, lakes in (("distinct", bench.distinct_lakes), ("played", bench.played_lakes)):
        some = list(itertools.islice(lakes(np.random.default_rng(0)), 32))
        prompts = bench.make_prompts(words, some)
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            bench.lm.save_pretrained(directory, model, None)
            responses = np.random.default_rng(1).integers(49152, size=(32, NEW)).tolist()
            shared = len(words.encode(f"<|im_start|>user\n{some[0].instructions}\n\n"))
            work = {"shared": shared, "prompts": prompts}
            (directory / "work.json").write_text(json.dumps(work | {"responses": responses}))
            print(
                json.dumps({"states": states} | compare([args.old, HERE.parent], directory)),
                flush=True,
            )


if __name__ == "__main__":
    main()
