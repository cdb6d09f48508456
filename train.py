"""Train a language model to cross frozen lakes by MS-GRPO, evaluate it, watch it play.

    python train.py --tiny                  a transformer from nothing, on a laptop's CPU
    python train.py --checkpoint DIR        a Hugging Face folder: Llama, Qwen2, Qwen2.5 or Qwen3
    python train.py --resume DIR            go on with a run that was stopped or killed
    python train.py --eval DIR              measure a run or a model (--play DIR: watch it move)
    torchrun --nproc-per-node N train.py ...    the same, on N processes

A run's folder holds settings.json, metrics.jsonl (a line per iteration), state.pt (to resume from),
model/ (in Hugging Face's format) and summary.json. Random numbers follow from (seed, iteration,
group, episode), not from what was drawn before: on a CPU, a resumed run goes on bit for bit.
"""

import argparse
import copy
import difflib
import gc
import itertools
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

IMPORTED = threading.Event()


def show_dots():
    """What a terminal shows meanwhile: importing torch takes seconds."""
    print("importing torch", end="", file=sys.stderr, flush=True)
    while not IMPORTED.wait(0.5):
        print(".", end="", file=sys.stderr, flush=True)
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import
    if sys.stderr.isatty():
        threading.Thread(target=show_dots, daemon=True).start()

# Threads that wait by spinning take the time of those they wait for: beside other work, a run of
# seconds took many minutes. OpenMP reads these when torch is imported: GNU's then spins shortly and
# sleeps, others sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch

import frozenlake
import model as lm
import msgrpo
from frozenlake import SCENARIOS, FrozenLake

IMPORTED.set()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def setting(default, text, low=0, high=1e18, choices=None):
    return field(default=default, metadata={"help": text, "range": (low, high), "choices": choices})


@dataclass
class Settings:
    """All settings of a run. Defaults are for pretrained models of some billion parameters.

    [author] marks those of the later public trainer of the paper's first author, [paper] those of
    its abstract. The rest is ours.
    """

    checkpoint: str = setting("", "The pretrained model's folder; empty: the tiny model")
    seed: int = setting(0, "All random numbers follow from it")
    iterations: int = setting(700, "Play and learn X times [paper]", 1)
    checkpoint_every: int = setting(20, "Save a state to resume from every X iterations", 1)

    groups: int = setting(2, "Play X groups an iteration, each on its own map [author]", 1, 1e6)
    group_size: int = setting(16, "Play X episodes in a group, all on its map [author]", 2, 1e6)
    normalize_std: bool = setting(True, "Divide advantages by the group's standard deviation")
    imagine: int = setting(0, "Compare with X imagined episodes of mean return or more", 0, 1e6)
    gamma: float = setting(1.0, "Fade credit by X a step, from the end back; paper: 1", 0, 1)
    sampling: str = setting("aaw", "Draw episodes by this rule", choices=("aaw", "uniform", "all"))
    keep: float = setting(0.5, "Draw this share of the episodes, by aaw and uniform", 1e-9, 1)
    update_episodes: int = setting(16, "Take about X drawn episodes in an optimiser step", 1)
    clip: float = setting(0.2, "Clip where the ratio leaves 1 - X to 1 + X [author]")
    entropy_coef: float = setting(0.001, "Weigh the entropy bonus by X, per token in nats [author]")
    entropy_floor: float = setting(0.0, "Add what the entropy lacks to X nats to that weight")
    learning_rate: float = setting(1e-6, "Learn at rate X [author], after a ramp of ten iterations")
    final_rate: float = setting(1.0, "Lower the rate to this share by the end [author]", 0, 1)
    grad_clip: float = setting(1.0, "Shorten gradients to a norm of at most X [author]")
    replay: float = setting(0.0, "Play this share of groups on maps that were failed before", 0, 1)
    layers: int = setting(3, "Give a new model X layers", 1, 1000)
    warmup_steps: int = setting(0, "Teach a new model the game's text first, in X steps")

    scenario: str = setting("noslip", "Train on these lakes", choices=tuple(SCENARIOS))
    max_steps: int = setting(0, "Train, and --play, X steps at most; 0: the scenario's")
    invalid_penalty: float = setting(0.0, "Take X off the reward for an answer that is no move")
    think: bool = setting(False, "Ask for thoughts and a plan before the action")
    temperature: float = setting(1.25, "Sample, and score, at this temperature [author]", 1e-6)
    max_new_tokens: int = setting(0, "End answers after X tokens; 0: 16, to think 256 [author]")
    eval_every: int = setting(0, "Evaluate every X iterations; 0: at the end alone")
    eval_episodes: int = setting(1000, "Play at most X episodes to evaluate a scenario", 1)

    dtype: str = setting(
        "",
        "Run passes in these numbers; by default what is fast on --device",
        choices=("float32", "bfloat16"),
    )
    device: str = setting(DEVICE, "Put the model there: cpu, cuda or cuda:N")
    threads: int = setting(torch.get_num_threads(), "Use X threads of the CPU", 1, 4096)
    micro_batch_tokens: int = setting(16384, "Take about X tokens in one pass", 1)
    recompute: str = setting(
        "",
        "Compute this twice to save memory: layers needs least, nothing is fastest; by default "
        "layers on a GPU, else parts",
        choices=("nothing", "parts", "layers"),
    )

    def __post_init__(self):
        """Choose what depends on the device, where it is not given."""
        kind = str(self.device).split(":")[0]
        if self.dtype == "":
            self.dtype = "bfloat16" if lm.bfloat16_is_fast(kind) else "float32"
        if self.recompute == "":  # a GPU is short of memory, not of speed
            self.recompute = "layers" if kind == "cuda" else "parts"

    def lake(self, desc, *key, scenario=None):
        """The game on one map, with this run's text and rewards; its luck follows from the key.

        scenario: the one to evaluate on; None: the training one, with the settings' `max_steps`.
        """
        rules = SCENARIOS[scenario or self.scenario]
        max_steps = rules.max_steps
        if scenario is None and self.max_steps:
            max_steps = self.max_steps
        return FrozenLake(
            desc, rules.success_rate, max_steps, generator(*key), self.invalid_penalty, self.think
        )


