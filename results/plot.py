"""Draw success over trained tokens and over seconds, of one or more runs, to a PNG.

    python results/plot.py runs/0001 runs/0002 --out curve.png

Lines: success of training episodes on newly drawn maps, a moving average over 10 iterations; faint: raw.
Points: success on held-out maps, from --eval-every and, at the end, from summary.json, which also gives the
random and the optimal player (dashed). Trained tokens are the response tokens of updates.
"""
import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend without a display)


def read_run(folder):
    """A run's metrics as arrays, NaN where null or absent, and its summary, {} while there is none."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = "success", "unseen_success", "trained_tokens", "seconds"
    metrics = {key: np.array([line.get(key) for line in lines], float) for key in keys}
    summary = folder / "summary.json"
    return metrics, json.loads(summary.read_text()) if summary.exists() else {}


def moving_average(values, width):
    """Mean over the last `width` values, fewer at the beginning, NaN left out."""
    windows = (values[max(0, i - width + 1):i + 1] for i in range(len(values)))
    return np.array([np.mean(window, where=~np.isnan(window)) for window in windows])


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder with metrics.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curve.png"), help="the PNG (default: %(default)s)")
    parser.add_argument("--width", type=int, default=10, help="iterations of the moving average")
    args = parser.parse_args()
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for i, folder in enumerate(args.runs):
        try:
            metrics, summary = read_run(folder)
        except (OSError, ValueError) as error:
            sys.exit(f"plot.py: {folder} has no readable metrics: {error}")
        success, unseen = moving_average(metrics["success"], args.width), metrics["unseen_success"]
        unseen[-1] = summary.get("unseen_success", unseen[-1])
        for panel, x in (panels[0], metrics["trained_tokens"].cumsum()), (panels[1], metrics["seconds"]):
            panel.plot(x, metrics["success"], color=f"C{i}", lw=.5, alpha=.25)
            panel.plot(x, success, color=f"C{i}", lw=1.2, label=folder.name)
            panel.plot(x, unseen, "o", color=f"C{i}", ms=4, mec="white", mew=.6, clip_on=False, zorder=5)
            for name in ("random_success", "optimal_success") if summary and not i else ():
                panel.axhline(summary[name], color="gray", lw=.7, ls="--", alpha=.6, zorder=0)
                panel.annotate(name[:-8], (1, summary[name]), (0, 2), ("axes fraction", "data"),
                               "offset points", color="gray", ha="right", fontsize=8)
    for panel, label in (panels[0], "trained tokens"), (panels[1], "seconds"):
        panel.set(xlabel=label, xlim=(0, None), ylim=(0, 1.02))
        panel.grid(alpha=.15)
    panels[0].xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    panels[0].set_ylabel("success")
    panels[1].plot([], [], "o", color="gray", ms=4, label="held-out maps")
    panels[1].legend(frameon=False, loc="lower right", bbox_to_anchor=(1, .05), fontsize=8)
    figure.savefig(args.out, dpi=160)
    print(args.out)


if __name__ == "__main__":
    main()
