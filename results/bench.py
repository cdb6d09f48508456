"""Ours against transformers: the same weights, prompts and machine, in one run, turn by turn.

    python results/bench.py                                          everything; hours on two cores
    python results/bench.py --models smollm2 --dtypes bfloat16 --batches 32 --states distinct
    python results/bench.py --checkpoint DIR                         real weights and tokenizer for smollm2

rollout  one answer of --new tokens to each of `batch` states, sampled at temperature 1, no end tokens. Ours:
         model.LanguageAgent.act. Theirs: generate, padded left, with a cache.
update   forward and backward pass of the clipped objective on these answers, without optimiser. Ours:
         msgrpo.accumulate_gradient. Theirs: whole sequences padded right, at most 32 at once, logits of
         every token, log_softmax in float32, as trainers do.
         With --trl and --checkpoint, also the loss of TRL's GRPOTrainer on the same tokens, as it
         runs on a CPU, without checkpointing of activations, and its backward pass.
memory   peak resident memory of one update, gradients included, in a process of its own, less what it had
         with the weights loaded.
states   distinct: no two equal. played: those met after three random moves by groups of 16 episodes, where
         ours profits from equal ones.

In float32, before the clock starts, up to 32 answers must agree: log-probabilities with transformers' within
1e-4, gradients, TRL's too, within 1e-4 of their norm. Figures are medians of --repeats. matmul is the best
rate of square matrix products in that dtype, measured here too; the update's share of it counts useful
operations, each needed token once: 6 per weight of the layers and token of instructions, unequal prompts and
unequal answers (but their last); 12 heads head_dim per token and token that it sees, in each layer; 6 hidden
vocabulary per token of an unequal answer. smollm2 has SmolLM2-135M's shape with random weights and a token
for each word and symbol; or --checkpoint gives real ones. The raw figures are added to --out, a JSON object
per line, the table goes to the terminal.
"""
import argparse
import functools
import importlib.metadata
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
import numpy as np
import torch

import frozenlake
import model as lm
import msgrpo
import train

RESULTS = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Words:
    """A stand-in for a tokenizer that is not here: a token for each word, symbol and line break."""

    def __init__(self):
        self.ids = {}

    def encode(self, text):
        pieces = re.findall(r" ?\w+| ?[^\w\s]|\s", text)
        return [self.ids.setdefault(piece, len(self.ids)) for piece in pieces]

    def prefix(self, instructions):
        return self.encode("<|im_start|>user\n" + instructions + "\n\n")

    def suffix(self, state):
        return self.encode(state + "<|im_end|>\n<|im_start|>assistant\n")


def random_model(config):
    torch.manual_seed(0)
    model = lm.Transformer(config)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -.5)
    return model


def make_model(name, checkpoint):
    """(Transformer in float32, tokenizer)"""
    if name == "tiny":
        return train.tiny_start(train.Settings(**train.TINY))
    if checkpoint:
        return lm.load_pretrained(checkpoint)
    config = lm.parse_config((RESULTS / "configs/smollm2-135m.json").read_bytes())
    return random_model(config), Words()


def lakes(states, rng):
    """Games in endless supply, in the states of a batch (see the docstring)."""
    scenario, seen = frozenlake.SCENARIOS["noslip"], set()
    while True:
        desc = frozenlake.draw_map(scenario, rng)
        for _ in range(16 if states == "played" else 1):
            lake = frozenlake.FrozenLake(desc, scenario.success_rate, scenario.max_steps, rng)
            if states == "played":
                moves = rng.choice(frozenlake.ACTIONS, 3)
                done = any(lake.step(f"<action>{move}</action>")[1] for move in moves)
            else:
                lake.state = int(rng.choice([i for i, tile in enumerate(lake.tiles) if tile in "SF"]))
                done = lake.observation() in seen
                seen.add(lake.observation())
            if not done:
                yield lake


class Ours:
    def __init__(self, directory, dtype, prefix, new):
        self.model, self.name = lm.load_pretrained(directory, dtype)[0], "ours"
        tokenizer = SimpleNamespace(size=self.model.config.vocab_size, end_ids=(), decode=str,
                                    prefix=lambda text: prefix, suffix=lambda prompt, think: prompt)
        self.agent = lm.LanguageAgent(self.model, tokenizer, "", max_new_tokens=new)

    def rollout(self, prompts):
        self.agent.refresh()
        uniforms = np.random.default_rng(0).random((len(prompts), self.agent.max_new_tokens))
        return [answer[1] for answer in self.agent.act(prompts, uniforms)]

    def logprobs(self, steps):
        return self.agent.score(steps)[0]

    def update(self, steps, advantages):
        msgrpo.assign_credit([[step] for step in steps], torch.tensor(advantages))
        msgrpo.accumulate_gradient(self.agent, [steps])


