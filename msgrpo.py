"""MS-GRPO: multi-step group-relative policy optimisation of a language model that acts in a text game.

Dilkes, Yazdanpanah, Stein: Reinforced Language Models for Sequential Decision Making, arXiv 2508.10839
(2025). We could read its abstract, introduction and one caption. What those state is marked [paper]; every
formula below is our reading.

    TSMG [paper: the environment behind an explicit text interface]. A stochastic game (S, A, T, r, H), a map
         phi: S -> text and a map psi: text -> A or invalid. Here: `Game`.
    LAP  [paper: the policy as a language model behind it]. The model speaks tokens, the game hears actions:
             pi(a|s) = sum over texts y with psi(y) = a of p_theta(y | instructions, phi(s)).
         Only the current state is in the context, no history [paper]. Here: `Policy`.

One iteration:
    1. Play groups of G episodes from the same start: same map, independent slips, independent samples.
    2. Return of an episode: R_i = sum_t r_{i,t}, undiscounted.
    3. Advantage in the group [paper]: A_i = (R_i - mean_j R_j) / (std_j R_j + 1e-6), over G *episodes*.
    4. Every token of every step of episode i gets A_i [paper: the entire episode reward to each step].
       `gamma` < 1 is our ablation, credit that fades with the distance from the end: gamma^(T_i - 1 - t) A_i.
    5. AAW: train on K of N episodes, drawn with P(i) = |A_i| / sum_j |A_j| [paper: more weight on large
       absolute advantages; this form, without replacement, is ours].
    6. Ascend sum of min(rho A, clip(rho, 1 - eps, 1 + eps) A) / tokens, rho = p_theta / p_old per token.

Left out of GRPO: the KL term (no reference model is held), a mean per sequence before the mean over sequences
(it would weight tokens of short answers more), and a second normalisation after the draw. What is true of
step 4: without std, clip and AAW it is an unbiased policy gradient, since E[grad log pi(a_t|s_t) * (reward
earned before t)] = 0, and usually one of more variance than reward to go; with a reward at the end only and
gamma = 1, both are the same number. The std rescales groups, and AAW follows sum_i |A_i| A_i grad log pi
instead: a deliberate bias.
"""
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch


class Game(Protocol):
    """One episode of a text-mediated stochastic game (TSMG)."""
    instructions: str  # the same in every episode that is played together
    max_steps: int
    success: bool  # was the goal reached?
    rng: np.random.Generator  # of everything random in this episode, the policy's samples included

    def observation(self) -> str:
        """phi: the current state as text."""

    def step(self, text: str) -> tuple[float, bool, bool]:
        """Play an answer: (reward, done, valid)."""


@dataclass
class Step:
    """One answer: what was seen and said, in the very tokens that were sampled."""
    prompt: tuple[int, ...]  # behind the instructions
    response: tuple[int, ...]  # the end token included, where there is one
    logprobs: list[float] = ()  # of the response when it was sampled
    text: str = ""
    truncated: bool = False  # the limit came before an end token
    reward: float = 0.0
    valid: bool = False


