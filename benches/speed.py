"""The speed table: our programs beside TRL 1.12.0 and transformers on the same processor, and beside themselves in other settings.

    python benches/speed.py target/release runs/speed --python VENV/bin/python [--rows sft-lora-9m,ppo] [--runs 3] [--quick]

The baselines run in an interpreter of their own: `python3 -m venv VENV && VENV/bin/pip install trl==1.12.0 peft torch transformers datasets pyarrow
gguf llama-cpp-python` (the last builds llama.cpp for this processor); this
program needs only Python's standard library and Linux. Weights are random, texts are from `data/` (or `--data`).

Each row is measured in processes of their own, sides in turn (A B A B ...), after a search for the baseline's fastest setting (`benches/speed_trl.py`, which says
what is equal on both sides). What is done once, such as loading, is left out. Results are added to `raw.jsonl` in the output folder as they come, and a run that
was interrupted goes on there; other programs, versions, threads or inputs are measured anew. The table, `benches/results/speed.md` (with --quick in
the output folder), is written after every row. `--quick` shows that every row works, its numbers mean nothing. Measure on a machine that does nothing else: PyTorch's
threads wait for each other by spinning, so that other work slows the baselines more than it slows our programs.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import speed_report
from speed_rows import Run, execute, limit, rows, search, sides, wanted_inputs

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("sft", "reward", "ppo", "sample")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=Path, help="folder of the programs, such as target/release")
    parser.add_argument("output", type=Path, help="folder for models, data and raw results")
    parser.add_argument("--python", type=Path, required=True, help="interpreter of the baselines, with trl 1.12.0; makes models and data too")
    parser.add_argument("--rows", default="", help="rows to measure, separated by commas [default: all]")
    parser.add_argument("--runs", type=int, default=3, help="repetitions of each side of a row")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of both sides [default: one per core]")
    parser.add_argument("--precision", default="f32", help="--precision of our programs beside the baselines: f32, bf16 or both, as f32,bf16")
    parser.add_argument("--data", type=Path, default=ROOT / "data/pretrain.parquet", help="Parquet file of texts (column text, or prompt and completion)")
    parser.add_argument("--nucleus-prompts", type=int, default=40, help="prompts of the row nucleus, each with 25 answers")
    parser.add_argument("--report", type=Path, help="Markdown file to write [default: benches/results/speed.md]")
    parser.add_argument("--criterion", action="store_true", help="run cargo bench --bench training_step too (candle's own operations)")
    parser.add_argument("--quick", action="store_true", help="tiny models' work and one run of each side: shows that every row works")
    given = parser.parse_args()
    known = rows(given.quick)
    given.rows = given.rows.split(",") if given.rows else list(known)
    unknown = [row for row in given.rows if row not in known]
    if unknown:
        sys.exit(f"--rows has no {', '.join(unknown)}; expected some of {', '.join(known)}")
    if given.quick:
        given.runs, given.nucleus_prompts = 1, min(given.nucleus_prompts, 6)
    return given


class Raw:
    """Results as they came, a line each; those of the same setup are not measured again."""

    def __init__(self, path, setup):
        self.path, self.setup = path, setup
        lines = path.read_text().splitlines() if path.exists() else []
        self.records = [record for record in map(json.loads, lines) if record["setup"] == setup]

    def of(self, row, side=None):
        return [record for record in self.records if record["row"] == row and side in (None, record["side"])]

    def get(self, row, side, run, measure):
        for record in self.of(row, side):
            if record["run"] == run:
                return record
        started = time.monotonic()
        record = {"setup": self.setup, "row": row, "side": side, "run": run} | measure()
        record["took"] = time.monotonic() - started
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{row}, {side}, run {run}: {record.get('rate', 0):.4g} a second, took {record['took']:.0f} s", file=sys.stderr, flush=True)
        return record


def setup_of(given):
    """What results depend on, as a short hash: the programs, the baselines' code and packages, inputs, threads."""
    digest = hashlib.sha256()
    benches = Path(__file__).resolve().parent
    for path in [given.programs / name for name in PROGRAMS] + sorted(benches.glob("speed_*.py")):
        digest.update(path.read_bytes() if path.name != "speed_report.py" else b"")
    packages = subprocess.run([given.python, "-m", "pip", "freeze"], capture_output=True, text=True).stdout
    # Some sides of ours run in the first precision alone.
    if not given.precision.startswith("f32"):
        digest.update(given.precision.encode())
    digest.update(repr([packages, given.threads, str(given.data.resolve()), given.nucleus_prompts, given.quick, speed_report.processor()]).encode())
    return digest.hexdigest()[:12]


def make_inputs(given, run):
    wanted = wanted_inputs(given.quick, given.nucleus_prompts)
    maker = Path(__file__).resolve().parent / "speed_models.py"
    wanted["of"] = hashlib.sha256(maker.read_bytes() + given.data.read_bytes()).hexdigest()[:12]
    made = run.inputs / "made.json"
    if not made.exists() or json.loads(made.read_text()) != wanted:
        # A reward model is made for the weights and tokenizer that were there.
        shutil.rmtree(run.output / "reward-adapter", ignore_errors=True)
        # Parquet files and tokenizer of other data would stay.
        shutil.rmtree(run.inputs, ignore_errors=True)
        execute([given.python, maker, run.inputs, given.data, json.dumps(wanted)])


def measure(given, run, raw, name):
    row = rows(given.quick)[name]
    best = raw.get(name, "search", 0, lambda: search(run, row)) if row.is_searched else None
    # Of threads and precision the shortest step counts, and there are four sides.
    for number in range(min(given.runs, 2) if name.startswith("threads-") else given.runs):
        for side, once in sides(run, row, best).items():
            raw.get(name, side, number, once)
        # Next to the runs that it is compared with; its products are in f32.
        if row.is_searched:
            tokens = raw.of(name, f"rlhf {run.precisions[0]}")[0]["tokens"]
            raw.get(name, "limit", number, lambda: limit(run, row, tokens))


def criterion(raw):
    """What criterion prints: estimates of the times a step, memory and processor time."""
    def bench():
        done = subprocess.run(["cargo", "bench", "--bench", "training_step"], cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"cargo bench: {done.stderr[-4000:]}")
        return {"text": done.stdout}
    raw.get("criterion", "candle", 0, bench)


def main():
    given = arguments()
    given.programs, given.output = given.programs.resolve(), given.output.resolve()
    given.output.mkdir(parents=True, exist_ok=True)
    run = Run(given.programs, given.python, given.output, given.threads, given.precision.split(","), given.quick)
    report = given.report or (given.output / "speed.md" if given.quick else ROOT / "benches/results/speed.md")
    make_inputs(given, run)
    raw = Raw(given.output / "raw.jsonl", setup_of(given))
    write = lambda: report.write_text(speed_report.report(raw, rows(given.quick), sys.argv, given))
    for name in given.rows:
        measure(given, run, raw, name)
        write()
    if given.criterion:
        criterion(raw)
        write()
    print(report.read_text())


if __name__ == "__main__":
    main()
