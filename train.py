"""Train a language model to cross frozen lakes by MS-GRPO, evaluate it on maps that it has never seen, and watch it play.

    python train.py --tiny                  a transformer from nothing, on a laptop's CPU
    python train.py --checkpoint DIR        a Qwen2, Qwen2.5, Qwen3 or Llama 3 directory in Hugging Face's format
    python train.py --resume DIR            go on with a run that was stopped or killed
    python train.py --eval DIR | --play DIR what a run or a checkpoint can do, in figures or move by move

A run's folder holds settings.json, metrics.jsonl (a line per iteration), state.pt (to resume from), model/ (a Hugging Face
directory) and summary.json. Every random number follows from (seed, iteration, episode), none from what ran before, so that
a resumed run goes on bit for bit.
"""
import argparse
import dataclasses
import functools
import json
import math
import resource
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import frozenlake
import model as lm
import msgrpo
from frozenlake import SCENARIOS, FrozenLake


def setting(default, help, **kwargs):
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass
class Settings:
    """All settings of a run, with units. Defaults are for pretrained models of some billion parameters: those marked
    [author] are of the paper's first author's later public trainer, [paper] of its abstract and introduction, the rest ours.
    """
    checkpoint: str = setting("", "directory of the pretrained model; empty: the tiny model", flag=False)
    seed: int = setting(0, "of everything random")
    iterations: int = setting(700, "times to play and learn [paper]")
    scenario: str = setting("noslip", "lakes to train on", choices=tuple(SCENARIOS))
    groups: int = setting(2, "groups an iteration, each on its own map [author]")
    group_size: int = setting(16, "episodes a group, all from the same start [author]")
    sampling: str = setting("aaw", "which episodes to train on", choices=("aaw", "uniform", "all"))
    keep: float = setting(.5, "share of the episodes that aaw and uniform draw, in (0, 1]")
    update_episodes: int = setting(16, "about as many drawn episodes for each optimiser step")
    gamma: float = setting(1.0, "credit per step of distance from the end, in [0, 1]; 1 is MS-GRPO [paper]")
    normalize_std: bool = setting(True, "divide advantages by the group's standard deviation")
    clip: float = setting(.2, "of the ratio, on both sides [author]")
    entropy_coef: float = setting(.001, "of the entropy bonus, per token in nats [author]")
    learning_rate: float = setting(1e-6, "of AdamW [author]")
    final_learning_rate: float = setting(1.0, "share of it that is left at the end of a linear decay; 1 is constant [author]")
    ramp: int = setting(0, "iterations of linear warm-up of the learning rate")
    beta2: float = setting(.999, "of AdamW: memory of squared gradients")
    weight_decay: float = setting(.01, "of AdamW [author]")
    grad_clip: float = setting(1.0, "largest norm of a gradient [author]")
    temperature: float = setting(1.25, "of sampling and of scoring alike [author]")
    max_new_tokens: int = setting(0, "of an answer; 0: 16, with --think 256 [author]")
    think: bool = setting(False, "ask for thoughts and a plan before the action")
    coordinates: bool = setting(False, "name the positions above the grid")
    invalid_penalty: float = setting(0.0, "subtracted from the reward for an invalid answer ([author]: 1, and moved left)")
    step_cost: float = setting(0.0, "subtracted from the reward at every step")
    micro_batch_tokens: int = setting(16384, "tokens of one forward and backward pass, about")
    recompute: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    dtype: str = setting("auto", "of forward passes; auto: bfloat16 on devices good at it", choices=("auto", "float32", "bfloat16"))
    device: str = setting("auto", "cuda, cpu, ...; auto: cuda where there is one")
    threads: int = setting(0, "CPU threads; 0: as many as there are cores. A part of the state: sums depend on it")
    checkpoint_every: int = setting(20, "iterations between states to resume from")
    eval_every: int = setting(0, "iterations between evaluations on the held-out maps of noslip; 0: at the end alone")
    eval_episodes: int = setting(1000, "episodes of each evaluation scenario that slips or is larger")
    warmup_steps: int = setting(0, "supervised steps on uniformly random answers, in place of pretraining")
    warmup_learning_rate: float = setting(3e-3, "of these steps")

    @property
    def limit(self):
        """Tokens of an answer at most."""
        return self.max_new_tokens or (256 if self.think else 16)

    def check(self):
        """Raises ValueError, naming the flag, where a value is out of its range."""
        at_least_one = ("iterations", "groups", "update_episodes", "micro_batch_tokens", "checkpoint_every", "eval_episodes")
        bounds = dict.fromkeys(at_least_one, (1, math.inf)) | {
            "gamma": (0, 1), "keep": (1e-9, 1), "final_learning_rate": (0, 1), "beta2": (0, 1 - 1e-9),
            "temperature": (1e-6, math.inf), "group_size": (2, math.inf)}  # one episode has nothing to compare with
        for f in dataclasses.fields(self):
            value, (low, high) = getattr(self, f.name), bounds.get(f.name, (0, math.inf))
            if not isinstance(value, (str, bool)) and not low <= value <= high:
                raise ValueError(f"{flag(f.name)} {value} is not in [{low}, {high}]")
            if value not in f.metadata.get("choices", [value]):
                raise ValueError(f"{flag(f.name)} {value} is none of {', '.join(f.metadata['choices'])}")
        return self

    def lake(self, scenario, desc, rng=None):
        """The game on one map of a scenario, with this run's text and rewards."""
        return FrozenLake(desc, scenario.success_rate, scenario.max_steps, rng, self.invalid_penalty, self.step_cost,
                          self.coordinates, self.think)


