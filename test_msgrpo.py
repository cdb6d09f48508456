"""All tests, from the method outwards: its arithmetic, the game, rollouts, the loss, the model, files of others, the
command line, resuming, and whether anything is learned.

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
    (.8, 6, 3, [(.1, 7, 0, True), (.8, 2, 0, False), (.1, 5, 0, True)]),
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


def corridor_agent(std=.4, **settings):
    """An agent for the corridor with random weights, whose model has more rows than the tokenizer has tokens."""
    model = lm.Transformer(lm.Config("qwen2", Words.size + 5, 16, 24, 2, 4, 2, 4))
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
            assert Words().decode(step.prompt) == game.observation() and len(step.logprobs) == len(step.response)
            assert Words().decode(step.response) == step.text
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
    step, = act(["from 2 go west"], np.array([[0.0, 0.0, 0.0]]))  # says the first word, an end token
    assert step.text == "west" and len(generated) == 1


def test_samples_follow_the_distribution():
    agent = corridor_agent(temperature=2.0, max_new_tokens=1)
    uniforms = np.random.default_rng(0).random((3000, 1))
    counts = Counter(step.response[0] for step in agent.act(["from 2 go west"] * 3000, uniforms))
    ids = torch.tensor([Words().prefix(Corridor.instructions + " from 2 go west")])
    for token, p in enumerate((agent.model(ids)[0, -1, :Words.size] / 2).softmax(-1).tolist()):
        assert abs(counts[token] - 3000 * p) < 4 * (3000 * p * (1 - p)) ** .5 + 1
    assert max(counts) < Words.size


# The loss

def slow_loss(model, temperature, episodes, advantages, clip, gamma, entropy_coef):
    """The loss token by token, each from a forward pass over its whole context."""
    total, tokens = 0.0, 0
    for episode, advantage in zip(episodes, advantages, strict=True):
        for t, step in enumerate(episode.steps):
            credit = advantage * gamma ** (len(episode.steps) - 1 - t)
            for k, token in enumerate(step.response):
                ids = [*Words().prefix(Corridor.instructions), *step.prompt, *step.response[:k]]
                table = (model(torch.tensor([ids]))[0, -1, :Words.size] / temperature).log_softmax(-1)
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
    loss, grad = gradient(agent, lambda: slow_loss(agent.model, temperature, episodes, ADVANTAGES, **kwargs))
    stats, got = gradient(agent, lambda: msgrpo.accumulate_gradient(agent, episodes, ADVANTAGES, budget=budget, **kwargs))
    assert stats["loss"] == pytest.approx(loss.item(), abs=1e-5) and 0 < stats["clip_share"] < 1
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
    assert {p.dtype for p in lm.load_pretrained(DATA / name, torch.bfloat16)[0].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", GOLDEN)
def test_cache_prefix_and_full_forward_agree(name, monkeypatch):
    model, _ = lm.load_pretrained(DATA / name)
    prefix, size, temperature = [5, 3, 8, 1, 1, 20, 7], 25, 1.3
    prompts = [[2, 4], [9], [2, 4], [11, 12, 13, 14, 15], [2, 4], [9]]
    responses = [[1, 2, 3], [4], [1, 2, 3], [0, 24, 7, 7], [1, 5, 0], [8, 9]]

    def slowly():
        rows = []
        for prompt, response in zip(prompts, responses, strict=True):
            logits = model(torch.tensor([prefix + prompt + response[:-1]]))[0, -len(response):, :size]
            table = (logits / temperature).log_softmax(-1)
            rows.append((table.gather(1, torch.tensor(response)[:, None])[:, 0], -(table.exp() * table).sum(-1)))
        return [torch.cat(column) for column in zip(*rows, strict=True)]

    def quickly():
        return lm.score(model, lm.encode_prefix(model, prefix), prompts, responses, size, temperature)

    def with_gradient(function):
        model.zero_grad()
        found, weights = function(), torch.linspace(-1, 1, 16)
        ((found[0] + .3 * found[1].square()) * weights).sum().backward()
        return [*found, *(p.grad.clone() for p in model.parameters())]
    expected = with_gradient(slowly)
    torch.testing.assert_close(with_gradient(quickly), expected, atol=1e-5, rtol=1e-4)
    model.recompute, layers, run = True, [], lm.checkpoint
    monkeypatch.setattr(lm, "checkpoint", lambda layer, *args, **kw: layers.append(layer) or run(layer, *args, **kw))
    torch.testing.assert_close(with_gradient(quickly), expected, atol=1e-5, rtol=1e-4)
    assert layers
    for uniforms in (None, np.random.default_rng(0).random((6, 5))):  # the greedy ones are the likeliest ones
        ids, found = lm.generate(model, lm.encode_prefix(model, prefix), prompts, uniforms, 5, {0, 3}, size, temperature)
        responses[:] = ids
        torch.testing.assert_close(torch.tensor(sum(found, [])), slowly()[0], atol=1e-5, rtol=0)
        best = [model(torch.tensor([prefix + p + r]))[0, -len(r) - 1:-1, :size].argmax(-1).tolist()
                for p, r in zip(prompts, ids, strict=True)]
        assert (best == ids) == (uniforms is None)


def test_a_bfloat16_learner_trains_and_saves_float32(tmp_path):
    model, _ = lm.load_pretrained(DATA / "qwen2-untied")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = train.Learner(model, train.Settings(dtype="bfloat16", device="cpu", weight_decay=0.0))
    played = learner.model
    assert {p.dtype for p in played.parameters()} == {torch.bfloat16}
    for prompts in ([[1, 2]], [[3]]):  # two micro-batches
        lm.score(played, lm.encode_prefix(played, [4, 5]), prompts, [[6, 7]], 29)[0].sum().backward()
    assert 0 < learner.update(1e-6) < float("inf")
    lm.save_pretrained(tmp_path, learner.master, None)
    changes = {name: (t - before[name]).abs() for name, t in lm.read_safetensors(tmp_path / "model.safetensors").items()}
    assert all(change.max() < 2e-6 for change in changes.values())
    assert all((change > 0).float().mean() > .7 for name, change in changes.items() if "proj.weight" in name)
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    lm.score(played, lm.encode_prefix(played, [4]), [[1]], [[6]], 29)[0].sum().mul(float("nan")).backward()
    learner.update(1e-6)  # refused: the gradient is not finite
    assert all(torch.equal(p, after[name]) for name, p in model.named_parameters())
    learner.master.load_state_dict({name: p + 1 for name, p in after.items()})
    learner.refresh()
    assert all(torch.equal(low, p.bfloat16()) for low, p in zip(played.parameters(), model.parameters(), strict=True))


# Files of others: safetensors, config.json, shards, tokenizer.json

def raw_file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def f32(shape, *span):
    return {"dtype": "F32", "shape": shape, "data_offsets": list(span)}


ACCEPTED = [
    raw_file({}), raw_file(b" \n{} \t "), raw_file({"__metadata__": None}), raw_file({"__metadata__": {"a": "b"}}),
    raw_file({"b": f32([1], 4, 8), "a": f32([], 0, 4)}, bytes(8)), raw_file({"a": f32([0, 1 << 40], 0, 0)}),
    raw_file({"a": f32([2], 0, 8) | {"more": [None]}}, bytes(8)),
    raw_file({"z": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": f32([1], 1, 5)}, bytes(5))]
REFUSED = [
    b"", bytes(7), bytes(8), struct.pack("<Q", 3) + b"{}", struct.pack("<Q", 1 << 63) + b"{}",
    struct.pack("<Q", 100_000_001) + b"{}", raw_file(b"\xef\xbb\xbf{}"), raw_file(b'{"\xff": 1}'), raw_file(b"[]"),
    raw_file(b"{}x"), raw_file(b'{"__metadata__": {"a": NaN}}'), raw_file(b'{"__metadata__":{},"__metadata__":{}}'),
    raw_file(b"[" * 100_000), raw_file(b'{"a":' * 100_000), raw_file({"__metadata__": []}), raw_file({}, b"\0"),
    raw_file({"__metadata__": {"a": 1}}), raw_file({"a": None}), raw_file({"a": []}), raw_file({"a": {}}),
    *(raw_file({"a": entry}, bytes(4)) for entry in (
        f32([1], 0, 4) | {"dtype": "F8_E4M3"}, f32([1], 0, 4) | {"dtype": ["F32"]}, f32([True], 0, 4), f32([1.0], 0, 4),
        f32([-1], 0, 4), f32(1, 0, 4), f32([1], 0, 4, 8), f32([1], False, 4), f32([1], 4, 0), f32([1], 0, 8),
        f32([2], 0, 4), f32([1 << 62, 0], 0, 4), f32([1 << 63, 0], 0, 0), f32([1 << 62, 1 << 62, 0], 0, 0),
        f32([1] * 65, 0, 4), f32([1 << 62] * 64, 0, 4), f32([1], "0", 4), f32([1], 0, 1 << 70))),
    raw_file({"a": f32([1], 4, 8)}, bytes(8)), raw_file({"a": f32([1], 0, 4), "b": f32([1], 2, 6)}, bytes(6)),
    raw_file({"a": f32([1], 0, 4), "b": f32([1], 5, 9)}, bytes(9)),
    raw_file({"a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"\2")]


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
    floats = [torch.randn(3, 4).to(kind) for kind in (torch.bfloat16, torch.float16, torch.float32, torch.float64)]
    whole = [torch.tensor([-1, 2]).to(getattr(torch, kind)) for kind in ("int8", "int16", "int32", "int64", "uint8")]
    rest = [torch.tensor([True, False]), torch.tensor(2.5), torch.empty(0, 3), torch.arange(6.).view(2, 3).T]
    written = {f"tensor {i} é": tensor for i, tensor in enumerate(floats + whole + rest)}
    lm.write_safetensors(path, written)
    good, read = path.read_bytes(), lm.read_safetensors(path)
    assert read.keys() == written.keys() and int.from_bytes(good[:8], "little") % 8 == 0
    assert all(read[key].dtype == t.dtype and torch.equal(read[key], t) for key, t in written.items())
    for size in range(0, len(good), 3):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError):
            lm.read_safetensors(path)
    for _ in range(500):
        broken = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(broken))
            broken[at:at + rng.randrange(3)] = rng.choice([b"", b"0", b"9" * 20, b"[", b'"', bytes([rng.randrange(256)])])
        path.write_bytes(broken)
        try:
            read = lm.read_safetensors(path)
        except ValueError:
            continue
        assert sum(t.numel() * t.element_size() for t in read.values()) <= len(broken)


def test_failed_write_leaves_the_old_files(tmp_path, checkpoint, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    for bad in ({"a": torch.zeros(1, dtype=torch.complex64)}, {"a": torch.zeros(1), "b": torch.empty(1, device="meta")}):
        with pytest.raises((ValueError, NotImplementedError)):
            lm.write_safetensors(path, bad)
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    directory = checkpoint("qwen3")
    before, (model, tokenizer) = snapshot(directory), small_model()
    monkeypatch.setattr(model, "state_dict", lambda: {"a": torch.empty(1, device="meta")})
    with pytest.raises(NotImplementedError):
        lm.save_pretrained(directory, model, tokenizer)
    assert snapshot(directory) == before


def snapshot(*folders):
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkpoint(tmp_path):
    """Copies a golden checkpoint to where it may be spoiled."""
    return lambda name: shutil.copytree(DATA / name, tmp_path / name)


def edit(path, **changes):
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))


@pytest.mark.parametrize("changes", [
    {"model_type": "mistral"}, {"model_type": "absent"}, {"model_type": ["llama"]}, {"hidden_act": "gelu"},
    {"use_sliding_window": True}, {"layer_types": ["full_attention", "sliding_attention"]}, {"layer_types": 7},
    {"quantization_config": {"bits": 4}}, {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": "yarn"},
    {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, {"rope_parameters": {"rope_theta": "1e4"}},
    {"rope_parameters": None, "rope_theta": -1.0}, {"rope_theta": float("inf")}, {"partial_rotary_factor": .5},
    {"rms_norm_eps": 0}, {"hidden_size": 0}, {"hidden_size": True}, {"hidden_size": 8.0}, {"hidden_size": "8"},
    {"hidden_size": -8}, {"hidden_size": 10 ** 30}, {"hidden_size": "absent"}, {"vocab_size": 1 << 40},
    {"num_hidden_layers": 10 ** 9}, {"num_hidden_layers": 10 ** 6}, {"num_hidden_layers": 1},
    {"num_attention_heads": 3}, {"num_key_value_heads": 3}, {"head_dim": 3}, {"head_dim": 1 << 20},
    {"intermediate_size": 13}, {"tie_word_embeddings": 1}, {"attention_bias": False}, {"mlp_bias": "no"}, {"eos_token_id": "2"}, {"eos_token_id": [1, True]}], ids=str)
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


@pytest.mark.parametrize("raw, expected", [
    ({}, {"num_key_value_heads": 4, "head_dim": 8, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}),
    ({"model_type": "qwen3"}, {"head_dim": 128}), ({"model_type": "qwen3", "head_dim": None}, {"head_dim": 8}),
    ({"model_type": "qwen2", "attention_bias": True, "mlp_bias": True}, {"attention_bias": False, "mlp_bias": False}),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, {"rope_theta": 5e5, "rope_scaling": None}),
    ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}, {"rope_theta": 7e5}),
    ({"layer_types": ["full_attention"], "sliding_window": 9, "use_sliding_window": False}, {})])
def test_config_defaults_and_dialects(raw, expected):
    base = {"model_type": "llama", "vocab_size": 9, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 4}
    config = lm.parse_config(json.dumps(base | raw).encode())
    assert {key: getattr(config, key) for key in expected} == expected


def test_tensors_that_do_not_fit(checkpoint):
    path = checkpoint("llama-biases") / "model.safetensors"
    good, name = lm.read_safetensors(path), "model.norm.weight"
    for change in ({name: good[name][:-1].clone()}, {name: good[name].int()}, {"other": good[name]}, {name: None}):
        lm.write_safetensors(path, {k: t for k, t in (good | change).items() if t is not None})
        with pytest.raises(ValueError, match="other" if "other" in change else name):
            lm.load_pretrained(path.parent)
    lm.write_safetensors(path, good | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    lm.load_pretrained(path.parent)  # old Llama files hold it
    path = checkpoint("qwen2-tied") / "model.safetensors"
    good = lm.read_safetensors(path)
    embedding = good["model.embed_tokens.weight"]
    lm.write_safetensors(path, good | {"lm_head.weight": embedding})
    assert "lm_head.weight" not in lm.load_pretrained(path.parent)[0].state_dict()


@pytest.mark.parametrize("spoil", ["outside", "absent", "null", "elsewhere", "missing", "extra", "twice", "no map"])
def test_shards_refused(spoil, checkpoint):
    directory = checkpoint("qwen2-untied")
    index = directory / "model.safetensors.index.json"
    homes = json.loads(index.read_text())["weight_map"]
    name, (first, second) = next(iter(homes)), sorted(set(homes.values()))
    other = second if homes[name] == first else first
    if spoil == "twice":
        tensor = lm.read_safetensors(directory / homes[name])[name]
        lm.write_safetensors(directory / other, lm.read_safetensors(directory / other) | {name: tensor})
    homes |= {"outside": {name: "../" + homes[name]}, "absent": {name: "none.safetensors"}, "null": {name: None},
              "elsewhere": {name: other}, "extra": {"more": first}}.get(spoil, {})
    if spoil == "missing":
        del homes[name]
    index.write_text(json.dumps({} if spoil == "no map" else {"weight_map": homes}))
    with pytest.raises((OSError, ValueError)):
        lm.load_pretrained(directory)


def read_tokenizer(name):
    return json.loads((DATA / f"tokenizer-{name}.json").read_text())


@pytest.mark.parametrize("name", ["chatml-nfc", "digits", "headers", "gpt2"])
def test_golden_tokens(name):
    raw = read_tokenizer(name)
    tokenizer = lm.Tokenizer(json.dumps(raw["tokenizer"]).encode())
    for text, ids in raw["expected"]:
        assert tokenizer.encode(text) == ids, text
    control = "".join(tokenizer.special)  # typed, it stays text
    assert not {*tokenizer.special.values()} & {*tokenizer.encode(control)}
    assert tokenizer.decode([*tokenizer.special.values()]) == tokenizer.decode(tokenizer.encode(control)) == control
    assert tokenizer.decode([10 ** 12, -1]) == "" and tokenizer.encode("a\ud800b")


def prompt(name, model_type="llama", think=False):
    tokenizer = lm.Tokenizer(json.dumps(read_tokenizer(name)["tokenizer"]).encode(), [0], model_type)
    ids = tokenizer.prefix("go.") + tokenizer.suffix("P _", think)
    assert all(ids.count(i) == tokenizer.decode(ids).count(name) for name, i in tokenizer.special.items())
    return tokenizer.decode(ids), sorted(tokenizer.decode([i]) for i in tokenizer.end_ids - {0})


def test_prompts_of_the_chat_templates():
    chatml = "<|im_start|>user\ngo.\n\nP _<|im_end|>\n<|im_start|>assistant\n"
    for got in (prompt("digits"), prompt("digits", "qwen3"), prompt("chatml-nfc"), prompt("chatml-nfc", "qwen3", True)):
        assert got == (chatml, ["<|im_end|>"])
    assert prompt("chatml-nfc", "qwen3")[0] == chatml + "<think>\n\n</think>\n\n"
    assert prompt("gpt2") == ("go.\n\nP _\n", [])
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    llama = "<|begin_of_text|>" + header.format("user") + "go.\n\nP _<|eot_id|>" + header.format("assistant")
    assert prompt("headers") == (llama, ["<|eot_id|>"])


@pytest.mark.parametrize("spoil", [
    lambda raw: raw["model"].update(type="Unigram"), lambda raw: raw["model"].update(byte_fallback=True),
    lambda raw: raw.update(normalizer={"type": "Lowercase"}), lambda raw: raw.update(pre_tokenizer={"type": "Metaspace"}),
    lambda raw: raw.update(pre_tokenizer=None), lambda raw: raw["pre_tokenizer"].update(add_prefix_space=True),
    lambda raw: raw["model"]["merges"].reverse(), lambda raw: raw["model"]["merges"].pop(),
    lambda raw: raw["model"]["merges"].append(["no", "such"]), lambda raw: raw["model"]["vocab"].update(a=1),
    lambda raw: raw["model"]["vocab"].update(a=1.5), lambda raw: raw["model"]["vocab"].update({"\u4e00": 9999}),
    lambda raw: raw["model"]["vocab"].update({"": 9999}), lambda raw: raw["model"].update(vocab=[]),
    lambda raw: raw["added_tokens"][0].update(id=1), lambda raw: raw.pop("added_tokens"), lambda raw: raw.pop("model"),
    lambda raw: raw["added_tokens"][0].update(id=1 << 40), lambda raw: raw["added_tokens"].append(5)])
def test_tokenizer_refused(spoil, checkpoint):
    directory, raw = checkpoint("llama-biases"), read_tokenizer("gpt2")["tokenizer"]
    edit(directory / "config.json", vocab_size=400)
    tensors = lm.read_safetensors(directory / "model.safetensors")
    lm.write_safetensors(directory / "model.safetensors", tensors | {
        name: torch.zeros(400, 8) for name in ("model.embed_tokens.weight", "lm_head.weight")})
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    assert lm.load_pretrained(directory)[1].encode("the")
    spoil(raw)
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="tokenizer.json"):
        lm.load_pretrained(directory)


def small_model():
    texts = ["<action>", "left", " left", "P", " _", "\n", " G", " é", "</action>"]
    tokenizer = lm.tiny_tokenizer(texts, "</action>")
    torch.manual_seed(0)
    return lm.Transformer(lm.Config("llama", tokenizer.size, 16, 24, 1, 2, 1, 8, tie_word_embeddings=True)), tokenizer


def test_tiny_tokenizer_and_save(tmp_path):
    model, tokenizer = small_model()
    assert len(tokenizer.encode("<action>left</action> left P _\n")) == 8 and tokenizer.size == 256 + 7
    lm.save_pretrained(tmp_path, model, tokenizer)
    again, back = lm.load_pretrained(tmp_path)
    ids = torch.tensor([tokenizer.encode("Go <left> 日本 left\n<|end|>")])
    assert back.json == tokenizer.json and [tokenizer.decode([i]) for i in back.end_ids] == ["</action>"]
    assert torch.equal(again(ids), model(ids)) and back.decode(ids[0].tolist()) == "Go <left> 日本 left\n<|end|>"


def test_other_files_are_carried_over_and_old_ones_go(checkpoint, tmp_path):
    directory, new = checkpoint("qwen2-untied"), tmp_path / "new"
    edit(directory / "config.json", unknown=[1], eos_token_id=[3, 4])
    (directory / "generation_config.json").write_text('{"eos_token_id": 5}')
    (directory / "tokenizer.json").write_text(json.dumps(read_tokenizer("gpt2")["tokenizer"]))
    with pytest.raises(ValueError, match="vocab_size"):
        lm.load_pretrained(directory)
    (directory / "tokenizer.json").unlink()
    (directory / "notes.json").write_text("{}")
    lm.save_pretrained(new, lm.load_pretrained(directory)[0], None)
    raw = json.loads((new / "config.json").read_text())
    assert (raw["unknown"], raw["eos_token_id"], raw["torch_dtype"]) == ([1], [3, 4], "float32")
    assert {p.name for p in new.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    lm.save_pretrained(directory, *small_model())  # over the shards of another model
    assert {p.name for p in directory.iterdir()} == {"config.json", "model.safetensors", "notes.json", "tokenizer.json",
                                                     "tokenizer_config.json"}


# The command line

def command(*argv):
    """Exit status of train.py."""
    try:
        return train.main([*map(str, argv)])
    except SystemExit as leaving:
        return leaving.code


@pytest.fixture(autouse=True)
def undisturbed():
    """A run sets the threads and, where it is killed, leaves its handler of Ctrl-C."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A tiny run, warmed up just enough to give answers of the right form; it cannot play."""
    out = tmp_path_factory.mktemp("runs") / "warm"
    assert command("--tiny", "--out", out, "--iterations", 2, "--groups", 4, "--group-size", 4, "--warmup-steps", 60,
                   "--eval-episodes", 20, "--eval-every", 2, "--seed", 7) == 0
    return out