class Theirs:
    def __init__(self, directory, dtype, prefix, new):
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        self.model.get_input_embeddings().padding_idx = None  # else <|im_end|>, read, has no gradient
        self.model.generation_config = transformers.GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new, pad_token_id=0,
            use_cache=True)
        self.prefix, self.new, self.name = prefix, new, "transformers"

    def rollout(self, prompts):
        sequences = [self.prefix + list(prompt) for prompt in prompts]
        width = max(map(len, sequences))
        ids = torch.tensor([[0] * (width - len(s)) + s for s in sequences])
        mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
        out = self.model.generate(ids, attention_mask=mask)[:, width:]
        assert out.shape == (len(prompts), self.new)
        return out.tolist()

    def logprobs(self, steps):
        sequences = [self.prefix + list(step.prompt) + list(step.response) for step in steps]
        width = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        logprobs = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]  # (batch, width - 1)
        ends = torch.tensor([[len(s), len(step.response)] for s, step in zip(sequences, steps, strict=True)])
        places = torch.arange(1, width)
        return logprobs[(places < ends[:, :1]) & (places >= ends[:, :1] - ends[:, 1:])]

    def update(self, steps, advantages):
        tokens = sum(len(step.response) for step in steps)
        for i in range(0, len(steps), 32):
            logprobs = self.logprobs(part := steps[i:i + 32])
            old = torch.tensor([logprob for step in part for logprob in step.logprobs])
            credit = torch.tensor(advantages[i:i + 32]).repeat_interleave(self.new)
            (-msgrpo.clipped_objective(logprobs, old, credit, .2)[0].sum() / tokens).backward()


class Trl(Theirs):
    """The loss that TRL's GRPOTrainer computes, given the answers and old log-probabilities."""

    def __init__(self, directory, dtype, prefix, new):
        import datasets
        import transformers
        import trl
        super().__init__(directory, dtype, prefix, new)
        self.name = "trl"
        config = trl.GRPOConfig(
            str(directory), use_cpu=True, bf16=False, beta=0.0, loss_type="grpo", report_to="none",
            gradient_checkpointing=False, per_device_train_batch_size=2, num_generations=2)
        self.trainer = trl.GRPOTrainer(
            self.model, lambda **_: [0.0], config, datasets.Dataset.from_list([{"prompt": "x"}] * 2),
            processing_class=transformers.AutoTokenizer.from_pretrained(directory))
        self.model = self.trainer.model.to(dtype).eval()

    def update(self, steps, advantages):
        for i in range(0, len(steps), 32):
            part = steps[i:i + 32]
            prompts = [self.prefix + list(step.prompt) for step in part]
            width = max(map(len, prompts))
            inputs = {"prompt_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
                      "prompt_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
                      "completion_ids": torch.tensor([step.response for step in part]),
                      "completion_mask": torch.ones(len(part), self.new, dtype=torch.int64),
                      "advantages": torch.tensor(advantages[i:i + 32]),
                      "old_per_token_logps": torch.tensor([step.logprobs for step in part])}
            (self.trainer._compute_loss(self.model, inputs) * len(part) / len(steps)).backward()


def timed(call, *args):
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def turns(repeats, calls):
    """[seconds of each of the calls], one after the other, again and again, after a first time uncounted."""
    results = [[call() for call in calls] for _ in range(repeats + 1)]
    return [list(column) for column in zip(*results[1:], strict=True)]


def update_seconds(side, steps, advantages):
    side.model.zero_grad()
    return timed(side.update, steps, advantages)


def gradients(side, steps, advantages):
    side.model.zero_grad()
    side.update(steps, advantages)
    return torch.cat([weight.grad.flatten() for _, weight in sorted(side.model.named_parameters())])


def check(sides, steps, advantages):
    """Both sides compute the same, in float32."""
    with torch.no_grad():
        ours, theirs = (side.logprobs(steps) for side in sides[:2])
    mine, *others = (gradients(side, steps, advantages) for side in sides)
    gaps = {"logprob_gap": (ours - theirs).abs().max().item(),
            "gradient_gap": max(((mine - other).norm() / other.norm()).item() for other in others)}
    assert all(gap < 1e-4 for gap in gaps.values()), gaps
    return gaps


