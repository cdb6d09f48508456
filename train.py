"""Train a language model to cross frozen lakes by MS-GRPO, evaluate it on lakes it has never seen, watch it
play.

    python train.py --tiny                      a transformer from nothing, on a laptop's CPU
    python train.py --checkpoint DIR            a Qwen2, Qwen2.5, Qwen3 or Llama in Hugging Face's format
    python train.py --resume DIR                go on with a run that was stopped or killed
    python train.py --eval DIR, or --play DIR   what a run or a checkpoint can do, in figures or move by move

A run's folder holds settings.json, metrics.jsonl (a line per iteration), state.pt (to resume from), model/
(in Hugging Face's format) and summary.json. Random numbers follow from (seed, iteration, episode), not from
what was drawn before: a resumed run goes on bit for bit.
"""
import argparse
import functools
import itertools
import json
import math
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

import frozenlake
import model as lm
import msgrpo
from frozenlake import SCENARIOS, FrozenLake


def setting(default, text, low=0, high=math.inf, choices=None):
    return field(default=default, metadata={"help": text, "range": (low, high, choices)})


@dataclass
class Settings:
    """All settings of a run. Defaults are for pretrained models of some billion parameters: [author] marks
    those of the later public trainer of the paper's first author, [paper] those of its abstract; the rest is
    ours.
    """
    checkpoint: str = setting("", "pretrained model's directory; empty: the tiny model")
    seed: int = setting(0, "of everything random")
    iterations: int = setting(700, "times to play and learn [paper]", 1)
    scenario: str = setting("noslip", "lakes to train on", choices=tuple(SCENARIOS))
    groups: int = setting(2, "groups an iteration, each on its own map [author]", 1)
    group_size: int = setting(16, "episodes a group, all from the same start [author]", 2)
    replay: float = setting(0.0, "share of groups on maps where an episode failed when last played", 0, 1)
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
    warmup_steps: int = setting(0, "steps of next-token prediction on the game's text, as pretraining")

    def __post_init__(self):
        for f in fields(self):
            value, (low, high, choices) = getattr(self, f.name), f.metadata["range"]
            kinds = (int, float) if f.type is float else (f.type,)  # to isinstance, True is an int
            good = type(value) in kinds and value in (choices or [value])
            lm.ensure(good and (f.type in (str, bool) or low <= value <= high),
                      f"--{f.name.replace('_', '-')} {value} is not {choices or f'in [{low}, {high}]'}")

    def lake(self, desc, *key, scenario=None):
        """The game on one map, with this run's text and rewards; its random numbers follow from the key."""
        s = SCENARIOS[scenario or self.scenario]
        return FrozenLake(desc, s.success_rate, s.max_steps, generator(*key), self.invalid_penalty,
                          self.step_cost, self.coordinates, self.think)


TINY = dict(  # what differs for a model that is born here, and why
    iterations=250, groups=64, group_size=32, update_episodes=128,  # from nothing it takes more
    replay=.5,  # soon most groups are all alike, and teach nothing
    normalize_std=False,  # the std blows up groups that are nearly all alike, and soon all are
    entropy_coef=.05, invalid_penalty=.5,  # the bonus keeps groups mixed, the penalty the answers' form
    learning_rate=1.5e-3, final_learning_rate=.05, weight_decay=0.0, temperature=1.0,
    beta2=.99, grad_clip=.1,  # gradients grow tenfold when the model begins to look at the map
    max_new_tokens=3,  # <action>, a word, </action>
    dtype="float32", device="cpu", threads=1, warmup_steps=250)


def generator(*key):
    """The numpy Generator of a key of integers, whose length counts: SeedSequence takes (1,) for (1, 0)."""
    return np.random.default_rng([len(key), *key])


