"""Text games on which credit matters, each a few lines on msgrpo.Game, and what can be won in them.

    python results/games.py     success of the optimal, the random and the best reflex player

`KeyAndDoor`  a key that must be taken at the first step opens a door at the last one. In every room
              between lies a coin of random worth. The episode's length is fixed: 5, 10, 20 or 40.
`CoinLake`    a coin of random worth is won at the first step whatever one does; then a frozen lake.
`lake`        a frozen lake with start and goal anywhere, so that all four moves are needed.
`slippery`    the same; a move goes astray with probability .2.
`cost`        the same as `lake`; every step costs .05.

In each the answer is one of the four words of frozenlake.ACTIONS in <action>..</action>.
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import frozenlake
from frozenlake import ACTIONS, FrozenLake

COIN = 0.2  # worth of a coin of KeyAndDoor, or 0, with equal chance
LUCK = 2.0  # worth of the coin of CoinLake, or 0, with equal chance
COST = 0.05  # of a step of `cost`
SIZE = 4  # of the lakes
LAKE_STEPS = 10


class KeyAndDoor:
    """A row of rooms: a key in the first, a door in the last, a coin in every one before the last.

    layout: (coins, key, door), the direction of each. Taking the key means to leave the first coin.
    Every answer leads to the next room. Success: through the door, with the key.
    """

    def __init__(self, layout, rng):
        self.coins, self.key, self.door = layout
        self.rng = rng
        self.room = 0
        self.has_key = False
        self.success = False

    def observation(self):
        return self.text(self.room, self.has_key)

    def text(self, room, has_key):
        key = "a key" if has_key else "no key"
        place = f"room {room + 1}: {key};"
        if room == len(self.coins):
            return f"{place} door {ACTIONS[self.door]}"
        coin = f"coin {ACTIONS[self.coins[room]]}"
        if room == 0:
            return f"{place} key {ACTIONS[self.key]}, {coin}"
        return f"{place} {coin}"

    def observations(self):
        """All that can be seen in this episode."""
        rooms = range(1, len(self.coins) + 1)
        later = [self.text(room, has_key) for room in rooms for has_key in (False, True)]
        return [self.text(0, False), *later]

    def step(self, text):
        """Reward, done, valid. An invalid answer takes nothing; it too leads to the next room."""
        action = frozenlake.parse_action(text)
        worth = COIN * (self.rng.random() < 0.5)
        if self.room == len(self.coins):
            self.success = self.has_key and action == self.door
            return float(self.success), True, action is not None
        reward = worth if action == self.coins[self.room] else 0.0
        if self.room == 0:
            self.has_key = action == self.key
        self.room += 1
        return reward, False, action is not None


def draw_layout(horizon, rng, held_out=False):
    """A layout of KeyAndDoor with `horizon` rooms. The coins of the rooms tell layouts apart."""
    coins = rng.integers(4, size=horizon - 1).tolist()
    key = (coins[0] + int(rng.integers(1, 4))) % 4
    door = int(rng.integers(4))
    return coins, key, door


class CoinLake(FrozenLake):
    """The first step wins 0 or 2, whatever it is; what comes later cannot change it."""

    def step(self, text):
        reward, done, valid = super().step(text)
        if self.steps == 1:
            reward += LUCK * (self.rng.random() < 0.5)
        return reward, done, valid


class CostlyLake(FrozenLake):
    """Every step costs."""

    def step(self, text):
        reward, done, valid = super().step(text)
        return reward - COST, done, valid


def draw_lake(rng, held_out=False):
    """A lake with a fifth of holes, start and goal anywhere, of the training or the held-out maps.

    The goal is at least two moves from the start, and can be reached.
    """
    while True:
        tiles = np.where(rng.random(SIZE * SIZE) < 0.8, "F", "H")
        start, goal = rng.choice(SIZE * SIZE, 2, replace=False)
        tiles[start] = "S"
        tiles[goal] = "G"
        rows = tiles.reshape(SIZE, SIZE)
        desc = ["".join(row) for row in rows]
        moves = distance(desc)
        if 2 <= moves <= LAKE_STEPS and is_held_out(desc) == held_out:
            return desc


def is_held_out(desc):
    """As frozenlake's was when the study began. Starts of one board may be on both sides."""
    return hashlib.sha256("\n".join(desc).encode()).digest()[0] % 8 == 0


def distance(desc):
    """Moves from start to goal past the holes; 0 where there is no way."""
    return frozenlake.distances(desc).get("".join(desc).index("S"), 0)


def make_lake(desc, rng, kind=FrozenLake, success_rate=1.0):
    return kind(desc, success_rate, LAKE_STEPS, rng)


@dataclass(frozen=True)
class Task:
    """A game as the study plays it."""

    draw: Callable  # (rng, held_out) -> start: a map or a layout
    make: Callable  # (start, rng) -> a Game that begins there
    iterations: int  # of a training run
    groups: int  # of an iteration, each with a start of its own
    foreseen: bool = False  # has observations(): all states that an episode can come to


def key_and_door(horizon):
    return Task(partial(draw_layout, horizon), KeyAndDoor, 200, groups=8, foreseen=True)


