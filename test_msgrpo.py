"""All tests, from the method outwards: arithmetic of MS-GRPO, the game, rollouts and the loss, the model, files of others,
the command line, and whether anything is learned.

What can be computed in a second, slower way is compared with that; what only transformers knows lies in testdata/
(made by testdata/golden.py). Runs of train.py are calls of train.main in this process.
"""
import itertools
import json
import os
import random
import re
import shutil
import signal
import struct
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

import frozenlake
import model as lm
import msgrpo
import train
from frozenlake import ACTIONS, SCENARIOS, FrozenLake

torch.set_num_threads(1)
HERE = Path(__file__).parent
DATA = HERE / "testdata"


# The method: advantages, credit, the draw

@pytest.mark.parametrize("returns, normalize, expected", [
    ([[0, 0, 0, 1]], False, [[-.25, -.25, -.25, .75]]),
    ([[0, 0, 0, 1]], True, [[-.57735, -.57735, -.57735, 1.73205]]),  # population std: sqrt(3) / 4
    ([[1, 2], [30, 10]], False, [[-.5, .5], [10, -10]]),  # each group by itself, in its own order
    ([[1, 2], [30, 10], [5, 5]], True, [[-1, 1], [1, -1], [0, 0]]),
])
def test_advantages_by_hand(returns, normalize, expected):
    got = msgrpo.episode_advantages(torch.tensor(returns, dtype=torch.float32), normalize)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=0)


def test_group_without_variance_has_exactly_no_advantage():
    for value, size, normalize in itertools.product((0, 1, .1, 1 / 3, -.7, 1e6 + .1), range(2, 18), (True, False)):
        assert not msgrpo.episode_advantages(torch.full((3, size), value), normalize).any()


def test_steps_count_in_neither_return_nor_credit():
    step = [msgrpo.Step((1,), (2,), [0.0], "", False, reward) for reward in (0.0, .5, -.25, 0.0)]
    assert msgrpo.Episode(step).total_reward == msgrpo.Episode(step + 9 * step[:1]).total_reward == .25
    assert msgrpo.step_credit(2.0, 3) == [2, 2, 2] and msgrpo.step_credit(2.0, 5) == [2] * 5
    assert msgrpo.step_credit(8.0, 4, .5) == [1, 2, 4, 8] and msgrpo.step_credit(8.0, 3, 0.0) == [0, 0, 8]


def test_aaw_probabilities():
    assert msgrpo.aaw_probabilities(torch.tensor([1., -2, 0, 1])).tolist() == [.25, .5, 0, .25]
    with pytest.raises(ValueError):
        msgrpo.aaw_probabilities(torch.zeros(4))
    rng = random.Random(0)
    for normalize, size in itertools.product((True, False), range(2, 20)):  # successes and failures get 1/2 each
        won = [1] * rng.randrange(1, size)
        returns = torch.tensor([rng.sample(won + [0] * (size - len(won)), size)], dtype=torch.float32)
        p = msgrpo.aaw_probabilities(msgrpo.episode_advantages(returns, normalize)[0])
        assert p.sum().item() == pytest.approx(1) and p[returns[0] == 1].sum().item() == pytest.approx(.5, abs=1e-6)


def test_draws():
    advantages, rng = torch.tensor([0, 1, -2, 0, .5, -.5]), np.random.default_rng(0)
    counts = Counter(i for _ in range(4000) for i in msgrpo.draw_episodes(advantages, "aaw", 1, rng))
    for i, p in enumerate(advantages.abs() / 4):
        assert abs(counts[i] - 4000 * p) <= 4 * (4000 * p * (1 - p)) ** .5  # four sigma; never one without advantage
    for sampling, count, pool in (("aaw", 3, {1, 2, 4, 5}), ("aaw", 6, {1, 2, 4, 5}), ("uniform", 3, set(range(6)))):
        draws = [msgrpo.draw_episodes(advantages, sampling, count, rng) for _ in range(200)]
        assert {i for draw in draws for i in draw} == pool and {len(draw) for draw in draws} == {min(count, len(pool))}
        assert all(draw == sorted(set(draw)) for draw in draws)
    assert msgrpo.draw_episodes(advantages, "all", 3, rng) == list(range(6))
    assert msgrpo.draw_episodes(torch.zeros(6), "aaw", 3, rng) == []
    counts = Counter(i for _ in range(2000) for i in msgrpo.draw_episodes(advantages, "uniform", 3, rng))
    assert all(abs(n - 1000) < 100 for n in counts.values())


# The game

def oracle(name, rate, steps):
    return FrozenLake(frozenlake.MAPS[name], rate, steps).success_bounds()