TINY = dict(  # what differs for a model that is born here, and why
    iterations=300, groups=32, update_episodes=64,  # it starts from nothing: more episodes, more updates
    normalize_std=False,  # with it groups become all alike early, and learning stops
    entropy_coef=.01,
    learning_rate=1e-3, final_learning_rate=.05, ramp=10, beta2=.99, weight_decay=0.0,
    temperature=1.0,
    max_new_tokens=3,  # <action>, a word, </action>
    dtype="float32", device="cpu", threads=1, warmup_steps=100)


def flag(name):
    return "--" + name.replace("_", "-")


def generator(*key):
    """The numpy Generator of a key: integers; their number is part of it, as SeedSequence takes (1,) for (1, 0)."""
    return np.random.default_rng([len(key), *key])


class LanguageAgent:
    """The language-agent policy, msgrpo.Policy: a transformer that reads a game's instructions before every state."""

    def __init__(self, model, tokenizer, instructions, settings):
        self.model, self.tokenizer, self.temperature = model, tokenizer, settings.temperature
        self.max_new_tokens, self.budget = settings.limit, settings.micro_batch_tokens
        self.instructions = tokenizer.prefix(instructions)
        self.encode = functools.lru_cache(65536)(lambda state: tuple(tokenizer.suffix(state, settings.think)))
        self.decode = functools.lru_cache(65536)(tokenizer.decode)

    @torch.no_grad()
    def refresh(self):
        """Run the instructions, whose keys and values every prompt shares, through the weights as they are now."""
        self.prefix = lm.encode_prefix(self.model, self.instructions)

    def act(self, observations, uniforms):
        prompts = [self.encode(observation) for observation in observations]
        responses, logprobs = lm.generate(self.model, self.prefix, prompts, uniforms, self.max_new_tokens,
                                          self.tokenizer.end_ids, self.tokenizer.size, self.temperature)
        return [msgrpo.Step(prompt, response, logprob, self.decode(response), response[-1] not in self.tokenizer.end_ids)
                for prompt, response, logprob in zip(prompts, map(tuple, responses), logprobs)]

    def score(self, steps):
        prefix = lm.encode_prefix(self.model, self.instructions)
        return lm.score(self.model, prefix, [step.prompt for step in steps], [step.response for step in steps],
                        self.tokenizer.size, self.temperature)


