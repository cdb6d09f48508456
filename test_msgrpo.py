"""All tests, from the method outwards: arithmetic, the game, rollouts, the loss, the model, what is
trained, evaluation, the command line, resuming, several processes, learning.

What can be computed in a second, slower way is compared with that. What only transformers knows
lies in testdata/, made by testdata/golden.py. Runs of train.py are calls of train.main.
"""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import random
import re
import resource
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
from msgrpo import Answer, Step

DATA = Path(__file__).parent / "testdata"


@pytest.fixture(autouse=True)
def one_thread():
    """A run sets the number of threads."""
    torch.set_num_threads(1)


def near(count, n, p):
    """Is a count that of n draws of probability p, within four standard deviations?"""
    return abs(count - n * p) <= 4 * (n * p * (1 - p)) ** 0.5


# The method: advantages, credit, the draw


@pytest.mark.parametrize(
    "returns, normalize_std, expected",
    [
        ([[0, 0, 0, 1]], False, [[-0.25, -0.25, -0.25, 0.75]]),
        ([[0, 0, 0, 1]], True, [[-(3**-0.5)] * 3 + [3**0.5]]),  # the population's std: sqrt(3) / 4
        ([[1, 2], [30, 10]], False, [[-0.5, 0.5], [10, -10]]),  # each group by itself
        ([[1, 2], [30, 10], [5, 5]], True, [[-1, 1], [1, -1], [0, 0]]),
    ],
)
def test_advantages_by_hand(returns, normalize_std, expected):
    found = msgrpo.episode_advantages(torch.tensor(returns), normalize_std)
    torch.testing.assert_close(found, torch.tensor(expected).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("value", [0, 1, 0.1, 1 / 3, -0.7, 1e6 + 0.1])
def test_a_group_of_equal_returns_has_exactly_no_advantage(value, normalize_std):
    for size in range(2, 18):
        returns = torch.full((3, size), value)
        assert not msgrpo.episode_advantages(returns, normalize_std).any()


@pytest.mark.parametrize(
    "gamma, of_four_steps, of_three_steps",
    [
        (1.0, [8, 8, 8, 8], [2, 2, 2]),
        (0.5, [1, 2, 4, 8], [0.5, 1, 2]),
        (0.0, [0, 0, 0, 8], [0, 0, 2]),
    ],
)
def test_credit_fades_with_the_distance_from_the_end(gamma, of_four_steps, of_three_steps):
    """And an episode's number of steps does not change what its last ones are paid."""
    episodes = [[Step(Answer((1,), (2,))) for _ in range(count)] for count in (4, 3)]
    msgrpo.assign_credit(episodes, torch.tensor([8.0, 2.0]), gamma)
    credit = [[step.credit for step in episode] for episode in episodes]
    assert credit == [of_four_steps, of_three_steps]


def test_aaw_probabilities_by_hand():
    found = msgrpo.aaw_probabilities(torch.tensor([1.0, -2, 0, 1]))
    assert found.tolist() == [0.25, 0.5, 0, 0.25]
    with pytest.raises(ValueError, match="zero"):
        msgrpo.aaw_probabilities(torch.zeros(4))


DRAWN_FROM = torch.tensor([0, 1, -2, 0, 0.5, -0.5])


@pytest.mark.parametrize(
    "sampling, count, probabilities",
    [("aaw", 1, [0, 1 / 4, 1 / 2, 0, 1 / 8, 1 / 8]), ("uniform", 3, [1 / 2] * 6)],
)
def test_draws_have_their_frequencies(sampling, count, probabilities):
    rng = np.random.default_rng(0)
    counts = Counter()
    for _ in range(3000):
        counts.update(msgrpo.draw_episodes(DRAWN_FROM, sampling, count, rng))
    for i, p in enumerate(probabilities):
        assert near(counts[i], 3000, p)


@pytest.mark.parametrize("count", [3, 6])
def test_aaw_draws_no_episode_twice_and_none_without_advantage(count):
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        drawn = msgrpo.draw_episodes(DRAWN_FROM, "aaw", count, rng)
        assert len(drawn) == min(count, 4)
        assert drawn == sorted(set(drawn))
        seen.update(drawn)
    assert seen == {1, 2, 4, 5}


def test_draws_at_their_limits():
    rng = np.random.default_rng(0)
    assert msgrpo.draw_episodes(torch.zeros(6), "aaw", 3, rng) == []
    assert msgrpo.draw_episodes(DRAWN_FROM, "uniform", 9, rng) == [0, 1, 2, 3, 4, 5]
    assert msgrpo.draw_episodes(DRAWN_FROM, "all", 3, rng) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="unifrom"):
        msgrpo.draw_episodes(DRAWN_FROM, "unifrom", 3, rng)


# The game

MAPS = {  # Gymnasium's two
    "4x4": "SFFF FHFH FFFH HFFG".split(),
    "8x8": "SFFFFFFF FFFFFFFF FFFHFFFF FFFFFHFF FFFHFFFF FHHFFFHF FHFFHFHF FFFHFFFG".split(),
}


@pytest.mark.parametrize(
    "name, success_rate, steps, optimal, uniform",
    [
        ("4x4", 1 / 3, 100, 0.7442, 0.0139),
        ("4x4", 0.8, 100, 0.8940, 0.0139),
        ("8x8", 1 / 3, 200, 0.9132, 0.0019),
    ],
)
def test_baselines_are_the_known_ones(name, success_rate, steps, optimal, uniform):
    found = frozenlake.baselines([FrozenLake(MAPS[name], success_rate, steps)])
    assert found["optimal"] == pytest.approx([optimal], abs=5e-5)
    assert found["random"] == pytest.approx([uniform], abs=5e-5)


@pytest.mark.parametrize(
    "success_rate, state, action, expected",
    [
        (1, 0, 1, [(1, 4, 0, False)]),
        (1, 4, 2, [(1, 5, 0, True)]),
        (1, 14, 2, [(1, 15, 1, True)]),
        (1, 15, 0, [(1, 15, 0, True)]),
        (1, 3, 2, [(1, 3, 0, False)]),
        (1 / 3, 0, 0, [(1 / 3, 0, 0, False), (1 / 3, 0, 0, False), (1 / 3, 4, 0, False)]),
        (1 / 3, 14, 2, [(1 / 3, 14, 0, False), (1 / 3, 15, 1, True), (1 / 3, 10, 0, False)]),
        (0.8, 6, 3, [(0.1, 7, 0, True), (0.8, 2, 0, False), (0.1, 5, 0, True)]),
        (0.8, 13, 0, [(0.1, 9, 0, False), (0.8, 12, 0, True), (0.1, 13, 0, False)]),
    ],
)
def test_transitions_are_gymnasiums(success_rate, state, action, expected):
    found = FrozenLake(MAPS["4x4"], success_rate).transitions(state, action)
    assert [outcome[1:] for outcome in found] == [outcome[1:] for outcome in expected]
    assert [outcome[0] for outcome in found] == pytest.approx([outcome[0] for outcome in expected])


def test_slips_have_their_frequencies():
    rng = np.random.default_rng(0)
    counts = Counter()
    for _ in range(3000):
        lake = FrozenLake(MAPS["4x4"], 0.8, rng=rng)
        lake.state = 6
        lake.step("<action>up</action>")
        counts[lake.state] += 1
    assert near(counts[2], 3000, 0.8)
    assert near(counts[5], 3000, 0.1)
    assert near(counts[7], 3000, 0.1)


@pytest.mark.parametrize("text, draws", [("<action>left</action>", 1), ("up", 0)])
def test_a_valid_move_takes_one_draw(text, draws):
    rng = np.random.default_rng(1)
    twin = np.random.default_rng(1)
    FrozenLake(MAPS["4x4"], 0.8, rng=rng).step(text)
    twin.random(draws)
    assert rng.random() == twin.random()


def test_episodes_and_their_rewards():
    lake = FrozenLake(["SF", "HG"], max_steps=4, invalid_penalty=0.5)
    assert lake.step("left") == (-0.5, False, False)
    assert lake.state == 0
    assert lake.step("<action>right</action>") == (0, False, True)
    assert not lake.success
    assert lake.step("<action>down</action>") == (1, True, True)
    assert lake.success

    lake = FrozenLake(["SF", "HG"])
    assert lake.step("<action>down</action>") == (0, True, True)  # a hole
    assert not lake.success

    lake = FrozenLake(["SF", "HG"], max_steps=2)
    assert lake.step("<action>left</action>") == (0, False, True)
    assert lake.step("nonsense") == (0, True, False)  # the horizon
    assert lake.step("nonsense") == (0, True, False)  # and beyond


@pytest.mark.parametrize(
    "text, action",
    [
        ("<action>left</action>", 0),
        ("<action>down</action>", 1),
        ("<action>right</action>", 2),
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
        ("\ud800<action>up</action>", 3),
        ("<action>3</action>", None),
        ("<action>up</action><action>", None),
        ("<action>left</action><action>nowhere</action>", None),
    ],
)
def test_parser(text, action):
    assert frozenlake.parse_action(text) == action


def test_parser_takes_any_text():
    """Pieces of answers and any characters, in any order."""
    rng = np.random.default_rng(0)
    pieces = ["<action>", "</action>", *ACTIONS, "UP", " ", "\n", "<", ">", "/", "\0", "\ud800"]
    found = set()
    for _ in range(20_000):
        chosen = [pieces[i] for i in rng.integers(len(pieces), size=rng.integers(8))]
        text = "".join([*chosen, chr(rng.integers(0x110000))])
        action = frozenlake.parse_action(text)
        found.add(action)
        if action is not None:
            bare = text.lower().replace(" ", "").replace("\n", "")
            assert f"<action>{ACTIONS[action]}</action>" in bare
    assert found == {None, 0, 1, 2, 3}


def scenario_lake(name, **options):
    scenario = SCENARIOS[name]
    desc = frozenlake.draw_map(scenario, np.random.default_rng(0))
    return FrozenLake(desc, scenario.success_rate, scenario.max_steps, **options)


@pytest.mark.parametrize("name", SCENARIOS)
def test_instructions_say_what_is_so(name):
    scenario = SCENARIOS[name]
    text = scenario_lake(name).instructions
    slips = scenario.success_rate < 1
    assert f"{scenario.size} rows and {scenario.size} columns" in text
    assert f"{scenario.max_steps} steps" in text
    assert ("not slippery" in text) != slips
    assert text.count("probability 0.33") == (2 if slips else 0)
    assert "<action>" in text
    assert all(word in text for word in ACTIONS)
    assert "<think>" not in text
    assert "<think>" in scenario_lake(name, think=True).instructions


def test_instructions_name_the_probabilities_of_slips():
    text = FrozenLake(MAPS["4x4"], 0.8).instructions
    assert "with probability 0.80, and to either side of it with probability 0.10 each" in text


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_observation_tells_the_whole_state(name):
    size = SCENARIOS[name].size
    lake = scenario_lake(name)
    for state, under_player in enumerate(lake.tiles):
        lake.state = state
        grid = lake.observation()
        cells = grid.split()
        assert [len(row) for row in grid.split("\n")] == [2 * size - 1] * size
        assert cells.index("P") == state
        letters = {"_": "F", "O": "H", "G": "G", "P": under_player}
        tiles = "".join(letters[cell] for cell in cells)
        assert tiles.replace("S", "F") == lake.tiles.replace("S", "F")


@pytest.fixture(scope="module")
def solvable_maps():
    """Every solvable 4x4 map: {rows: its probability at p = 0.8, where all of them have 1}."""
    masses = {}
    for inner in itertools.product("FH", repeat=14):
        tiles = "S" + "".join(inner) + "G"
        desc = (tiles[:4], tiles[4:8], tiles[8:12], tiles[12:])
        if 0 in frozenlake.distances(desc):
            masses[desc] = 0.8 ** inner.count("F") * 0.2 ** inner.count("H")
    total = sum(masses.values())
    return {desc: mass / total for desc, mass in masses.items()}


def test_held_out_maps_are_an_eighth(solvable_maps):
    held_out = [desc for desc in solvable_maps if frozenlake.is_held_out(desc)]
    mass = sum(solvable_maps[desc] for desc in held_out)
    assert len(solvable_maps) == 3828
    assert len(held_out) == 503
    assert mass == pytest.approx(0.124, abs=5e-4)

    maps, weights = frozenlake.held_out_maps(SCENARIOS["noslip"])
    expected = {desc: solvable_maps[desc] / mass for desc in held_out}
    assert dict(zip(map(tuple, maps), weights)) == pytest.approx(expected)


def test_random_maps_have_their_frequencies(solvable_maps):
    rng = np.random.default_rng(0)
    drawn = [tuple(frozenlake.random_map(4, 0.8, rng)) for _ in range(3000)]
    assert set(drawn) <= solvable_maps.keys()
    for holes in range(5):
        p = sum(p for desc, p in solvable_maps.items() if str(desc).count("H") == holes)
        assert near(sum(str(desc).count("H") == holes for desc in drawn), 3000, p)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("held_out", [True, False])
