"""Does --tiny learn when an answer is several tokens? The same run, its answers cut in three.

    python results/answers.py --seed 7910 --eval-every 50

The tokens of `<action>left</action>` are then `<action>`, `left` and `</action>`, which ends it. A
longer answer is cut off after six tokens. More flags go to train.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as lm
import train

WHOLE_ANSWER = r"<action>\w+</action>"
tiny_tokenizer = lm.tiny_tokenizer


def cutting_answers(texts, ends, pieces):
    """As lm.tiny_tokenizer, but that tags are tokens of their own."""
    return tiny_tokenizer(texts, ["</action>"], pieces.replace(WHOLE_ANSWER, "</?action>"))


if __name__ == "__main__":
    assert WHOLE_ANSWER in train.TINY_PIECES
    lm.tiny_tokenizer = cutting_answers
    # The floor is a mean over tokens, of which one in three is uncertain
    flags = ["--max-new-tokens", "6", "--entropy-floor", "0.17"]
    sys.exit(train.main(["--tiny", *flags, *sys.argv[1:]]))
