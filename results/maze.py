"""Mazes of ice that reflexes seldom cross, and what reflexes win on them and on the usual lakes.

    python results/maze.py                 two tables: success of players who do not learn
    python results/maze.py --supervised    can the tiny model hold the best moves? 60 CPU seconds

A maze is a 4x4 board with the goal anywhere, some of whose places need a detour: from there the way
to the goal is at least four moves longer than it would be without holes. `detour` mazes start on
such a place, `anywhere` mazes on any place that leads to the goal; `half` is their mean.

A reflex sees the goal and the next few cells, and remembers nothing. `plain` moves nearer to the
goal, onto cells from which `sight` cells can be walked, all of them nearer to it; where it cannot,
it runs on as if there were no holes. `sidesteps` looks fewer cells ahead where it cannot, and then
moves away from the goal. Both try up or down first, or sideways first.

What was found: results/tiny/maze.md.
"""

import argparse
import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

import frozenlake
import model as lm
import train
from frozenlake import ACTIONS, MOVES, SCENARIOS, FrozenLake

SIZE = 4  # of a maze
P = 0.7  # probability that a tile is frozen
DETOUR = 4  # moves that the way from a hard place is longer than without holes
STEPS = 20  # of an episode; most trials had 12
BOARDS = 1000  # of a column of the tables

# Mazes and their split


def distances(tiles):
    """{place: moves to the goal without entering a hole}, of every place that leads there."""
    size = len(tiles)
    places = list(itertools.product(range(size), repeat=2))
    frontier = [place for place in places if tiles[place[0]][place[1]] == "G"]
    moves = dict.fromkeys(frontier, 0)
    for row, column in frontier:  # it grows meanwhile
        for down, right in MOVES:
            place = (row + down, column + right)
            if place in places and place not in moves and tiles[place[0]][place[1]] != "H":
                moves[place] = moves[row, column] + 1
                frontier.append(place)
    return moves


def random_maze(rng, anywhere):
    """A board of which some places need a detour. It starts on one of them.

    anywhere: on any place from which the goal can be reached.
    """
    while True:
        tiles = np.where(rng.random((SIZE, SIZE)) < P, "F", "H")
        goal_row, goal_column = rng.integers(SIZE, size=2)
        tiles[goal_row, goal_column] = "G"
        moves = distances(tiles)
        hard = []
        for row, column in moves:
            straight = abs(row - goal_row) + abs(column - goal_column)
            if moves[row, column] - straight >= DETOUR:
                hard.append((row, column))
        if hard:
            starts = hard
            if anywhere:
                starts = list(moves)[1:]  # the first is the goal
            tiles[starts[rng.integers(len(starts))]] = "S"
            return ["".join(row) for row in tiles]


def is_held_out(desc):
    """frozenlake.is_held_out, which counts the start; here all starts of a board are on one side.

    One walks from a start to the others. So the start becomes ice, and S stands top left.
    """
    tiles = "\n".join(desc).replace("S", "F")
    normal = "S" + tiles[1:]
    return frozenlake.is_held_out(normal.split("\n"))


def draw_maze(rng, anywhere, held_out):
    while True:
        desc = random_maze(rng, anywhere)
        if is_held_out(desc) == held_out:
            return desc


# Reflexes


def nearer(lake, state):
    """The moves that lead nearer to the goal, holes or not: up or down, then sideways."""
    row, column = divmod(state, lake.columns)
    goal_row, goal_column = divmod(lake.tiles.index("G"), lake.columns)
    offsets = (column - goal_column, goal_row - row, goal_column - column, row - goal_row)
    return [move for move in (1, 3, 0, 2) if offsets[move] > 0]


def walkable(lake, state, sight):
    """Can one walk on this cell, and on from it, nearer to the goal, over `sight` cells in all?"""
    if lake.tiles[state] == "H":
        return False
    if lake.tiles[state] == "G" or sight == 1:
        return True
    onward = [lake.neighbour(state, move) for move in nearer(lake, state)]
    return any(walkable(lake, target, sight - 1) for target in onward)


def plain(lake, state, moves, sight):
    for move in moves:
        if walkable(lake, lake.neighbour(state, move), sight):
            return move
    return moves[-1]


def sidesteps(lake, state, moves, sight):
    for cells in range(sight, 0, -1):
        for move in moves:
            if walkable(lake, lake.neighbour(state, move), cells):
                return move
    away = []
    for move in range(4):
        target = lake.neighbour(state, move)
        if move not in moves and target != state and lake.tiles[target] != "H":
            away.append(move)
    for move in away:  # by preference to where a move nearer is free, and does not lead back
        place = lake.neighbour(state, move)
        onward = [lake.neighbour(place, next_move) for next_move in nearer(lake, place)]
        if any(lake.tiles[target] != "H" and target != state for target in onward):
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
    chosen = []
    for state, tile in enumerate(lake.tiles):
        moves = nearer(lake, state)
        if sideways:
            moves = moves[::-1]
        is_over = tile in "GH"
        chosen.append(0 if is_over else reflex(lake, state, moves, sight))
    return chosen


# Success by value iteration: V(s) <- sum_a pi(a|s) (goal(s') + alive(s') V(s')); no ice here slips