@pytest.fixture
def few_maps(monkeypatch):
    maps, weights = frozenlake.held_out_maps(SCENARIOS["noslip"])
    monkeypatch.setattr(frozenlake, "held_out_maps", lambda scenario: (maps[:3], weights[:3] / sum(weights[:3])))


QUICK = ("--iterations", 4, "--groups", 4, "--group-size", 4, "--eval-episodes", 1, "--checkpoint-every", 2,
         "--learning-rate", .01, "--max-new-tokens", 3, "--update-episodes", 4, "--dtype", "float32", "--device", "cpu",
         "--invalid-penalty", .5, "--final-learning-rate", .5)


def results(out):
    """What a run found: metrics and summary without the readings of clocks and of memory, and the weights."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    facts = [{k: v for k, v in record.items() if "second" not in k and "memory" not in k} for record in (*metrics, summary)]
    return facts, (out / "model/model.safetensors").read_bytes()


def test_a_run_leaves_what_it_promises(warm, capsys):
    settings = json.loads((warm / "settings.json").read_text())
    assert settings.keys() == {f.name for f in fields(train.Settings)} and settings["seed"] == 7
    assert all(settings[key] == value for key, value in train.TINY.items()
               if key not in ("iterations", "groups", "group_size", "warmup_steps"))
    metrics, summary = results(warm)[0][:-1], json.loads((warm / "summary.json").read_text())
    assert [m["iteration"] for m in metrics] == [1, 2] and summary["seed"] == 7 and 0 < summary["seconds"] < 600
    assert {"success", "return", "steps", "valid", "truncated", "entropy", "zero_variance_groups", "clip_share",
            "grad_norm", "drawn_episodes", "trained_episodes", "groups_without_success"} <= metrics[0].keys()
    assert metrics[1]["unseen_success"] == summary["unseen_success"]
    unseen = summary["scenarios"]["noslip"]
    assert unseen["success"] == summary["unseen_success"] and unseen["unweighted"] == summary["unseen_success_unweighted"]
    assert unseen["episodes"] == 503 and summary["optimal_success"] == pytest.approx(1) and unseen["half_interval"] == 0
    assert .004 < summary["random_success"] < .008 and summary["scenarios"].keys() == SCENARIOS.keys()
    assert summary["before"]["valid"] > .8 and summary["before"]["success"] < .03  # it was taught to speak, not to play
    model, tokenizer = lm.load_pretrained(warm / "model")
    before, ends = snapshot(warm), {tokenizer.decode([i]) for i in tokenizer.end_ids}
    assert model(torch.tensor([tokenizer.encode("P _")])).isfinite().all() and ends == {"</action>"}
    assert command("--eval", warm, "--eval-episodes", 20) == 0 and command("--eval", warm / "model", "--eval-episodes", 1,
                                                                           "--max-new-tokens", 3) == 0
    rows = re.findall(r"^noslip +(\S+) .* (\d+) episodes", capsys.readouterr().out, re.MULTILINE)
    assert rows == [(f"{summary['unseen_success']:.4f}", "503")] * 2
    assert command("--play", warm) == 0
    assert "P is you" in (shown := capsys.readouterr().out) and "<action>" in shown and "the goal in" in shown
    assert command("--resume", warm) == 0 and snapshot(warm) == before


def test_runs_are_numbered(warm, few_maps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert command("--checkpoint", warm, *QUICK, "--iterations", 1) == 0
    first, second = sorted((tmp_path / "runs").iterdir())
    assert results(first) == results(second)  # the same seed


def test_what_is_trained_on(warm, few_maps, tmp_path, monkeypatch):
    """Groups share a map and not their luck, no map is reserved, and every episode keeps its own group's advantage."""
    games, groups, updates, play, accumulate, advantages = [], [], [], msgrpo.play, msgrpo.accumulate_gradient, {}

    def playing(policy, lakes, greedy=False):
        luck = [json.dumps(lake.rng.bit_generator.state, default=str) for lake in lakes]
        episodes = play(policy, lakes, greedy)
        if len(lakes) == 24:  # the evaluations are smaller
            games.append(([lake.tiles for lake in lakes], luck))
            returns = torch.tensor([sum(step.reward for step in e.steps) for e in episodes]).view(4, 6)
            groups.append(returns)
            normal = (returns - returns.mean(1, keepdim=True)) / (returns.std(1, correction=0, keepdim=True) + 1e-6)
            advantages.update({id(e): (e, a) for e, a in zip(episodes, normal.flatten().tolist(), strict=True)})
        return episodes

    def accumulating(policy, episodes, given, **kwargs):
        updates.append(len(episodes))
        for episode, advantage in zip(episodes, given, strict=True):
            assert float(advantage) == pytest.approx(advantages[id(episode)][1], abs=1e-4) and advantage != 0
        return accumulate(policy, episodes, given, **kwargs)
    monkeypatch.setattr(msgrpo, "play", playing)
    monkeypatch.setattr(msgrpo, "accumulate_gradient", accumulating)
    assert command("--checkpoint", warm, "--out", tmp_path / "a", *QUICK, "--group-size", 6, "--scenario", "slippery",
                   "--step-cost", .01, "--temperature", 1.5) == 0
    assert len(games) == 4 and len({luck for _, lucks in games for luck in lucks}) == 96
    for tiles, _ in games:
        maps = [tiles[i:i + 6] for i in range(0, 24, 6)]
        assert all(len({*group}) == 1 for group in maps) and len({*tiles}) > 1
        assert not any(frozenlake.is_held_out([t[i:i + 4] for i in range(0, 16, 4)]) for t in tiles)
    assert sum(updates) == sum(min(12, int((r != r[:, :1]).any(1).sum()) * 6) for r in groups) and max(updates) <= 5


