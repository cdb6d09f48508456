"""One command for a bare machine with a GPU: does full scale fit, and how fast is it?

    python results/gpu.py                            about six minutes on one GPU
    python results/gpu.py --checkpoint DIR           also trains this model for some minutes
    python results/gpu.py --device cpu --smoke       the same code at a small shape

It needs torch, transformers, numpy, tiktoken, jinja2 and pytest, and no network. Each part runs in
a process of its own, with a limit of time: what one part loses, the others keep. JSON lines go to
--out after each part, a table to the terminal. Raw output of runs on an H100: results/gpu/.

peaks    the device's best rate of matrix products, and of copying its memory
recipe   three iterations at Qwen2.5-3B's shape as `train.py --think` runs them, though with random
         weights, whose answers all have 256 tokens: seconds by stage, and peak memory beside what
         memory.py predicts
updates  seconds and memory of an update at that shape, 32 answers of 256 tokens, by --recompute and
         --micro-batch-tokens; beside transformers with gradient checkpointing and without
bench    rollouts and updates beside transformers, as in bench.py, with train.py's defaults and with
         gradient checkpointing; the share of the matrix peak that updates reach, attention left
         out, and of the bandwidth that decoding reaches where it reads all weights for each token
profile  the 25 kernels that take longest in one update and in one step of sampling, 32 answers of
         256 tokens at 3B's shape; seconds to capture such a step; memory in use after an update's
         forward pass and at its peak
suite    the tests
train    results/smollm2.py on --checkpoint, for as long as the part may last
"""

import argparse
import collections
import dataclasses
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

RESULTS = Path(__file__).resolve().parent
sys.path[:0] = [str(RESULTS), str(RESULTS.parent)]
import train  # before torch, whose threads it sets

import numpy as np
import torch

import bench
import frozenlake
import memory
import model as lm
import msgrpo

GIB = 2**30
LIMITS = {  # seconds that a part may take; it runs in this order
    "peaks": 40,
    "recipe": 120,
    "updates": 75,
    "bench 3b 32 256": 75,
    "bench 3b 256 8": 45,
    "bench 3b 256 256": 90,
    "bench 0.5b 256 8": 40,
    "bench smollm2 256 8": 40,
    "profile": 40,
    "suite": 150,
    "train": 150,
}
HALF_B = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24)
HALF_B |= dict(num_attention_heads=14, num_key_value_heads=2, head_dim=64)  # Qwen2.5-0.5B's shape
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=2000)
SMALL |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)


def config(shape, smoke):
    """The architecture of "3b", "0.5b" or "smollm2", or a small one."""
    name = "smollm2-135m" if shape == "smollm2" else "qwen2.5-3b"
    found = lm.parse_config((RESULTS / f"configs/{name}.json").read_bytes())
    if smoke:
        return dataclasses.replace(found, **SMALL)
    if shape == "0.5b":
        return dataclasses.replace(found, **HALF_B)
    return found


def random_model(c, dtype, device):
    """A Transformer made on the device, with weights as small as untrained ones are."""
    torch.manual_seed(0)
    with torch.device(device):
        model = lm.Transformer(c).to(dtype)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.02)
    return model


def tokenizer_for(c):
    """A stand-in that spells the game's text in words, and whose answers never end."""
    prompt = bench.Words().prompt
    return SimpleNamespace(size=c.vocab_size, end_ids=frozenset(), decode=str, prompt=prompt)


def report(**figures):
    """A line of the part's output. The parent adds which part it is."""
    print(json.dumps(figures), flush=True)


def peak_memory(args):
    """(allocated, reserved) GiB at their peaks since `forget_peak`; None on a CPU."""
    if args.device == "cpu":
        return None, None
    return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB


def forget_peak(args):
    if args.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def best_of(call, times=10):
    """Seconds of the fastest call; the first ones warm up."""
    return min(bench.timed(call) for _ in range(times))