@pytest.mark.parametrize("name, rate, steps, optimal, uniform", [
    ("4x4", 1 / 3, 100, .7442, .0139), ("4x4", .8, 100, .8940, .0139), ("4x4", 1, 100, 1, .0139),
    ("8x8", 1 / 3, 200, .9132, .0019)])
def test_success_bounds_are_the_known_ones(name, rate, steps, optimal, uniform):
    assert FrozenLake(frozenlake.MAPS[name], rate, steps).success_bounds() == pytest.approx((optimal, uniform), abs=5e-5)


@pytest.mark.parametrize("rate, state, action, expected", [  # Gymnasium's P[state][action] on the 4x4 map
    (1, 0, 0, [(1, 0, 0, False)]), (1, 0, 1, [(1, 4, 0, False)]), (1, 4, 2, [(1, 5, 0, True)]),
    (1, 14, 2, [(1, 15, 1, True)]), (1, 15, 0, [(1, 15, 0, True)]), (1, 3, 2, [(1, 3, 0, False)]),
    (1 / 3, 0, 0, [(1 / 3, 0, 0, False), (1 / 3, 0, 0, False), (1 / 3, 4, 0, False)]),
    (1 / 3, 14, 2, [(1 / 3, 14, 0, False), (1 / 3, 15, 1, True), (1 / 3, 10, 0, False)]),
    (.8, 6, 3, [(.1, 5, 0, True), (.8, 2, 0, False), (.1, 7, 0, True)]),
    (.8, 13, 0, [(.1, 9, 0, False), (.8, 12, 0, True), (.1, 13, 0, False)]), (1 / 3, 12, 1, [(1, 12, 0, True)])])
def test_transitions_are_gymnasiums(rate, state, action, expected):
    got = FrozenLake(frozenlake.MAPS["4x4"], rate).transitions(state, action)
    assert [outcome[1:] for outcome in got] == [outcome[1:] for outcome in expected]
    assert [p for p, *_ in got] == pytest.approx([p for p, *_ in expected])


def test_slips_have_their_frequencies_and_take_one_draw():
    counts, rng = Counter(), np.random.default_rng(0)
    for _ in range(3000):
        lake = FrozenLake(frozenlake.MAPS["4x4"], .8, 8, rng)
        lake.state = 6
        lake.step("<action>up</action>")
        counts[lake.state] += 1
    for state, p in ((2, .8), (5, .1), (7, .1)):
        assert abs(counts[state] - 3000 * p) < 4 * (3000 * p * (1 - p)) ** .5
    for text, draws in (("<action>left</action>", 1), ("up", 0)):
        lake, twin = FrozenLake(frozenlake.MAPS["4x4"], .8, 8, np.random.default_rng(1)), np.random.default_rng(1)
        lake.step(text)
        twin.random(draws)
        assert lake.rng.random() == twin.random()


def test_an_episode_and_its_rewards():
    lake = FrozenLake(["SF", "HG"], max_steps=4, invalid_penalty=.5, step_cost=.25)
    assert lake.step("left") == (-.75, False, False) and lake.state == 0
    assert lake.step("<action>right</action>") == (-.25, False, True) and not lake.success
    assert lake.step("<action>down</action>") == (.75, True, True) and lake.success
    lake = FrozenLake(["SF", "HG"], max_steps=2)
    assert lake.step("<action>left</action>") == (0, False, True)
    assert lake.step("nonsense") == (0, True, False)  # the horizon
    lake = FrozenLake(["SF", "HG"])
    assert lake.step("<action>down</action>") == (0, True, True) and not lake.success


@pytest.mark.parametrize("text, action", [
    *((f"<action>{word}</action>", i) for i, word in enumerate(ACTIONS)), ("<action> \nUP\t</action>", 3),
    ("<think>left? <action>left</action></think><action>down</action> done", 1), ("<action>right, then up</action>", None),
    ("<action>upward</action>", None), ("<action></action>", None), ("up", None), ("", None), ("<action>up", None),
    ("up</action>", None), ("</action>up<action>", None), ("<action>up</action><action>", None), ("<action>3</action>", None),
    ("<action>left</action><action>nowhere</action>", None), ("<ACTION>up</ACTION>", None)])
def test_parser(text, action):
    assert frozenlake.parse_action(text) == action


def test_random_text_never_raises():
    rng = random.Random(0)
    parts = ["<action>", "</action>", "up", "left", " ", "\n", "<", "\0", "\ud800", "é", "İ", "日", "9" * 99]
    for _ in range(2000):
        text = "".join(rng.choices(parts, k=rng.randrange(7)))
        assert FrozenLake(["SF", "FG"]).step(text)[2] == (frozenlake.parse_action(text) in range(4))


