"""A laptop in use: a short `--tiny` beside no, one and two processes that only count.

    python results/busy.py        about ten minutes; a line per run goes to results/tiny/busy.jsonl

Seconds of the whole command, median and worst of five. The settings take turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "tiny" / "busy.jsonl"
RUN = ["--tiny", "--iterations", "5", "--eval-episodes", "5"]
SETTINGS = {"--threads 1": ["--threads", "1"], "--threads 2": ["--threads", "2"]}


def seconds_of(flags, neighbours):
    """Seconds of one run beside so many busy processes."""
    count = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(count) for _ in range(neighbours)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "train.py"), *RUN, *flags, "--out", folder + "/a"]
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            return time.perf_counter() - began
    finally:
        for process in busy:
            process.kill()


def main():
    found = {}
    with open(OUT, "w") as file:
        for _ in range(5):
            for neighbours in (0, 1, 2):
                for name, flags in SETTINGS.items():
                    seconds = seconds_of(flags, neighbours)
                    found.setdefault((neighbours, name), []).append(seconds)
                    line = {"neighbours": neighbours, "setting": name, "seconds": seconds}
                    print(json.dumps(line), file=file, flush=True)
    print("| busy neighbours | setting | median s | worst s |\n|---|---|---|---|")
    for (neighbours, name), seconds in sorted(found.items()):
        print(f"| {neighbours} | {name} | {statistics.median(seconds):.0f} | {max(seconds):.0f} |")


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
