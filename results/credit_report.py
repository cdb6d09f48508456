"""Tables and figures of the runs of credit.py: results/credit/table.md, credit.png, curves.png.

    python results/credit.py --report

Differences are taken seed by seed against the family's reference. Intervals are t intervals, 95
%; p is that of the t test, corrected by Holm over all comparisons of a measure in a family.
"""

from dataclasses import dataclass

import numpy as np

import credit

T_QUANTILES = {  # of .975, by degrees of freedom
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}
FEWEST_SEEDS = 5  # of a verdict
COLORS = {arm: f"C{i}" for i, arm in enumerate(credit.ARMS)}


@dataclass(frozen=True)
class Family:
    """Comparisons that are corrected together: arms against the reference on each game."""

    title: str
    games: tuple
    arms: tuple
    seeds: range
    reference: str = "whole episode"


FAMILIES = (
    Family("Main games", credit.MAIN_GAMES, credit.ARMS, range(500, 510)),
    Family("Other games", credit.OTHER_GAMES, credit.ARMS, credit.FIRST),
    Family("The draw", ("lake",), credit.DRAWS, credit.FIRST, "all"),
    Family("Free answers", ("key 10",), credit.FREE, credit.FIRST, credit.FREE[0]),
)
MEASURES = {
    "area": credit.area,
    "final": credit.final,
    "return": lambda row: credit.final(row, "return"),
}


def interval(values):
    """(mean, half of the 95 % t interval); the half is nan for a single value."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), np.nan
    return float(np.mean(values)), T_QUANTILES[n - 1] * float(np.std(values, ddof=1)) / n**0.5


def p_value(differences):
    """Of the two-sided t test that the mean is 0.

    With t = sqrt(df) tan(angle), the density of t becomes cos(angle)^(df - 1), up to a constant.
    """
    n = len(differences)
    mean = np.mean(differences)
    deviation = np.std(differences, ddof=1)
    if deviation == 0:
        return 1.0 if mean == 0 else 0.0
    t = abs(mean) * n**0.5 / deviation
    angles = np.linspace(0, np.pi / 2, 20_001)
    density = np.cos(angles) ** (n - 2)
    beyond = angles >= np.arctan(t / (n - 1) ** 0.5)
    return float(density[beyond].sum() / density.sum())


def holm(p_values, planned):
    """Holm's corrected p values, in the given order. Planned ones that are missing count as 1."""
    order = np.argsort(p_values)
    corrected = np.zeros(len(p_values))
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (planned - rank) * p_values[i]))
        corrected[i] = largest
    return corrected.tolist()


def tuned(runs, game, arm):
    """The tuned pair of an arm on a game, None where its tuning is incomplete."""
    try:
        return credit.tuned(runs, game, arm)
    except KeyError:
        return None


def reported(runs, family, game, arm):
    """{seed: row} of an arm's reported runs with its tuned settings."""
    pair = tuned(runs, game, arm)
    if pair is None:
        return {}
    jobs = [credit.Job(game, arm, seed, *pair) for seed in family.seeds]
    return {job.seed: runs[job] for job in jobs if job in runs}


def differences(runs, family, game, arm, measure):
    """Of the arm from the reference, at their common seeds."""
    own = reported(runs, family, game, arm)
    others = reported(runs, family, game, family.reference)
    seeds = sorted(own.keys() & others.keys())
    return [measure(own[seed]) - measure(others[seed]) for seed in seeds]


def compare(runs, family, measure):
    """{(game, arm): (mean difference, half interval, corrected p, n)}, given enough seeds."""
    found = {}
    for game in family.games:
        for arm in family.arms:
            values = differences(runs, family, game, arm, measure)
            both_tuned = tuned(runs, game, arm) and tuned(runs, game, family.reference)
            if arm != family.reference and len(values) >= FEWEST_SEEDS and both_tuned:
                found[game, arm] = values
    planned = len(family.games) * (len(family.arms) - 1)
    corrected = holm([p_value(values) for values in found.values()], planned)
    return {
        key: (*interval(values), p, len(values))
        for (key, values), p in zip(found.items(), corrected)
    }