def peaks(args):
    """Operations and bytes per second that the device reaches at its best."""
    dtype = getattr(torch, args.dtype)
    n = 512 if args.smoke else 8192
    a = torch.randn(n, n, device=args.device).to(dtype)
    b = torch.randn(n, n, device=args.device).to(dtype)
    product = best_of(lambda: a @ b)
    report(matmul=2 * n**3 / product)
    numbers = 2**22 if args.smoke else 2**30
    x = torch.zeros(numbers, dtype=torch.bfloat16, device=args.device)
    y = torch.empty_like(x)
    copying = best_of(lambda: y.copy_(x))
    report(bandwidth=2 * 2 * numbers / copying)  # read and written


def recipe_settings(args):
    """Those of `train.py --checkpoint 3B --think`.

    Random weights win nothing, so all advantages are 0. "uniform" draws as many episodes all the
    same, and the entropy bonus gives them a gradient.
    """
    settings = train.Settings(think=True, sampling="uniform", dtype=args.dtype, device=args.device)
    if args.smoke:
        settings = dataclasses.replace(settings, max_new_tokens=8, threads=1)
    return settings


def recipe(args):
    c = config("3b", args.smoke)
    settings = recipe_settings(args)
    start = time.perf_counter()
    model = random_model(c, torch.float32, args.device)
    learner = train.Learner(settings, model, tokenizer_for(c))
    lake = settings.lake(frozenlake.draw_map(frozenlake.SCENARIOS["noslip"], train.generator()))
    player = learner.player(lake.instructions)
    trainee = learner.trainee(lake.instructions)
    report(made=time.perf_counter() - start, memory=peak_memory(args)[0])
    stages = clock_stages(learner)
    for iteration in range(1, 4):
        stages.clear()
        forget_peak(args)
        start = time.perf_counter()
        metrics = train.iterate(player, trainee, learner, iteration, [])
        seconds = time.perf_counter() - start
        allocated, reserved = peak_memory(args)
        kept = ("generated_tokens", "trained_tokens", "updates", "grad_norm", "rollout_gap")
        figures = {key: metrics[key] for key in kept}
        figures |= {"iteration": iteration, "seconds": seconds, "stages": dict(stages)}
        report(**figures, allocated=allocated, reserved=reserved)
    report(predicted=prediction(c, settings, args, player, lake))


def clock_stages(learner):
    """Have the stages of an iteration add their seconds to the Counter that is returned."""
    seconds = collections.Counter()

    def clocked(name, function):
        def call(*args, **kwargs):
            bench.wait_for_gpu()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            bench.wait_for_gpu()
            seconds[name] += time.perf_counter() - start
            return result

        return call

    msgrpo.play = clocked("play", msgrpo.play)
    msgrpo.rescore = clocked("rescore", msgrpo.rescore)
    train.accumulate_gradient = clocked("gradient", train.accumulate_gradient)
    learner.update = clocked("update", learner.update)
    return seconds


def prediction(c, settings, args, player, lake):
    """What memory.py says of these iterations, without an evaluation: total GiB."""
    shared = msgrpo.shared_length([player.encode("P"), player.encode("O")])
    sizes = SimpleNamespace(
        shared=shared,
        state=len(player.encode(lake.observation())) - shared,
        new=player.max_new_tokens,
        episodes=settings.groups * settings.group_size,
        eval_episodes=0,
        update_episodes=settings.update_episodes,
        steps=frozenlake.SCENARIOS["noslip"].max_steps,
        micro_batch_tokens=settings.micro_batch_tokens,
        processes=1,
        dtype=args.dtype,
        device=args.device,
        size=getattr(torch, args.dtype).itemsize,
        recompute=settings.recompute,
    )
    return memory.estimate(c, sizes)["total"] / GIB


