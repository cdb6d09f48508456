"""Frozen Lake as a game of text: a state becomes a grid of symbols, an answer becomes a move or is invalid.

The dynamics are those of Gymnasium's FrozenLake-v1. In the notation of msgrpo.py this file is one
text-mediated stochastic game (S, A, T, r, H) with its two maps between text and game:

    phi: state -> text                  `FrozenLake.observation`
    psi: text -> action or invalid      `parse_action`

States are numbered row by row from the top left, actions are left 0, down 1, right 2, up 3. A map is a list
of rows of the letters S (start), F (frozen), H (hole) and G (goal). Nothing here knows of tokens or of
models.
"""
import functools
import hashlib
import itertools
from collections import namedtuple

import numpy as np

ACTIONS = ("left", "down", "right", "up")
MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))  # (row, column) of each action
# How lakes are drawn: board size, P(frozen) of a tile, P(moving as chosen), and steps in an episode.
Scenario = namedtuple("Scenario", "size p success_rate max_steps")
SCENARIOS = {  # the first three are the later public configuration of the paper's first author; `big` is ours
    "noslip": Scenario(4, .8, 1.0, 8),
    "slippery": Scenario(4, .9, 1 / 3, 15),
    "bigslippery": Scenario(6, .9, 1 / 3, 15),
    "big": Scenario(6, .8, 1.0, 20)}


def solvable(desc):
    """Can the goal be reached from the start, top left, without entering a hole?"""
    tiles = {(r, c): tile for r, row in enumerate(desc) for c, tile in enumerate(row) if tile != "H"}
    seen, frontier = set(), {(0, 0)}
    while frontier:
        seen |= frontier
        frontier = {(r + down, c + right) for r, c in frontier for down, right in MOVES} & tiles.keys() - seen
    return any(tiles[place] == "G" for place in seen)


def random_map(size, p, rng):
    """A solvable size x size map, each tile but the corners frozen with probability p; rng: a numpy
    Generator. ValueError where no such map can be drawn: Gymnasium's generator would search for ever."""
    if size < 2 or not 0 < p <= 1:
        raise ValueError(f"a random map needs size >= 2 and 0 < p <= 1, not size {size} and p {p}")
    for _ in range(100_000):
        tiles = np.where(rng.random((size, size)) < p, "F", "H")
        tiles[0, 0], tiles[-1, -1] = "S", "G"
        if solvable(desc := ["".join(row) for row in tiles]):
            return desc
    raise ValueError(f"no solvable map of size {size} in 100,000 draws at p {p}: raise p")


def is_held_out(desc):
    """Is this map reserved for evaluation? An eighth is, by hash: other seeds draw the same maps."""
    return hashlib.sha256("\n".join(desc).encode()).digest()[0] % 8 == 0


def draw_map(scenario, rng, held_out=False):
    """A random map of the scenario from the training maps, or from the held-out ones."""
    while is_held_out(desc := random_map(scenario.size, scenario.p, rng)) != held_out:
        pass
    return desc


@functools.cache
def held_out_maps(scenario):
    """Every held-out map of a 4x4 scenario, and each one's share of the generator's probability."""
    maps = ([f"S{''.join(x)}G"[i:i + 4] for i in (0, 4, 8, 12)] for x in itertools.product("FH", repeat=14))
    maps = [desc for desc in maps if is_held_out(desc) and solvable(desc)]
    holes = np.array(["".join(desc).count("H") for desc in maps])
    weights = scenario.p ** (14 - holes) * (1 - scenario.p) ** holes
    return maps, weights / weights.sum()


@functools.lru_cache(65536)
def render(tiles, columns, state, coordinates):
    """A state as a grid of symbols, with the positions of player, holes and goal above it or not."""
    cells = [{"H": "O", "G": "G"}.get(tile, "_") for tile in tiles]
    cells[state] = "P"
    grid = "\n".join(" ".join(cells[i:i + columns]) for i in range(0, len(cells), columns))
    at = {symbol: ", ".join(f"({i // columns + 1}, {i % columns + 1})" for i, cell in enumerate(cells)
                            if cell == symbol) or "none" for symbol in "POG"}
    return "(row, column) of you: {P}; holes: {O}; goal: {G}\n".format(**at) + grid if coordinates else grid


def parse_action(text):
    """psi: the action named between the last <action> and its </action>, or None where the text is invalid.
    Exactly one of the four words counts: a search for substrings would read "right, then up" as a move."""
    _, opened, rest = text.rpartition("<action>")
    word, closed, _ = rest.partition("</action>")
    word = word.strip().lower()
    return ACTIONS.index(word) if opened and closed and word in ACTIONS else None


