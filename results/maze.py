"""What reflexes win on held-out lakes and mazes, by value iteration.

    python results/maze.py

A reflex sees the goal and the next few cells, and remembers nothing. `plain` moves nearer to the
goal, onto cells from which `sight` cells can be walked, all of them nearer to it; where it cannot,
it runs on as if there were no holes. `sidesteps` looks fewer cells ahead where it cannot, and then
moves away from the goal. Both try up or down first, or sideways first. train.py's scoreboard has
`plain`, up or down first.

What was learned: results/tiny/maze.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import frozenlake
import train
from frozenlake import SCENARIOS, FrozenLake

BOARDS = 1000  # of a column, but all 503 of noslip


# Reflexes


UP_OR_DOWN_FIRST = (1, 3, 0, 2)


class View:
    """What the reflexes see of a lake, whole: arrays over its states."""

    def __init__(self, lake, order):
        self.order = order  # of the moves nearer to the goal
        self.neighbours = lake.neighbours  # (move, state)
        self.nearer = frozenlake.nearer_moves([lake])[0]  # (move, state)
        self.walkable = [None] + [frozenlake.walkable([lake], sight)[0] for sight in (1, 2, 3)]

    def moves_nearer(self, state):
        return [move for move in self.order if self.nearer[move, state]]

    def free(self, state, moves, sight):
        """Those of the moves from whose target `sight` cells can be walked."""
        return [move for move in moves if self.walkable[sight][self.neighbours[move, state]]]


def plain(view, state, sight):
    moves = view.moves_nearer(state)
    return (view.free(state, moves, sight) or moves[-1:])[0]


def sidesteps(view, state, sight):
    moves = view.moves_nearer(state)
    for cells in range(sight, 0, -1):
        free = view.free(state, moves, cells)
        if free:
            return free[0]
    away = [
        move
        for move in view.free(state, range(4), 1)
        if move not in moves and view.neighbours[move, state] != state
    ]
    for move in away:  # by preference to where a move nearer is free, and does not lead back
        place = view.neighbours[move, state]
        onward = view.free(place, view.moves_nearer(place), 1)
        if any(view.neighbours[next_move, place] != state for next_move in onward):
            return move
    return away[0] if away else 0


def all_reflexes():
    """{name: (reflex, cells ahead, sideways first?)}"""
    reflexes = {}
    for reflex, sights in ((plain, (1, 2, 3)), (sidesteps, (2, 3))):
        for sight in sights:
            name = f"{reflex.__name__} {sight}"
            reflexes[f"{name}, up or down first"] = (reflex, sight, False)
            reflexes[f"{name}, sideways first"] = (reflex, sight, True)
    return reflexes


REFLEXES = all_reflexes()


def reflex_moves(lake, reflex, sight, sideways):
    """The move of each state."""
    view = View(lake, UP_OR_DOWN_FIRST[::-1] if sideways else UP_OR_DOWN_FIRST)
    return [0 if tile in "GH" else reflex(view, i, sight) for i, tile in enumerate(lake.tiles)]


# Success by value iteration: V(s) <- sum_a pi(a|s) (goal(s') + alive(s') V(s')); no ice here slips


def value(lake, combine):
    """Probability of the goal from the start.

    combine: of the values of actions (states, 4), those of states (states,), by a player's choice.
    """
    states = len(lake.tiles)
    targets = lake.neighbours.T
    goal = np.array([tile == "G" for tile in lake.tiles], float)
    alive = np.array([tile in "SF" for tile in lake.tiles], float)
    values = np.zeros(states)
    for _ in range(lake.max_steps):
        worth = goal + alive * values
        values = combine(worth[targets])
    return float(values[lake.tiles.index("S")])


def value_of_moves(lake, moves):
    states = np.arange(len(moves))
    return value(lake, lambda of_actions: of_actions[states, moves])


def baselines(lake):
    """{player: success} on one board."""
    success = {"random": value(lake, lambda of_actions: of_actions.mean(1))}
    for name, options in REFLEXES.items():
        success[name] = value_of_moves(lake, reflex_moves(lake, *options))
    success["optimal"] = value(lake, lambda of_actions: of_actions.max(1))
    return success


# The tables


def means(maps, max_steps, weights=None):
    """{player: mean success}"""
    rows = [baselines(FrozenLake(desc, max_steps=max_steps)) for desc in maps]
    return {
        player: np.average([row[player] for row in rows], weights=weights) for player in rows[0]
    }


def show(columns):
    """columns: {title: {player: success}}"""
    print(f"\n{'':28s}" + "".join(f"{title:>14s}" for title in columns))
    for player in ("random", *REFLEXES, "optimal"):
        figures = [f"{of_players[player]:14.4f}" for of_players in columns.values()]
        print(f"{player:28s}" + "".join(figures))


def report():
    columns = {}
    noslip = SCENARIOS["noslip"]
    maps, weights = frozenlake.held_out_maps(noslip)
    columns["noslip"] = means(maps, noslip.max_steps, weights)
    columns["each map once"] = means(maps, noslip.max_steps)
    for name in ("big", "maze"):
        maps, _, _ = train.evaluation_maps(SCENARIOS[name], BOARDS)
        columns[name] = means(maps, SCENARIOS[name].max_steps)
    columns["its detours"] = means(
        [desc for desc in maps if needs_detour(desc)], SCENARIOS["maze"].max_steps
    )
    show(columns)


def needs_detour(desc):
    """Is the way at least four moves longer than without holes?"""
    start = "".join(desc).index("S")
    without_holes = [row.replace("H", "F") for row in desc]
    straight = frozenlake.distances(without_holes)[start]
    return frozenlake.distances(desc)[start] - straight >= 4


if __name__ == "__main__":
    report()