def test_maps_are_drawn_from_one_side_of_the_split(held_out, name):
    """All starts of a board are on the same side."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        desc = frozenlake.draw_map(SCENARIOS[name], rng, held_out)
        assert len(desc) == SCENARIOS[name].size
        board = list("".join(desc).replace("S", "F"))
        for state in frozenlake.distances(desc):
            if board[state] != "G":
                moved = board[:state] + ["S"] + board[state + 1 :]
                rows = frozenlake.as_rows(moved, len(desc))
                assert frozenlake.is_held_out(rows) == held_out


def test_distances_go_around_holes():
    desc = ["SHFF", "FFHF", "HFFF", "HHHG"]
    assert frozenlake.distances(desc)[0] == 6
    assert 2 in frozenlake.distances(desc)
    desc = ["FFHG", "FHHF", "FHFF", "SFFH"]
    moves = frozenlake.distances(desc)
    assert moves[12] == 6
    assert moves[1] == 10
    assert 2 not in moves and 15 not in moves


@pytest.mark.parametrize("held_out, low, high", [(False, 0.1, 0.4), (True, 0.5, 0.75)])
def test_mazes_need_detours(held_out, low, high):
    """Of at least four moves: some mazes do, and half of the held-out ones must. No side is
    preferred, and every maze can be crossed in time, though not with many steps to spare."""
    rng = np.random.default_rng(0)
    moves = []
    longer = []
    turned = []
    for _ in range(400):
        desc = frozenlake.draw_map(SCENARIOS["maze"], rng, held_out)
        tiles = "".join(desc)
        start = divmod(tiles.index("S"), 4)
        goal = divmod(tiles.index("G"), 4)
        straight = abs(start[0] - goal[0]) + abs(start[1] - goal[1])
        moves.append(frozenlake.distances(desc)[tiles.index("S")])
        longer.append(moves[-1] - straight)
        turned.append(start < goal)
        assert tiles.count("S") == tiles.count("G") == 1
    assert low <= np.mean(np.array(longer) >= 4) <= high
    assert 9 <= max(moves) < SCENARIOS["maze"].max_steps <= 12
    assert near(sum(turned), 400, 0.5)


@pytest.mark.parametrize(
    "size, p", [(1, 0.8), (0, 0.8), (4, 0), (4, -1), (4, 1.5), (4, float("nan"))]
)
def test_impossible_random_maps_are_refused(size, p):
    with pytest.raises(ValueError, match=f"size {size}"):
        frozenlake.random_map(size, p, np.random.default_rng(0))


@pytest.mark.parametrize(
    "desc, success_rate, max_steps",
    [
        (["SF", "G"], 1, 8),
        (["SX", "FG"], 1, 8),
        (["FF", "FG"], 1, 8),
        (["SS", "FG"], 1, 8),
        ([""], 1, 8),
        ([], 1, 8),
        (["SF", "FG"], 1.5, 8),
        (["SF", "FG"], -0.1, 8),
        (["SF", "FG"], float("nan"), 8),
        (["SF", "FG"], 1, 0),
    ],
)
def test_impossible_lakes_are_refused(desc, success_rate, max_steps):
    with pytest.raises(ValueError, match="no lake"):
        FrozenLake(desc, success_rate, max_steps)


# A second game, with a vocabulary of its own


class Corridor:
    """Six places in a row; the text says at which end the goal is."""

    instructions = "go west or east"
    max_steps = 6

    def __init__(self, goal, place, *key):
        self.goal = goal
        self.place = place
        self.rng = np.random.default_rng(key)
        self.steps = 0
        self.success = False

    def observation(self):
        return f"from {self.place} go {self.goal}"

    def step(self, text):
        word = text.split(" ")[-1]
        self.steps += 1
        self.place += {"west": -1, "east": 1}.get(word, 0)
        self.success = self.place == {"west": 0, "east": 5}[self.goal]
        done = self.place in (0, 5) or self.steps == self.max_steps
        return float(self.success), done, word in ("west", "east")


class Words:
    """A tokenizer of a few words, of which the first two end an answer."""

    words = "west east go or from 1 2 3 4".split()
    size = len(words)
    end_ids = frozenset([0, 1])

    def prompt(self, text, think=False):
        words = text.split() + ["or"] * think
        return [self.words.index(word) for word in words]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


INSTRUCTION_IDS = Words().prompt(Corridor.instructions)


def corridor_agent(std=0.4, max_new_tokens=3, tokenizer=None, device="cpu", **settings):
    """An agent with random weights, whose model has more rows than the tokenizer has tokens."""
    model = lm.Transformer(lm.Config("qwen2", Words.size + 5, 16, 24, 2, 4, 2, 4))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=std)
    model.to(device)
    settings["max_new_tokens"] = max_new_tokens
    return lm.LanguageAgent(model, tokenizer or Words(), Corridor.instructions, **settings)


def corridors(count=12, seed=0):
    """Games of both goals; every fourth has the same start."""
    return [Corridor(("west", "east")[i % 2], 1 + i % 4, seed, i) for i in range(count)]


def steps_of(episodes):
    return [step for episode in episodes for step in episode]


def logprobs_of(steps):
    return torch.tensor([logprob for step in steps for logprob in step.answer.logprobs])


def facts(episodes):
    """Episodes but for their log-probabilities, which depend on the batch by rounding."""
    return [
        [dataclasses.replace(s, answer=dataclasses.replace(s.answer, logprobs=[])) for s in episode]
        for episode in episodes
    ]


def watch_passes(model):
    """A list that grows by (rows, tokens) with each forward pass of the model."""
    passes = []
    model.model.register_forward_hook(lambda module, args, out: passes.append(args[0].shape))
    return passes


# Rollouts


@pytest.mark.parametrize("greedy", [True, False])
def test_rollouts_batched_are_those_one_by_one(greedy):
    agent = corridor_agent(temperature=1.5)
    together = msgrpo.play(agent, corridors(), greedy)
    apart = []
    for game in corridors():
        apart += msgrpo.play(agent, [game], greedy)
    assert facts(together) == facts(apart)
    torch.testing.assert_close(
        logprobs_of(steps_of(together)), logprobs_of(steps_of(apart)), atol=1e-5, rtol=0
    )
    assert facts(msgrpo.play(agent, corridors(), greedy)) == facts(together)
    other_seed = msgrpo.play(agent, corridors(seed=1), greedy)
    assert (facts(other_seed) == facts(together)) == greedy


def test_rollouts_keep_what_was_sampled():
    """The very tokens, with the end token; the game heard what they say."""
    agent = corridor_agent()
    episodes = msgrpo.play(agent, corridors(30))
    assert {len(step.answer.response) for step in steps_of(episodes)} == {1, 2, 3}
    for game, episode in zip(corridors(30), episodes, strict=True):
        for step in episode:
            answer = step.answer
            assert Words().decode(answer.prompt) == f"go west or east {game.observation()}"
            assert Words().decode(answer.response) == answer.text
            assert max(answer.response) < Words.size
            ended = [token in Words.end_ids for token in answer.response]
            assert not any(ended[:-1])
            assert ended[-1] != answer.truncated
            assert len(answer.response) == 3 or not answer.truncated
            assert len(answer.logprobs) == len(answer.response)
            assert game.step(answer.text) == (step.reward, step.done, step.valid)
            assert game.success == step.success
        assert step.done


def test_thinking_changes_the_prompt():
    (answer,) = corridor_agent(think=True).act(["from 2 go west"], None)
    assert Words().decode(answer.prompt) == "go west or east from 2 go west or"


def test_finished_games_leave_the_batch():
    agent = corridor_agent()
    act = agent.act
    sizes = []
    rounds = []

    def counting(observations, uniforms):
        sizes.append(len(observations))
        return act(observations, uniforms)

    agent.act = counting
    episodes = msgrpo.play(agent, corridors(), after_round=lambda *counts: rounds.append(counts))
    lengths = [len(episode) for episode in episodes]
    live = [sum(length > t for length in lengths) for t in range(max(lengths))]
    assert sizes == live
    assert rounds == [(12 - left, 12) for left in (*live[1:], 0)]
    assert live[-1] < 12


def test_finished_answers_leave_the_batch():
    """And what prompts share, and answers so far, is run once; the last answer ends the batch."""
    agent = corridor_agent(max_new_tokens=30)
    read = len(INSTRUCTION_IDS) + 4 + 3  # "from" begins both prompts
    passes = watch_passes(agent.model)
    uniforms = np.random.default_rng(0).random((20, 30))
    answers = agent.act(["from 2 go west", "from 3 go east"] * 10, uniforms)
    lengths = [len(answer.response) for answer in answers]
    rows = []
    for t in range(1, max(lengths)):
        going = [answer for answer in answers if len(answer.response) > t]
        rows.append(len({(answer.prompt, answer.response[:t]) for answer in going}))
    assert passes == [(1, read)] + [(count, 1) for count in rows]
    assert rows[0] < 20 == len(answers)
    assert min(lengths) < max(lengths) < 30


def answers_of(agent, captures):
    agent.captures = captures
    uniforms = np.random.default_rng(0).random((24, agent.max_new_tokens))
    states = [f"from {1 + i % 4} go {('west', 'east')[i % 2]}" for i in range(24)]
    return [dataclasses.replace(a, logprobs=()) for a in agent.act(states, uniforms)]


def test_captured_steps_give_the_same_answers(monkeypatch):
    """A stand-in for CUDA's graph, with a static token; on a GPU, the graph itself as well.

    Between two captures, no tensor of the cache changes its shape or its place in memory.
    """
    sizes = []

    def stand_in(step, token, cache):
        static_token = token.clone()
        sizes.append(len(token))
        keys_values = [x for pair in cache.keys_values for x in pair]
        tensors = [cache.positions, cache.row_ids, *keys_values]
        before = [(x.shape, x.data_ptr()) for x in tensors]

        def replay(token, cache):
            keys_values = [x for pair in cache.keys_values for x in pair]
            tensors = [cache.positions, cache.row_ids, *keys_values]
            assert [(x.shape, x.data_ptr()) for x in tensors] == before
            return step(static_token.copy_(token), cache)

        return replay

    agent = corridor_agent(max_new_tokens=9)
    plain = answers_of(agent, captures=False)
    if torch.cuda.is_available():
        on_gpu = corridor_agent(max_new_tokens=9, device="cuda")
        assert answers_of(on_gpu, captures=True) == answers_of(on_gpu, captures=False)
    monkeypatch.setattr(lm, "capture", stand_in)
    assert answers_of(agent, captures=True) == plain
    assert len(sizes) > 1
    assert all(later <= earlier // 2 for earlier, later in itertools.pairwise(sizes))


def test_probabilities_that_are_no_numbers_are_refused():
    agent = corridor_agent()
    agent.model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not numbers"):
        agent.act(["from 2 go west"], None)


def test_an_evaluation_asks_about_each_state_once():
    agent = corridor_agent()
    states = ["from 2 go west", "from 3 go east"]
    expected = agent.act(states, None)
    policy = train.Remembering(agent)
    assert policy.act(states + states[:1], None) == [*expected, expected[0]]
    passes = watch_passes(agent.model)
    assert policy.act(states[::-1], None) == expected[::-1]
    assert passes == []
    policy.act([*states, "from 1 go east"], None)
    assert passes[0] == (1, len(INSTRUCTION_IDS) + 4)


@pytest.mark.parametrize("size", [5, 1024, 1025, 5000])
def test_a_sample_of_chunks_is_that_of_one_cumulative_sum(size):
    """For large vocabularies; tokens of probability 0 are never drawn, whatever is rounded."""
    torch.manual_seed(size)
    logits = 3 * torch.randn(64, size)
    logits[:, : size // 4] = -torch.inf
    logits[:, size // 2 :] = -torch.inf
    table = logits.log_softmax(-1)
    rows = torch.randint(64, (96,))  # in any order, some twice
    uniforms = torch.rand(96)
    uniforms[0] = 0.0
    uniforms[1] = 1.0  # what float32 can make of a number just below
    drawn = lm.sample(table, rows, uniforms)
    assert table[rows, drawn].isfinite().all()
    assert lm.sample(table, rows, None).tolist() == table[rows].argmax(-1).tolist()
    cumulative = table.double().exp().cumsum(-1)
    below = torch.where(drawn > 0, cumulative[rows, (drawn - 1).clamp(min=0)], 0.0)
    assert (below <= uniforms + 1e-5).all()
    assert (cumulative[rows, drawn] > uniforms - 1e-5).all()


def test_the_drawing_of_a_tree():
    """The one in its docstring: I A B C, I A B D, I E."""
    tree = lm.Tree([(9, 1, 2, 3), (9, 1, 2, 4), (9, 5)], "cpu")
    assert tree.ids.tolist() == [[9, 1, 2, 3, 4, 5]]
    assert tree.positions.tolist() == [[0, 1, 2, 3, 3, 1]]
    groups = [nodes.tolist() for nodes, _ in tree.groups]
    assert groups == [[[0]], [[1, 2, 3], [5, 0, 0]], [[4]]]


def test_texts_that_begin_alike_are_run_once():
    """Nodes: what begins all texts, then each text's own, where they are new."""
    tree = lm.Tree([(7, 8, 1, 2, 3), (7, 8, 1, 2, 4), (7, 8, 5), (7, 8, 1, 2, 3)], "cpu")
    assert tree.ids.tolist() == [[7, 8, 1, 2, 3, 4, 5]]
    assert tree.positions.tolist() == [[0, 1, 2, 3, 4, 4, 2]]
    assert tree.paths[[0, 1, 3]].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4]]
    assert tree.paths[2, :3].tolist() == [0, 1, 6]
    shared, new, late = [nodes.tolist() for nodes, _ in tree.groups]
    assert shared == [[0, 1]]
    assert new == [[2, 3, 4], [6, 0, 0]]
    assert late == [[5], [4]]
    attended = [*shared[0], *new[0], *new[1], *late[0], *late[1]]
    assert [attended[place] for place in tree.places[0]] == list(range(7))


# The loss


def token_loss(logprob, old_logprob, credit, entropy, clip, entropy_coef):
    """One token's loss, with Python's own min and max; also whether its clip is active."""
    ratio = (logprob - old_logprob).exp()
    clipped_ratio = min(max(ratio, 1 - clip), 1 + clip)
    loss = -min(ratio * credit, clipped_ratio * credit) - entropy_coef * entropy
    return loss, bool(clipped_ratio * credit < ratio * credit)


