"""Does paying every step the whole episode's reward work, compared with paying by distance from the end?
And what does AAW buy? Training runs of the tiny model, and gradients measured at fixed policies.

    python results/credit.py                    all of it, about four hours on one core
    python results/credit.py --processes 2      one run per core; --report: tables and figures alone

Resumable: a run that is in runs.csv is not repeated; a kill loses the runs under way, no others. In
results/credit/ are runs.csv (a row per run), curves.csv (points of their curves), gradients.csv, table.md
and the figures.

PROTOCOL, written before any of the runs in results/credit but for the order of questions and the rule on
fewer than three seeds. Known before it:
results/credit/before, 150 runs of the same questions on an earlier base (width 48, embeddings that layers
drowned, groups of 32, so that .8 M tokens were needed where .4 M are now), whose tuning was at half the
budget and chose entropy coefficients that were too low for the whole of it; and trials of gamma 1 on this
base, by which its settings were found: an advantage to gamma 1 with AAW.

Base. train.py's tiny settings, but a constant learning rate after the ramp of 10 iterations, so that no
schedule depends on the length of a run. The model that has been warmed up is the same for all arms of a
seed, and so are the first maps: arms are compared seed by seed.

Budget. .4 M trained tokens, as in metrics.jsonl. A run goes on until it has spent the budget *and* made 108
iterations (about what gamma 1 takes for it), so that arms that train on more or fewer episodes are also
compared at equal iterations. It ends without the budget at twice these iterations, or after five in a row in
which no group was mixed; its last success counts for the rest. Every 8 iterations all 503 held-out 4x4 maps
are played greedily.

Questions and arms, in order of priority; seeds are 0, 1, ...
1. Credit by distance: `gamma 1` (MS-GRPO), `gamma .7`, `gamma 0` (the last step alone); 5 seeds; then 5 of
   .9 and .3.
2. Reward on the way, where whole-episode credit and reward to go differ: a cost of .05 a step beside the
   penalty of .5 for an ill-formed answer. `cost, whole`: A_i = R_i - mean R to each step. `cost, to go`:
   A_i less the rewards before t, that is G_t - mean R. `cost, to go, step mean`: G_t less the mean of G_t
   over the group's episodes that have a step t. A cost that is the same at every step shifts late steps of
   `to go` up and is removed by the step mean, so the last is the fairer rival. 5 seeds.
3. Which episodes: `gamma 1` draws half by AAW; `uniform half` draws half, whatever their A; `all`.
   What `explore` adds comes on top. 5 seeds.
4. The comparison: `with std`; `no baseline` (A = R; AAW then draws by |R|). 3 seeds.
5. Longer episodes: 6x6 boards, 20 steps, gamma 1 and 0, from one 4x4 policy: warmed up on 6x6 and 4x4 text
   in turns of 50 steps (6 each) so that its answers are well formed on both, then gamma 1 on 4x4 until .7
   of the episodes on newly drawn maps succeed (at most 3 M tokens). 300 held-out 6x6 maps. 3 seeds, which
   share that policy: they differ in maps and samples alone.
Tuning: entropy coefficient .05, .02 or .005 at learning rate 1e-3, on seeds 100 and 101, the best mean area,
per arm of questions 1 to 4 but for gammas .9 and .3: "each tuned" below. Fading credit is smaller by a
factor of up to the steps of an episode, so that one entropy bonus weighs more in it.
Order: question 1 untuned and tuned; 3, 2 and 4 untuned; 3 tuned, more gammas, 5, 4 tuned, 2 tuned (an order
chosen after the first 15 runs, as time was short: before, 3 and 2 were tuned first). What has not
been run is named in the report; arms in "same settings" have the settings that were found by hand for
`gamma 1`: an advantage to it.

Measures. Main: `area`, the mean of held-out success over trained tokens 0 to budget (trapezes, weighted by
the maps' probability). `final`: its mean over the last fifth of the budget, as a single evaluation is
noisy; unweighted too. `area at equal iterations`. `mixed`: share of groups whose returns are not all alike,
mean over the run. A collapse: at the run's end success below half of its own best (best at least .1), or
less than half of the training answers well formed.

Verdicts, on area, against the question's first arm. Intervals: 95 %, percentile bootstrap over seeds (10,000
draws; with 5 to 8 seeds too narrow rather than too wide). "better" or "worse": the arms' intervals do not
overlap and that of the difference by seed excludes 0. "perhaps": that of the difference excludes 0 alone.
Else "no difference measured"; with fewer than three seeds, no verdict. Question 1 is answered yes if gamma 1
is not worse than any other, and better than gamma 0, both as is and each tuned; no if an arm is better; AAW
buys something if it is better than uniform half. Many comparisons are made: a single "perhaps" is no
finding.

Gradients. At the policy of one gamma 1 run (seed 200) after .05, .15 and .4 M tokens: 30 batches of 64 newly
drawn maps x 8 episodes, the gradient by msgrpo.accumulate_gradient of each rule on the same episodes,
without entropy bonus. |mu|^2 of the mean gradient is estimated by the mean of g_i.g_j over i != j, which a
finite number of batches does not bias, mu_a.mu_b likewise. `noise`: E|g - mu|^2 / |mu|^2 for a batch of 512
(halves: 256 of them). `alignment`: mean over i of g_i . (mean of the others) / (|g_i| |mu|). `cosine`: of
the arm's mean with gamma 1's. +-: jackknife over batches. To be expected: `uniform half` has cosine 1 and
about twice the noise of all; AAW less noise than a uniform half.
"""
import argparse
import csv
import functools
import itertools
import multiprocessing
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import matplotlib
import numpy as np
import torch

