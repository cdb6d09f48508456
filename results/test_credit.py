"""The credit rules against numbers made by hand. Run it by: pytest results"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import credit
import credit_report
import games
import msgrpo
import numpy as np
import pytest
import torch
from frozenlake import ACTIONS


def episode(*rewards, states=None):
    """An episode with these rewards, whose states are these numbers."""
    states = states or range(len(rewards))
    return [
        msgrpo.Step(msgrpo.Answer((state,), (0,)), reward) for state, reward in zip(states, rewards)
    ]


def credits(rule, *group):
    rule([list(group)])
    return [[step.credit for step in episode] for episode in group]


def test_whole_episode_and_fade():
    assert credits(credit.whole_episode, episode(1, 2), episode(1, 0)) == [[1, 1], [-1, -1]]
    faded = credits(credit.RULES["faded advantage"], episode(1, 2), episode(1, 0))
    assert np.allclose(faded, [[0.8, 1], [-0.8, -1]])


def test_reward_to_go():
    undiscounted = credits(credit.RULES["to go"], episode(1, 2), episode(3, 0))
    assert undiscounted == [[0, 1], [0, -1]]
    half = credits(lambda groups: credit.reward_to_go(groups, 0.5), episode(1, 2), episode(3, 0))
    assert half == [[-0.5, 1], [0.5, -1]]
    alone = credits(credit.RULES["to go"], episode(0, 4), episode(2))
    assert alone == [[1, 0], [-1]]  # nobody is left to compare the last step with


def test_reward_at_the_end_makes_whole_episode_and_reward_to_go_equal():
    rewards = ((0, 0, 1), (0, 0, 0), (0, 0, 1), (0, 0, 3))
    whole = credits(credit.whole_episode, *(episode(*r) for r in rewards))
    to_go = credits(credit.RULES["to go"], *(episode(*r) for r in rewards))
    assert np.allclose(whole, to_go)


def test_gigpo():
    # Returns 1 and 0: A = .5, -.5. State 7 is visited three times, with G = .95, 1 and 0.
    got = credits(credit.gigpo, episode(0, 1, states=(7, 7)), episode(0, states=(7,)))
    mean = (0.95 + 1 + 0) / 3
    assert np.allclose(np.concatenate(got), [0.5 + 0.95 - mean, 0.5 + 1 - mean, -0.5 - mean])


def test_critic_gae():
    critic = credit.Critic(credit.make_model(0, credit.tokenizer()), 1e-3, passes=0)
    critic.values = lambda prompts: torch.tensor([{0: 0.25, 1: 0.5}[p[0]] for p in prompts])
    got = credits(critic, episode(0, 1))
    last = 1 - 0.5
    first = 0.5 - 0.25 + 0.95 * last
    center = (first + last) / 2
    assert np.allclose(got, [[first - center, last - center]])


def test_faded_advantage_raises_the_worst_action():
    """A first step with three actions of chances .4, .4 and .2, and what follows each of them.

    Best: 1 after nine steps. Middling: .5 at once. Worst: nothing, after 21 steps. The softmax
    gradient raises an action whose credit is above the mean credit. Fading leaves little of what is
    far from the end: the middling action, a little below the mean return, looks worse than the
    worst one.
    """
    best = [episode(*[0] * 8, 1) for _ in range(4)]
    middling = [episode(0.5) for _ in range(4)]
    worst = [episode(*[0] * 21) for _ in range(2)]

    def raised(arm):
        first = np.array([c[0] for c in credits(credit.RULES[arm], *best, *middling, *worst)])
        return (first - first.mean())[[0, 4, 8]] > 0

    assert raised("whole episode").tolist() == [True, False, False]
    assert raised("to go").tolist() == [True, False, False]
    assert raised("faded advantage").tolist() == [True, False, True]


def test_draws():
    rng = np.random.default_rng(0)
    advantages = torch.tensor([0.5, -0.5, 0.0, 1.0, -1.0, 0.0, 0.25, -0.25])
    for arm in credit.DRAWS:
        drawn, weights = credit.draw(advantages, arm, rng)
        assert len(drawn) == len(weights)
        if arm.startswith(("aaw", "nonzero", "weighted")):
            assert (advantages[drawn] != 0).all()
    total = np.zeros(8)
    for _ in range(4000):
        drawn, weights = credit.draw(advantages, "weighted .25", rng)
        total[drawn] += weights
    # Unbiased but for the factor K / N: an episode's mean weight is the same for all with A != 0
    assert np.allclose(total[advantages.numpy() != 0] / 4000, 0.25, atol=0.03)


def test_key_and_door():
    layout = ([1, 2, 3], 0, 2)
    game = games.KeyAndDoor(layout, np.random.default_rng(0))
    seen = [game.observation()]
    for action in (0, 2, 3, 2):
        reward, done, valid = game.step(f"<action>{ACTIONS[action]}</action>")
        seen.append(game.observation() if not done else "")
    assert seen[0] == "room 1: no key; key left, coin down"
    assert seen[3] == "room 4: a key; door right"
    assert (reward, done, valid, game.success) == (1.0, True, True, True)
    assert set(seen[:-1]) <= set(game.observations())


def test_held_out_lakes():
    rng = np.random.default_rng(0)
    training = {tuple(games.draw_lake(rng)) for _ in range(200)}
    held_out = {tuple(games.draw_lake(rng, held_out=True)) for _ in range(200)}
    assert not training & held_out


def test_policy_scores_what_it_sampled_and_looks_once():
    policy = credit.WordPolicy(credit.make_model(0, credit.tokenizer()), credit.tokenizer())
    torch.nn.init.normal_(policy.model.lm_head.weight, std=0.3)
    states = ["room 1: no key; key left, coin down", "room 2: a key; coin up"] * 3
    answers = policy.act(states, np.random.default_rng(0).random((6, 1)))
    logprobs, entropies = policy.score(answers)
    assert torch.allclose(logprobs, torch.tensor([a.logprobs[0] for a in answers]), atol=1e-5)
    many = policy.act(states[:1] * 4000, np.random.default_rng(1).random((4000, 1)))
    for answer in policy.known[states[0]][1]:
        share = np.mean([other.response == answer.response for other in many])
        assert share == pytest.approx(np.exp(answer.logprobs[0]), abs=0.03)


@pytest.mark.parametrize("arm", credit.ARMS + credit.DRAWS[:2] + credit.FREE)
def test_every_arm_runs(arm, monkeypatch):
    task = games.key_and_door(3)
    short = replace(task, iterations=10)
    monkeypatch.setitem(games.TASKS, "key 5", short)
    row = credit.run(credit.Job("key 5", arm, 9000, 1e-3, 0.01))
    assert len(row["curves"]["success"]) == 2


def test_statistics():
    for freedom, t in credit_report.T_QUANTILES.items():
        values = np.array([-1.0, 1.0] * 5)[: freedom + 1]
        values = values - values.mean()
        values += t * values.std(ddof=1) / (freedom + 1) ** 0.5
        assert credit_report.p_value(values) == pytest.approx(0.05, abs=2e-3)
        mean, half = credit_report.interval(values)
        assert half == pytest.approx(mean)
    assert np.allclose(credit_report.holm([0.01, 0.04, 0.03], 3), [0.03, 0.06, 0.06])
