"""All tests, from the method outwards: arithmetic, the game, rollouts, the loss, the model, files of others,
the command line, resuming, learning.

What can be computed in a second, slower way is compared with that; what only transformers knows lies in
testdata/ (made by testdata/golden.py). Runs of train.py are calls of train.main in this process.
"""

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import frozenlake
import model as lm
import msgrpo
import train
from frozenlake import ACTIONS, SCENARIOS, FrozenLake

torch.set_num_threads(1)
DATA = Path(__file__).parent / "testdata"


MAPS = {
    "4x4": "SFFF FHFH FFFH HFFG".split(),  # Gymnasium's two fixed maps
    "8x8": "SFFFFFFF FFFFFFFF FFFHFFFF FFFFFHFF FFFHFFFF FHHFFFHF FHFFHFHF FFFHFFFG".split(),
}


# The method: advantages, credit, the draw


@pytest.mark.parametrize(
    "returns, normalize, expected",
    [
        ([[0, 0, 0, 1]], False, [[-0.25, -0.25, -0.25, 0.75]]),
        (
            [[0, 0, 0, 1]],
            True,
            [[-0.57735, -0.57735, -0.57735, 1.73205]],
        ),  # population std: sqrt(3) / 4
        (
            [[1, 2], [30, 10]],
            False,
            [[-0.5, 0.5], [10, -10]],
        ),  # each group by itself, in its own order
        ([[1, 2], [30, 10], [5, 5]], True, [[-1, 1], [1, -1], [0, 0]]),
    ],
)
def test_advantages_by_hand(returns, normalize, expected):
    got = msgrpo.episode_advantages(torch.tensor(returns, dtype=torch.float32), normalize)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=0)


def test_group_without_variance_has_exactly_no_advantage():
    for value, size, std in itertools.product(
        (0, 1, 0.1, 1 / 3, -0.7, 1e6 + 0.1), range(2, 18), (True, False)
    ):
        assert not msgrpo.episode_advantages(torch.full((3, size), value), std).any()


def test_number_of_steps_does_not_change_credit():
    steps = [msgrpo.Step((1,), (2,)) for _ in range(4)]
    four, three = steps[:4], [dataclasses.replace(step) for step in steps[:3]]
    for kwargs, expected in (
        ({}, ([8] * 4, [2] * 3)),
        ({"gamma": 0.5}, ([1, 2, 4, 8], [0.5, 1, 2])),
        ({"gamma": 0.0}, ([0, 0, 0, 8], [0, 0, 2])),
    ):
        msgrpo.assign_credit([four, three], torch.tensor([8.0, 2.0]), **kwargs)
        assert tuple([step.credit for step in episode] for episode in (four, three)) == expected


def test_aaw_probabilities():
    assert msgrpo.aaw_probabilities(torch.tensor([1.0, -2, 0, 1])).tolist() == [0.25, 0.5, 0, 0.25]
    with pytest.raises(ValueError):
        msgrpo.aaw_probabilities(torch.zeros(4))
    rng = random.Random(0)
    for std, size in itertools.product(
        (True, False), range(2, 20)
    ):  # successes and failures get 1/2 each
        won = rng.randrange(1, size)
        returns = torch.tensor([rng.sample([1.0] * won + [0.0] * (size - won), size)])
        p = msgrpo.aaw_probabilities(msgrpo.episode_advantages(returns, std)[0])
        assert (p.sum().item(), p[returns[0] == 1].sum().item()) == pytest.approx((1, 0.5))


def near(count, n, p):
    """Is a count that of n draws of probability p, within four standard deviations?"""
    return abs(count - n * p) <= 4 * (n * p * (1 - p)) ** 0.5


def test_draws():
    advantages, rng = torch.tensor([0, 1, -2, 0, 0.5, -0.5]), np.random.default_rng(0)
    for sampling, count, p in (
        ("aaw", 1, (advantages.abs() / 4).tolist()),
        ("uniform", 3, [0.5] * 6),
    ):
        draws = [msgrpo.draw_episodes(advantages, sampling, count, rng) for _ in range(3000)]
        counts = Counter(sum(draws, []))
        assert all(near(counts[i], 3000, p[i]) for i in range(6))  # none where p is 0
    for count in (3, 6):  # never more than there are with an advantage
        draws = [msgrpo.draw_episodes(advantages, "aaw", count, rng) for _ in range(200)]
        assert {*sum(draws, [])} == {1, 2, 4, 5} and {*map(len, draws)} == {min(count, 4)}
        assert all(draw == sorted({*draw}) for draw in draws)
    assert msgrpo.draw_episodes(advantages, "all", 3, rng) == list(range(6))
    assert msgrpo.draw_episodes(torch.zeros(6), "aaw", 3, rng) == []


# The game


@pytest.mark.parametrize(
    "name, rate, steps, optimal, uniform",
    [
        ("4x4", 1 / 3, 100, 0.7442, 0.0139),
        ("4x4", 0.8, 100, 0.8940, 0.0139),
        ("8x8", 1 / 3, 200, 0.9132, 0.0019),
    ],
)
def test_success_bounds_are_the_known_ones(name, rate, steps, optimal, uniform):
    got = FrozenLake(MAPS[name], rate, steps).success_bounds()
    assert got == pytest.approx((optimal, uniform), abs=5e-5)


@pytest.mark.parametrize(
    "rate, state, action, expected",
    [  # Gymnasium's P[state][action] on the 4x4 map
        (1, 0, 0, [(1, 0, 0, False)]),
        (1, 0, 1, [(1, 4, 0, False)]),
        (1, 4, 2, [(1, 5, 0, True)]),
        (1, 14, 2, [(1, 15, 1, True)]),
        (1, 15, 0, [(1, 15, 0, True)]),
        (1, 3, 2, [(1, 3, 0, False)]),
        (1 / 3, 0, 0, [(1 / 3, 0, 0, False), (1 / 3, 0, 0, False), (1 / 3, 4, 0, False)]),
        (1 / 3, 14, 2, [(1 / 3, 14, 0, False), (1 / 3, 15, 1, True), (1 / 3, 10, 0, False)]),
        (0.8, 6, 3, [(0.1, 7, 0, True), (0.8, 2, 0, False), (0.1, 5, 0, True)]),
        (0.8, 13, 0, [(0.1, 9, 0, False), (0.8, 12, 0, True), (0.1, 13, 0, False)]),
        (1 / 3, 12, 1, [(1, 12, 0, True)]),
    ],
)
def test_transitions_are_gymnasiums(rate, state, action, expected):
    got = FrozenLake(MAPS["4x4"], rate).transitions(state, action)
    assert [outcome[1:] for outcome in got] == [outcome[1:] for outcome in expected]
    assert [p for p, *_ in got] == pytest.approx([p for p, *_ in expected])


def test_slips_have_their_frequencies_and_take_one_draw():
    counts, rng = Counter(), np.random.default_rng(0)
    for _ in range(3000):
        lake = FrozenLake(MAPS["4x4"], 0.8, 8, rng)
        lake.state = 6
        lake.step("<action>up</action>")
        counts[lake.state] += 1
    assert all(near(counts[state], 3000, p) for state, p in ((2, 0.8), (5, 0.1), (7, 0.1)))
    for text, draws in (("<action>left</action>", 1), ("up", 0)):
        rng, twin = np.random.default_rng(1), np.random.default_rng(1)
        lake = FrozenLake(MAPS["4x4"], 0.8, 8, rng)
        lake.step(text)
        twin.random(draws)
        assert rng.random() == twin.random()


def test_episodes_and_their_rewards():
    lake = FrozenLake(["SF", "HG"], max_steps=4, invalid_penalty=0.5)
    assert lake.step("left") == (-0.5, False, False) and lake.state == 0
    assert lake.step("<action>right</action>") == (0, False, True) and not lake.success
    assert lake.step("<action>down</action>") == (1, True, True) and lake.success
    lake = FrozenLake(["SF", "HG"], max_steps=2)
    assert lake.step("<action>left</action>") == (0, False, True)
    assert lake.step("nonsense") == (0, True, False)  # the horizon
    lake = FrozenLake(["SF", "HG"])
    assert lake.step("<action>down</action>") == (0, True, True) and not lake.success


@pytest.mark.parametrize(
    "text, action",
    [
        *((f"<action>{word}</action>", i) for i, word in enumerate(ACTIONS)),
        ("<action> \nUP\t</action>", 3),
        ("<think>left? <action>left</action></think><action>down</action> done", 1),
        ("up", None),
        ("", None),
        ("<action>right, then up</action>", None),
        ("<action>upward</action>", None),
        ("<action></action>", None),
        ("<action>up", None),
        ("up</action>", None),
        ("</action>up<action>", None),
        ("<action>3</action>", None),
        ("<action>up</action><action>", None),
        ("<action>left</action><action>nowhere</action>", None),
    ],
)
def test_parser(text, action):
    assert frozenlake.parse_action(text) == action