def verdict(comparison):
    mean, _, p, _ = comparison
    if p >= 0.05:
        return "not distinguishable"
    return "better" if mean > 0 else "worse"


def number(mean, half, sign=""):
    if np.isnan(half):
        return f"{mean:{sign}.3f}"
    return f"{mean:{sign}.3f} ± {half:.3f}"


def family_table(runs, family):
    """The family's lines of table.md."""
    comparisons = {name: compare(runs, family, measure) for name, measure in MEASURES.items()}
    lines = [f"## {family.title}, against `{family.reference}`", ""]
    for game in family.games:
        lines += [
            f"**{game}**",
            "",
            "| arm | rate, entropy | n | area | final | return | "
            "area less reference's | verdicts: area, final, return |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for arm in family.arms:
            lines.append(arm_row(runs, family, game, arm, comparisons))
        lines.append("")
    return lines


def arm_row(runs, family, game, arm, comparisons):
    rows = list(reported(runs, family, game, arm).values())
    if not rows:
        return f"| {arm} | | 0 | not run | | | | |"
    pair = f"{rows[0]['learning_rate']:g}, {rows[0]['entropy_coef']:g}"
    means = [number(*interval([f(row) for row in rows])) for f in MEASURES.values()]
    cells = [arm, pair, str(len(rows)), *means]
    if (game, arm) in comparisons["area"]:
        mean, half, p, n = comparisons["area"][game, arm]
        cells.append(f"{number(mean, half, '+')} (p {p:.3f}, n {n})")
        cells.append(", ".join(verdict(comparisons[name][game, arm]) for name in MEASURES))
    else:
        values = differences(runs, family, game, arm, credit.area)
        if values and arm != family.reference:
            cells.append(f"{number(*interval(values), '+')} (n {len(values)})")
            cells.append("no verdict: too few seeds, or not tuned here")
        else:
            cells += ["", ""]
    return "| " + " | ".join(cells) + " |"


def thrift_table(runs):
    """The draw: the area up to as many tokens as the thriftiest arm has trained."""
    family = FAMILIES[2]
    rows = {arm: list(reported(runs, family, "lake", arm).values()) for arm in family.arms}
    rows = {arm: found for arm, found in rows.items() if found}
    if not rows:
        return []
    ends = [row["curves"]["trained_tokens"][-1] for found in rows.values() for row in found]
    at = np.linspace(0, min(ends), 201)
    lines = [f"**lake**, area over the first {min(ends):,.0f} trained tokens", ""]
    lines += ["| arm | area per trained token |", "|---|---|"]
    for arm, found in rows.items():
        curves = [row["curves"] for row in found]
        areas = [np.interp(at, c["trained_tokens"], c["success"]).mean() for c in curves]
        lines.append(f"| {arm} | {number(*interval(areas))} |")
    return [*lines, ""]


def missing(runs):
    """What of the protocol has not been run."""
    lines = ["## Not run", ""]
    for family in FAMILIES:
        for game in family.games:
            gaps = []
            for arm in family.arms:
                n = len(reported(runs, family, game, arm))
                if n < len(family.seeds):
                    gaps.append(f"{arm} {n} of {len(family.seeds)}")
            if gaps:
                lines.append(f"- {family.title}, {game}: {', '.join(gaps)} seeds")
    return lines if len(lines) > 2 else [*lines, "Nothing: all of the protocol has been run."]


def tuning_table(runs):
    lines = ["## Tuning: mean area by learning rate, entropy coefficient", ""]
    header = " | ".join(f"{rate:g}, {entropy:g}" for rate, entropy in credit.GRID)
    lines += [f"| game | arm | {header} |", "|---|---|" + "---|" * len(credit.GRID)]
    parts = dict.fromkeys((job.game, job.arm) for job in runs if job.seed in credit.TUNING_SEEDS)
    for game, arm in parts:
        cells = []
        for pair in credit.GRID:
            jobs = [credit.Job(game, arm, seed, *pair) for seed in credit.TUNING_SEEDS]
            areas = [credit.area(runs[job]) for job in jobs if job in runs]
            cells.append(f"{np.mean(areas):.3f}" if areas else "")
        lines.append(f"| {game} | {arm} | {' | '.join(cells)} |")
    return [*lines, ""]


def plot_points(axis, runs, family, games, name, title):
    """A measure of each arm on each game, with t intervals."""
    for offset, arm in zip(np.linspace(-0.2, 0.2, len(family.arms)), family.arms):
        places = []
        means = []
        halves = []
        for place, game in enumerate(games):
            rows = reported(runs, family, game, arm).values()
            if rows:
                mean, half = interval([MEASURES[name](row) for row in rows])
                places.append(place + offset)
                means.append(mean)
                halves.append(0 if np.isnan(half) else half)
        style = "o-" if games == credit.KEY_GAMES else "o"
        axis.errorbar(
            places, means, halves, fmt=style, ms=4, capsize=2, label=arm, color=COLORS[arm]
        )
    axis.set_xticks(range(len(games)), [game.removeprefix("key ") for game in games])
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)