def generator(*key):
    """The numpy Generator of a key of integers. Its length counts: to numpy, (1,) is (1, 0)."""
    return np.random.default_rng([len(key), *key])


def iterate(player, trainee, learner, iteration, replay_pool):
    """One iteration of MS-GRPO, by the steps of msgrpo.py; returns its metrics.

    player samples, trainee scores with gradient: one model in float32, where one process runs.
    learner has the optimiser. replay_pool: at most 256 maps on which an episode failed, kept up to
    date here. The metric `success` is of newly drawn maps alone.
    """
    s = learner.settings
    rng = generator(s.seed, iteration, 0)

    # 1. Play groups of episodes, each group on one map
    maps, replayed, remaining = choose_maps(s, replay_pool, rng)
    games = [
        s.lake(desc, s.seed, iteration, group, episode)
        for group, desc in enumerate(maps)
        for episode in range(s.group_size)
    ]
    episodes, rollout_gap = play_all(player, games, s)
    reached = [episode[-1].success for episode in episodes]
    success = np.reshape(reached, (s.groups, s.group_size))

    # 2. Returns
    returns = msgrpo.episode_returns(episodes).view(s.groups, s.group_size)

    # 3. Advantages in the group
    advantages = group_advantages(returns, s)  # (groups, G)

    # 4. Each step is paid its episode's advantage: msgrpo.assign_credit, or a fork's rule
    learner.assign_credit(episodes, advantages, s.gamma)

    # 5. Draw the episodes to train on
    count = max(1, round(s.keep * len(episodes)))
    drawn = msgrpo.draw_episodes(advantages.flatten(), s.sampling, count, rng)
    rng.shuffle(drawn)  # ours: updates take them in a random order

    # 6. Ascend the clipped objective
    updates = learn(trainee, learner, episodes, drawn, learning_rate(s, iteration))

    lost = [desc for desc, won in zip(maps, success.all(1)) if not won]
    replay_pool[:] = (remaining + lost)[-256:]
    return summarize(episodes, returns, success, replayed, updates) | {
        "rollout_gap": rollout_gap,
        "nonzero_episodes": int((advantages != 0).sum()),
        "drawn_episodes": len(drawn),
    }


def learn(trainee, learner, episodes, drawn, rate):
    """Optimiser steps on the drawn episodes, about `update_episodes` each; a dict for each."""
    s = learner.settings
    if not drawn:
        return []
    entropy_coef = entropy_coefficient(s, episodes)
    updates = []
    for indices in np.array_split(drawn, max(1, round(len(drawn) / s.update_episodes))):
        batch = [episodes[i] for i in indices]
        with_credit = [episode for episode in batch if any(step.credit for step in episode)]
        if not entropy_coef and not with_credit:
            continue  # nothing to learn from
        # Before its first update, an iteration can still be given up, and played again
        update = accumulate_gradient(trainee, batch, s, entropy_coef, can_stop=not updates)
        update["grad_norm"] = learner.update(rate)
        update["trained"] = len(with_credit)
        updates.append(update)
    return updates


def evaluate(learner, name, greedy=True):
    """Success on held-out maps beside that of players who do not learn: printed and returned.

    noslip: each of the 503 held-out maps once, so that greedy figures are exact; `success` weights
    a map by its probability. Otherwise, and where fewer episodes are allowed, the same
    `eval_episodes` draws every time, with half of Wilson's 95 % interval. Samples are a quick look:
    50 draws at most.
    """
    s = learner.settings
    limit = s.eval_episodes if greedy else min(50, s.eval_episodes)
    maps, weights, exact = evaluation_maps(SCENARIOS[name], limit)
    lakes = [s.lake(desc, 0, i, scenario=name) for i, desc in enumerate(maps)]
    STATUS.doing(f"evaluating {name}")
    policy = learner.player(lakes[0].instructions)
    if greedy:
        policy = Remembering(policy)
    episodes = gather(msgrpo.play(policy, share(lakes), greedy, STATUS.detail))
    success = np.array([episode[-1].success for episode in episodes], float)
    mean = float(weights @ success)
    figures = {
        "success": mean,
        "half_interval": 0.0 if exact and greedy else half_interval(mean, weights),
        "unweighted": float(success.mean()),
        "valid": float(np.mean([step.valid for episode in episodes for step in episode])),
        "episodes": len(maps),
    }
    figures |= mean_baselines(lakes, weights)
    say(score_line(name, [f"{figures[key]:.4f}" for key in SCORES]))
    return figures


# Below: the machinery around the method. Processes, the learner's weights, the tiny model, saving
# and resuming, the command line.

