"""How a model that learned a game without slips loses: in a hole, or for want of steps.

    python train.py --tiny --scenario maze --out runs/maze
    python results/circles.py runs/maze

It plays the held-out lakes of an evaluation twice: greedily, and by samples at the temperature of
training. `time`: the steps were used up. A greedy player makes the same move each time it comes to
a state. One who visits it again therefore walks in circles, or into a wall, to the end; where there
are more steps than tiles, that is all that `time` can be.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # before torch, whose threads it sets

import numpy as np

import frozenlake
import msgrpo

LAKES = 1000


def outcomes(learner, greedy):
    """Shares of the held-out lakes: won, lost in a hole, lost for want of steps."""
    s = learner.settings
    scenario = frozenlake.SCENARIOS[s.scenario]
    maps, weights, _ = train.evaluation_maps(scenario, LAKES)
    lakes = [s.lake(desc, 0, i, scenario=s.scenario) for i, desc in enumerate(maps)]
    msgrpo.play(learner.player(lakes[0].instructions), lakes, greedy)
    tiles = [lake.tiles[lake.state] for lake in lakes]
    return [weights @ np.isin(tiles, list(ends)) for ends in ("G", "H", "SF")]


def main():
    print(f"{'':32s}   won  hole  time")
    for folder in map(Path, sys.argv[1:]):
        settings = train.read_settings("eval", folder, {})
        model, tokenizer, _ = train.load_model("eval", folder, settings)
        learner = train.Learner(settings, model, tokenizer)
        for name, greedy in (("greedy", True), ("sampled", False)):
            shares = outcomes(learner, greedy)
            print(f"{folder.name:20s} {name:11s}" + "".join(f"{share:6.3f}" for share in shares))


if __name__ == "__main__":
    main()