@pytest.mark.parametrize("credit", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
def test_a_ratio_out_of_all_bounds_gives_finite_numbers(log_ratio, credit):
    logprobs = torch.tensor([log_ratio, -1.0], requires_grad=True)
    old_logprobs = torch.tensor([0.0, -1.0])
    loss, _ = msgrpo.policy_loss(
        logprobs, old_logprobs, torch.tensor([credit, 1.0]), torch.ones(2), 0.2, 0.1
    )
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logprobs.grad.tolist() == [0, -1]


@pytest.mark.parametrize("entropy", [float("nan"), float("inf")])
def test_an_entropy_without_weight_does_no_harm(entropy):
    """Entropies of a policy that is sure of itself may be no numbers."""
    logprobs = torch.tensor([-1.0], requires_grad=True)
    loss, _ = msgrpo.policy_loss(
        logprobs, torch.tensor([-1.0]), torch.tensor([2.0]), logprobs * entropy, 0.2, 0.0
    )
    loss.sum().backward()
    assert logprobs.grad.tolist() == [-2]


def pairs_of(steps):
    return {(step.answer.prompt, step.answer.response) for step in steps}


@pytest.mark.parametrize("budget, largest", [(1, 1), (24, 3), (25, 4), (32, 4), (9999, 12)])
def test_micro_batches_are_of_about_their_budget(budget, largest):
    """A list is closed once it has reached the budget; a pair of prompt and response is 8 tokens.

    Each step is in one list; equal answers to a prompt stay together as one.
    """
    steps = [Step(Answer((i % 3,) * 5, (i % 4,) * 3)) for i in range(200)]
    batches = msgrpo.micro_batches(steps, budget)
    found = [id(step) for batch in batches for step in batch]
    assert sorted(found) == sorted(id(step) for step in steps)
    sizes = [len(pairs_of(batch)) for batch in batches]
    assert sum(sizes) == 12
    assert max(sizes) == largest


def test_micro_batches_are_of_similar_length():
    lengths = [5, 1, 4, 2, 3]
    batches = msgrpo.micro_batches([Step(Answer((1,), (2,) * length)) for length in lengths], 3)
    found = [[len(step.answer.response) for step in batch] for batch in batches]
    assert found == [[1, 2], [3], [4], [5]]


@pytest.mark.parametrize("count, copies, parts", [(10, 8, 2), (31, 1, 2), (33, 1, 4), (30, 1, 4)])
def test_micro_batches_share_the_work_of_distinct_answers(count, copies, parts):
    """One for each process, and none with a small rest alone."""
    steps = [Step(Answer((1, i), (2, 3))) for i in range(count) for _ in range(copies)]
    batches = msgrpo.micro_batches(steps, 9999, parts)
    sizes = [len(pairs_of(batch)) for batch in batches]
    assert len(batches) == parts
    assert max(sizes) == -(-count // parts)


def slow_scores(model, answers, size, temperature):
    """Log-probabilities and entropies of all response tokens, from a pass over each whole text."""
    logprobs = []
    entropies = []
    for answer in answers:
        ids = torch.tensor([[*answer.prompt, *answer.response]])
        logits = model(ids)[0, -len(answer.response) - 1 : -1, :size]
        table = (logits / temperature).log_softmax(-1)
        logprobs.append(table.gather(1, torch.tensor(answer.response)[:, None])[:, 0])
        entropies.append(-(table.exp() * table).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def gradient(model):
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


ADVANTAGES = torch.tensor(
    [1.0, -0.5, 0.0, 2.0, -1.5, 0.25]
)  # one of 0: it counts in the denominator


@pytest.mark.parametrize(
    "temperature, clip, gamma, entropy_coef, budget",
    [
        (1.0, 0.2, 1.0, 0.0, 9999),
        (1.7, 0.1, 0.5, 0.05, 9999),
        (0.8, 0.2, 0.0, 0.0, 9999),
        (1.25, 0.3, 1.0, 0.1, 1),  # a micro-batch of one answer
        (1.0, 0.2, 1.0, 0.0, 14),  # of a few
    ],
)
def test_an_updates_gradient_is_that_of_a_slow_loop(temperature, clip, gamma, entropy_coef, budget):
    agent = corridor_agent(temperature=temperature)
    episodes = msgrpo.play(agent, corridors(3) + corridors(3))  # each is there twice
    steps = steps_of(episodes)
    rng = random.Random(0)
    for step in steps:  # as if the policy had moved on
        moved = [logprob + rng.uniform(-0.4, 0.4) for logprob in step.answer.logprobs]
        step.answer.logprobs = moved

    credit = []
    for episode, advantage in zip(episodes, ADVANTAGES.tolist(), strict=True):
        for t, step in enumerate(episode):
            paid = advantage * gamma ** (len(episode) - 1 - t)
            credit += [paid] * len(step.answer.response)
    answers = [step.answer for step in steps]
    scores, entropies = slow_scores(agent.model, answers, Words.size, temperature)
    tokens = [
        token_loss(*token, clip, entropy_coef)
        for token in zip(scores, logprobs_of(steps), credit, entropies, strict=True)
    ]
    loss = sum(loss for loss, _ in tokens) / len(tokens)
    loss.backward()
    expected = gradient(agent.model)

    agent.model.zero_grad()
    msgrpo.assign_credit(episodes, ADVANTAGES, gamma)
    found = msgrpo.accumulate_gradient(agent, episodes, clip, entropy_coef, budget)
    torch.testing.assert_close(gradient(agent.model), expected, atol=2e-6, rtol=1e-4)
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert found["tokens"] == len(tokens)
    scored = len(tokens) if entropy_coef else np.count_nonzero(credit)
    clipped = sum(is_clipped for _, is_clipped in tokens)
    assert found["clip_share"] == pytest.approx(clipped / scored)
    is_scored = torch.tensor([bool(paid or entropy_coef) for paid in credit])
    gaps = (scores - logprobs_of(steps)).abs()
    assert found["entropy"] == pytest.approx(entropies[is_scored].mean().item(), abs=1e-5)
    assert found["logprob_gap"] == pytest.approx(gaps[is_scored].mean().item(), abs=1e-5)


def test_rescoring_gives_the_log_probabilities_of_training():
    agent = corridor_agent(temperature=1.7)
    steps = steps_of(msgrpo.play(agent, corridors()))
    expected = logprobs_of(steps)
    for step in steps:
        step.answer.logprobs = [logprob + 0.25 for logprob in step.answer.logprobs]
    assert msgrpo.rescore(agent, [steps], 50) == pytest.approx(0.25, abs=1e-5)
    torch.testing.assert_close(logprobs_of(steps), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "gamma, entropy_coef, needed",
    [
        (1.0, 0.0, lambda episode, advantage: episode if advantage else []),
        (0.0, 0.0, lambda episode, advantage: episode[-1:] if advantage else []),
        (1.0, 0.1, lambda episode, advantage: episode),
    ],
)
def test_only_steps_with_a_gradient_cost_a_forward_pass(gamma, entropy_coef, needed):
    agent = corridor_agent()
    episodes = msgrpo.play(agent, corridors(6))
    msgrpo.assign_credit(episodes, ADVANTAGES, gamma)
    score = agent.score
    scored = []

    def scoring(answers):
        scored.extend(id(answer) for answer in answers)
        return score(answers)

    agent.score = scoring
    msgrpo.accumulate_gradient(agent, episodes, entropy_coef=entropy_coef, budget=20)
    pairs = zip(episodes, ADVANTAGES, strict=True)
    expected = [id(step.answer) for pair in pairs for step in needed(*pair)]
    assert sorted(scored) == sorted(expected)


def test_without_credit_there_is_no_gradient():
    agent = corridor_agent()
    episodes = msgrpo.play(agent, corridors(6))
    assert msgrpo.accumulate_gradient(agent, episodes)["loss"] == 0
    assert all(weight.grad is None for weight in agent.model.parameters())


def test_two_threads_repeat_a_gradient_bit_for_bit():
    """Many equal answers share one gradient, whose parts must be added in one order."""
    agent = corridor_agent()
    responses = itertools.product(range(Words.size), repeat=2)
    answers = [Answer((4, 6, 2, 0), response) for response in responses] * 400
    torch.manual_seed(0)
    weights = torch.randn(2 * len(answers))
    torch.set_num_threads(2)
    found = []
    for _ in range(3):
        agent.model.zero_grad()
        logprobs, _ = agent.score(answers)
        (weights * logprobs).sum().backward()
        found.append(gradient(agent.model))
    assert all(torch.equal(one, found[0]) for one in found)


# The model

GOLDEN = ["qwen2-tied", "qwen2-untied", "qwen3", "llama-biases", "llama3-rope"]


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_those_of_transformers(name, tmp_path):
    golden = lm.read_safetensors(DATA / "logits.safetensors")
    ids = golden[f"{name}.ids"]
    model, tokenizer = lm.load_pretrained(DATA / name)
    assert tokenizer is None
    assert all(weight.requires_grad for weight in model.parameters())
    torch.testing.assert_close(model(ids)[:, ::3], golden[f"{name}.logits"], atol=2e-5, rtol=0)

    lm.save_pretrained(tmp_path, model, None)
    again, _ = lm.load_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(ids), model(ids))

    low, _ = lm.load_pretrained(DATA / name, torch.bfloat16)
    assert {weight.dtype for weight in low.parameters()} == {torch.bfloat16}


def watch_checkpoints(monkeypatch):
    """A list that grows by what is to be computed again in the backward pass."""
    run = lm.checkpoint
    found = []

    def watching(function, *args, **options):
        found.append(function)
        return run(function, *args, **options)

    monkeypatch.setattr(lm, "checkpoint", watching)
    return found


GOLDEN_PROMPTS = {
    "a": (5, 3, 8, 1, 1, 20, 7, 2, 4),
    "b": (5, 3, 8, 1, 1, 20, 7, 9),
    "c": (5, 3, 8, 1, 1, 20, 7, 11, 12, 13, 14, 15),
    "other": (0, 2),
}


def golden_agent(name):
    """An agent of a golden model, with few tokens of its own; its observations are one letter."""
    tokenizer = SimpleNamespace(
        size=25,
        end_ids={0, 3},
        prompt=lambda text, think: GOLDEN_PROMPTS[text.strip()],
        decode=str,
    )
    model, _ = lm.load_pretrained(DATA / name)
    return lm.LanguageAgent(model, tokenizer, "", temperature=1.3, max_new_tokens=5)


@pytest.mark.parametrize("recompute", ["nothing", "parts", "layers"])
@pytest.mark.parametrize("name", GOLDEN)
def test_scores_are_those_of_whole_texts(name, recompute, monkeypatch):
    """Shared instructions, padding, equal answers, ends that differ: in value and gradient."""
    agent = golden_agent(name)
    responses = [(1, 2, 3), (4,), (1, 2, 3), (0, 24, 7, 7), (1, 5, 0), (8, 9), (1, 2, 6), (5,)]
    answers = [
        Answer(GOLDEN_PROMPTS[state], response)
        for state, response in zip("abacabab", responses, strict=True)
    ]

    def with_gradient(logprobs, entropies):
        weights = torch.linspace(-1, 1, len(logprobs))
        agent.model.zero_grad()
        ((logprobs + 0.3 * entropies.square()) * weights).sum().backward()
        return logprobs, entropies, gradient(agent.model)

    expected = with_gradient(*slow_scores(agent.model, answers, 25, 1.3))
    again = watch_checkpoints(monkeypatch)
    agent.model.model.recompute = recompute
    found = with_gradient(*agent.score(answers))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    kinds = {type(one) for one in again}
    assert (lm.Block in kinds) == (recompute == "layers")
    assert (torch.nn.RMSNorm in kinds) == (recompute == "parts")
    assert bool(again) == (recompute != "nothing")


def test_answers_that_differ_in_their_last_token_attend_once(monkeypatch):
    agent = golden_agent("qwen3")
    make_tree = lm.Tree
    made = []
    monkeypatch.setattr(
        lm, "Tree", lambda texts, device: made.append(texts) or make_tree(texts, device)
    )
    prompt = GOLDEN_PROMPTS["a"]
    agent.score([Answer(prompt, response) for response in [(1, 2), (1, 3), (1, 2), (4,)]])
    assert made == [[(*prompt, 1), prompt]]


@pytest.mark.parametrize("states", [["c", "other"], ["a"], ["b", "b"]])
def test_texts_may_begin_with_nothing_or_all_in_common(states):
    """With nothing, padding, which is 0, is the number of a token as well."""
    agent = golden_agent("qwen3")
    answers = [Answer(GOLDEN_PROMPTS[state], (1, 2)) for state in states]
    found = agent.score(answers)
    torch.testing.assert_close(found, slow_scores(agent.model, answers, 25, 1.3))


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("name", GOLDEN)
def test_answers_are_those_of_a_loop_without_cache(name, greedy):
    agent = golden_agent(name)
    uniforms = np.random.default_rng(0).random((6, 5))
    for state, answer, row in zip(
        "abacab", agent.act("abacab", None if greedy else uniforms), uniforms
    ):
        assert answer.prompt == GOLDEN_PROMPTS[state]
        ids = [*answer.prompt]
        for token, logprob, uniform in zip(answer.response, answer.logprobs, row):
            table = (agent.model(torch.tensor([ids]))[0, -1, :25] / 1.3).log_softmax(-1)
            if greedy:
                assert token == table.argmax()
            else:
                assert token == (table.exp().cumsum(-1) <= uniform).sum()
            assert logprob == pytest.approx(table[token].item(), abs=1e-5)
            ids.append(token)


PASSES = [("cpu", "float32", 1e-5)]
if torch.cuda.is_available():
    PASSES.append(("cuda", "bfloat16", 0.02))


@pytest.mark.parametrize("time, slots", [(5, 5), (5, 12), (1, 12)])
@pytest.mark.parametrize("device, dtype, gap", PASSES)
def test_causal_attention_is_its_formula_in_value_and_gradient(time, slots, device, dtype, gap):
    """On a GPU, by the kernels that training in bfloat16 takes."""
    torch.manual_seed(0)
    shapes = [(3, 4, time, 16), (3, 2, slots, 16), (3, 2, slots, 16)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    weights = torch.randn(shapes[0])
    q, k, v = inputs
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) / 4
    is_later = torch.arange(slots) > slots - time + torch.arange(time)[:, None]
    expected = scores.masked_fill(is_later, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)

    moved = [x.to(device, getattr(torch, dtype)) for x in inputs]
    found = lm.causal_attention(*moved).cpu().float()
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for x, y in zip((found, *gradients), (expected, *expected_gradients), strict=True):
        assert (x - y).norm() <= gap * y.norm()


@pytest.mark.parametrize("device", sorted(device for device, _, _ in PASSES))
def test_a_row_that_is_taken_often_has_all_of_its_gradient(device):
    """A sum of ones in bfloat16 would end at 256."""
    x = torch.zeros(1, 1, 3, 2, dtype=torch.bfloat16, device=device, requires_grad=True)
    nodes = torch.tensor([[0] * 4096, [0, 2] * 2048], device=device)
    lm.gather(x, nodes).sum().backward()
    assert x.grad[0, 0].tolist() == [[6144, 6144], [0, 0], [2048, 2048]]


@pytest.mark.parametrize("rows", [1, 3, 22, 23, 256])
def test_log_probabilities_in_slices_are_those_of_one_table(rows, monkeypatch):
    """In value and in gradient, which is written by hand, of the tokens that count."""
    monkeypatch.setattr(lm, "SLICE_ELEMENTS", {"cpu": 9 * rows})
    model = corridor_agent().model
    torch.manual_seed(1)
    x = torch.randn(23, 16, requires_grad=True)
    targets = torch.randint(9, (23,))
    table = (model.head(x)[:, :9] / 0.7).log_softmax(-1)
    expected = (table[range(23), targets], -(table.exp() * table).sum(-1))
    found = model.token_logprobs(x, targets, 9, 0.7)
    for part in ((1.0, 0.0), (0.0, 1.0), (0.3, -2.0)):
        weights = torch.randn(2, 23) * torch.tensor(part)[:, None]
        gradients = []
        for values in (expected, found):
            total = (weights * torch.stack(values)).sum()
            inputs = [x, model.lm_head.weight]
            gradients.append(torch.autograd.grad(total, inputs, retain_graph=True))
        for x_found, x_expected in zip((*found, *gradients[1]), (*expected, *gradients[0])):
            assert (x_found - x_expected).norm() <= 1e-5 * x_expected.norm()


# What is trained


def test_random_numbers_of_different_keys_differ():
    """As numpy's own do not: to it, (1,) and (1, 0) are one seed."""
    keys = [(), (0,), (1,), (1, 0), (1, 0, 0), (0, 1), (10,)]
    assert len({train.generator(*key).random() for key in keys}) == len(keys)


def tiny_settings(**changes):
    return train.Settings(**{**train.TINY, "threads": 1, **changes})


def tiny_learner(**changes):
    settings = tiny_settings(**changes)
    return train.Learner(settings, *train.tiny_start(settings))


def weights_of(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()]).clone()


def test_in_float32_one_process_holds_one_model():
    learner = tiny_learner()
    assert learner.model is learner.master
    assert learner.player("go").model is learner.trainee("go").model is learner.master


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_reach_the_float32_weights(dtype):
    """Those of several passes are added up; what plays next is what was learned."""
    learner = tiny_learner(dtype=dtype)
    reference = tiny_learner()
    for trainee in (learner.trainee("go"), reference.trainee("go")):
        for prompt in ((1, 2), (3,)):
            trainee.score([Answer(prompt, (6, 7))])[0].sum().backward()
    expected = gradient(reference.master)
    found = gradient(learner.master)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert {weight.dtype for weight in learner.model.parameters()} == {getattr(torch, dtype)}

    before = weights_of(learner.master)
    learner.update(1e-6)
    change = (weights_of(learner.master) - before).abs()
    assert (change > 0).float().mean() > 0.5  # it would vanish in bfloat16
    assert change.max() < 2e-6
    learner.update(0.1)
    for low, weight in zip(learner.model.parameters(), learner.master.parameters()):
        assert torch.equal(low, weight.to(low.dtype))
        assert low.grad is None
        assert weight.grad is None


def test_a_gradient_that_is_not_finite_changes_nothing():
    learner = tiny_learner()
    before = weights_of(learner.master)
    for weight in learner.master.parameters():
        weight.grad = torch.full_like(weight, float("nan"))
    assert math.isnan(learner.update(0.1))
    assert torch.equal(weights_of(learner.master), before)
    assert all(weight.grad is None for weight in learner.master.parameters())


def test_saved_before_the_first_update_is_never_saved():
    """As where all groups are alike at first: Adam's count of steps must not begin at one."""

    def update(learner):
        for weight in learner.master.parameters():
            weight.grad = torch.full_like(weight, 1e-3)
        learner.update(0.01)
        return weights_of(learner.master)

    learner = tiny_learner()
    expected = update(tiny_learner())
    state = learner.state()
    resumed = tiny_learner()
    resumed.load_moments(state["moments"])
    assert torch.equal(update(resumed), expected)
    assert torch.equal(update(learner), expected)


@pytest.mark.parametrize(
    "think, max_new_tokens, expected", [(False, 0, 16), (True, 0, 256), (True, 5, 5)]
)
def test_the_agent_has_the_settings_of_the_run(think, max_new_tokens, expected):
    settings = tiny_settings(think=think, max_new_tokens=max_new_tokens, temperature=0.5)
    learner = train.Learner(settings, *train.tiny_start(settings), lambda *args: args)
    assert learner.player("go")[2:] == ("go", 0.5, expected, think)


@pytest.mark.parametrize("unequal, passes", [(0, 0), (1, 1), (3, 1), (6, 2)])
def test_processes_share_the_passes_of_an_update(unequal, passes, monkeypatch):
    """Each makes as many, none has no step, equal answers stay with one of them."""
    steps = [Step(Answer((1,), (i % unequal,))) for i in range(4 * unequal)]
    answers = []
    worked = []
    monkeypatch.setattr(train, "WORLD", 2)
    for rank in range(2):
        monkeypatch.setattr(train, "RANK", rank)
        shared = train.share_passes(steps, 2)
        assert len(shared) == passes
        assert all(batch and weight in (0, 2) for batch, weight in shared)
        mine = [step for batch, weight in shared for step in batch if weight]
        answers.append(pairs_of(mine))
        worked += mine
    assert sorted(id(step) for step in worked) == sorted(id(step) for step in steps)
    assert not answers[0] & answers[1]


def far_episode(token, gap):
    """An episode of one answer, sampled by a policy that is away from the tiny one by this gap."""
    learner = tiny_learner()
    answer = Answer((1, 2), (token,))
    with torch.no_grad():
        logprob = learner.trainee("go").score([answer])[0].item()
    answer.logprobs = [logprob - gap]
    return [Step(answer, credit=1.0)]


def test_an_update_without_credit_is_no_update():
    learner = tiny_learner(update_episodes=1, entropy_coef=0.0, entropy_floor=0.0)
    gaps = [0.1, 0.1, 0.9]
    episodes = [far_episode(token, gap) for token, gap in enumerate(gaps, start=3)]
    episodes[0][0].credit = 0.0
    updates = train.learn(learner.trainee("go"), learner, episodes, [0, 1, 2], rate=1e-6)
    assert [update["trained"] for update in updates] == [1, 1]
    found = [update["logprob_gap"] for update in updates]
    assert found == pytest.approx([0.1, 0.9], abs=1e-3)
    assert updates[0]["grad_norm"] > 0
    assert all(weight.grad is None for weight in learner.master.parameters())


@pytest.mark.parametrize(
    "valid, alike, refused, reason",
    [
        (0.0, 1.0, 0, "no answer named an action"),
        (0.5, 1.0, 0, "earned the same"),
        (0.5, 0.9, 0, "had credit"),
        (0.5, 0.9, 1, "not finite"),
    ],
)
def test_advice_names_the_reason(valid, alike, refused, reason):
    metrics = {"valid": valid, "zero_variance_groups": alike, "refused_updates": refused}
    assert reason in train.advice(metrics)


def test_the_learning_rate_rises_then_falls():
    settings = tiny_settings(iterations=110, learning_rate=2.0, final_rate=0.5)
    found = [train.learning_rate(settings, i) for i in (1, 5, 10, 60, 110)]
    assert found == pytest.approx([0.2, 1.0, 2.0, 1.5, 1.0])


def test_imagined_episodes_are_as_good_as_the_mean_of_all_or_the_worst():
    """Means with it: (0 + .5) / 3, (1 + .5) / 3, and equal returns."""
    returns = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    settings = tiny_settings(group_size=2, imagine=1, normalize_std=False)
    found = train.group_advantages(returns, settings)
    expected = torch.tensor([[-1 / 6, -1 / 6], [0.5, -0.5], [0, 0]])
    torch.testing.assert_close(found, expected)
    assert found[2].tolist() == [0, 0]
    settings = tiny_settings(group_size=2, imagine=2, normalize_std=False)
    twice = train.group_advantages(returns, settings)
    torch.testing.assert_close(twice, torch.tensor([[-0.25, -0.25], [0.5, -0.5], [0, 0]]))
    penalties = torch.full((64, 8), -5.6)  # float32's mean of these is another number
    assert not train.group_advantages(penalties, tiny_settings()).any()
    settings = tiny_settings(group_size=2, imagine=0, normalize_std=False)
    plain = train.group_advantages(returns, settings)
    assert plain.tolist() == [[0, 0], [0.5, -0.5], [0, 0]]


def test_the_entropy_bonus_grows_below_the_floor():
    answers = [Answer((0,), (1, 2), [-0.3, -0.1]), Answer((0,), (1,), [-0.2])]
    episodes = [[Step(answer)] for answer in answers]  # entropy: .2
    for floor, expected in ((0.0, 0.01), (0.2, 0.01), (0.25, 0.06)):
        settings = tiny_settings(entropy_coef=0.01, entropy_floor=floor)
        found = train.entropy_coefficient(settings, episodes)
        assert found == pytest.approx(expected)


class ByRule:
    """A policy that answers without a model."""

    max_new_tokens = 3

    def __init__(self, rule):
        self.rule = rule

    def act(self, observations, uniforms):
        self.greedy = uniforms is None
        words = [self.rule(text) for text in observations]
        return [Answer((0,), (1, 2, 3), [-1.0] * 3, f"<action>{word}</action>") for word in words]


def an_update(tokens, value):
    means = dict.fromkeys("loss entropy clip_share logprob_gap grad_norm".split(), value)
    return means | {"tokens": tokens, "trained": 1}


def test_the_books_of_an_iteration(monkeypatch):
    """Three groups of two episodes, each on a row of ice: all can be said by hand."""
    maps = iter([["SG"], ["SH"]])
    monkeypatch.setattr(frozenlake, "draw_map", lambda scenario, rng: next(maps))
    monkeypatch.setattr(train, "learn", lambda *args: [an_update(2, 1.0), an_update(6, 5.0)])
    first_round = ["right", "right", "right", "left", "right", "right"]  # SFG SFG SG SG SH SH
    second_round = ["right", "right", "left"]  # SFG SFG SG
    script = iter(first_round + second_round)
    policy = ByRule(lambda text: next(script, "left"))
    settings = tiny_settings(groups=3, group_size=2, replay=0.4, imagine=0)
    failed = [["SFG"]] * 300
    learner = SimpleNamespace(settings=settings, assign_credit=msgrpo.assign_credit)
    metrics = train.iterate(policy, None, learner, 5, failed)
    # On SFG both win in two steps, on SG one wins in a step, the other goes left eight times, on SH
    # both are lost in one.
    expected = {
        "success": 1 / 4,  # of the new maps
        "return": 3 / 6,
        "steps": 15 / 6,
        "valid": 1,
        "truncated": 0,
        "zero_variance_groups": 2 / 3,
        "groups_without_success": 1 / 3,
        "replayed_groups": 1,
        "generated_tokens": 45,
        "trained_tokens": 8,
        "nonzero_episodes": 2,
        "drawn_episodes": 2,
        "trained_episodes": 2,
        "updates": 2,
        "refused_updates": 0,
        "loss": 4,  # (2 * 1 + 6 * 5) / 8
        "entropy": 4,
        "clip_share": 4,
        "logprob_gap": 4,
        "grad_norm": 4,
        "rollout_gap": None,
    }
    found = {key: value and float(value) for key, value in metrics.items()}
    assert found == pytest.approx(expected)
    assert failed == [["SFG"]] * 254 + [["SG"], ["SH"]]


def test_an_iteration_that_is_given_up_leaves_no_trace(monkeypatch):
    """It ends after a round of answers; the maps that it would have replayed are still to be."""
    monkeypatch.setattr(train.INTERRUPTS, "asked", True)
    texts = []
    policy = ByRule(texts.append)
    settings = tiny_settings(groups=3, group_size=2, replay=1.0)
    failed = [["SFG"]] * 3
    with pytest.raises(train.Stopped):
        train.iterate(policy, None, SimpleNamespace(settings=settings), 5, failed)
    assert len(texts) == 6
    assert failed == [["SFG"]] * 3


def test_the_warm_up_answers_at_random_on_training_maps(monkeypatch):
    make_lake = train.Settings.lake
    maps = []

    def making(settings, desc, *key):
        maps.append(desc)
        return make_lake(settings, desc, *key)

    def encoding(text):
        said[text] += 1
        return encode(text)

    learner = tiny_learner(warmup_steps=2)
    encode = learner.tokenizer.encode
    said = Counter()
    monkeypatch.setattr(learner.tokenizer, "encode", encoding)
    monkeypatch.setattr(train.Settings, "lake", making)
    train.warm_up(learner.trainee("go"), learner)
    assert len(maps) == said.total() == 2 * 64
    assert all(near(said[f"<action>{word}</action>"], 2 * 64, 1 / 4) for word in ACTIONS)
    assert not any(frozenlake.is_held_out(desc) for desc in maps)


# Evaluation


def reflex(text):
    """Down where the cell below is no hole, else right."""
    cells = [row.split() for row in text.split("\n")]
    row = next(i for i, row in enumerate(cells) if "P" in row)
    below = cells[row + 1 :]
    can_go_down = below and below[0][cells[row].index("P")] != "O"
    return "down" if can_go_down else "right"


def evaluate(name, greedy=True, **settings):
    """The figures of a policy that is a reflex."""
    policy = ByRule(reflex)
    learner = SimpleNamespace(
        settings=tiny_settings(**settings), player=lambda instructions: policy
    )
    figures = train.evaluate(learner, name, greedy)
    assert policy.greedy == greedy
    return figures


def test_every_held_out_map_is_evaluated_once():
    figures = evaluate("noslip")
    assert figures["episodes"] == 503
    assert figures["success"] == pytest.approx(figures["reflex1"])
    assert figures["reflex1"] == pytest.approx(0.747, abs=5e-4)
    assert figures["reflex2"] == pytest.approx(0.844, abs=5e-4)
    assert figures["reflex3"] > 0.93
    assert figures["optimal"] == pytest.approx(1)
    assert figures["random"] == pytest.approx(0.0056, abs=5e-5)
    assert figures["unweighted"] < figures["success"]
    assert figures["half_interval"] == 0
    assert figures["valid"] == 1
    assert evaluate("noslip", greedy=False)["half_interval"] > 0


@pytest.mark.parametrize("name", SCENARIOS)
def test_other_evaluations_are_of_the_same_episodes_every_time(name, monkeypatch):
    """On held-out maps alone, each of the same weight, by the scenario's own rules."""
    play = msgrpo.play
    played = []

    def playing(policy, games, *options):
        played.append([(game.tiles, str(game.rng.bit_generator.state)) for game in games])
        for game in games:
            assert game.max_steps == SCENARIOS[name].max_steps
            assert game.success_rate == SCENARIOS[name].success_rate
            rows = [game.tiles[i : i + game.columns] for i in range(0, len(game.tiles), game.rows)]
            assert frozenlake.is_held_out(rows)
        return play(policy, games, *options)

    monkeypatch.setattr(msgrpo, "play", playing)
    figures = evaluate(name, eval_episodes=50, seed=1, max_steps=2)
    again = evaluate(name, eval_episodes=50, seed=2, max_steps=3)
    assert figures == again
    assert played[0] == played[1]
    assert len(set(played[0])) == figures["episodes"] == 50
    assert figures["success"] == pytest.approx(figures["unweighted"])
    assert figures["half_interval"] > 0


@pytest.mark.parametrize("n, p", [(100, 0.5), (1000, 0.9), (50, 0.0), (50, 1.0)])
def test_the_interval_is_wilsons(n, p):
    z = 1.96
    expected = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = train.half_interval(p, np.full(n, 1 / n))
    assert found == pytest.approx(expected, rel=1e-3)


# The command line


def command(line, **options):
    """Exit status of train.py with these arguments."""
    return train.main(line.split(), **options)


CPU = "--device cpu --dtype float32 --threads 1"


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A tiny run, warmed up just enough to give answers of the right form; it cannot play."""
    out = tmp_path_factory.mktemp("runs") / "warm"
    status = command(
        f"--tiny --out {out} --seed 7 --warmup-steps 40 --iterations 2 --groups 4 --group-size 4 "
        f"--eval-episodes 20 --eval-every 2 {CPU}"
    )
    assert status == 0
    return out


QUICK = (
    "--iterations 4 --groups 4 --group-size 4 --update-episodes 4 --max-new-tokens 3 "
    f"--learning-rate 0.01 --invalid-penalty 0.5 --eval-episodes 1 --checkpoint-every 2 {CPU}"
)


def start(checkpoint, out, flags="", **options):
    """Exit status of a small run with these flags."""
    return command(f"--checkpoint {checkpoint} --out {out} {QUICK} {flags}", **options)


def read_metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def read_summary(out):
    return json.loads((out / "summary.json").read_text())


def results(out):
    """A run's metrics and summary, without clocks and echoes of settings, and its weights."""
    figures = [
        {key: value for key, value in record.items() if "second" not in key}
        for record in (*read_metrics(out), read_summary(out))
    ]
    for record in figures:
        record.pop("seed", None)
        record.pop("learning_rate", None)
    return figures, (out / "model/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def found(warm, tmp_path_factory):
    """The results of a run from `warm` with QUICK and these flags; each is run once."""
    cache = {}

    def find(flags):
        if flags not in cache:
            out = tmp_path_factory.mktemp("runs") / "run"
            assert start(warm, out, flags) == 0
            cache[flags] = results(out)
        return cache[flags]

    return find


def test_a_run_leaves_its_settings(warm):
    given = {"iterations": 2, "groups": 4, "warmup_steps": 40, "seed": 7, "threads": 1}
    settings = json.loads((warm / "settings.json").read_text())
    assert settings.keys() == {field.name for field in dataclasses.fields(train.Settings)}
    assert settings.items() >= given.items()
    untouched = train.TINY.keys() - given.keys() - {"group_size"}
    assert all(settings[key] == train.TINY[key] for key in untouched)


def test_harder_lakes_bring_settings_which_a_flag_overrides():
    found = train.read_settings("tiny", Path("none"), {"scenario": "maze", "iterations": 5})
    assert (found.scenario, found.iterations, found.layers) == ("maze", 5, 4)
    assert found.groups == train.TINY["groups"]
    pretrained = train.read_settings("checkpoint", Path("none"), {"scenario": "maze"})
    assert (pretrained.iterations, pretrained.groups) == (700, 2)


def test_defaults_follow_the_device_that_is_given(monkeypatch):
    """Not the one that the machine has."""
    monkeypatch.setattr(lm, "bfloat16_is_fast", lambda kind: kind == "cuda")
    of_cpu = train.Settings(device="cpu")
    assert (of_cpu.dtype, of_cpu.recompute) == ("float32", "parts")
    of_gpu = train.Settings(device="cuda:1")
    assert (of_gpu.dtype, of_gpu.recompute) == ("bfloat16", "layers")
    of_gpu = train.Settings(device="cuda", dtype="float32", recompute="nothing")
    assert (of_gpu.dtype, of_gpu.recompute) == ("float32", "nothing")


@pytest.mark.parametrize("mode", ["resume", "eval"])
def test_a_run_keeps_bfloat16_where_it_is_fast(mode, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "bfloat16_is_fast", lambda kind: kind == "cuda")

    def dtype(own_device, own_dtype, **given):
        """Of a run that had its own device and dtype."""
        own = train.Settings(device=own_device, dtype=own_dtype, seed=7)
        (tmp_path / "settings.json").write_text(train.settings_text(own))
        found = train.read_settings(mode, tmp_path, given)
        assert (found.seed, found.device) == (7, given.get("device", own_device))
        return found.dtype

    assert dtype("cuda", "bfloat16") == "bfloat16"
    assert dtype("cuda", "bfloat16", device="cuda:1") == "bfloat16"
    assert dtype("cuda", "bfloat16", device="cpu") == "float32"
    assert dtype("cuda", "bfloat16", device="cpu", dtype="bfloat16") == "bfloat16"
    assert dtype("cpu", "bfloat16", device="cpu") == "bfloat16"
    assert dtype("cpu", "float32", device="cuda") == "float32"


def test_several_processes_do_not_share_a_gpu(monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    train.check_device("cuda")
    with pytest.raises(lm.BadInput, match="cuda:1: of several"):
        train.check_device("cuda:1")


def test_a_run_leaves_metrics_and_a_summary(warm):
    metrics = read_metrics(warm)
    summary = read_summary(warm)
    unseen = summary["scenarios"]["noslip"]
    assert [record["iteration"] for record in metrics] == [1, 2]
    assert metrics[0]["tokens_per_second"] > 0
    assert "unseen_success" not in metrics[0]
    assert metrics[1]["unseen_success"] == unseen["success"]
    assert list(summary["scenarios"]) == list(SCENARIOS)
    assert summary["unseen_success"] == unseen["success"]
    assert summary["unseen_success_unweighted"] == unseen["unweighted"]
    assert summary["random_success"] == unseen["random"]
    assert summary["optimal_success"] == unseen["optimal"]
    assert summary["seed"] == 7
    assert metrics[0]["seconds"] < metrics[1]["seconds"] < summary["seconds"] < 600


def test_a_new_model_has_the_layers_asked_for():
    model, _ = train.tiny_start(tiny_settings(layers=2))
    assert len(model.model.layers) == 2


def test_the_warm_up_teaches_to_speak_not_to_play(warm):
    before = read_summary(warm)["before"]
    assert before["valid"] > 0.8
    assert before["success"] <= 0.1  # of 20 episodes


def test_a_run_leaves_a_model_that_knows_where_an_answer_ends(warm):
    _, tokenizer = lm.load_pretrained(warm / "model")
    ends = {tokenizer.decode([i]) for i in tokenizer.end_ids}
    assert ends == {f"<action>{word}</action>" for word in ACTIONS}


@pytest.mark.parametrize("what", ["{warm}", "{warm}/model --max-new-tokens 1"])
def test_a_run_and_its_model_are_evaluated_alike(what, warm, capsys):
    line = what.format(warm=warm)
    assert command(f"--eval {line} --eval-episodes 20 {CPU}") == 0
    shown = capsys.readouterr().out.splitlines()
    header = shown.index(train.score_line("held out", train.HEADINGS))
    scenarios = read_summary(warm)["scenarios"]
    rows = [line.split()[:2] for line in shown[header + 1 :]]
    assert rows == [[name, f"{scenarios[name]['success']:.4f}"] for name in SCENARIOS]
    assert all(scenarios[name]["episodes"] == 20 for name in SCENARIOS)


def test_play_shows_a_game_on_a_held_out_map(warm, capsys):
    assert command(f"--play {warm} --seed 3 --scenario big --max-steps 5") == 0
    shown = capsys.readouterr().out
    assert "6 rows" in shown
    assert "5 steps" in shown
    assert re.search(r"<action>.*the goal in \d steps", shown, re.DOTALL)
    first_grid = re.findall(r"(?m)^[P_OG](?: [P_OG]){5}(?=    |$)", shown)[:6]
    tiles = str.maketrans({" ": "", "P": "S", "O": "H", "_": "F"})
    assert frozenlake.is_held_out([row.translate(tiles) for row in first_grid])


def test_boards_stand_side_by_side_in_lines_of_100_columns(monkeypatch):
    boards = [FrozenLake(MAPS["4x4"]).observation()] * 10
    shown = train.side_by_side(boards)
    lines = shown.splitlines()
    assert max(len(line) for line in lines) <= 100
    assert [lines[4].split(), lines[10].split()] == [[*"012345678"], ["9"]]
    assert lines[0].split("    ") == ["P _ _ _"] * 9
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert train.paint("P _") == "\x1b[1;33mP\x1b[0m _"
    monkeypatch.setenv("NO_COLOR", "1")
    assert train.paint("P _") == "P _"


def test_help_names_all_settings(capsys):
    with pytest.raises(SystemExit) as leaving:
        command("--help")
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    for name in ("tiny", "resume", "eval", "play", *(CHANGES.keys() | NO_CHANGE)):
        assert f"--{name.replace('_', '-')}" in shown


def test_help_explains_every_field_of_the_metrics(warm):
    for key in read_metrics(warm)[-1]:
        assert re.search(rf"\b{key}\b", train.EPILOG)


def test_progress_is_one_line_with_the_time_left(warm):
    line = train.progress_line(read_metrics(warm)[0], iterations=11, ends=[0.0, 30.0, 62.0])
    assert line.startswith("   1/11  success 0")
    assert line.endswith("  5:10 left")
    line = train.progress_line(read_metrics(warm)[0], iterations=2, ends=[0.0, 119.7])
    assert line.endswith("  2:00 left")
    line = train.progress_line(read_metrics(warm)[0] | {"updates": 0}, 2, [0.0, 119.7])
    assert line.endswith("  2:00 left  no update")


def test_metrics_are_strict_json():
    record = {"a": float("nan"), "b": None, "c": np.float32(0.5)}
    assert json.loads(train.to_json(record)) == {"a": None, "b": None, "c": 0.5}


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_complete_run_resumed_is_the_same(warm):
    before = results(warm)
    assert command(f"--resume {warm}") == 0
    assert results(warm) == before


def test_runs_are_numbered_and_reproduced(warm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert command(f"--checkpoint {warm} {QUICK} --iterations 1") == 0
    assert [path.name for path in sorted(Path("runs").iterdir())] == ["0001", "0002"]
    assert results(Path("runs/0001")) == results(Path("runs/0002"))


def test_a_fork_brings_an_agent_of_its_own(warm, tmp_path):
    """It plays, learns and is evaluated."""

    class Mumbling(lm.LanguageAgent):
        def act(self, observations, uniforms):
            answers = super().act(observations, uniforms)
            return [dataclasses.replace(answer, text="hm") for answer in answers]

        def score(self, answers):
            assert {answer.text for answer in answers} == {"hm"}
            scored.append(len(answers))
            return super().score(answers)

    scored = []
    flags = "--iterations 1 --sampling all --entropy-coef 0.1"
    assert start(warm, tmp_path / "a", flags, agent_class=Mumbling) == 0
    assert sum(scored) == 16 * 8
    assert read_metrics(tmp_path / "a")[0]["valid"] == 0
    for figures in read_summary(tmp_path / "a")["scenarios"].values():
        assert figures["valid"] == 0


def test_a_fork_brings_a_credit_rule_of_its_own(warm, tmp_path):
    """It is told the groups. Credit is what is trained on: without any there is no update."""

    def pay_nobody(episodes, advantages, gamma):
        shapes.append((len(episodes), advantages.shape, gamma))

    def pay_one(episodes, advantages, gamma):
        episodes[int(advantages.flatten().abs().argmax())][0].credit = 1.0

    shapes = []
    flags = "--iterations 1 --gamma 0.5 --sampling all --entropy-coef 0"
    assert start(warm, tmp_path / "a", flags, assign_credit=pay_nobody) == 0
    assert shapes == [(16, (4, 4), 0.5)]
    metrics = read_metrics(tmp_path / "a")[0]
    assert metrics["nonzero_episodes"] > 0
    assert metrics["updates"] == metrics["trained_episodes"] == 0

    assert start(warm, tmp_path / "b", flags, assign_credit=pay_one) == 0
    metrics = read_metrics(tmp_path / "b")[0]
    assert metrics["nonzero_episodes"] > metrics["trained_episodes"] == 1


def test_max_steps_is_of_training_alone():
    desc = MAPS["4x4"]
    assert tiny_settings().lake(desc).max_steps == 8
    assert tiny_settings(max_steps=3).lake(desc).max_steps == 3
    assert tiny_settings(max_steps=3).lake(desc, scenario="noslip").max_steps == 8


@pytest.fixture(scope="module")
def iterations(warm, tmp_path_factory):
    """What was played and learned in each of four iterations, with four groups of six episodes."""
    play = msgrpo.play
    accumulate = train.accumulate_gradient
    seen = []

    def playing(policy, games, *options, **more):
        luck = [str(game.rng.bit_generator.state) for game in games]
        episodes = play(policy, games, *options, **more)
        if len(games) == 24:  # evaluations have other sizes
            maps = [[game.tiles[i : i + 6] for i in range(0, 36, 6)] for game in games]
            seen.append(SimpleNamespace(maps=maps, luck=luck, episodes=episodes, updates=[]))
        return episodes

    def accumulating(policy, episodes, *options, can_stop):
        statistics = accumulate(policy, episodes, *options, can_stop)
        seen[-1].updates.append((episodes, statistics))
        return statistics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(msgrpo, "play", playing)
        patch.setattr(train, "accumulate_gradient", accumulating)
        flags = "--group-size 6 --scenario bigslippery --temperature 1.5 --learning-rate 0.003"
        assert start(warm, tmp_path_factory.mktemp("runs") / "run", flags) == 0
    assert len(seen) == 4
    return seen


def test_a_group_shares_its_map_and_not_its_luck(iterations):
    for it in iterations:
        groups = [it.maps[i : i + 6] for i in range(0, 24, 6)]
        assert all(group == group[:1] * 6 for group in groups)
        assert len({str(group) for group in groups}) > 1
        assert not any(frozenlake.is_held_out(desc) for desc in it.maps)
    assert len({luck for it in iterations for luck in it.luck}) == 4 * 24


def advantages_of(episodes):
    """In groups of six: worked out from the rewards."""
    returns = np.array([sum(step.reward for step in episode) for episode in episodes])
    returns = returns.reshape(-1, 6)
    spread = returns.std(1, keepdims=True)
    return ((returns - returns.mean(1, keepdims=True)) / (spread + 1e-6)).flatten()


def test_all_steps_are_paid_the_advantage_of_their_episode(iterations):
    for it in iterations:
        for episode, advantage in zip(it.episodes, advantages_of(it.episodes), strict=True):
            credit = [step.credit for step in episode]
            assert credit == pytest.approx([advantage] * len(episode), abs=1e-4)


def test_half_of_the_episodes_are_learned_and_none_without_advantage(iterations):
    for it in iterations:
        with_advantage = np.flatnonzero(np.abs(advantages_of(it.episodes)) > 1e-6)
        place = {id(episode): i for i, episode in enumerate(it.episodes)}
        learned = [place[id(episode)] for episodes, _ in it.updates for episode in episodes]
        assert len(set(learned)) == len(learned) == min(12, len(with_advantage))
        assert set(learned) <= set(with_advantage)
        assert max(len(episodes) for episodes, _ in it.updates) <= 5


def test_the_ratio_is_one_at_the_first_update_of_an_iteration(iterations):
    for it in iterations:
        gaps = [statistics["logprob_gap"] for _, statistics in it.updates]
        assert gaps[0] < 1e-5 < gaps[-1]


CHANGES = {  # for every setting flags that QUICK has not
    "seed": "--seed 1",
    "iterations": "--iterations 1",
    "scenario": "--scenario big",
    "max_steps": "--max-steps 3",
    "think": "--think",
    "eval_every": "--eval-every 1",
    "eval_episodes": "--eval-episodes 2",
    "groups": "--groups 2",
    "group_size": "--group-size 2",
    "sampling": "--sampling uniform",
    "keep": "--keep 0.2",
    "gamma": "--gamma 0.5",
    "normalize_std": "--no-normalize-std",
    "update_episodes": "--update-episodes 2",
    "clip": "--clip 1e-6",
    "entropy_coef": "--entropy-coef 0.5",
    "learning_rate": "--learning-rate 0.002",
    "grad_clip": "--grad-clip 1e-9",
    "temperature": "--temperature 0.8",
    "max_new_tokens": "--max-new-tokens 2",
    "invalid_penalty": "--invalid-penalty 5",
    "imagine": "--imagine 2",
    "entropy_floor": "--entropy-floor 9",
    "replay": "--replay 1",
    "warmup_steps": "--warmup-steps 1",
    "dtype": "--dtype bfloat16",
    "micro_batch_tokens": "--micro-batch-tokens 10",
}
# These change nothing in a short run, or nothing at all: each has a test of its own.
NO_CHANGE = {"final_rate", "checkpoint", "checkpoint_every", "device", "layers"}
NO_CHANGE |= {"threads", "recompute"}


def test_no_flag_is_forgotten_here():
    names = {field.name for field in dataclasses.fields(train.Settings)}
    assert names == CHANGES.keys() | NO_CHANGE


@pytest.mark.parametrize("name", CHANGES)
def test_a_flag_changes_something(name, found):
    base = "--iterations 2" if name in ("replay", "iterations") else "--iterations 1"
    assert found(f"{base} {CHANGES[name]}") != found(base)


def test_threads_and_recomputing_change_no_figure(found, monkeypatch):
    expected = found("--iterations 1")
    again = watch_checkpoints(monkeypatch)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert found("--iterations 1 --recompute layers --threads 2") == expected
    assert again
    assert threads == [2]


def test_in_bfloat16_samples_are_scored_again(found):
    figures, _ = found("--iterations 1")
    assert figures[0]["rollout_gap"] is None
    figures, _ = found("--iterations 1 --dtype bfloat16")
    assert figures[0]["rollout_gap"] < 0.05


REFUSALS = {  # use: a word of the message
    "--tiny --nonsense": "--nonsense",
    "--tiny --iter 3": "--iter",
    "--tiny --learning-rat 3": "did you mean --learning-rate?",
    "--tiny --lr 3": "did you mean --learning-rate?",
    "--tinny": "did you mean --tiny?",
    "--tiny extra": "extra",
    "": "--tiny",
    "--tiny --gamma 2": "gamma",
    "--tiny --think": "--think is for --checkpoint",
    "--tiny --gamma nan": "gamma",
    "--tiny --entropy-floor inf": "entropy-floor",
    "--tiny --groups 0": "--groups is 0, not at least 1",
    "--tiny --threads 100000000000": "threads",
    "--tiny --groups 10000000": "groups is 10000000, not at most 1e+06",
    "--tiny --sampling best": "sampling",
    "--tiny --iterations x": "iterations",
    "--tiny --eval RUN": "--tiny",
    "--tiny --device banana": "banana",
    "--tiny --device cuda:99": "cuda:99",
    "--eval RUN --gamma .5": "gamma",
    "--tiny --out RUN": "RUN",
    "--tiny --out FOREIGN": "FOREIGN",
    "--tiny --out /proc/x": "/proc/x",
    "--tiny --out FOREIGN/notes.txt": "notes.txt",
    "--resume RUN --seed 3": "seed",
    "--resume RUN --threads 0": "train.py: --threads is 0, not at least 1",
    "--checkpoint RUN --layers 3": "--layers goes with --tiny",
    "--resume RUN --iterations 1": "has made 2 iterations",
    "--play BARE": "--resume it",
    "--resume ENDED --iterations 3": "begin a run by --checkpoint ENDED",
    "--resume RUN --out NEW": "out",
    "--eval RUN --out NEW": "out",
    "--resume NOWHERE": "NOWHERE",
    "--resume FOREIGN": "FOREIGN",
    "--eval NOWHERE": "NOWHERE",
    "--eval FOREIGN": "FOREIGN",
    "--play EMPTY": "EMPTY",
    "--checkpoint EMPTY": "EMPTY",
    "--resume CUT_STATE": "state.pt",
    "--resume CUT_SETTINGS": "settings.json",
    "--resume OLDER_SETTINGS": "settings.json: --recompute is False, not one of nothing, parts",
    "--eval TRUE_SETTINGS": "settings.json: --seed is True, which is no int",
    "--resume OLDER_STATE": "state.pt: it was written by another version",
    "--resume NO_MOMENTS --iterations 3": "state.pt: malformed",
    "--eval CUT_MODEL": "model.safetensors",
}


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture(scope="module")
def homes(warm, tmp_path_factory):
    """A run, and what is broken or no run at all."""
    home = tmp_path_factory.mktemp("homes")
    names = "RUN CUT_STATE CUT_SETTINGS OLDER_SETTINGS TRUE_SETTINGS OLDER_STATE NO_MOMENTS"
    for name in names.split():
        shutil.copytree(warm, home / name)
    edit(home / "TRUE_SETTINGS/settings.json", seed=True)
    state = torch.load(warm / "state.pt", weights_only=True)
    torch.save(state | {"moments": [1]}, home / "NO_MOMENTS/state.pt")
    del state["replay_pool"]
    torch.save(state, home / "OLDER_STATE/state.pt")
    shutil.copytree(warm / "model", home / "CUT_MODEL")
    cut(home / "CUT_STATE/state.pt")
    cut(home / "CUT_MODEL/model.safetensors")
    cut(home / "CUT_SETTINGS/settings.json")
    edit(home / "OLDER_SETTINGS/settings.json", recompute=False)  # as older runs have it
    (home / "EMPTY").mkdir()
    shutil.copytree(warm, home / "BARE")
    (home / "BARE/state.pt").unlink()
    (home / "BARE/model/model.safetensors").unlink()
    shutil.copytree(warm, home / "ENDED")
    (home / "ENDED/state.pt").unlink()
    (home / "FOREIGN").mkdir()
    (home / "FOREIGN/notes.txt").write_text("mine")
    return home


@pytest.mark.parametrize("use", REFUSALS)
def test_bad_use_is_one_line_and_touches_nothing(use, homes, capfd, monkeypatch):
    monkeypatch.chdir(homes)
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("it began"))
    before = snapshot(homes)
    folders = sorted(homes.iterdir())
    assert command(use) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("train.py: ")
    assert REFUSALS[use] in lines[0]
    assert snapshot(homes) == before
    assert sorted(homes.iterdir()) == folders


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_is_one_line(error, monkeypatch, capsys):
    def run(*_):
        with lm.blaming("a file"):
            raise error

    monkeypatch.setattr(train, "run", run)
    assert command("--tiny") == 2
    assert "less --micro-batch-tokens" in capsys.readouterr().err


@pytest.mark.parametrize("mistake", [lambda *_: torch.zeros(2).view(3), lambda *_: int("x")])
def test_a_mistake_of_ours_or_of_a_fork_is_no_bad_use(mistake, monkeypatch):
    """It keeps its traceback."""
    monkeypatch.setattr(train, "run", mistake)
    with pytest.raises((RuntimeError, ValueError), match="invalid"):
        command("--tiny")


@pytest.fixture
def checkpoint(tmp_path):
    """Copies a golden checkpoint to where it may be changed."""
    return lambda name: shutil.copytree(DATA / name, tmp_path / name)


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path, capsys):
    assert start(DATA / "qwen2-untied", tmp_path / "a") == 2
    assert "tokenizer.json" in capsys.readouterr().err


def test_a_checkpoint_of_another_make_is_trained_and_saved(checkpoint, tmp_path):
    """Qwen2, with more rows than tokens, and end tokens of its own."""
    directory = checkpoint("qwen2-untied")
    golden, _ = lm.load_pretrained(directory)
    torch.manual_seed(0)
    model = lm.Transformer(dataclasses.replace(golden.config, vocab_size=999))
    lm.save_pretrained(directory, model, None)
    tokenizer = json.loads((DATA / "tokenizer-digits.json").read_text())["tokenizer"]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')

    out = tmp_path / "run"
    flags = "--iterations 1 --sampling all --entropy-coef 0.1 --learning-rate 1e-6"
    assert start(directory, out, flags) == 0
    trained, its_tokenizer = lm.load_pretrained(out / "model")
    assert its_tokenizer.size < 999
    assert its_tokenizer.end_ids >= {0, 5}
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / "model" / name).read_bytes() == (directory / name).read_bytes()
    change = (trained.lm_head.weight - model.lm_head.weight).abs()
    assert change.dtype == torch.float32
    assert 0 < change.max() < 3e-6


# Stopped, killed, resumed


class Killed(BaseException):
    pass


def kill(*_):
    raise Killed


def write_half_and_kill(state, file):
    file.write(b"half a state")
    raise Killed


def at_call(patch, module, name, number, act):
    """Have this call of module.name act first."""
    function = getattr(module, name)
    calls = itertools.count(1)

    def acting(*args, **options):
        if next(calls) == number:
            act(*args)
        return function(*args, **options)

    patch.setattr(module, name, acting)


@pytest.mark.parametrize(
    "module, name, number, act, flags",
    [
        (msgrpo, "episode_advantages", 1, kill, ""),  # before there is any state
        (msgrpo, "play", 1, kill, "--warmup-steps 3"),  # behind the warm-up, which is done again
        (torch, "save", 2, write_half_and_kill, ""),
        (lm, "write_safetensors", 1, kill, ""),
        (msgrpo, "episode_advantages", 4, kill, "--dtype bfloat16 --replay 0.5"),
    ],
)
def test_killed_and_resumed_is_never_stopped(
    module, name, number, act, flags, warm, found, tmp_path
):
    """Bit for bit, whatever random numbers were drawn and threads were set before."""
    expected = found(flags)
    out = tmp_path / "a"
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, module, name, number, act)
        with pytest.raises(Killed):
            start(warm, out, flags)
    assert not (out / "summary.json").exists()
    torch.set_num_threads(2)
    torch.manual_seed(99)
    assert command(f"--resume {out}") == 0
    assert results(out) == expected