class FrozenLake:
    """One episode of the game on one map. desc: rows of "SFHG" with one S; success_rate: P(moving as chosen),
    else to either side of it: 1 does not slip, 1/3 is Gymnasium's slippery default; max_steps: the horizon H;
    rng: numpy Generator of the slips; invalid_penalty: subtracted for an invalid answer, which moves nothing
    and uses a step; coordinates: name the positions above the grid; think: ask for thoughts and a plan before
    the action. Raises ValueError for what is no map or no probability."""

    def __init__(self, desc, success_rate=1.0, max_steps=8, rng=None, invalid_penalty=0.0,
                 coordinates=False, think=False):
        tiles = "".join(desc)
        is_map = len(set(map(len, desc))) == 1 and set(tiles) <= set("SFHG") and tiles.count("S") == 1
        if not (is_map and 0 <= success_rate <= 1 and max_steps >= 1):
            raise ValueError(f"no lake: map {desc}, success_rate {success_rate}, max_steps {max_steps}")
        self.tiles, self.rows, self.columns, self.state = tiles, len(desc), len(desc[0]), tiles.index("S")
        self.success_rate, self.max_steps, self.invalid_penalty = success_rate, max_steps, invalid_penalty
        self.rng, self.coordinates, self.think = rng or np.random.default_rng(), coordinates, think
        self.steps, self.success = 0, False

    def transitions(self, state, action):
        """T and r: [(probability, next_state, reward, terminated), ...] of an action; goal, hole absorb."""
        if self.tiles[state] in "GH":
            return [(1.0, state, 0.0, True)]
        q, side, result = self.success_rate, (1 - self.success_rate) / 2, []
        for probability, turn in [(1.0, 0)] if q == 1 else [(side, -1), (q, 0), (side, 1)]:
            down, right = MOVES[(action + turn) % 4]
            row = min(max(state // self.columns + down, 0), self.rows - 1)
            column = min(max(state % self.columns + right, 0), self.columns - 1)
            tile = self.tiles[row * self.columns + column]
            result.append((probability, row * self.columns + column, float(tile == "G"), tile in "GH"))
        return result

    def step(self, text):
        """Play an answer: (reward, done, valid). One uniform draw decides where a valid action ends."""
        self.steps += 1
        action = parse_action(text)
        if action is None:
            return -self.invalid_penalty, self.steps == self.max_steps, False
        u = self.rng.random()
        for probability, state, reward, done in self.transitions(self.state, action):
            u -= probability
            if u < 0:
                break
        self.state, self.success = state, self.tiles[state] == "G"
        return reward, done or self.steps == self.max_steps, True

    @property
    def instructions(self):
        """What never changes in an episode, made of the settings, lest it contradict the game."""
        q = self.success_rate
        odds = f" with probability {q:.2f}, and to either side of it with probability {(1 - q) / 2:.2f} each"
        ice = f"{'not slippery' if q == 1 else 'slippery'}: you move as you choose{'' if q == 1 else odds}."
        thoughts = "<think>your thoughts</think><plan>your plan</plan>" if self.think else ""
        return f"""Cross the frozen lake to the goal without falling into a hole.
The board has {self.rows} rows and {self.columns} columns. P is you, O is a hole, G is the goal, _ is ice.
You move one cell a step and have {self.max_steps} steps. The border stops you. The ice is {ice}
Answer with {thoughts}<action>WORD</action>, where WORD is left, down, right or up."""

    def observation(self):
        """phi: the current state as text, and nothing of the past."""
        return render(self.tiles, self.columns, self.state, self.coordinates)

    def success_bounds(self):
        """P(goal within max_steps) from the start: (of the optimal policy, of a uniformly random one).
        Value iteration: V <- max or mean over a of sum_s' T(s'|s,a) (goal(s') + alive(s') V(s'))."""
        kernel = np.zeros((4, len(self.tiles), len(self.tiles)))  # (action, state, next state)
        for action, state in np.ndindex(kernel.shape[:2]):
            for probability, target, _, _ in self.transitions(state, action):
                kernel[action, state, target] += probability
        goal, alive = (np.array([tile in kind for tile in self.tiles], float) for kind in ("G", "SF"))
        optimal = uniform = 0 * goal
        for _ in range(self.max_steps):
            optimal = (kernel @ (goal + alive * optimal)).max(0)
            uniform = (kernel @ (goal + alive * uniform)).mean(0)
        return tuple(float(values[self.tiles.index("S")]) for values in (optimal, uniform))
