"""Is the whole episode's reward, paid to every step, good enough? Credit rules on games where it
matters.

    python results/credit.py                   all of it, some ten hours on one core
    python results/credit.py --processes 2     one run per core
    python results/credit.py --report          the table and the figures of what has been run, alone

Resumable: a finished run is a line of results/credit/runs.jsonl and is not repeated; a kill
loses the runs under way, no others. The games are in games.py, the statistics in
credit_report.py.

PROTOCOL, fixed before any run in results/credit. Known before it: a dozen trials of `whole
episode` on "key 10", "key 40" and "lake" with seed 9000, by which sizes, iterations and the grid
below were chosen (an advantage to that arm), and one short trial of `to go, .8`.

Policy. A transformer of two layers and width 64, made anew for each run, which starts uniform:
its head is zero. It may say the four words alone (the logits of other tokens are left out), one
token an answer. No warm-up, no replay, no exploration, none of train.py's other help.

Iteration. Key games: 8 starts, lakes: 16; 8 episodes of each. All are one update, made once: the
ratio is 1 and the clip never active, so arms differ in credit alone. AdamW, ramp of ten
iterations, then constant; gradient norm at most 1. Advantages are not divided by a std, but in
the arm that says so. Loss: msgrpo's. Every arm makes the same number of iterations
(games.TASKS), hence plays the same number of episodes; arms of a seed begin with the same
weights and the same starts.

Games. Main: "key 5", "key 10", "key 20", "key 40" and "coin lake". Others: "lake", "slippery",
"cost".

Arms.
    whole episode       A_i = R_i - mean R to every step: MS-GRPO
    to go               G_t = r_t + r_{t+1} + .., less the mean of G_t over the group's episodes
                        that have a step t
    to go, .95          the same, discounted: G_t = r_t + .95 G_{t+1}
    to go, .8           the same with .8
    faded advantage     .8^(T - 1 - t) A_i: this project's earlier ablation, of no objective
    GiGPO               A_i plus G_t (discounted by .95) less its mean over the group's visits to
                        that state
    critic              a learned V (a transformer as large as the policy), GAE with lambda .95,
                        gamma 1, less the mean of the iteration
    whole, with std     A_i divided by the group's std: the paper's normalisation
The draw, a question of its own, on "lake" with whole-episode credit: `all`, and at keep .5 and
.125 each `aaw`, `uniform`, `nonzero` (uniform among A != 0), `weighted` (each episode is drawn
independently with probability p_i = min(1, c |A_i|), sum p_i = K, and weighs 1 / p_i: AAW made
unbiased).
Free answers: one row, "key 10" with `whole episode` and `to go`: all tokens are allowed, the answer
is <action>word</action> of three tokens, after 100 steps of next-token prediction of random
answers.

Tuning. Each arm alike: learning rate 1e-3 or 3e-3, entropy coefficient .15, .05 or .01, on seeds
9000 and 9001; the best mean area is taken (where equal, the best final return). "key 5" has what
was best on "key 10", "slippery" and "cost" what was best on "lake", free answers what was best for
the arm on "key 10". Reported seeds: 500 to 509 in the main games, 500 to 504 elsewhere. They are
used for nothing else.

Amended. (1) Before any reported run: .15 was added to the grid, as .05 had been best for most arms
on "key 10". (2) After seeds 500 to 504 of the key games: "key 40" is tuned on itself. It had been
given what was best on "key 20"; there `to go` came out better than `whole episode`, with another
entropy coefficient, and on a tuning seed that difference went with the coefficient, not with the
arm. Runs with other settings than the tuned ones stay in runs.jsonl and out of the tables. (3)
Before any run on a lake: the draw arms are not tuned, but take what was best for `whole episode` on
"lake" (the arm `all`), which favours `all`. (4) After 36 tuning runs on "lake", those of `whole
episode` among them, for want of time: the draw went first, the critic and the std last.

Measures. Every ten iterations 100 held-out starts are played greedily: a share of successes (the
door opened with the key, or the goal reached). Main: `area`, the mean of that share over the run
(trapezes). Second: `final`, its mean over the last fifth. Third, for the key games: `return`,
the mean return over the last fifth. For the draw also the area over equally many *trained*
tokens, as many as the thriftiest arm has trained.

Verdicts. Each arm is compared with `whole episode`, seed by seed: t interval of the mean
difference, 95 %; p by the t test; Holm's correction over all comparisons of a measure in a
family (main games; other games; the draw, there against `all`; free answers). "better" or
"worse" where the corrected p is below .05, else "not distinguishable". Fewer than five common
seeds: no verdict.

Predicted. Whole episode is worse than `to go` on "coin lake" (it pays for luck). It is better
than `to go, .8` and `faded advantage` on "key 20" and "key 40" (their credit does not reach the
key), by success, though perhaps not by return. On "lake", where the reward comes at the end
alone, it differs little from `to go`. If whole episode is worse than `to go` in the key games
too, its simplicity has a price wherever rewards come on the way; if not, it is good enough
there.

Order: as ORDER below says, each part's tuning before its reported runs, those seed by seed. What
has not been run is named in the report.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

import model as lm
import msgrpo
from frozenlake import ACTIONS
from games import PIECES, TASKS, texts

OUT = Path(__file__).resolve().parent / "credit"
GROUP_SIZE = 8
EVALUATION = 100  # held-out episodes
EVERY = 10  # iterations between evaluations
TUNING_SEEDS = (9000, 9001)
GRID = tuple(product((1e-3, 3e-3), (0.15, 0.05, 0.01)))  # learning rate, entropy coefficient
KEY_GAMES = ("key 5", "key 10", "key 20", "key 40")
MAIN_GAMES = (*KEY_GAMES, "coin lake")
OTHER_GAMES = ("lake", "slippery", "cost")
TUNED_ON = {"key 5": "key 10", "slippery": "lake", "cost": "lake"}


def tokenizer():
    return lm.tiny_tokenizer(texts(), ["</action>"], PIECES)


def make_model(seed, words):
    config = lm.Config(
        "llama",
        words.size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        rope_theta=1e2,
    )
    torch.manual_seed(seed)
    model = lm.Transformer(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.2)
    torch.nn.init.zeros_(model.lm_head.weight)  # at first, every word is as likely as the others
    return model


def last_hidden(model, prompts):
    """Hidden states (rows, width) behind the last token of each prompt."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.tensor(lm.pad(prompts, 0))
    positions = torch.arange(ids.shape[1])[None]
    x = model.hidden(ids, positions)
    return x[torch.arange(len(prompts)), lengths - 1]


