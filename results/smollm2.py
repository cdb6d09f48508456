"""SmolLM2-135M-Instruct learns to cross frozen lakes on a CPU: train.py with examples in the prompt.

    python results/smollm2.py --checkpoint DIR --seed 0 --out runs/smollm2-0    train with FLAGS
    python results/smollm2.py --resume, --eval or --play runs/smollm2-0         as with train.py

Under train.py's prompt the untuned model talks of other things: no answer is ever valid, so every episode
of a group is alike and there is nothing to learn from. Eight examples as turns of the chat make most of its
answers valid, though not good: this script puts them behind the instructions. And an episode has 12 steps,
not 8, so that random play wins now and then. All else is train.py; flags that are given replace FLAGS.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import frozenlake
import model as lm
import train

EXAMPLES = [  # (rows, a good move); none of these boards is held out
    ("P___ _O_O ___O O__G", "down"), ("_O__ _P__ _O__ ___G", "right"), ("____ O__O _PO_ _O_G", "up"),
    ("____ ___P __OO ___G", "left"), ("____ __O_ ____ OP_G", "right"), ("____ OO__ __P_ ___G", "down"),
    ("___O _O__ __P_ __OG", "right"), ("_OPO ____ O___ ___G", "down")]
FLAGS = """--iterations 45 --groups 16 --group-size 32 --replay .5 --update-episodes 64 --no-normalize-std
    --learning-rate 1e-4 --final-rate .1 --entropy-coef .03 --invalid-penalty .5 --temperature 1
    --max-new-tokens 8 --micro-batch-tokens 2048 --checkpoint-every 1 --eval-episodes 100
    --threads 1""".split()


class FewShotAgent(lm.LanguageAgent):
    """A LanguageAgent whose instructions end in turns of the chat, each a state and its answer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for rows, word in EXAMPLES:
            state = "\n".join(" ".join(row) for row in rows.split())
            answer = self.tokenizer.encode(f"<action>{word}</action>") + self.tokenizer.after[1][:2]
            self.instructions += [*self.encode(state), *answer, *self.tokenizer.before]
        self.refresh()


if __name__ == "__main__":
    lm.LanguageAgent = FewShotAgent
    frozenlake.SCENARIOS["noslip"] = frozenlake.SCENARIOS["noslip"]._replace(max_steps=12)
    begins = "--checkpoint" in [word.split("=")[0] for word in sys.argv]
    sys.exit(train.main([*(FLAGS if begins else ()), *sys.argv[1:]]))
