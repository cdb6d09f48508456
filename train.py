"""Train a language model to cross frozen lakes by MS-GRPO, evaluate it on maps that it has never seen, watch it play.

    python train.py --tiny                      a transformer from nothing, on a laptop's CPU
    python train.py --checkpoint DIR            a Qwen2, Qwen2.5, Qwen3 or Llama directory in Hugging Face's format
    python train.py --resume DIR                go on with a run that was stopped or killed
    python train.py --eval DIR, or --play DIR   what a run or a checkpoint can do, in figures or move by move

A run's folder holds settings.json, metrics.jsonl (a line per iteration), state.pt (to resume from), model/ (a Hugging
Face directory) and summary.json. Random numbers follow from (seed, iteration, episode), not from what was drawn before:
a resumed run goes on bit for bit.
"""
import argparse
import dataclasses
import functools
import itertools
import json
import math
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import frozenlake
import model as lm
import msgrpo
from frozenlake import SCENARIOS, FrozenLake


def setting(default, text, low=0, high=math.inf, choices=None):
    return dataclasses.field(default=default, metadata={"help": text, "low": low, "high": high, "choices": choices})


@dataclass
class Settings:
    """All settings of a run, with units. Defaults are for pretrained models of some billion parameters: [author] marks
    those of the later public trainer of the paper's first author, [paper] those of its abstract; the rest is ours.
    """
    checkpoint: str = setting("", "pretrained model's directory; empty: the tiny model")
    seed: int = setting(0, "of everything random")
    iterations: int = setting(700, "times to play and learn [paper]", 1)
    scenario: str = setting("noslip", "lakes to train on", choices=tuple(SCENARIOS))
    min_frozen: float = setting(1.0, "P(frozen) of training maps is uniform from here to the scenario's", .2, 1)
    replay: float = setting(0.0, "share of groups on maps where an episode failed when they were last played", 0, 1)
    groups: int = setting(2, "groups an iteration, each on its own map [author]", 1)
    group_size: int = setting(16, "episodes a group, all from the same start [author]", 2)
    sampling: str = setting("aaw", "which episodes to train on", choices=("aaw", "uniform", "all"))
    keep: float = setting(.5, "share of the episodes that aaw and uniform draw", 1e-9, 1)
    update_episodes: int = setting(16, "drawn episodes of one optimiser step, about", 1)
    gamma: float = setting(1.0, "credit per step of distance from the end; 1 is MS-GRPO [paper]", 0, 1)
    normalize_std: bool = setting(True, "divide advantages by the group's standard deviation")
    clip: float = setting(.2, "of the ratio, on both sides [author]")
    entropy_coef: float = setting(.001, "of the entropy bonus, per token in nats [author]")
    learning_rate: float = setting(1e-6, "of AdamW [author]")
    final_learning_rate: float = setting(1.0, "share of it left by linear decay; 1: constant [author]", 0, 1)
    beta2: float = setting(.999, "of AdamW", 0, .9999999)
    weight_decay: float = setting(.01, "of AdamW [author]")
    grad_clip: float = setting(1.0, "largest norm of a gradient [author]")
    temperature: float = setting(1.25, "of sampling and of scoring alike [author]", 1e-6)
    max_new_tokens: int = setting(0, "of an answer; 0: 16, with --think 256 [author]")
    think: bool = setting(False, "ask for thoughts and a plan before the action")
    coordinates: bool = setting(False, "name the positions above the grid")
    invalid_penalty: float = setting(0.0, "taken off for an invalid answer ([author]: 1, and moved left)")
    step_cost: float = setting(0.0, "taken off at every step")
    micro_batch_tokens: int = setting(16384, "tokens of one forward and backward pass, about", 1)
    recompute: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    dtype: str = setting("auto", "of forward passes", choices=("auto", "float32", "bfloat16"))
    device: str = setting("auto", "cuda, cpu, ...; auto: cuda where there is one")
    threads: int = setting(0, "of the CPU; 0: one per core. Sums depend on it, so it is a part of the state")
    checkpoint_every: int = setting(20, "iterations between states to resume from", 1)
    eval_every: int = setting(0, "iterations between evaluations on noslip; 0: at the end alone")
    eval_episodes: int = setting(1000, "of each scenario that slips or is larger", 1)
    warmup_steps: int = setting(0, "supervised steps on uniformly random answers, in place of pretraining")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, m, name = getattr(self, f.name), f.metadata, f"--{f.name.replace('_', '-')}"
            if type(value) not in (f.type, int if f.type is float else f.type):
                raise ValueError(f"{name} {value!r} is no {f.type.__name__}")
            if f.type in (int, float) and not m["low"] <= value <= m["high"]:
                raise ValueError(f"{name} {value} is not in [{m['low']}, {m['high']}]")
            if m["choices"] and value not in m["choices"]:
                raise ValueError(f"{name} {value} is none of {', '.join(m['choices'])}")

    def lake(self, scenario, desc, *key):
        """The game on one map, with this run's text and rewards; its random numbers follow from the key."""
        return FrozenLake(desc, scenario.success_rate, scenario.max_steps, generator(*key), self.invalid_penalty,
                          self.step_cost, self.coordinates, self.think)