def rows_of(prompts):
    """(distinct prompts, the row of each prompt among them)."""
    distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    return list(distinct), [distinct[prompt] for prompt in prompts]


class WordPolicy:
    """A policy (msgrpo.Policy) that may say the game's four words alone: one token an answer.

    The logits of all other tokens are left out. The instructions too: they are the same always. A
    state is run once until `refresh`, however many episodes come to it.
    """

    max_new_tokens = 1

    def __init__(self, model, tokenizer):
        self.model = model
        self.words = [tokenizer.encode(f" {word}")[0] for word in ACTIONS]
        self.texts = [f"<action>{word}</action>" for word in ACTIONS]
        self.encode = lru_cache(65536)(lambda text: tuple(tokenizer.encode(text)))
        self.refresh()

    def refresh(self):
        """Call it when the weights have changed."""
        self.known = {}  # state: (cumulative probabilities, the four answers)

    def table(self, prompts):
        """Log-probabilities of the four words (rows, 4)."""
        logits = self.model.head(last_hidden(self.model, prompts))
        return logits[:, self.words].log_softmax(-1)

    @torch.no_grad()
    def look(self, states):
        """Run the states that are not known yet."""
        new = [state for state in dict.fromkeys(states) if state not in self.known]
        if not new:
            return
        prompts = [self.encode(state) for state in new]
        table = self.table(prompts)
        cumulative = table.double().exp().cumsum(-1).tolist()
        for state, prompt, logprobs, bounds in zip(new, prompts, table.tolist(), cumulative):
            self.known[state] = (bounds, self.answers(prompt, logprobs))

    def answers(self, prompt, logprobs):
        parts = zip(self.words, logprobs, self.texts)
        return [msgrpo.Answer(prompt, (word,), [logprob], text) for word, logprob, text in parts]

    def act(self, observations, uniforms):
        self.look(observations)
        chosen = []
        for i, state in enumerate(observations):
            bounds, answers = self.known[state]
            if uniforms is None:
                action = max(range(4), key=lambda word: answers[word].logprobs[0])
            else:
                action = bisect_right(bounds, uniforms[i, 0] * bounds[3], hi=3)
            chosen.append(answers[action])
        return chosen

    def score(self, answers):
        prompts, rows = rows_of([answer.prompt for answer in answers])
        actions = [self.words.index(answer.response[0]) for answer in answers]
        table = self.table(prompts)
        entropies = -(table.exp() * table).sum(-1)
        return table[rows, actions], entropies[rows]