@functools.cache
def matmul_peak(dtype):
    """Best rate of n x n matrix products, in operations per second."""
    best = 0.0
    for n in (1024, 2048, 4096):
        a, b = torch.randn(2, n, n).to(DTYPES[dtype])
        best = max(best, *(2 * n ** 3 / timed(torch.matmul, a, b) for _ in range(6)))
    return best


def useful_operations(config, prefix, steps):
    """Of one update (see the docstring)."""
    pairs = {(step.prompt, step.response) for step in steps}
    lengths = [(0, len(prefix))] + [(len(prefix), len(prompt)) for prompt in {prompt for prompt, _ in pairs}]
    lengths += [(len(prefix) + len(prompt), len(response) - 1) for prompt, response in pairs]
    tokens = sum(n for _, n in lengths)
    seen = sum(n * before + n * (n + 1) // 2 for before, n in lengths)
    with torch.device("meta"):
        layers = sum(weight.numel() for weight in lm.Transformer(config).model["layers"].parameters())
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seen
    head = 6 * config.hidden_size * config.vocab_size * sum(len(response) for _, response in pairs)
    return 6 * layers * tokens + attention + head


def peak_memory(side, steps, advantages):
    """Peak resident bytes of an update, less those before: Linux's mark is set back after loading."""
    def status(key):
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    sum(weight.sum() for weight in side.model.parameters())  # weights may be mapped and not read yet
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    side.update(steps, advantages)
    return status("VmHWM") - before


def in_child(directory, name, args):
    """`peak_memory` of a side in a process of its own."""
    command = [sys.executable, __file__, "--child", name, str(directory), "--threads", str(args.threads)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(name, directory):
    work = json.loads((directory / "work.json").read_text())
    make = {"Ours": Ours, "Theirs": Theirs, "Trl": Trl}[name]
    side = make(directory, DTYPES[work["dtype"]], work["prefix"], work["new"])
    steps = [msgrpo.Step(tuple(prompt), tuple(response), old) for prompt, response, old in work["steps"]]
    print(peak_memory(side, steps, work["advantages"]))


def compare(name, dtype, batch, states, args):
    """A record of one case."""
    model, tokenizer = make_model(name, args.checkpoint)
    games = list(itertools.islice(lakes(states, np.random.default_rng(0)), batch))
    prefix = tokenizer.prefix(games[0].instructions)
    prompts = [tuple(tokenizer.suffix(game.observation())) for game in games]
    advantages = [(-1.0) ** i for i in range(batch)]
    with tempfile.TemporaryDirectory() as directory:
        lm.save_pretrained(directory, model.to(DTYPES[dtype]), None)
        kinds = (Ours, Theirs, Trl)[:3 if args.trl else 2]
        sides = [side(directory, DTYPES[dtype], prefix, args.new) for side in kinds]
        steps = [msgrpo.Step(prompt, tuple(answer)) for prompt, answer in
                 zip(prompts, sides[0].rollout(prompts), strict=True)]
        msgrpo.rescore(sides[0].agent, [steps])
        record = {"model": name, "dtype": dtype, "batch": batch, "states": states, "prefix": len(prefix),
                  "prompt": statistics.mean(map(len, prompts)), "unequal_prompts": len(set(prompts)),
                  "unequal_answers": len({(step.prompt, step.response) for step in steps}),
                  "tokens": batch * args.new, "operations": useful_operations(model.config, prefix, steps),
                  "matmul_peak": matmul_peak(dtype)}
        work = {"dtype": dtype, "prefix": prefix, "new": args.new, "advantages": advantages,
                "steps": [[step.prompt, step.response, step.logprobs] for step in steps]}
        (Path(directory) / "work.json").write_text(json.dumps(work))
        for kind in kinds:  # before this process has a heap of its own from the same work
            record[f"{kind.__name__.lower()}_memory"] = in_child(directory, kind.__name__, args)
        if dtype == "float32":
            record |= check(sides, steps[:32], advantages[:32])
        for what, calls in (
                ("rollout", [functools.partial(timed, side.rollout, prompts) for side in sides[:2]]),
                ("update", [functools.partial(update_seconds, side, steps, advantages) for side in sides])):
            for side, seconds in zip(sides, turns(args.repeats, calls)):
                record[f"{side.name}_{what}"] = seconds
    return record


def growth(args):
    """Seconds of rollouts and update of an iteration of ours, and of the same with one size doubled."""
    base = {"episodes": 32, "steps": 4, "instructions": 120, "vocabulary": 8192}
    for doubled in (None, *base):
        size = base | ({doubled: 2 * base[doubled]} if doubled else {})
        model = random_model(lm.Config("llama", size["vocabulary"], 256, 768, 6, 4, 2, 64))
        rng = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as directory:
            lm.save_pretrained(directory, model, None)
            instructions = rng.integers(8192, size=size["instructions"]).tolist()
            side = Ours(directory, torch.float32, instructions, args.new)
        count = size["episodes"] * size["steps"]
        prompts, answers = (list(map(tuple, rng.integers(8192, size=(count, n)).tolist()))
                            for n in (40, args.new))
        steps = [msgrpo.Step(prompts[i], answers[i], [-9.0] * args.new) for i in range(count)]

        def play(side, prompts, episodes):
            for i in range(0, len(prompts), episodes):
                side.rollout(prompts[i:i + episodes])

        rollout, update = turns(args.repeats, [
            functools.partial(timed, play, side, prompts, size["episodes"]),
            functools.partial(update_seconds, side, steps, [(-1.0) ** i for i in range(count)])])
        yield {"growth": doubled or "base", **size, "rollout": rollout, "update": update}


def show(record, file):
    """The record, written to the file as well, and to the terminal."""
    print(json.dumps(record), file=file, flush=True)
    print(*(f"{key} {value}" for key, value in record.items() if not isinstance(value, list)), flush=True)
    return record


def table(records):
    """The medians as Markdown."""
    mid, cases = statistics.median, [record for record in records if "model" in record]
    if cases:
        print("\n| model | dtype | batch | states | rollout tokens/s | transformers | ratio "
              "| update tokens/s | plain | ratio | memory MB | plain | ratio | of matmul "
              "| TRL's update tokens/s | its memory MB |\n|" + "---|" * 16)
    for r in cases:
        row = [r["model"], r["dtype"], r["batch"], r["states"]]
        for what in ("rollout", "update"):
            ours, theirs = (r["tokens"] / mid(r[f"{side}_{what}"]) for side in ("ours", "transformers"))
            row += [f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.1f}"]
        ours, theirs = (r[f"{side}_memory"] / 1e6 for side in ("ours", "theirs"))
        row += [f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.2f}"]
        row.append(f"{r['operations'] / mid(r['ours_update']) / r['matmul_peak']:.0%}")
        row += ([f"{r['tokens'] / mid(r['trl_update']):,.0f}", f"{r['trl_memory'] / 1e6:,.0f}"]
                if "trl_update" in r else ["", ""])
        print("|", " | ".join(map(str, row)), "|")
    base = next((record for record in records if record.get("growth") == "base"), None)
    if base:
        print("\n| twice | rollouts s | ratio | update s | ratio |\n|" + "---|" * 5)
    for r in records if base else ():
        if "growth" in r:
            ratios = ((mid(r[what]), mid(r[what]) / mid(base[what])) for what in ("rollout", "update"))
            print("|", r["growth"], "|", " | ".join(f"{s:.3f} | {ratio:.2f}" for s, ratio in ratios), "|")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    for name, kind, default in (("models", str, ["tiny", "smollm2"]), ("dtypes", str, [*DTYPES]),
                                ("batches", int, [8, 32, 128]), ("states", str, ["distinct", "played"])):
        parser.add_argument(f"--{name}", type=kind, default=default, nargs="*")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--checkpoint", help="Hugging Face directory for smollm2's weights and tokenizer")
    parser.add_argument("--trl", action="store_true", help="TRL's loss as well; wants trl and --checkpoint")
    parser.add_argument("--no-growth", action="store_true", help="leave the table of growth out")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench.jsonl")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.trl and not (args.checkpoint and args.models == ["smollm2"]):
        parser.error("--trl wants --checkpoint and --models smollm2: it needs a tokenizer's files")
    if args.child:
        return child(args.child[0], Path(args.child[1]))
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())  # ARM gives none
    machine = {"cpu": cpu and cpu[1], "torch": torch.__version__, "threads": args.threads, "new": args.new,
               "real_weights": bool(args.checkpoint),
               **{name: importlib.metadata.version(name) for name in ["transformers", *["trl"] * args.trl]}}
    cases = itertools.product(args.models, args.dtypes, args.batches, args.states)
    records = itertools.chain([machine], (compare(*case, args) for case in cases),
                              () if args.no_growth else growth(args))
    with open(args.out, "a") as file:
        table([show(record, file) for record in records])


if __name__ == "__main__":
    main()