TINY = dict(  # what differs for a model that is born here, and why
    iterations=130, groups=64, group_size=32, update_episodes=64,  # it starts from nothing: more episodes, more updates
    min_frozen=.5,  # where holes are rare, to go right and down without looking pays too well
    replay=.5,  # soon most groups are all alike, and teach nothing
    normalize_std=False,  # the std blows up groups that are nearly all alike, and soon all are
    entropy_coef=.05, invalid_penalty=.5,  # the bonus keeps groups mixed, the penalty keeps it off the answer's form
    learning_rate=1.5e-3, final_learning_rate=.05, weight_decay=0.0, temperature=1.0,
    beta2=.99, grad_clip=.1,  # gradients grow tenfold when the model begins to look at the map: take them as they come
    max_new_tokens=3,  # <action>, a word, </action>
    dtype="float32", device="cpu", warmup_steps=150)


def generator(*key):
    """The numpy Generator of a key of integers. Its length is a part of it: SeedSequence takes (1,) for (1, 0)."""
    return np.random.default_rng([len(key), *key])


class LanguageAgent:
    """The language-agent policy (msgrpo.Policy): a transformer that reads a game's instructions before every state."""

    def __init__(self, model, tokenizer, instructions, settings):
        self.model, self.size, self.ends = model, tokenizer.size, tokenizer.end_ids
        self.temperature, self.instructions = settings.temperature, tokenizer.prefix(instructions)
        self.max_new_tokens = settings.max_new_tokens or (256 if settings.think else 16)
        self.encode = functools.lru_cache(65536)(lambda text: tuple(tokenizer.suffix(text, settings.think)))
        self.decode = functools.lru_cache(65536)(tokenizer.decode)
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        """After an update: run the instructions, which all prompts share, through the weights as they are now."""
        self.prefix, self.greedy = lm.encode_prefix(self.model, self.instructions), {}

    def act(self, observations, uniforms):
        prompts = [self.encode(observation) for observation in observations]
        new = prompts if uniforms is not None else [p for p in dict.fromkeys(prompts) if p not in self.greedy]
        answers = zip(*lm.generate(self.model, self.prefix, new, uniforms, self.max_new_tokens, self.ends, self.size,
                                   self.temperature)) if new else ()
        if uniforms is None:  # the same state has the same greedy answer
            self.greedy.update(zip(new, answers))
            answers = [self.greedy[prompt] for prompt in prompts]
        return [msgrpo.Step(prompt, tuple(ids), logprobs, self.decode(tuple(ids)), ids[-1] not in self.ends)
                for prompt, (ids, logprobs) in zip(prompts, answers)]

    def score(self, steps):
        return lm.score(self.model, lm.encode_prefix(self.model, self.instructions), [step.prompt for step in steps],
                        [step.response for step in steps], self.size, self.temperature)