class Policy(Protocol):
    """A language-agent policy (LAP): a language model, with its instructions before every prompt."""
    max_new_tokens: int

    def act(self, observations: list[str], uniforms: np.ndarray | None) -> list[Step]:
        """Answer each observation; uniforms (observations, max_new_tokens) decide the samples, None is
        greedy."""

    def score(self, steps: list[Step]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities, with gradient, and entropies of all response tokens in order, each (tokens,)."""


@dataclass
class Episode:
    steps: list[Step] = field(default_factory=list)
    success: bool = False
    done: bool = False

    @property
    def total_reward(self):
        """The episode's return R."""
        return sum(step.reward for step in self.steps)


def play(policy, games, greedy=False):
    """Play the games to their ends in lockstep, one batch of answers a step; ended ones leave. Returns their
    episodes.

    An episode's samples come from its game's own generator, so they do not depend on what else is in the
    batch.
    """
    episodes = [Episode() for _ in games]
    live = list(zip(games, episodes))
    while live:
        uniforms = None if greedy else np.stack([game.rng.random(policy.max_new_tokens) for game, _ in live])
        steps = policy.act([game.observation() for game, _ in live], uniforms)
        for step, (game, episode) in zip(steps, live):
            step.reward, episode.done, step.valid = game.step(step.text)
            episode.steps.append(step)
            episode.success = game.success
        live = [(game, episode) for game, episode in live if not episode.done]
    return episodes


def episode_advantages(returns, normalize_std=True):
    """A_i = (R_i - mean R) / (std R + 1e-6) over each group: returns (groups, G) -> (groups, G), float.

    Population std. A group whose returns are all equal has exactly 0, whatever floating point makes of its
    mean.
    """
    returns = torch.as_tensor(returns, dtype=torch.float32)
    advantages = returns - returns.mean(1, keepdim=True)
    if normalize_std:
        advantages = advantages / (returns.std(1, correction=0, keepdim=True) + 1e-6)
    return advantages.masked_fill((returns == returns[:, :1]).all(1, keepdim=True), 0.0)


def step_credit(advantage, steps, gamma=1.0):
    """gamma^(T - 1 - t) * A for t = 0 .. T - 1: a list. gamma = 1 is MS-GRPO, gamma = 0 pays the last step
    alone."""
    return [advantage * gamma ** (steps - 1 - t) for t in range(steps)]


def aaw_probabilities(advantages):
    """P(i) = |A_i| / sum_j |A_j|: (N,) -> (N,). ValueError if every advantage is zero."""
    weights = torch.as_tensor(advantages, dtype=torch.float64).abs()
    if not weights.any():
        raise ValueError("every advantage is zero: there is no episode to draw")
    return weights / weights.sum()


def draw_episodes(advantages, sampling, count, rng):
    """Indices, ascending, of the episodes to train on: advantages (N,); rng a numpy Generator.

    "aaw" draws up to count without replacement by `aaw_probabilities`, "uniform" count of N, "all" takes the
    N.
    """
    n = len(advantages)
    if sampling == "all":
        return list(range(n))
    if sampling == "uniform":
        return sorted(rng.choice(n, min(count, n), replace=False).tolist())
    drawable = int((advantages != 0).sum())
    if not drawable:
        return []
    probabilities = aaw_probabilities(advantages).numpy()
    return sorted(rng.choice(n, min(count, drawable), replace=False, p=probabilities).tolist())


def clipped_objective(logprobs, old_logprobs, advantages, clip):
    """min(rho A, clip(rho, 1 - eps, 1 + eps) A) per token, and where the clip is active: each (tokens,)."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    return torch.minimum(ratio * advantages, clipped), clipped < ratio * advantages


def micro_batches(steps, budget):
    """Lists of indices of steps, by length and prompt, each of about `budget` tokens at most."""
    size, batches = 0, [[]]
    kinds = [(len(step.response), len(step.prompt), step.prompt) for step in steps]
    for i in sorted(range(len(steps)), key=kinds.__getitem__):
        tokens = len(steps[i].prompt) + len(steps[i].response)
        if size + tokens > budget and batches[-1]:
            size, batches = 0, [*batches, []]
        batches[-1].append(i)
        size += tokens
    return batches if steps else []


@torch.no_grad()
def rescore(policy, episodes, budget=16384):
    """Replace the sampled log-probabilities by those of `policy.score`; returns the mean absolute difference.

    For rollouts whose numerics are not those of training: a ratio must be 1 before the first update.
    """
    steps = [step for episode in episodes for step in episode.steps]
    gap = 0.0
    for batch in micro_batches(steps, budget):
        scored = iter(policy.score([steps[i] for i in batch])[0].tolist())
        for i in batch:
            sampled, steps[i].logprobs = steps[i].logprobs, [next(scored) for _ in steps[i].response]
            gap += sum(abs(a - b) for a, b in zip(sampled, steps[i].logprobs))
    return gap / max(1, sum(len(step.response) for step in steps))


def accumulate_gradient(policy, episodes, advantages, *, clip=.2, gamma=1.0, entropy_coef=0.0, budget=16384):
    """Add the gradient of one update's loss to the parameters' .grad; returns means over its tokens as a
    dict.

    The denominator is the number of response tokens of all these episodes, whatever their advantage, so the
    split into micro-batches changes nothing; steps without credit cost no forward pass unless the entropy
    term needs them.
    """
    steps, credits = [], []
    for episode, advantage in zip(episodes, advantages):
        steps += episode.steps
        credits += step_credit(float(advantage), len(episode.steps), gamma)
    tokens = sum(len(step.response) for step in steps)
    kept = [i for i, credit in enumerate(credits) if credit or entropy_coef]
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in micro_batches([steps[i] for i in kept], budget):
        batch = [kept[i] for i in batch]
        logprobs, entropies = policy.score([steps[i] for i in batch])
        old, credit = (torch.tensor(x, dtype=torch.float32, device=logprobs.device) for x in (
            [logprob for i in batch for logprob in steps[i].logprobs],
            [credits[i] for i in batch for _ in steps[i].response]))
        objective, clipped = clipped_objective(logprobs, old, credit, clip)
        loss = -(objective + entropy_coef * entropies).sum() / tokens
        loss.backward()
        with torch.no_grad():
            gap = (logprobs - old).abs().sum()
            sums += torch.stack([loss * tokens, entropies.sum(), clipped.sum(), gap]).cpu()
    scored = max(1, sum(len(steps[i].response) for i in kept))
    loss, entropy, clipped, gap = sums.tolist()
    return {"loss": loss / max(tokens, 1), "entropy": entropy / scored, "clip_share": clipped / scored,
            "logprob_gap": gap / scored, "tokens": tokens}