@pytest.mark.parametrize(
    "module, name, number, signals, lines, has_state",
    [
        (msgrpo, "play", 3, [signal.SIGINT], 1, True),  # while iteration 2 plays: given up
        (msgrpo, "episode_advantages", 2, [signal.SIGTERM], 1, True),  # before its first update
        (train.Learner, "update", 1, [signal.SIGINT], 1, True),  # later: iteration 1 ends first
        (train, "summarize", 4, [signal.SIGINT], 4, True),  # iteration 4 is the last
        (msgrpo, "episode_advantages", 2, [signal.SIGINT] * 2, 1, False),  # at once
    ],
)
def test_interrupted_and_resumed_is_never_stopped(
    module, name, number, signals, lines, has_state, warm, found, tmp_path, capsys
):
    expected = found("")
    out = tmp_path / "a"

    def interrupt(*_):
        for one in signals:
            os.kill(os.getpid(), one)

    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, module, name, number, interrupt)
        assert start(warm, out, "--checkpoint-every 4") == 130
    hint = f": go on by --resume {out}" if has_state else ""
    assert capsys.readouterr().err.strip() == f"train.py: interrupted{hint}"
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert len(read_metrics(out)) == lines
    assert (out / "state.pt").exists() == has_state
    assert command(f"--resume {out}") == 0
    assert results(out) == expected