class Learner:
    """Float32 weights with their Adam moments, and the `model` in the run's dtype that plays and is differentiated.

    An update of relative size 1e-6 vanishes in bfloat16: what is trained and saved is float32. A bfloat16 model is a copy
    that takes the weights over after each update, and hands on each gradient as soon as it is there.
    """

    def __init__(self, master, settings):
        self.master = self.model = master.to(settings.device)
        if settings.dtype != "float32":
            with torch.device("meta"):
                self.model = lm.Transformer(master.config).to(getattr(torch, settings.dtype))
            self.model.to_empty(device=settings.device)
            for weight, low in zip(master.parameters(), self.model.parameters()):
                low.register_post_accumulate_grad_hook(functools.partial(hand_on_gradient, weight))
        self.model.recompute, self.grad_clip = settings.recompute, settings.grad_clip
        self.optimizer = torch.optim.AdamW(master.parameters(), betas=(.9, settings.beta2),
                                           weight_decay=settings.weight_decay, fused=True)
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        for weight, low in zip(self.master.parameters(), self.model.parameters()):
            low.copy_(weight)

    def update(self, learning_rate):
        """A step of AdamW on the gradients there are; returns their norm. If that is not finite, nothing changes."""
        norm = torch.nn.utils.clip_grad_norm_(self.master.parameters(), self.grad_clip).item()
        if math.isfinite(norm):
            self.optimizer.param_groups[0]["lr"] = learning_rate
            self.optimizer.step()
            self.refresh()
        self.optimizer.zero_grad()
        return norm


def hand_on_gradient(weight, low):
    """Add the gradient of a bfloat16 parameter to that of its float32 weight, and free it."""
    weight.grad = low.grad.float() if weight.grad is None else weight.grad.add_(low.grad)
    low.grad = None