# The credit rules. Each takes the groups of an iteration, which are lists of episodes, and sets the
# credit of every step.


def rewards_to_go(episode, gamma):
    """G_t = r_t + gamma G_{t+1}, for each step t."""
    later = [0.0] * len(episode)
    total = 0.0
    for t in reversed(range(len(episode))):
        total = episode[t].reward + gamma * total
        later[t] = total
    return later


def whole_episode(groups, normalize_std=False, fade=1.0):
    """MS-GRPO: A_i = R_i - mean R to every step. fade < 1: fade^(T - 1 - t) A_i."""
    for group in groups:
        returns = msgrpo.episode_returns(group)[None]
        advantages = msgrpo.episode_advantages(returns, normalize_std)[0]
        msgrpo.assign_credit(group, advantages, fade)


def reward_to_go(groups, gamma):
    """G_t less the mean of G_t over the episodes of the group that have a step t."""
    for group in groups:
        later = [rewards_to_go(episode, gamma) for episode in group]
        for t in range(max(len(episode) for episode in group)):
            alive = [i for i in range(len(group)) if t < len(group[i])]
            mean = sum(later[i][t] for i in alive) / len(alive)
            for i in alive:
                group[i][t].credit = later[i][t] - mean


def gigpo(groups, gamma=0.95, weight=1.0):
    """A_i + weight (G_t - mean of G_t over all visits of the group to the same state)."""
    whole_episode(groups)
    for group in groups:
        visits = defaultdict(list)
        for episode in group:
            for step, later in zip(episode, rewards_to_go(episode, gamma)):
                visits[step.answer.prompt].append((step, later))
        for pairs in visits.values():
            mean = sum(later for _, later in pairs) / len(pairs)
            for step, later in pairs:
                step.credit += weight * (later - mean)


class Critic:
    """A learned critic: V is a transformer of its own with a head of one number; GAE, gamma 1.

        delta_t = r_t + V(s_{t+1}) - V(s_t),   A_t = delta_t + lambda A_{t+1}

    V learns A_t + V(s_t) by least squares; equal states count once, with the mean of their targets.
    """

    def __init__(self, model, rate, lambda_=0.95, passes=2):
        self.model = model
        self.value_head = torch.nn.Linear(model.config.hidden_size, 1)
        torch.nn.init.zeros_(self.value_head.weight)
        parameters = [*model.parameters(), *self.value_head.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.99), fused=True)
        self.lambda_ = lambda_
        self.passes = passes

    def values(self, prompts):
        return self.value_head(last_hidden(self.model, prompts))[:, 0]

    def __call__(self, groups):
        episodes = [episode for group in groups for episode in group]
        prompts, rows = rows_of([step.answer.prompt for episode in episodes for step in episode])
        with torch.no_grad():
            values = self.values(prompts)
        own_values = values[rows].tolist()  # of each step
        advantages = []
        for episode in episodes:
            start = len(advantages)
            advantages += self.gae(episode, own_values[start : start + len(episode)])
        center = sum(advantages) / len(advantages)
        steps = [step for episode in episodes for step in episode]
        for step, advantage in zip(steps, advantages):
            step.credit = advantage - center
        rows = torch.tensor(rows)
        sums = torch.zeros(len(prompts)).index_add(0, rows, torch.tensor(advantages))
        counts = torch.bincount(rows)
        self.fit(prompts, values + sums / counts, counts / len(rows))

    def gae(self, episode, values):
        """A_t of each step, from the last to the first."""
        advantages = [0.0] * len(episode)
        advantage = 0.0
        following = 0.0  # V behind the last step
        for t in reversed(range(len(episode))):
            delta = episode[t].reward + following - values[t]
            advantage = delta + self.lambda_ * advantage
            advantages[t] = advantage
            following = values[t]
        return advantages

    def fit(self, prompts, targets, weights):
        for _ in range(self.passes):
            loss = (weights * (self.values(prompts) - targets) ** 2).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


