"""Where a model that learned slippery ice errs: beside holes, or away from them?

    python train.py --tiny --scenario slippery --out runs/ice
    python results/slippery.py runs/ice

The model's greedy moves are read once for each state of 1,000 held-out lakes and of 1,000 training
lakes, and valued exactly, by the game's own probabilities. Then the moves of some states are
replaced by the optimal ones: those beside a hole, or all others. Last, what the model wins of
what can be won, by the number of holes: held-out lakes have more of them than training lakes.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # before torch, whose threads it sets

import numpy as np

import frozenlake


def worths(lake, values):
    """Of each move, when what comes after it is worth values (state,): (action, state)."""
    found = np.zeros((4, len(lake.tiles)))
    for state in range(len(lake.tiles)):
        for action in range(4):
            for probability, target, reward, ended in lake.transitions(state, action):
                found[action, state] += probability * (reward + (not ended) * values[target])
    return found


def value(lake, moves):
    """Success of a player who always makes these moves (state,)."""
    values = np.zeros(len(lake.tiles))
    for _ in range(lake.max_steps):
        values = worths(lake, values)[moves, np.arange(len(values))]
    return values[0]


def best_worths(lake):
    """Of each move with ten steps left: always to make the best of these loses next to nothing."""
    values = np.zeros(len(lake.tiles))
    for _ in range(10):
        of_moves = worths(lake, values)  # (action, state)
        values = of_moves.max(0)
    return of_moves


def learned_moves(agent, lake, states):
    """The model's greedy move of each of these states; an invalid answer counts as left."""
    boards = []
    for state in states:
        lake.state = state
        boards.append(lake.observation())
    moves = np.zeros(len(lake.tiles), int)
    for state, answer in zip(states, agent.act(boards, None)):
        moves[state] = frozenlake.parse_action(answer.text) or 0
    return moves


def players_of(agent, lake):
    """{player: moves (state,)}, and which states lie beside a hole."""
    states = [i for i, tile in enumerate(lake.tiles) if tile in "SF"]
    holes = np.array([tile == "H" for tile in lake.tiles])
    beside = holes[lake.neighbours].any(0)
    learned = learned_moves(agent, lake, states)
    optimal = best_worths(lake).argmax(0)
    players = {
        "learned": learned,
        "optimal beside holes": np.where(beside, optimal, learned),
        "optimal elsewhere": np.where(beside, learned, optimal),
        "optimal": optimal,
    }
    return players, beside


def right_moves(lake, learned):
    """(state,): is the learned move as good as the best one?"""
    of_moves = best_worths(lake)
    return of_moves.max(0) - of_moves[learned, np.arange(len(learned))] < 1e-9


def read(agent, counts):
    """What the players win of these lakes {desc: times}, and how many moves are right.

    Returns {player: success}, {beside: share of right moves}, and {holes: (times, what the model
    wins, what can be won)}.
    """
    scenario = frozenlake.SCENARIOS["slippery"]
    success = Counter()
    moves = Counter()
    by_holes = {}
    for desc, times in counts.items():
        lake = frozenlake.FrozenLake(desc, scenario.success_rate, scenario.max_steps)
        players, beside = players_of(agent, lake)
        values = {name: value(lake, found) for name, found in players.items()}
        for name, won in values.items():
            success[name] += times * won / counts.total()
        right = right_moves(lake, players["learned"])
        for state, tile in enumerate(lake.tiles):
            if tile in "SF":
                moves[beside[state], right[state]] += times
        row = by_holes.setdefault(lake.tiles.count("H"), np.zeros(3))
        row += times * np.array([1, values["learned"], values["optimal"]])
    shares = {
        where: moves[where, True] / (moves[where, True] + moves[where, False])
        for where in (True, False)
    }
    return success, shares, by_holes


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    args = parser.parse_args()
    scenario = frozenlake.SCENARIOS["slippery"]
    held_out, _, _ = train.evaluation_maps(scenario, 1000)
    rng = train.generator(5)
    training = [frozenlake.draw_map(scenario, rng) for _ in range(1000)]
    settings = train.read_settings("eval", args.run, {})
    model, tokenizer, _ = train.load_model("eval", args.run, settings)
    rules = (scenario.success_rate, scenario.max_steps)
    instructions = frozenlake.FrozenLake(held_out[0], *rules).instructions
    agent = train.Learner(settings, model, tokenizer).player(instructions)

    sides = {"held out": held_out, "training": training}
    found = {side: read(agent, Counter(map(tuple, maps))) for side, maps in sides.items()}
    print(f"{'':40s}" + "".join(f"{side:>18s}" for side in sides))
    for player in found["training"][0]:
        row = "".join(f"{success[player]:18.3f}" for success, _, _ in found.values())
        print(f"{player:40s}{row}")
    for beside, place in ((True, "beside holes"), (False, "elsewhere")):
        row = "".join(f"{shares[beside]:18.2f}" for _, shares, _ in found.values())
        print(f"{'an optimal move ' + place:40s}{row}")
    for holes in range(7):
        name = f"share won, holes: {holes} (share of lakes)"
        cells = []
        for _, _, by_holes in found.values():
            times, won, best = by_holes.get(holes, (0, 0, 0))
            cells.append(f"{won / best:.2f} ({times / 1000:.2f})" if times else "-")
        print(f"{name:40s}" + "".join(f"{cell:>18s}" for cell in cells))


if __name__ == "__main__":
    main()
