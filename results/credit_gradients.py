"""The price of variance: gradients of the credit rules, on the same episodes, at policies held
fixed.

    python results/credit_gradients.py      some ten minutes on one core; resumable game by game

On each game a policy is trained by `whole episode`, on "coin lake" by `to go` as the other gets
nowhere there (rate 3e-3, entropy coefficient .05, lakes 1e-3 and .01; seed 9002). It is stopped
where a third, and where two thirds, of its training episodes succeed, so that it looks at the
state; after 400 iterations at the latest. There 60 batches are played, each as large as an
iteration, and the gradient of each rule is taken on each batch, without entropy bonus. The critic
sees 60 other batches first, and then learns no more.

Of the gradients g_i of one rule, with mean mu over all batches that could be played:

    noise       E|g - mu|^2 / |mu|^2     batches to average for a signal as large as the noise
    direction   cosine of mu and the mu of `to go`, which is the gradient of the expected return

|mu|^2 is estimated by the mean of g_i . g_j over i != j, which is not biased; mu_a . mu_b
likewise. +-: one standard error, by the jackknife over batches. Theory: `whole episode`, `to go`
and the critic have direction 1 but for chance and the critic's error; whole episode has the most
noise of the three. The discounted rules and GiGPO follow something else.
"""

import argparse
import csv

import numpy as np
import torch

import credit
import msgrpo

BATCHES = 60
LEVELS = (1 / 3, 2 / 3)  # of training success
LAST = 400  # iteration
SEED = 9002
PATH = credit.OUT / "gradients.csv"


def policies(game):
    """The run, with the policy as it is when its training success passes each of LEVELS."""
    pair = (3e-3, 0.05) if game in credit.KEY_GAMES else (1e-3, 0.01)
    arm = "to go" if game == "coin lake" else "whole episode"
    training = credit.Run(credit.Job(game, arm, SEED, *pair))
    recent = []
    levels = list(LEVELS)
    for iteration in range(1, LAST + 1):
        recent.append(training.iterate(iteration)["train_success"])
        if levels and np.mean(recent[-5:]) >= levels[0]:
            levels.pop(0)
            yield training, iteration, float(np.mean(recent[-5:]))
        if not levels:
            return


def play_batch(training, number):
    rng = credit.generator(SEED, number)
    starts = [training.task.draw(rng) for _ in range(training.task.groups)]
    groups, _ = training.play(starts, credit.GROUP_SIZE, (SEED, number))
    return groups


def gradient(training, groups, rule):
    """Of the rule's loss on these groups: (parameters,)."""
    rule(groups)
    episodes = [episode for group in groups for episode in group]
    msgrpo.accumulate_gradient(training.policy, episodes, budget=10**9)
    parts = [parameter.grad.flatten() for parameter in training.model.parameters()]
    flat = torch.cat(parts)
    training.optimizer.zero_grad()
    return flat


def trained_critic(training):
    critic = credit.Critic(credit.make_model(SEED + 1, credit.tokenizer()), 3e-3)
    for number in range(BATCHES):
        critic(play_batch(training, 10_000 + number))
    critic.passes = 0
    return critic


def cross(a, b):
    """a_i . b_j for all i, j: (batches, batches)."""
    return (a @ b.T).double().numpy()


def figures(own, others):
    """(noise, direction) of inner products g_i . g_j, each table (batches, batches).

    own: of a rule's gradients. others: of them with the reference's, and of the reference's.
    """
    with_reference, reference = others
    n = len(own)

    def apart(table):
        return (table.sum() - np.trace(table)) / (n * (n - 1))

    squared = apart(own)
    noise = (np.trace(own) / n - squared) / squared
    direction = apart(with_reference) / np.sqrt(abs(squared * apart(reference)))
    return np.array([noise, direction])


def jackknife(tables):
    """The figures, and their standard errors."""
    own, *others = tables
    n = len(own)
    left_out = []
    for i in range(n):
        kept = np.delete(np.arange(n), i)
        square = np.ix_(kept, kept)
        left_out.append(figures(own[square], [table[square] for table in others]))
    errors = np.std(left_out, axis=0) * (n - 1) ** 0.5
    return figures(own, others), errors


def measure(training):
    """{rule: (noise, direction, their errors)} at the run's policy."""
    rules = credit.RULES | {"critic": trained_critic(training)}
    gradients = {name: [] for name in rules}
    for number in range(BATCHES):
        groups = play_batch(training, 20_000 + number)
        for name, rule in rules.items():
            gradients[name].append(gradient(training, groups, rule))
    stacked = {name: torch.stack(rows) for name, rows in gradients.items()}
    reference = stacked["to go"]
    found = {}
    for name, own in stacked.items():
        tables = (cross(own, own), cross(own, reference), cross(reference, reference))
        values, errors = jackknife(tables)
        found[name] = (*values, *errors)
    return found


def main():
    credit.OUT.mkdir(exist_ok=True)
    done = set()
    if PATH.exists():
        with open(PATH, newline="") as file:
            done = {row["game"] for row in csv.DictReader(file)}
    header = (
        "game",
        "iteration",
        "success",
        "rule",
        "noise",
        "direction",
        "noise_se",
        "direction_se",
    )
    for game in (*credit.MAIN_GAMES, "lake", "slippery", "cost"):
        if game in done:
            continue
        rows = []
        for training, iteration, success in policies(game):
            for rule, values in measure(training).items():
                rounded = [f"{value:.4g}" for value in values]
                rows.append((game, iteration, f"{success:.3f}", rule, *rounded))
                print(*rows[-1], flush=True)
        with open(PATH, "a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not done:
                writer.writerow(header)
            writer.writerows(rows)
        done.add(game)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
