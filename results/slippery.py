"""Where a model that learned slippery ice errs: beside holes, or away from them?

    python train.py --tiny --scenario slippery ... --out runs/ice
    python results/slippery.py runs/ice

The model's greedy moves are read once for each state of each held-out lake, and valued exactly, by
the game's own probabilities. Then the moves of some states are replaced by the optimal ones: those
beside a hole, or all others.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # before torch, whose threads it sets

import numpy as np

import frozenlake
import model as lm


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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--training", action="store_true", help="on lakes that are not held out")
    args = parser.parse_args()
    scenario = frozenlake.SCENARIOS["slippery"]
    maps, _, _ = train.evaluation_maps(scenario, 1000)
    if args.training:
        rng = train.generator(5)
        maps = [frozenlake.draw_map(scenario, rng) for _ in range(1000)]
    counts = Counter(map(tuple, maps))
    rules = (scenario.success_rate, scenario.max_steps)
    lakes = {desc: frozenlake.FrozenLake(desc, *rules) for desc in counts}
    model, tokenizer, _ = train.load_model("eval", args.run, None)
    instructions = next(iter(lakes.values())).instructions
    agent = lm.LanguageAgent(model, tokenizer, instructions, max_new_tokens=3)

    success = Counter()
    right = Counter()
    states_seen = Counter()
    for desc, lake in lakes.items():
        weight = counts[desc] / len(maps)
        holes = np.array([tile == "H" for tile in lake.tiles])
        beside = holes[lake.neighbours].any(0)  # (state,)
        states = [i for i, tile in enumerate(lake.tiles) if tile in "SF"]
        learned = learned_moves(agent, lake, states)
        of_moves = best_worths(lake)
        optimal = of_moves.argmax(0)
        players = {
            "learned": learned,
            "optimal beside holes": np.where(beside, optimal, learned),
            "optimal elsewhere": np.where(beside, learned, optimal),
            "optimal": optimal,
        }
        for name, moves in players.items():
            success[name] += weight * value(lake, moves)
        for state in states:
            states_seen[beside[state]] += weight
            lost = of_moves[optimal[state], state] - of_moves[learned[state], state]
            right[beside[state]] += weight * (lost < 1e-9)
    for name, mean in success.items():
        print(f"{name:22s}{mean:.3f}")
    for place, name in ((True, "beside holes"), (False, "elsewhere")):
        print(f"an optimal move {name}: {right[place] / states_seen[place]:.2f} of the states")


if __name__ == "__main__":
    main()