def make_work(args, shape, rows, new):
    """Our side of `bench.py` with random weights, prompts of a game, and answers to them."""
    c = config(shape, args.smoke)
    if args.smoke:
        rows = 8
        new = 8
    model = random_model(c, getattr(torch, args.dtype), args.device)
    lakes = list(itertools.islice(bench.played_lakes(np.random.default_rng(0)), rows))
    prompts = bench.make_prompts(bench.Words(), lakes)
    defaults = train.Settings(device=args.device)
    work = {
        "recompute": defaults.recompute,
        "micro_batch_tokens": defaults.micro_batch_tokens,
        "new": new,
    }
    ours = bench.Ours(model, work)
    return ours, work, prompts, bench.make_answers(ours, prompts)


def bench_part(args, shape, rows, new):
    """Rollouts and updates of both sides; each figure is reported as soon as it is there."""
    ours, work, prompts, answers = make_work(args, shape, rows, new)
    theirs = bench.Theirs(ours.model, work | {"recompute": "layers"})
    for side in (ours, theirs):
        bench_call(args, side, "rollout", (side.rollout, prompts), prompts)
        bench_call(args, side, "update", (bench.new_update, side, answers), prompts)


def bench_call(args, side, what, call, prompts, **about):
    """Report the figures of a call, or that the memory was too small for it."""
    figures = {"side": side.name, "what": what, **about}
    try:
        figures |= measure_call(args, side, call)
        figures["tokens_per_second"] = len(prompts) * side.new / figures["seconds"]
        figures |= work_of(side, what, prompts)
    except torch.OutOfMemoryError as error:
        figures["out_of_memory"] = str(error)[:200]
    report(**figures)
    side.model.zero_grad()


def updates(args):
    """Time for memory: what --recompute and --micro-batch-tokens buy."""
    ours, work, prompts, answers = make_work(args, "3b", 32, 256)
    call = (bench.new_update, ours, answers)
    budgets = (4096, 8192, 16384)
    for recompute, budget in itertools.product(("layers", "parts", "nothing"), budgets):
        ours.model.model.recompute = recompute
        ours.budget = budget
        about = {"recompute": recompute, "micro_batch_tokens": budget}
        bench_call(args, ours, "update", call, prompts, **about)
    theirs = bench.Theirs(ours.model, work | {"recompute": "layers"})
    call = (bench.new_update, theirs, answers)
    for checkpointing, rows in ((True, 32), (True, 8), (False, 4)):
        if not checkpointing:
            theirs.model.gradient_checkpointing_disable()
        theirs.rows = rows
        about = {"checkpointing": checkpointing, "rows": rows}
        bench_call(args, theirs, "update", call, prompts, **about)


def measure_call(args, side, call):
    """Seconds, a first time and the median of two; peak memory beyond what was there before."""
    seconds = []
    for _ in range(3):
        side.model.zero_grad()
        forget_peak(args)
        before = 0 if args.device == "cpu" else torch.cuda.memory_allocated() / GIB
        seconds.append(bench.timed(*call))
    allocated = peak_memory(args)[0]
    memory_of_call = None if allocated is None else allocated - before
    median = statistics.median(seconds[1:])
    return {"first": seconds[0], "seconds": median, "memory": memory_of_call}


def work_of(side, what, prompts):
    """What is needed at least: operations of an update, or bytes read while decoding."""
    weights = sum(weight.numel() for weight in side.model.parameters())
    if what == "rollout":
        return {"bytes": side.new * weights * next(side.model.parameters()).element_size()}
    embeddings = side.model.model.embed_tokens.weight.numel()
    shared = msgrpo.shared_length(prompts)  # next to nothing
    prompt_tokens = sum(len(prompt) - shared for prompt in set(prompts))
    responses = len(prompts) * side.new
    in_layers = 6 * (weights - embeddings) * (prompt_tokens + responses)
    return {"operations": in_layers + 6 * embeddings * responses}


