"""Draw the success of one or more runs to a PNG, beside players who do not learn.

    python results/plot.py runs/0001 runs/0002 --out curve.png
    python results/plot.py runs/0001 --follow              the picture grows while the run goes on

Lines: success of training episodes on newly drawn lakes, mean of ten iterations. Points: success
on the held-out lakes, from --eval-every and at the end from summary.json. Dashed: the players of
`frozenlake.baselines` on the held-out lakes of the first run's scenario.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import frozenlake
import train

try:
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("plot.py needs matplotlib: pip install matplotlib")

X_LABELS = {
    "seconds": "seconds",
    "trained_tokens": "trained tokens",
    "iteration": "iterations",
}
LEVELS = {  # a name of frozenlake.baselines: its label
    "optimal": "optimal",
    "reflex3": "nearer to the goal, if three cells are free",
    "reflex2": "nearer to the goal, if two cells are free",
    "reflex1": "nearer to the goal, if one cell is free",
    "random": "random moves",
}
CAPTION = "lines: new lakes in training, mean of ten iterations.  points: lakes never trained on"


class Run:
    """What a run's folder holds so far. Raises OSError or ValueError where that cannot be read."""

    def __init__(self, folder):
        self.name = folder.name
        text = (folder / "metrics.jsonl").read_text()
        self.lines = [json.loads(line) for line in text.splitlines()]
        if not self.lines:
            raise ValueError("no iteration has ended yet")
        self.summary = {}
        if is_finished(folder):
            self.summary = json.loads((folder / "summary.json").read_text())

    def column(self, key):
        """A metric of every iteration, NaN where it is null or absent."""
        return np.array([line.get(key) for line in self.lines], float)

    def x(self, key):
        """Where each iteration stands on the x axis."""
        values = self.column(key)
        return values.cumsum() if key == "trained_tokens" else values

    def unseen(self):
        """Success on the held-out lakes, NaN where it was not evaluated."""
        values = self.column("unseen_success")
        if self.summary:
            values[-1] = self.summary["unseen_success"]
        return values


def is_finished(folder):
    """A run writes its summary last. One that was resumed is at work again."""
    summary = folder / "summary.json"
    metrics = folder / "metrics.jsonl"
    return summary.exists() and summary.stat().st_mtime >= metrics.stat().st_mtime


def moving_average(values, width=10):
    """Mean over the last `width` values, fewer at the beginning, NaN left out."""
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - width) : end]
        window = window[~np.isnan(window)]
        means.append(window.mean() if len(window) else np.nan)
    return np.array(means)


def success_of_baselines(folder):
    """{player: success on the held-out lakes} of a run's scenario."""
    name = json.loads((folder / "settings.json").read_text())["scenario"]
    settings = train.Settings(scenario=name)
    maps, weights, _ = train.evaluation_maps(frozenlake.SCENARIOS[name], settings.eval_episodes)
    return train.mean_baselines([settings.lake(desc, scenario=name) for desc in maps], weights)


def title(runs):
    """The message of the figure."""
    longest = max(len(run.lines) for run in runs)
    if not all(run.summary for run in runs):
        success = [moving_average(run.column("success"))[-1] for run in runs]
        return f"After {longest} iterations, {percent(success)} of new lakes are crossed"
    success = [run.summary["unseen_success"] for run in runs]
    return f"After {longest} iterations, {percent(success)} of the lakes never seen are crossed"


def percent(shares):
    low = f"{min(shares):.1%}"
    high = f"{max(shares):.1%}"
    return low if low == high else f"{low} to {high}"


def spread(heights, gap=0.05):
    """Heights of labels at least `gap` apart, each near its own and none above the highest."""
    order = np.argsort(heights)[::-1]
    placed = np.array(heights, float)
    for above, below in zip(order, order[1:]):
        placed[below] = min(placed[below], placed[above] - gap)
    return placed


def draw(runs, levels, x_key, out):
    """Write the figure to the file `out`, whole or not at all."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panel = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, level in levels.items():
        panel.axhline(level, color="gray", lw=0.8, ls="--", zorder=0)
        look = {"color": "gray", "fontsize": 8, "ha": "right", "va": "bottom"}
        if name.startswith("reflex"):
            look["va"] = "top"  # above are the curves
        paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        where = panel.get_yaxis_transform()  # x in parts of the panel, y in data
        panel.text(0.99, level, f"{LEVELS[name]}: {level:.1%}", look, bbox=paper, transform=where)
    ends = []
    for i, run in enumerate(runs):
        x = run.x(x_key)
        success = moving_average(run.column("success"))
        panel.plot(x, success, color=f"C{i}", lw=1.4)
        dots = {"ms": 4, "mec": "white", "mew": 0.6, "clip_on": False, "zorder": 5}
        panel.plot(x, run.unseen(), "o", color=f"C{i}", **dots)
        ends.append(np.nan_to_num(success[-1]))
    if len(runs) <= 20:  # there is no room for more names
        for i, height in enumerate(spread(ends)):
            look = {"color": f"C{i}", "va": "center"}
            panel.text(1.01, height, runs[i].name, look, transform=panel.get_yaxis_transform())
    panel.set_title(title(runs), loc="left", fontweight="bold")
    panel.set_xlabel(f"{X_LABELS[x_key]}\n{CAPTION}")
    panel.set_ylabel("success")
    panel.set_xlim(0, None)
    panel.set_ylim(0, 1.05)
    panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    temporary = out.with_name(out.name + ".tmp")
    figure.savefig(temporary, dpi=160, format="png")
    temporary.replace(out)
    plt.close(figure)


def read_runs(folders):
    """The runs; exits with a line that says which one cannot be read."""
    runs = []
    for folder in folders:
        try:
            runs.append(Run(folder))
        except (OSError, ValueError) as error:
            sys.exit(f"plot.py: {folder} has no readable metrics: {error}")
    return runs


def follow(args):
    """Redraw every few seconds until all runs have ended."""
    levels = success_of_baselines(args.runs[0])
    finished = False
    while not finished:
        finished = all(is_finished(folder) for folder in args.runs)
        begun = [(folder / "metrics.jsonl").exists() for folder in args.runs]
        if all(begun):
            draw(read_runs(args.runs), levels, args.x, args.out)
        if not finished:
            time.sleep(args.every)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, default=Path("curve.png"), help="the PNG")
    parser.add_argument("--x", choices=X_LABELS, default="seconds", help="what to draw it over")
    parser.add_argument("--follow", action="store_true", help="redraw until the runs have ended")
    parser.add_argument("--every", type=float, default=3, help="seconds between two drawings")
    args = parser.parse_args()
    if args.follow:
        print(f"{args.out} is redrawn every {args.every:g} s; Ctrl-C ends it", flush=True)
        try:
            follow(args)
        except KeyboardInterrupt:
            sys.exit(130)
    else:
        runs = read_runs(args.runs)
        draw(runs, success_of_baselines(args.runs[0]), args.x, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
