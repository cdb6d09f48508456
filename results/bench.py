"""Ours against transformers: the same weights, prompts and machine, in turns.

    python results/bench.py --models smollm2-135m --dtypes float32 --batches 32 --states distinct
    python results/bench.py --checkpoint DIR --models smollm2-135m      real weights and tokenizer
    python results/bench.py                                        everything; hours on two cores

rollout  an answer of --new tokens to each of `batch` states, sampled at temperature 1, without end
         tokens. Ours: LanguageAgent.act. Theirs: `generate`, padded on the left, with a cache.
update   forward and backward pass of the clipped objective on these answers. Ours:
         msgrpo.accumulate_gradient. Theirs: whole sequences, padded on the right, at most 32 at
         once, with logits of all tokens and log_softmax in float32, as trainers do.
memory   peak resident bytes of one update, gradients included, beyond those with the weights
         loaded; in a process of its own. Linux alone, elsewhere null.
states   distinct: no two are equal. played: those met after three random moves by groups of 16
         episodes, where ours profits from equal ones.

In float32 both sides must agree before the clock starts, on up to 32 answers: log-probabilities
within 1e-4, gradients within 1e-4 of their norm. Each figure is the median of --repeats. A JSON
object per case is added to --out, and a table is printed. smollm2-135m has that model's shape with
random weights, or --checkpoint gives real ones.
"""

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # before torch, whose threads it sets

import numpy as np
import torch

import frozenlake
import model as lm
import msgrpo

RESULTS = Path(__file__).resolve().parent
COLUMNS = "model, dtype, batch, states, rollout tokens/s, theirs, ratio, update tokens/s, theirs"
COLUMNS += ", ratio, memory MB, theirs, ratio"


class Words:
    """A stand-in for a tokenizer that is not here: a token for each word, symbol and line break."""

    def __init__(self):
        self.ids = {}

    def encode(self, text):
        pieces = re.findall(r" ?\w+| ?[^\w\s]|\s", text)
        return [self.ids.setdefault(piece, len(self.ids)) for piece in pieces]

    def prompt(self, text, think=False):
        return self.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")


def random_model(config):
    """A Transformer whose weights keep the size of what passes through them."""
    torch.manual_seed(0)
    model = lm.Transformer(config)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model


def make_model(name, checkpoint):
    """(Transformer in float32, tokenizer); the same ones every time."""
    if name == "tiny":
        return train.tiny_start(train.Settings(**train.TINY))
    if checkpoint:
        model, tokenizer = lm.load_pretrained(checkpoint)
        lm.ensure(tokenizer, f"{checkpoint} has no tokenizer.json")
        return model, tokenizer
    config = lm.parse_config((RESULTS / f"configs/{name}.json").read_bytes())
    return random_model(config), Words()


def distinct_lakes(rng):
    """Lakes in endless supply, in states of which no two are equal."""
    scenario = frozenlake.SCENARIOS["noslip"]
    seen = set()
    while True:
        lake = frozenlake.FrozenLake(frozenlake.draw_map(scenario, rng), rng=rng)
        free = [state for state, tile in enumerate(lake.tiles) if tile in "SF"]
        lake.state = int(rng.choice(free))
        if lake.observation() not in seen:
            seen.add(lake.observation())
            yield lake


def played_lakes(rng):
    """Lakes in endless supply: groups of 16 on one map, each after three random moves."""
    scenario = frozenlake.SCENARIOS["noslip"]
    while True:
        desc = frozenlake.draw_map(scenario, rng)
        for _ in range(16):
            lake = frozenlake.FrozenLake(desc, rng=rng)
            moves = [f"<action>{move}</action>" for move in rng.choice(frozenlake.ACTIONS, 3)]
            ended = [lake.step(move)[1] for move in moves]
            if not any(ended):
                yield lake


def one_credit(count):
    """Half of the answers are paid 1, half -1."""
    return [(-1.0) ** i for i in range(count)]


class Ours:
    name = "ours"

    def __init__(self, model, work):
        """model: a Transformer on the device. work: the rest of what both sides are given."""
        self.model = model
        self.model.model.recompute = work["recompute"]
        self.budget = work["micro_batch_tokens"]
        tokenizer = SimpleNamespace(size=self.model.config.vocab_size, end_ids=(), decode=str)
        self.new = work["new"]
        self.agent = lm.LanguageAgent(self.model, tokenizer, "", max_new_tokens=self.new)
        self.agent.encode = tuple  # it is given prompts in the place of states

    def rollout(self, prompts):
        uniforms = np.random.default_rng(0).random((len(prompts), self.new))
        return [answer.response for answer in self.agent.act(prompts, uniforms)]

    def logprobs(self, answers):
        return self.agent.score(answers)[0]

    def update(self, answers):
        steps = []
        for answer, credit in zip(answers, one_credit(len(answers))):
            steps.append(msgrpo.Step(answer, credit=credit))
        msgrpo.accumulate_gradient(self.agent, [steps], budget=self.budget)