class LanguageAgent:
    """The language-agent policy (msgrpo.Policy): a transformer that reads the instructions before every
    state."""

    def __init__(self, model, tokenizer, instructions, settings):
        self.model, self.size, self.ends = model, tokenizer.size, tokenizer.end_ids
        self.temperature, self.instructions = settings.temperature, tokenizer.prefix(instructions)
        self.max_new_tokens = settings.max_new_tokens or (256 if settings.think else 16)
        self.encode = functools.lru_cache(65536)(lambda text: tuple(tokenizer.suffix(text, settings.think)))
        self.decode = functools.lru_cache(65536)(tokenizer.decode)
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        """After an update: run the instructions, which all prompts share, through the weights as they are."""
        self.prefix, self.greedy = lm.encode_prefix(self.model, self.instructions), {}

    def act(self, observations, uniforms):
        prompts = [self.encode(observation) for observation in observations]
        new = prompts if uniforms is not None else [p for p in dict.fromkeys(prompts) if p not in self.greedy]
        answers = zip(*lm.generate(self.model, self.prefix, new, uniforms, self.max_new_tokens, self.ends,
                                   self.size, self.temperature)) if new else ()
        if uniforms is None:  # the same state has the same greedy answer
            self.greedy.update(zip(new, answers))
            answers = [self.greedy[prompt] for prompt in prompts]
        return [msgrpo.Step(prompt, tuple(ids), logprobs, self.decode(tuple(ids)), ids[-1] not in self.ends)
                for prompt, (ids, logprobs) in zip(prompts, answers)]

    def score(self, steps):
        prompts, responses = zip(*((step.prompt, step.response) for step in steps))
        prefix = lm.encode_prefix(self.model, self.instructions)
        return lm.score(self.model, prefix, prompts, responses, self.size, self.temperature)