# torchrun sets these. All processes draw the same random numbers, and each has the whole history
# and replay pool. They share the playing, the passes of an update, and the float32 state. With one
# process, `share` and `gather` give back what they get.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def share(items):
    """This process's part of a list."""
    return items[len(items) * RANK // WORLD : len(items) * (RANK + 1) // WORLD]


def gather(items):
    """The lists of all processes as one, in their order."""
    if WORLD == 1:
        return items
    parts = [None] * WORLD
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def play_all(player, games, s):
    """The games' episodes, of which each process plays its share.

    Also the mean gap between the log-probabilities of sampling and of training. In float32 they are
    equal up to rounding: it is not measured, and None.
    """
    mine = play_share(player, games)
    if s.dtype == "float32":
        return gather(mine), None
    gap = msgrpo.rescore(player, mine, s.micro_batch_tokens)
    return gather(mine), np.mean(gather([gap]))


def play_share(player, games):
    """This process's share of the episodes. Raises Stopped on all processes if one is asked to."""

    def after_round(done, total):
        STATUS.detail(done, total)
        if INTERRUPTS.asked:
            raise Stopped

    episodes = None
    try:
        episodes = msgrpo.play(player, share(games), after_round=after_round)
    except Stopped:
        pass
    stop_if(episodes is None)
    return episodes


def share_passes(steps, budget):
    """This process's micro-batches, each with the weight of its gradient and its figures.

    FSDP2 gives the mean of the processes' gradients, where their sum is wanted: hence WORLD. All
    must make the same number of passes: a process without work repeats a step, of weight 0.
    """
    batches = msgrpo.micro_batches(steps, budget, parts=WORLD)
    passes = [(batch, WORLD) for batch in batches[RANK::WORLD]]
    if len(passes) * WORLD < len(batches):
        passes.append((batches[0][:1], 0))
    return passes


def accumulate_gradient(trainee, episodes, s, entropy_coef, can_stop):
    """As msgrpo.accumulate_gradient, with its passes shared by the processes."""

    def passes(scored, budget):
        mine = share_passes(scored, budget)
        for i, one in enumerate(mine):
            STATUS.detail(i, len(mine), "learning")
            stop_if(can_stop and INTERRUPTS.asked)
            yield one

    found = msgrpo.accumulate_gradient(
        trainee, episodes, s.clip, entropy_coef, s.micro_batch_tokens, passes
    )
    found = gather([found])
    means = {key: np.mean([update[key] for update in found]) for key in found[0]}
    return means | {"tokens": found[0]["tokens"]}


def choose_maps(s, replay_pool, rng):
    """A map for each group, how many of them are replayed, and what remains of the pool.

    Ours: up to `replay` of the groups return to maps of the pool. They come first.
    """
    remaining = list(replay_pool)
    replayed = min(len(remaining), round(s.replay * s.groups))
    maps = [remaining.pop(rng.integers(len(remaining))) for _ in range(replayed)]
    while len(maps) < s.groups:
        maps.append(frozenlake.draw_map(SCENARIOS[s.scenario], rng))
    return maps, replayed, remaining


def group_advantages(returns, s):
    """Advantages (groups, G). Ours: each group has `imagine` more episodes, which nobody played.

    They are as good as the mean of all groups, or as the group's worst where that is better. So
    what always fails becomes less likely, and what always wins keeps A = 0.
    """
    mean = returns.double().mean().item()  # else equal returns may differ from their mean
    worst = returns.amin(1, keepdim=True)
    imagined = worst.clamp(min=mean).expand(-1, s.imagine)
    returns = torch.cat([returns, imagined], 1)
    return msgrpo.episode_advantages(returns, s.normalize_std)[:, : s.group_size]


def entropy_coefficient(s, episodes):
    """Ours: `entropy_coef`, and what the entropy, the mean of -log p, lacks to `entropy_floor`."""
    logprobs = [x for episode in episodes for step in episode for x in step.answer.logprobs]
    entropy = -float(np.mean(logprobs))
    return s.entropy_coef + max(0.0, s.entropy_floor - entropy)


def learning_rate(s, iteration):
    """Ours: a ramp of ten iterations, then a straight line down to `final_rate` of the peak."""
    times = [0, 10, max(11, s.iterations)]
    return s.learning_rate * np.interp(iteration, times, [0, 1, s.final_rate])


class Stopped(Exception):
    """Training ends after an iteration, or before its first update: it will be played again."""


def stop_if(asked):
    """Raises Stopped on all processes if one of them is asked to stop."""
    if any(gather([asked])):
        raise Stopped


class Interrupts:
    """Ctrl-C and SIGTERM end a run at the next safe place; once more ends it at once.

    torchrun kills its processes after 30 s: where saving takes longer, the last saved state stays.
    """

    asked = False
    active = False

    def __enter__(self):
        self.asked = False
        self.active = True
        both = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.ask) for number in both}

    def __exit__(self, *_):
        self.active = False
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if RANK > 0:
            return
        try:  # not by print, as this may have interrupted one
            os.write(sys.stderr.fileno(), b"\nstopping: the state is saved first\n")
        except OSError:
            pass


INTERRUPTS = Interrupts()


class Status:
    """What goes on, how long: a line rewritten on a terminal, printed now and then elsewhere."""

    text = ""
    more = ""
    since = 0.0
    is_terminal = RANK == 0 and sys.stderr.isatty()

    def __enter__(self):
        self.ended = threading.Event()
        threading.Thread(target=self.tick, daemon=True).start()

    def __exit__(self, *_):
        self.ended.set()
        self.doing("")

    def tick(self):
        while not self.ended.wait(1 if self.is_terminal else 30):
            if not self.text:
                continue
            line = f"{self.text}{self.more}, {time.perf_counter() - self.since:.0f} s"
            try:
                if self.is_terminal:
                    print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
                else:
                    print(line, flush=True)
            except OSError:  # nobody reads it any more: `say` sees to that
                return

    def doing(self, text):
        self.text = text
        self.more = ""
        self.since = time.perf_counter()

    def detail(self, done, total, what="playing"):
        self.more = f", {what}: {done} of {total} done"


STATUS = Status()


def say(line):
    """Print a line, in the place of the status line."""
    if STATUS.is_terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    try:
        print(line, flush=True)
    except BrokenPipeError:  # the `tee` of `train.py | tee log` has ended, by Ctrl-C perhaps
        # Nobody reads what is printed from now on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not INTERRUPTS.active:
            raise
        INTERRUPTS.asked = True