def tiny_start(settings):
    """A new tiny model and its tokenizer, whose words are the game's."""
    lakes = [settings.lake(s, ["S" + "F" * (s.size - 1), *["H" * s.size] * (s.size - 2), "F" * (s.size - 1) + "G"])
             for s in SCENARIOS.values()]
    texts = [text for lake in lakes for text in (lake.instructions, lake.observation())]
    tokenizer = lm.tiny_tokenizer(texts + [f"<action>{word}</action>" for word in frozenlake.ACTIONS], "</action>")
    model = lm.Transformer(lm.Config("llama", tokenizer.size, 48, 96, num_hidden_layers=3, num_attention_heads=4,
                                     num_key_value_heads=2, head_dim=12, rope_theta=100.0, tie_word_embeddings=True))
    torch.manual_seed(settings.seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:  # a layer keeps the size of its input, a residual branch adds a part, embeddings are small
            branch = 6 ** -.5 if "o_proj" in name or "down_proj" in name else 1.0
            torch.nn.init.normal_(weight, std=.02 if "embed" in name else branch * weight.shape[1] ** -.5)
    return model, tokenizer


def draw_map(settings, rng):
    """A training map: P(frozen) uniform between min_frozen and the scenario's."""
    scenario = SCENARIOS[settings.scenario]
    p = rng.uniform(min(settings.min_frozen, scenario.p), scenario.p)
    return tuple(frozenlake.draw_map(dataclasses.replace(scenario, p=p), rng))


def warm_up(agent, tokenizer, learner, settings):
    """In place of pretraining: answers of the right form and *uniformly random* meaning, in random states.

    It teaches to speak, not to play; `evaluate` then measures both.
    """
    answers = [tuple(tokenizer.encode(f"<action>{word}</action>")) for word in frozenlake.ACTIONS]
    for i in range(settings.warmup_steps):
        rng, steps = generator(settings.seed, i), []
        for _ in range(64):
            lake = settings.lake(SCENARIOS[settings.scenario], draw_map(settings, rng), 0)
            lake.state = int(rng.choice([state for state, tile in enumerate(lake.tiles) if tile in "SF"]))
            steps.append(msgrpo.Step(agent.encode(lake.observation()), answers[rng.integers(4)]))
        (-agent.score(steps)[0].mean()).backward()
        learner.update(3e-3 * min(1, (i + 1) / 10, 2 * (1 - i / settings.warmup_steps)))
    agent.refresh()


def evaluate(agent_of, name, settings, greedy=True):
    """Success on held-out maps of a scenario, beside that of the random and of the optimal player, as a dict of figures.

    4x4 without slipping: each held-out map once, so a greedy figure is exact; `success` weights a map by its probability,
    `unweighted` does not. Else `eval_episodes` episodes, the same every time, with half the width of a 95 % interval.
    """
    scenario = SCENARIOS[name]
    exact = scenario.size == 4 and scenario.success_rate == 1
    if exact:
        maps, weights = frozenlake.held_out_maps(scenario)
    else:
        rng = generator(0)
        maps = [frozenlake.draw_map(scenario, rng, held_out=True) for _ in range(settings.eval_episodes)]
        weights = np.full(len(maps), 1 / len(maps))
    lakes = [settings.lake(scenario, desc, i) for i, desc in enumerate(maps)]
    episodes = msgrpo.play(agent_of(lakes[0].instructions), lakes, greedy)
    success = np.array([episode.success for episode in episodes], float)
    mean, valid = float(weights @ success), [step.valid for episode in episodes for step in episode.steps]
    optimal, uniform = weights @ np.array([frozenlake.success_bounds(tuple(desc), scenario) for desc in maps])
    return {"success": mean, "unweighted": float(success.mean()), "valid": sum(valid) / len(valid),
            "half_interval": 0.0 if exact and greedy else 1.96 * math.sqrt(mean * (1 - mean) / len(maps)),
            "episodes": len(maps), "random": float(uniform), "optimal": float(optimal)}


def iterate(agent, learner, s, iteration, failed):
    """Play, compare, draw and learn once, the steps 1 to 6 of msgrpo.py; returns the iteration's metrics.

    failed: {map: None}, the last 256 training maps on which an episode failed; kept up to date here. A group whose
    episodes are all alike teaches nothing; so `replay` of the groups return to maps that are not yet solved.
    """
    began, rng = time.perf_counter(), generator(s.seed, iteration, 0)
    count = min(len(failed), round(s.replay * s.groups))
    maps = [[*failed][i] for i in rng.choice(len(failed), count, replace=False)] if count else []
    maps += [draw_map(s, rng) for _ in range(s.groups - count)]
    games = [s.lake(SCENARIOS[s.scenario], desc, s.seed, iteration, i, j)
             for i, desc in enumerate(maps) for j in range(s.group_size)]
    agent.refresh()
    episodes = msgrpo.play(agent, games)
    returns = torch.tensor([episode.total_reward for episode in episodes]).view(s.groups, -1)
    advantages = msgrpo.episode_advantages(returns, s.normalize_std).flatten()
    drawn = msgrpo.draw_episodes(advantages, s.sampling, max(1, round(s.keep * len(episodes))), rng)

    rate = s.learning_rate * (1 - (iteration - 1) / s.iterations * (1 - s.final_learning_rate))
    updates, gap = [], None
    if s.dtype != "float32":  # p_old in the numerics of training
        gap = msgrpo.rescore(agent, [episodes[i] for i in drawn], s.micro_batch_tokens)
    for chunk in np.array_split(drawn, max(1, round(len(drawn) / s.update_episodes))) if drawn else ():
        means = msgrpo.accumulate_gradient(agent, [episodes[i] for i in chunk], advantages[chunk], clip=s.clip,
                                           gamma=s.gamma, entropy_coef=s.entropy_coef, budget=s.micro_batch_tokens)
        updates.append(means | {"grad_norm": learner.update(rate)})

    success = torch.tensor([episode.success for episode in episodes]).view(s.groups, -1)
    for desc, solved in zip(maps, success.all(1).tolist()):
        failed.pop(desc, None)
        failed |= {} if solved else {desc: None}
    for desc in [*failed][:-256]:
        del failed[desc]
    steps = [step for episode in episodes for step in episode.steps]
    generated, trained = sum(len(step.response) for step in steps), sum(update["tokens"] for update in updates)
    return {"iteration": iteration, "success": success[count:].float().mean().item() if count < s.groups else None,
            "return": returns.mean().item(), "steps": len(steps) / len(episodes),
            **{key: sum(getattr(step, key) for step in steps) / len(steps) for key in ("valid", "truncated")},
            **{key: sum(update[key] * update["tokens"] for update in updates) / trained if trained else None
               for key in ("loss", "entropy", "clip_share", "logprob_gap", "grad_norm")},
            "zero_variance_groups": (returns == returns[:, :1]).all(1).float().mean().item(),
            "groups_without_success": 1 - success.any(1).float().mean().item(), "replayed_groups": count,
            "drawn_episodes": len(drawn), "trained_episodes": int((advantages[drawn] != 0).sum()),
            "updates": len(updates), "rollout_logprob_gap": gap, "learning_rate": rate, "generated_tokens": generated,
            "trained_tokens": trained, "tokens_per_second": (generated + trained) / (time.perf_counter() - began)}


def progress_line(m, settings):
    """An iteration in one line that a person can follow."""
    m = {key: "-" if value is None else f"{value:.3f}" for key, value in m.items()} | {"i": m["iteration"]}
    clock, left = (f"{s // 60:.0f}:{s % 60:02.0f}" for s in (float(m["seconds"]), float(m["seconds_left"])))
    return (f"{m['i']:4d}/{settings.iterations}  success {m['success']}  return {m['return']}  steps {m['steps']}  "
            f"valid {m['valid']}  truncated {m['truncated']}  entropy {m['entropy']}  alike {m['zero_variance_groups']}  "
            f"clip {m['clip_share']}  grad {m['grad_norm']}  {float(m['tokens_per_second']):,.0f} tokens/s  "
            f"{clock} gone, {left} left")


def write_json(path, value):
    with lm.replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def start(settings):
    """What a run begins with: (Learner, Tokenizer, a function from instructions to a LanguageAgent)."""
    torch.set_num_threads(settings.threads)
    master, tokenizer = lm.load_pretrained(settings.checkpoint) if settings.checkpoint else tiny_start(settings)
    if tokenizer is None:
        raise ValueError(f"{settings.checkpoint} has no tokenizer.json: there is no text without one")
    learner = Learner(master, settings)
    return learner, tokenizer, lambda instructions: LanguageAgent(learner.model, tokenizer, instructions, settings)


def train(out, settings):
    """Train to the last iteration, from state.pt where there is one; then evaluate, save the model and sum up."""
    clock, path, log, stop = time.perf_counter(), out / "state.pt", out / "metrics.jsonl", []
    learner, tokenizer, agent_of = start(settings)
    agent = agent_of(settings.lake(SCENARIOS[settings.scenario], frozenlake.MAPS["4x4"], 0).instructions)
    if path.exists():
        progress, failed = load_state(path, learner)
        print(f"going on after iteration {progress['iteration']} of {settings.iterations}")
    else:
        warm_up(agent, tokenizer, learner, settings)
        before, failed = evaluate(agent_of, "noslip", settings, greedy=False), {}
        progress = {"iteration": 0, "seconds": 0.0, "generated_tokens": 0, "trained_tokens": 0, "before": before}
        print(f"{sum(p.numel() for p in learner.master.parameters()):,} parameters; before training, sampled on "
              f"held-out maps: success {before['success']:.4f} (a random player {before['random']:.4f}), "
              f"well-formed answers {before['valid']:.4f}", flush=True)
    clock -= progress["seconds"]
    lines = log.read_text().splitlines(keepends=True)[:progress["iteration"]] if log.exists() else []
    with lm.replacing(log) as file:  # what came after the state will come again
        file.write("".join(lines).encode())

    def interrupt(*_):
        if stop:
            raise KeyboardInterrupt
        stop.append(print("stopping after this iteration; once more to stop at once", flush=True))
    handler = signal.signal(signal.SIGINT, interrupt)
    for iteration in range(progress["iteration"] + 1, settings.iterations + 1):
        metrics = iterate(agent, learner, settings, iteration, failed)
        if settings.eval_every and iteration % settings.eval_every == 0:
            unseen = evaluate(agent_of, "noslip", settings)
            metrics |= {"unseen_success": unseen["success"], "unseen_success_unweighted": unseen["unweighted"]}
        seconds = time.perf_counter() - clock
        metrics["seconds_left"] = (seconds - progress["seconds"]) * (settings.iterations - iteration)
        progress |= {key: progress[key] + metrics[key] for key in ("generated_tokens", "trained_tokens")}
        progress |= {"iteration": iteration, "seconds": seconds}
        metrics["seconds"] = seconds
        with open(log, "a") as file:
            file.write(json.dumps(metrics) + "\n")
        print(progress_line(metrics, settings), flush=True)
        if stop or iteration % settings.checkpoint_every == 0 or iteration == settings.iterations:
            with lm.replacing(path) as file:
                torch.save({"progress": progress, "failed": [*failed], "model": learner.master.state_dict(),
                            "optimizer": learner.optimizer.state_dict()}, file)
        if stop:
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, handler)
    lm.save_pretrained(out / "model", learner.master, tokenizer)
    scenarios = evaluate_all(agent_of, settings)
    unseen, seconds = scenarios["noslip"], time.perf_counter() - clock
    write_json(out / "summary.json", progress | {
        "unseen_success": unseen["success"], "unseen_success_unweighted": unseen["unweighted"],
        "random_success": unseen["random"], "optimal_success": unseen["optimal"], "seconds": seconds,
        "seed": settings.seed, "scenarios": scenarios,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})
    play_one(agent_of, settings)
    print(f"{seconds:.0f} s; the model is in {out / 'model'}, the figures are in {out / 'summary.json'}")


