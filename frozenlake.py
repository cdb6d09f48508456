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
    # Ours. No way is longer than 10 moves. With many steps to spare, policies learned to dither,
    # and walked in circles when greedy: results/tiny/maze.md
    "maze": Scenario(size=4, p=0.7, success_rate=1.0, max_steps=12, maze=True),
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
    cells = list(tiles.translate(str.maketrans("SFH", "__O")))
    cells[state] = "P"
    return "\n".join(" ".join(row) for row in as_rows(cells, columns))


@functools.cache
def neighbours(rows, columns):
    """The state that each move leads to, (action, state). The border stops a move."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    targets = []
    for down, right in MOVES:
        to_row = (row + down).clip(0, rows - 1)
        to_column = (column + right).clip(0, columns - 1)
        targets.append(to_row * columns + to_column)
    return np.stack(targets)


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
        self, desc, success_rate=1.0, max_steps=8, rng=None, invalid_penalty=0.0, think=False
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
        self.neighbours = neighbours(self.rows, self.columns)  # (action, state)
        self.success_rate = success_rate
        self.side_rate = (1 - success_rate) / 2
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
        turns = [(self.side_rate, -1), (self.success_rate, 0), (self.side_rate, 1)]
        if self.success_rate == 1:
            turns = [(1.0, 0)]
        outcomes = []
        for probability, turn in turns:
            target = int(self.neighbours[(action + turn) % 4, state])  # turned by 90 degrees
            tile = self.tiles[target]
            outcomes.append((probability, target, float(tile == "G"), tile in "GH"))
        return outcomes

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
            ice = (
                f"slippery: you move as you choose with probability {self.success_rate:.2f}, "
                f"and to either side of it with probability {self.side_rate:.2f} each."
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
    """{state: moves from there to the goal, around holes}, of all states that lead there."""
    tiles = "".join(desc)
    onward = neighbours(len(desc), len(desc[0])).T.tolist()
    goal = tiles.index("G")
    moves = {goal: 0}
    frontier = [goal]
    for state in frontier:  # it grows meanwhile
        for target in onward[state]:
            if target not in moves and tiles[target] != "H":
                moves[target] = moves[state] + 1
                frontier.append(target)
    return moves


def random_map(size, p, rng, held_out=None):
    """A solvable size x size map; every tile but start and goal is frozen with probability p.

    rng: a numpy Generator. held_out: whether the map `is_held_out`; None: either. Raises ValueError
    where no such map can be drawn: Gymnasium's generator would search for ever.
    """
    if size < 2 or not 0 < p <= 1:
        raise ValueError(f"a random map needs size >= 2 and 0 < p <= 1, not size {size} and p {p}")
    for _ in range(100_000):
        tiles = np.where(rng.random(size * size) < p, "F", "H")
        tiles[0] = "S"
        tiles[-1] = "G"
        desc = as_rows(tiles, size)
        if held_out in (None, is_held_out(desc)) and 0 in distances(desc):
            return desc
    raise ValueError(f"no solvable map of size {size} in 100,000 draws at p {p}: raise p")


def random_maze(size, p, rng, held_out):
    """A board some of whose tiles need a detour; start and goal are anywhere (ours).

    From such a tile the way to the goal is at least four moves longer than without holes. Half of
    the held-out mazes must start on one, all others on any tile that leads to the goal.
    """
    while True:
        tiles = np.where(rng.random(size * size) < p, "F", "H")
        goal = rng.integers(size * size)
        tiles[goal] = "G"
        board = as_rows(tiles, size)
        if is_held_out(board) != held_out:
            continue
        moves = distances(board)
        straight = distances([line.replace("H", "F") for line in board])
        starts = list(moves)[1:]  # the first is the goal
        detours = [state for state in starts if moves[state] - straight[state] >= 4]
        if detours:
            if held_out and rng.random() < 0.5:
                starts = detours
            tiles[starts[rng.integers(len(starts))]] = "S"
            return as_rows(tiles, size)


def as_rows(tiles, columns):
    """A map's tiles as its rows."""
    text = "".join(tiles)
    return [text[i : i + columns] for i in range(0, len(text), columns)]


def is_held_out(desc):
    """Is this map reserved for evaluation? An eighth of all maps is, by a hash.

    Draws of another seed would repeat: only 3,828 maps of 4x4 are solvable, and few are likely. The
    hash leaves out where one starts, and takes the usual place, top left: one can walk from one
    start to another, so boards that differ in nothing else must not be split.
    """
    board = "\n".join(desc).replace("S", "F")
    return hashlib.sha256(f"S{board[1:]}".encode()).digest()[0] % 8 == 0