CHANGES = {  # for every setting a value that is not QUICK's
    "seed": 1, "iterations": 3, "scenario": "big", "min_frozen": .3, "replay": 1.0, "groups": 2, "group_size": 2,
    "sampling": "uniform", "keep": .2, "update_episodes": 2, "gamma": .5, "normalize_std": False, "clip": .001,
    "entropy_coef": .5, "learning_rate": .002, "final_learning_rate": 0.0, "beta2": .5, "weight_decay": 9.0,
    "grad_clip": 1e-9, "temperature": .8, "max_new_tokens": 2, "think": True, "coordinates": True,
    "invalid_penalty": 5.0, "step_cost": 1.0, "micro_batch_tokens": 10, "dtype": "bfloat16", "eval_every": 1,
    "eval_episodes": 2, "warmup_steps": 1}
ELSEWHERE = {"checkpoint", "checkpoint_every", "device", "threads", "recompute"}  # change no figure; tested by themselves


@pytest.fixture(scope="module")
def quick_results(warm, tmp_path_factory):
    cache = {}

    def find(*flags):
        if flags not in cache:
            out = tmp_path_factory.mktemp("quick") / "run"
            assert command("--checkpoint", warm, "--out", out, *QUICK, "--iterations", 2, *flags) == 0
            cache[flags] = results(out)[0]
        return cache[flags]
    return find