import frozenlake
import model as lm
import msgrpo
import train

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend without a display)

ROOT = Path(__file__).resolve().parent.parent
OUT, CACHE = ROOT / "results/credit", ROOT / "runs/credit"
COST, BUDGET, HORIZON = .05, .4e6, 108
PAIRS, TUNING_SEEDS = ((1e-3, .05), (1e-3, .02), (1e-3, .005)), (100, 101)
GROUP, PLAY, CREDIT, ADVANTAGES = (
    train.TINY["group_size"], msgrpo.play, msgrpo.assign_credit, msgrpo.episode_advantages)
ARMS = {  # what differs from the base
    "gamma 1": {}, "gamma .9": {"gamma": .9}, "gamma .7": {"gamma": .7}, "gamma .3": {"gamma": .3},
    "gamma 0": {"gamma": 0.0}, "uniform half": {"sampling": "uniform"}, "all": {"sampling": "all"},
    "with std": {"normalize_std": True}, "no baseline": {},
    "cost, whole": {}, "cost, to go": {}, "cost, to go, step mean": {},
    "6x6, gamma 1": {"scenario": "big"}, "6x6, gamma 0": {"scenario": "big", "gamma": 0.0}}
COSTLY = ("cost, whole", "cost, to go", "cost, to go, step mean")
GAMMAS, DRAWS = ("gamma 1", "gamma .7", "gamma 0"), ("gamma 1", "uniform half", "all")
BASELINES = "gamma 1", "with std", "no baseline"
QUESTIONS = [  # (title, arms with the reference first, seeds, each tuned?)
    ("1. Credit by distance, same settings", GAMMAS, 5, False),
    ("1. Credit by distance, each tuned", GAMMAS, 5, True),
    ("3. Which episodes, same settings", DRAWS, 5, False),
    ("2. Reward on the way, same settings", COSTLY, 5, False),
    ("4. The comparison, same settings", BASELINES, 3, False),
    ("3. Which episodes, each tuned", DRAWS, 5, True),
    ("1. More gammas, same settings", ("gamma 1", "gamma .9", "gamma .3"), 5, False),
    ("5. 6x6 boards, same settings", ("6x6, gamma 1", "6x6, gamma 0"), 3, False),
    ("4. The comparison, each tuned", BASELINES, 3, True),
    ("2. Reward on the way, each tuned", COSTLY, 5, True)]