TASKS = {
    "key 5": key_and_door(5),
    "key 10": key_and_door(10),
    "key 20": key_and_door(20),
    "key 40": key_and_door(40),
    "coin lake": Task(draw_lake, partial(make_lake, kind=CoinLake), 200, groups=16),
    "lake": Task(draw_lake, make_lake, 200, groups=16),
    "slippery": Task(draw_lake, partial(make_lake, success_rate=0.8), 200, groups=16),
    "cost": Task(draw_lake, partial(make_lake, kind=CostlyLake), 200, groups=16),
}


# How a tiny tokenizer cuts them: a line of prose; a tag; the first cell of a board's line; a word,
# number or symbol with the space before it; white space.
PIECES = (
    r"[A-Z][a-z][^\n]*|</?[a-z]+>|(?<!\n)\n[A-Z_](?= )| ?[A-Za-z]+| ?[0-9]+| ?[^\s<A-Za-z0-9]|\s|<"
)


def texts():
    """Texts with all words of all games: what the tiny tokenizer is made of."""
    rng = np.random.default_rng(0)
    symbols = ["P _ O G\n_ \nP \nO \nG "]
    words = [f" {word} <action>{word}</action>" for word in ACTIONS]
    rooms = [f"room {room}:" for room in range(1, 41)]
    game = KeyAndDoor(draw_layout(5, rng), rng)
    game.has_key = True
    states = [game.observation(), "no key; door"]
    return symbols + words + rooms + states


# Below: what can be won. Success of the optimal, the random and the best reflex player.


def features(lake, state):
    """What a reflex sees: the compass to the goal, and which neighbours are hole or border."""
    goal = lake.tiles.index("G")
    row, column = divmod(state, SIZE)
    goal_row, goal_column = divmod(goal, SIZE)
    compass = 3 * (np.sign(goal_row - row) + 1) + np.sign(goal_column - column) + 1
    blocked = 0
    for action in range(4):
        target = int(lake.neighbours[action, state])
        shut = target == state or lake.tiles[target] == "H"
        blocked += shut << action
    return int(16 * compass + blocked)


def lake_arrays(lakes):
    """(kernel, seen) of many lakes.

    kernel (lakes, state, action, state + 1): the last column is success. seen (lakes, state):
    features.
    """
    states = SIZE * SIZE
    kernel = np.zeros((len(lakes), states, 4, states + 1))
    seen = np.zeros((len(lakes), states), int)
    for i, lake in enumerate(lakes):
        for state in range(states):
            if lake.tiles[state] in "GH":
                continue
            seen[i, state] = features(lake, state)
            for action in range(4):
                for probability, target, _, _ in lake.transitions(state, action):
                    won = lake.tiles[target] == "G"
                    kernel[i, state, action, states if won else target] += probability
    return kernel, seen


def reflex_success(kernel, seen, starts, reflex):
    """Mean success of the player who does reflex[what it sees]."""
    lakes, states = seen.shape
    chosen = reflex[seen]  # (lakes, state)
    moves = np.take_along_axis(kernel, chosen[:, :, None, None], 2)[:, :, 0]
    values = np.zeros((lakes, states))
    for _ in range(LAKE_STEPS):
        values = moves[:, :, states] + np.einsum("ijk,ik->ij", moves[:, :, :states], values)
    return values[np.arange(lakes), starts].mean()


def bounds(kernel, starts):
    """Mean success of the (optimal, uniformly random) player, by value iteration."""
    lakes, states = kernel.shape[:2]
    optimal = np.zeros((lakes, states))
    uniform = np.zeros((lakes, states))
    for _ in range(LAKE_STEPS):
        follow = kernel[..., :states]
        optimal = (kernel[..., states] + np.einsum("ijak,ik->ija", follow, optimal)).max(2)
        uniform = (kernel[..., states] + np.einsum("ijak,ik->ija", follow, uniform)).mean(2)
    rows = np.arange(lakes)
    return optimal[rows, starts].mean(), uniform[rows, starts].mean()


def best_reflex(kernel, seen, starts, rng, rounds=2):
    """Success of the best reflex found by changing one entry at a time, from "toward the goal".

    It is sought on the lakes that it is measured on: rather too high than too low.
    """
    compass = np.arange(9 * 16) // 16
    toward = np.array([3, 3, 3, 0, 0, 2, 1, 1, 1])  # of the nine compass points
    reflex = toward[compass]
    best = reflex_success(kernel, seen, starts, reflex)
    for _ in range(rounds):
        for entry in rng.permutation(np.unique(seen)):
            for action in range(4):
                other = reflex.copy()
                other[entry] = action
                success = reflex_success(kernel, seen, starts, other)
                if success > best:
                    best = success
                    reflex = other
    return best


def report():
    print("game        optimal   random   best reflex (sees the compass and the cells beside it)")
    for name, task in TASKS.items():
        rng = np.random.default_rng(1)
        if name.startswith("key"):
            print(f"{name:10s}  1.000     .0625    .0625 (does not read; who takes every coin: 0)")
            continue
        lakes = [task.make(task.draw(rng, held_out=True), rng) for _ in range(300)]
        kernel, seen = lake_arrays(lakes)
        starts = [lake.state for lake in lakes]
        optimal, uniform = bounds(kernel, starts)
        reflex = best_reflex(kernel, seen, starts, rng)
        print(f"{name:10s}  {optimal:.3f}     {uniform:.4f}   {reflex:.3f}")


if __name__ == "__main__":
    report()
