"""The rows of `benches/speed.py`: which models and data they take, and how each side of a row is run once.

A row has sides, which are measured in turn. A side gives a function that runs it once; what it returns has `rate` (units a second in the steady state),
`peak_mb` (`ru_maxrss` of the whole process) and whatever the report shows next to them.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import scaling
import speed_limit

BASELINES = Path(__file__).resolve().parent / "speed_trl.py"
LLAMA_CPP = Path(__file__).resolve().parent / "speed_llama_cpp.py"
LORA = {"method": "lora", "lora-r": 16, "lora-alpha": 32, "target-modules": "all-linear"}
# TRL's side has the same; the schedule, which differs, costs nothing.
TRAINING = {"epochs": 1000000, "evaluation-share": 0, "evaluate-every": 1000000, "checkpoint-every": 1000000, "learning-rate": 1e-5, "beta2": 0.999}
MAX_LENGTH = 512
PROMPT_LENGTH = 64
# Prompts of a step of reward-k8.
RANKED = 2
SEARCH_STEPS = 3


@dataclass
class Run:
    """What all rows are run with."""

    programs: Path
    python: Path
    output: Path
    threads: int
    precisions: list
    quick: bool

    @property
    def inputs(self):
        return self.output / ("inputs-quick" if self.quick else "inputs")


@dataclass
class Row:
    """`of` is what is counted, `unit` many of it a step (0: as many tokens as there are). `size` is steps, or batches of sampling, after the `skipped` first ones, in
    which memory is taken, threads are started and kernels are chosen.
    """

    kind: str
    model: str
    data: str
    of: str
    unit: int
    size: int
    more: dict = field(default_factory=dict)

    @property
    def skipped(self):
        # An update of PPO is many passes, and so is a batch of sampling.
        return 1 if self.kind.endswith(("ppo", "sample", "sample-q8")) else 2

    @property
    def is_searched(self):
        """Whether it has a baseline with settings, of which the fastest is looked for."""
        return not (self.kind.startswith("threads-") or self.kind in ("nucleus", "sample-q8"))


def ranked_answers(quick):
    return 4 if quick else 8


def rows(quick):
    """All rows; a quick run has the same rows with next to no work."""
    steps = (lambda count: 2) if quick else (lambda count: count)
    batch = (lambda count: 4) if quick else (lambda count: count)
    lora, ranked = {"lora": [16, 32]}, ranked_answers(quick)
    found = {
        "sft-lora-9m": Row("sft", "9m", "sft-9m", "tokens", 0, steps(6), lora),
        "sft-lora-52m": Row("sft", "52m", "sft-52m", "tokens", 0, steps(4), lora),
        "sft-lora-135m": Row("sft", "135m", "sft-135m", "tokens", 0, steps(3), lora),
        "sft-full-9m": Row("sft", "9m", "sft-9m", "tokens", 0, steps(6)),
        "reward-pairs": Row("reward", "9m-reward", "pairs-pairs", "pairs", batch(16), steps(6), lora),
        "reward-k8": Row("reward-k8", "9m-reward", "ranked", "pairs", RANKED * ranked * (ranked - 1) // 2, steps(3), lora),
        "ppo": Row("ppo", "9m", "prompts-ppo", "answers", batch(32), steps(2), lora | {"response_length": 6 if quick else 48, "epochs": 4}),
        "sample-9m": sampling("9m", batch(32), steps(3), quick),
        "sample-52m": sampling("52m", batch(32), steps(2), quick),
        "sample-135m-1": sampling("135m", 1, steps(8), quick),
        "sample-135m-1-q8": sampling("135m", 1, steps(16), quick, "sample-q8"),
        "nucleus": Row("nucleus", "135m-peaked", "prompts-nucleus", "tokens", 0, 1, {"answers": 25, "response_length": 4 if quick else 20}),
    }
    for name in ("sft-lora-9m", "sft-full-9m", "reward-pairs", "ppo"):
        row = found[name]
        found[f"threads-{name}"] = Row(f"threads-{row.kind}", row.model, row.data, row.of, row.unit, row.size, row.more)
    return found


def sampling(model, rows, batches, quick, kind="sample"):
    """So many batches of rows after a first one that is left out."""
    return Row(kind, model, f"prompts-{rows * (batches + 1)}", "tokens", 0, batches, {"rows": rows, "response_length": 8 if quick else 64})


def wanted_inputs(quick, nucleus_prompts):
    """What `speed_models.py` makes; prompt lengths in tokens."""
    longest = 48 if quick else 192
    demonstrations = {name: {"rows": rows, "shortest": 32, "longest": longest} for name, rows in [("sft-9m", 16), ("sft-52m", 4), ("sft-135m", 4)]}
    if quick:
        demonstrations = {name: shape | {"rows": 4} for name, shape in demonstrations.items()}
    answers = {"prompt_length": PROMPT_LENGTH, "shortest": 16, "longest": 48}
    prompts = {"prompts-ppo": [4 if quick else 32, PROMPT_LENGTH], "prompts-nucleus": [nucleus_prompts, 20], "prompts-nucleus-few": [2, 20]}
    for row in rows(quick).values():
        if row.kind in ("sample", "sample-q8"):
            prompts |= {data: [int(data.split("-")[1]), PROMPT_LENGTH] for data in (row.data, f"prompts-{row.more['rows']}")}
    return {
        "models": ["9m", "52m", "135m", "135m-peaked"],
        "gguf": ["135m"],
        "sft": demonstrations,
        "reward": {"pairs": answers | {"prompts": 4 if quick else 16, "answers": 2}, "ranked": answers | {"prompts": RANKED, "answers": ranked_answers(quick)}},
        "prompts": prompts,
    }


def words(flags):
    """`--name value` for each; a flag without a value has `None`."""
    return [word for name, value in flags.items() for word in ([f"--{name}"] if value is None else [f"--{name}", str(value)])]


def execute(command, environment=None):
    """Runs it; gives what it wrote (both streams together), wall seconds, and the most memory it held, in MB."""
    started = time.monotonic()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{text[-4000:]}\nexit code {process.returncode}")
    return text, time.monotonic() - started, usage.ru_maxrss * 1024 / 1e6


def steady(row, seconds):
    """The median step after those left out."""
    return statistics.median(seconds[row.skipped:])


# Ours.

def training_flags(run, row, precision, threads, data):
    """The program and its flags, `--output` left out."""
    method = LORA if "lora" in row.more else {"method": "full"}
    common = {"model": run.inputs / row.model, "data": run.inputs / f"{data}.parquet", "threads": threads, "precision": precision,
              "max-steps": row.size + row.skipped, "quiet": None} | method
    if row.kind.endswith("ppo"):
        # TRL's settings; no token ends an answer, so that all have the same length.
        length = row.more["response_length"]
        return "ppo", common | {"reward-model": reward_adapter(run), "preset": "trl", "batch-size": row.unit, "ppo-epochs": row.more["epochs"], "response-length": length,
                                "stop-after": length, "epochs": 1000000, "sample-every": 0, "checkpoint-every": 1000000}
    size = batch_of(run, data)
    if row.kind.endswith("sft"):
        return "sft", common | TRAINING | {"batch-size": size, "max-length": MAX_LENGTH}
    return "reward", common | TRAINING | {"batch-size": size, "normalize": "none"}


def batch_of(run, data):
    """Rows of the file, all of which are one batch."""
    made = json.loads((run.inputs / "made.json").read_text())
    if data in made["sft"]:
        return made["sft"][data]["rows"]
    shape = made["reward"][data.removesuffix("-pairs")]
    return shape["prompts"] * (shape["answers"] * (shape["answers"] - 1) // 2 if data.endswith("-pairs") else 1)


def reward_adapter(run):
    """PPO's reward model as the programs make one: an adapter and a head on the policy's own base."""
    folder = run.output / "reward-adapter"
    flags = {"model": run.inputs / "9m", "data": run.inputs / "pairs-pairs.parquet", "normalize": "none", "max-steps": 1, "evaluation-share": 0, "quiet": None} | LORA
    if not (folder / "finished.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        execute([run.programs / "reward", "--output", folder, *words(flags)])
    return folder


def train_ours(run, row, precision, data=None):
    program, flags = training_flags(run, row, precision, run.threads, data or row.data)
    folder = run.output / "trained"
    shutil.rmtree(folder, ignore_errors=True)
    _, _, peak = execute([run.programs / program, "--output", folder, *words(flags)])
    steps = [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    at = [line["seconds"] for line in steps]
    seconds = [end - start for start, end in zip([0.0, *at], at)]
    tokens = round(statistics.median(line["tokens_per_second"] * (end - start) for line, start, end in zip(steps, [0.0, *at], at)))
    unit = row.unit or tokens
    return {"rate": unit / steady(row, seconds), "step_seconds": steady(row, seconds), "peak_mb": peak, "loss": steps[0]["loss"], "tokens": tokens, "seconds": seconds}


def sample_ours(run, row, precision, few, flags):
    """Tokens a second by the difference of a run over all prompts and of one over few, so that what is done once is left out."""
    found = []
    for data in (row.data, few):
        command = [run.programs / "sample", "--model", run.inputs / row.model, "--data", run.inputs / f"{data}.parquet", "--output", run.output / "sampled.parquet",
                   "--threads", run.threads, "--precision", precision, "--response-length", row.more["response_length"], *words(flags)]
        text, seconds, peak = execute(command)
        answers, mean = re.search(r"(\d+) answers to .* ([\d.]+) tokens on average", text).groups()
        found.append((int(answers) * float(mean), seconds, peak))
    (tokens, seconds, peak), (fewer, start, _) = found
    return {"rate": (tokens - fewer) / (seconds - start), "peak_mb": peak, "tokens": round(tokens - fewer), "seconds": [seconds, start]}


def threads_ours(run, row, precision, threads):
    """Seconds of the fastest steps, and the share of work and time that the first thread works alone, by `benches/scaling.py`."""
    program, flags = training_flags(run, row, precision, threads, row.data)
    seconds, (of_work, of_time, used, _) = scaling.measure(run.programs / program, run.output / "trained", flags, row.skipped)
    return {"rate": 1 / min(seconds), "step_seconds": min(seconds), "of_work": of_work, "of_time": of_time, "used": used, "seconds": seconds}


# TRL and transformers.

def baseline_spec(run, row, data):
    kind = row.kind.removesuffix("-k8").removesuffix("-q8")
    spec = {"kind": kind, "model": str(run.inputs / row.model), "data": str(run.inputs / f"{data}.parquet"), "threads": run.threads, "max_length": MAX_LENGTH,
            "output": str(run.output / "trained-by-trl"), "reward_model": str(run.inputs / "9m-reward")}
    return spec | row.more


def baseline(run, program, *arguments):
    """The lines of JSON that a program of the other interpreter prints, seconds, and the most memory it held."""
    environment = os.environ | {"OMP_NUM_THREADS": str(run.threads), "MKL_NUM_THREADS": str(run.threads), "CUDA_VISIBLE_DEVICES": ""}
    text, seconds, peak = execute([run.python, program, *arguments], environment)
    return [json.loads(line) for line in text.splitlines() if line.startswith("{\"")], seconds, peak


def search(run, row):
    """The settings that the baseline was tried with, and the fastest of them."""
    data = f"{row.data}-pairs" if row.kind == "reward-k8" else row.data
    steps = 2 if run.quick else SEARCH_STEPS
    (versions, *tried), seconds, _ = baseline(run, BASELINES, "search", json.dumps(baseline_spec(run, row, data) | {"steps": steps}))
    for one in tried:
        one["step_seconds"] = min(one["seconds"][1:] or one["seconds"])
    best = min((one for one in tried if not one["gave_up"]), key=lambda one: one["step_seconds"])
    return {"tried": tried, "numbers": best["numbers"], "layout": best["layout"], "wall": seconds} | versions


def run_baseline(run, row, best, data=None):
    spec = baseline_spec(run, row, data or row.data) | {"numbers": best["numbers"], "layout": best["layout"], "steps": row.size + row.skipped}
    (_, found), _, peak = baseline(run, BASELINES, "measure", json.dumps(spec))
    return of_baseline(row, found, peak)


def run_llama_cpp(run, row):
    spec = baseline_spec(run, row, row.data) | {"model": str(run.inputs / f"{row.model}-q8_0.gguf"), "prompt_length": PROMPT_LENGTH, "steps": row.size + row.skipped}
    (versions, found), _, peak = baseline(run, LLAMA_CPP, json.dumps(spec))
    return of_baseline(row, found, peak) | versions


def of_baseline(row, found, peak):
    unit = row.unit or found["tokens"]
    step = steady(row, found["seconds"])
    return found | {"rate": unit / step, "step_seconds": step, "peak_mb": peak}


def limit(run, row, tokens):
    """Seconds of the products of a step alone (`benches/speed_limit.py`), for a batch of so many tokens."""
    config = json.loads((run.inputs / row.model / "config.json").read_text())
    wanted = {"threads": run.threads, "products": speed_limit.products(row.kind, config, row, tokens, PROMPT_LENGTH)}
    (found,), _, _ = baseline(run, Path(speed_limit.__file__), json.dumps(wanted))
    return found


def sides(run, row, best):
    """The sides of a row by name, in the order in which they are measured: each runs once."""
    kind = row.kind
    if kind.startswith("threads-"):
        return {f"{precision} {threads}": (lambda p=precision, t=threads: threads_ours(run, row, p, t)) for precision in ("f32", "bf16") for threads in (1, 2)}
    if kind == "nucleus":
        flags = {"answers": row.more["answers"]}
        return {name: (lambda more=more: sample_ours(run, row, run.precisions[0], "prompts-nucleus-few", flags | more))
                for name, more in [("plain", {}), ("top-p 0.9", {"top-p": 0.9})]}
    if kind in ("sample", "sample-q8"):
        rows = row.more["rows"]
        # Room for as many rows at a time as the baseline has in a batch.
        flags = {"kv-cache-tokens": rows * (PROMPT_LENGTH + row.more["response_length"])}
        if kind == "sample-q8":
            ours = lambda: sample_ours(run, row, run.precisions[0], f"prompts-{rows}", flags | {"base-precision": "q8_0"})
            return {"rlhf, base in Q8_0": ours, "llama.cpp": lambda: run_llama_cpp(run, row)}
        found = {f"rlhf {precision}": (lambda p=precision: sample_ours(run, row, p, f"prompts-{rows}", flags)) for precision in run.precisions}
    elif kind == "reward-k8":
        found = {f"rlhf {precision}": (lambda p=precision: train_ours(run, row, p)) for precision in run.precisions}
        found["rlhf, pairs"] = lambda: train_ours(run, row, run.precisions[0], f"{row.data}-pairs")
        return found | {"TRL": lambda: run_baseline(run, row, best, f"{row.data}-pairs")}
    else:
        found = {f"rlhf {precision}": (lambda p=precision: train_ours(run, row, p)) for precision in run.precisions}
    return found | {"TRL" if kind != "sample" else "transformers": lambda: run_baseline(run, row, best)}