def test_a_run_outlives_the_reader_of_its_output(warm, tmp_path):
    """As with `train.py | tee log`, of which Ctrl-C ends both: the state is saved."""
    out = tmp_path / "a"
    shutil.copytree(warm, out)
    script = [sys.executable, train.__file__, "--resume", str(out), "--iterations", "99"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(script, **pipes)
    for line in run.stdout:
        if "3/99" in line:
            break
    run.stdout.close()
    run.stdout = None
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert errors.strip() == f"train.py: interrupted: go on by --resume {out}"
    saved = torch.load(out / "state.pt", weights_only=True)["history"]
    assert 3 <= len(saved) == len(read_metrics(out)) < 99


def test_half_of_torchruns_environment_is_refused(monkeypatch, capsys):
    """One process would do the work of a share, and not say so."""
    monkeypatch.setenv("RANK", "0")
    assert command("--tiny") == 2
    assert "WORLD_SIZE" in capsys.readouterr().err


def test_a_run_may_be_moved(warm, found, tmp_path, monkeypatch):
    """It goes on without the checkpoint that it started from, and can be looked at before."""
    expected = found("")
    shutil.copytree(warm, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, msgrpo, "episode_advantages", 4, kill)
        with pytest.raises(Killed):
            start("base", "run")
    shutil.rmtree("base")
    Path("run").rename("moved")
    assert command("--eval moved --eval-episodes 1") == 0
    assert command("--play moved") == 0
    assert command("--resume moved") == 0
    assert results(Path("moved")) == expected


def test_a_run_may_be_lengthened(warm, found, tmp_path):
    expected = found("")
    out = tmp_path / "a"
    assert start(warm, out, "--iterations 2") == 0
    assert command(f"--resume {out} --iterations 4 --micro-batch-tokens 9999") == 0
    assert results(out) == expected
    settings = json.loads((out / "settings.json").read_text())
    assert settings["iterations"] == 4
    assert settings["micro_batch_tokens"] == 9999


def test_a_run_without_finite_gradients_ends(warm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Learner, "update", lambda self, rate: float("nan"))
    assert start(warm, tmp_path / "a", "--iterations 9") == 2
    assert "no gradient was finite since iteration 1" in capsys.readouterr().err
    metrics = read_metrics(tmp_path / "a")
    assert len(metrics) == 3
    assert all(record["refused_updates"] and not record["updates"] for record in metrics)
    assert metrics[0]["grad_norm"] is None


def test_a_run_that_learned_nothing_says_why(warm, tmp_path, capsys):
    assert start(warm, tmp_path / "a", "--iterations 1 --scenario big --invalid-penalty 0") == 0
    assert "nothing was learned" in capsys.readouterr().out


def test_a_run_whose_steps_are_too_long_says_so(warm, tmp_path, capsys):
    flags = "--iterations 1 --learning-rate 50 --update-episodes 99 --invalid-penalty 1"
    assert start(warm, tmp_path / "a", flags) == 0
    assert "--learning-rate was too high" in capsys.readouterr().out


# Several processes


RUN_EACH = """
import sys, train
assert train.main(sys.argv[1].split()) == 0
train.join_processes = lambda device: None  # they are joined
assert train.main(sys.argv[2].split()) == 0
"""


def two_processes(*lines):
    """What train.py prints for these command lines, by two processes on the CPU."""
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 --no-python"
    ended = subprocess.run(
        [sys.executable, *launch.split(), sys.executable, "-c", RUN_EACH, *lines],
        cwd=Path(train.__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "UserWarning" not in ended.stderr  # such as FSDP2's of views
    return ended.stdout


def first_moments(out):
    """Adam's, at the end of a run: the gradients of its updates, averaged."""
    moments = torch.load(out / "state.pt", weights_only=True)["moments"]["state"]
    return torch.cat([moments[name]["exp_avg"].flatten() for name in sorted(moments)])


def scenarios_of(out):
    return json.loads((out / "summary.json").read_text())["scenarios"]


def test_two_processes_do_what_one_does(warm, tmp_path):
    """Metrics, gradients and weights are the same; and two go on with what one began."""
    flags = "--micro-batch-tokens 200 --learning-rate 1e-4"
    one = tmp_path / "one"
    two = tmp_path / "two"
    began = tmp_path / "began"
    assert start(warm, one, flags) == 0
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, msgrpo, "episode_advantages", 3, kill)
        with pytest.raises(Killed):
            start(warm, began, flags)
    line = f"--checkpoint {warm} --out {two} {QUICK} {flags}"
    shown = two_processes(line, f"--resume {began}")
    assert shown.count("this run is") == 1  # the first process alone speaks

    expected = read_metrics(one)
    weights = lm.read_safetensors(one / "model/model.safetensors")
    moments = first_moments(one)
    for out in (two, began):
        for found, record in zip(read_metrics(out), expected, strict=True):
            for key, value in record.items():
                if "second" not in key and value is not None:
                    assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
        found = lm.read_safetensors(out / "model/model.safetensors")
        torch.testing.assert_close(found, weights, atol=1e-5, rtol=0)
        assert (first_moments(out) - moments).norm() < 1e-5 * moments.norm()
        assert scenarios_of(out) == scenarios_of(one)


# Learning


def test_the_method_knows_no_game_and_no_processes():
    source = Path(msgrpo.__file__).read_text()
    imports = re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)
    assert set(imports) <= {"dataclasses", "typing", "numpy", "torch"}
    assert "distributed" not in source


def test_a_corridor_is_learned():
    """Another game, another vocabulary, no warm-up: from two successes in five to nearly always."""
    agent = corridor_agent(std=0.2)
    optimizer = torch.optim.Adam(agent.model.parameters(), lr=0.005)
    success = []
    for iteration in range(40):
        games = [
            Corridor(("west", "east")[group % 2], 2 + group // 2 % 2, iteration, group, episode)
            for group in range(8)
            for episode in range(16)
        ]
        episodes = msgrpo.play(agent, games)
        success.append(np.mean([episode[-1].success for episode in episodes]))
        returns = msgrpo.episode_returns(episodes).view(8, 16)
        advantages = msgrpo.episode_advantages(returns).flatten()
        msgrpo.assign_credit(episodes, advantages)
        rng = np.random.default_rng(iteration)
        drawn = msgrpo.draw_episodes(advantages, "aaw", 64, rng)
        msgrpo.accumulate_gradient(agent, [episodes[i] for i in drawn], entropy_coef=0.05)
        optimizer.step()
        optimizer.zero_grad()
    assert np.mean(success[:3]) < 0.45
    assert np.mean(success[-5:]) > 0.9


def test_a_frozen_lake_is_learned(warm, tmp_path, monkeypatch):
    """All of train.py on one map, where a random player has .02."""
    draw_map = frozenlake.draw_map

    def draw_one(scenario, rng, held_out=False):
        if held_out:
            return draw_map(scenario, rng, held_out=True)
        return ["SFFF", "FFFF", "FFFF", "FFFG"]

    monkeypatch.setattr(frozenlake, "draw_map", draw_one)
    flags = "--iterations 18 --group-size 32 --update-episodes 16 --learning-rate 0.003"
    assert start(warm, tmp_path / "a", f"{flags} --temperature 1") == 0
    success = [record["success"] for record in read_metrics(tmp_path / "a")]
    assert success[0] < 0.1
    assert np.mean(success[-5:]) > 0.4


# Files of others: safetensors, config.json, shards, tokenizers, chat templates


# safetensors


def raw_file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def f32(shape, *span):
    return {"dtype": "F32", "shape": shape, "data_offsets": list(span)}


ACCEPTED = [
    raw_file({}),
    raw_file(b" \n{} \t "),
    raw_file({"__metadata__": None}),
    raw_file({"__metadata__": {"a": "b"}}),
    raw_file({"b": f32([1], 4, 8), "a": f32([], 0, 4)}, bytes(8)),
    raw_file({"a": f32([0, 1 << 40], 0, 0)}),
    raw_file({"a": f32([2], 0, 8) | {"more": [None]}}, bytes(8)),
    raw_file({"a": f32([1] * 65, 0, 4)}, bytes(4)),
    raw_file(
        {"z": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": f32([1], 1, 5)}, bytes(5)
    ),
]
BAD_SIZES = [struct.pack("<Q", size) + b"{}" for size in (3, 100_000_001, 1 << 63)]
BAD_HEADERS = [
    b"\xef\xbb\xbf{}",
    b'{"\xff": 1}',
    b"[]",
    b"{}x",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0], "dtype": "F32"}}',
    b'{"__metadata__": {}, "__metadata__": {}}',
    b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0], "more": NaN}}',
    {"__metadata__": []},
    {"__metadata__": {"a": 1}},
    {"__metadata__": {"\ud800": "a"}},
    {"a": None},
    {"a": []},
    {"a": {}},
]
BAD_ENTRIES = [
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
]
REFUSED = [
    b"",
    bytes(7),
    bytes(8),
    *BAD_SIZES,
    *(raw_file(header) for header in BAD_HEADERS),
    *(raw_file({"a": entry}, bytes(4)) for entry in BAD_ENTRIES),
    raw_file({"\ud800": f32([1], 0, 4)}, bytes(4)),  # a name that is no valid Unicode
    raw_file({}, b"\0"),
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


KINDS = "bfloat16 float16 float32 float64 int8 int16 int32 int64 uint8 bool".split()


def test_safetensors_round_trip_truncations_and_mutations(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = [torch.tensor([[-1.5, 2]]).to(getattr(torch, kind)) for kind in KINDS]
    tensors += [torch.tensor(2.5), torch.empty(0, 3), torch.arange(6.0).view(2, 3).T]
    written = {f"tensor {i} é": tensor for i, tensor in enumerate(tensors)}
    lm.write_safetensors(path, written)
    good = path.read_bytes()
    read = lm.read_safetensors(path)
    assert int.from_bytes(good[:8], "little") % 8 == 0
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    for size in range(0, len(good), 3):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError):
            lm.read_safetensors(path)
    rng = random.Random(0)
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
        assert sum(tensor.nbytes for tensor in read.values()) <= len(broken)


# Directories


def edit(path, **changes):
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))