KEY = ("arm", "seed", "learning_rate", "entropy_coef", "budget")
FIGURES = ("area", "final", "final_unweighted", "area_iterations", "mixed", "lowest_valid", "collapsed",
           "tokens", "iterations", "seconds")
POINT = ("iteration", "tokens", "success", "unweighted", "valid", "train_success", "train_valid", "mixed",
         "entropy")


def rewards_to_go(episode):
    """G_t for each step t."""
    return np.cumsum([step.reward for step in episode][::-1])[::-1]


def to_go(episodes, advantages, gamma):
    """Reward to go: A - (rewards before t) = G_t - mean R."""
    for episode, advantage in zip(episodes, advantages.tolist()):
        rest = rewards_to_go(episode)
        for step, later in zip(episode, rest):
            step.credit = advantage - rest[0] + later


def to_go_step_mean(episodes, advantages, gamma):
    """G_t - the mean of G_t over the episodes of the group that have a step t."""
    for i in range(0, len(episodes), GROUP):
        group = episodes[i:i + GROUP]
        rest = [rewards_to_go(episode) for episode in group]
        means = [np.mean([r[t] for r in rest if len(r) > t]) for t in range(max(map(len, rest)))]
        for episode, later in zip(group, rest):
            for step, own, mean in zip(episode, later, means):
                step.credit = own - mean


def play_at_a_cost(policy, games, greedy=False):
    episodes = PLAY(policy, games, greedy)
    for step in itertools.chain(*episodes):
        step.reward -= COST
    return episodes


def no_baseline(returns, normalize_std):
    """A = R."""
    return torch.as_tensor(returns, dtype=torch.float32)


CREDITS = {"cost, to go": to_go, "cost, to go, step mean": to_go_step_mean}


def prepare(arm, seed, **changes):
    """Settings of a run; what no setting gives is swapped in msgrpo."""
    msgrpo.assign_credit = CREDITS.get(arm, CREDIT)
    msgrpo.play = play_at_a_cost if arm in COSTLY else PLAY
    msgrpo.episode_advantages = no_baseline if arm == "no baseline" else ADVANTAGES
    return train.Settings(**train.TINY | {"final_rate": 1.0, "seed": seed, "eval_episodes": 300, "threads": 1}
                          | ARMS[arm] | changes)


def agents(learner):
    """An agent per board: the instructions name its size."""
    boards = {name: ["S" + "F" * (n - 1), *["F" * n] * (n - 2), "F" * (n - 1) + "G"] for name, n in
              (("noslip", 4), ("big", 6))}
    return {name: learner.agent(learner.settings.lake(desc, scenario=name).instructions)
            for name, desc in boards.items()}


def cached(name, learner, make):
    """Load a learner's weights and moments, or make() and save them."""
    path = CACHE / f"{name}.pt"
    if not path.exists():
        make()
        path.parent.mkdir(parents=True, exist_ok=True)
        with lm.replacing(path) as file:
            torch.save([learner.master.state_dict(), learner.optimizer.state_dict()], file)
    model, optimizer = torch.load(path, weights_only=True)
    learner.master.load_state_dict(model)
    learner.optimizer.load_state_dict(optimizer)
    learner.refresh()


def begin(s):
    """(learner, agent) of a run that is warmed up; for 6x6, with the policy of question 5."""
    learner = train.Learner(s)
    if s.scenario == "noslip":
        agent = agents(learner)["noslip"]
        cached(f"warm-{s.seed}", learner, lambda: train.warm_up(agent, learner))
        return learner, agent

    def learn_4x4():
        for turn, name in itertools.product(range(6), ("big", "noslip")):
            learner.settings = replace(s, scenario=name, seed=1000 * (turn + 1), warmup_steps=50)
            train.warm_up(agents(learner)[name], learner)
        learner.settings, agent = prepare("gamma 1", 300), agents(learner)["noslip"]
        failed, tokens, success = [], 0, 0.0
        for iteration in itertools.count(1):
            if success >= .7 or tokens >= 3e6:
                break
            m = train.iterate(agent, agent, learner, iteration, failed)
            tokens, success = tokens + m["trained_tokens"], m["success"]
    cached("policy-4x4", learner, learn_4x4)
    learner.settings = s
    prepare("6x6, gamma 1", s.seed)
    return learner, agents(learner)["big"]