def value(lake, combine):
    """Probability of the goal from the start.

    combine: of the values of actions (states, 4), those of states (states,), by a player's choice.
    """
    states = len(lake.tiles)
    targets = np.array([[lake.neighbour(state, a) for a in range(4)] for state in range(states)])
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
    noslip = SCENARIOS["noslip"]
    big = SCENARIOS["big"]
    maps, weights = frozenlake.held_out_maps(noslip)
    big_maps, _, _ = train.evaluation_maps(big, BOARDS)
    print(f"Held-out lakes: all {len(maps)} of noslip, {len(big_maps)} of big")
    show(
        {
            "noslip": means(maps, noslip.max_steps, weights),
            "each map once": means(maps, noslip.max_steps),
            "big": means(big_maps, big.max_steps),
        }
    )

    print(f"\nHeld-out mazes: {BOARDS} of each kind, in {STEPS} steps and in 12")
    of_detours = held_out_mazes(anywhere=False)
    of_anywhere = held_out_mazes(anywhere=True)
    columns = {}
    for steps in (STEPS, 12):
        detour = means(of_detours, steps)
        anywhere = means(of_anywhere, steps)
        columns[f"detour {steps}"] = detour
        columns[f"anywhere {steps}"] = anywhere
        columns[f"half {steps}"] = {name: (detour[name] + anywhere[name]) / 2 for name in detour}
    show(columns)


def held_out_mazes(anywhere):
    rng = train.generator(0)
    return [draw_maze(rng, anywhere, held_out=True) for _ in range(BOARDS)]


# Is the model too small? It is shown the best moves of training boards. This is no way to train.


def new_agent():
    """The tiny model with four layers, as the trials had it, and as untrained."""
    settings = train.Settings(**train.TINY | dict(seed=1000, threads=1))
    torch.set_num_threads(settings.threads)
    three_layers, tokenizer = train.tiny_start(settings)
    config = replace(three_layers.config, num_hidden_layers=4)
    model = lm.Transformer(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.2)  # as train.tiny_start
    lake = FrozenLake(draw_maze(train.generator(), True, False), max_steps=STEPS)
    return lm.LanguageAgent(model, tokenizer, lake.instructions)


def action_logprobs(agent, observations):
    """Log-probabilities of the four words behind <action>: (observations, 4)."""
    answers = [agent.tokenizer.encode(f"<action>{word}</action>") for word in ACTIONS]
    opening = answers[0][0]
    words = [answer[1] for answer in answers]
    rows = [(*agent.encode(text), opening) for text in observations]  # all of the same length
    tree = lm.Tree(agent.instructions, rows, agent.device)
    hidden, _ = agent.model.hidden(tree.ids, tree.positions, tree)
    logprobs = agent.model.head(hidden[0, tree.paths[:, -1]]).log_softmax(-1)
    return logprobs[:, words]


def best_moves(rng):
    """At most eight observations of a training board; which moves are best (observations, 4)."""
    desc = draw_maze(rng, anywhere=True, held_out=False)
    moves = distances(desc)
    lake = FrozenLake(desc, max_steps=STEPS)
    places = list(moves)[1:]
    observations = []
    best = []
    for i in rng.permutation(len(places))[:8]:
        row, column = places[i]
        lake.state = row * SIZE + column
        targets = [divmod(lake.neighbour(lake.state, action), SIZE) for action in range(4)]
        observations.append(lake.observation())
        best.append([moves.get(target, 99) < moves[row, column] for target in targets])
    return observations, best


@torch.no_grad()
def model_success(agent, held_out):
    """Of the likeliest of the four words, on 400 mazes that start where a detour is needed."""
    rng = train.generator(0)
    success = []
    for _ in range(400):
        lake = FrozenLake(draw_maze(rng, False, held_out), max_steps=STEPS)
        observations = []
        for lake.state in range(SIZE * SIZE):
            observations.append(lake.observation())
        moves = action_logprobs(agent, observations).argmax(1).tolist()
        success.append(value_of_moves(lake, moves))
    return np.mean(success)


def supervised(seconds):
    agent = new_agent()
    weights = list(agent.model.parameters())
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=0.01)
    rng = np.random.default_rng(5)
    began = time.process_time()
    used = 0.0  # share of the seconds
    step = 0
    while used < 1:
        step += 1
        boards = [best_moves(rng) for _ in range(16)]
        observations = [text for texts, _ in boards for text in texts]
        best = torch.tensor([row for _, rows in boards for row in rows])  # (observations, 4)
        logprobs = action_logprobs(agent, observations).masked_fill(~best, -torch.inf)
        loss = -logprobs.logsumexp(1).mean()  # -log of the probability of all best moves
        rate = 2e-3 * min(1, step / 20) * np.interp(used, [0.5, 1], [1, 0.05])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        used = (time.process_time() - began) / seconds
        if step % 200 == 0:
            print(f"step {step}, {used * seconds:.0f} CPU seconds, loss {loss.item():.3f}")
    unseen = model_success(agent, held_out=True)
    seen = model_success(agent, held_out=False)
    print(f"{step} steps: {unseen:.4f} of held-out detour mazes, {seen:.4f} of the training side")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--supervised", action="store_true", help="show a tiny model best moves")
    if parser.parse_args().supervised:
        supervised(seconds=60)
    else:
        report()