def small_model():
    texts = ["<action>", "left", " left", "P", " _", "\n", " G", " é", "</action>"]
    tokenizer = lm.tiny_tokenizer(texts, ["</action>"], r"<?/?\w+>?| ?\w+|\s")
    torch.manual_seed(0)
    config = lm.Config("llama", tokenizer.size, 16, 24, 1, 2, 1, 8, tie_word_embeddings=True)
    return lm.Transformer(config), tokenizer


def test_failed_save_leaves_the_old_files(checkpoint):
    directory = checkpoint("qwen3")
    model, tokenizer = small_model()
    before = snapshot(directory)
    unwritable = {"a": torch.zeros(1), "b": torch.empty(1, device="meta")}
    with pytest.raises(NotImplementedError):
        lm.save_pretrained(directory, model, tokenizer, weights=unwritable)
    with pytest.raises(ValueError, match="complex64"):
        complex64 = torch.zeros(1, dtype=torch.complex64)
        lm.write_safetensors(directory / "model.safetensors", {"a": complex64})
    assert snapshot(directory) == before


@pytest.mark.parametrize("writer", ["write_safetensors(path, {'a': x})", "torch_save(path, x)"])
def test_full_disk_is_an_error_of_one_line_that_names_the_file(writer, tmp_path):
    """A limit on the size of files stands for the full disk."""
    path = tmp_path / "a"
    path.write_text("before")
    script = f"""
import sys, torch, model
def torch_save(path, x):
    with model.replacing(path) as file:
        torch.save(x, file)
write_safetensors = model.write_safetensors
path, x = sys.argv[1], torch.zeros(100_000)
try:
    {writer}
except OSError as error:
    print(error)
"""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    run = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        cwd=Path(lm.__file__).parent,
    )
    assert "too large" in run.stdout and str(path) in run.stdout, run
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral"},
        {"model_type": "absent"},
        {"model_type": ["llama"]},
        {"hidden_act": "gelu"},
        {"use_sliding_window": True},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": 7},
        {"quantization_config": {"bits": 4}},
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": "yarn"},
        {"rope_parameters": {"rope_theta": "1e4"}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_parameters": None, "rope_theta": -1.0},
        {"rope_parameters": None, "rope_theta": float("inf")},
        {"rms_norm_eps": 0},
        {"rms_norm_eps": float("nan")},
        {"eos_token_id": "2"},
        {"eos_token_id": [1, True]},
        {"eos_token_id": 1 << 70},
        {"tie_word_embeddings": 1},
        {"attention_bias": False},
        {"mlp_bias": "no"},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
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


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads does not divide"),
        ({"head_dim": 3}, "head_dim is odd"),
        ({"rope_scaling": dict.fromkeys(lm.LLAMA3_ROPE, 4) | {"type": "llama3"}}, "high_freq"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    ],
    ids=str,
)
def test_config_whose_numbers_do_not_fit(changes, reason):
    """Said before weights of such shapes are looked for."""
    config = json.loads((DATA / "llama-biases/config.json").read_text())
    with pytest.raises(ValueError, match=reason):
        lm.parse_config(json.dumps(config | changes).encode())