@pytest.mark.parametrize("name", CHANGES)
def test_every_flag_changes_something(name, quick_results, few_maps):
    flag, value = f"--{name.replace('_', '-')}", CHANGES[name]
    flags = (flag if value else f"--no-{flag[2:]}",) if isinstance(value, bool) else (flag, value)
    assert quick_results(*flags) != quick_results()


def test_flags_that_change_no_figure(warm, few_maps, tmp_path, quick_results, monkeypatch):
    assert {f.name for f in fields(train.Settings)} == CHANGES.keys() | ELSEWHERE
    layers, run, threads, count = [], lm.checkpoint, [], torch.set_num_threads
    monkeypatch.setattr(lm, "checkpoint", lambda layer, *args, **kw: layers.append(layer) or run(layer, *args, **kw))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: threads.append(n) or count(n))
    quick_results("--recompute", "--threads", 2)
    assert layers and threads == [2]


REFUSALS = {  # use: words of the message; RUN and STOPPED are runs, the other folders what their names say
    "--tiny --nonsense": "--nonsense", "--tiny --gamma 2": "gamma", "--tiny --gamma nan": "gamma", "--tiny --groups 0": "groups",
    "--tiny --sampling best": "sampling", "--tiny --iterations x": "iterations", "--tiny extra": "extra", "": "--tiny",
    "--tiny --iter 3": "--iter", "--tiny --checkpoint RUN": "not allowed", "--resume STOPPED --seed 3": "seed",
    "--resume STOPPED --out OTHER": "out", "--resume NOWHERE": "NOWHERE", "--resume FOREIGN": "FOREIGN",
    "--resume EMPTY": "EMPTY", "--eval NOWHERE": "NOWHERE", "--eval FOREIGN": "FOREIGN", "--play EMPTY": "EMPTY",
    "--eval RUN --gamma .5": "gamma", "--checkpoint FOREIGN": "FOREIGN", "--tiny --out RUN": "RUN",
    "--tiny --out FOREIGN": "FOREIGN", "--tiny --out FOREIGN/notes.txt": "notes.txt", "--tiny --out /proc/x": "/proc/x",
    "--tiny --device banana --out OTHER": "banana", "--tiny --device cuda:99 --out OTHER": "", "--resume CUTSTATE": "state.pt", "--eval CUTMODEL": "model.safetensors",
    "--checkpoint CUTMODEL": "model.safetensors", "--resume CUTSETTINGS": "settings.json"}


