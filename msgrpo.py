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
    6. Ascend sum of min(rho A, clip(rho, 1 - eps, 1 + eps) A) / tokens, rho = p_theta / p_old per token. An
       entropy bonus counts only where |log rho| <= log(1 + eps): ours, since a bonus without bound can wreck
       the answers' form within one iteration.

Not here: GRPO's KL term (no reference model is held) and its mean per sequence before the mean over sequences
(it would weight tokens of short answers more); nor a second normalisation after the draw. What is true of
step 4: without std, clip and AAW, and but for a factor (G - 1) / G and the random number of tokens, it is an
unbiased policy gradient, since E[grad log pi(a_t|s_t) * (reward earned before t)] = 0, usually of more
variance than reward to go; with a reward at the end only and gamma = 1, both are the same number. The std
rescales groups; AAW, where more than K have A != 0, leans to sum_i |A_i| A_i grad log pi: deliberate bias.
"""
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


class Game(Protocol):
    """One episode of a text-mediated stochastic game (TSMG). It also has `success`, whether the goal has been
    reached, and `rng`, a numpy Generator of everything random in it, the policy's samples included."""

    def observation(self) -> str:
        """phi: the current state as text."""

    def step(self, text: str) -> tuple[float, bool, bool]:
        """Play an answer: (reward, done, valid)."""


