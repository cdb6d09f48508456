"""MS-GRPO: multi-step group-relative policy optimisation of a model that acts in a text game.

Dilkes, Yazdanpanah, Stein: Reinforced Language Models for Sequential Decision Making, arXiv
2508.10839 (2025). We could read its abstract, introduction and one caption. What those state is
marked [paper]; every formula below is our reading.

    TSMG  [paper] A text-mediated stochastic game (S, A, T, r, H): the environment behind
          an explicit text interface, a map phi: S -> text and a map psi: text -> A or invalid.
          Here: `Game`.
    LAP   [paper] A language-agent policy: the model speaks tokens, the game hears actions,
              pi(a|s) = sum over texts y with psi(y) = a of p_theta(y | instructions, phi(s)).
          Training never needs this sum: it uses the probabilities of the sampled tokens. Only
          the current state is in the context, no history [paper]. Here: `Policy`.

One iteration:
    1. Play groups of G episodes from the same start: same map, independent slips and samples.
    2. Return of an episode: R_i = sum_t r_{i,t}, undiscounted.
    3. Advantage in its group [paper]: A_i = (R_i - mean_j R_j) / (std_j R_j + 1e-6). The mean and
       the population std are over the G episodes, never over steps.
    4. Credit: every token of every step of episode i gets A_i [paper]. `gamma` < 1 is our ablation,
       credit that fades with the distance from the end: gamma^(T_i - 1 - t) A_i. It discounts no
       reward.
    5. AAW, absolute-advantage-weighted sampling: train on K of the N episodes, drawn one after
       another, each with probability |A_i| / sum_j |A_j| among those left. [paper: more weight on
       large absolute advantages; this form, without replacement, is ours.]
    6. Ascend the clipped objective, over the response tokens of the drawn episodes:
       sum of min(rho A, clip(rho, 1 - eps, 1 + eps) A) / tokens, with rho = p_theta / p_old.

What is left out of GRPO: the KL term (no reference model is held), and the mean per sequence before
the mean over sequences (it would weight tokens of short answers more). There is no second
normalisation after the draw. An entropy bonus may be added to the objective.

Why whole-episode credit is allowed: an action cannot change what was earned before it, so earlier
rewards add noise to the gradient, but no bias: E[grad log pi(a_t|s_t) * (reward before t)] = 0. At
the first update of an iteration, and without std, AAW and bonus, this is an unbiased policy
gradient, up to a factor (G - 1) / G and the random number of tokens. It usually has more variance
than reward to go. If the only reward comes at the end and gamma is 1, the two are identical. Two
biases are deliberate: the std rescales each group, and AAW weights an episode by about |A_i| A_i
where more than K episodes have A != 0.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


class Game(Protocol):
    """One episode of a text-mediated stochastic game."""

    rng: np.random.Generator  # of everything random in the episode, the policy's samples included
    success: bool  # has the goal been reached?

    def observation(self) -> str:
        """phi: the current state as text."""

    def step(self, text: str) -> tuple[float, bool, bool]:
        """Play an answer: (reward, done, valid)."""


@dataclass
class Answer:
    """What a policy said to one observation, in the very tokens that were sampled."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]  # with the end token, where there is one
    logprobs: list[float] | tuple = ()  # of each response token when it was sampled
    text: str = ""  # of the response
    truncated: bool = False  # the limit of tokens came before an end token