def test_random_text_never_raises():
    rng = random.Random(0)
    parts = [
        "<action>",
        "</action>",
        "up",
        "left",
        " ",
        "\n",
        "<",
        "\0",
        "\ud800",
        "é",
        "İ",
        "日",
        "9" * 99,
    ]
    for _ in range(2000):
        text = "".join(rng.choices(parts, k=rng.randrange(7)))
        assert FrozenLake(["SF", "FG"]).step(text)[2] == (frozenlake.parse_action(text) in range(4))


@pytest.mark.parametrize("name", SCENARIOS)
def test_texts_say_what_is_so(name):
    s, rng = SCENARIOS[name], np.random.default_rng(0)
    for _ in range(5):
        desc = frozenlake.draw_map(s, rng)
        lake = FrozenLake(desc, s.success_rate, s.max_steps, coordinates=True)
        text = lake.instructions
        assert f"{s.size} rows and {s.size} columns" in text and f"{s.max_steps} steps" in text
        assert ("not slippery" in text) == (s.success_rate == 1) == ("0.33" not in text)
        assert "<action>" in text and all(word in text for word in ACTIONS)
        assert "<think>" in FrozenLake(desc, think=True).instructions and "<think>" not in text
        for lake.state in range(s.size**2):  # there and back: the text tells the whole state
            where, grid = lake.observation().split("\n", 1)
            cells, tiles = grid.split(), lake.tiles.replace("S", "F")
            assert cells.index("P") == lake.state and {*map(len, grid.split("\n"))} == {
                2 * s.size - 1
            }
            letter = {"_": "F", "O": "H", "G": "G", "P": tiles[lake.state]}
            assert "".join(letter[cell] for cell in cells) == tiles
            named = [
                (int(r) - 1) * s.size + int(c) - 1
                for r, c in re.findall(r"\((\d+), (\d+)\)", where)
            ]
            assert sorted(named) == [i for i, cell in enumerate(cells) if cell != "_"]
        lake.coordinates = False
        assert lake.observation() == grid


def test_held_out_maps():
    mass, count, rng = Counter(), Counter(), np.random.default_rng(0)
    for inner in itertools.product("FH", repeat=14):
        tiles = "S" + "".join(inner) + "G"
        desc = [tiles[i : i + 4] for i in range(0, 16, 4)]
        if frozenlake.solvable(desc):
            held = frozenlake.is_held_out(desc)
            count[held] += 1
            mass[held] += 0.8 ** inner.count("F") * 0.2 ** inner.count("H")
    assert count == {True: 503, False: 3828 - 503}
    assert mass[True] / mass.total() == pytest.approx(0.124, abs=5e-4)
    maps, weights = frozenlake.held_out_maps(SCENARIOS["noslip"])
    assert len({tuple(desc) for desc in maps if frozenlake.is_held_out(desc)}) == len(maps) == 503
    holes = ["".join(desc).count("H") for desc in maps]
    assert weights.sum() == pytest.approx(1)
    assert weights / weights[0] == pytest.approx([0.25 ** (n - holes[0]) for n in holes])
    for held in (True, False):
        draws = [frozenlake.draw_map(SCENARIOS["big"], rng, held) for _ in range(20)]
        assert {*map(frozenlake.is_held_out, draws)} == {held}
    draws = [frozenlake.random_map(4, 0.8, rng) for _ in range(2000)]
    assert near(sum(map(frozenlake.is_held_out, draws)), 2000, 0.124) and all(
        map(frozenlake.solvable, draws)
    )


@pytest.mark.parametrize(
    "make",
    [
        *(
            lambda size=size, p=p: frozenlake.random_map(size, p, np.random.default_rng(0))
            for size, p in ((1, 0.8), (0, 0.8), (4, 0), (4, -1), (4, 1.5), (4, float("nan")))
        ),
        *(
            lambda desc=desc: FrozenLake(desc)
            for desc in (["SF", "G"], ["SX", "FG"], ["FF", "FG"], ["SS", "FG"], [""])
        ),
        *(
            lambda q=q, h=h: FrozenLake(["SF", "FG"], q, h)
            for q, h in ((1.5, 8), (-0.1, 8), (float("nan"), 8), (1, 0))
        ),
    ],
)
def test_impossible_lakes_are_refused(make):
    with pytest.raises(ValueError):
        make()


# A second game, with a vocabulary of its own


class Corridor:
    """Six places in a row; the text says at which end the goal is."""

    instructions, max_steps = "go west or east", 6

    def __init__(self, goal, place, *key):
        self.goal, self.place, self.steps, self.success = goal, place, 0, False
        self.rng = np.random.default_rng(key)

    def observation(self):
        return f"from {self.place} go {self.goal}"

    def step(self, text):
        word, self.steps = text.split(" ")[-1], self.steps + 1
        self.place += {"west": -1, "east": 1}.get(word, 0)
        self.success = self.place == {"west": 0, "east": 5}[self.goal]
        done = self.place in (0, 5) or self.steps == self.max_steps
        return float(self.success), done, word in ("west", "east")


class Words:
    """A tokenizer of a few words, two of which end an answer."""

    words = "west east go or from 1 2 3 4".split()
    size, end_ids = len(words), frozenset([0, 1])

    def prefix(self, text):
        return [self.words.index(word) for word in text.split()]

    def suffix(self, text, think=False):
        return self.prefix(text)

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


def corridor_agent(std=0.4, **settings):
    """An agent with random weights, whose model has more rows than the tokenizer has tokens."""
    model = lm.Transformer(lm.Config("qwen2", Words.size + 5, 16, 24, 2, 4, 2, 4))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=std)
    return lm.LanguageAgent(
        model, Words(), Corridor.instructions, **{"max_new_tokens": 3} | settings
    )


def corridors(count=12, seed=0):
    return [Corridor(("west", "east")[i % 2], 1 + i % 4, seed, i) for i in range(count)]


def steps_of(episodes):
    return [step for episode in episodes for step in episode]


def facts(episodes):
    return [[dataclasses.replace(step, logprobs=()) for step in episode] for episode in episodes]


def logprobs(episodes):
    return torch.tensor([logprob for step in steps_of(episodes) for logprob in step.logprobs])


# Rollouts


@pytest.mark.parametrize("greedy", [True, False])
def test_rollouts_batched_are_those_one_by_one(greedy):
    agent = corridor_agent(temperature=1.5)
    together = msgrpo.play(agent, corridors(), greedy)
    apart = [agent.refresh() or msgrpo.play(agent, [game], greedy)[0] for game in corridors()]
    assert facts(together) == facts(apart) == facts(msgrpo.play(agent, corridors(), greedy))
    torch.testing.assert_close(logprobs(together), logprobs(apart), atol=1e-5, rtol=0)
    assert (facts(msgrpo.play(agent, corridors(seed=1), greedy)) == facts(together)) == greedy


def test_rollouts_keep_what_was_sampled():
    agent = corridor_agent()
    episodes = msgrpo.play(agent, corridors(30))
    assert {len(step.response) for step in steps_of(episodes)} == {1, 2, 3}
    for game, episode in zip(corridors(30), episodes, strict=True):
        for step in episode:  # play it again from its texts
            assert Words().decode(step.prompt) == game.observation()
            assert Words().decode(step.response) == step.text
            *middle, last = step.response  # an end token is a part of it
            assert not Words.end_ids & {*middle} and (last in Words.end_ids) != step.truncated
            assert len(step.logprobs) == len(step.response) == 3 or not step.truncated
            assert game.step(step.text) == (step.reward, step.done, step.valid)
            assert game.success == step.success and max(step.response) < Words.size
        assert game.place in (0, 5) or game.steps == 6


def test_finished_games_and_answers_leave_the_batch():
    agent, sizes, shapes = corridor_agent(), [], []
    act = agent.act
    agent.act = lambda texts, uniforms: sizes.append(len(texts)) or act(texts, uniforms)
    agent.model.register_forward_hook(lambda module, args, out: shapes.append(args[0].shape))
    lengths = [len(episode) for episode in msgrpo.play(agent, corridors())]
    assert (
        sizes == [sum(n > t for n in lengths) for t in range(max(lengths))] and sizes[-1] < sizes[0]
    )
    shapes.clear()
    ((_, response, _, text, truncated),) = act(["from 2 go west"], np.zeros((1, 3)))
    assert (response, text, truncated) == (
        (0,),
        "west",
        False,
    )  # the first word, which ends an answer
    assert len(shapes) == 1


def test_samples_follow_the_distribution():
    agent = corridor_agent(temperature=2.0, max_new_tokens=1)
    uniforms = np.random.default_rng(0).random((3000, 1))
    counts = Counter(answer[1][0] for answer in agent.act(["from 2 go west"] * 3000, uniforms))
    ids = torch.tensor([Words().prefix(Corridor.instructions + " from 2 go west")])
    p = (agent.model(ids)[0, -1, : Words.size] / 2).softmax(-1).tolist()
    assert (
        all(near(counts[token], 3000, p[token]) for token in range(Words.size))
        and counts.total() == 3000
    )