def load_state(path, learner):
    """Weights and moments into the learner; returns (progress, failed). Raises ValueError where this is no state."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        learner.master.load_state_dict(state["model"])
        learner.optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise ValueError(f"{path} is no state of this run: {str(error).splitlines()[0]}") from None
    learner.refresh()
    return state["progress"], dict.fromkeys(state["failed"])


def evaluate_all(agent_of, settings):
    """Evaluate every scenario and print a table; returns {scenario: figures}."""
    print("scenario     success         unweighted  valid  random  optimal  (held-out maps, greedy)")
    results = {}
    for name in SCENARIOS:
        r = results[name] = evaluate(agent_of, name, settings)
        print(f"{name:12s} {r['success']:.4f} ±{r['half_interval']:.4f}  {r['unweighted']:.4f}      {r['valid']:.3f}  "
              f"{r['random']:.4f}  {r['optimal']:.4f}   {r['episodes']} episodes", flush=True)
    return results


def play_one(agent_of, settings):
    """Show one greedy episode on a held-out map, chosen by the seed, move by move."""
    scenario = SCENARIOS[settings.scenario]
    desc = frozenlake.draw_map(scenario, generator(settings.seed), held_out=True)
    lake = settings.lake(scenario, desc, settings.seed)
    agent = agent_of(lake.instructions)
    print(f"\n{lake.instructions}\n")
    for step in msgrpo.play(agent, [lake], greedy=True)[0].steps:
        print(f"{agent.decode(step.prompt)}{step.text}{'' if step.valid else '   (invalid: nothing moves)'}\n")
    print(f"{lake.observation()}\n{'reached' if lake.success else 'did not reach'} the goal in {lake.steps} steps\n")


def parse(argv):
    """(mode, its folder, out or None, {setting: value given}); leaves with status 2 on bad use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    modes = parser.add_mutually_exclusive_group(required=True)
    modes.add_argument("--tiny", action="store_true", help="train a tiny model from nothing")
    modes.add_argument("--checkpoint", metavar="DIR", help="train a pretrained model, or go on from a run's")
    modes.add_argument("--resume", metavar="DIR", help="go on with a run")
    modes.add_argument("--eval", metavar="DIR", help="evaluate a run or a model")
    modes.add_argument("--play", metavar="DIR", help="watch a run or a model play a map that --seed chooses")
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: a new numbered one under runs/)")
    for f in dataclasses.fields(Settings)[1:]:
        tiny = f", tiny {TINY[f.name]}" if f.name in TINY else ""
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {
            "type": f.type, "choices": f.metadata["choices"], "metavar": f.type.__name__.upper()}
        parser.add_argument(f"--{f.name.replace('_', '-')}",
                            help=f"{f.metadata['help']} (default {f.default}{tiny})", **kind)
    given = vars(parser.parse_args(argv))
    mode = next(mode for mode in ("tiny", "checkpoint", "resume", "eval", "play") if mode in given)
    folder, view = given.pop(mode), {"think", "coordinates", "max_new_tokens", "dtype", "device", "threads"}
    takes = {"resume": set(), "eval": view | {"eval_episodes"}, "play": view | {"seed", "scenario"}}.get(mode, given)
    if wrong := [name for name in given if name not in takes]:
        parser.error(f"--{mode} takes no --{wrong[0].replace('_', '-')}")
    return mode, folder, given.pop("out", None), given