def test_config_that_is_no_json_object(checkpoint):
    path = checkpoint("llama-biases") / "config.json"
    for text in (b"", b"[]", b"{", b"[" * 100_000, b"\xff"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="config.json"):
            lm.load_pretrained(path.parent)


@pytest.mark.parametrize(
    "raw, expected",
    [
        ({}, {"num_key_value_heads": 4, "head_dim": 8, "rope_theta": 1e4}),
        ({}, {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_scaling": None}),
        ({"model_type": "qwen3"}, {"head_dim": 128}),
        ({"model_type": "qwen3", "head_dim": None}, {"head_dim": 8}),
        ({"model_type": "qwen2", "attention_bias": True}, {"attention_bias": False}),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, {"rope_theta": 5e5}),
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


def test_llama3_rope_in_both_dialects():
    base = json.loads((DATA / "llama3-rope" / "config.json").read_text())
    old = lm.parse_config(json.dumps(base).encode())
    assert old.rope_scaling["rope_type"] == "llama3" and len(old.rope_scaling) == 5
    rope = base.pop("rope_scaling") | {"rope_theta": base.pop("rope_theta")}
    new = lm.parse_config(json.dumps(base | {"rope_parameters": rope}).encode())
    assert new == old


def test_tensors_that_do_not_fit(checkpoint):
    path = checkpoint("llama-biases") / "model.safetensors"
    good = lm.read_safetensors(path)
    name = "model.norm.weight"
    missing = {key: tensor for key, tensor in good.items() if key != name}
    for tensors, blamed in (
        (good | {name: good[name][1:]}, name),
        (good | {name: good[name].int()}, name),
        (good | {"other": good[name]}, "other"),
        (missing, name),
    ):
        lm.write_safetensors(path, tensors)
        with pytest.raises(ValueError, match=blamed):
            lm.load_pretrained(path.parent)
    old_buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    lm.write_safetensors(path, good | old_buffer)
    lm.load_pretrained(path.parent)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value, checkpoint):
    path = checkpoint("llama-biases") / "model.safetensors"
    tensors = lm.read_safetensors(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = value
    lm.write_safetensors(path, tensors)
    with pytest.raises(ValueError, match=name):
        lm.load_pretrained(path.parent)


def test_tied_head_in_the_file(checkpoint, tmp_path):
    """As transformers: an equal one goes, a different one unties, one alone is the embeddings."""
    path = checkpoint("qwen2-tied") / "model.safetensors"
    good = lm.read_safetensors(path)
    embeddings = good["model.embed_tokens.weight"]
    ids = torch.arange(5)[None]
    tied = lm.load_pretrained(path.parent)[0](ids)

    lm.write_safetensors(path, good | {"lm_head.weight": embeddings.clone()})
    model, _ = lm.load_pretrained(path.parent)
    assert model.lm_head is None and torch.equal(model(ids), tied)

    lm.write_safetensors(path, good | {"lm_head.weight": 2 * embeddings})
    model, _ = lm.load_pretrained(path.parent)
    assert torch.allclose(model(ids), 2 * tied)
    lm.save_pretrained(tmp_path / "new", model, None)
    again, _ = lm.load_pretrained(tmp_path / "new")
    assert torch.equal(again(ids), model(ids)) and not again.config.tie_word_embeddings

    del good["model.embed_tokens.weight"]
    lm.write_safetensors(path, good | {"lm_head.weight": embeddings})
    assert torch.equal(lm.load_pretrained(path.parent)[0](ids), tied)


@pytest.mark.parametrize("spoil", "outside absent null elsewhere extra twice no_map".split())
def test_shards_refused(spoil, checkpoint):
    directory = checkpoint("qwen2-untied")
    index = directory / "model.safetensors.index.json"
    homes = json.loads(index.read_text())["weight_map"]
    name = next(iter(homes))
    (other,) = {*homes.values()} - {homes[name]}
    changes = {
        "outside": {name: f"../{home}" for name, home in homes.items()},
        "absent": {name: "none.safetensors"},
        "null": {name: None},
        "elsewhere": {name: other},
        "extra": {"more": other},
    }
    if spoil == "outside":  # all is there, and good
        for path in directory.glob("*.safetensors"):
            shutil.copy(path, directory.parent)
    if spoil == "twice":
        tensors = lm.read_safetensors(directory / other)
        tensors[name] = lm.read_safetensors(directory / homes[name])[name]
        lm.write_safetensors(directory / other, tensors)
    homes |= changes.get(spoil, {})
    index.write_text(json.dumps({} if spoil == "no_map" else {"weight_map": homes}))
    with pytest.raises((ValueError, OSError)):
        lm.load_pretrained(directory)


def test_an_index_of_shards_is_not_carried_over(checkpoint, tmp_path):
    """A run's folder has no shards."""
    directory = checkpoint("qwen2-untied")
    lm.save_small_files(tmp_path / "new", *lm.load_pretrained(directory))
    assert "config.json" in os.listdir(tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.index.json"))


def test_tensors_that_the_index_does_not_name(checkpoint):
    """As in transformers, one of the model's is taken, and another is left alone."""
    directory = checkpoint("qwen2-untied")
    before, _ = lm.load_pretrained(directory)
    index = directory / "model.safetensors.index.json"
    homes = json.loads(index.read_text())["weight_map"]
    home = homes.pop("model.layers.0.self_attn.q_proj.weight")
    index.write_text(json.dumps({"weight_map": homes}))
    tensors = lm.read_safetensors(directory / home)
    lm.write_safetensors(directory / home, tensors | {"other": torch.ones(2)})
    after, _ = lm.load_pretrained(directory)
    ids = torch.arange(5)[None]
    assert torch.equal(before(ids), after(ids))


def test_folders_that_hold_no_model(tmp_path, monkeypatch):
    def reason(path):
        with pytest.raises(ValueError) as caught:
            lm.load_pretrained(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
        return str(caught.value)

    monkeypatch.chdir(tmp_path)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert f"hf download {name} --local-dir" in reason(name)
    assert "hf download" in reason("gpt2")
    assert reason(f"{tmp_path}/nowhere").endswith("no such folder")
    Path("file").write_text("")
    assert "no folder" in reason("file")
    Path("empty").mkdir()
    assert "config.json" in reason("empty")

    Path("adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        Path("adapter", name).write_text("{}")
    assert "LoRA" in reason("adapter") and "merge" in reason("adapter")

    cache = Path("hub/models--org--name/snapshots/0123abc")
    shutil.copytree(DATA / "llama-biases", cache)
    assert str(cache) in reason("hub/models--org--name")
    lm.load_pretrained(cache)
    (cache / "model.safetensors").unlink()
    assert "model.safetensors" in reason(cache)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_git_lfs_pointer(name, checkpoint):
    path = checkpoint("llama-biases") / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=f"{path}: .*git-lfs.*git lfs pull"):
        lm.load_pretrained(path.parent)


def test_other_files_are_carried_over_and_old_weights_go(checkpoint, tmp_path):
    directory = checkpoint("qwen2-untied")
    new = tmp_path / "new"
    edit(directory / "config.json", unknown=[1], eos_token_id=[3, 4])
    (directory / "generation_config.json").write_text('{"eos_token_id": 5}')
    (directory / "notes.json").write_text("{}")
    lm.save_pretrained(new, lm.load_pretrained(directory)[0], None)
    raw = json.loads((new / "config.json").read_text())
    assert (raw["unknown"], raw["eos_token_id"], raw["torch_dtype"]) == ([1], [3, 4], "float32")
    carried = {"config.json", "generation_config.json", "model.safetensors", "notes.json"}
    assert {path.name for path in new.iterdir()} == carried
    lm.save_pretrained(directory, *small_model())  # over the shards of another model
    new_ones = {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in directory.iterdir()} == carried | new_ones


# Tokens


def golden(name):
    return json.loads((DATA / f"tokenizer-{name}.json").read_text())


def make_tokenizer(raw, **more):
    return lm.Tokenizer(json.dumps(raw).encode(), **more)


def ids_without(tokenizer, text):
    """Of a text, with nothing in it that is a control token."""
    ids = tokenizer.encode(text)
    assert not {*tokenizer.special.values()} & {*ids}
    return ids


@pytest.mark.parametrize("name", ["chatml-nfc", "digits", "headers", "gpt2", "otherwise"])
def test_golden_tokens(name):
    raw = golden(name)
    tokenizer = make_tokenizer(raw["tokenizer"])
    for text, ids in raw["expected"]:
        assert tokenizer.encode(text) == ids, text
    control = "".join(tokenizer.special)  # typed, it stays text
    assert tokenizer.decode(ids_without(tokenizer, control)) == control
    assert tokenizer.decode(tokenizer.special.values()) == control
    assert tokenizer.decode([10**12, -1]) == ""
    assert tokenizer.encode("a\ud800b")


def test_merges_of_the_older_spelling_and_whole_pieces():
    raw = golden("otherwise")
    bpe = raw["tokenizer"]["model"]
    bpe["merges"] = [" ".join(merge) for merge in bpe["merges"]]
    bpe["ignore_merges"] = True
    tokenizer = make_tokenizer(raw["tokenizer"])
    for text, ids in raw["ignore_merges"]:
        assert tokenizer.encode(text) == ids, text


def test_vocab_and_merges_without_tokenizer_json(checkpoint):
    directory = checkpoint("qwen2-tied")
    raw = golden("older")
    for name, text in raw["files"].items():
        (directory / name).write_text(text)
    path = directory / "model.safetensors"
    embeddings = {"model.embed_tokens.weight": torch.zeros(330, 8)}
    lm.write_safetensors(path, lm.read_safetensors(path) | embeddings)
    edit(directory / "config.json", vocab_size=330)
    _, tokenizer = lm.load_pretrained(directory)
    for text, ids in raw["expected"]:
        assert tokenizer.encode(text) == ids, text
    assert 320 in tokenizer.end_ids and tokenizer.special["<|im_end|>"] == 320


def test_text_that_no_piece_matches_is_kept():
    raw = golden("headers")["tokenizer"]
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+"
    tokenizer = make_tokenizer(raw)
    text = "the cat, 12\n sat"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens_without_an_embedding_are_never_produced():
    raw = golden("otherwise")["tokenizer"]
    everything = make_tokenizer(raw)
    action = everything.added["<action>"]
    rows = everything.size - 4  # the last four are added: <action>, </action>, <act and <|end|>
    fewer = make_tokenizer(raw, rows=rows)
    assert action == rows == fewer.size and not fewer.special
    text = "the <action>left</action> thecat<|end|>"
    assert max(fewer.encode(text)) < rows
    assert fewer.decode(fewer.encode(text)) == text
    longest = max(raw["model"]["vocab"].values())
    assert max(make_tokenizer(raw, rows=longest - 9).encode(text)) < longest - 9
    with pytest.raises(ValueError, match="200 embeddings"):
        make_tokenizer(raw, rows=200)
    raw["post_processor"] = {"single": [{"SpecialToken": {"id": "<|end|>"}}]}
    with pytest.raises(ValueError, match="before all text"):
        make_tokenizer(raw, rows=rows)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw, bpe: bpe.update(type="WordPiece"),
        lambda raw, bpe: bpe.update(vocab=[]),
        lambda raw, bpe: bpe.update(end_of_word_suffix="</w>"),
        lambda raw, bpe: raw.update(normalizer={"type": "Lowercase"}),
        lambda raw, bpe: raw.pop("model"),
        lambda raw, bpe: raw.update(pre_tokenizer={"type": "Metaspace"}),
        lambda raw, bpe: raw.update(pre_tokenizer=None),
        lambda raw, bpe: raw["pre_tokenizer"].update(add_prefix_space=True),
        lambda raw, bpe: raw["added_tokens"].append(5),
        lambda raw, bpe: raw["added_tokens"][0].update(lstrip=True),
        lambda raw, bpe: raw["added_tokens"][0].update(content=""),
        lambda raw, bpe: bpe["merges"].append(["no", "such"]),
        lambda raw, bpe: bpe["merges"].append(["t"]),
        lambda raw, bpe: bpe["merges"].append("t h e"),
        lambda raw, bpe: bpe["vocab"].update(a=1),
        lambda raw, bpe: bpe["vocab"].update(a=1.5),
        lambda raw, bpe: raw["added_tokens"][0].update(id=1),
        lambda raw, bpe: raw["added_tokens"][0].update(id=-1),
        lambda raw, bpe: bpe.update(byte_fallback=True),
        lambda raw, bpe: bpe["vocab"].update({"\u2581": 9999}),
    ],
)
def test_tokenizer_refused_before_weights_are_read(spoil, checkpoint):
    directory = checkpoint("llama-biases")
    edit(directory / "config.json", vocab_size=400)
    (directory / "model.safetensors").write_bytes(b"not read")
    raw = golden("gpt2")["tokenizer"]
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="model.safetensors"):
        lm.load_pretrained(directory)
    spoil(raw, raw["model"])
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="tokenizer.json"):
        lm.load_pretrained(directory)


def test_sentencepiece_is_refused_by_name(checkpoint):
    directory = checkpoint("llama-biases")
    (directory / "model.safetensors").unlink()
    (directory / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(ValueError, match="sentencepiece.*Llama 2.*take a model of Llama 3"):
        lm.load_pretrained(directory)
    vocab = {"<unk>": 0, "\u2581the": 1, "\u2581": 2}
    raw = {"model": {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": []}}
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="sentencepiece.*Llama 2.*take a model of Llama 3"):
        lm.load_pretrained(directory)


def test_tiny_tokenizer_and_save(tmp_path):
    model, tokenizer = small_model()
    assert len(tokenizer.encode("<action>left</action> left P _\n")) == 8
    assert tokenizer.size == 256 + 7
    lm.save_pretrained(tmp_path, model, tokenizer)
    # a special token would make transformers cut the instructions where they mention the tag
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()).get("eos_token") is None
    again, back = lm.load_pretrained(tmp_path)
    text = "Go <left> 日本 left\n<|end|>"
    ids = torch.tensor([tokenizer.encode(text)])
    assert back.json == tokenizer.json
    assert [tokenizer.decode([i]) for i in back.end_ids] == ["</action>"]
    # several are a list; some libraries read none where one will do
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == min(back.end_ids)
    assert torch.equal(again(ids), model(ids)) and back.decode(ids[0].tolist()) == text


def test_tiny_prompt_is_plain_text():
    texts = ["Go left.\n\n", "P _\n", "<action>left</action>"]
    tokenizer = lm.tiny_tokenizer(texts, texts[2:], train.TINY_PIECES)
    ids = tokenizer.prompt("Go left.\n\nP _\nP _")
    tokens = [tokenizer.decode([i]) for i in ids]
    assert tokens == ["Go left.\n\n", "P _\n", "P _\n"]
    assert "no chat template" in tokenizer.describe_prompt()


@pytest.mark.parametrize("size", (4, 6))
def test_a_board_is_read_by_pairs_of_cells(size):
    """Whatever stands in them."""
    _, tokenizer = train.tiny_start(tiny_settings())
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = [" ".join(rng.choice(list("P_OG"), size)) for _ in range(size)]
        ids = tokenizer.prompt("\n".join(rows))
        assert len(ids) == size * size // 2


# Prompts

PROMPTS = json.loads((DATA / "chats" / "prompts.json").read_text())
CHATS = PROMPTS["chats"]


def chat_files(name):
    """The small files of a model with this chat, and its template, which is in none of them."""
    chat = CHATS[name]
    raw = golden(chat["base"])["tokenizer"]
    raw["added_tokens"] = chat["added_tokens"]
    raw["post_processor"] = chat["post_processor"]
    files = {
        "tokenizer.json": json.dumps(raw).encode(),
        "tokenizer_config.json": json.dumps(chat["settings"]).encode(),
    }
    template = chat["template"]
    if template is not None:
        template = (DATA / "chats" / f"{template}.jinja").read_text()
    return files, template


CONFIG = lm.Config("llama", 1000, 8, 8, 1, 1, 1, 8)


def load_chat(name, template=None, settings=None):
    """Its tokenizer, of files; template and settings go before its own."""
    files, own = chat_files(name)
    settings = settings or {}
    template = own if template is None else template
    if template is not None and "chat_template" not in settings:
        files["chat_template.jinja"] = template.encode()
    files["tokenizer_config.json"] = json.dumps(CHATS[name]["settings"] | settings).encode()
    return lm.load_tokenizer(Path("folder"), files, [], CONFIG)


@pytest.fixture
def that_day(monkeypatch):
    """The day of the goldens, which Llama 3's template writes into a prompt."""
    monkeypatch.setattr(lm.time, "strftime", {"%d %b %Y": PROMPTS["today"]}.__getitem__)


@pytest.mark.parametrize("name", CHATS)
def test_golden_prompts(name, that_day):
    tokenizer = load_chat(name)
    for text, think, ids in CHATS[name]["prompts"]:
        assert tokenizer.prompt(text, think) == ids, (text, think)
    first = tokenizer.decode(CHATS[name]["prompts"][0][2])
    if CHATS[name]["template"] is None:
        assert "no chat template" in tokenizer.describe_prompt()
        assert first.split("the cat")[0] in tokenizer.describe_prompt()
    else:
        assert "no chat template" not in tokenizer.describe_prompt()


@pytest.mark.parametrize("name", CHATS)
def test_a_typed_control_token_stays_text_in_a_prompt(name, that_day):
    tokenizer = load_chat(name)
    control = "".join(tokenizer.special)
    plain = tokenizer.prompt("")
    ids = tokenizer.prompt(control)
    for name, i in tokenizer.special.items():
        assert ids.count(i) == plain.count(i), name
    assert control in tokenizer.decode(ids)


def test_overlapping_control_tokens_stay_text():
    raw = golden("gpt2")["tokenizer"]
    more = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
    raw["added_tokens"] = [
        more | {"content": "abc", "id": 400},
        more | {"content": "cab", "id": 401},
    ]
    tokenizer = make_tokenizer(raw)
    assert max(tokenizer.encode("abcab abcabcab")) < 400


def test_end_of_the_assistants_turn_ends_an_answer(that_day):
    ends = {"qwen2.5": "<|im_end|>", "r1-distill": "<｜end▁of▁sentence｜>", "llama3": "<|eot_id|>"}
    for name, end in ends.items():
        tokenizer = load_chat(name, settings={"eos_token": None})
        assert [tokenizer.decode([i]) for i in tokenizer.end_ids] == [end]
    tokenizer = load_chat("gpt2")  # no chat: eos_token of tokenizer_config.json
    assert [tokenizer.decode([i]) for i in tokenizer.end_ids] == ["<|endoftext|>"]
    eos = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False}
    assert load_chat("gpt2", settings={"eos_token": eos}).end_ids == tokenizer.end_ids


def test_where_a_template_comes_from():
    one = "{{ messages[-1].content }}<|im_end|>"
    named = [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": one}]
    for settings in ({"chat_template": one}, {"chat_template": named}):
        tokenizer = load_chat("qwen2.5", settings=settings)
        assert tokenizer.decode(tokenizer.prompt("the")) == "the<|im_end|>"
    files, _ = chat_files("qwen2.5")
    files["tokenizer_config.json"] = json.dumps({"chat_template": "{{ 1 }}"}).encode()
    files["chat_template.jinja"] = one.encode()
    tokenizer = lm.load_tokenizer(Path("folder"), files, [], CONFIG)
    assert tokenizer.decode(tokenizer.prompt("the")) == "the<|im_end|>"
    assert tokenizer.end_ids == {tokenizer.special["<|im_end|>"]}


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ messages[0].content }}{{ raise_exception('no chat') }}",
        "{{ messages[0].content }}{{ messages[0].content.__class__.__mro__ }}",
        "{{ messages[0].content }}{{ messages.append(1) }}",
        "{{ messages[5].content.x }}",
        "nothing of the user's",
        "{{ " + "(" * 100_000,
        "{% for _ in range(10 ** 9) %}{% endfor %}",
        "\udcff",
    ],
    ids=range(9),
)
def test_template_refused(template):
    files, _ = chat_files("qwen2.5")
    files["chat_template.jinja"] = template.encode("utf-8", "surrogateescape")
    with pytest.raises(ValueError, match="^folder/"):
        lm.load_tokenizer(Path("folder"), files, [], CONFIG)


