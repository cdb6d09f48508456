"""A game of one's own, and a tiny model that learns it from nothing: all that a fork needs.

    python results/own_game.py        five seconds on one core

Five crossings, and a light at each. The right word leads on, a wrong one ends the walk. Nobody
tells the model what the colours mean, nor which of its words are answers: it has the reward alone.
The loop at the end is the whole method, by the steps of msgrpo.py.

This game is easy: one word to look up, and a reward at every step. Where yours does not learn, look
at the share of valid answers first, then at how many groups are all alike. More and smaller groups,
no std (`normalize_std=False`), a larger `entropy_coef` and a penalty for invalid answers help then;
train.TINY says why. Small embeddings and clipped gradients, both below, matter as much.
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import model as lm
import msgrpo

MEANING = {"red": "wait", "green": "walk", "blue": "swim"}
GROUPS = 8
GROUP_SIZE = 16
KL_COEF = 0.0  # to the model as it was at first; .03 learns all the same, 1 learns nothing


class Crossings:
    """A msgrpo.Game. lights: of the walk, the same for a whole group."""

    instructions = "say wait walk or swim"

    def __init__(self, lights, rng):
        self.lights = lights
        self.rng = rng  # of everything random in the episode, the model's samples included
        self.passed = 0
        self.success = False

    def observation(self):
        return f"light {self.lights[self.passed]}"

    def step(self, text):
        """(reward, done, valid)"""
        if text != MEANING[self.lights[self.passed]]:
            return 0.0, True, text in MEANING.values()
        self.passed += 1
        self.success = self.passed == len(self.lights)
        return 1.0, self.success, True


class Words:
    """A tokenizer of whole words. All of them end an answer, as an answer is one word."""

    words = [*Crossings.instructions.split(), "light", *MEANING]  # of all texts and answers
    size = len(words)
    end_ids = frozenset(range(size))

    def prompt(self, text, think=False):
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


def play_groups(agent, iteration):
    """GROUPS walks, and GROUP_SIZE episodes of each."""
    games = []
    for group in range(GROUPS):
        lights = np.random.default_rng([iteration, group]).choice(list(MEANING), 5)
        for member in range(GROUP_SIZE):
            games.append(Crossings(lights, np.random.default_rng([iteration, group, member])))
    return msgrpo.play(agent, games)


def add_kl(agent, reference, episodes, coef):
    """Add the gradient of a KL term: coef * (q/p - log q/p - 1) per token, q of the reference.

    As in GRPO: over tokens that p samples, the mean of this is KL(p || q), and that of its gradient
    is the gradient of KL(q || p). Drawn episodes are not quite p's: AAW favours some. reference: an
    agent with a copy of the model, made before training.
    """
    steps = [step for episode in episodes for step in episode]
    for batch in msgrpo.micro_batches(steps, budget=16384):
        answers = [step.answer for step in batch]
        with torch.no_grad():
            reference_logprobs, _ = reference.score(answers)
        logprobs, _ = agent.score(answers)
        log_ratio = reference_logprobs - logprobs
        terms = log_ratio.exp() - log_ratio - 1
        (coef * terms.sum() / msgrpo.count_tokens(steps)).backward()


def main():
    torch.set_num_threads(1)  # so small a model's threads would wait for each other
    torch.manual_seed(0)
    config = lm.Config(
        "llama",
        vocab_size=Words.size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = lm.Transformer(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.2)  # torch's 1 drowns the layers
    agent = lm.LanguageAgent(model, Words(), Crossings.instructions, max_new_tokens=1)
    frozen = copy.deepcopy(model)
    reference = lm.LanguageAgent(frozen, Words(), Crossings.instructions, max_new_tokens=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for iteration in range(1, 61):
        episodes = play_groups(agent, iteration)
        returns = msgrpo.episode_returns(episodes).view(GROUPS, GROUP_SIZE)
        advantages = msgrpo.episode_advantages(returns).flatten()
        msgrpo.assign_credit(episodes, advantages)
        rng = np.random.default_rng([iteration])
        drawn = msgrpo.draw_episodes(advantages, "aaw", len(episodes) // 2, rng)
        drawn_episodes = [episodes[i] for i in drawn]
        msgrpo.accumulate_gradient(agent, drawn_episodes, entropy_coef=0.01)
        if KL_COEF:
            add_kl(agent, reference, drawn_episodes, KL_COEF)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        if iteration % 5 == 0:
            success = np.mean([episode[-1].success for episode in episodes])
            valid = np.mean([step.valid for episode in episodes for step in episode])
            print(f"iteration {iteration}: success {success:.2f}, valid {valid:.2f}")


if __name__ == "__main__":
    main()