# The loss


def slow_loss(model, temperature, episodes, advantages, clip, gamma, entropy_coef):
    """The loss token by token, each from a forward pass over its whole context."""
    total, tokens = 0.0, 0
    for episode, advantage in zip(episodes, advantages, strict=True):
        for t, step in enumerate(episode):
            credit = advantage * gamma ** (len(episode) - 1 - t)
            for k, token in enumerate(step.response):
                ids = [*Words().prefix(Corridor.instructions), *step.prompt, *step.response[:k]]
                table = (model(torch.tensor([ids]))[0, -1, : Words.size] / temperature).log_softmax(
                    -1
                )
                ratio = (table[token] - step.logprobs[k]).exp()
                total = total + min(ratio * credit, min(max(ratio, 1 - clip), 1 + clip) * credit)
                if abs(table[token].item() - step.logprobs[k]) <= np.log(1 + clip):
                    total = total - entropy_coef * (table.exp() * table).sum()
                tokens += 1
    return -total / tokens


def gradient(model):
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


ADVANTAGES = torch.tensor(
    [1.0, -0.5, 0.0, 2.0, -1.5, 0.25]
)  # one of zero: in the denominator all the same


def test_micro_batches():
    """Within the budget, each step once; equal answers to a prompt stay together and cost what one costs."""
    rng = np.random.default_rng(0)
    steps = [
        msgrpo.Step((int(rng.integers(3)),) * 5, (int(rng.integers(4)),) * 3) for _ in range(200)
    ]
    batches = msgrpo.micro_batches(steps, 24)
    assert sorted(id(step) for batch in batches for step in batch) == sorted(map(id, steps))
    pairs = [{(step.prompt, step.response) for step in batch} for batch in batches]
    assert sum(map(len, pairs)) == len(set().union(*pairs)) == 12
    assert max(map(len, pairs)) == 3  # of 8 tokens each


