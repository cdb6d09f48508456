"""Train a language model to cross frozen lakes by MS-GRPO, evaluate it on unseen ones, watch it play.

    python train.py --tiny                      a transformer from nothing, on two CPU cores
    python train.py --checkpoint DIR            a Qwen2, Qwen2.5, Qwen3 or Llama in Hugging Face's format
    python train.py --resume DIR                go on with a run that was stopped or killed
    python train.py --eval DIR, or --play DIR   what a run or a checkpoint can do, in figures or move by move
    torchrun --nproc-per-node N train.py ...    the same by N processes

A run's folder holds settings.json, metrics.jsonl (a line per iteration), state.pt (to resume from), model/
(in Hugging Face's format) and summary.json. Random numbers follow from (seed, iteration, episode), not from
what was drawn before: on a CPU, a resumed run goes on bit for bit.
"""
import argparse
import copy
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

# Threads that wait by spinning take the time of those they wait for: beside other work, a run of seconds took
# many minutes. OpenMP reads these when torch is imported: GNU's spins shortly and then sleeps, others sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import frozenlake
import model as lm
import msgrpo
from frozenlake import SCENARIOS, FrozenLake

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Without AMX, a CPU is slower in bfloat16: half of float32's rate was measured in results/bench*.jsonl.
DTYPE = "bfloat16" if DEVICE != "cpu" or torch.cpu._is_amx_tile_supported() else "float32"


def setting(default, text, low=0, high=1e18, choices=()):
    return field(default=default, metadata={"help": text, "range": (low, high, choices)})


@dataclass
class Settings:
    """All settings of a run. Defaults are for pretrained models of some billion parameters: [author] marks
    those of the later public trainer of the paper's first author, [paper] those of its abstract; the rest is
    ours."""
    checkpoint: str = setting("", "pretrained model's directory; empty: the tiny model")
    seed: int = setting(0, "of everything random")
    iterations: int = setting(700, "times to play and learn [paper]", 1)
    scenario: str = setting("noslip", f"lakes to train on: {', '.join(SCENARIOS)}", choices=tuple(SCENARIOS))
    groups: int = setting(2, "groups an iteration, each on its own map [author]", 1)
    group_size: int = setting(16, "episodes a group, all from the same start [author]", 2)
    replay: float = setting(0.0, "share of groups that return to maps where an episode failed", 0, 1)
    explore: int = setting(0, "up to so many episodes of groups without success are added to the draw")
    sampling: str = setting("aaw", "of episodes: aaw, uniform or all", choices=("aaw", "uniform", "all"))
    keep: float = setting(.5, "share of the episodes that aaw and uniform draw", 1e-9, 1)
    update_episodes: int = setting(16, "drawn episodes of one optimiser step, about", 1)
    gamma: float = setting(1.0, "credit per step of distance from the end; 1 is MS-GRPO [paper]", 0, 1)
    normalize_std: bool = setting(True, "divide advantages by the group's standard deviation")
    clip: float = setting(.2, "of the ratio, on both sides [author]")
    max_gap: float = setting(.15, "mean |log ratio| of an update at which the iteration's updates end")
    entropy_coef: float = setting(.001, "of the entropy bonus, per token in nats [author]")
    learning_rate: float = setting(1e-6, "of AdamW [author], after a ramp of ten iterations")
    final_rate: float = setting(1.0, "share of it that linear decay leaves; 1: constant [author]", 0, 1)
    grad_clip: float = setting(1.0, "largest norm of a gradient [author]")
    temperature: float = setting(1.25, "of sampling and of scoring alike [author]", 1e-6)
    max_new_tokens: int = setting(0, "of an answer; 0: 16, with --think 256 [author]")
    think: bool = setting(False, "ask for thoughts and a plan before the action")
    coordinates: bool = setting(False, "name the positions above the grid")
    invalid_penalty: float = setting(0.0, "taken off for an invalid answer ([author]: 1, and moved left)")
    micro_batch_tokens: int = setting(16384, "tokens of one forward and backward pass, about", 1)
    recompute: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    dtype: str = setting(DTYPE, "of passes here, float32 or bfloat16", choices=("float32", "bfloat16"))
    device: str = setting(DEVICE, "of the model, here")
    threads: int = setting(torch.get_num_threads(), "of the CPU, here; sums depend on it", 1, 4096)
    checkpoint_every: int = setting(20, "iterations between states to resume from", 1)
    eval_every: int = setting(0, "iterations between evaluations on noslip; 0: at the end alone")
    eval_episodes: int = setting(1000, "of each scenario that slips or is larger", 1)
    warmup_steps: int = setting(0, "steps of next-token prediction on the game's text, as pretraining")

    def __post_init__(self):
        for f in fields(self):
            value, (low, high, choices) = getattr(self, f.name), f.metadata["range"]
            good = type(value) in ((int, float) if f.type is float else (f.type,))  # True is no number here
            good = good and (value in choices if choices else f.type in (str, bool) or low <= value <= high)
            lm.ensure(good, f"--{f.name.replace('_', '-')} {value} is not {choices or f'in [{low}, {high}]'}")

    def lake(self, desc, *key, scenario=None):
        """The game on one map, with this run's text and rewards; its random numbers follow from the key."""
        return FrozenLake(desc, *SCENARIOS[scenario or self.scenario][2:], generator(*key),
                          self.invalid_penalty, self.coordinates, self.think)


