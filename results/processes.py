"""One process of two threads against two processes of one thread: the tiny run's seconds per trained token.

    python results/processes.py                  about three minutes on two cores

The two take turns; counted is the time from the end of the first iteration to the end of the last, by the
clock in metrics.jsonl. The raw figures go to the terminal as JSON, one line a run.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TRAIN = str(Path(__file__).resolve().parent.parent / "train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
COMMANDS = {"one process, two threads": ([sys.executable], 2), "two processes, one thread": (TORCHRUN, 1)}


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    seconds = {name: [] for name in COMMANDS}
    for turn in range(args.repeats):
        for name, (launch, threads) in COMMANDS.items():
            with tempfile.TemporaryDirectory() as out:
                flags = {"out": out, "threads": threads, "iterations": args.iterations, "eval-episodes": 1,
                         "seed": turn}
                command = [*launch, TRAIN, "--tiny", *(f"--{flag}={value}" for flag, value in flags.items())]
                subprocess.run(command, check=True, capture_output=True)
                log = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
            tokens = sum(metrics["trained_tokens"] for metrics in log[1:])
            seconds[name].append((log[-1]["seconds"] - log[0]["seconds"]) / tokens * 1e6)
            row = {"run": name, "seed": turn, "tokens": tokens, "s_per_million": seconds[name][-1]}
            print(json.dumps(row), flush=True)
    one, two = (statistics.median(values) for values in seconds.values())
    print(f"median seconds per million trained tokens: {one:.1f} and {two:.1f}, ratio {one / two:.2f}")


if __name__ == "__main__":
    main()