def test_template_without_a_default():
    with pytest.raises(ValueError, match="tokenizer_config.json.*default"):
        load_chat("qwen2.5", settings={"chat_template": [{"name": "rag", "template": "{{ 1 }}"}]})


def test_a_models_chat_is_saved_with_it(checkpoint, tmp_path):
    directory = checkpoint("qwen2-tied")
    path = directory / "model.safetensors"
    embeddings = {"model.embed_tokens.weight": torch.zeros(400, 8)}
    lm.write_safetensors(path, lm.read_safetensors(path) | embeddings)
    edit(directory / "config.json", vocab_size=400)
    files, template = chat_files("qwen3")
    for name, data in files.items():
        (directory / name).write_bytes(data)
    (directory / "chat_template.jinja").write_text(template)
    model, tokenizer = lm.load_pretrained(directory)
    lm.save_pretrained(tmp_path / "new", model, tokenizer)
    _, again = lm.load_pretrained(tmp_path / "new")
    for text, think, ids in CHATS["qwen3"]["prompts"]:
        assert again.prompt(text, think) == tokenizer.prompt(text, think) == ids
    assert again.end_ids == tokenizer.end_ids and again.size == tokenizer.size


def load_script(name):
    """A script of results/ as a module."""
    path = Path(train.__file__).parent / f"results/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_kl_term_leads_back_to_the_reference():
    """Its gradient is 0 at the reference, and that of the mean of q/p - log q/p - 1 elsewhere."""
    script = load_script("own_game")
    agent = corridor_agent()
    reference = corridor_agent()
    episodes = msgrpo.play(agent, corridors(6))
    script.add_kl(agent, reference, episodes, coef=0.5)
    assert gradient(agent.model).norm() < 1e-6

    with torch.no_grad():
        agent.model.lm_head.weight *= 1.5
    agent.model.zero_grad()
    script.add_kl(agent, reference, episodes, coef=0.5)
    found = gradient(agent.model)
    agent.model.zero_grad()
    answers = [step.answer for episode in episodes for step in episode]
    log_p = agent.score(answers)[0]
    log_q = reference.score(answers)[0].detach()
    (0.5 * ((log_q - log_p).exp() - (log_q - log_p) - 1).mean()).backward()
    torch.testing.assert_close(found, gradient(agent.model))
    assert found.norm() > 1e-3
    assert all(weight.grad is None for weight in reference.model.parameters())


def test_the_smollm2_scripts_agent_scores_what_it_says(tmp_path):
    """On a random model that has SmolLM2's chat; the script's whole command."""
    script = load_script("smollm2")
    tokenizer = load_chat("smollm2")
    model = lm.Transformer(dataclasses.replace(CONFIG, vocab_size=tokenizer.size))
    files, template = chat_files("smollm2")
    model.files = files | {"chat_template.jinja": template.encode()}
    lm.save_pretrained(tmp_path / "model", model, tokenizer)
    flags = f"--groups 2 --group-size 2 --iterations 1 --sampling all --eval-episodes 2 {CPU}"
    argv = [*script.FLAGS, "--checkpoint", str(tmp_path / "model"), *flags.split()]
    argv += ["--out", str(tmp_path / "run")]
    assert train.main(argv, agent_class=script.WordAgent) == 0
    [metrics] = read_metrics(tmp_path / "run")
    assert metrics["updates"] == 1 and metrics["trained_tokens"] == metrics["generated_tokens"]
    assert metrics["logprob_gap"] < 1e-5


def test_the_smollm2_scripts_agent_runs_a_state_once_until_weights_change(monkeypatch):
    script = load_script("smollm2")
    tokenizer = load_chat("smollm2")
    model = lm.Transformer(dataclasses.replace(CONFIG, vocab_size=tokenizer.size))
    agent = script.WordAgent(model, tokenizer, "Cross.", 1.0, 1)
    runs = []
    read_prompts = agent.read_prompts
    monkeypatch.setattr(
        agent, "read_prompts", lambda prompts: runs.append(len(prompts)) or read_prompts(prompts)
    )
    uniforms = np.random.default_rng(0).random((3, 1))
    first = agent.act(["P _", "_ P", "P _"], uniforms)
    assert agent.act(["P _", "_ P", "P _"], uniforms) == first
    agent.act(["P G"], uniforms[:1])
    assert runs == [2, 1]

    agent.score(first)[0].sum().backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()
    second = agent.act(["P _"], uniforms[:1])
    assert runs == [2, 1, 1]
    assert second[0].logprobs == pytest.approx(agent.score(second)[0].tolist())

    agent.act(["P _", "_ P"], None)  # of an evaluation's many states, no more than a batch is kept
    agent.act(["P G"], None)
    assert len(agent.known) == 1


@pytest.mark.parametrize("word", ["left", "right"])
def test_circles_tells_holes_from_want_of_steps(word, monkeypatch):
    """Along the first row one falls into its first hole, or runs against the border."""
    script = load_script("circles")
    drawn = []
    draw_map = frozenlake.draw_map

    def watch(scenario, rng, held_out):
        drawn.append(draw_map(scenario, rng, held_out))
        return drawn[-1]

    monkeypatch.setattr(script, "LAKES", 40)
    monkeypatch.setattr(frozenlake, "draw_map", watch)
    policy = ByRule(lambda text: word)
    learner = SimpleNamespace(settings=tiny_settings(), player=lambda instructions: policy)
    found = script.outcomes(learner, greedy=True)
    holes = np.mean(["H" in desc[0] for desc in drawn]) if word == "right" else 0
    assert found == pytest.approx([0, holes, 1 - holes])