@pytest.mark.parametrize("name", SCENARIOS)
def test_texts_say_what_is_so(name):
    s, rng = SCENARIOS[name], np.random.default_rng(0)
    for _ in range(5):
        desc = frozenlake.draw_map(s, rng)
        lake = FrozenLake(desc, s.success_rate, s.max_steps, coordinates=True)
        text = " ".join(lake.instructions.split())
        assert f"{s.size} rows and {s.size} columns" in text and f"{s.max_steps} steps" in text
        assert ("not slippery" in text) == (s.success_rate == 1) and ("probability 0.33" in text) == (s.success_rate < 1)
        assert all(f"<action>{word}</action>" in text for word in ACTIONS) and "<think>" not in text
        assert "<think>" in FrozenLake(desc, think=True).instructions
        for lake.state in range(s.size ** 2):  # the text tells the whole state
            where, grid = lake.observation().split("\n", 1)
            rows = [line.split(" ") for line in grid.split("\n")]
            assert rows[lake.state // s.size][lake.state % s.size] == "P" and sum(rows, []).count("P") == 1
            tiles = "".join(sum(rows, [])).replace("_", "F").replace("O", "H").replace("P", lake.tiles[lake.state])
            assert tiles == lake.tiles.replace("S", "F") or lake.tiles[lake.state] == "S" and tiles == lake.tiles
            named = re.findall(r"\((\d+), (\d+)\)", where)
            assert sorted(named) == sorted((str(r + 1), str(c + 1)) for r, row in enumerate(rows)
                                           for c, cell in enumerate(row) if cell != "_")
        lake.coordinates = False
        assert lake.observation() == grid


def test_held_out_maps():
    mass = {True: 0.0, False: 0.0}
    count = Counter()
    for inner in itertools.product("FH", repeat=14):
        tiles = "S" + "".join(inner) + "G"
        desc = [tiles[i:i + 4] for i in range(0, 16, 4)]
        if frozenlake.solvable(desc):
            held = frozenlake.is_held_out(desc)
            count[held] += 1
            mass[held] += .8 ** inner.count("F") * .2 ** inner.count("H")
    assert count == {True: 503, False: 3828 - 503} and mass[True] / sum(mass.values()) == pytest.approx(.124, abs=5e-4)
    maps, weights = frozenlake.held_out_maps(SCENARIOS["noslip"])
    assert len(maps) == len({tuple(desc) for desc in maps}) == 503 and weights.sum() == pytest.approx(1)
    assert weights[0] / weights.min() == pytest.approx(4 ** (max(map("".join, maps), key=lambda s: s.count("H")).count("H")
                                                             - "".join(maps[0]).count("H")))
    rng = np.random.default_rng(0)
    for held in (True, False):
        assert all(frozenlake.is_held_out(frozenlake.draw_map(SCENARIOS["big"], rng, held)) == held for _ in range(20))
    drawn = [frozenlake.random_map(4, .8, rng) for _ in range(3000)]
    assert sum(map(frozenlake.is_held_out, drawn)) / 3000 == pytest.approx(.124, abs=.025)
    assert all(d[0][0] == "S" and d[3][3] == "G" and frozenlake.solvable(d) for d in drawn)


@pytest.mark.parametrize("make", [
    *(lambda size=size, p=p: frozenlake.random_map(size, p, np.random.default_rng(0))
      for size, p in ((1, .8), (0, .8), (4, 0), (4, -1), (4, 1.5), (4, float("nan")))),
    *(lambda desc=desc: FrozenLake(desc) for desc in (["SF", "G"], ["SX", "FG"], ["FF", "FG"], ["SS", "FG"], ["", ""])),
    *(lambda q=q, h=h: FrozenLake(["SF", "FG"], q, h) for q, h in ((1.5, 8), (-.1, 8), (float("nan"), 8), (1, 0)))])
def test_impossible_lakes_are_refused(make):
    with pytest.raises(ValueError):
        make()


# A second game, with a vocabulary of its own

class Corridor:
    """Six places in a row; the text says at which end the goal is. Proof that msgrpo.py knows no Frozen Lake."""
    instructions, max_steps = "go west or east", 6

    def __init__(self, goal, place, *key):
        self.goal, self.place, self.steps, self.success = goal, place, 0, False
        self.rng = np.random.default_rng(key)

    def observation(self):
        return f"{self.goal} from {self.place}"

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


def corridor_agent(std=.4, **settings):
    """An agent for the corridor with random weights, whose model has more rows than the tokenizer has tokens."""
    model = lm.Transformer(lm.Config("qwen2", Words.size + 5, 16, 24, 2, 4, 2, 4, tie_word_embeddings=True))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=std)
    settings = train.Settings(**{"temperature": 1.0, "max_new_tokens": 3} | settings)
    return train.LanguageAgent(model, Words(), Corridor.instructions, settings)