def run(argv):
    """One command. Raises ValueError or OSError, with a message of one line, on bad input."""
    mode, folder, out, given = parse(argv)
    home = Path(folder if mode != "tiny" else "")
    s = Settings(**TINY) if mode == "tiny" else Settings()
    if mode == "resume" or mode in ("eval", "play") and (home / "settings.json").is_file():
        try:
            s = Settings(**json.loads((home / "settings.json").read_text()))
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{folder} is not the folder of a run: settings.json: {error}") from None
    if mode == "resume":
        done = (home / "summary.json").exists()
        return print(f"{folder} is complete: see its summary.json") if done else train(home, s)
    if mode != "tiny":
        found = [path for path in (home / "model", home) if (path / "config.json").is_file()]
        if not found:
            raise ValueError(f"{folder} is neither a run with a model nor a model: it has no config.json")
        given["checkpoint"] = str(found[0].resolve())
    s = dataclasses.replace(s, **given)
    device = s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    fast = device != "cpu" or torch.cpu._is_avx512_bf16_supported()  # other CPUs emulate bfloat16
    dtype = s.dtype if s.dtype != "auto" else "bfloat16" if fast else "float32"
    s = dataclasses.replace(s, device=device, dtype=dtype, threads=s.threads or torch.get_num_threads())
    if mode in ("eval", "play"):
        return (evaluate_all if mode == "eval" else play_one)(start(s)[2], s)
    out = Path(out or next(n for n in (f"runs/{i:04d}" for i in itertools.count(1)) if not Path(n).exists()))
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ValueError(f"{out} is not empty: go on with --resume {out}, or choose another --out")
    write_json(out / "settings.json", dataclasses.asdict(s))
    print(f"this run is {out}; if it is stopped, go on with: python train.py --resume {out}", flush=True)
    train(out, s)


def main(argv=None):
    """The command line: 0 for success, 2 for bad use or input, 130 where it was interrupted."""
    try:
        run(argv)
        return 0
    except (ValueError, OSError) as error:
        message = str(error)
    except (torch.OutOfMemoryError, MemoryError):
        message = ("out of memory: lower --micro-batch-tokens, --groups or --group-size, or set --recompute; "
                   "results/memory.py CONFIG computes what a run needs")
    except KeyboardInterrupt:
        message = "interrupted"
    print(f"train.py: {message}", file=sys.stderr)
    return 130 if message == "interrupted" else 2


if __name__ == "__main__":
    sys.exit(main())