def draw_map(scenario, rng, held_out=False):
    """A random map of the scenario, from the training maps or from the held-out ones."""
    draw = random_maze if scenario.maze else random_map
    return draw(scenario.size, scenario.p, rng, held_out)


@functools.cache
def held_out_maps(scenario):
    """Every held-out map of a 4x4 scenario, and each one's share of the generator's probability."""
    maps = []
    for inner in itertools.product("FH", repeat=14):
        desc = as_rows(["S", *inner, "G"], 4)
        if is_held_out(desc) and 0 in distances(desc):
            maps.append(desc)
    holes = np.array(["".join(desc).count("H") for desc in maps])
    weights = scenario.p ** (14 - holes) * (1 - scenario.p) ** holes
    return maps, weights / weights.sum()


def baselines(lakes):
    """Success of players who do not learn: {player: probabilities (lakes,)}.

    random   any move, uniformly
    reflex1  nearer to the goal, onto ice: up or down if it can, else sideways
    reflex2  the same, where one more move nearer is possible from there
    reflex3  the same, where two more moves are
    optimal  the best there is

    The lakes have one size and the same rules. Probability of the goal within max_steps, by value
    iteration: V(s) <- sum_a pi(a|s) sum_s' T(s'|s,a) (goal(s') + alive(s') V(s')).
    """
    rules = lakes[0]
    tiles = tiles_of(lakes)
    policies = {"random": np.full((len(lakes), *rules.neighbours.shape), 1 / 4)}  # pi(a|s)
    for sight in (1, 2, 3):
        actions = reflex(lakes, sight)[:, None]  # (lakes, 1, state)
        policies[f"reflex{sight}"] = actions == np.arange(4)[:, None]  # (lakes, action, state)
    policies["optimal"] = np.zeros_like(policies["random"])  # its value is set below

    def slip(x):
        """The mean of x (..., action, state) over where the ice turns an action."""
        sides = np.roll(x, 1, -2) + np.roll(x, -1, -2)
        return rules.success_rate * x + rules.side_rate * sides

    # How likely each move is made: (lakes, player, action, state)
    moves = slip(np.stack([*policies.values()], 1))
    goal = (tiles == "G")[:, None]  # (lakes, 1, state)
    alive = np.isin(tiles, ["S", "F"])[:, None]
    values = 0  # V, when no step is left
    for _ in range(rules.max_steps):
        worth = goal + alive * values  # (lakes, player, state)
        landing = worth[..., rules.neighbours]  # (lakes, player, action, state)
        values = (moves * landing).sum(2)  # (lakes, player, state)
        values[:, -1] = slip(landing[:, -1]).max(1)
    success = values.transpose(1, 0, 2)[:, tiles == "S"]  # (player, lakes)
    return dict(zip(policies, success))


def tiles_of(lakes):
    """(lakes, state) letters."""
    return np.array([list(lake.tiles) for lake in lakes])


def reflex(lakes, sight):
    """Actions (lakes, state): nearer to the goal, where `sight` cells can be walked that way.

    Where they cannot, it is nearer to the goal all the same.
    """
    order = np.array([1, 3, 0, 2])  # up or down first, then sideways
    nearer = nearer_moves(lakes)
    good = nearer & walkable(lakes, sight)[:, lakes[0].neighbours]
    rank = nearer.astype(int) + good  # (lakes, action, state)
    return order[rank[:, order].argmax(1)]


def nearer_moves(lakes):
    """(lakes, action, state): does the move lead nearer to the goal, holes or not?"""
    states = np.arange(len(lakes[0].tiles))
    goal = np.array([[lake.tiles.index("G")] for lake in lakes])
    columns = lakes[0].columns
    distance = abs(states // columns - goal // columns) + abs(states % columns - goal % columns)
    return distance[:, lakes[0].neighbours] < distance[:, None]


def walkable(lakes, sight):
    """(lakes, state): can one walk on it, and on from it, nearer to the goal, `sight` cells?"""
    tiles = tiles_of(lakes)
    nearer = nearer_moves(lakes)
    found = tiles != "H"
    for _ in range(sight - 1):
        onward = (nearer & found[:, lakes[0].neighbours]).any(1)
        found &= (tiles == "G") | onward
    return found