def profile(args):
    """Where the time of an update and of a step of sampling goes."""
    ours, _, prompts, answers = make_work(args, "3b", 32, 256)
    report_kernels(args, "update", lambda: bench.new_update(ours, answers))
    ours.model.zero_grad()
    report_memory(args, ours.agent, answers)
    ours.model.zero_grad()
    with torch.no_grad():
        step = make_step(ours.agent, prompts)
        report_kernels(args, "step", step)
        report(step=best_of(step, 20))


def make_step(agent, prompts):
    """A call that runs one step of sampling again and again; reports the seconds of a capture."""
    distinct, rows = lm.unique(prompts)
    rows = torch.tensor(rows, device=agent.device)
    table, tree = agent.read_prompts(distinct)
    cache = lm.Cache(tree, agent.max_new_tokens)
    cache.take(rows)
    token = lm.sample(table, rows, None)
    uniforms = torch.rand(len(prompts), device=agent.device)
    rows = torch.arange(len(prompts), device=agent.device)
    read_token = agent.read_token
    if agent.captures:
        start = time.perf_counter()
        read_token = lm.capture(agent.read_token, token, cache)
        bench.wait_for_gpu()
        report(capture=time.perf_counter() - start)

    def step():
        lm.sample(read_token(token, cache), rows, uniforms)
        cache.positions -= 1  # take it back: there is room for any number of steps

    return step


def report_kernels(args, what, call):
    """The kernels (on a CPU, operators) that take most of the second of two calls."""
    call()
    bench.wait_for_gpu()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if args.device != "cpu":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        bench.wait_for_gpu()
    seconds = {}
    for event in profiler.key_averages():
        own = event.self_cpu_time_total if args.device == "cpu" else event.self_device_time_total
        seconds[event.key] = (own / 1e6, event.count)
    total = sum(own for own, _ in seconds.values())
    count = sum(times for _, times in seconds.values())
    report(of=what, seconds=total, kernels=count)
    for name, (own, times) in sorted(seconds.items(), key=lambda item: -item[1][0])[:25]:
        report(of=what, seconds=own, calls=times, kernel=name[:150])


def report_memory(args, agent, answers):
    """GiB that an update needs beyond what was there, forward pass and backward pass."""
    if args.device == "cpu":
        return
    forget_peak(args)
    before = torch.cuda.memory_allocated() / GIB
    logprobs, _ = agent.score(answers)
    kept = torch.cuda.memory_allocated() / GIB - before
    forward = peak_memory(args)[0] - before
    torch.cuda.reset_peak_memory_stats()
    logprobs.sum().backward()
    backward = peak_memory(args)[0] - before
    gradients = torch.cuda.memory_allocated() / GIB - before
    report(kept=kept, forward_peak=forward, backward_peak=backward, gradients=gradients)


def suite(args):
    """The tests, unchanged."""
    command = [sys.executable, "-m", "pytest", "-q"]
    if args.smoke:
        command += ["-k", "advantages"]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    report(status=done.returncode, last=lines[-1] if lines else done.stderr[-300:], failed=failed)