def run(job):
    """One run: (job, its figures, the points of its curve)."""
    arm, seed, rate, entropy, budget = job
    began = time.perf_counter()
    s = prepare(arm, seed, learning_rate=rate, entropy_coef=entropy)
    learner, agent = begin(s)
    failed, points, recent, tokens, dead, done = [], [], [], 0, 0, False
    for iteration in itertools.count():
        if iteration:
            recent.append(m := train.iterate(agent, agent, learner, iteration, failed))
            tokens += m["trained_tokens"]
            dead = dead + 1 if m["zero_variance_groups"] == 1 else 0
            done = tokens >= budget and iteration >= HORIZON or iteration == 2 * HORIZON or dead == 5
        if iteration % 8 == 0 or done:
            now = train.evaluate(learner, s.scenario)
            mean = {key: np.mean([m[key] for m in recent if m[key] is not None] or [np.nan])
                    for key in ("success", "valid", "zero_variance_groups", "entropy")}
            points.append(dict(zip(POINT, (
                iteration, tokens, now["success"], now["unweighted"], now["valid"], mean["success"],
                mean["valid"], 1 - mean["zero_variance_groups"], mean["entropy"]))))
            recent = []
        if done:
            break
    curve = {key: np.array([point[key] for point in points]) for key in POINT}
    at = np.linspace(0, 1, 401)
    success, unweighted = (np.interp(at * budget, curve["tokens"], curve[key])
                           for key in ("success", "unweighted"))
    by_iteration = np.interp(at * HORIZON, curve["iteration"], curve["success"])
    best, last = curve["success"].max(), points[-1]
    collapsed = best >= .1 and last["success"] < best / 2 or last["train_valid"] < .5
    figures = (success.mean(), success[at >= .8].mean(), unweighted[at >= .8].mean(), by_iteration.mean(),
               np.nanmean(curve["mixed"]), np.nanmin(curve["train_valid"]), int(collapsed), tokens, iteration,
               time.perf_counter() - began)
    return job, figures, points


def read_rows(name):
    """Rows of a CSV as dicts, numbers as floats."""
    if not (OUT / name).exists():
        return []
    with open(OUT / name, newline="") as file:
        return [{key: value if key in ("arm", "policy") else float(value) for key, value in row.items()}
                for row in csv.DictReader(file)]