def corridors(count=12, seed=0):
    return [Corridor(("west", "east")[i % 2], 1 + i % 4, seed, i) for i in range(count)]


def facts(episodes):
    return [[(s.prompt, s.response, s.text, s.truncated, s.reward, s.valid) for s in e.steps] for e in episodes]


def logprobs(episodes):
    return torch.tensor([logprob for e in episodes for s in e.steps for logprob in s.logprobs])


# Rollouts

@pytest.mark.parametrize("greedy", [True, False])
def test_rollouts_batched_are_those_one_by_one(greedy):
    agent = corridor_agent(temperature=1.5)
    together = msgrpo.play(agent, corridors(), greedy)
    apart = [msgrpo.play(agent, [game], greedy)[0] for game in corridors()]
    assert facts(together) == facts(apart) == facts(msgrpo.play(agent, corridors(), greedy))
    torch.testing.assert_close(logprobs(together), logprobs(apart), atol=1e-5, rtol=0)
    assert (facts(msgrpo.play(agent, corridors(seed=1), greedy)) == facts(together)) == greedy
    assert greedy or len({len(e.steps) for e in together}) > 2 and len({len(s.response) for e in together for s in e.steps}) == 3


def test_rollouts_keep_what_was_sampled():
    agent = corridor_agent()
    episodes = msgrpo.play(agent, corridors(30))
    for game, episode in zip(corridors(30), episodes, strict=True):
        for step in episode.steps:  # replay it from its texts
            assert agent.tokenizer.decode(step.prompt) == game.observation() and len(step.logprobs) == len(step.response)
            assert agent.tokenizer.decode(step.response) == step.text
            *middle, last = step.response
            assert not Words.end_ids & {*middle} and (last in Words.end_ids) != step.truncated  # the stop token is kept
            assert len(middle) < 3 and (not step.truncated or len(middle) == 2) and max(step.response) < Words.size
            assert game.step(step.text)[0] == step.reward
        assert game.success == episode.success and (game.place in (0, 5) or game.steps == 6)


def test_finished_games_and_answers_leave_the_batch():
    agent, sizes = corridor_agent(), []
    act, generated = agent.act, []
    agent.act = lambda texts, uniforms: sizes.append(len(texts)) or act(texts, uniforms)
    agent.model.register_forward_hook(lambda module, args, out: generated.append(tuple(args[0].shape)))
    lengths = [len(e.steps) for e in msgrpo.play(agent, corridors())]
    assert sizes == [sum(n > t for n in lengths) for t in range(max(lengths))] and sizes[-1] < sizes[0]
    generated.clear()
    step, = act(["west from 2"], np.array([[0.0, 0.0, 0.0]]))  # says the first word, an end token
    assert step.text == "west" and len(generated) == 1


def test_samples_follow_the_distribution():
    agent = corridor_agent(temperature=2.0, max_new_tokens=1)
    uniforms = np.random.default_rng(0).random((3000, 1))
    counts = Counter(step.response[0] for step in agent.act(["west from 2"] * 3000, uniforms))
    ids = torch.tensor([Words().prefix(Corridor.instructions + " west from 2")])
    for token, p in enumerate((agent.model(ids)[0, -1, :Words.size] / 2).softmax(-1).tolist()):
        assert abs(counts[token] - 3000 * p) < 4 * (3000 * p * (1 - p)) ** .5 + 1
    assert max(counts) < Words.size


# The loss

def slow_loss(agent, episodes, advantages, clip, gamma, entropy_coef):
    """The loss token by token, each from a forward pass over its whole context."""
    total, tokens = 0.0, 0
    for episode, advantage in zip(episodes, advantages, strict=True):
        for t, step in enumerate(episode.steps):
            credit = advantage * gamma ** (len(episode.steps) - 1 - t)
            for k, token in enumerate(step.response):
                ids = [*Words().prefix(Corridor.instructions), *step.prompt, *step.response[:k]]
                table = (agent.model(torch.tensor([ids]))[0, -1, :Words.size] / agent.temperature).log_softmax(-1)
                ratio = (table[token] - step.logprobs[k]).exp()
                total = total + min(ratio * credit, min(max(ratio, 1 - clip), 1 + clip) * credit)
                total = total - entropy_coef * (table.exp() * table).sum()
                tokens += 1
    return -total / tokens