def test_equal_answers_stay_with_one_process():
    """Of two processes each scores its part of the unequal answers; a step in excess has no weight."""
    steps = [msgrpo.Step((1,), (2,), [0.0], credit=1.0) for _ in range(6)]
    steps += [msgrpo.Step((1,), (i,), [0.0], credit=1.0) for i in range(3, 8)]
    scored, losses = [], []

    def score(batch):
        scored.append(batch)
        return torch.zeros(len(batch), requires_grad=True), torch.zeros(len(batch))

    for rank in range(2):
        means = msgrpo.accumulate_gradient(
            SimpleNamespace(score=score),
            [steps],
            budget=4,
            world=2,
            share=lambda items, i=rank: items[len(items) * i // 2 : len(items) * (i + 1) // 2],
        )
        losses.append(means["loss"])
    answers, passes = [{step.response for step in batch} for batch in scored], len(scored) // 2
    first, second = set().union(*answers[:passes]), set().union(*answers[passes:])
    assert (
        not first & second and len(first | second) == 6 and max(map(len, answers)) == 2
    )  # of 4 tokens
    assert sum(map(len, scored)) == len(steps) and sum(losses) == pytest.approx(-1)


def test_greedy_answers_are_remembered_until_the_weights_change(monkeypatch):
    agent, asked = corridor_agent(), []
    answer = agent.answer
    monkeypatch.setattr(
        agent, "answer", lambda states, *rest: asked.append(states) or answer(states, *rest)
    )
    first = agent.act(["from 2 go west", "from 3 go east", "from 2 go west"], None)
    assert (
        agent.act(["from 3 go east", "from 1 go east", "from 2 go west"], None)[::2] == first[1::-1]
    )
    assert (
        asked == [["from 2 go west", "from 3 go east"], ["from 1 go east"]] and first[0] == first[2]
    )
    torch.nn.init.normal_(agent.model.model["norm"].weight)
    agent.refresh()
    assert agent.act(["from 2 go west"], None)[0][2] != first[0][2]


@pytest.mark.parametrize(
    "temperature, clip, gamma, entropy_coef, budget",
    [
        (1.0, 0.2, 1.0, 0.0, 9999),
        (1.7, 0.1, 0.5, 0.05, 9999),
        (0.8, 0.2, 0.0, 0.0, 9999),
        (1.25, 0.3, 1.0, 0.1, 1),
        (1.0, 0.2, 1.0, 0.0, 9),
    ],
)  # a micro-batch of one step, of a few
def test_loss_is_that_of_a_slow_loop(temperature, clip, gamma, entropy_coef, budget):
    agent, rng = corridor_agent(temperature=temperature), random.Random(0)
    episodes = msgrpo.play(agent, corridors(6))
    for step in steps_of(episodes):  # as if the policy had moved on
        step.logprobs = [logprob + rng.uniform(-0.4, 0.4) for logprob in step.logprobs]
    loss = slow_loss(agent.model, temperature, episodes, ADVANTAGES, clip, gamma, entropy_coef)
    loss.backward()
    expected = gradient(agent.model)
    agent.model.zero_grad()
    msgrpo.assign_credit(episodes, ADVANTAGES, gamma)
    stats = msgrpo.accumulate_gradient(
        agent, episodes, clip=clip, entropy_coef=entropy_coef, budget=budget
    )
    torch.testing.assert_close(gradient(agent.model), expected, atol=2e-6, rtol=1e-4)
    assert stats["loss"] == pytest.approx(loss.item(), abs=1e-5) and 0 < stats["clip_share"] < 1
    assert stats["tokens"] == len(logprobs(episodes))


def test_ratio_is_one_before_the_first_update():
    agent = corridor_agent(temperature=1.7)
    episodes = msgrpo.play(agent, corridors())
    msgrpo.assign_credit(episodes, torch.ones(12))
    stats = msgrpo.accumulate_gradient(agent, episodes, budget=50)
    assert (
        stats["logprob_gap"] < 1e-6
        and stats["clip_share"] == 0
        and stats["loss"] == pytest.approx(-1)
    )
    sampled = logprobs(episodes)
    for step in steps_of(episodes):
        step.logprobs = [logprob + 0.25 for logprob in step.logprobs]
    assert msgrpo.rescore(agent, episodes, 50) == pytest.approx(0.25, abs=1e-5)
    torch.testing.assert_close(logprobs(episodes), sampled, atol=1e-5, rtol=0)


def test_padding_changes_nothing():
    agent = corridor_agent()
    steps = steps_of(msgrpo.play(agent, corridors()))
    apart = [
        torch.cat(parts) for parts in zip(*(agent.score([step]) for step in steps), strict=True)
    ]
    torch.testing.assert_close([*agent.score(steps)], apart, atol=1e-5, rtol=0)


def test_two_threads_repeat_a_gradient_bit_for_bit():
    agent, found = corridor_agent(), []
    steps = [
        msgrpo.Step((4, 6, 2, goal), answer)  # each thread's part adds to the same prompts
        for answer in itertools.product(range(Words.size), repeat=3)
        for goal in (0, 1)
    ]
    torch.set_num_threads(2)
    for _ in range(6):
        agent.model.zero_grad()
        agent.score(steps)[0].square().sum().backward()
        found.append(gradient(agent.model))
    assert all(torch.equal(one, found[0]) for one in found)


def test_only_steps_with_credit_cost_a_forward_pass():
    agent, seen = corridor_agent(), []
    episodes, score = msgrpo.play(agent, corridors(6)), agent.score
    agent.score = lambda steps: seen.extend(map(id, steps)) or score(steps)
    drawn = [episode for episode, advantage in zip(episodes, ADVANTAGES, strict=True) if advantage]
    for gamma, entropy_coef, expected in (
        (1, 0, steps_of(drawn)),
        (0, 0, [e[-1] for e in drawn]),
        (1, 0.1, steps_of(episodes)),
    ):
        seen.clear()
        msgrpo.assign_credit(episodes, ADVANTAGES, gamma)
        msgrpo.accumulate_gradient(agent, episodes, budget=20, entropy_coef=entropy_coef)
        assert sorted(seen) == sorted(map(id, expected))
    agent.model.zero_grad()
    msgrpo.assign_credit(episodes, torch.zeros(6))
    assert msgrpo.accumulate_gradient(agent, episodes)["loss"] == 0
    assert all(weight.grad is None for weight in agent.model.parameters())


# The model

GOLDEN = ["qwen2-tied", "qwen2-untied", "qwen3", "llama-biases", "llama3-rope"]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_logits_and_save(name, tmp_path):
    golden = lm.read_safetensors(DATA / "logits.safetensors")
    model, tokenizer = lm.load_pretrained(DATA / name)
    ids = golden[f"{name}.ids"]
    torch.testing.assert_close(model(ids)[:, ::3], golden[f"{name}.logits"], atol=2e-5, rtol=0)
    assert tokenizer is None and all(p.requires_grad and not p.is_meta for p in model.parameters())
    lm.save_pretrained(tmp_path, model, None)
    again, _ = lm.load_pretrained(tmp_path)
    assert again.config == model.config and torch.equal(again(ids), model(ids))
    low, _ = lm.load_pretrained(DATA / name, torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


def count_recomputed(patch):
    """A list that grows by each layer whose activations are to be recomputed."""
    layers, run = [], torch.utils.checkpoint.checkpoint
    patch.setattr(
        torch.utils.checkpoint,
        "checkpoint",
        lambda layer, *x, **kw: layers.append(layer) or run(layer, *x, **kw),
    )
    return layers


@pytest.mark.parametrize("name", GOLDEN)
def test_cache_prefix_and_full_forward_agree(name, monkeypatch):
    model, _ = lm.load_pretrained(DATA / name)
    prefix, size, temperature = [5, 3, 8, 1, 1, 20, 7], 25, 1.3
    prompts = {"a": (2, 4), "b": (9,), "c": (11, 12, 13, 14, 15)}
    tokenizer = SimpleNamespace(
        size=size,
        end_ids={0, 3},
        prefix=lambda text: prefix,
        decode=str,
        suffix=lambda state, think: prompts[state],
    )
    agent = lm.LanguageAgent(model, tokenizer, "", temperature, 5)
    responses = [(1, 2, 3), (4,), (1, 2, 3), (0, 24, 7, 7), (1, 5, 0), (8, 9)]
    steps = [
        msgrpo.Step(prompts[state], response)
        for state, response in zip("abacab", responses, strict=True)
    ]

    def slowly():
        rows = []
        for step in steps:
            ids, n = [*prefix, *step.prompt, *step.response[:-1]], len(step.response)
            table = (model(torch.tensor([ids]))[0, -n:, :size] / temperature).log_softmax(-1)
            entropy = -(table.exp() * table).sum(-1)
            rows.append((table.gather(1, torch.tensor(step.response)[:, None])[:, 0], entropy))
        return [torch.cat(column) for column in zip(*rows, strict=True)]

    def with_gradient(function):
        model.zero_grad()
        found, weights = function(), torch.linspace(-1, 1, 16)
        ((found[0] + 0.3 * found[1].square()) * weights).sum().backward()
        return [*found, gradient(model)]

    expected = with_gradient(slowly)
    torch.testing.assert_close(
        with_gradient(lambda: agent.score(steps)), expected, atol=1e-5, rtol=1e-4
    )
    model.recompute, layers = True, count_recomputed(monkeypatch)
    torch.testing.assert_close(
        with_gradient(lambda: agent.score(steps)), expected, atol=1e-5, rtol=1e-4
    )
    assert layers
    for uniforms in (None, np.random.default_rng(0).random((6, 5))):  # it scores as it was sampled
        steps[:] = [msgrpo.Step(*answer) for answer in agent.act("abacab", uniforms)]
        found = torch.tensor([logprob for step in steps for logprob in step.logprobs])
        torch.testing.assert_close(found, slowly()[0], atol=1e-5, rtol=0)
        ids = [torch.tensor([[*prefix, *step.prompt, *step.response]]) for step in steps]
        rows = [model(row)[0, :-1, :size] for row in ids]
        rows = [row[-len(step.response) :] for row, step in zip(rows, steps)]
        best = [row.argmax(-1).tolist() == [*step.response] for row, step in zip(rows, steps)]
        assert all(best) == (uniforms is None)


def test_a_bfloat16_learner_trains_and_saves_float32(tmp_path):
    model, _ = lm.load_pretrained(DATA / "qwen2-untied")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "tiny_start", lambda settings: (model, Words()))
        learner = train.Learner(train.Settings(dtype="bfloat16", device="cpu"))
    agent = learner.agent(Corridor.instructions)
    assert {p.dtype for p in learner.model.parameters()} == {torch.bfloat16}

    def update(rate, factor=1.0):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for prompt in ((1, 2), (3,)):  # two micro-batches
            (agent.score([msgrpo.Step(prompt, (6, 7))])[0].sum() * factor).backward()
        learner.update(rate)
        assert all(
            torch.equal(low, p.bfloat16())  # what plays next is what was learned
            for low, p in zip(learner.model.parameters(), model.parameters(), strict=True)
        )
        lm.save_pretrained(tmp_path, learner.master, None)
        saved = lm.read_safetensors(tmp_path / "model.safetensors")
        return {
            name: (saved[name] - p).abs() for name, p in before.items() if "proj.weight" in name
        }

    for change in update(1e-6).values():  # would vanish in bfloat16
        assert (change > 0).float().mean() > 0.7 and change.max() < 2e-6
    assert not any(change.any() for change in update(1e-6, float("nan")).values())  # refused
    assert all(change.max() > 0.05 for change in update(0.1).values())


# Files of others: safetensors, config.json, shards, tokenizer.json


def raw_file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def f32(shape, *span):
    return {"dtype": "F32", "shape": shape, "data_offsets": list(span)}


ACCEPTED = [
    raw_file({}),
    raw_file(b" \n{} \t "),
    *(raw_file({"__metadata__": data}) for data in (None, {"a": "b"})),
    raw_file({"b": f32([1], 4, 8), "a": f32([], 0, 4)}, bytes(8)),
    raw_file({"a": f32([0, 1 << 40], 0, 0)}),
    raw_file({"a": f32([2], 0, 8) | {"more": [None]}}, bytes(8)),
    raw_file({"a": f32([1] * 65, 0, 4)}, bytes(4)),
    raw_file(
        {"z": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": f32([1], 1, 5)}, bytes(5)
    ),
]
REFUSED = [
    b"",
    bytes(7),
    bytes(8),
    *(struct.pack("<Q", size) + b"{}" for size in (3, 100_000_001, 1 << 63)),
    *map(
        raw_file,
        (
            b"\xef\xbb\xbf{}",
            b'{"\xff": 1}',
            b"[]",
            b"{}x",
            b'{"__metadata__": {"a": NaN}}',
            b"[" * 100_000,
            b'{"__metadata__":{},"__metadata__":{}}',
            b'{"a":' * 100_000,
            {"__metadata__": []},
            {"__metadata__": {"a": 1}},
            {"a": None},
            {"a": []},
            {"a": {}},
        ),
    ),
    raw_file({}, b"\0"),
    *(
        raw_file({"a": entry}, bytes(4))
        for entry in (
            f32([1], 0, 4) | {"dtype": "F8_E4M3"},
            f32([1], 0, 4) | {"dtype": ["F32"]},
            f32([True], 0, 4),
            f32([1.0], 0, 4),
            f32([-1], 0, 4),
            f32(1, 0, 4),
            f32([1], 0, 4, 8),
            f32([1], False, 4),
            f32([1], 4, 0),
            f32([1], 0, 8),
            f32([2], 0, 4),
            f32([1 << 62, 0], 0, 4),
            f32([1 << 63, 0], 0, 0),
            f32([1 << 62, 1 << 62, 0], 0, 0),
            f32([1 << 62] * 64, 0, 4),
            f32([1], "0", 4),
            f32([1], 0, 1 << 70),
        )
    ),
    raw_file({"a": f32([1], 4, 8)}, bytes(8)),
    raw_file({"a": f32([1], 0, 4), "b": f32([1], 2, 6)}, bytes(6)),
    raw_file({"a": f32([1], 0, 4), "b": f32([1], 5, 9)}, bytes(9)),
    raw_file({"a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"\2"),
]


def test_safetensors_accepts_and_refuses(tmp_path):
    path = tmp_path / "a"
    for content in ACCEPTED:
        path.write_bytes(content)
        lm.read_safetensors(path)
    for content in REFUSED:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)):
            lm.read_safetensors(path)


def test_safetensors_round_trip_truncations_and_mutations(tmp_path):
    path, rng = tmp_path / "a.safetensors", random.Random(0)
    tensors = [
        torch.tensor([[-1.5, 2]]).to(getattr(torch, kind))
        for kind in (
            "bfloat16",
            "float16",
            "float32",
            "float64",
            "int8",
            "int16",
            "int32",
            "int64",
            "uint8",
            "bool",
        )
    ]
    tensors += [torch.tensor(2.5), torch.empty(0, 3), torch.arange(6.0).view(2, 3).T]
    written = {f"tensor {i} é": tensor for i, tensor in enumerate(tensors)}
    lm.write_safetensors(path, written)
    good, read = path.read_bytes(), lm.read_safetensors(path)
    assert read.keys() == written.keys() and int.from_bytes(good[:8], "little") % 8 == 0
    assert all(
        read[key].dtype == t.dtype and torch.equal(read[key], t) for key, t in written.items()
    )
    for size in range(0, len(good), 3):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError):
            lm.read_safetensors(path)
    for _ in range(500):
        broken = bytearray(good)
        for at in rng.choices(range(len(broken)), k=rng.randrange(1, 4)):
            new = rng.choice([b"", b"0", b"9" * 20, b"[", b'"', bytes([rng.randrange(256)])])
            broken[at : at + rng.randrange(3)] = new
        path.write_bytes(broken)
        try:
            read = lm.read_safetensors(path)
        except ValueError:
            continue
        assert sum(t.numel() * t.element_size() for t in read.values()) <= len(broken)


@pytest.fixture
def checkpoint(tmp_path):
    """Copies a golden checkpoint to where it may be spoiled."""
    return lambda name: shutil.copytree(DATA / name, tmp_path / name)


def edit(path, **changes):
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_failed_save_leaves_the_old_files(checkpoint, monkeypatch):
    directory, (model, tokenizer) = checkpoint("qwen3"), small_model()
    before = snapshot(directory)
    unwritable = {"a": torch.zeros(1), "b": torch.empty(1, device="meta")}
    monkeypatch.setattr(model, "state_dict", lambda: unwritable)
    with pytest.raises(NotImplementedError):
        lm.save_pretrained(directory, model, tokenizer)
    with pytest.raises(ValueError, match="complex64"):
        lm.write_safetensors(
            directory / "model.safetensors", {"a": torch.zeros(1, dtype=torch.complex64)}
        )
    assert snapshot(directory) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral"},
        {"model_type": "absent"},
        {"model_type": ["llama"]},
        {"hidden_act": "gelu"},
        {"use_sliding_window": True},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"quantization_config": {"bits": 4}},
        {"partial_rotary_factor": 0.5},
        {"rope_theta": float("inf")},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": "yarn"},
        {"layer_types": 7},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": {"rope_theta": "1e4"}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_parameters": None, "rope_theta": -1.0},
        {"rms_norm_eps": 0},
        {"eos_token_id": "2"},
        {"eos_token_id": [1, True]},
        {"tie_word_embeddings": 1},
        {"attention_bias": False},
        {"mlp_bias": "no"},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 3},
        {"head_dim": 3},
        {"head_dim": 1 << 20},
        {"intermediate_size": 13},
        {"vocab_size": 1 << 40},
        *({"hidden_size": value} for value in (0, True, 8.0, "8", 10**30, "absent")),
    ],
    ids=str,
)
def test_config_refused(changes, checkpoint):
    directory = checkpoint("llama-biases")
    edit(directory / "config.json", **changes)
    with pytest.raises(ValueError, match=str(directory)):
        lm.load_pretrained(directory)