def append_rows(name, header, rows):
    OUT.mkdir(parents=True, exist_ok=True)
    new = not (OUT / name).exists()
    with open(OUT / name, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([header] if new else [])
        writer.writerows([x if isinstance(x, str) else f"{x:.6g}" for x in row] for row in rows)


def read_runs():
    """{job: its row}."""
    return {tuple(row[key] for key in KEY): row for row in read_rows("runs.csv")}


def do(jobs, pool):
    """Run those of the jobs that runs.csv does not have, and write each as it ends."""
    todo = [job for job in dict.fromkeys(jobs) if job not in read_runs()]
    for job, figures, points in pool.imap_unordered(run, todo):
        append_rows("curves.csv", KEY + POINT, [job + tuple(point.values()) for point in points])
        append_rows("runs.csv", KEY + FIGURES, [job + figures])
        print(f"{time.strftime('%H:%M:%S')}  {' '.join(map(str, job))}  "
              + "  ".join(f"{key} {x:.3f}" for key, x in zip(FIGURES, figures)), flush=True)


def grid(arm):
    """The tuning runs of an arm."""
    return [(arm, seed, *pair, BUDGET) for seed, pair in itertools.product(TUNING_SEEDS, PAIRS)]


def chosen(arm, tuned, runs):
    """(learning rate, entropy coefficient) of an arm; None where it is not tuned yet."""
    if not tuned:
        return train.TINY["learning_rate"], train.TINY["entropy_coef"]
    if any(job not in runs for job in grid(arm)):
        return None
    return max(PAIRS, key=lambda pair: np.mean(
        [runs[arm, seed, *pair, BUDGET]["area"] for seed in TUNING_SEEDS]))


ESTIMATORS = {  # name: (credit rule, step cost, gamma, draw, advantages)
    "gamma 1": (CREDIT, 0, 1.0, "all", ADVANTAGES), "gamma .7": (CREDIT, 0, .7, "all", ADVANTAGES),
    "gamma 0": (CREDIT, 0, 0.0, "all", ADVANTAGES), "to go": (to_go, 0, 1.0, "all", ADVANTAGES),
    "AAW half": (CREDIT, 0, 1.0, "aaw", ADVANTAGES), "uniform half": (CREDIT, 0, 1.0, "uniform", ADVANTAGES),
    "with std": (CREDIT, 0, 1.0, "all", functools.partial(ADVANTAGES, normalize_std=True)),
    "no baseline": (CREDIT, 0, 1.0, "all", no_baseline),
    "cost, whole": (CREDIT, COST, 1.0, "all", ADVANTAGES),
    "cost, to go": (to_go, COST, 1.0, "all", ADVANTAGES),
    "cost, to go, step mean": (to_go_step_mean, COST, 1.0, "all", ADVANTAGES)}


def batch_gradients(agent, learner, s, batch):
    """The gradient of each estimator on one batch, (estimators, parameters); the share of mixed groups."""
    rng = train.generator(300, batch)
    maps = [frozenlake.draw_map(frozenlake.SCENARIOS["noslip"], rng) for _ in range(s.groups)]
    games = [s.lake(desc, 300, batch, i, j) for i, desc in enumerate(maps) for j in range(GROUP)]
    episodes, gradients, paid, mixed = PLAY(agent, games), [], 0, 0.0
    for credit, cost, gamma, sampling, advantages_of in ESTIMATORS.values():
        for step in itertools.chain(*episodes):
            step.reward -= cost - paid
        paid = cost
        returns = torch.tensor([rewards_to_go(episode)[0] for episode in episodes]).view(s.groups, -1).float()
        mixed = mixed or (returns != returns[:, :1]).any(1).float().mean().item()
        kwargs = {} if isinstance(advantages_of, functools.partial) else {"normalize_std": False}
        advantages = advantages_of(returns, **kwargs).flatten()
        drawn = msgrpo.draw_episodes(advantages, sampling, len(episodes) // 2, rng)
        credit(episodes, advantages, gamma)
        msgrpo.accumulate_gradient(agent, [episodes[i] for i in drawn])
        gradients.append(torch.cat([p.grad.flatten() for p in learner.master.parameters()]).double())
        learner.optimizer.zero_grad(set_to_none=False)
    return torch.stack(gradients), mixed


def gradient_figures(gram):
    """noise, alignment, cosine of each estimator from all inner products, (estimators, n, estimators, n)."""
    n, a = gram.shape[1], np.arange(len(gram))
    own = np.einsum("aibi->iab", gram)
    mean = (gram.sum((1, 3)) - own.sum(0)) / (n * (n - 1))  # mu_a . mu_b
    square, sizes = mean[a, a], own[:, a, a]  # |mu|^2, and |g_i|^2 (n, estimators)
    to_others = (np.einsum("aiaj->ia", gram) - sizes) / (n - 1)
    with np.errstate(invalid="ignore"):  # |mu|^2 may be estimated below 0
        return np.stack([sizes.mean(0) / square - 1, (to_others / np.sqrt(sizes)).mean(0) / np.sqrt(square),
                         mean[0] / np.sqrt(square * square[0])])


def measure_gradients(batches=30):
    """gradients.csv: every estimator at an early, a middle and a late policy."""
    s = prepare("gamma 1", 200)
    learner, agent = begin(s)
    failed, tokens, iteration, rows = [], 0, 0, []
    for name, until in ("early", .05e6), ("middle", .15e6), ("late", .4e6):
        while tokens < until:
            iteration += 1
            tokens += train.iterate(agent, agent, learner, iteration, failed)["trained_tokens"]
        agent.refresh()
        now = train.evaluate(learner, "noslip")
        gradients, mixed = zip(*(batch_gradients(agent, learner, s, batch) for batch in range(batches)))
        flat = torch.stack(gradients, 1).flatten(0, 1)  # (estimators * batches, parameters)
        gram = (flat @ flat.T).numpy().reshape(2 * (len(ESTIMATORS), batches))
        figures, keep = gradient_figures(gram), [np.delete(np.arange(batches), i) for i in range(batches)]
        without = np.stack([gradient_figures(gram[:, k][:, :, :, k]) for k in keep])
        error = np.sqrt((batches - 1) * without.var(0))
        pairs = np.stack([figures, error]).transpose(2, 1, 0).reshape(len(ESTIMATORS), -1)
        rows += [(name, arm, tokens, now["success"], now["valid"], np.mean(mixed), *pair)
                 for arm, pair in zip(ESTIMATORS, pairs)]
        learner.optimizer.zero_grad()
    names = "noise", "noise_error", "alignment", "alignment_error", "cosine", "cosine_error"
    append_rows("gradients.csv", ("policy", "arm", "tokens", "success", "valid", "mixed", *names), rows)


def interval(values):
    """(mean, low, high): 95 %, percentile bootstrap over seeds."""
    values = np.asarray(values, float)
    draws = values[np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))].mean(1)
    return values.mean(), *np.percentile(draws, [2.5, 97.5])