def subplots(*args, **options):
    """matplotlib's, without a display; imported here, as the statistics do without it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(*args, **options)


def plot_answer(runs):
    """Success against horizon, by credit rule; and by game."""
    figure, axes = subplots(1, 3, figsize=(14, 4.2))
    main = FAMILIES[0]
    plot_points(axes[0], runs, main, credit.KEY_GAMES, "final", "key and door: final success")
    plot_points(axes[1], runs, main, credit.KEY_GAMES, "area", "key and door: area")
    axes[0].set_xlabel("horizon, steps")
    axes[1].set_xlabel("horizon, steps")
    lakes = ("coin lake", *credit.OTHER_GAMES)
    everything = Family("", lakes, credit.ARMS, range(500, 510))
    plot_points(axes[2], runs, everything, lakes, "final", "lakes: final success")
    axes[0].set_ylabel("held-out success, greedy")
    axes[0].set_ylim(-0.03, 1.03)
    axes[1].set_ylim(-0.03, 1.03)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(credit.OUT / "credit.png", dpi=130)


def plot_curves(runs):
    """Mean success against iterations, a panel per game."""
    panels = [(FAMILIES[0], game) for game in credit.MAIN_GAMES]
    panels += [(FAMILIES[1], game) for game in credit.OTHER_GAMES]
    figure, axes = subplots(2, 4, figsize=(15, 7), sharey=True)
    for axis, (family, game) in zip(axes.flat, panels):
        for arm in family.arms:
            rows = list(reported(runs, family, game, arm).values())
            if rows:
                mean = np.mean([row["curves"]["success"] for row in rows], 0)
                label = f"{arm} ({len(rows)})"
                axis.plot(rows[0]["curves"]["iteration"], mean, label=label, color=COLORS[arm])
        axis.set_title(game, fontsize=10)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=6)
    figure.supxlabel("iteration")
    figure.supylabel("held-out success, greedy; mean over seeds")
    figure.tight_layout()
    figure.savefig(credit.OUT / "curves.png", dpi=110)


def write():
    runs = credit.read_runs()
    lines = ["# Credit study: all figures", "", "Made by `python results/credit.py --report`.", ""]
    for family in FAMILIES:
        lines += family_table(runs, family)
    lines += thrift_table(runs)
    lines += tuning_table(runs)
    lines += missing(runs)
    (credit.OUT / "table.md").write_text("\n".join(lines) + "\n")
    plot_answer(runs)
    plot_curves(runs)
    print(f"{len(runs)} runs; see {credit.OUT}/table.md, credit.png, curves.png")