def test_config_that_is_no_json_object(checkpoint):
    path = checkpoint("llama-biases") / "config.json"
    for text in ("", "[]", "{", '{"a": 1, "a": 1}', '{"a": NaN}', "[" * 100_000, "\xff", None):
        path.unlink() if text is None else path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match="config.json"):
            lm.load_pretrained(path.parent)


@pytest.mark.parametrize(
    "raw, expected",
    [
        (
            {},
            {
                "num_key_value_heads": 4,
                "head_dim": 8,
                "rope_theta": 1e4,
                "tie_word_embeddings": False,
            },
        ),
        ({"model_type": "qwen3"}, {"head_dim": 128}),
        ({"model_type": "qwen3", "head_dim": None}, {"head_dim": 8}),
        ({"model_type": "qwen2", "attention_bias": True}, {"attention_bias": False}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
            {"rope_theta": 5e5, "rope_scaling": None},
        ),
        ({"rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}, {"rope_theta": 7e5}),
        ({"layer_types": ["full_attention"], "sliding_window": 9, "use_sliding_window": False}, {}),
    ],
)
def test_config_defaults_and_dialects(raw, expected):
    base = {
        "model_type": "llama",
        "vocab_size": 9,
        "hidden_size": 32,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = lm.parse_config(json.dumps(base | raw).encode())
    assert {key: getattr(config, key) for key in expected} == expected


def test_tensors_that_do_not_fit(checkpoint):
    path = checkpoint("llama-biases") / "model.safetensors"
    good, name = lm.read_safetensors(path), "model.norm.weight"
    for change in (
        {name: good[name][1:]},
        {name: good[name].int()},
        {"other": good[name]},
        {name: None},
    ):
        lm.write_safetensors(path, {k: t for k, t in (good | change).items() if t is not None})
        with pytest.raises(ValueError, match="other" if "other" in change else name):
            lm.load_pretrained(path.parent)
    lm.write_safetensors(
        path, good | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    )
    lm.load_pretrained(path.parent)  # old Llama files hold it
    path = checkpoint("qwen2-tied") / "model.safetensors"
    good = lm.read_safetensors(path)
    lm.write_safetensors(path, good | {"lm_head.weight": good["model.embed_tokens.weight"]})
    assert "lm_head.weight" not in lm.load_pretrained(path.parent)[0].state_dict()


@pytest.mark.parametrize(
    "spoil", "outside absent null elsewhere missing extra twice no_map".split()
)
def test_shards_refused(spoil, checkpoint):
    directory = checkpoint("qwen2-untied")
    index = directory / "model.safetensors.index.json"
    homes = json.loads(index.read_text())["weight_map"]
    name, shards = next(iter(homes)), sorted({*homes.values()})
    (other,) = {*shards} - {homes[name]}
    if spoil == "twice":
        tensor = lm.read_safetensors(directory / homes[name])[name]
        lm.write_safetensors(
            directory / other, lm.read_safetensors(directory / other) | {name: tensor}
        )
    homes |= {
        "outside": {name: "../" + homes[name]},
        "absent": {name: "none.safetensors"},
        "null": {name: None},
        "elsewhere": {name: other},
        "extra": {"more": other},
    }.get(spoil, {})
    if spoil == "missing":
        del homes[name]
    index.write_text(json.dumps({} if spoil == "no_map" else {"weight_map": homes}))
    with pytest.raises((ValueError, OSError)):
        lm.load_pretrained(directory)


def golden_tokenizer(name, *args):
    raw = json.loads((DATA / f"tokenizer-{name}.json").read_text())
    return lm.Tokenizer(json.dumps(raw["tokenizer"]).encode(), *args), raw


@pytest.mark.parametrize("name", ["chatml-nfc", "digits", "headers", "gpt2"])
def test_golden_tokens(name):
    tokenizer, raw = golden_tokenizer(name)
    for text, ids in raw["expected"]:
        assert tokenizer.encode(text) == ids, text
    control = "".join(tokenizer.special)  # typed, it stays text
    assert not {*tokenizer.special.values()} & {*tokenizer.encode(control)}
    assert tokenizer.decode(tokenizer.encode(control)) == control
    assert tokenizer.decode(tokenizer.special.values()) == control
    assert tokenizer.decode([10**12, -1]) == "" and tokenizer.encode("a\ud800b")


def test_prompts_of_the_chat_templates():
    def prompt(name, model_type="llama", think=False):
        tokenizer, _ = golden_tokenizer(name, [0], model_type)
        ids = tokenizer.prefix("go.") + tokenizer.suffix("P _", think)
        assert all(
            ids.count(i) == tokenizer.decode(ids).count(text)
            for text, i in tokenizer.special.items()
        )
        return tokenizer.decode(ids), [tokenizer.decode([i]) for i in tokenizer.end_ids - {0}]

    chatml = "<|im_start|>user\ngo.\n\nP _<|im_end|>\n<|im_start|>assistant\n"
    for args in (("digits",), ("digits", "qwen3"), ("chatml-nfc",), ("chatml-nfc", "qwen3", True)):
        assert prompt(*args) == (chatml, ["<|im_end|>"])
    assert prompt("chatml-nfc", "qwen3")[0] == chatml + "<think>\n\n</think>\n\n"
    assert prompt("gpt2") == ("go.\n\nP _\n", [])
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    llama = (
        "<|begin_of_text|>"
        + header.format("user")
        + "go.\n\nP _<|eot_id|>"
        + header.format("assistant")
    )
    assert prompt("headers") == (llama, ["<|eot_id|>"])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw, model: model.update(type="Unigram"),
        lambda raw, model: model.update(vocab=[]),
        lambda raw, model: raw.update(normalizer={"type": "Lowercase"}),
        lambda raw, model: raw.pop("model"),
        lambda raw, model: raw.update(pre_tokenizer={"type": "Metaspace"}),
        lambda raw, model: raw.update(pre_tokenizer=None),
        lambda raw, model: raw.pop("added_tokens"),
        lambda raw, model: raw["added_tokens"].append(5),
        lambda raw, model: model["merges"].reverse(),
        lambda raw, model: raw["pre_tokenizer"].update(add_prefix_space=True),
        lambda raw, model: model["merges"].append(["no", "such"]),
        lambda raw, model: model["vocab"].update(a=1),
        lambda raw, model: model["vocab"].update(a=1.5),
        lambda raw, model: model["vocab"].update({"": 9999}),
        lambda raw, model: model["vocab"].update({"\u4e00": 9999}),
        *(lambda raw, model, i=i: raw["added_tokens"][0].update(id=i) for i in (1, -1, 1 << 40)),
    ],
)
def test_tokenizer_refused(spoil, checkpoint):
    directory, (_, raw) = checkpoint("llama-biases"), golden_tokenizer("gpt2")
    path, raw = directory / "model.safetensors", raw["tokenizer"]
    edit(directory / "config.json", vocab_size=400)
    tensors = {
        name: torch.zeros(400, 8) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    lm.write_safetensors(path, lm.read_safetensors(path) | tensors)
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    assert lm.load_pretrained(directory)[1].encode("the")
    spoil(raw, raw["model"])
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="tokenizer.json"):
        lm.load_pretrained(directory)


def small_model():
    texts = ["<action>", "left", " left", "P", " _", "\n", " G", " é", "</action>"]
    tokenizer = lm.tiny_tokenizer(texts, "</action>")
    torch.manual_seed(0)
    config = lm.Config("llama", tokenizer.size, 16, 24, 1, 2, 1, 8, tie_word_embeddings=True)
    return lm.Transformer(config), tokenizer


def test_tiny_tokenizer_and_save(tmp_path):
    model, tokenizer = small_model()
    assert (
        len(tokenizer.encode("<action>left</action> left P _\n")) == 8 and tokenizer.size == 256 + 7
    )
    lm.save_pretrained(tmp_path, model, tokenizer)
    # a special token would make transformers cut the instructions where they mention the tag
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()).get("eos_token") is None
    again, back = lm.load_pretrained(tmp_path)
    text = "Go <left> 日本 left\n<|end|>"
    ids = torch.tensor([tokenizer.encode(text)])
    assert back.json == tokenizer.json and [tokenizer.decode([i]) for i in back.end_ids] == [
        "</action>"
    ]
    assert torch.equal(again(ids), model(ids)) and back.decode(ids[0].tolist()) == text