class Learner:
    """Float32 weights with their Adam moments, and the model of the run's dtype that plays and is differentiated.

    An update of relative size 1e-6 vanishes in bfloat16: the weights that are trained and saved are float32, and the
    bfloat16 model is a copy that takes them over after each update and hands its gradients on as they arise.
    """

    def __init__(self, master, settings):
        device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
        self.master = self.model = master.to(device)
        if dtype != torch.float32:
            with torch.device("meta"):
                self.model = lm.Transformer(master.config).to(dtype)
            self.model.to_empty(device=device)
            for weight, copy in zip(self.master.parameters(), self.model.parameters()):
                copy.register_post_accumulate_grad_hook(functools.partial(hand_on_gradient, weight))
            self.refresh()
        self.model.recompute = settings.recompute
        self.grad_clip = settings.grad_clip
        self.optimizer = torch.optim.AdamW(master.parameters(), lr=0.0, betas=(.9, settings.beta2),
                                           weight_decay=settings.weight_decay, fused=True)

    @torch.no_grad()
    def refresh(self):
        if self.model is not self.master:
            for weight, copy in zip(self.master.parameters(), self.model.parameters()):
                copy.copy_(weight)

    def update(self, learning_rate):
        """One step of AdamW on the gradients that are there; returns their norm. A norm that is not finite changes nothing."""
        norm = torch.nn.utils.clip_grad_norm_(self.master.parameters(), self.grad_clip).item()
        if math.isfinite(norm):
            self.optimizer.param_groups[0]["lr"] = learning_rate
            self.optimizer.step()
            self.refresh()
        self.optimizer.zero_grad()
        return norm


def hand_on_gradient(weight, copy):
    """Add the gradient of a copy to that of its float32 weight, and free it."""
    weight.grad = copy.grad.float() if weight.grad is None else weight.grad.add_(copy.grad)
    copy.grad = None


