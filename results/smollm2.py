"""SmolLM2-135M-Instruct learns to cross frozen lakes: train.py with one-word answers.

    python results/smollm2.py --checkpoint DIR --seed 0 --out runs/smollm2-0    train with FLAGS
    python results/smollm2.py --resume, --eval or --play runs/smollm2-0         as with train.py

Under train.py's own prompt this model talks of other things: no answer is ever valid, so all
episodes of a group are alike and there is nothing to learn from. Here two examples stand before the
state, as turns of the model's own chat, and the answer's tags are given: the model says the word
between them, any one token of its vocabulary. One spelling of a move is valid: were `Right` and
` right` so too, entropy could be one of spellings. A training episode has 12 steps, not 8, so that
random play wins now and then. All else is train.py; flags that are given replace FLAGS.

Two seconds an iteration on an H100 beside four others, some minutes on a CPU core. Figures of
five seeds there, by an earlier version, and of two on a CPU are in results/smollm2/README.md.
"""

import sys
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # before torch, whose threads it sets

import torch

import model as lm
from frozenlake import ACTIONS
from msgrpo import Answer

EXAMPLES = [("P___ _O_O ___O O__G", "down"), ("_O__ _P__ _O__ ___G", "right")]  # none is held out
FLAGS = """--iterations 100 --groups 128 --group-size 8 --replay .25 --update-episodes 128
    --no-normalize-std --imagine 1 --learning-rate 1e-4 --final-rate .1
    --entropy-floor .3 --invalid-penalty .5 --temperature 1 --max-new-tokens 1 --max-steps 12
    --micro-batch-tokens 8192 --checkpoint-every 10 --eval-episodes 503 --threads 1""".split()
OPEN = "<action>"
CLOSE = "</action>"


class WordAgent(lm.LanguageAgent):
    """A LanguageAgent that reads two examples and says the one word between the answer's tags.

    So all that can be said in a state is one row of log-probabilities: an iteration's play costs
    what its different states cost, however many episodes are in them, and for how many rounds.
    """

    def __init__(self, model, tokenizer, instructions, *settings):
        super().__init__(model, tokenizer, instructions, *settings)
        lm.ensure(tokenizer.template, "this script asks by chat: the model has no chat template")
        self.encode = lru_cache(65536)(
            lambda state: tuple(tokenizer.encode_chat(self.chat(instructions, state)))
        )
        self.known = {}  # prompt: the log-probabilities of its word
        self.fingerprint = None  # of the weights they are from

    def chat(self, instructions, state):
        """The examples as turns of a chat, the state, and the tag that opens the answer."""
        messages = []
        text = instructions + "\n\n"
        for rows, word in EXAMPLES:
            text += "\n".join(" ".join(row) for row in rows.split())
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": OPEN + word + CLOSE})
            text = ""
        messages.append({"role": "user", "content": state})
        return self.tokenizer.render(messages, add_generation_prompt=True) + OPEN

    @torch.inference_mode()
    def act(self, observations, uniforms):
        prompts = [self.encode(state) for state in observations]
        distinct, rows = lm.unique(prompts)
        if uniforms is None:  # evaluation asks once, and about many states
            self.known.clear()
        table = self.tables(distinct)
        rows = torch.tensor(rows, device=table.device)
        if uniforms is not None:
            uniforms = torch.tensor(uniforms[:, 0], dtype=table.dtype, device=table.device)
        tokens = lm.sample(table, rows, uniforms)
        logprobs = table[rows, tokens]
        answers = []
        for prompt, token, logprob in zip(prompts, tokens.tolist(), logprobs.tolist()):
            word = self.tokenizer.decode((token,))
            text = OPEN + word + CLOSE if word in ACTIONS else word
            answers.append(Answer(prompt, (token,), [logprob], text))
        return answers

    def tables(self, prompts):
        """Log-probabilities of the word, (prompts, size). While weights stay, each is run once."""
        fingerprint = self.model.head_weight().sum(dtype=torch.float64).item()
        if fingerprint != self.fingerprint:  # weights were updated
            self.fingerprint = fingerprint
            self.known.clear()
        new = [prompt for prompt in prompts if prompt not in self.known]
        if new:
            self.known.update(zip(new, self.read_prompts(new)[0]))
        return torch.stack([self.known[prompt] for prompt in prompts])


if __name__ == "__main__":
    begins = any(word.split("=")[0] == "--checkpoint" for word in sys.argv)
    flags = FLAGS if begins else []
    sys.exit(train.main([*flags, *sys.argv[1:]], agent_class=WordAgent))