class Learner:
    """What is trained: `master`, float32 weights, which AdamW updates, and `model`, which plays.

                             model                  whose gradients
        float32              the master itself      its own
        bfloat16             a copy in bfloat16     the copy's, handed on to the master
        several processes    a copy on each         the master's, of which each has a part (FSDP2)

    In bfloat16 an update of relative size 1e-6 would vanish: hence a float32 master.
    """

    def __init__(
        self,
        settings,
        model,
        tokenizer,
        agent_class=lm.LanguageAgent,
        assign_credit=msgrpo.assign_credit,
    ):
        s = settings
        self.settings = s
        self.tokenizer = tokenizer
        self.agent_class = agent_class
        self.assign_credit = assign_credit
        self.dtype = getattr(torch, s.dtype)
        torch.set_num_threads(s.threads)
        model.model.recompute = s.recompute
        with lm.blaming(f"--device {s.device}"):  # such as cuda:9
            self.place(model)
        weights = self.master.parameters()
        self.optimizer = torch.optim.AdamW(
            weights, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )  # [author], but for .99: ours, as a run has few updates

    def place(self, model):
        """Put the model on the device, and make the copy where one is needed."""
        s = self.settings
        self.master = model
        if WORLD > 1:
            self.model = copy.deepcopy(model).to(s.device, self.dtype)
            shard(model, self.dtype, s.device)  # moves to the device, layer by layer
            return
        if s.device.startswith("cuda:"):
            torch.cuda.set_device(s.device)  # on which `lm.capture` records
        self.model = model.to(s.device)
        if self.dtype != torch.float32:
            self.model = copy.deepcopy(model).to(self.dtype)
            for low, weight in zip(self.model.parameters(), model.parameters()):
                hand_on_gradient(low, weight)

    def player(self, instructions):
        """The policy that plays, which reads these instructions before every state."""
        return self.agent(self.model, instructions)

    def trainee(self, instructions):
        """The policy whose log-probabilities have gradients."""
        return self.agent(self.master if WORLD > 1 else self.model, instructions)

    def agent(self, model, instructions):
        s = self.settings
        tokens = s.max_new_tokens or (256 if s.think else 16)
        return self.agent_class(model, self.tokenizer, instructions, s.temperature, tokens, s.think)

    def update(self, rate):
        """A step of AdamW on the gradients; returns their norm. Not finite, it changes nothing."""
        norm = torch.nn.utils.clip_grad_norm_(self.master.parameters(), self.settings.grad_clip)
        if WORLD > 1:
            norm = norm.full_tensor()
        norm = norm.item()
        if np.isfinite(norm):
            self.optimizer.param_groups[0]["lr"] = float(rate)
            self.optimizer.step()
            self.copy_weights()
        self.optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def copy_weights(self):
        if self.model is self.master:
            return
        for low, weight in zip(self.model.parameters(), self.master.parameters()):
            low.copy_(weight.full_tensor() if WORLD > 1 else weight)

    def state(self):
        """Weights and moments, whole, on the CPU; of several processes the first one has them."""
        from torch.distributed.checkpoint import state_dict  # here, as importing it takes a second

        options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
        # Before the first update there are no moments: torch would make some by a step of its own
        optimizer = self.optimizer if self.optimizer.state else ()
        weights, moments = state_dict.get_state_dict(self.master, optimizer, options=options)
        return {"weights": weights, "moments": moments}

    def load_moments(self, moments):
        """Take up what `state` gave; before the first update there are none."""
        from torch.distributed.checkpoint import state_dict

        if moments:
            options = state_dict.StateDictOptions(
                full_state_dict=True, broadcast_from_rank0=WORLD > 1
            )
            set_moments = state_dict.set_optimizer_state_dict
            set_moments(self.master, self.optimizer, moments, options=options)


def hand_on_gradient(low, weight):
    """As soon as a parameter has a gradient, add it to its float32 weight's, and free it."""

    def hand_on(low):
        if weight.grad is None:
            weight.grad = low.grad.float()
        else:
            weight.grad += low.grad
        low.grad = None

    low.register_post_accumulate_grad_hook(hand_on)


def shard(model, dtype, device):
    """FSDP2: each process holds a part of weights, gradients, moments; gradients are averaged."""
    from torch.distributed import fsdp  # here, as importing it takes a second

    mesh = torch.distributed.device_mesh.init_device_mesh(device, (WORLD,))
    precision = fsdp.MixedPrecisionPolicy(dtype, torch.float32)
    for module in (*model.model.layers, model):
        fsdp.fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    for method in ("hidden", "token_logprobs"):
        fsdp.register_fsdp_forward_method(model, method)


TINY = dict(  # what differs for a model that is born here, and why
    iterations=150,
    groups=64,  # many maps, few episodes of each
    group_size=8,
    update_episodes=64,
    normalize_std=False,  # the std blows up groups that are nearly all alike
    imagine=8,  # groups that always fail would teach nothing
    entropy_floor=0.5,  # keeps groups mixed
    replay=0.25,  # late in training, most new groups are all alike and teach nothing
    invalid_penalty=0.5,  # keeps the answers' form
    learning_rate=1.5e-3,
    final_rate=0.05,
    grad_clip=0.2,  # gradients grow tenfold when the model begins to look at the map
    temperature=1.0,
    max_new_tokens=1,
    warmup_steps=100,
    dtype="float32",
    device="cpu",
    recompute="nothing",  # a small model has memory enough
    threads=1,  # as fast as two where the machine is quiet, and faster beside other work
)

HARDER = {  # what differs further where a tiny model learns these lakes; results/tiny/maze.md
    "big": dict(
        iterations=300, learning_rate=2e-3, update_episodes=32, entropy_floor=1.0, imagine=0
    ),
    "maze": dict(iterations=1400, learning_rate=2e-3, layers=4),
    "slippery": dict(
        iterations=2200,
        groups=32,
        group_size=32,  # luck decides most episodes
        normalize_std=True,
        imagine=0,
        sampling="all",
        update_episodes=256,
        entropy_floor=1.2,
        final_rate=0.02,
        replay=0.0,
    ),
}


# Where text is cut into the tiny model's tokens: a line of prose with the newlines behind it, as
# attention to constants costs time; an action with its tags; two cells of a board, with the space
# before or the newline behind them; a word, a symbol, a space.
TINY_PIECES = r"[A-Z][a-z][^\n]*\n*|<action>\w+</action>| ?[A-Z_] [A-Z_]\n?|\w+|[^\s\w]|\s"


