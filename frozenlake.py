"""Frozen Lake as a game of text: a state becomes a grid of symbols, an answer becomes a move.

The dynamics are those of Gymnasium's FrozenLake-v1. In the notation of msgrpo.py this file is one
text-mediated stochastic game (S, A, T, r, H) with the two maps between text and game:

    phi: state -> text                  `FrozenLake.observation`
    psi: text -> action or invalid      `parse_action`

States are numbered row by row from the top left. Actions are left 0, down 1, right 2, up 3. A map
is a list of rows of the letters S (start), F (frozen), H (hole) and G (goal). Nothing here knows of
tokens or of models.
"""

import functools
import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

ACTIONS = ("left", "down", "right", "up")
MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))  # (row, column) of each action


@dataclass(frozen=True)
class Scenario:
    """How lakes are drawn and played."""

    size: int  # rows and columns of the board
    p: float  # probability that a tile is frozen, not a hole
    success_rate: float  # probability of moving as chosen
    max_steps: int  # of an episode
    maze: bool = False  # start and goal anywhere, and detours: `random_maze`


SCENARIOS = {  # the first three are the later public configuration of the paper's first author
    "noslip": Scenario(size=4, p=0.8, success_rate=1.0, max_steps=8),
    "slippery": Scenario(size=4, p=0.9, success_rate=1 / 3, max_steps=15),
    "bigslippery": Scenario(size=6, p=0.9, success_rate=1 / 3, max_steps=15),
    "big": Scenario(size=6, p=0.8, success_rate=1.0, max_steps=20),  # ours
    "maze": Scenario(size=4, p=0.7, success_rate=1.0, max_steps=20, maze=True),  # ours
}


def parse_action(text):
    """psi: the action between the last <action> and its </action>; None where the text is invalid.

    The text inside must be exactly one of the four words. A search for a word would take
    "right, then up" for a move.
    """
    _, opened, rest = text.rpartition("<action>")
    word, closed, _ = rest.partition("</action>")
    word = word.strip().lower()
    if opened and closed and word in ACTIONS:
        return ACTIONS.index(word)
    return None