class Theirs:
    name = "theirs"

    def __init__(self, model, work):
        import transformers

        transformers.logging.set_verbosity_error()
        weight = next(model.parameters())
        self.device = weight.device
        with tempfile.TemporaryDirectory() as directory:
            lm.save_small_files(directory, model, None)
            config = transformers.AutoConfig.from_pretrained(directory)
        with torch.device(self.device):
            maker = transformers.AutoModelForCausalLM
            self.model = maker.from_config(config, dtype=weight.dtype).eval()
        missing = self.model.load_state_dict(model.state_dict(), strict=False)
        assert missing.missing_keys in ([], ["lm_head.weight"]), missing  # it may be tied
        assert missing.unexpected_keys == [], missing
        if work["recompute"] == "layers":
            self.model.gradient_checkpointing_enable()
            self.model.train()  # else it is without effect; these models have no dropout
        self.model.get_input_embeddings().padding_idx = None  # else this row has no gradient
        self.model.generation_config = transformers.GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=work["new"],
            pad_token_id=0,
            use_cache=True,
        )
        self.new = work["new"]
        self.rows = 32  # of a pass

    def rollout(self, prompts):
        width = max(map(len, prompts))
        ids = [[0] * (width - len(prompt)) + [*prompt] for prompt in prompts]
        ids = torch.tensor(ids, device=self.device)
        ones = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        mask = torch.tensor(ones, device=self.device)
        answers = self.model.generate(ids, attention_mask=mask)[:, width:]
        assert answers.shape == (len(prompts), self.new)
        return [tuple(answer) for answer in answers.tolist()]

    def logprobs(self, answers):
        sequences = [[*answer.prompt, *answer.response] for answer in answers]
        ids = torch.tensor(lm.pad(sequences, 0), device=self.device)
        mask = torch.tensor(lm.pad([[1] * len(s) for s in sequences], 0), device=self.device)
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        table = logits.float().log_softmax(-1)
        logprobs = table.gather(2, ids[:, 1:, None])[..., 0]  # (batch, longest - 1)
        ends = [len(s) - 1 for s in sequences]
        return torch.cat([row[end - self.new : end] for row, end in zip(logprobs, ends)])

    def update(self, answers):
        tokens = self.new * len(answers)
        credit = torch.tensor(one_credit(len(answers)), device=self.device)
        for i in range(0, len(answers), self.rows):
            part = answers[i : i + self.rows]
            logprobs = self.logprobs(part)
            old = torch.tensor([answer.logprobs for answer in part], device=self.device).flatten()
            paid = credit[i : i + self.rows].repeat_interleave(self.new)
            losses, _ = msgrpo.policy_loss(logprobs, old, paid, torch.zeros_like(logprobs))
            (losses.sum() / tokens).backward()


def gradient(side, answers):
    side.model.zero_grad()
    side.update(answers)
    named = sorted(side.model.named_parameters())
    return torch.cat([weight.grad.flatten().float() for _, weight in named])


def check(ours, theirs, answers):
    """Raises AssertionError unless both sides compute the same, in float32; returns the gaps."""
    with torch.no_grad():
        logprob_gap = (ours.logprobs(answers) - theirs.logprobs(answers)).abs().max().item()
    expected = gradient(theirs, answers)
    gradient_gap = (gradient(ours, answers) - expected).norm() / expected.norm()
    gaps = {"logprob_gap": logprob_gap, "gradient_gap": gradient_gap.item()}
    assert max(gaps.values()) < 1e-4, gaps
    return gaps


def timed(call, *args):
    """Seconds of a call, with the work that it gives a GPU."""
    wait_for_gpu()
    start = time.perf_counter()
    call(*args)
    wait_for_gpu()
    return time.perf_counter() - start


def wait_for_gpu():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(calls, repeats):
    """The median seconds of each call; they take turns, after a first round that does not count."""
    rounds = [[timed(*call) for call in calls] for _ in range(repeats + 1)]
    return [statistics.median(seconds) for seconds in zip(*rounds[1:])]


def new_update(side, answers):
    side.model.zero_grad()
    side.update(answers)