def gradient(agent, loss):
    agent.model.zero_grad()
    result = loss()
    if isinstance(result, torch.Tensor):
        result.backward()
    return result, torch.cat([weight.grad.flatten() for weight in agent.model.parameters()])


ADVANTAGES = [1.0, -.5, 0.0, 2.0, -1.5, .25]  # one without advantage: in the denominator all the same


@pytest.mark.parametrize("temperature, clip, gamma, entropy_coef, budget", [
    (1.0, .2, 1.0, 0.0, 9999), (1.7, .1, .5, .05, 9999), (.8, .2, 0.0, 0.0, 9999), (1.25, .3, 1.0, .1, 1), (1.0, .2, 1.0, 0.0, 9)])
def test_loss_is_that_of_a_slow_loop(temperature, clip, gamma, entropy_coef, budget):
    agent, rng = corridor_agent(temperature=temperature), random.Random(0)
    episodes = msgrpo.play(agent, corridors(6))
    for step in (step for episode in episodes for step in episode.steps):  # as if the policy had moved on
        step.logprobs = [logprob + rng.uniform(-.4, .4) for logprob in step.logprobs]
    kwargs = {"clip": clip, "gamma": gamma, "entropy_coef": entropy_coef}
    loss, grad = gradient(agent, lambda: slow_loss(agent, episodes, ADVANTAGES, **kwargs))
    stats, got = gradient(agent, lambda: msgrpo.accumulate_gradient(agent, episodes, ADVANTAGES, budget=budget, **kwargs))
    assert stats["loss"] == pytest.approx(loss.item(), abs=1e-5) and .05 < stats["clip_share"] < .95
    assert stats["tokens"] == sum(len(step.response) for episode in episodes for step in episode.steps)
    torch.testing.assert_close(got, grad, atol=2e-6, rtol=1e-4)


def test_ratio_is_one_before_the_first_update():
    agent = corridor_agent(temperature=1.7)
    episodes = msgrpo.play(agent, corridors())
    stats = msgrpo.accumulate_gradient(agent, episodes, [1.0] * 12, budget=50)
    assert stats["logprob_gap"] < 1e-6 and stats["clip_share"] == 0 and stats["loss"] == pytest.approx(-1)
    sampled = logprobs(episodes)
    for step in (step for episode in episodes for step in episode.steps):
        step.logprobs = [logprob + .25 for logprob in step.logprobs]
    assert msgrpo.rescore(agent, episodes, 50) == pytest.approx(.25, abs=1e-5)
    torch.testing.assert_close(logprobs(episodes), sampled, atol=1e-5, rtol=0)


def test_padding_changes_nothing():
    agent = corridor_agent()
    steps = [step for episode in msgrpo.play(agent, corridors()) for step in episode.steps]
    for together, apart in zip(agent.score(steps), zip(*([t for t in agent.score([s])] for s in steps), strict=True), strict=True):
        torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=0)


def test_only_steps_with_credit_cost_a_forward_pass():
    agent, seen = corridor_agent(), []
    episodes = msgrpo.play(agent, corridors(6))
    score = agent.score
    agent.score = lambda steps: seen.extend(map(id, steps)) or score(steps)
    for entropy_coef, gamma, expected in (
            (0, 1, [s for e, a in zip(episodes, ADVANTAGES, strict=True) if a for s in e.steps]),
            (0, 0, [e.steps[-1] for e, a in zip(episodes, ADVANTAGES, strict=True) if a]),
            (.1, 1, [s for e in episodes for s in e.steps])):
        seen.clear()
        msgrpo.accumulate_gradient(agent, episodes, ADVANTAGES, entropy_coef=entropy_coef, gamma=gamma, budget=20)
        assert sorted(seen) == sorted(map(id, expected))
    agent.model.zero_grad()
    assert msgrpo.accumulate_gradient(agent, episodes, [0.0] * 6)["loss"] == 0
    assert all(weight.grad is None for weight in agent.model.parameters())


def test_an_update_moves_answers_to_their_advantage_up_to_the_end_token():
    agent = corridor_agent()
    step = next(s for e in msgrpo.play(agent, corridors()) for s in e.steps if s.response in ((0,), (1,)))
    for advantage in (1.0, -1.0):
        before = agent.score([step])[0].item()
        agent.model.zero_grad()
        msgrpo.accumulate_gradient(agent, [msgrpo.Episode([step])], [advantage])
        with torch.no_grad():
            for weight in agent.model.parameters():
                weight -= .01 * weight.grad
        assert (agent.score([step])[0].item() > before) == (advantage > 0)