def train_part(args):
    """Report every iteration of results/smollm2.py; the parent ends it."""
    if not args.checkpoint:
        report(skipped="no --checkpoint")
        return
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/run"
        flags = ["--device", args.device, "--dtype", args.dtype, "--out", out]
        command = [sys.executable, str(RESULTS / "smollm2.py"), "--checkpoint", args.checkpoint]
        command += [*flags, "--iterations", "1" if args.smoke else "60"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        seen = 0
        while process.poll() is None:
            time.sleep(1)
            seen += report_iterations(Path(out) / "metrics.jsonl", seen)
        report_iterations(Path(out) / "metrics.jsonl", seen)
    sys.exit(process.returncode)


def report_iterations(path, seen):
    """Report the lines of metrics.jsonl behind the first `seen`; returns their number."""
    lines = path.read_text().splitlines()[seen:] if path.exists() else []
    for line in lines:
        metrics = json.loads(line)
        report(**{key: metrics[key] for key in ("iteration", "success", "entropy", "seconds")})
    return len(lines)


def run_part(name, args):
    """In the child: one part."""
    kind, *sizes = name.split()
    if kind == "bench":
        shape, rows, new = sizes
        bench_part(args, shape, int(rows), int(new))
    else:
        parts = {"peaks": peaks, "recipe": recipe, "updates": updates, "profile": profile}
        parts["suite"] = suite
        parts["train"] = train_part
        parts[kind](args)


def start_part(name, args, limit):
    """In the parent: run a part in a child; returns its lines, and how it ended as the last one."""
    command = [sys.executable, __file__, "--part", name, *sys.argv[1:]]
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as errors,
        tempfile.TemporaryDirectory() as folder,  # a part that is killed leaves nothing in it
    ):
        start = time.perf_counter()
        env = os.environ | {"TMPDIR": folder}
        process = subprocess.Popen(
            command, stdout=out, stderr=errors, env=env, start_new_session=True
        )
        try:
            ended = f"status {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        finally:
            kill_group(process)
        seconds = time.perf_counter() - start
        out.seek(0)
        errors.seek(0)
        texts = [line for line in out.read().splitlines() if line.startswith("{")]
        found = [read_line(text) for text in texts]
        last = {"ended": ended, "seconds": seconds}
        if ended != "status 0":
            last["error"] = errors.read()[-600:]
    return [{"part": name, **line} for line in [*found, last]]


def read_line(text):
    try:
        return json.loads(text)
    except ValueError:  # cut off
        return {"cut": text}


def kill_group(process):
    """End what is left of a part, its own children too."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def add_shares(line, ceilings):
    """Of the device's peak, where a line says what it had to compute or to read."""
    for work, ceiling in (("operations", "matmul"), ("bytes", "bandwidth")):
        if work in line and ceiling in ceilings:
            line[f"share_of_{ceiling}"] = line[work] / line["seconds"] / ceilings[ceiling]


def short(value):
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, dict):
        return "; ".join(f"{key} {short(inner)}" for key, inner in value.items())
    return str(value)


def print_table(lines):
    """As Markdown: a row for each line."""
    print("\n| part | figures |\n|---|---|")
    for line in lines:
        if "ended" not in line or line["ended"] != "status 0":
            figures = {key: value for key, value in line.items() if key != "part"}
            words = short(figures).replace("\n", " ").replace("|", "/")
            print(f"| {line['part']} | {words} |")


def about_machine(args):
    line = {"part": "machine", "torch": torch.__version__, "device": args.device}
    line |= {"dtype": args.dtype, "smoke": args.smoke}
    if args.device != "cpu":
        line["gpu"] = torch.cuda.get_device_name(args.device)
        line["memory"] = torch.cuda.mem_get_info(args.device)[1] / GIB
    return line


def write_lines(lines, args):
    """To the file and to the terminal."""
    texts = [json.dumps(line) + "\n" for line in lines]
    with open(args.out, "a") as file:
        file.writelines(texts)
    print("".join(texts), end="", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default=train.DEVICE, choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="a small shape, to try the script")
    parser.add_argument("--checkpoint", help="a small instruct model's folder")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, help="default: all")
    parser.add_argument("--seconds", type=float, default=360, help="after which no part begins")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = "float32" if args.device == "cpu" else "bfloat16"
    if args.part:
        run_part(args.part, args)
        return
    start = time.perf_counter()
    lines = [about_machine(args)]
    write_lines(lines, args)
    ceilings = {}
    for name in args.parts or LIMITS:
        left = args.seconds - (time.perf_counter() - start)
        if left > 0:
            new = start_part(name, args, min(LIMITS[name], left))
        else:
            new = [{"part": name, "ended": "not begun: no time is left"}]
        for line in new:
            ceilings |= {key: line[key] for key in ("matmul", "bandwidth") if key in line}
            add_shares(line, ceilings)
        write_lines(new, args)
        lines += new
    print_table(lines)


if __name__ == "__main__":
    main()