class Learner:
    """Float32 weights with their Adam moments, and the `model` in the run's dtype that plays and has
    gradients.

    An update of relative size 1e-6 vanishes in bfloat16: what is trained and saved is float32. A bfloat16
    model is a copy that takes the weights over after each update, and hands on each gradient as soon as it is
    there.
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
        """A step of AdamW on the gradients; returns their norm. Where that is not finite, nothing changes."""
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
    texts = ["P _ O G\n_ P O G", *(f"<action>{word}</action>" for word in frozenlake.ACTIONS)]
    for name, s in SCENARIOS.items():
        desc = ["S" + "G" * (s.size - 1), *["G" * s.size] * (s.size - 1)]
        texts.append(settings.lake(desc, scenario=name).instructions)
    tokenizer = lm.tiny_tokenizer(texts, "</action>")
    model = lm.Transformer(lm.Config(
        "llama", tokenizer.size, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, rope_theta=1e2, tie_word_embeddings=True))
    torch.manual_seed(settings.seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:  # a layer keeps its input's size, a branch adds a part, embeddings are small
            branch = 6 ** -.5 if "o_proj" in name or "down_proj" in name else 1.0
            torch.nn.init.normal_(weight, std=.02 if "embed" in name else branch * weight.shape[1] ** -.5)
    return model, tokenizer


def warm_up(agent, tokenizer, learner, settings):
    """For want of pretraining: next-token prediction on states of training maps, answered *uniformly at
    random*.

    It teaches to read and to speak, not to play: `evaluate` then measures both.
    """
    skip = len(agent.instructions)
    for i in range(settings.warmup_steps):
        rng, rows = generator(settings.seed, i), []
        for _ in range(64):
            lake = settings.lake(frozenlake.draw_map(SCENARIOS[settings.scenario], rng))
            lake.state = int(rng.choice([state for state, tile in enumerate(lake.tiles) if tile in "SF"]))
            answer = tokenizer.encode(f"<action>{rng.choice(frozenlake.ACTIONS)}</action>")
            rows.append([*agent.instructions, *agent.encode(lake.observation()), *answer])
        ids, lengths = lm.pad(rows, settings.device)
        logits, real = learner.model(ids)[:, skip - 1:-1], lm.within(lengths, ids.shape[1])[:, skip:]
        torch.nn.functional.cross_entropy(logits[real], ids[:, skip:][real]).backward()
        learner.update(3e-3 * min(1, (i + 1) / 10, 2 * (1 - i / settings.warmup_steps)))


def evaluate(agent_of, name, settings, greedy=True):
    """Success on a scenario's held-out maps, beside that of a random and of the optimal player, as a dict of
    figures.

    4x4 without slipping: each held-out map once, so a greedy figure is exact; `success` weights a map by its
    probability, `unweighted` does not. Else `eval_episodes` episodes, the same every time, with half the
    width of a 95 % interval.
    """
    scenario, rng, n = SCENARIOS[name], generator(0), settings.eval_episodes
    exact = scenario.size == 4 and scenario.success_rate == 1
    maps, weights = frozenlake.held_out_maps(scenario) if exact else (
        [frozenlake.draw_map(scenario, rng, held_out=True) for _ in range(n)], np.full(n, 1 / n))
    lakes = [settings.lake(desc, i, scenario=name) for i, desc in enumerate(maps)]
    episodes = msgrpo.play(agent_of(lakes[0].instructions), lakes, greedy)
    success = np.array([episode.success for episode in episodes], float)
    mean, valid = float(weights @ success), [step.valid for episode in episodes for step in episode.steps]
    optimal, uniform = weights @ np.array([frozenlake.success_bounds(tuple(desc), scenario) for desc in maps])
    return {"success": mean, "unweighted": float(success.mean()), "valid": sum(valid) / len(valid),
            "half_interval": 0.0 if exact and greedy else 1.96 * math.sqrt(mean * (1 - mean) / len(maps)),
            "episodes": len(maps), "random": float(uniform), "optimal": float(optimal)}


def iterate(agent, learner, s, iteration, failed):
    """Play, compare, draw and learn once, the steps 1 to 6 of msgrpo.py; returns the iteration's metrics.

    failed: the last 256 training maps on which an episode failed, kept up to date here. A group whose
    episodes are all alike teaches nothing; so `replay` of the groups return to maps that are not yet solved.
    """
    began, rng = time.perf_counter(), generator(s.seed, iteration, 0)
    count = min(len(failed), round(s.replay * s.groups))
    maps = [failed[i] for i in rng.choice(len(failed), count, replace=False)] if count else []
    maps += [frozenlake.draw_map(SCENARIOS[s.scenario], rng) for _ in range(s.groups - count)]
    keys = itertools.product(range(s.groups), range(s.group_size))
    games = [s.lake(maps[i], s.seed, iteration, i, j) for i, j in keys]
    agent.refresh()
    episodes = msgrpo.play(agent, games)
    returns = torch.tensor([episode.total_reward for episode in episodes]).view(s.groups, -1)
    advantages = msgrpo.episode_advantages(returns, s.normalize_std).flatten()
    drawn = msgrpo.draw_episodes(advantages, s.sampling, max(1, round(s.keep * len(episodes))), rng)

    rate = s.learning_rate * min(1, iteration / 10) * (  # a ramp, as Adam knows little at first; a decay
        1 - (iteration - 1) / s.iterations * (1 - s.final_learning_rate))
    chosen, updates = [episodes[i] for i in drawn], []
    gap = None if s.dtype == "float32" else msgrpo.rescore(agent, chosen, s.micro_batch_tokens)
    for part in np.array_split(drawn, max(1, round(len(drawn) / s.update_episodes))) if drawn else ():
        updates.append(msgrpo.accumulate_gradient(
            agent, [episodes[i] for i in part], advantages[part], clip=s.clip, gamma=s.gamma,
            entropy_coef=s.entropy_coef, budget=s.micro_batch_tokens) | {"grad_norm": learner.update(rate)})

    success = torch.tensor([episode.success for episode in episodes]).view(s.groups, -1)
    failed[:] = [desc for desc in failed if desc not in maps]
    failed[:] = (failed + [desc for desc, solved in zip(maps, success.all(1).tolist()) if not solved])[-256:]
    steps = [step for episode in episodes for step in episode.steps]
    tokens = {"generated_tokens": sum(len(step.response) for step in steps),
              "trained_tokens": sum(update["tokens"] for update in updates)}
    fresh = success[count:].float().mean().item() if count < s.groups else None
    return {"iteration": iteration, "success": fresh, "return": returns.mean().item(),
            "steps": len(steps) / len(episodes),
            **{key: sum(getattr(step, key) for step in steps) / len(steps) for key in ("valid", "truncated")},
            **{key: sum(m[key] * m["tokens"] for m in updates) / tokens["trained_tokens"] if updates else None
               for key in ("loss", "entropy", "clip_share", "logprob_gap", "grad_norm")},
            "zero_variance_groups": (returns == returns[:, :1]).all(1).float().mean().item(),
            "groups_without_success": 1 - success.any(1).float().mean().item(), "replayed_groups": count,
            "drawn_episodes": len(drawn), "trained_episodes": int((advantages[drawn] != 0).sum()),
            "updates": len(updates), "rollout_logprob_gap": gap, "learning_rate": rate, **tokens,
            "tokens_per_second": sum(tokens.values()) / (time.perf_counter() - began)}


def progress_line(metrics, settings, left):
    """An iteration in one line that a person can follow."""
    m = {key: "-" if value is None else f"{value:.3f}" for key, value in metrics.items()}
    gone, left = (f"{int(s) // 60}:{int(s) % 60:02d}" for s in (metrics["seconds"], left))
    return (f"{metrics['iteration']:4d}/{settings.iterations}  success {m['success']}  return {m['return']}  "
            f"steps {m['steps']}  valid {m['valid']}  truncated {m['truncated']}  entropy {m['entropy']}  "
            f"alike {m['zero_variance_groups']}  clip {m['clip_share']}  grad {m['grad_norm']}  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s  {gone} gone, {left} left")


def write_json(path, value):
    with lm.replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def start(settings):
    """What a run begins with: (Learner, Tokenizer, a function from instructions to a LanguageAgent)."""
    torch.set_num_threads(settings.threads)
    home = settings.checkpoint
    master, tokenizer = lm.load_pretrained(home) if home else tiny_start(settings)
    lm.ensure(tokenizer, f"{home} has no tokenizer.json: there is no text without one")
    learner = Learner(master, settings)
    return learner, tokenizer, lambda text: LanguageAgent(learner.model, tokenizer, text, settings)


def train(out, settings, learner, tokenizer, agent_of):
    """Train to the last iteration, from state.pt where there is one; evaluate, save the model and sum up."""
    clock, path, log, stop = time.perf_counter(), out / "state.pt", out / "metrics.jsonl", []
    agent = agent_of(settings.lake(frozenlake.MAPS["4x4"]).instructions)
    if path.exists():
        with lm.blaming(path):
            state = torch.load(path, weights_only=True, map_location="cpu")
            learner.master.load_state_dict(state["model"])
            learner.optimizer.load_state_dict(state["optimizer"])
        learner.refresh()
        progress = state["progress"]
        print(f"going on after iteration {progress['iteration']} of {settings.iterations}")
    else:
        warm_up(agent, tokenizer, learner, settings)
        before = evaluate(agent_of, "noslip", settings, greedy=False)
        progress = {"iteration": 0, "seconds": 0.0, "generated_tokens": 0, "trained_tokens": 0,
                    "before": before, "failed": []}
        size = sum(p.numel() for p in learner.master.parameters())
        print(f"{size:,} parameters; before training, sampled on held-out maps: "
              f"success {before['success']:.4f} (a random player {before['random']:.4f}), "
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
        metrics = iterate(agent, learner, settings, iteration, progress["failed"])
        if settings.eval_every and iteration % settings.eval_every == 0:
            now = evaluate(agent_of, "noslip", settings)
            metrics |= {"unseen_success": now["success"], "unseen_success_unweighted": now["unweighted"]}
        metrics["seconds"] = time.perf_counter() - clock
        left = (metrics["seconds"] - progress["seconds"]) * (settings.iterations - iteration)
        progress |= {key: progress[key] + metrics[key] for key in ("generated_tokens", "trained_tokens")}
        progress |= {key: metrics[key] for key in ("iteration", "seconds")}
        with open(log, "a") as file:
            file.write(json.dumps(metrics) + "\n")
        print(progress_line(metrics, settings, left), flush=True)
        if stop or iteration % settings.checkpoint_every == 0 or iteration == settings.iterations:
            with lm.replacing(path) as file:
                torch.save({"progress": progress, "model": learner.master.state_dict(),
                            "optimizer": learner.optimizer.state_dict()}, file)
        if stop:
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, handler)
    lm.save_pretrained(out / "model", learner.master, tokenizer)
    del progress["failed"]
    scenarios = evaluate_all(agent_of, settings)
    unseen, peak = scenarios["noslip"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    write_json(out / "summary.json", progress | {
        "unseen_success": unseen["success"], "unseen_success_unweighted": unseen["unweighted"],
        "random_success": unseen["random"], "optimal_success": unseen["optimal"], "seed": settings.seed,
        "seconds": time.perf_counter() - clock, "peak_memory_mb": peak, "scenarios": scenarios})
    play_one(agent_of, settings)
    print(f"{time.perf_counter() - clock:.0f} s; see {out / 'summary.json'}, the model is in {out / 'model'}")


def evaluate_all(agent_of, settings):
    """Evaluate every scenario and print a table; returns {scenario: figures}."""
    print("scenario     success         unweighted  valid  random  optimal  (held-out maps, greedy)")
    results = {}
    for name in SCENARIOS:
        r = results[name] = evaluate(agent_of, name, settings)
        print(f"{name:12s} {r['success']:.4f} ±{r['half_interval']:.4f}  {r['unweighted']:.4f}      "
              f"{r['valid']:.3f}  {r['random']:.4f}  {r['optimal']:.4f}   "
              f"{r['episodes']} episodes", flush=True)
    return results


def play_one(agent_of, settings):
    """Show one greedy episode on a held-out map, chosen by the seed, move by move."""
    desc = frozenlake.draw_map(SCENARIOS[settings.scenario], generator(settings.seed), held_out=True)
    lake = settings.lake(desc, settings.seed)
    agent = agent_of(lake.instructions)
    print(f"\n{lake.instructions}\n")
    for step in msgrpo.play(agent, [lake], greedy=True)[0].steps:
        note = "" if step.valid else "   (invalid: nothing moves)"
        print(f"{agent.decode(step.prompt)}{step.text}{note}\n")
    end = "reached" if lake.success else "did not reach"
    print(f"{lake.observation()}\n{end} the goal in {lake.steps} steps\n")


MODES = {"checkpoint": "train a pretrained model, or go on from a run's", "resume": "go on with a run",
         "eval": "evaluate a run or a model", "play": "watch a run or a model play a map that --seed chooses"}
VIEW = {"think", "coordinates", "max_new_tokens", "dtype", "device", "threads"}
TAKES = {"resume": set(), "eval": VIEW | {"eval_episodes"}, "play": VIEW | {"seed", "scenario"}}


def parse(argv):
    """(mode, its folder, out or None, {setting: value given}); ValueError on bad use."""
    parser = argparse.ArgumentParser(None, None, __doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = functools.partial(lm.ensure, False)  # in one line, like all other errors
    modes = parser.add_mutually_exclusive_group(required=True)
    modes.add_argument("--tiny", action="store_const", const=".", help="train a tiny model from nothing")
    for mode, text in MODES.items():
        modes.add_argument(f"--{mode}", metavar="DIR", help=text)
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: a new one under runs/)")
    for f in fields(Settings)[1:]:
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {
            "type": f.type, "choices": f.metadata["range"][2], "metavar": f.type.__name__.upper()}
        tiny = f", tiny {TINY[f.name]}" if f.name in TINY else ""
        text = f"{f.metadata['help']} (default {f.default}{tiny})"
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=text, **kind)
    given = vars(parser.parse_args(argv))
    mode = next(mode for mode in ("tiny", *MODES) if mode in given)
    folder = given.pop(mode)
    if wrong := sorted(given.keys() - TAKES.get(mode, given.keys())):
        parser.error(f"--{mode} takes no --{wrong[0].replace('_', '-')}")
    return mode, Path(folder), given.pop("out", None), given


def run(argv):
    """One command. Raises ValueError or OSError, with a message of one line, on bad input."""
    mode, folder, out, given = parse(argv)
    s, path = Settings(**TINY) if mode == "tiny" else Settings(), folder / "settings.json"
    if mode == "resume" or mode in TAKES and path.exists():
        with lm.blaming(path):
            s = Settings(**lm.parse_json(path.read_bytes()))
    if mode == "resume":
        done = (folder / "summary.json").exists()
        return print(f"{folder} is complete: see its summary.json") if done else train(folder, s, *start(s))
    if mode != "tiny":
        found = [str(home) for home in (folder / "model", folder) if (home / "config.json").is_file()]
        lm.ensure(found, f"{folder} is neither a run with a model nor a model: it has no config.json")
        given["checkpoint"] = found[0]
    s = replace(s, **given)
    device = s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    fast = device != "cpu" or torch.cpu._is_avx512_bf16_supported()  # other CPUs emulate bfloat16
    dtype = s.dtype if s.dtype != "auto" else "bfloat16" if fast else "float32"
    s = replace(s, device=device, dtype=dtype, threads=s.threads or torch.get_num_threads())
    with lm.blaming(f"--device {device}"):
        torch.empty(0, device=device)
    if mode in TAKES:
        return (evaluate_all if mode == "eval" else play_one)(start(s)[2], s)
    out = Path(out or next(n for n in (f"runs/{i:04d}" for i in itertools.count(1)) if not Path(n).exists()))
    used = out.is_dir() and any(out.iterdir())
    lm.ensure(not used, f"{out} is not empty: --resume {out}, or choose another --out")
    started = start(s)  # before the folder is made: what cannot start leaves none
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "settings.json", asdict(s))
    print(f"this run is {out}; if it is stopped, go on with: python train.py --resume {out}", flush=True)
    train(out, s, *started)


def main(argv=None):
    """The command line: 0 for success, 2 for bad use or input, 130 where it was interrupted."""
    try:
        run(argv)
        return 0
    except (ValueError, OSError) as error:
        status, message = 2, error
    except (torch.OutOfMemoryError, MemoryError):
        status, message = 2, ("out of memory: lower --micro-batch-tokens, --groups or --group-size, or set "
                              "--recompute; results/memory.py computes what a run needs")
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    print(f"train.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
