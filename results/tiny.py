"""Seeds of `python train.py --tiny`, one after the other: what the README says of them.

    python results/tiny.py --name mine --seeds 2000 2001    with an evaluation every 20 iterations
    python results/tiny.py [--name mine]                    the tables alone

Flags that are not known here go to train.py, for ablations: `--name no-floor --entropy-floor 0`.
The metrics, settings and summary of a seed are kept in results/tiny/NAME/SEED. One that is there is
not run again.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("settings.json", "metrics.jsonl", "summary.json")


def run_seed(folder, seed, flags):
    """Run a seed and keep its small files."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "run"
        command = [sys.executable, str(ROOT / "train.py"), "--tiny", "--seed", str(seed)]
        command += ["--eval-every", "20", "--out", str(out), *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        folder.mkdir(parents=True)
        for name in KEPT:
            shutil.copy(out / name, folder / name)


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def row(folder):
    """A seed's line of the table."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = read_lines(folder)
    evaluated = [line for line in lines if "unseen_success" in line]
    found = [line["unseen_success"] for line in evaluated]
    best = max([*found, summary["unseen_success"]])
    reached = [line["seconds"] for line in evaluated if line["unseen_success"] >= 0.95]
    chose = [line["drawn_episodes"] < line["nonzero_episodes"] for line in lines]
    return {
        "unseen": summary["unseen_success"],
        "unweighted": summary["unseen_success_unweighted"],
        "best": best,
        "seconds": summary["seconds"],
        "over .95 at": reached[0] if reached else float("nan"),
        "trained tokens": sum(line["trained_tokens"] for line in lines),
        "AAW chose": sum(chose) / len(chose),
    }


def report(home, name):
    """The table of a name, or of every one, as Markdown, and its means."""
    for folder in sorted(path for path in home.glob(name or "*") if path.is_dir()):
        rows = {path.name: row(path) for path in sorted(folder.glob("*")) if path.is_dir()}
        keys = list(next(iter(rows.values())))
        print(f"\n{folder.name}\n\n| seed | {' | '.join(keys)} |\n|{'---|' * (len(keys) + 1)}")
        for seed, values in rows.items():
            print(f"| {seed} | {' | '.join(f'{values[key]:.4g}' for key in keys)} |")
        means = [sum(values[key] for values in rows.values()) / len(rows) for key in keys]
        print(f"| mean | {' | '.join(f'{mean:.4g}' for mean in means)} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--name", help="folder of these runs")
    args, flags = parser.parse_known_args()
    if args.seeds and not args.name:
        parser.error("--seeds needs a --name, of one recipe each")
    home = ROOT / "results" / "tiny"
    for seed in args.seeds:
        folder = home / args.name / str(seed)
        if not folder.exists():
            run_seed(folder, seed, flags)
            print(seed, row(folder), flush=True)
    report(home, args.name)


if __name__ == "__main__":
    main()