@functools.lru_cache(65536)
def render(tiles, columns, state):
    """phi: a state as a grid of symbols."""
    symbols = {"S": "_", "F": "_", "H": "O", "G": "G"}
    cells = [symbols[tile] for tile in tiles]
    cells[state] = "P"
    rows = [" ".join(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    return "\n".join(rows)


class FrozenLake:
    """One episode of the game on one map.

    desc             rows of "SFHG", with one S
    success_rate     probability of moving as chosen, else to either side of it: 1 does not slip,
                     1/3 is Gymnasium's slippery default
    max_steps        the horizon H
    rng              numpy Generator of everything random in the episode
    invalid_penalty  subtracted for an invalid answer, which moves nothing and uses a step
    think            ask for thoughts and a plan before the action

    Raises ValueError for what is no map, no probability or no horizon.
    """

    def __init__(
        self,
        desc,
        success_rate=1.0,
        max_steps=8,
        rng=None,
        invalid_penalty=0.0,
        think=False,
    ):
        tiles = "".join(desc)
        same_length = len({len(row) for row in desc}) == 1
        is_map = same_length and set(tiles) <= set("SFHG") and tiles.count("S") == 1
        if not (is_map and 0 <= success_rate <= 1 and max_steps >= 1):
            raise ValueError(
                f"no lake: map {desc}, success_rate {success_rate}, max_steps {max_steps}"
            )
        self.tiles = tiles
        self.rows = len(desc)
        self.columns = len(desc[0])
        self.success_rate = success_rate
        self.max_steps = max_steps
        self.rng = rng or np.random.default_rng()
        self.invalid_penalty = invalid_penalty
        self.think = think
        self.state = tiles.index("S")
        self.steps = 0
        self.success = False

    def transitions(self, state, action):
        """T and r of an action: [(probability, next_state, reward, terminated), ...].

        Goal and holes absorb.
        """
        if self.tiles[state] in "GH":
            return [(1.0, state, 0.0, True)]
        side = (1 - self.success_rate) / 2
        turns = [(side, -1), (self.success_rate, 0), (side, 1)]
        if self.success_rate == 1:
            turns = [(1.0, 0)]
        outcomes = []
        for probability, turn in turns:
            target = self.neighbour(state, (action + turn) % 4)  # turned by 90 degrees
            tile = self.tiles[target]
            outcomes.append((probability, target, float(tile == "G"), tile in "GH"))
        return outcomes

    def neighbour(self, state, action):
        """The state that a move leads to; the border stops it."""
        row, column = divmod(state, self.columns)
        down, right = MOVES[action]
        row = min(max(row + down, 0), self.rows - 1)
        column = min(max(column + right, 0), self.columns - 1)
        return row * self.columns + column

    def step(self, text):
        """Play an answer: (reward, done, valid). One draw decides where a valid move ends."""
        self.steps += 1
        out_of_steps = self.steps >= self.max_steps
        action = parse_action(text)
        if action is None:
            return -self.invalid_penalty, out_of_steps, False
        u = self.rng.random()
        for probability, state, reward, terminated in self.transitions(self.state, action):
            u -= probability
            if u < 0:
                break
        self.state = state
        self.success = self.tiles[state] == "G"
        return reward, terminated or out_of_steps, True

    @property
    def instructions(self):
        """What never changes in an episode, made of the settings: it cannot contradict them."""
        if self.success_rate == 1:
            ice = "not slippery: you move as you choose."
        else:
            side = (1 - self.success_rate) / 2
            ice = (
                f"slippery: you move as you choose with probability {self.success_rate:.2f}, "
                f"and to either side of it with probability {side:.2f} each."
            )
        thoughts = "<think>your thoughts</think><plan>your plan</plan>" if self.think else ""
        return (
            "Cross the frozen lake to the goal without falling into a hole.\n"
            f"The board has {self.rows} rows and {self.columns} columns. "
            "P is you, O is a hole, G is the goal, _ is ice.\n"
            f"You move one cell a step and have {self.max_steps} steps. "
            f"The border stops you. The ice is {ice}\n"
            f"Answer with {thoughts}<action>WORD</action>, "
            "where WORD is left, down, right or up."
        )

    def observation(self):
        """phi: the current state as text, and nothing of the past."""
        return render(self.tiles, self.columns, self.state)


# Below: how maps are drawn and held out, and what evaluation compares with.


def distances(desc):
    """{(row, column): moves from there to the goal, around holes}, of all tiles that lead there."""
    size = len(desc)
    goal = next((i, row.index("G")) for i, row in enumerate(desc) if "G" in row)
    moves = {goal: 0}
    frontier = [goal]
    for row, column in frontier:  # it grows meanwhile
        for down, right in MOVES:
            place = (row + down, column + right)
            inside = 0 <= place[0] < size and 0 <= place[1] < size
            if inside and place not in moves and desc[place[0]][place[1]] != "H":
                moves[place] = moves[row, column] + 1
                frontier.append(place)
    return moves


def random_map(size, p, rng):
    """A solvable size x size map; every tile but the corners is frozen with probability p.

    rng: a numpy Generator. Raises ValueError where no such map can be drawn: Gymnasium's generator
    would search for ever.
    """
    if size < 2 or not 0 < p <= 1:
        raise ValueError(f"a random map needs size >= 2 and 0 < p <= 1, not size {size} and p {p}")
    for _ in range(100_000):
        tiles = np.where(rng.random((size, size)) < p, "F", "H")
        tiles[0, 0] = "S"
        tiles[-1, -1] = "G"
        desc = ["".join(row) for row in tiles]
        if (0, 0) in distances(desc):
            return desc
    raise ValueError(f"no solvable map of size {size} in 100,000 draws at p {p}: raise p")


def random_maze(size, p, rng, hard=0.0):
    """A board some of whose tiles need a detour; start and goal are anywhere (ours).

    From such a tile the way to the goal is at least four moves longer than without holes. A share
    `hard` of the mazes start on one of them, the others on any tile that leads to the goal.
    """
    while True:
        tiles = np.where(rng.random((size, size)) < p, "F", "H")
        goal = tuple(rng.integers(size, size=2).tolist())
        tiles[goal] = "G"
        moves = distances(["".join(row) for row in tiles])
        starts = list(moves)[1:]  # the first is the goal
        straight = {place: abs(place[0] - goal[0]) + abs(place[1] - goal[1]) for place in starts}
        detours = [place for place in starts if moves[place] - straight[place] >= 4]
        if detours:
            if rng.random() < hard:
                starts = detours
            tiles[starts[rng.integers(len(starts))]] = "S"
            return ["".join(row) for row in tiles]


def is_held_out(desc):
    """Is this map reserved for evaluation? An eighth of all maps is, by a hash.

    Another seed would not do: only 3,828 maps of 4x4 are solvable, and the likely ones repeat. All
    starts of a board are on one side, as one walks from each to others: it is hashed with the start
    top left, where the usual maps have it.
    """
    board = "\n".join(desc).replace("S", "F")
    return hashlib.sha256(f"S{board[1:]}".encode()).digest()[0] % 8 == 0


def draw_map(scenario, rng, held_out=False):
    """A random map of the scenario, from the training maps or from the held-out ones.

    Half of the held-out mazes start where they need a detour. In training a start is anywhere, so
    that a beginner wins at times.
    """
    while True:
        if scenario.maze:
            desc = random_maze(scenario.size, scenario.p, rng, hard=held_out / 2)
        else:
            desc = random_map(scenario.size, scenario.p, rng)
        if is_held_out(desc) == held_out:
            return desc


@functools.cache
def held_out_maps(scenario):
    """Every held-out map of a 4x4 scenario, and each one's share of the generator's probability."""
    maps = []
    for inner in itertools.product("FH", repeat=14):
        tiles = "S" + "".join(inner) + "G"
        desc = [tiles[i : i + 4] for i in range(0, 16, 4)]
        if is_held_out(desc) and (0, 0) in distances(desc):
            maps.append(desc)
    holes = np.array(["".join(desc).count("H") for desc in maps])
    weights = scenario.p ** (14 - holes) * (1 - scenario.p) ** holes
    return maps, weights / weights.sum()


def baselines(lake):
    """Probability of the goal within max_steps of players who do not learn: {player: probability}.

    random   any move, uniformly
    reflex1  nearer to the goal, onto ice: up or down if it can, else sideways
    reflex2  the same, where one more move nearer is possible from there
    reflex3  the same, where two more moves are
    optimal  the best there is

    By value iteration: V(s) <- sum_a pi(a|s) sum_s' T(s'|s,a) (goal(s') + alive(s') V(s')).
    """
    states = len(lake.tiles)
    kernel = np.zeros((4, states, states))  # (action, state, next state)
    for action, state in np.ndindex(4, states):
        for probability, target, _, _ in lake.transitions(state, action):
            kernel[action, state, target] += probability
    goal = np.array([tile == "G" for tile in lake.tiles], float)
    alive = np.array([tile in "SF" for tile in lake.tiles], float)

    def success(choose):
        """choose: of the values of actions (action, state), the values of states."""
        values = np.zeros(states)
        for _ in range(lake.max_steps):
            values = choose(kernel @ (goal + alive * values))
        return float(values[lake.tiles.index("S")])

    found = {"random": success(lambda of_actions: of_actions.mean(0))}
    for sight in (1, 2, 3):
        moves = (reflex(lake, sight), np.arange(states))
        found[f"reflex{sight}"] = success(lambda of_actions, moves=moves: of_actions[moves])
    found["optimal"] = success(lambda of_actions: of_actions.max(0))
    return found


def reflex(lake, sight):
    """The action of each state: nearer to the goal, where `sight` cells can be walked from there.

    Where none can, it is the last that leads nearer, holes or not.
    """
    actions = []
    for state in range(len(lake.tiles)):
        nearer = nearer_moves(lake, state)
        good = [a for a in nearer if walkable(lake, lake.neighbour(state, a), sight)]
        actions.append((good or nearer[-1:] or [0])[0])
    return actions


def nearer_moves(lake, state):
    """The actions that lead nearer to the goal, holes or not: up or down first, then sideways."""
    row, column = divmod(state, lake.columns)
    goal_row, goal_column = divmod(lake.tiles.index("G"), lake.columns)
    gains = (column - goal_column, goal_row - row, goal_column - column, row - goal_row)
    return [action for action in (1, 3, 0, 2) if gains[action] > 0]


def walkable(lake, state, sight):
    """Can one walk on this cell, and on from it, nearer to the goal, over `sight` cells in all?"""
    if lake.tiles[state] == "H":
        return False
    if lake.tiles[state] == "G" or sight == 1:
        return True
    onward = [lake.neighbour(state, action) for action in nearer_moves(lake, state)]
    return any(walkable(lake, target, sight - 1) for target in onward)