class Policy(Protocol):
    """A language model that reads the game's instructions before every observation."""

    max_new_tokens: int  # of an answer

    def act(self, observations: list[str], uniforms: np.ndarray | None) -> list[Answer]:
        """Answer each observation.

        uniforms (observations, max_new_tokens) in [0, 1) decide the samples; None: greedy.
        """

    def score(self, answers: list[Answer]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of all response tokens in order, with gradient.

        Each is (tokens,). At the temperature of `act`, so that a ratio of 1 means the same policy.
        """


@dataclass
class Step:
    """An answer and what came of it. An episode is a list of steps."""

    answer: Answer
    reward: float = 0.0
    done: bool = False
    valid: bool = False  # the answer named an action
    success: bool = False
    credit: float = 0.0  # what each token of the response is paid


def play(policy, games, greedy=False, after_round=None):
    """Play games to their ends in lockstep; returns the episode of each.

    Each round answers all live games as one batch; a game that is done leaves it. The samples of an
    episode come from its game's own generator: they do not depend on what else is played.
    after_round(done, total): called with the numbers of games; for a progress line, or to stop.
    """
    episodes = [[] for _ in games]
    live = list(range(len(games)))
    while live:
        observations = [games[i].observation() for i in live]
        uniforms = None
        if not greedy:
            uniforms = np.stack([games[i].rng.random(policy.max_new_tokens) for i in live])
        answers = policy.act(observations, uniforms)
        for i, answer in zip(live, answers):
            reward, done, valid = games[i].step(answer.text)
            episodes[i].append(Step(answer, reward, done, valid, games[i].success))
        live = [i for i in live if not episodes[i][-1].done]
        if after_round:
            after_round(len(games) - len(live), len(games))
    return episodes


def episode_returns(episodes):
    """R_i = sum_t r_{i,t}: (episodes,) float tensor."""
    returns = [sum(step.reward for step in episode) for episode in episodes]
    return torch.tensor(returns, dtype=torch.float32)


def episode_advantages(returns, normalize_std=True):
    """A_i = (R_i - mean R) / (std R + 1e-6) in each group: (groups, G) -> (groups, G).

    The std is the population's. A group whose returns are all equal has exactly 0, whatever
    floating point makes of its mean.
    """
    returns = torch.as_tensor(returns, dtype=torch.float32)
    advantages = returns - returns.mean(1, keepdim=True)
    if normalize_std:
        advantages = advantages / (returns.std(1, correction=0, keepdim=True) + 1e-6)
    all_equal = (returns == returns[:, :1]).all(1, keepdim=True)
    return advantages.masked_fill(all_equal, 0.0)


def assign_credit(episodes, advantages, gamma=1.0):
    """Pay step t of episode i gamma^(T_i - 1 - t) A_i: 1 is MS-GRPO, 0 pays the last step alone.

    advantages: (episodes,) or (groups, G).
    """
    for episode, advantage in zip(episodes, advantages.flatten().tolist()):
        for t, step in enumerate(episode):
            distance = len(episode) - 1 - t
            step.credit = advantage * gamma**distance


def aaw_probabilities(advantages):
    """P(i) = |A_i| / sum_j |A_j|: (N,) -> (N,). Raises ValueError if every advantage is zero."""
    weights = torch.as_tensor(advantages, dtype=torch.float64).abs()
    if not weights.any():
        raise ValueError("every advantage is zero: there is no episode to draw")
    return weights / weights.sum()


def draw_episodes(advantages, sampling, count, rng):
    """Draw the episodes to train on: advantages (N,) -> ascending indices.

    "aaw" draws `count` by `aaw_probabilities`, or as many as have A != 0 where those are fewer.
    "uniform" draws `count` of the N whatever their A; "all" takes the N. rng: a numpy Generator.
    """
    total = len(advantages)
    if sampling == "all":
        return list(range(total))
    if sampling == "uniform":
        drawn = rng.choice(total, min(count, total), replace=False)
        return sorted(drawn.tolist())
    if sampling != "aaw":
        raise ValueError(f"sampling is {sampling!r}, not aaw, uniform or all")
    nonzero = int((advantages != 0).sum())
    if nonzero == 0:
        return []
    probabilities = aaw_probabilities(advantages).numpy()
    drawn = rng.choice(total, min(count, nonzero), replace=False, p=probabilities)
    return sorted(drawn.tolist())


def policy_loss(logprobs, old_logprobs, credit, entropies, clip=0.2, entropy_coef=0.0):
    """The loss of each token, and where the clip is active; all tensors are (tokens,).

    -min(rho A, clip(rho, 1 - eps, 1 + eps) A) - c H,   rho = exp(logprobs - old_logprobs)
    """
    # exp must not overflow; beyond these bounds there is no gradient
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)
    ratio = log_ratio.exp()
    objective = ratio * credit
    clipped_objective = ratio.clamp(1 - clip, 1 + clip) * credit
    loss = -torch.minimum(objective, clipped_objective)
    if entropy_coef:
        loss = loss - entropy_coef * entropies
    return loss, clipped_objective < objective


def shared_length(texts):
    """How many tokens all of these texts begin with."""
    length = 0
    for tokens in zip(*texts):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def micro_batches(steps, budget, parts=1):
    """The steps in lists of about `budget` tokens, those of similar length together.

    Equal answers to equal prompts stay in one list and count once, as `Policy.score` runs them
    once. What all prompts begin with, the instructions, does not count. parts: the lists are
    shorter where there would be fewer than so many.
    """
    equal_steps = {}
    for step in steps:
        pair = (step.answer.prompt, step.answer.response)
        equal_steps.setdefault(pair, []).append(step)
    shared = shared_length([prompt for prompt, _ in equal_steps])
    sizes = {pair: len(pair[0]) - shared + len(pair[1]) for pair in equal_steps}
    budget = min(budget, np.ceil(sum(sizes.values()) / parts))
    batches = []
    room = 0
    for pair in sorted(sizes, key=lambda pair: (len(pair[1]), len(pair[0]), pair)):
        if room <= 0:
            batches.append([])
            room = budget
        room -= sizes[pair]
        batches[-1] += equal_steps[pair]
    return batches


def count_tokens(steps):
    """Response tokens of the steps: the denominator of an update's loss."""
    return sum(len(step.answer.response) for step in steps)


def backward(policy, steps, tokens, clip, entropy_coef, weight):
    """Add the gradient of `policy_loss`, summed over one micro-batch and divided by `tokens`.

    tokens: of the whole update, so that its split into micro-batches changes nothing. Returns sums
    over the micro-batch's tokens, (4,) float64: loss, entropy, clipped tokens, |log ratio|. weight:
    a factor on the gradient and on these sums, 1 where one process runs.
    """
    logprobs, entropies = policy.score([step.answer for step in steps])
    old_logprobs = []
    credit = []
    for step in steps:
        old_logprobs += step.answer.logprobs
        credit += [step.credit] * len(step.answer.response)
    old_logprobs = torch.tensor(old_logprobs, device=logprobs.device)
    credit = torch.tensor(credit, device=logprobs.device)
    losses, clipped = policy_loss(logprobs, old_logprobs, credit, entropies, clip, entropy_coef)
    (losses.sum() / tokens * weight).backward()
    gaps = (logprobs - old_logprobs).abs()
    sums = [values.detach().double().sum() for values in (losses, entropies, clipped, gaps)]
    return torch.stack(sums).cpu() * weight


def all_passes(steps, budget):
    """The micro-batches of an update, each with its weight."""
    return [(batch, 1) for batch in micro_batches(steps, budget)]


def accumulate_gradient(
    policy, episodes, clip=0.2, entropy_coef=0.0, budget=16384, passes=all_passes
):
    """Add the gradient of one update's loss on these episodes to the parameters' .grad.

    budget: tokens of a micro-batch, about. passes: `all_passes`, or what makes this process's part
    of them. Returns a count, `tokens`, the loss per token, and means over the scored tokens.
    """
    steps = [step for episode in episodes for step in episode]
    tokens = count_tokens(steps)
    # Without an entropy bonus, only steps with credit have a gradient
    scored = [step for step in steps if step.credit or entropy_coef]
    sums = torch.zeros(4, dtype=torch.float64)
    for batch, weight in passes(scored, budget):
        sums += backward(policy, batch, tokens, clip, entropy_coef, weight)
    loss, entropy, clipped, gap = sums.tolist()
    scored_tokens = max(1, count_tokens(scored))
    return {
        "tokens": tokens,
        "loss": loss / max(1, tokens),
        "entropy": entropy / scored_tokens,
        "clip_share": clipped / scored_tokens,
        "logprob_gap": gap / scored_tokens,
    }


@torch.no_grad()
def rescore(policy, episodes, budget=16384):
    """Replace the sampled log-probabilities by those of `policy.score`.

    For rollouts whose numerics are not those of training: before the first update the ratio must be
    1, up to rounding. Returns the mean absolute difference.
    """
    gaps = []
    for batch in micro_batches([step for episode in episodes for step in episode], budget):
        answers = [step.answer for step in batch]
        scored = policy.score(answers)[0].tolist()
        for answer in answers:
            sampled = answer.logprobs
            answer.logprobs = scored[: len(sampled)]
            del scored[: len(sampled)]
            gaps += [abs(a - b) for a, b in zip(sampled, answer.logprobs)]
    return sum(gaps) / max(1, len(gaps))