def resident(key):
    """VmRSS, resident bytes now, or VmHWM, at their peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", status)[1]) * 1024


def peak_memory(side, answers):
    """Peak resident bytes of an update, beyond those before it."""
    for weight in side.model.parameters():
        weight.sum()  # it may be mapped and not read yet
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    before = resident("VmRSS")
    side.update(answers)
    return resident("VmHWM") - before


def child(name):
    """Print the peak memory of a side; the rest of its work stands in the standard input."""
    work = json.load(sys.stdin)
    torch.set_num_threads(work["threads"])
    model, _ = make_model(work["model"], work["checkpoint"])
    side = {"ours": Ours, "theirs": Theirs}[name](model.to(getattr(torch, work["dtype"])), work)
    if name == "theirs":
        del model
    answers = [msgrpo.Answer(tuple(p), tuple(r), old) for p, r, old in work["answers"]]
    print(peak_memory(side, answers))


def memory_in_child(side, work):
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, "--child", side.name]
    given = {"input": json.dumps(work), "capture_output": True, "text": True}
    return int(subprocess.run(command, check=True, **given).stdout)


def compare(name, dtype, batch, states, args):
    """The figures of one case."""
    model, tokenizer = make_model(name, args.checkpoint)
    model.to(getattr(torch, dtype))
    rng = np.random.default_rng(0)
    lakes = distinct_lakes(rng) if states == "distinct" else played_lakes(rng)
    lakes = list(itertools.islice(lakes, batch))
    prompts = make_prompts(tokenizer, lakes)
    work = {
        "model": name,
        "checkpoint": args.checkpoint,
        "dtype": dtype,
        "recompute": "parts",
        "micro_batch_tokens": 16384,
        "threads": args.threads,
        "new": args.new,
    }
    sides = [Ours(model, work), Theirs(model, work)]
    answers = make_answers(sides[0], prompts)
    work["answers"] = [[answer.prompt, answer.response, answer.logprobs] for answer in answers]
    record = {"model": name, "dtype": dtype, "batch": batch, "states": states}
    record["distinct"] = len(set(prompts))
    for side in sides:
        record[f"{side.name}_memory"] = memory_in_child(side, work)
    if dtype == "float32":
        record |= check(*sides, answers[:32])
    return record | speeds(sides, prompts, answers, args.repeats)


def make_prompts(tokenizer, lakes):
    texts = [f"{lake.instructions}\n\n{lake.observation()}" for lake in lakes]
    return [tuple(tokenizer.prompt(text)) for text in texts]


def make_answers(ours, prompts):
    """Answers to the prompts, with their log-probabilities as updates compute them."""
    answers = [msgrpo.Answer(p, r) for p, r in zip(prompts, ours.rollout(prompts))]
    steps = [msgrpo.Step(answer) for answer in answers]
    for answer in answers:
        answer.logprobs = [0.0] * ours.new
    msgrpo.rescore(ours.agent, [steps])
    return answers


def speeds(sides, prompts, answers, repeats):
    """Tokens per second of both sides' rollouts and updates."""
    tokens = len(answers) * sides[0].new
    rollouts = in_turns([(side.rollout, prompts) for side in sides], repeats)
    updates = in_turns([(new_update, side, answers) for side in sides], repeats)
    found = {}
    for side, rollout, update in zip(sides, rollouts, updates):
        found[f"{side.name}_rollout"] = tokens / rollout
        found[f"{side.name}_update"] = tokens / update
    return found


def print_table(records):
    """As Markdown."""
    names = COLUMNS.split(", ")
    print("\n| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for record in records:
        row = [str(record[key]) for key in ("model", "dtype", "batch", "states")]
        for what in ("rollout", "update", "memory"):
            ours = record[f"ours_{what}"]
            theirs = record[f"theirs_{what}"]
            unit = 1e6 if what == "memory" else 1
            if ours is None:
                row += ["-", "-", "-"]
            else:
                row += [f"{ours / unit:,.0f}", f"{theirs / unit:,.0f}", f"{ours / theirs:.2f}"]
        print("| " + " | ".join(row) + " |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["tiny", "smollm2-135m"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32, 128])
    parser.add_argument("--states", nargs="+", default=["distinct", "played"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--checkpoint", help="a model's folder, in the place of random weights")
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        sys.exit()
    torch.set_num_threads(args.threads)
    records = []
    for case in itertools.product(args.models, args.dtypes, args.batches, args.states):
        record = compare(*case, args)
        record |= {"new": args.new, "threads": args.threads, "torch": torch.__version__}
        records.append(record)
        with open(args.out, "a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
    print_table(records)


if __name__ == "__main__":
    main()