class Policy(Protocol):
    """A language-agent policy (LAP): a language model, with the game's instructions before every prompt, that
    says at most `max_new_tokens` at a time."""

    def act(self, observations: list[str], uniforms: np.ndarray | None) -> list[tuple]:
        """Answer each observation: the first five fields of its Step. uniforms (observations, max_new_tokens)
        in [0, 1) decide the samples; None: greedy."""

    def score(self, steps: list["Step"]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities, with gradient, and entropies of all response tokens in order, each (tokens,)."""


@dataclass
class Step:
    """An answer, in the very tokens that were sampled, and what came of it. An episode is a list of steps."""
    prompt: tuple[int, ...]  # behind the instructions
    response: tuple[int, ...]  # the end token included, where there is one
    logprobs: list[float] = ()  # of the response when it was sampled
    text: str = ""
    truncated: bool = False  # the limit came before an end token
    reward: float = 0.0
    done: bool = False
    valid: bool = False
    success: bool = False
    credit: float = 0.0  # what each token of the response is paid


def play(policy, games, greedy=False):
    """[steps of each game], played to their ends in lockstep, one batch of answers a step; ended ones leave.
    An episode's samples come from its game's own generator, so they do not depend on what else is played."""
    episodes = [[] for _ in games]
    live = list(zip(games, episodes))
    while live:
        uniforms = None if greedy else np.stack([game.rng.random(policy.max_new_tokens) for game, _ in live])
        answers = policy.act([game.observation() for game, _ in live], uniforms)
        for (game, episode), answer in zip(live, answers):
            episode.append(Step(*answer, *game.step(answer[3]), game.success))
        live = [(game, episode) for game, episode in live if not episode[-1].done]
    return episodes


def episode_advantages(returns, normalize_std=True):
    """A_i = (R_i - mean R) / (std R + 1e-6) over each group, population std: returns (groups, G) -> (groups,
    G). A group whose returns are all equal has exactly 0, whatever floating point makes of its mean."""
    returns = torch.as_tensor(returns, dtype=torch.float32)
    advantages = returns - returns.mean(1, keepdim=True)
    if normalize_std:
        advantages = advantages / (returns.std(1, correction=0, keepdim=True) + 1e-6)
    return advantages.masked_fill((returns == returns[:, :1]).all(1, keepdim=True), 0.0)


def assign_credit(episodes, advantages, gamma=1.0):
    """Pay step t of episode i gamma^(T_i - 1 - t) A_i: gamma = 1 is MS-GRPO, 0 pays the last step alone."""
    for episode, advantage in zip(episodes, advantages.tolist()):
        for distance, step in enumerate(reversed(episode)):
            step.credit = advantage * gamma ** distance


def aaw_probabilities(advantages):
    """P(i) = |A_i| / sum_j |A_j|: (N,) -> (N,). ValueError if every advantage is zero."""
    weights = torch.as_tensor(advantages, dtype=torch.float64).abs()
    if not weights.any():
        raise ValueError("every advantage is zero: there is no episode to draw")
    return weights / weights.sum()


def draw_episodes(advantages, sampling, count, rng):
    """Indices, ascending, of the episodes to train on: advantages (N,); rng a numpy Generator. "aaw" draws
    count by `aaw_probabilities`, or as many as there are with A != 0; "uniform" count of N whatever their A;
    "all" N."""
    most = int((advantages != 0).sum()) if sampling == "aaw" else len(advantages)
    count = most if sampling == "all" else min(count, most)
    p = aaw_probabilities(advantages).numpy() if sampling == "aaw" and count else None
    return sorted(rng.choice(len(advantages), count, replace=False, p=p).tolist())


def clipped_objective(logprobs, old_logprobs, advantages, clip):
    """min(rho A, clip(rho, 1 - eps, 1 + eps) A) per token, and where the clip is active: each (tokens,)."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    return torch.minimum(ratio * advantages, clipped), clipped < ratio * advantages


def micro_batches(steps, budget):
    """The steps in lists of about `budget` tokens, sorted by length and prompt. Equal answers to a prompt
    stay together and count once, as `Policy.score` may run them once."""
    size, last, batches = 0, None, {}
    for step in sorted(steps, key=lambda s: (len(s.response), len(s.prompt), s.prompt, s.response)):
        pair = step.prompt, step.response
        size, last = size + (pair != last) * sum(map(len, pair)), pair
        batches.setdefault(size // budget, []).append(step)
    return list(batches.values())


@torch.no_grad()
def rescore(policy, episodes, budget=16384):
    """Replace the sampled log-probabilities by those of `policy.score`; returns the mean absolute difference.
    For rollouts whose numerics are not those of training: a ratio must be 1 before the first update."""
    gaps = []
    for batch in micro_batches([step for episode in episodes for step in episode], budget):
        scored = iter(policy.score(batch)[0].tolist())
        for step in batch:
            sampled, step.logprobs = step.logprobs, [next(scored) for _ in step.response]
            gaps += [abs(a - b) for a, b in zip(sampled, step.logprobs)]
    return sum(gaps) / max(1, len(gaps))


def accumulate_gradient(policy, episodes, *, clip=.2, entropy_coef=0.0, budget=16384, share=list, world=1):
    """Add the gradient of one update's loss to the parameters' .grad; returns a dict: the loss, and
    means over the scored tokens. The denominator is the number of response tokens of all
    these episodes, so the split into micro-batches changes nothing; steps without credit cost no forward pass
    unless the entropy term needs them.
    share: this process's part of a list, of `world` processes. All make the same number of passes, with a
    step of no weight where there is none left; gradients are to be averaged, means (not tokens) added."""
    steps = [step for episode in episodes for step in episode]
    scored = [step for step in steps if step.credit or entropy_coef]
    tokens, n = (sum(len(step.response) for step in x) for x in (steps, scored))
    means = torch.zeros(4, dtype=torch.float64)
    for batch in micro_batches(scored, budget * world):
        pairs = {*share([*dict.fromkeys((step.prompt, step.response) for step in batch)])}
        mine = [step for step in batch if (step.prompt, step.response) in pairs]
        weight, batch = float(len(mine) > 0), mine or batch[:1]
        logprobs, entropy = policy.score(batch)
        old = torch.tensor([x for step in batch for x in step.logprobs], device=logprobs.device)
        credit = torch.tensor([step.credit for step in batch for _ in step.response], device=logprobs.device)
        objective, clipped = clipped_objective(logprobs, old, credit, clip)
        gap = (logprobs.detach() - old).abs()
        loss = -(objective + entropy_coef * (gap.expm1() <= clip) * entropy).sum() / tokens
        (loss * weight * world).backward()
        means += weight * torch.stack([loss, *(x.sum() / n for x in (entropy, clipped, gap))]).detach().cpu()
    return dict(zip(("loss", "entropy", "clip_share", "logprob_gap"), means.tolist())) | {"tokens": tokens}