def tiny_start(settings):
    """A new tiny model and its tokenizer, whose words are the game's: (Transformer, Tokenizer)."""
    lakes = [settings.lake(s, ["S" + "F" * (s.size - 1), *["H" * s.size] * (s.size - 2), "F" * (s.size - 1) + "G"])
             for s in SCENARIOS.values()]
    texts = [text for lake in lakes for text in (lake.instructions, lake.observation())]
    tokenizer = lm.tiny_tokenizer([*texts, *(f"<action>{word}</action>" for word in frozenlake.ACTIONS)], "</action>")
    config = lm.Config("llama", tokenizer.size, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
                       num_attention_heads=4, num_key_value_heads=2, head_dim=12, rope_theta=100.0, tie_word_embeddings=True)
    torch.manual_seed(settings.seed)
    model = lm.Transformer(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:  # a sum of inputs keeps their size, a residual branch adds a part of it, embeddings are small
            scale = .02 if "embed" in name else weight.shape[1] ** -.5
            branch = (2 * config.num_hidden_layers) ** -.5 if "o_proj" in name or "down_proj" in name else 1.0
            torch.nn.init.normal_(weight, std=scale * branch)
    return model, tokenizer


def warm_up(agent, learner, settings):
    """In place of pretraining: answers of the right form and *uniformly random* meaning, in random states of training maps.

    It teaches to speak, not to play: what it leaves is checked by `evaluate` against the random player.
    """
    scenario = SCENARIOS[settings.scenario]
    answers = [f"<action>{word}</action>" for word in frozenlake.ACTIONS]
    answers = [tuple(agent.tokenizer.encode(answer)) for answer in answers]
    for i in range(settings.warmup_steps):
        rng, steps = generator(settings.seed, i), []
        for _ in range(64):
            lake = settings.lake(scenario, frozenlake.draw_map(scenario, rng))
            lake.state = int(rng.choice([state for state, tile in enumerate(lake.tiles) if tile in "SF"]))
            response = answers[rng.integers(4)]
            steps.append(msgrpo.Step(agent.encode(lake.observation()), response, [], "", False))
        loss = -agent.score(steps)[0].mean()
        loss.backward()
        learner.update(settings.warmup_learning_rate * min(1, (i + 1) / 10, 2 * (1 - i / settings.warmup_steps)))


def evaluate(agent_of, name, settings, greedy=True):
    """Success on held-out maps of a scenario, with that of a random and of the optimal player, as a dict of figures.

    4x4 without slipping: every held-out map once, exact when greedy; `success` weights a map by its probability,
    `unweighted` counts each alike. Otherwise `eval_episodes` episodes of a fixed seed, with 95 % of half an interval.
    """
    scenario = SCENARIOS[name]
    exact = scenario.size == 4 and scenario.success_rate == 1
    if exact:
        maps, weights = frozenlake.held_out_maps(scenario)
    else:
        rng = generator(0, 0, 0)
        maps = [frozenlake.draw_map(scenario, rng, held_out=True) for _ in range(settings.eval_episodes)]
        weights = np.full(len(maps), 1 / len(maps))
    games = [settings.lake(scenario, desc, generator(0, 0, i)) for i, desc in enumerate(maps)]
    agent = agent_of(games[0].instructions)
    episodes = msgrpo.play(agent, games, greedy)
    success = np.array([episode.success for episode in episodes], float)
    mean = float(weights @ success)
    answers = [step.valid for episode in episodes for step in episode.steps]
    optimal, uniform = weights @ np.array([success_bounds(tuple(desc), scenario) for desc in maps])
    return {"success": mean, "unweighted": float(success.mean()), "valid": sum(answers) / len(answers),
            "half_interval": 0.0 if exact else 1.96 * math.sqrt(mean * (1 - mean) / len(maps)),
            "episodes": len(maps), "random": float(uniform), "optimal": float(optimal)}


@functools.lru_cache(8192)
def success_bounds(desc, scenario):
    return FrozenLake(desc, scenario.success_rate, scenario.max_steps).success_bounds()


def iterate(agent, learner, settings, iteration):
    """Play, compare, draw and learn once; returns the iteration's metrics. See the steps 1 to 6 in msgrpo.py."""
    started = time.perf_counter()
    scenario, rng = SCENARIOS[settings.scenario], generator(settings.seed, iteration, 0)
    maps = [frozenlake.draw_map(scenario, rng) for _ in range(settings.groups)]
    games = [settings.lake(scenario, desc, generator(settings.seed, iteration, 0, i * settings.group_size + j))
             for i, desc in enumerate(maps) for j in range(settings.group_size)]
    agent.refresh()
    episodes = msgrpo.play(agent, games)
    returns = torch.tensor([episode.total_reward for episode in episodes]).view(settings.groups, -1)
    advantages = msgrpo.episode_advantages(returns, settings.normalize_std).flatten()
    count = max(1, round(settings.keep * len(episodes)))
    drawn = msgrpo.draw_episodes(advantages, settings.sampling, count, rng)

    done = (iteration - 1) / settings.iterations
    learning_rate = settings.learning_rate * min(1, iteration / (settings.ramp + 1))
    learning_rate *= 1 - done * (1 - settings.final_learning_rate)
    updates, options = [], dict(clip=settings.clip, gamma=settings.gamma, entropy_coef=settings.entropy_coef,
                                budget=settings.micro_batch_tokens)
    if settings.dtype != "float32":  # p_old in the numerics of training
        gap = msgrpo.rescore(agent, [episodes[i] for i in drawn], settings.micro_batch_tokens)
    for chunk in np.array_split(drawn, max(1, round(len(drawn) / settings.update_episodes))) if drawn else []:
        updates.append(msgrpo.accumulate_gradient(agent, [episodes[i] for i in chunk], advantages[chunk], **options))
        updates[-1]["grad_norm"] = learner.update(learning_rate)

    steps = [step for episode in episodes for step in episode.steps]
    generated, trained = sum(len(step.response) for step in steps), sum(update["tokens"] for update in updates)
    success = torch.tensor([episode.success for episode in episodes]).view(settings.groups, -1)
    means = {key: sum(update[key] * update["tokens"] for update in updates) / trained if trained else None
             for key in ("loss", "entropy", "clip_share", "logprob_gap", "grad_norm")}
    if settings.dtype != "float32" and drawn:
        means["logprob_gap"] = gap
    seconds = time.perf_counter() - started
    return {"iteration": iteration, "success": success.float().mean().item(), "return": returns.mean().item(),
            "steps": len(steps) / len(episodes), "valid": sum(step.valid for step in steps) / len(steps),
            "truncated": sum(step.truncated for step in steps) / len(steps),
            "zero_variance_groups": (returns == returns[:, :1]).all(1).float().mean().item(),
            "groups_without_success": 1 - success.any(1).float().mean().item(), **means,
            "drawn_episodes": len(drawn), "trained_episodes": int((advantages[drawn] != 0).sum()), "updates": len(updates),
            "learning_rate": learning_rate, "generated_tokens": generated, "trained_tokens": trained,
            "tokens_per_second": (generated + trained) / seconds}


def progress_line(m, settings, seconds, done):
    """An iteration in one line that a person can follow."""
    def share(key):
        return "  -  " if m[key] is None else f"{m[key]:.3f}"

    def clock(s):
        return f"{int(s) // 3600}:{int(s) // 60 % 60:02d}:{int(s) % 60:02d}"

    left = seconds / done * (settings.iterations - m["iteration"])
    return (f"{m['iteration']:4d}/{settings.iterations}  success {m['success']:.3f}  return {m['return']:+.3f}  "
            f"steps {m['steps']:.2f}  valid {m['valid']:.3f}  truncated {m['truncated']:.3f}  entropy {share('entropy')}  "
            f"same {m['zero_variance_groups']:.2f}  clip {share('clip_share')}  grad {share('grad_norm')}  "
            f"{m['tokens_per_second']:,.0f} tokens/s  {clock(seconds)} gone {clock(left)} left")


def write_json(path, value):
    with lm.replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def start(settings):
    """The models of a run before its first iteration: (Learner, Tokenizer, function of instructions to LanguageAgent)."""
    torch.set_num_threads(settings.threads)
    master, tokenizer = lm.load_pretrained(settings.checkpoint) if settings.checkpoint else tiny_start(settings)
    if tokenizer is None:
        raise ValueError(f"{settings.checkpoint} has no tokenizer.json: there is no text without one")
    learner = Learner(master, settings)

    def agent_of(instructions):
        agent = LanguageAgent(learner.model, tokenizer, instructions, settings)
        agent.refresh()
        return agent
    return learner, tokenizer, agent_of


def train(out, settings):
    """Train to the last iteration, from state.pt if the folder has one, then evaluate, save the model and sum up."""
    began = time.perf_counter()
    learner, tokenizer, agent_of = start(settings)
    agent = agent_of(settings.lake(SCENARIOS[settings.scenario], frozenlake.MAPS["4x4"]).instructions)
    state_path, metrics_path = out / "state.pt", out / "metrics.jsonl"
    if state_path.exists():
        progress = load_state(state_path, learner)
        print(f"going on after iteration {progress['iteration']} of {settings.iterations}")
    else:
        warm_up(agent, learner, settings)
        before = evaluate(agent_of, "noslip", settings, greedy=False)
        print(f"{sum(p.numel() for p in learner.master.parameters()):,} parameters; before training, sampled on held-out "
              f"maps: success {before['success']:.4f} (random player {before['random']:.4f}), "
              f"well-formed answers {before['valid']:.4f}", flush=True)
        progress = {"iteration": 0, "seconds": time.perf_counter() - began, "before": before,
                    "generated_tokens": 0, "trained_tokens": 0}
        save_state(state_path, learner, progress)
    kept = metrics_path.read_text().splitlines()[:progress["iteration"]] if metrics_path.exists() else []
    with lm.replacing(metrics_path) as file:  # what came after the state will come again
        file.write("".join(line + "\n" for line in kept).encode())
    earlier = progress["seconds"] - (time.perf_counter() - began)
    first, loop_began, stop = progress["iteration"], time.perf_counter(), []

    def interrupt(*_):
        if stop:
            raise KeyboardInterrupt
        stop.append(True)
        print("stopping after this iteration; once more to stop at once", flush=True)
    handlers = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for iteration in range(first + 1, settings.iterations + 1):
            metrics = iterate(agent, learner, settings, iteration)
            if settings.eval_every and iteration % settings.eval_every == 0:
                unseen = evaluate(agent_of, "noslip", settings)
                metrics |= {"unseen_success": unseen["success"], "unseen_success_unweighted": unseen["unweighted"]}
            progress["iteration"] = iteration
            progress["seconds"] = metrics["seconds"] = earlier + time.perf_counter() - began
            for key in ("generated_tokens", "trained_tokens"):
                progress[key] += metrics[key]
            with open(metrics_path, "a") as file:
                file.write(json.dumps(metrics) + "\n")
            print(progress_line(metrics, settings, time.perf_counter() - loop_began, iteration - first), flush=True)
            if stop or iteration % settings.checkpoint_every == 0 or iteration == settings.iterations:
                save_state(state_path, learner, progress)
            if stop:
                print(f"stopped after iteration {iteration}; go on with: python train.py --resume {out}")
                return 130
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    lm.save_pretrained(out / "model", learner.master, tokenizer)
    scenarios = evaluate_all(agent_of, settings)
    unseen = scenarios["noslip"]
    write_json(out / "summary.json", {
        "unseen_success": unseen["success"], "unseen_success_unweighted": unseen["unweighted"],
        "random_success": unseen["random"], "optimal_success": unseen["optimal"],
        **progress, "seconds": earlier + time.perf_counter() - began, "seed": settings.seed, "scenarios": scenarios,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})
    play_one(agent_of, settings)
    print(f"{earlier + time.perf_counter() - began:.0f} s; the model is in {out / 'model'}, figures in {out / 'summary.json'}")
    return 0


def evaluate_all(agent_of, settings):
    """Evaluate every scenario and print a table; returns {scenario: figures}."""
    print("scenario     success         unweighted  valid  random  optimal  on held-out maps, greedy")
    results = {}
    for name in SCENARIOS:
        r = results[name] = evaluate(agent_of, name, settings)
        print(f"{name:12s} {r['success']:.4f} +-{r['half_interval']:.4f}  {r['unweighted']:.4f}      {r['valid']:.3f}  "
              f"{r['random']:.4f}  {r['optimal']:.4f}   {r['episodes']} episodes", flush=True)
    return results


def play_one(agent_of, settings):
    """Show one greedy episode on a held-out map, move by move; the seed chooses the map."""
    scenario, rng = SCENARIOS[settings.scenario], generator(settings.seed, 0)
    lake = settings.lake(scenario, frozenlake.draw_map(scenario, rng, held_out=True), rng)
    agent, done = agent_of(lake.instructions), False
    print(f"\n{lake.instructions}\n")
    while not done:
        observation = lake.observation()
        step, = agent.act([observation], None)
        reward, done, valid = lake.step(step.text)
        print(f"{observation}\n{step.text}{'' if valid else '   (invalid: nothing moves)'}\n")
    print(f"{lake.observation()}\n{'reached the goal' if lake.success else 'did not reach the goal'} in {lake.steps} steps")


def save_state(path, learner, progress):
    with lm.replacing(path) as file:
        torch.save({"progress": progress, "model": learner.master.state_dict(),
                    "optimizer": learner.optimizer.state_dict()}, file)


def load_state(path, learner):
    """Weights and moments into the learner; returns the progress. Raises ValueError where the file is not a state."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        learner.master.load_state_dict(state["model"])
        learner.optimizer.load_state_dict(state["optimizer"])
        learner.refresh()
        return state["progress"]
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise ValueError(f"{path} is no state of this run: {str(error).splitlines()[0]}") from None


def resolve(settings):
    """Settings with every `auto` decided, so that a resumed run decides alike."""
    device = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = settings.dtype if settings.dtype != "auto" else "bfloat16" if good_at_bfloat16(device) else "float32"
    return dataclasses.replace(settings, device=device, dtype=dtype, threads=settings.threads or torch.get_num_threads())


def good_at_bfloat16(device):
    """Measured: is a bfloat16 matrix product clearly faster than a float32 one? Some CPUs emulate it."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16) * 3:  # the last of three counts
        x = torch.ones(512, 512, dtype=dtype, device=device)
        began = time.perf_counter()
        (x @ x)[0, 0].item()
        times[dtype] = time.perf_counter() - began
    return times[torch.bfloat16] < .8 * times[torch.float32]


MODES = {"tiny": "train a tiny model from nothing", "checkpoint": "train a pretrained model (Hugging Face directory, or a run)",
         "resume": "go on with a run", "eval": "evaluate a run or a model directory", "play": "watch one episode"}
PLAYING = {"eval": ("eval_episodes", "think", "coordinates", "max_new_tokens", "dtype", "device", "threads"),
           "play": ("seed", "scenario", "think", "coordinates", "max_new_tokens", "dtype", "device", "threads")}


def parse(argv):
    """(mode, its folder or None, out or None, {setting: value given})."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    modes = parser.add_mutually_exclusive_group(required=True)
    for mode, text in MODES.items():
        modes.add_argument(flag(mode), help=text, **({"action": "store_true"} if mode == "tiny" else {"metavar": "DIR"}))
    parser.add_argument("--out", metavar="DIR", help="folder of the run; without it a new numbered one under runs/")
    for f in dataclasses.fields(Settings):
        if f.name != "checkpoint":
            text = f"{f.metadata['help']} (default {f.default}{f', tiny {TINY[f.name]}' if f.name in TINY else ''})"
            kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {
                "type": f.type, "choices": f.metadata.get("choices"),
                "metavar": None if "choices" in f.metadata else "N" if f.type is int else "X"}
            parser.add_argument(flag(f.name), help=text.replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    mode = next(mode for mode in MODES if mode in given)
    folder, out = given.pop(mode), given.pop("out", None)
    useless = [flag(name) for name in given if name not in PLAYING.get(mode, given) or mode == "resume"]
    if mode in ("resume", "eval", "play") and out:
        useless.append("--out")
    if useless:
        parser.error(f"--{mode} takes no {', '.join(useless)}")
    return mode, folder, out, given


def model_folder(folder):
    """The Hugging Face directory that a run's or a model's folder means. Raises ValueError where there is none."""
    found = [path for path in (Path(folder) / "model", Path(folder)) if (path / "config.json").is_file()]
    if not found:
        raise ValueError(f"{folder} is neither a run with a model nor a model: it has no config.json")
    return str(found[0])


def read_settings(folder):
    """The settings of a run's folder. Raises ValueError where it is not one."""
    path = Path(folder) / "settings.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not the folder of a run: it has no settings.json")
    try:
        return Settings(**json.loads(path.read_text())).check()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def new_folder(out):
    """Make the folder of a new run. Raises ValueError where one would be overwritten."""
    if out is None:
        Path("runs").mkdir(exist_ok=True)
        number = max([int(path.name) for path in Path("runs").iterdir() if path.name.isdigit()], default=0) + 1
        out = Path("runs") / f"{number:04d}"
    Path(out).mkdir(parents=True, exist_ok=True)
    if any(Path(out).iterdir()):
        raise ValueError(f"{out} is not empty: go on with --resume {out}, or choose another --out")
    return Path(out)


