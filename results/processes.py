"""Two processes of one thread against one process of two: seconds per million trained tokens.

    python results/processes.py           some minutes on two cores

Both train the tiny model, in turns. Counted is the time between the ends of the first and the last
iteration. A JSON line per run goes to the terminal.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TRAIN = str(Path(__file__).resolve().parent.parent / "train.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
COMMANDS = {
    "one process, two threads": [sys.executable, TRAIN, "--threads", "2"],
    "two processes, one thread": [sys.executable, *TORCHRUN, TRAIN, "--threads", "1"],
}


def run(command, iterations, seed):
    """(trained tokens, seconds) of a run behind its first iteration."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--tiny", "--iterations", str(iterations), "--seed", str(seed)]
        flags += ["--eval-episodes", "1", "--out", f"{folder}/run"]
        subprocess.run([*command, *flags], check=True, capture_output=True)
        text = Path(f"{folder}/run/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    tokens = sum(line["trained_tokens"] for line in lines[1:])
    return tokens, lines[-1]["seconds"] - lines[0]["seconds"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    found = {name: [] for name in COMMANDS}
    for seed in range(args.repeats):
        for name, command in COMMANDS.items():
            tokens, seconds = run(command, args.iterations, seed)
            found[name].append(seconds / tokens * 1e6)
            row = {"run": name, "seed": seed, "tokens": tokens, "s_per_million": found[name][-1]}
            print(json.dumps(row), flush=True)
    for name, values in found.items():
        print(f"{name}: {statistics.median(values):.1f} s per million trained tokens, median")


if __name__ == "__main__":
    main()