def test_other_files_are_carried_over_and_old_weights_go(checkpoint, tmp_path):
    directory, new = checkpoint("qwen2-untied"), tmp_path / "new"
    edit(directory / "config.json", unknown=[1], eos_token_id=[3, 4])
    (directory / "generation_config.json").write_text('{"eos_token_id": 5}')
    (directory / "notes.json").write_text("{}")
    lm.save_pretrained(new, lm.load_pretrained(directory)[0], None)
    raw = json.loads((new / "config.json").read_text())
    assert (raw["unknown"], raw["eos_token_id"], raw["torch_dtype"]) == ([1], [3, 4], "float32")
    assert {p.name for p in new.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.json",
    }
    lm.save_pretrained(directory, *small_model())  # over the shards of another model
    assert {p.name for p in directory.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


# The command line


def command(*argv):
    """Exit status of train.py."""
    try:
        return train.main([*map(str, argv)])
    except SystemExit as leaving:
        return leaving.code


@pytest.fixture(autouse=True)
def undisturbed():
    """A run sets the number of threads and, where it is killed, leaves its handler of Ctrl-C."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A tiny run, warmed up just enough to give answers of the right form; it cannot play."""
    out = tmp_path_factory.mktemp("runs") / "warm"
    assert (
        command(
            "--tiny",
            "--out",
            out,
            "--iterations",
            2,
            "--groups",
            4,
            "--group-size",
            4,
            "--seed",
            7,
            "--warmup-steps",
            150,
            "--eval-episodes",
            20,
            "--eval-every",
            2,
            "--threads",
            1,
        )
        == 0
    )
    return out


@pytest.fixture
def few_maps(monkeypatch):
    """Evaluation on three maps: most runs here are not about their success."""
    maps, _ = frozenlake.held_out_maps(SCENARIOS["noslip"])
    monkeypatch.setattr(frozenlake, "held_out_maps", lambda scenario: (maps[:3], np.full(3, 1 / 3)))


QUICK = (
    "--iterations",
    4,
    "--groups",
    4,
    "--group-size",
    4,
    "--eval-episodes",
    1,
    "--checkpoint-every",
    2,
    "--learning-rate",
    0.01,
    "--max-new-tokens",
    3,
    "--update-episodes",
    4,
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--invalid-penalty",
    0.5,
    "--final-rate",
    0.5,
    "--threads",
    1,
)


def metrics_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def results(out):
    """Metrics and summary of a run, without readings of clocks and echoes of settings, and its weights."""
    records = [*metrics_of(out), json.loads((out / "summary.json").read_text())]
    return [
        {
            key: value
            for key, value in record.items()
            if "second" not in key and key not in ("seed", "learning_rate")
        }
        for record in records
    ], (out / "model/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def found(warm, tmp_path_factory):
    """The results of a run from `warm` with QUICK and these flags; each is run once."""
    cache = {}

    def find(*flags):
        if flags not in cache:
            out = tmp_path_factory.mktemp("runs") / "run"
            assert command("--checkpoint", warm, "--out", out, *QUICK, *flags) == 0
            cache[flags] = results(out)
        return cache[flags]

    return find


def test_a_run_leaves_what_it_promises(warm, capsys):
    settings = json.loads((warm / "settings.json").read_text())
    assert settings.keys() == {field.name for field in dataclasses.fields(train.Settings)}
    given = {
        "iterations": 2,
        "groups": 4,
        "group_size": 4,
        "warmup_steps": 150,
        "seed": 7,
        "threads": 1,
    }
    assert settings.items() >= (train.TINY | given).items()
    metrics, summary = metrics_of(warm), json.loads((warm / "summary.json").read_text())
    assert [m["iteration"] for m in metrics] == [1, 2]
    assert summary["seed"] == 7 and 0 < summary["seconds"] < 600
    assert metrics[0].keys() >= {
        "success",
        "return",
        "steps",
        "valid",
        "truncated",
        "entropy",
        "zero_variance_groups",
        "clip_share",
        "grad_norm",
        "drawn_episodes",
        "trained_episodes",
        "groups_without_success",
        "tokens_per_second",
    }
    unseen = summary["scenarios"]["noslip"]
    assert metrics[1]["unseen_success"] == summary["unseen_success"] == unseen["success"]
    assert (
        unseen["episodes"] == 503
        and unseen["half_interval"] == 0
        and summary["optimal_success"] > 0.999
    )
    assert summary["unseen_success_unweighted"] == unseen["unweighted"]
    assert summary["before"]["valid"] > 0.8  # it was taught to speak, not to play
    assert 0.004 < summary["random_success"] < 0.008 and summary["before"]["success"] < 0.03
    _, tokenizer = lm.load_pretrained(warm / "model")
    assert [tokenizer.decode([i]) for i in tokenizer.end_ids] == ["</action>"]
    before, _ = results(warm), capsys.readouterr()
    for argv in (
        ("--eval", warm, "--eval-episodes", 20),
        ("--eval", warm / "model", "--eval-episodes", 1, "--dtype", "float32"),
    ):
        assert command(*argv) == 0
        rows = re.findall(
            r"(?m)^(\w+) +success ([\d.]+) .* episodes (\d+)", capsys.readouterr().out
        )
        assert [row[0] for row in rows] == [*SCENARIOS] and rows[0][1:] == (
            f"{unseen['success']:.4g}",
            "503",
        )
    assert command("--play", warm) == 0
    assert re.search(
        r"P is you.*<action>.*the goal in \d steps", capsys.readouterr().out, re.DOTALL
    )
    assert command("--resume", warm) == 0 and results(warm) == before  # it is complete


def test_runs_are_numbered_and_reproduced(warm, few_maps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert command("--checkpoint", warm, *QUICK, "--iterations", 1) == 0
    first, second = sorted((tmp_path / "runs").iterdir())
    assert results(first) == results(second)


def test_what_is_trained_on(warm, few_maps, tmp_path, monkeypatch):
    """A group shares a map and not its luck, no map is reserved, episodes keep their groups' advantages."""
    play, accumulate = msgrpo.play, msgrpo.accumulate_gradient
    luck, mixed, trained, updated, advantage_of = [], [], [], [], {}

    def playing(policy, games, greedy=False):
        states = [str(game.rng.bit_generator.state) for game in games]
        episodes = play(policy, games, greedy)
        assert games[0].instructions in policy.tokenizer.decode(policy.instructions)
        if len(games) == 24:  # evaluations are smaller
            luck.extend(states)
            maps = [[game.tiles[i : i + 6] for i in range(0, 36, 6)] for game in games]
            assert (
                not any(map(frozenlake.is_held_out, maps)) and len({str(desc) for desc in maps}) > 1
            )
            assert all(maps[i] == maps[i - i % 6] for i in range(24))
            returns = np.array([sum(step.reward for step in e) for e in episodes]).reshape(4, 6)
            spread = returns.std(1, keepdims=True)
            advantages = (returns - returns.mean(1, keepdims=True)) / (spread + 1e-6)
            advantage_of.update(
                {id(e): (e, a) for e, a in zip(episodes, advantages.flatten(), strict=True)}
            )
            mixed.append(6 * int((spread > 1e-9).sum()))
        return episodes

    def accumulating(policy, episodes, **kwargs):
        trained.append(len(episodes))
        for episode in episodes:
            expected = advantage_of[id(episode)][1]
            assert [step.credit for step in episode] == pytest.approx(
                [expected] * len(episode), abs=1e-4
            )
        stats = accumulate(policy, episodes, **kwargs)
        assert stats["logprob_gap"] < 1e-5 or updated[-1:] == [
            len(luck)
        ]  # the ratio is 1 at a first update
        updated.append(len(luck))
        return stats

    monkeypatch.setattr(msgrpo, "play", playing)
    monkeypatch.setattr(msgrpo, "accumulate_gradient", accumulating)
    assert (
        command(
            "--checkpoint",
            warm,
            "--out",
            tmp_path / "a",
            *QUICK,
            "--group-size",
            6,
            "--scenario",
            "bigslippery",
            "--temperature",
            1.5,
            "--max-gap",
            99,
        )
        == 0
    )
    assert (
        len(luck) == len({*luck}) == 96 and max(trained) <= 5
    )  # no two episodes, of any iteration
    assert sum(trained) == sum(min(12, n) for n in mixed) > 0


CHANGES = {  # for every setting a value that is not QUICK's
    "seed": 1,
    "iterations": 3,
    "scenario": "big",
    "replay": 1.0,
    "groups": 2,
    "group_size": 2,
    "sampling": "uniform",
    "keep": 0.2,
    "update_episodes": 2,
    "gamma": 0.5,
    "normalize_std": False,
    "clip": 1e-6,
    "max_gap": 1e-9,
    "entropy_coef": 0.5,
    "learning_rate": 0.002,
    "final_rate": 0.0,
    "grad_clip": 1e-9,
    "temperature": 0.8,
    "max_new_tokens": 2,
    "think": True,
    "coordinates": True,
    "invalid_penalty": 5.0,
    "micro_batch_tokens": 10,
    "dtype": "bfloat16",
    "eval_every": 1,
    "eval_episodes": 2,
    "warmup_steps": 1,
}
TWO = ("--iterations", 2)


@pytest.mark.parametrize("name", CHANGES)
def test_every_flag_changes_something(name, found, few_maps):
    flag, value = f"--{name.replace('_', '-')}", CHANGES[name]
    flags = (flag if value else f"--no-{flag[2:]}",) if isinstance(value, bool) else (flag, value)
    some = (
        TWO
        if name != "final_rate"
        else (  # the first ten iterations are the ramp; later ones must update
            "--iterations",
            12,
            "--sampling",
            "all",
            "--entropy-coef",
            0.05,
        )
    )
    assert found(*some, *flags) != found(*some)


def test_flags_that_change_no_figure(found, few_maps, monkeypatch):
    elsewhere = {"explore", "checkpoint", "checkpoint_every", "device", "threads", "recompute"}
    assert {
        field.name for field in dataclasses.fields(train.Settings)
    } == CHANGES.keys() | elsewhere
    layers, threads = count_recomputed(monkeypatch), []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert found(*TWO, "--recompute", "--threads", 2) == found(*TWO)
    assert layers and threads == [2]
    lost = (
        *TWO,
        "--scenario",
        "big",
        "--invalid-penalty",
        0.0,
    )  # all is lost: none to draw, many to explore
    assert found(*lost)[0][0]["updates"] == 0 < found(*lost, "--explore", 9)[0][0]["updates"]
    whole = *lost, "--sampling", "all"  # has them already
    assert found(*whole, "--explore", 9) == found(*whole)
    low, full = found(*TWO, "--dtype", "bfloat16")[0], found(*TWO)[0]
    assert low[0]["rollout_gap"] < 0.05 and full[0]["rollout_gap"] is None  # p_old is rescored


HOMES = {"RUN", "STOPPED", "CUTSTATE", "CUTMODEL", "CUTSETTINGS", "EMPTY", "FOREIGN"}
REFUSALS = {  # use: a word of the message
    "--tiny --nonsense": "--nonsense",
    "--tiny --iter 3": "--iter",
    "--tiny extra": "extra",
    "": "--tiny",
    "--tiny --gamma 2": "gamma",
    "--tiny --gamma nan": "gamma",
    "--tiny --max-gap inf": "max-gap",
    "--tiny --groups 0": "groups",
    "--tiny --threads 100000000000": "threads",
    "--tiny --sampling best": "sampling",
    "--tiny --iterations x": "iterations",
    "--tiny --eval RUN": "--tiny",
    "--tiny --device banana": "banana",
    "--tiny --device cuda:99": "",
    "--eval RUN --gamma .5": "gamma",
    "--tiny --out RUN": "RUN",
    "--tiny --out FOREIGN": "FOREIGN",
    "--tiny --out /proc/x": "/proc/x",
    "--tiny --out FOREIGN/notes.txt": "notes.txt",
    "--resume STOPPED --seed 3": "seed",
    "--resume STOPPED --out NEW": "out",
    "--resume NOWHERE": "NOWHERE",
    "--resume FOREIGN": "FOREIGN",
    "--resume EMPTY": "EMPTY",
    "--eval NOWHERE": "NOWHERE",
    "--eval FOREIGN": "FOREIGN",
    "--play EMPTY": "EMPTY",
    "--checkpoint EMPTY": "EMPTY",
    "--resume CUTSTATE": "state.pt",
    "--resume CUTSETTINGS": "settings.json",
    "--eval CUTMODEL": "model.safetensors",
    "--play CUTMODEL": "model.safetensors",
    "--checkpoint CUTMODEL": "model.safetensors",
}


@pytest.fixture(scope="module")
def homes(warm, tmp_path_factory):
    home = tmp_path_factory.mktemp("homes")
    for name in HOMES - {"EMPTY", "FOREIGN"}:
        shutil.copytree(warm, home / name)
    for name in ("STOPPED", "CUTSTATE", "CUTSETTINGS"):
        (home / name / "summary.json").unlink()
    for path in (
        "CUTSTATE/state.pt",
        "CUTMODEL/model/model.safetensors",
        "CUTSETTINGS/settings.json",
    ):
        os.truncate(home / path, (home / path).stat().st_size // 2)
    for name in ("EMPTY", "FOREIGN"):
        (home / name).mkdir()
    (home / "FOREIGN/notes.txt").write_text("mine")
    return home


@pytest.mark.parametrize("use", REFUSALS)
def test_refusals(use, homes, capfd, monkeypatch):
    monkeypatch.chdir(homes)
    shutil.rmtree("runs", ignore_errors=True)  # where earlier ones may have begun
    before = snapshot(homes)
    assert command(*use.split()) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and REFUSALS[use] in lines[0], lines
    assert before.items() <= snapshot(homes).items()
    assert {path.name for path in homes.iterdir()} <= HOMES | {"runs"}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_is_one_line(error, monkeypatch, capsys):
    def run(argv):
        with lm.blaming("a file"):
            raise error

    monkeypatch.setattr(train, "run", run)
    assert command("--tiny") == 2 and "lower --micro-batch-tokens" in capsys.readouterr().err
    error = RuntimeError("can't read")
    assert command("--tiny") == 2 and "a file: malformed" in capsys.readouterr().err
    monkeypatch.setattr(train, "run", lambda argv: torch.zeros(2).view(3))
    with pytest.raises(RuntimeError, match="invalid"):  # a mistake of ours
        command("--tiny")


def test_resumed_from_another_folder(warm, few_maps, tmp_path, monkeypatch):
    """A run knows its checkpoint wherever it is gone on with, and with smaller passes if need be."""
    shutil.copytree(warm, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert command("--checkpoint", "base", "--out", "run", *QUICK) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command("--resume", "../run", "--micro-batch-tokens", 99) == 0


def test_all_won(warm, monkeypatch):
    """Success of 1 has an interval too, though the weights' sum may exceed 1 by a rounding."""
    settings = train.Settings(**json.loads((warm / "settings.json").read_text()))
    monkeypatch.setattr(
        msgrpo,
        "play",
        lambda policy, games, greedy: [
            [msgrpo.Step((), (), valid=True, success=True)] for _ in games
        ],
    )
    learner = SimpleNamespace(settings=dataclasses.replace(settings, eval_episodes=1000), agent=id)
    for name in ("noslip", "big"):
        figures = train.evaluate(learner, name, greedy=name == "big")
        assert figures["success"] == pytest.approx(1) and 0 < figures["half_interval"] < 0.04


def test_unsupported_is_said_before_weights_are_read(checkpoint, monkeypatch):
    directory = checkpoint("llama-biases")
    edit(directory / "config.json", model_type="mistral")
    monkeypatch.setattr(lm, "read_weights", lambda directory: pytest.fail("read"))
    with pytest.raises(ValueError, match="mistral"):
        lm.load_pretrained(directory)


def test_checkpoint_of_another_make(checkpoint, few_maps, tmp_path, capsys):
    """A Qwen2 directory, with more rows than tokens, is trained and saved as a directory that loads."""
    directory, out = checkpoint("qwen2-untied"), tmp_path / "run"
    assert command("--checkpoint", directory, "--out", tmp_path / "no") == 2
    assert "tokenizer.json" in capsys.readouterr().err
    tokenizer, _ = golden_tokenizer("digits", [0])
    config = lm.load_pretrained(directory)[0].config._replace(vocab_size=tokenizer.size + 9)
    torch.manual_seed(0)
    lm.save_pretrained(directory, lm.Transformer(config), tokenizer)
    before, _ = lm.load_pretrained(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    assert (
        command(
            "--checkpoint",
            directory,
            "--out",
            out,
            "--iterations",
            1,
            "--group-size",
            2,
            "--sampling",
            "all",
            "--max-new-tokens",
            4,
            "--eval-episodes",
            1,
            "--entropy-coef",
            0.1,
            "--coordinates",
        )
        == 0
    )
    trained, same = lm.load_pretrained(out / "model")
    assert same.json == tokenizer.json and same.end_ids == {0, 5, tokenizer.special["<|im_end|>"]}
    assert (out / "model/generation_config.json").read_text() == '{"eos_token_id": [0, 5]}'
    change = before.lm_head.weight - trained.lm_head.weight
    assert 0 < change.abs().max() < 3e-6 and change.dtype == torch.float32


# Stopped, killed, resumed


class Killed(BaseException):
    pass


def kill(*_):
    raise Killed


def kill_while_saving(state, file):
    file.write(b"half a state")
    raise Killed


def at(patch, module, name, call, act):
    """Have that call of module.name act first."""
    calls, function = itertools.count(1), getattr(module, name)

    def acting(*args, **kwargs):
        if next(calls) == call:
            act(*args)
        return function(*args, **kwargs)

    patch.setattr(module, name, acting)


@pytest.mark.parametrize(
    "module, name, call, flags",
    [
        *((msgrpo, "episode_advantages", iteration, ()) for iteration in (1, 2, 4)),
        (torch, "save", 2, ()),
        (lm, "save_pretrained", 1, ()),
        (lm, "write_safetensors", 1, ()),
        (msgrpo, "play", 7, ()),
        (msgrpo, "episode_advantages", 4, ("--dtype", "bfloat16", "--replay", 0.5)),
    ],
)
def test_killed_and_resumed_is_never_stopped(
    module, name, call, flags, warm, found, few_maps, tmp_path
):
    expected, out = found(*flags), tmp_path / "a"
    with pytest.MonkeyPatch.context() as patch:
        at(patch, module, name, call, kill_while_saving if module is torch else kill)
        with pytest.raises(Killed):
            command("--checkpoint", warm, "--out", out, *QUICK, *flags)
    assert not (out / "summary.json").exists()
    torch.set_num_threads(2)  # what counts are those of the run
    torch.manual_seed(99)
    assert command("--resume", out) == 0 and results(out) == expected


def test_saved_before_the_first_update_is_never_saved():
    """As where all groups are alike at first: Adam's count of steps must not begin at one."""

    def updated(save):
        learner = train.Learner(train.Settings(**train.TINY))
        if save:
            learner, state = train.Learner(learner.settings), learner.state()
            learner.load(*state)
        for weight in learner.master.parameters():
            weight.grad = torch.full_like(weight, 1e-3)
        learner.update(0.01)
        return learner.state()[0]

    torch.testing.assert_close(updated(True), updated(False), rtol=0, atol=0)


def test_interrupted_and_resumed_is_never_stopped(warm, found, few_maps, tmp_path, capsys):
    expected, out = found(), tmp_path / "a"
    for argv, call, signals, lines in (
        (("--checkpoint", warm, "--out", out, *QUICK), 1, 1, 1),
        (("--resume", out), 2, 1, 3),
        (("--resume", out), 1, 2, 3),
    ):
        with pytest.MonkeyPatch.context() as patch:
            at(
                patch,
                msgrpo,
                "episode_advantages",
                call,
                lambda *_, n=signals: [os.kill(os.getpid(), signal.SIGINT) for _ in range(n)],
            )
            assert command(*argv) == 130
        assert len(metrics_of(out)) == lines  # once ends the iteration first, twice does not
    assert "Traceback" not in capsys.readouterr().err
    assert command("--resume", out) == 0 and results(out) == expected


# Several processes


def two_processes(*argv):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        train.__file__,
        *map(str, argv),
    ]
    ended = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def gradients(out):
    """Adam's first moments at the end of a run: the gradients of its updates, averaged."""
    state = torch.load(out / "state.pt", weights_only=True)["learner"][1]["state"]
    return torch.cat([state[name]["exp_avg"].flatten() for name in sorted(state)])


def test_two_processes_do_what_one_does(warm, few_maps, tmp_path):
    """With the same episodes: gradients, metrics and weights; and they go on with what one began."""
    one, two, began = (tmp_path / name for name in ("one", "two", "began"))
    flags = (
        "--checkpoint",
        warm,
        *QUICK,
        "--learning-rate",
        1e-4,
        "--micro-batch-tokens",
        200,
        "--out",
    )
    assert command(*flags, one) == 0
    assert two_processes(*flags, two).count("this run is") == 1  # the first alone speaks
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at(patch, msgrpo, "episode_advantages", 3, kill)
        command(*flags, began)
    two_processes("--resume", began)
    expected, weights = metrics_of(one), lm.read_safetensors(one / "model/model.safetensors")
    for out in (two, began):
        for found, m in zip(metrics_of(out), expected, strict=True):
            values = {key: m[key] for key in m if "second" not in key and m[key] is not None}
            assert {key: found[key] for key in values} == pytest.approx(values, rel=1e-3, abs=1e-5)
        found = lm.read_safetensors(out / "model/model.safetensors")
        torch.testing.assert_close(found, weights, atol=1e-5, rtol=0)
        assert (gradients(out) - gradients(one)).norm() < 1e-5 * gradients(one).norm()


# Learning


def test_a_corridor_is_learned():
    """Another game, another vocabulary, no warm-up: from two successes in five to nearly always."""
    imports = re.findall(r"^(?:import|from) (\w+)", Path(msgrpo.__file__).read_text(), re.MULTILINE)
    assert {*imports} <= {
        "dataclasses",
        "math",
        "typing",
        "numpy",
        "torch",
    }  # it knows no Frozen Lake
    agent, success = corridor_agent(std=0.2), []
    optimizer = torch.optim.Adam(agent.model.parameters(), lr=0.005)
    for i in range(40):
        games = [
            Corridor(("west", "east")[g % 2], 2 + g // 2 % 2, i, g, j)
            for g in range(8)
            for j in range(16)
        ]
        agent.refresh()
        episodes = msgrpo.play(agent, games)
        success.append(np.mean([episode[-1].success for episode in episodes]))
        returns = torch.tensor([sum(step.reward for step in episode) for episode in episodes]).view(
            8, 16
        )
        advantages = msgrpo.episode_advantages(returns).flatten()
        drawn = msgrpo.draw_episodes(advantages, "aaw", 64, np.random.default_rng(i))
        msgrpo.assign_credit(episodes, advantages)
        msgrpo.accumulate_gradient(agent, [episodes[i] for i in drawn], entropy_coef=0.05)
        optimizer.step()
        optimizer.zero_grad()
    assert np.mean(success[:3]) < 0.45 and np.mean(success[-5:]) > 0.9, success


def test_a_frozen_lake_is_learned(warm, few_maps, tmp_path, monkeypatch):
    """All of train.py on one map, where a random player has .02."""

    def draw_map(scenario, rng, held_out=False, draw=frozenlake.draw_map):
        return draw(scenario, rng, True) if held_out else ["SFFF", "FFFF", "FFFF", "FFFG"]

    monkeypatch.setattr(frozenlake, "draw_map", draw_map)
    assert (
        command(
            "--checkpoint",
            warm,
            "--out",
            tmp_path / "a",
            *QUICK,
            "--iterations",
            18,
            "--group-size",
            32,
            "--learning-rate",
            0.003,
            "--temperature",
            1.0,
            "--update-episodes",
            16,
        )
        == 0
    )
    success = [metrics["success"] for metrics in metrics_of(tmp_path / "a")]
    assert success[0] < 0.1 and np.mean(success[-5:]) > 0.4, success