RULES = {
    "whole episode": whole_episode,
    "to go": partial(reward_to_go, gamma=1.0),
    "to go, .95": partial(reward_to_go, gamma=0.95),
    "to go, .8": partial(reward_to_go, gamma=0.8),
    "faded advantage": partial(whole_episode, fade=0.8),
    "GiGPO": gigpo,
    "critic": None,  # has weights: made for each run
    "whole, with std": partial(whole_episode, normalize_std=True),
}
ARMS = tuple(RULES)


# The draw: which episodes are trained on. A draw arm's name is a rule and a share, as "aaw .125".


def draw(advantages, arm, rng):
    """Indices of the drawn episodes, and the weight of each. advantages (episodes,)."""
    if arm == "all":
        drawn = list(range(len(advantages)))
        return drawn, [1.0] * len(drawn)
    rule, keep = arm.split()
    count = round(float(keep) * len(advantages))
    if rule == "weighted":
        return draw_weighted(advantages, count, rng)
    if rule == "nonzero":
        candidates = np.flatnonzero(advantages.numpy())
        drawn = rng.permutation(candidates)[:count].tolist()
    else:
        drawn = msgrpo.draw_episodes(advantages, rule, count, rng)
    return drawn, [1.0] * len(drawn)


def draw_weighted(advantages, count, rng):
    """Independent draws with p_i = min(1, c |A_i|), sum p_i = count; weights 1 / p_i, of mean 1.

    Where no more than `count` episodes have A != 0, all of those are drawn.
    """
    sizes = advantages.abs().double().numpy()
    low = 0.0
    high = count / max(1e-12, sizes[sizes > 0].min(initial=1.0))
    for _ in range(60):  # bisection for c
        middle = (low + high) / 2
        if np.minimum(1, middle * sizes).sum() < count:
            low = middle
        else:
            high = middle
    chances = np.minimum(1, high * sizes)
    drawn = np.flatnonzero(rng.random(len(sizes)) < chances)
    share = count / len(sizes)
    return drawn.tolist(), (share / chances[drawn]).tolist()


DRAWS = ("all",) + tuple(
    f"{rule} {keep}"
    for keep in (".5", ".125")
    for rule in ("aaw", "uniform", "nonzero", "weighted")
)


# A run.


class FreePolicy(lm.LanguageAgent):
    """All tokens are allowed. A warm-up teaches it to say `<action>word</action>`, three tokens."""

    def __init__(self, model, tokenizer):
        super().__init__(model, tokenizer, "Answer.", max_new_tokens=3)

    def refresh(self):
        """Unlike WordPolicy, it keeps nothing."""


def warm_up(policy, optimizer, task, seed):
    """Next-token prediction of uniformly random answers, so that the answers are well formed."""
    for i in range(100):
        rng = generator(seed, 0, i)
        answers = []
        for _ in range(64):
            game = task.make(task.draw(rng), rng)
            action = rng.integers(4)
            response = policy.tokenizer.encode(f"<action>{ACTIONS[action]}</action>")
            for _ in range(rng.integers(10)):
                game.step(f"<action>{ACTIONS[rng.integers(4)]}</action>")
            answers.append(msgrpo.Answer(policy.encode(game.observation()), tuple(response)))
        logprobs, _ = policy.score(answers)
        (-logprobs.mean()).backward()
        update(policy.model, optimizer, 3e-3 * min(1, (i + 1) / 10))