def found(arms, seeds, tuned, runs):
    """{arm: its rows}, of the seeds that have been run with all arms; {} before the first."""
    pairs = {arm: chosen(arm, tuned, runs) or (0, 0) for arm in arms}
    rows = {arm: [runs.get((arm, seed, *pairs[arm], BUDGET)) for seed in range(seeds)] for arm in arms}
    whole = [seed for seed in range(seeds) if all(rows[arm][seed] for arm in arms)]
    return {arm: [rows[arm][seed] for seed in whole] for arm in arms} if whole else {}


def verdict(rows, reference):
    """Figures of the difference in area by seed, and what the protocol calls it."""
    areas, others = ([row["area"] for row in x] for x in (rows, reference))
    mean, low, high = interval(np.subtract(areas, others))
    if len(areas) < 3:
        return f"{mean:+.3f}", "too few seeds"
    (_, low_a, high_a), (_, low_b, high_b) = interval(areas), interval(others)
    if low <= 0 <= high:
        return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", "no difference measured"
    sure = "" if low_a > high_b or low_b > high_a else "perhaps "
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", sure + ("better" if mean > 0 else "worse")


def report():
    """table.md and the figures, of the seeds that have been run with all arms of a question."""
    runs, points = read_runs(), {}
    for row in read_rows("curves.csv"):  # a run that was killed while it was written comes twice
        points.setdefault(tuple(row[key] for key in KEY), {})[row["iteration"]] = row
    missing = [q[0] for q in QUESTIONS if not found(*q[1:], runs)]
    lines = ["Made by `python results/credit.py --report` from runs.csv and gradients.csv; words as in its",
             "docstring. Means over seeds [95 % bootstrap interval]; difference: of area, by seed, from the",
             "question's first arm.", *(f"Not run: {title}." for title in missing)]
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    for tuned in False, True:
        shown = [(q[0], rows) for q in QUESTIONS if q[3] == tuned and (rows := found(*q[1:], runs))]
        if not shown:
            continue
        figure, panels = plt.subplots(2, len(shown), figsize=(3.2 * len(shown), 5), sharex="col",
                                      sharey="row", squeeze=False, layout="constrained")
        for column, (title, arms) in zip(panels.T, shown):
            lines += ["", f"### {title}", "", "| arm | rate | entropy | seeds | area | area at equal "
                      "iterations | final | final, unweighted | mixed | collapses | difference | verdict |",
                      "|" + "---|" * 12]
            reference = next(iter(arms.values()))
            for i, (arm, rows) in enumerate(arms.items()):
                cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*interval([row[key] for row in rows])) for key in (
                    "area", "area_iterations", "final", "final_unweighted", "mixed")]
                difference = ("", "") if rows is reference else verdict(rows, reference)
                lines.append("| " + " | ".join([
                    arm, *(f"{rows[0][key]:g}" for key in ("learning_rate", "entropy_coef")), f"{len(rows)}",
                    *cells, f"{sum(row['collapsed'] for row in rows):.0f}", *difference]) + " |")
                x, tracks = np.linspace(0, BUDGET, 201), [points[tuple(row[k] for k in KEY)] for row in rows]
                for panel, key in zip(column, ("success", "mixed")):
                    ys = np.array([np.interp(x, *zip(*((p["tokens"], p[key]) for p in track.values()
                                                       if p[key] == p[key]))) for track in tracks])
                    panel.plot(x, ys.T, color=f"C{i}", lw=.5, alpha=.3)
                    panel.plot(x, ys.mean(0), color=f"C{i}", lw=1.8, label=arm)
            column[0].set_title(title, fontsize=8)
            column[0].legend(frameon=False, fontsize=7)
            column[1].set(xlabel="trained tokens")
            column[1].xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        panels[0, 0].set(ylabel="success on held-out maps", ylim=(0, 1))
        panels[1, 0].set(ylabel="mixed groups in training", ylim=(0, 1.02))
        figure.savefig(OUT / f"{'tuned' if tuned else 'same'}.png", dpi=130)
    if measured := read_rows("gradients.csv"):
        lines += ["", "### Gradients at fixed policies", "", "| policy | tokens | success | mixed | arm | "
                  "noise | alignment | cosine with gamma 1 |", "|" + "---|" * 8]
        lines += ["| {policy} | {tokens:.0f} | {success:.3f} | {mixed:.2f} | {arm} | {noise:.2f} ± "
                  "{noise_error:.2f} | {alignment:.3f} ± {alignment_error:.3f} | {cosine:.3f} ± "
                  "{cosine_error:.3f} |".format(**row) for row in measured]
        figure, panels = plt.subplots(1, 3, figsize=(9, 3.2), sharey=True, layout="constrained")
        for panel, key in zip(panels, ("noise", "alignment", "cosine")):
            for i, policy in enumerate(("early", "middle", "late")):
                rows = [row for row in measured if row["policy"] == policy]
                panel.errorbar([row[key] for row in rows], np.arange(len(rows)) + .2 * (i - 1), fmt="o", ms=3,
                               xerr=[row[f"{key}_error"] for row in rows], color=f"C{i}", label=policy)
            panel.set(xlabel=key, yticks=range(len(rows)), yticklabels=[row["arm"] for row in rows])
            panel.grid(alpha=.15)
        panels[0].invert_yaxis()
        panels[0].set(xscale="log", xlabel="noise of a batch of 512 episodes")
        panels[2].legend(frameon=False)
        figure.savefig(OUT / "gradients.png", dpi=130)
    (OUT / "table.md").write_text("\n".join(lines) + "\n")
    plt.close("all")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, one per core")
    parser.add_argument("--report", action="store_true", help="only write the table and the figures again")
    args = parser.parse_args()
    if not args.report:
        if not (OUT / "gradients.csv").exists():
            measure_gradients()
        for seed in (*range(5), *TUNING_SEEDS):
            begin(prepare("gamma 1", seed))  # what all begin with, before processes ask for it at once
        begin(prepare("6x6, gamma 1", 0))
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            for title, arms, seeds, tuned in QUESTIONS:
                print(title, flush=True)
                do([job for arm in arms for job in (grid(arm) if tuned else ())], pool)
                do([(arm, seed, *chosen(arm, tuned, read_runs()), BUDGET)
                    for seed, arm in itertools.product(range(seeds), arms)], pool)
                report()
    report()
    print((OUT / "table.md").read_text())


if __name__ == "__main__":
    main()