TINY = dict(  # what differs for a model that is born here, and why
    iterations=240, groups=64, group_size=8, update_episodes=64,  # many maps, few episodes of each
    # replay: soon most groups are all alike. explore: on the last maps that it always fails, the policy is
    # sure of what it does. No std: it blows up groups that are nearly all alike.
    replay=.5, explore=128, normalize_std=False,
    entropy_coef=.05, invalid_penalty=.5,  # the bonus keeps groups mixed, the penalty the answers' form
    # Gradients grow tenfold when the model begins to look at the map.
    learning_rate=1e-3, final_rate=.05, grad_clip=.1,
    temperature=1.0, max_new_tokens=3, dtype="float32", device="cpu", threads=2, warmup_steps=200)


def generator(*key):
    """The numpy Generator of a key of integers, whose length counts: SeedSequence takes (1,) for (1, 0)."""
    return np.random.default_rng([len(key), *key])


# Several processes: torchrun sets these. All draw the same numbers and keep the same books; they share the
# playing, the passes of an update, and the float32 state. One process alone gets back what it gives.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def share(items):
    """This process's part of a list."""
    return items[len(items) * RANK // WORLD:len(items) * (RANK + 1) // WORLD]


def gather(items):
    """The lists of all processes as one, in their order."""
    parts = [items] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


class Learner:
    """Float32 weights, the `master`, with their Adam moments, and the `model` in the run's dtype that plays
    and learns: a copy, as an update of relative size 1e-6 would vanish in bfloat16. It passes its
    gradients to the `master` as they come, and copies the weights after each update. Of several processes,
    each trains its part of the `master` itself."""

    def __init__(self, settings):
        self.settings = s = settings
        torch.set_num_threads(s.threads)
        model, self.tokenizer = lm.load_pretrained(s.checkpoint) if s.checkpoint else tiny_start(s)
        lm.ensure(self.tokenizer, f"{s.checkpoint} has no tokenizer.json: there is no text without one")
        with lm.blaming(f"--device {s.device}"):
            self.model = copy.deepcopy(model).to(s.device, dtype := getattr(torch, s.dtype))
            self.master = model if WORLD > 1 else model.to(s.device)  # FSDP2 moves layer by layer
        self.trained = model if WORLD > 1 else self.model
        if WORLD > 1:  # FSDP2: each holds a part of all weights, gradients, moments; gradients are averaged
            precision = MixedPrecisionPolicy(dtype, torch.float32)
            for module in (*model.model["layers"], model):
                fully_shard(module, mp_policy=precision, reshard_after_forward=True)
        else:
            for weight, low in zip(self.master.parameters(), self.model.parameters()):
                low.register_post_accumulate_grad_hook(lambda low, weight=weight: hand_on(low, weight))
        self.trained.recompute = s.recompute
        self.optimizer = torch.optim.AdamW(self.master.parameters(), betas=(.9, .99), fused=True)

    @torch.no_grad()
    def refresh(self):
        for weight, low in zip(self.master.parameters(), self.model.parameters()):
            low.copy_(weight.full_tensor() if WORLD > 1 else weight)

    def update(self, learning_rate):
        """A step of AdamW on the gradients; returns their norm. Where that is not finite, nothing changes."""
        norm = torch.nn.utils.clip_grad_norm_(self.master.parameters(), self.settings.grad_clip)
        norm = getattr(norm, "full_tensor", lambda: norm)().item()  # a DTensor, if there is any gradient
        if np.isfinite(norm):
            self.optimizer.param_groups[0]["lr"] = float(learning_rate)
            self.optimizer.step()
            self.refresh()
        self.optimizer.zero_grad()
        return norm

    def state(self):
        """(weights, moments), whole, on the CPU: of all processes the first has them. No moments before the
        first update: get_state_dict would make them by a step on no gradient, which counts."""
        return get_state_dict(self.master, self.optimizer if self.optimizer.state else (),
                              options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def load(self, weights, moments):
        set_state_dict(self.master, self.optimizer if moments else (), model_state_dict=weights,
            optim_state_dict=moments, options=StateDictOptions(True, broadcast_from_rank0=WORLD > 1))
        self.refresh()

    def agent(self, instructions, model=None):
        """The policy of the model, which reads these instructions before every state."""
        s = self.settings
        n = s.max_new_tokens or (256 if s.think else 16)
        return lm.LanguageAgent(model or self.model, self.tokenizer, instructions, s.temperature, n, s.think)


def hand_on(low, weight):
    """Add the gradient of a parameter of the model to that of its float32 weight, and free it."""
    weight.grad = low.grad.float() if weight.grad is None else weight.grad.add_(low.grad)
    low.grad = None


def tiny_start(settings):
    """A new tiny model and its tokenizer, whose words are the game's."""
    texts = ["P _ O G\n_ \nP \nO \nG ", *(f"<action>{word}</action>" for word in frozenlake.ACTIONS)]
    for name, s in SCENARIOS.items():
        texts.append(settings.lake(frozenlake.random_map(s.size, 1, generator()), scenario=name).instructions)
    tokenizer = lm.tiny_tokenizer(texts, "</action>")
    torch.manual_seed(settings.seed)
    model = lm.Transformer(lm.Config(
        "llama", tokenizer.size, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_theta=1e2, tie_word_embeddings=True))
    # A tied head wants embeddings small, but what a layer adds must not drown them, as with .02.
    torch.nn.init.normal_(model.model["embed_tokens"].weight, std=.2)
    return model, tokenizer


def warm_up(agent, learner):
    """For want of pretraining: next-token prediction on states of training maps, answered *uniformly at
    random*. It teaches to read and to speak, not to play: `evaluate` then measures both."""
    s = learner.settings
    for i in range(s.warmup_steps):
        rng, steps = generator(s.seed, i), []
        for _ in range(64):
            lake = s.lake(frozenlake.draw_map(SCENARIOS[s.scenario], rng))
            lake.state = int(rng.choice([state for state, tile in enumerate(lake.tiles) if tile in "SF"]))
            answer = learner.tokenizer.encode(f"<action>{rng.choice(frozenlake.ACTIONS)}</action>")
            text = (*agent.encode(lake.observation()), *answer)
            steps.append(msgrpo.Step(text[:1], text[1:]))
        (-agent.score(steps)[0].mean()).backward()
        learner.update(3e-3 * min(1, (i + 1) / 10, 2 * (1 - i / s.warmup_steps)))


def evaluate(learner, name, greedy=True):
    """Success on held-out maps, a random player's and the optimal one's: printed, and returned as a dict.
    4x4 without slipping: each held-out map once, so greedy figures are exact; `success` weights a map by its
    probability. Else the same `eval_episodes` episodes every time; with half of Wilson's 95 % interval."""
    s, scenario, rng = learner.settings, SCENARIOS[name], generator(0)
    exact, n = scenario.size == 4 and scenario.success_rate == 1, s.eval_episodes
    maps, weights = frozenlake.held_out_maps(scenario) if exact else (
        [frozenlake.draw_map(scenario, rng, held_out=True) for _ in range(n)], np.full(n, 1 / n))
    lakes = [s.lake(desc, i, scenario=name) for i, desc in enumerate(maps)]
    episodes = gather(msgrpo.play(learner.agent(lakes[0].instructions), share(lakes), greedy))
    success = np.array([episode[-1].success for episode in episodes], float)
    mean, valid = float(weights @ success), [step.valid for episode in episodes for step in episode]
    optimal, uniform = (weights @ np.array([lake.success_bounds() for lake in lakes])).tolist()
    z = 3.84 * float(weights @ weights)
    half = 0.0 if exact and greedy else (mean * (1 - mean) * z + z * z / 4) ** .5 / (1 + z)
    figures = {"success": mean, "half_interval": half, "unweighted": float(success.mean()), "random": uniform,
               "optimal": optimal, "valid": sum(valid) / len(valid), "episodes": len(maps)}
    print(f"{name:12s}", *(f"{key} {value:<6.4g}" for key, value in figures.items()), flush=True)
    return figures


def iterate(agent, trainee, learner, iteration, failed):
    """Play, compare, draw and learn once, the steps 1 to 6 of msgrpo.py; returns the iteration's metrics.
    agent plays, trainee has the weights that are trained; failed: up to 256 maps to return to, kept up to
    date here. A group whose episodes are all alike teaches nothing; so `replay` of the groups return to maps
    not yet solved. The metric `success` is of newly drawn maps alone."""
    began, s, rng = time.perf_counter(), learner.settings, generator(learner.settings.seed, iteration, 0)
    old = min(len(failed), round(s.replay * s.groups))
    maps = [failed.pop(rng.integers(len(failed))) for _ in range(old)]
    maps += [frozenlake.draw_map(SCENARIOS[s.scenario], rng) for _ in range(s.groups - old)]
    games = [s.lake(maps[i], s.seed, iteration, i, j) for i in range(s.groups) for j in range(s.group_size)]
    agent.refresh()
    mine, low = msgrpo.play(agent, share(games)), s.dtype != "float32"
    gap = np.mean(gather([msgrpo.rescore(agent, mine, s.micro_batch_tokens)])) if low else None
    episodes = gather(mine)
    returns = torch.tensor([sum(step.reward for step in episode) for episode in episodes]).view(s.groups, -1)
    success = np.array([episode[-1].success for episode in episodes]).reshape(s.groups, -1)
    advantages = msgrpo.episode_advantages(returns, s.normalize_std).flatten()
    msgrpo.assign_credit(episodes, advantages, s.gamma)
    drawn = msgrpo.draw_episodes(advantages, s.sampling, max(1, round(s.keep * len(episodes))), rng)
    lost = np.flatnonzero(np.repeat(~success.any(1), s.group_size))
    drawn = sorted({*drawn, *rng.permutation(lost)[:s.explore].tolist()})
    rate = s.learning_rate * np.interp(iteration, [0, 10, max(11, s.iterations)], [0, 1, s.final_rate])
    updates, split = [], np.array_split(drawn, max(1, round(len(drawn) / s.update_episodes))) if drawn else ()
    for part in (x for x in split if s.entropy_coef or advantages[x].any()):  # sorted: equal states together
        parts = gather([msgrpo.accumulate_gradient(trainee, [episodes[i] for i in part], clip=s.clip,
            entropy_coef=s.entropy_coef, budget=s.micro_batch_tokens, share=share, world=WORLD)])
        means = {key: sum(part[key] for part in parts) for key in parts[0]} | {"tokens": parts[0]["tokens"]}
        if means["logprob_gap"] > s.max_gap:  # far enough from the policy that played
            learner.optimizer.zero_grad()
            break
        updates.append(means | {"grad_norm": learner.update(rate), "trained": (advantages[part] != 0).sum()})

    failed[:] = (failed + [desc for desc, solved in zip(maps, success.all(1)) if not solved])[-256:]
    steps, trained = [step for episode in episodes for step in episode], [u["tokens"] for u in updates]
    generated = sum(len(step.response) for step in steps)
    of_updates = {key: np.average([update[key] for update in updates], weights=trained) if updates else None
                  for key in ("loss", "entropy", "clip_share", "logprob_gap", "grad_norm")}
    return of_updates | {"generated_tokens": generated, "trained_tokens": sum(trained),
        **{key: np.mean([getattr(step, key) for step in steps]) for key in ("valid", "truncated")},
        "iteration": iteration, "success": success[old:].mean() if old < s.groups else None,
        "return": returns.mean(), "steps": len(steps) / len(episodes), "updates": len(updates),
        "zero_variance_groups": (returns == returns[:, :1]).all(1).float().mean(), "replayed_groups": old,
        "groups_without_success": 1 - success.any(1).mean(), "drawn_episodes": len(drawn),
        "trained_episodes": sum(u["trained"] for u in updates), "learning_rate": rate, "rollout_gap": gap,
        "tokens_per_second": (generated + sum(trained)) / (time.perf_counter() - began)}


def progress_line(m, iterations):
    """An iteration's metrics in one line that a person can follow."""
    shown = "success return steps valid truncated entropy zero_variance_groups clip_share grad_norm updates"
    shown = [f"{key.split('_')[0]} {np.nan if m[key] is None else m[key]:.3g}" for key in shown.split()]
    left = m["seconds"] / m["iteration"] * (iterations - m["iteration"])
    return (f"{m['iteration']:4d}/{iterations}  {'  '.join(shown)}  {m['tokens_per_second']:,.0f} tokens/s  "
            f"{m['seconds']:.0f} s gone  {left:.0f} s left")


def write(path, content):
    """Put a text, or what torch.save takes, in the place of the file at path: as a whole or not at all."""
    if RANK == 0:
        with lm.replacing(path) as file:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)


def train(learner, out):
    """Train to the last iteration, from state.pt where there is one; evaluate, save the model and sum up."""
    s, path, clock, stop = learner.settings, out / "state.pt", time.perf_counter(), []
    instructions = s.lake(frozenlake.draw_map(SCENARIOS[s.scenario], generator())).instructions
    agent, trainee = learner.agent(instructions), learner.agent(instructions, learner.trained)
    if path.exists():
        with lm.blaming(path):
            state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            learner.load(*state.pop("learner"))
    else:
        warm_up(trainee, learner)
        print(f"{sum(p.numel() for p in learner.master.parameters()):,} parameters; before MS-GRPO, sampled:")
        state = {"before": evaluate(learner, "noslip", greedy=False), "failed": [], "history": []}
    history = state["history"]  # the lines of metrics.jsonl
    clock -= json.loads(history[-1])["seconds"] if history else 0
    signal.signal(signal.SIGINT, lambda *_: stop.extend([  # once more stops at once
        signal.signal(signal.SIGINT, signal.default_int_handler), print("stopping after this iteration")]))
    for iteration in range(len(history) + 1, s.iterations + 1):
        metrics = iterate(agent, trainee, learner, iteration, state["failed"])
        if s.eval_every and iteration % s.eval_every == 0:
            metrics["unseen_success"] = evaluate(learner, "noslip")["success"]
        metrics["seconds"] = time.perf_counter() - clock
        history.append(json.dumps(metrics, default=float) + "\n")
        write(out / "metrics.jsonl", "".join(history))
        print(progress_line(metrics, s.iterations), flush=True)
        stopped = any(gather([bool(stop)]))
        if stopped or iteration % s.checkpoint_every == 0 or iteration == s.iterations:
            write(path, state | {"learner": learner.state()})
        if stopped:
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
    weights, _ = learner.state()
    if RANK == 0:
        lm.save_pretrained(out / "model", learner.master, learner.tokenizer, weights)
    unseen = (scenarios := evaluate_all(learner))["noslip"]
    write(out / "summary.json", json.dumps({
        "unseen_success": unseen["success"], "unseen_success_unweighted": unseen["unweighted"],
        "random_success": unseen["random"], "optimal_success": unseen["optimal"], "scenarios": scenarios,
        "before": state["before"], "seed": s.seed, "seconds": time.perf_counter() - clock}))
    play_one(learner)
    print(f"{time.perf_counter() - clock:.0f} s; see {out / 'summary.json'}, the model is in {out / 'model'}")


def evaluate_all(learner, *_):
    """Evaluate every scenario, greedily: {scenario: figures}."""
    return {name: evaluate(learner, name) for name in SCENARIOS}


def play_one(learner, *_):
    """Show one greedy episode on a held-out map, chosen by the seed, move by move."""
    s = learner.settings
    lake = s.lake(frozenlake.draw_map(SCENARIOS[s.scenario], generator(s.seed), held_out=True), s.seed, 0)
    agent = learner.agent(lake.instructions)
    print(f"\n{lake.instructions}\n")
    for step in msgrpo.play(agent, [lake], greedy=True)[0]:
        print(f"{agent.decode(step.prompt)}{step.text}{'' if step.valid else '  (invalid: no move)'}\n")
    print(f"{lake.observation()}\n{'reached' if lake.success else 'missed'} the goal in {lake.steps} steps\n")


MODES = {"checkpoint": "start a run from a pretrained model or another run's", "resume": "go on with a run",
         "eval": "evaluate a run or a model", "play": "watch a run or a model play a map that --seed chooses"}
VIEW = {"think", "coordinates", "max_new_tokens", "dtype", "device", "threads"}
TAKES = {"resume": {"micro_batch_tokens", "recompute", "threads"}, "eval": VIEW | {"eval_episodes"},
         "play": VIEW | {"seed", "scenario"}}


def run(argv):
    """One command. Raises ValueError or OSError, with a message of one line, on bad use or input."""
    parser = argparse.ArgumentParser(None, None, __doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda reason: lm.ensure(False, reason)  # in one line, like all other errors
    modes = parser.add_mutually_exclusive_group(required=True)
    modes.add_argument("--tiny", action="store_const", const=".", help="train a tiny model from nothing")
    for mode, text in MODES.items():
        modes.add_argument(f"--{mode}", metavar="DIR", help=text)
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: a new one under runs/)")
    for f in fields(Settings)[1:]:
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        text = f"{f.metadata['help']} (default {f.default}, tiny {TINY.get(f.name, f.default)})"
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=text, **kind)
    given = vars(parser.parse_args(argv))
    mode, folder = next((mode, Path(given.pop(mode))) for mode in ("tiny", *MODES) if mode in given)
    for name in given.keys() - TAKES.get(mode, given.keys()):
        parser.error(f"--{mode} takes no --{name.replace('_', '-')}")

    settings, out = Settings(**TINY if mode == "tiny" else {}), given.pop("out", None)
    if mode == "resume" or mode in TAKES and (folder / "settings.json").exists():
        with lm.blaming(folder / "settings.json"):
            settings = Settings(**lm.parse_json((folder / "settings.json").read_bytes()))
    if mode not in ("tiny", "resume"):
        given["checkpoint"] = str(Path(folder, "model" * (folder / "settings.json").exists()).resolve())
    learner = Learner(replace(settings, **given))  # before the folder is made: what cannot start leaves none
    if mode in TAKES:
        return {"resume": train, "eval": evaluate_all, "play": play_one}[mode](learner, folder)
    out = Path(out or next(f"runs/{i:04d}" for i in range(1, 9999) if not Path(f"runs/{i:04d}").exists()))
    lm.ensure(not (out.is_dir() and any(out.iterdir())), f"{out} is not empty: --resume it, or another --out")
    (out := gather([out])[0]).mkdir(parents=True, exist_ok=True)
    write(out / "settings.json", json.dumps(asdict(learner.settings), indent=2) + "\n")
    print(f"this run is {out}; if it is stopped, go on with: python train.py --resume {out}", flush=True)
    train(learner, out)


def main(argv=None):
    """The command line: 0 for success, 2 for bad use or input, 130 where it was interrupted."""
    try:
        if WORLD > 1:
            if DEVICE == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            torch.distributed.init_process_group(timeout=4 * torch.distributed.constants.default_pg_timeout)
            sys.stdout = open(os.devnull, "w") if RANK else sys.stdout  # the first process alone speaks
        run(argv)
        return 0
    except (RuntimeError, MemoryError) as caught:
        if not lm.out_of_memory(caught):
            raise
        error = "out of memory: lower --micro-batch-tokens, --groups, --eval-episodes; see results/memory.py"
    except (ValueError, OSError, KeyboardInterrupt) as caught:
        error = str(caught) or "interrupted"
    print(f"train.py: {error}", file=sys.stderr)
    return 130 if error == "interrupted" else 2


if __name__ == "__main__":
    sys.exit(main())