def generator(*key):
    """The numpy Generator of some integers. Their number counts: numpy takes (1,) for (1, 0)."""
    return np.random.default_rng([len(key), *key])


@dataclass(frozen=True)
class Job:
    """What a run is, and its identity in runs.jsonl."""

    game: str
    arm: str
    seed: int
    learning_rate: float
    entropy_coef: float


def update(model, optimizer, rate):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


class Run:
    """A training run of one job."""

    def __init__(self, job):
        torch.set_num_threads(1)
        self.job = job
        self.task = TASKS[job.game]
        words = tokenizer()
        self.model = make_model(job.seed, words)
        arm = job.arm.removeprefix("free, ")
        self.policy = WordPolicy(self.model, words)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.99), fused=True)
        if arm != job.arm:
            self.policy = FreePolicy(self.model, words)
            warm_up(self.policy, self.optimizer, self.task, job.seed)
        self.rule = RULES.get(arm, whole_episode)
        if arm == "critic":
            self.rule = Critic(make_model(job.seed + 1, words), job.learning_rate)
        self.draw = arm if arm in DRAWS else "all"
        self.trained_tokens = 0

    def play(self, starts, size, key, greedy=False):
        """Groups of `size` episodes, one of each start: (groups, success (groups, size))."""
        games = [
            self.task.make(start, generator(*key, group, i))
            for group, start in enumerate(starts)
            for i in range(size)
        ]
        if self.task.foreseen and isinstance(self.policy, WordPolicy):
            self.policy.look([text for game in games[::size] for text in game.observations()])
        episodes = msgrpo.play(self.policy, games, greedy)
        groups = [episodes[i : i + size] for i in range(0, len(episodes), size)]
        success = np.array([game.success for game in games], float)
        return groups, success.reshape(-1, size)

    def evaluate(self):
        """Greedy success and return on held-out starts, the same for all runs."""
        rng = generator(1)
        starts = [self.task.draw(rng, held_out=True) for _ in range(EVALUATION)]
        groups, success = self.play(starts, 1, (2,), greedy=True)
        returns = [sum(step.reward for step in episode) for (episode,) in groups]
        return {"success": float(success.mean()), "return": float(np.mean(returns))}

    def iterate(self, iteration):
        """Play, assign credit, draw, learn: the metrics of the iteration."""
        rng = generator(self.job.seed, iteration)
        starts = [self.task.draw(rng) for _ in range(self.task.groups)]
        groups, success = self.play(starts, GROUP_SIZE, (self.job.seed, iteration))
        self.rule(groups)
        episodes = [episode for group in groups for episode in group]
        trained = self.select(groups, episodes, rng)
        metrics = {"train_success": float(success.mean()), "entropy": 0.0}
        if trained:
            coefficient = self.job.entropy_coef
            statistics = msgrpo.accumulate_gradient(
                self.policy, trained, entropy_coef=coefficient, budget=10**9
            )
            update(self.model, self.optimizer, self.job.learning_rate * min(1, iteration / 10))
            self.policy.refresh()
            self.trained_tokens += statistics["tokens"]
            metrics["entropy"] = statistics["entropy"]
        return metrics

    def select(self, groups, episodes, rng):
        """The episodes that are trained on, with the weights of the draw in their credit."""
        if self.draw == "all":
            return episodes
        returns = msgrpo.episode_returns(episodes).view(len(groups), -1)
        advantages = msgrpo.episode_advantages(returns, False).flatten()
        drawn, weights = draw(advantages, self.draw, rng)
        for i, weight in zip(drawn, weights):
            for step in episodes[i]:
                step.credit *= weight
        return [episodes[i] for i in drawn]