HOMES = {"RUN", "STOPPED", "CUTSTATE", "CUTMODEL", "CUTSETTINGS", "EMPTY", "FOREIGN"}


@pytest.fixture(scope="module")
def homes(warm, tmp_path_factory):
    home = tmp_path_factory.mktemp("homes")
    for name in HOMES - {"EMPTY", "FOREIGN"}:
        shutil.copytree(warm, home / name)
        if name in ("STOPPED", "CUTSTATE", "CUTSETTINGS"):
            (home / name / "summary.json").unlink()
    for path in ("CUTSTATE/state.pt", "CUTMODEL/model/model.safetensors", "CUTSETTINGS/settings.json"):
        os.truncate(home / path, (home / path).stat().st_size // 2)
    for name in ("EMPTY", "FOREIGN"):
        (home / name).mkdir()
    (home / "FOREIGN/notes.txt").write_text("mine")
    return home


@pytest.mark.parametrize("use", REFUSALS)
def test_refusals(use, homes, capfd, monkeypatch):
    monkeypatch.chdir(homes)
    before = snapshot(homes)  # a new folder may remain
    assert command(*use.split()) == 2
    assert not {path.name for path in homes.iterdir()} - HOMES - {"OTHER", "runs"}
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and REFUSALS[use] in lines[0] and "Traceback" not in lines[0], lines
    assert before.items() <= snapshot(homes).items()
    for new in ("OTHER", "runs"):
        shutil.rmtree(new, ignore_errors=True)


# Resume

class Killed(BaseException):
    pass


def at(monkeypatch, module, name, call, act):
    """Have the numbered call of module.name act first."""
    calls, function = itertools.count(1), getattr(module, name)

    def acting(*args, **kwargs):
        if next(calls) == call:
            act(*args)
        return function(*args, **kwargs)
    monkeypatch.setattr(module, name, acting)


def kill(*_):
    raise Killed


def kill_while_saving(state, file):
    file.write(b"half a state")
    raise Killed


@pytest.fixture(scope="module")
def never_stopped(warm, tmp_path_factory):
    found = {}

    def find(*flags):
        if flags not in found:
            out = tmp_path_factory.mktemp("whole") / "run"
            assert command("--checkpoint", warm, "--out", out, *QUICK, *flags) == 0
            found[flags] = results(out)
        return found[flags]
    return find


@pytest.mark.parametrize("name, call, flags", [
    ("episode_advantages", 1, ()), ("episode_advantages", 2, ()), ("episode_advantages", 4, ()),
    ("save", 2, ()), ("save_pretrained", 1, ()), ("play", 7, ()),
    ("episode_advantages", 4, ("--dtype", "bfloat16", "--replay", .5))])
def test_killed_and_resumed_is_never_stopped(name, call, flags, warm, never_stopped, few_maps, tmp_path):
    out, expected = tmp_path / "a", never_stopped(*flags)
    module = torch if name == "save" else lm if name == "save_pretrained" else msgrpo
    with pytest.MonkeyPatch.context() as patch:
        at(patch, module, name, call, kill_while_saving if name == "save" else kill)
        with pytest.raises(Killed):
            command("--checkpoint", warm, "--out", out, *QUICK, *flags)
    if (out / "metrics.jsonl").exists():  # as if killed while it wrote a line
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"iterat')
    assert not (out / "summary.json").exists()
    torch.set_num_threads(2)  # those of the run count, not those of its resumption
    torch.manual_seed(99)
    assert command("--resume", out) == 0 and results(out) == expected


def test_interrupted_and_resumed_is_never_stopped(warm, never_stopped, few_maps, tmp_path, monkeypatch, capsys):
    out, expected = tmp_path / "a", never_stopped()
    for argv, call in ((("--checkpoint", warm, "--out", out, *QUICK), 1), (("--resume", out), 2)):
        with pytest.MonkeyPatch.context() as patch:
            at(patch, msgrpo, "episode_advantages", call, lambda *_: os.kill(os.getpid(), signal.SIGINT))
            assert command(*argv) == 130
        assert len((out / "metrics.jsonl").read_text().splitlines()) == 1 + 2 * (call == 2)  # it ends the iteration
    with pytest.MonkeyPatch.context() as patch:  # twice: at once
        at(patch, msgrpo, "episode_advantages", 1, lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
        assert command("--resume", out) == 130
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3 and "Traceback" not in capsys.readouterr().err
    assert command("--resume", out) == 0 and results(out) == expected


def test_tiny_resumes_before_its_first_state(few_maps, tmp_path):
    flags = ("--tiny", "--iterations", 1, "--groups", 2, "--group-size", 2, "--warmup-steps", 3, "--eval-episodes", 1,
             "--sampling", "all")
    assert command(*flags, "--out", tmp_path / "whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        at(patch, msgrpo, "episode_advantages", 1, kill)
        with pytest.raises(Killed):
            command(*flags, "--out", tmp_path / "killed")
    assert command("--resume", tmp_path / "killed") == 0 and results(tmp_path / "killed") == results(tmp_path / "whole")


def test_checkpoint_of_another_make(checkpoint, few_maps, tmp_path):
    """A sharded Qwen2 directory, with more rows than tokens, is trained and saved as a directory that loads."""
    directory, out = checkpoint("qwen2-untied"), tmp_path / "run"
    assert command("--checkpoint", directory, "--out", out) == 2  # no tokenizer.json
    shutil.rmtree(out)
    model, _ = lm.load_pretrained(directory)
    tokenizer = lm.Tokenizer(json.dumps(read_tokenizer("digits")["tokenizer"]).encode(), [0])
    torch.manual_seed(0)
    model = lm.Transformer(lm.replace(model.config, vocab_size=tokenizer.size + 9))
    lm.save_pretrained(directory, model, tokenizer)
    (directory / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    assert command("--checkpoint", directory, "--out", out, "--iterations", 1, "--groups", 2, "--group-size", 2, "--sampling",
                   "all", "--max-new-tokens", 4, "--eval-episodes", 1, "--entropy-coef", .1, "--coordinates") == 0
    trained, same = lm.load_pretrained(out / "model")
    assert same.json == tokenizer.json and same.end_ids == {0, 5, tokenizer.special["<|im_end|>"]}
    assert (out / "model/generation_config.json").read_bytes() == (directory / "generation_config.json").read_bytes()
    changes = [(a - b).abs().max().item() for a, b in zip(model.parameters(), trained.parameters(), strict=True)]
    assert 0 < max(changes) < 3e-6 and next(trained.parameters()).dtype == torch.float32


# Learning

def test_a_corridor_is_learned():
    """Another game, another vocabulary, no warm-up: from one success in three or so to nearly always."""
    source = (HERE / "msgrpo.py").read_text()
    assert {*re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)} <= {"dataclasses", "typing", "numpy", "torch"}
    agent, success = corridor_agent(std=.2), []
    optimizer = torch.optim.Adam(agent.model.parameters(), lr=.005)
    for i in range(40):
        games = [Corridor(("west", "east")[g % 2], 2 + g // 2 % 2, i, g, j) for g in range(8) for j in range(16)]
        agent.refresh()
        episodes = msgrpo.play(agent, games)
        success.append(sum(episode.success for episode in episodes) / 128)
        returns = torch.tensor([episode.total_reward for episode in episodes]).view(8, 16)
        advantages = msgrpo.episode_advantages(returns).flatten()
        drawn = msgrpo.draw_episodes(advantages, "aaw", 64, np.random.default_rng(i))
        msgrpo.accumulate_gradient(agent, [episodes[i] for i in drawn], advantages[drawn], entropy_coef=.05)
        optimizer.step()
        optimizer.zero_grad()
    assert np.mean(success[:3]) < .45 and np.mean(success[-5:]) > .9, success


def test_a_frozen_lake_is_learned(warm, few_maps, tmp_path, monkeypatch):
    """All of train.py on one map, where a random player has .02."""
    desc, draw = ["SFFF", "FFFF", "FFFF", "FFFG"], frozenlake.draw_map
    monkeypatch.setattr(frozenlake, "draw_map", lambda s, rng, held_out=False: draw(s, rng, True) if held_out else desc)
    assert command("--checkpoint", warm, "--out", tmp_path / "a", *QUICK, "--iterations", 18, "--group-size", 32,
                   "--learning-rate", .003, "--temperature", 1, "--update-episodes", 16, "--entropy-coef", .02) == 0
    success = [json.loads(line)["success"] for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert np.mean(success[:3]) < .05 and np.mean(success[-5:]) > .3, success