def tiny_start(s):
    """A new tiny model and its tokenizer, whose words are the game's.

    Two cells are one token, as few tokens take less time. So is an answer: of two tokens, the
    second is certain, and updates that are about the first can shift it until most are invalid.
    """
    pairs = [" ".join(cells) for cells in itertools.product("P_OG", repeat=2)]
    texts = [f"{pair} {pair} {pair}\n" for pair in pairs]  # where a row begins, goes on, ends
    answers = [f"<action>{word}</action>" for word in frozenlake.ACTIONS]
    texts += answers
    for name, scenario in SCENARIOS.items():
        desc = frozenlake.random_map(scenario.size, 1, generator())
        texts.append(s.lake(desc, scenario=name).instructions + "\n\n")  # as a prompt has them
    tokenizer = lm.tiny_tokenizer(texts, answers, TINY_PIECES)
    config = lm.Config(
        "llama",
        tokenizer.size,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=s.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=1e2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(s.seed)
    model = lm.Transformer(config)
    # A tied head wants embeddings small, but what a layer adds must not drown them, as with .02.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.2)
    return model, tokenizer


def warm_up(trainee, learner):
    """For want of pretraining: next-token prediction on states of training maps.

    It teaches to read and to speak, not to play: the answers are *uniformly random* moves.
    """
    s = learner.settings
    STATUS.doing("warming up")
    for i in range(s.warmup_steps):
        STATUS.detail(i, s.warmup_steps, "steps")
        rng = generator(s.seed, i)
        texts = []
        for _ in range(64):
            lake = s.lake(frozenlake.draw_map(SCENARIOS[s.scenario], rng))
            lake.state = int(rng.choice([j for j, tile in enumerate(lake.tiles) if tile in "SF"]))
            action = rng.choice(frozenlake.ACTIONS)
            answer = learner.tokenizer.encode(f"<action>{action}</action>")
            texts.append((*trainee.encode(lake.observation()), *answer))
        start = 1 + msgrpo.shared_length(texts)  # skips the first cell too: it is random
        logprobs, _ = trainee.score([msgrpo.Answer(ids[:start], ids[start:]) for ids in texts])
        (-logprobs.mean()).backward()
        ramp = (i + 1) / 10
        decay = 2 * (1 - i / s.warmup_steps)
        learner.update(3e-3 * min(1, ramp, decay))


def summarize(episodes, returns, success, replayed, tried):
    """The metrics of an iteration's episodes and updates; None where nothing is measured."""
    updates = [update for update in tried if np.isfinite(update["grad_norm"])]
    steps = [step for episode in episodes for step in episode]
    tokens = [update["tokens"] for update in updates]
    metrics = {
        "success": success[replayed:].mean() if replayed < len(success) else None,
        "return": returns.mean().item(),
        "steps": len(steps) / len(episodes),
        "valid": np.mean([step.valid for step in steps]),
        "truncated": np.mean([step.answer.truncated for step in steps]),
        "zero_variance_groups": (returns == returns[:, :1]).all(1).float().mean().item(),
        "groups_without_success": 1 - success.any(1).mean(),
        "replayed_groups": replayed,
        "generated_tokens": msgrpo.count_tokens(steps),
        "trained_tokens": sum(tokens),
        "trained_episodes": sum(update["trained"] for update in updates),
        "updates": len(updates),
        "refused_updates": len(tried) - len(updates),  # their gradient was not finite
    }
    for key in ("loss", "entropy", "clip_share", "logprob_gap", "grad_norm"):
        values = [update[key] for update in updates]
        metrics[key] = np.average(values, weights=tokens) if updates else None
    return metrics


def evaluation_maps(scenario, episodes):
    """(held-out maps, their weights, are they all there are?): at most so many episodes."""
    if scenario is SCENARIOS["noslip"]:  # few enough to list
        maps, weights = frozenlake.held_out_maps(scenario)
        if len(maps) <= episodes:
            return maps, weights, True
    rng = generator(0)
    maps = [frozenlake.draw_map(scenario, rng, held_out=True) for _ in range(episodes)]
    return maps, np.full(episodes, 1 / episodes), False


class Remembering:
    """Asks a policy about each state once, as its greedy answer is always the same.

    States return: on slippery ice, and where a player walks in circles.
    """

    def __init__(self, policy):
        self.policy = policy
        self.answers = {}

    def act(self, observations, uniforms):
        new = [state for state in dict.fromkeys(observations) if state not in self.answers]
        for i in range(0, len(new), 256):  # all at once would take more memory than training
            part = new[i : i + 256]
            self.answers.update(zip(part, self.policy.act(part, uniforms)))
        return [self.answers[state] for state in observations]


def mean_baselines(lakes, weights):
    """Success of those who do not learn: {player: probability}."""
    baselines = frozenlake.baselines(lakes)
    return {player: float(weights @ success) for player, success in baselines.items()}


def half_interval(mean, weights):
    """Half of Wilson's 95 % interval of a weighted mean of zeros and ones.

    The interval is not centred on the mean: near 0 and 1 it reaches further inwards.
    """
    a = 3.84 * float(weights @ weights)  # 1.96 ** 2 / n where all weights are 1 / n
    return (mean * (1 - mean) * a + a * a / 4) ** 0.5 / (1 + a)


SHORT = {"zero_variance_groups": "alike"}
LEGEND = "success on new maps, mean return, valid answers, entropy in nats, groups all alike"


def progress_line(m, iterations, ends):
    """An iteration's metrics in one line; ends: when the last iterations ended, in seconds."""
    left = round((ends[-1] - ends[0]) / (len(ends) - 1) * (iterations - m["iteration"]))
    line = f"{m['iteration']:4d}/{iterations}"
    for key in ("success", "return", "valid", "entropy", "zero_variance_groups"):
        value = "-" if m[key] is None else f"{m[key]:.3f}"
        line += f"  {SHORT.get(key, key)} {value}"
    speed = f"{m['tokens_per_second']:,.0f} tokens/s"
    remark = "" if m["updates"] else "  no update"
    return f"{line}  {speed}  {left // 60}:{left % 60:02} left{remark}"


SCORES = "success half_interval unweighted valid random reflex1 reflex2 reflex3 optimal".split()
HEADINGS = "success,+-,each map,valid,random,reflex1,reflex2,reflex3,optimal".split(",")


def score_line(name, cells):
    """A line of the scoreboard: what is learned beside players who do not learn."""
    return f"{name:12s}" + "".join(f"{cell:>9}" for cell in cells)


def write(path, content):
    """Put a text, or what torch.save takes, in a file's place: whole or not at all."""
    if RANK > 0:
        return
    with lm.replacing(path) as file:
        if isinstance(content, str):
            file.write(content.encode())
        else:
            torch.save(content, file)


def to_json(metrics):
    """Strict JSON: what is not finite becomes null."""
    finite = {key: x if x is None or np.isfinite(x) else None for key, x in metrics.items()}
    return json.dumps(finite, default=float)


def train(learner, out, state):
    """Train to the last iteration, from a run's state if there is one; evaluate, save, sum up."""
    s = learner.settings
    clock = time.perf_counter()
    desc = frozenlake.draw_map(SCENARIOS[s.scenario], generator())
    lake = s.lake(desc)
    player = learner.player(lake.instructions)
    trainee = learner.trainee(lake.instructions)
    if state is None:
        state = begin(learner, trainee, lake, out)
    history = state["history"]  # the lines of metrics.jsonl
    if history:
        clock -= json.loads(history[-1])["seconds"]
    ends = [time.perf_counter() - clock]  # of the last iterations, in seconds: for the time left
    say(LEGEND)
    gc.freeze()  # modules and the model stay: looking for garbage among them takes time
    with INTERRUPTS:
        try:
            for iteration in range(len(history) + 1, s.iterations + 1):
                STATUS.doing(f"iteration {iteration}")
                began = time.perf_counter()
                metrics = iterate(player, trainee, learner, iteration, state["replay_pool"])
                tokens = metrics["generated_tokens"] + metrics["trained_tokens"]
                metrics["tokens_per_second"] = tokens / (time.perf_counter() - began)
                if s.eval_every and iteration % s.eval_every == 0:
                    metrics["unseen_success"] = evaluate(learner, s.scenario)["success"]
                metrics["seconds"] = time.perf_counter() - clock
                metrics["iteration"] = iteration
                metrics["learning_rate"] = learning_rate(s, iteration)
                ends = [*ends[-10:], metrics["seconds"]]
                history.append(to_json(metrics) + "\n")
                write(out / "metrics.jsonl", "".join(history))
                say(progress_line(metrics, s.iterations, ends))
                check_learning(history)
                if iteration % s.checkpoint_every == 0 or iteration == s.iterations:
                    save_state(out, state, learner)
                stop_if(INTERRUPTS.asked)
        except Stopped:
            save_state(out, state, learner)
            raise KeyboardInterrupt(f"go on by --resume {shlex.quote(str(out))}") from None
    finish(learner, out, state, clock)


def check_learning(history):
    """Say so if nothing is learned at first; raises BadInput if gradients are not finite."""
    last = [json.loads(line) for line in history[-3:]]
    if len(last) < 3 or any(m["updates"] for m in last):
        return
    if all(m["refused_updates"] for m in last):
        raise lm.BadInput(
            f"no gradient was finite since iteration {last[0]['iteration']}, and none was used: "
            "start again with a lower --learning-rate, or from other weights"
        )
    if len(history) == 3:
        say("nothing was learned so far: " + advice(last[-1]))


def advice(m):
    """Why an iteration had no update, and which flags help."""
    if m["valid"] == 0:
        reason = "no answer named an action. See what it says by --play. "
        return reason + "Try more --max-new-tokens, --think, another --temperature"
    if m["refused_updates"]:
        return "a gradient was not finite, and was not used: give a lower --learning-rate"
    if m["zero_variance_groups"] < 1:
        return "no drawn episode had credit"
    reason = "all episodes of each group earned the same: there is nothing to compare. "
    return reason + "Try a larger --group-size, more --groups, a higher --temperature, --max-steps"


def begin(learner, trainee, lake, out):
    """Warm up, show what the model is and reads; returns the state before the first iteration."""
    if RANK == 0:
        lm.save_small_files(out / "model", learner.master, learner.tokenizer)
    warm_up(trainee, learner)
    parameters = sum(p.numel() for p in learner.master.parameters())
    prompt = trainee.encode(lake.observation())
    say(f"{parameters:,} parameters; {learner.tokenizer.describe_prompt()}. One, as it is read:\n")
    say(learner.tokenizer.decode(prompt) + "\n")
    say("before MS-GRPO, sampled, on held-out lakes:\n" + score_line("", HEADINGS))
    before = evaluate(learner, learner.settings.scenario, greedy=False)
    return {"before": before, "replay_pool": [], "history": []}


def save_state(out, state, learner):
    STATUS.doing("saving the state")
    write(out / "state.pt", state | learner.state())


def finish(learner, out, state, clock):
    """Save the model, evaluate it, sum up, and show a game."""
    STATUS.doing("saving the model")
    weights = learner.state()["weights"]
    if RANK == 0:
        lm.save_pretrained(out / "model", learner.master, learner.tokenizer, weights)
    scenarios = evaluate_all(learner)
    unseen = scenarios[learner.settings.scenario]
    summary = {
        "unseen_success": unseen["success"],
        "unseen_success_unweighted": unseen["unweighted"],
        "random_success": unseen["random"],
        "optimal_success": unseen["optimal"],
        "scenarios": scenarios,
        "before": state["before"],
        "seed": learner.settings.seed,
        "seconds": time.perf_counter() - clock,
    }
    write(out / "summary.json", json.dumps(summary))
    play_one(learner)
    lines = [json.loads(line) for line in state["history"]]
    if not any(m["updates"] for m in lines):
        say("nothing was learned, the model is as it was: " + advice(lines[-1]))
    elif unseen["success"] <= unseen["random"]:
        say(
            "it wins no more often than random moves would. If it once won more, --learning-rate "
            "was too high; if never, try --entropy-floor, so that its answers stay varied"
        )
    say(f"{summary['seconds']:.0f} s. The model is in {out}/model, figures in {out}/summary.json.")
    command = f"    python {sys.argv[0]}"
    folder = shlex.quote(str(out))
    say(f"Next:\n{command} --play {folder} --seed 3\n{command} --eval {folder}")
    say(f"{command} --resume {folder} --iterations {2 * learner.settings.iterations}")


def evaluate_all(learner):
    """Evaluate every scenario, greedily: {scenario: figures}."""
    say(score_line("held out", HEADINGS))
    return {name: evaluate(learner, name) for name in SCENARIOS}


def play_one(learner):
    """Show one greedy episode on a held-out map, chosen by the seed, move by move."""
    s = learner.settings
    rng = generator(s.seed)
    lake = s.lake(frozenlake.draw_map(SCENARIOS[s.scenario], rng, held_out=True), s.seed, 0)
    player = learner.player(lake.instructions)
    boards = [lake.observation()]

    def after_round(done, total):
        boards.append(lake.observation())

    episode = msgrpo.play(player, [lake], True, after_round)[0]
    say(f"\n{lake.instructions}\n")
    for t, step in enumerate(episode):
        remark = "" if step.valid else "  (invalid: no move)"
        say(f"{t + 1}. {step.answer.text}{remark}")
    say(f"\n{side_by_side(boards)}")
    outcome = "reached" if lake.success else "missed"
    say(f"{outcome} the goal in {lake.steps} steps\n")


COLOURS = {"P": 33, "O": 34, "G": 32}  # yellow, blue, green


def side_by_side(boards):
    """Boards as a strip of pictures, each with its number below, in lines of 100 columns."""
    width = boards[0].index("\n")
    a_line = 100 // (width + 4)
    lines = []
    for first in range(0, len(boards), a_line):
        part = boards[first : first + a_line]
        lines += [paint("    ".join(cells)) for cells in zip(*map(str.splitlines, part))]
        lines += ["    ".join(f"{first + i:<{width}}" for i in range(len(part))), ""]
    return "\n".join(lines)


def paint(text):
    """The game's symbols in colours, on a terminal where NO_COLOR is not set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    for symbol, colour in COLOURS.items():
        text = text.replace(symbol, f"\x1b[1;{colour}m{symbol}\x1b[0m")
    return text


SECTIONS = {  # of --help, each with its first setting
    "seed": "the run",
    "groups": "the method",
    "scenario": "play and evaluation",
    "dtype": "this machine",
}

MODES = {
    "checkpoint": "start a run from a pretrained model or another run",
    "resume": "go on with a run",
    "eval": "evaluate a run or a model",
    "play": "watch a run or a model play a map that --seed chooses",
}
NUMERICS = {"device", "dtype", "threads", "micro_batch_tokens", "recompute"}
VIEW = {"think", "max_new_tokens", "dtype", "device", "threads"}
TAKES = {  # settings that a mode takes; all others go with --tiny and --checkpoint alone
    "resume": NUMERICS | {"iterations", "eval_every", "eval_episodes", "checkpoint_every"},
    "eval": VIEW | {"eval_episodes"},
    "play": VIEW | {"seed", "scenario", "max_steps"},
}


EPILOG = """[paper]: from the paper's abstract. [author]: from its first author's later trainer.
Defaults of tiny are for --tiny; those of big, maze and slippery for --tiny --scenario NAME.

metrics.jsonl has a line per iteration:

    iteration, seconds           its number; since the run began, over all resumptions
    success                      share of episodes on new maps that reached the goal
    return, steps                of an episode, on average, replayed maps included
    valid, truncated             shares of answers that named a move; that hit the limit of tokens
    zero_variance_groups         share of groups whose episodes all earned the same
    groups_without_success       share of groups none of whose episodes reached the goal
    replayed_groups              groups on maps that were failed before
    generated_tokens             tokens sampled
    nonzero_episodes             episodes with an advantage that is not 0
    drawn_episodes               episodes drawn to train on
    trained_episodes, trained_tokens     in updates: episodes with credit; all tokens
    updates, refused_updates     optimiser steps; those refused, as the gradient was not finite
    loss, entropy, clip_share    per token, means over the updates; clip_share: where it was clipped
    logprob_gap, grad_norm       mean |log ratio|; the gradient's norm before it was shortened
    rollout_gap                  mean |log-probability when sampled - when scored|, in bfloat16
    learning_rate                of the iteration
    tokens_per_second            sampled and trained tokens
    unseen_success               with --eval-every: success on held-out maps of the scenario
"""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """In one line, as all other errors, with the flag that may have been meant."""
        flags = {flag: "".join(re.findall(r"-(\w)", flag)) for flag in self._option_string_actions}
        for word in re.findall(r"--[\w-]+", message):
            meant = [flag for flag, initials in flags.items() if initials == word[2:]]
            meant += difflib.get_close_matches(word, flags, 1)
            if word not in flags and meant:
                message += f": did you mean {meant[0]}?"
        raise lm.BadInput(message)


def make_parser():
    parser = Parser(
        usage="train.py (--tiny | --checkpoint DIR | --resume DIR | --eval DIR | --play DIR) [...]",
        description=__doc__,
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--tiny", action="store_const", const="", help="train a tiny model from nothing"
    )
    for mode, text in MODES.items():
        modes.add_argument(f"--{mode}", metavar="DIR", help=text)
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the run (default: a new one under runs/)"
    )
    defaults = Settings()
    for f in fields(Settings)[1:]:  # the first, checkpoint, is a mode
        if f.name in SECTIONS:  # the first of a section
            group = parser.add_argument_group(SECTIONS[f.name])
        text = f"{f.metadata['help']} (default {getattr(defaults, f.name)}"
        for name, values in {"tiny": TINY, **HARDER}.items():
            if f.name in values:
                text += f", {name} {values[f.name]}"
        text += ")"
        flag = f"--{f.name.replace('_', '-')}"
        if f.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif f.type is str:
            group.add_argument(flag, choices=f.metadata["choices"], help=text)
        else:
            group.add_argument(flag, type=f.type, metavar="X", help=text)
    return parser


def checked(settings):
    """These settings. Refuses a value that is out of its range or none of its choices."""
    for f in fields(Settings):
        value = getattr(settings, f.name)
        flag = f"--{f.name.replace('_', '-')}"
        choices = f.metadata["choices"]
        if choices:
            lm.ensure(value in choices, f"{flag} is {value!r}, not one of {', '.join(choices)}")
        kinds = (int, float) if f.type is float else (f.type,)  # to isinstance, True is an int
        lm.ensure(type(value) in kinds, f"{flag} is {value!r}, which is no {f.type.__name__}")
        if f.type in (int, float):
            low, high = f.metadata["range"]
            lm.ensure(value >= low, f"{flag} is {value}, not at least {low}")
            lm.ensure(value <= high, f"{flag} is {value}, not at most {high:g}")
    return settings


def run(argv, agent_class, assign_credit):
    """One command.

    Raises BadInput or OSError, with a line that says why, on bad use or input.
    """
    given = vars(make_parser().parse_args(argv))
    mode = next((mode for mode in ("tiny", *MODES) if mode in given), None)
    lm.ensure(mode, "give --tiny, or a folder by --checkpoint, --resume, --eval or --play")
    folder = Path(given.pop(mode))
    for name in given:
        allowed = mode not in TAKES or name in TAKES[mode]
        lm.ensure(allowed, f"--{mode} takes no --{name.replace('_', '-')}")
    out = given.pop("out", None)
    settings = read_settings(mode, folder, given)
    check_device(settings.device)
    join_processes(settings.device)
    STATUS.doing("loading the model")
    model, tokenizer, state = load_model(mode, folder, settings)
    # The learner is made before the folder: what cannot start leaves none behind
    learner = Learner(settings, model, tokenizer, agent_class, assign_credit)
    if mode == "eval":
        evaluate_all(learner)
    elif mode == "play":
        play_one(learner)
    elif mode == "resume":
        resume(learner, folder, state, given)
    else:
        train(learner, make_folder(out, settings), None)


def read_settings(mode, folder, given):
    """The settings of a command: a run's own or the defaults, and what is given in their place."""
    path = folder / "settings.json"
    settings = checked(Settings(**given))
    if mode == "tiny":
        lm.ensure(
            not settings.think, "--think is for --checkpoint: the tiny model has no words for it"
        )
        return Settings(**TINY | HARDER.get(settings.scenario, {}) | given)
    if mode == "checkpoint":
        lm.ensure("layers" not in given, "--layers goes with --tiny: a checkpoint has its own")
        settings.checkpoint = str(folder.resolve())
        return settings
    if path.exists():
        with lm.blaming(path):
            own = lm.parse_json(path.read_bytes())
            moves = "device" in given and given["device"] != own.get("device")
            if moves and own.get("dtype") == "bfloat16":
                own["dtype"] = ""  # it may be slow there; float32 is right everywhere
            return checked(Settings(**own | given))
    lm.ensure(mode != "resume", f"{folder} is no run: there is no settings.json in it")
    return settings


def load_model(mode, folder, settings):
    """(model, tokenizer, and to resume the rest of the run's state.pt, else None)."""
    if mode == "resume" and not (folder / "state.pt").exists():
        ended = (folder / "model/model.safetensors").exists()
        lm.ensure(not ended, f"{folder} lost its state.pt: begin a run by --checkpoint {folder}")
        say("no state of this run was saved: it begins again")
        folder = Path(settings.checkpoint)
        mode = "checkpoint" if settings.checkpoint else "tiny"
    if mode == "tiny":
        return *tiny_start(settings), None
    is_run = (folder / "settings.json").exists()
    state = {}
    if is_run and (folder / "state.pt").exists():
        with lm.blaming(folder / "state.pt"):
            state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
            parts = {"weights", "moments", "before", "replay_pool", "history"}
            lm.ensure(state.keys() == parts, "it was written by another version of train.py")
    weights = state.pop("weights", None)
    model_folder = folder / "model" if is_run else folder
    has_model = not is_run or weights or (model_folder / "model.safetensors").exists()
    lm.ensure(has_model, f"{folder} was stopped before its first state: --resume it")
    model, tokenizer = lm.load_pretrained(model_folder, weights=weights)
    lm.ensure(tokenizer, f"{folder} has no tokenizer.json: there is no text without one")
    return model, tokenizer, state if mode == "resume" else None


def resume(learner, out, state, given):
    """Go on with a run, and keep the settings that were given."""
    if state is not None:
        made = len(state["history"])
        lm.ensure(made <= learner.settings.iterations, f"{out} has made {made} iterations already")
        with lm.blaming(out / "state.pt"):
            learner.load_moments(state.pop("moments"))
    if given:
        write(out / "settings.json", settings_text(learner.settings))
    if given.keys() & NUMERICS:
        say("sums may differ in the last bits from here on: the run is not repeated bit for bit")
    train(learner, out, state)


def settings_text(settings):
    return json.dumps(asdict(settings), indent=2) + "\n"


def make_folder(out, settings):
    """The folder of a new run, with its settings.json."""
    if out is None:
        number = 1
        while Path(f"runs/{number:04d}").exists():
            number += 1
        out = f"runs/{number:04d}"
    out = Path(out)
    taken = out.is_dir() and any(out.iterdir())
    lm.ensure(not taken, f"{out} is not empty: --resume it, or give another --out")
    out = gather([out])[0]
    out.mkdir(parents=True, exist_ok=True)
    write(out / "settings.json", settings_text(settings))
    folder = shlex.quote(str(out))
    say(f"this run is {out}; if it is stopped: python {sys.argv[0]} --resume {folder}")
    return out


def check_device(device):
    """Refuses a device that is not there or not supported."""
    kind = device.split(":")[0]
    lm.ensure(kind in ("cpu", "cuda"), f"--device {device}: cpu, cuda and cuda:N are supported")
    one_each = WORLD == 1 or ":" not in device
    lm.ensure(one_each, f"--device {device}: of several processes each has a GPU of its own")
    has_device = kind == "cpu" or torch.cuda.is_available()
    lm.ensure(has_device, f"--device {device}: there is no CUDA GPU here, give --device cpu")


def join_processes(device):
    """What torchrun asks for, where there are several processes."""
    both = ("RANK" in os.environ) == ("WORLD_SIZE" in os.environ)
    lm.ensure(both, "of RANK and WORLD_SIZE, which torchrun sets, only one is in the environment")
    if WORLD == 1:
        return
    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl"
    # The default is half an hour; one process may write a large state while the others wait
    timeout = 4 * torch.distributed.constants.default_pg_timeout
    torch.distributed.init_process_group(backend, timeout=timeout)


def main(argv=None, agent_class=lm.LanguageAgent, assign_credit=msgrpo.assign_credit):
    """The command line: 0 for success, 2 for bad use or input, 130 where it was interrupted.

    For forks: agent_class is made and used as lm.LanguageAgent is, `encode` included. assign_credit
    is called with advantages (groups, G); of several processes, each calls it on all episodes.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    if RANK > 0 or sys.stdout is None:  # the first process alone speaks, if it can
        sys.stdout = open(os.devnull, "w")
    try:
        with STATUS:
            run(argv, agent_class, assign_credit)
        return 0
    except KeyboardInterrupt as error:
        return complain(": ".join(["interrupted", *error.args]), 130)
    except (lm.BadInput, OSError) as error:
        return complain(error, 2)
    except (RuntimeError, MemoryError) as error:
        if not lm.out_of_memory(error):
            raise
        flags = "give --recompute layers, or less --micro-batch-tokens, --groups, --eval-episodes"
        return complain(f"out of memory: {flags}; see results/memory.py", 2)
    finally:
        gc.unfreeze()


def complain(reason, status):
    clear = "\r\x1b[K" if STATUS.is_terminal else ""
    print(f"{clear}train.py: {reason}", file=sys.stderr)
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