def run(argv):
    mode, folder, out, given = parse(argv)
    if mode == "resume":
        settings = read_settings(folder)
        if (Path(folder) / "summary.json").exists():
            print(f"{folder} is complete: see summary.json")
            return 0
        return train(Path(folder), settings)
    if mode in ("eval", "play"):
        is_run = (Path(folder) / "settings.json").is_file()
        settings = read_settings(folder) if is_run else Settings()
        given["checkpoint"] = model_folder(folder)
        settings = resolve(dataclasses.replace(settings, **given).check())
        _, _, agent_of = start(settings)
        (evaluate_all if mode == "eval" else play_one)(agent_of, settings)
        return 0
    given = {**TINY, **given} if mode == "tiny" else {**given, "checkpoint": model_folder(folder)}
    settings = resolve(Settings(**given).check())
    out = new_folder(out)
    write_json(out / "settings.json", dataclasses.asdict(settings))
    print(f"this run is {out}", flush=True)
    return train(out, settings)


def main(argv=None):
    """The command line: 0 for success, 2 for bad use or input, 130 where it was interrupted."""
    try:
        return run(argv)
    except (ValueError, OSError) as error:
        message = str(error)
    except (torch.OutOfMemoryError, MemoryError):
        message = ("out of memory: lower --micro-batch-tokens, --groups or --group-size, or set --recompute; "
                   "results/memory.py CONFIG computes what a run needs")
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    print(f"train.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