def run(job):
    """One run: its line of runs.jsonl."""
    began = time.perf_counter()
    training = Run(job)
    points = []
    recent = []
    for iteration in range(training.task.iterations + 1):
        if iteration:
            recent.append(training.iterate(iteration))
        if iteration % EVERY == 0:
            point = {"iteration": iteration, "trained_tokens": training.trained_tokens}
            point |= training.evaluate()
            for key in ("train_success", "entropy"):
                point[key] = float(np.mean([metrics[key] for metrics in recent] or [0.0]))
            points.append({key: round(value, 4) for key, value in point.items()})
            recent = []
    curves = {key: [point[key] for point in points] for key in points[0]}
    return vars(job) | {"seconds": round(time.perf_counter() - began, 1), "curves": curves}


# Below: which runs there are, and doing them.


FREE = ("free, whole episode", "free, to go")
FIRST = range(500, 505)
ORDER = (  # (games, arms, seeds): what is done first to last
    (KEY_GAMES, ARMS[:6], range(500, 510)),
    (("coin lake",), ARMS[:6], range(500, 510)),
    (("lake",), DRAWS, FIRST),
    (("lake",), ARMS[:6], FIRST),
    (("key 10",), FREE, FIRST),
    (("slippery",), ARMS[:6], FIRST),
    (MAIN_GAMES, ARMS[6:], range(500, 510)),
    (("lake", "slippery"), ARMS[6:], FIRST),
    (("cost",), ARMS, FIRST),
)


def read_runs():
    """{job: its line of runs.jsonl}."""
    path = OUT / "runs.jsonl"
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {Job(*(row[key] for key in Job.__dataclass_fields__)): row for row in rows}


def area(row):
    """Mean success over the run, by trapezes."""
    success = np.array(row["curves"]["success"])
    return float((success[1:] + success[:-1]).mean() / 2)


def final(row, key="success"):
    """Mean over the last fifth of the run."""
    values = row["curves"][key]
    return float(np.mean(values[-(len(values) // 5) :]))


def tuning_jobs(games, arms):
    games = dict.fromkeys(TUNED_ON.get(game, game) for game in games)
    arms = [arm for arm in arms if arm in RULES]
    return [Job(*parts, *pair) for parts in product(games, arms, TUNING_SEEDS) for pair in GRID]


def tuned(runs, game, arm):
    """The pair of the grid with the best mean area on the tuning seeds, or, where equal, return.

    Raises KeyError where a tuning run is missing.
    """
    game = TUNED_ON.get(game, game)
    arm = "whole episode" if arm in DRAWS else arm.removeprefix("free, ")

    def quality(pair):
        rows = [runs[Job(game, arm, seed, *pair)] for seed in TUNING_SEEDS]
        returns = [final(row, "return") for row in rows]
        return np.mean([area(row) for row in rows]), np.mean(returns)

    return max(GRID, key=quality)


def reported_jobs(runs, games, arms, seeds):
    """Seed by seed. Raises KeyError where the tuning is not done."""
    parts = product(seeds, games, arms)
    return [Job(game, arm, seed, *tuned(runs, game, arm)) for seed, game, arm in parts]


def do(jobs, processes):
    """Run those of the jobs that runs.jsonl lacks, and write each as it ends."""
    done = read_runs()
    todo = [job for job in jobs if job not in done]
    OUT.mkdir(exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for i, row in enumerate(pool.imap_unordered(run, todo)):
            with open(OUT / "runs.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            last = row["curves"]["success"][-1]
            name = f"{row['game']:10s} {row['arm']:18s} seed {row['seed']}"
            rates = f"{row['learning_rate']} {row['entropy_coef']}"
            print(
                f"{i + 1}/{len(todo)} {name} {rates} area {area(row):.3f} last {last:.2f}"
                f" {row['seconds']:.0f} s",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="runs side by side")
    parser.add_argument("--report", action="store_true", help="table and figures alone")
    options = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:  # before hours of work, not after
        parser.error("the report needs matplotlib: pip install matplotlib")
    if not options.report:
        for games, arms, seeds in ORDER:
            do(tuning_jobs(games, arms), options.processes)
            do(reported_jobs(read_runs(), games, arms, seeds), options.processes)
    import credit_report  # needs matplotlib

    credit_report.write()


if __name__ == "__main__":
    main()
