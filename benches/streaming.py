"""Memory and time to the first step of sft on 10 thousand and on 10 million rows of Parquet or another form, which are made here.

    python benches/streaming.py target/release runs/streaming [rows of the large file] [rows of its row groups] [parquet | jsonl | jsonl.gz | csv | arrow]

Needs pyarrow and 2 GB of disk. The model is so small that what is held is the data path's. Prints a Markdown table.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet as pq

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64,
          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
          "bos_token_id": 1, "eos_token_id": 2}
WORDS = "the boat lamp chair coat clock bag ring hat cup door tree bird is of a colour that nobody here has seen before red green blue white".split()
STEPS = 700


def texts(first, count, words):
    """Texts of so many words, drawn by a linear congruential generator, no two rows alike."""
    state = pc.cast(pa.array(range(first, first + count)), pa.int64())
    vocabulary, parts = pa.array(WORDS), [pc.cast(state, pa.string())]
    for _ in range(words):
        state = pc.bit_wise_and(pc.add(pc.multiply(state, 1103515245), 12345), 0x7FFFFFFF)
        parts.append(pc.take(vocabulary, pc.subtract(pc.shift_right(state, 16), pc.multiply(pc.divide(pc.shift_right(state, 16), len(WORDS)), len(WORDS)))))
    return pc.binary_join_element_wise(*parts, " ")


def make(path, rows, rows_a_group, form):
    if path.exists():
        return
    schema = pa.schema([("prompt", pa.string()), ("completion", pa.string())])
    part = path.with_name(path.name + ".part")
    with Writer(part, schema, form) as writer:
        for first in range(0, rows, rows_a_group):
            count = min(rows_a_group, rows - first)
            writer.write(pa.table([texts(first, count, 12), texts(first + 7, count, 12)], schema=schema))
    part.rename(path)


class Writer:
    """Writes tables to a file of this form."""

    def __init__(self, path, schema, form):
        self.form = form
        if form == "parquet":
            self.file = pq.ParquetWriter(path, schema)
        elif form == "csv":
            self.file = pyarrow.csv.CSVWriter(path, schema)
        elif form == "arrow":
            self.file = pyarrow.ipc.new_file(str(path), schema)
        else:
            self.file = gzip.open(path, "wt", compresslevel=1) if form == "jsonl.gz" else open(path, "w")

    def write(self, table):
        if self.form == "parquet":
            self.file.write_table(table, row_group_size=len(table))
        elif self.form in ("csv", "arrow"):
            self.file.write_table(table)
        else:
            self.file.writelines(json.dumps(row) + "\n" for row in table.to_pylist())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def resident(process, name):
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def run(program, output, model, data, steps):
    """Seconds from the start to the first step, memory after it and at its peak, before and after the evaluation."""
    metrics = output / "metrics.jsonl"
    shutil.rmtree(output, ignore_errors=True)
    started = time.monotonic()
    process = subprocess.Popen([program, "--model", model, "--data", data, "--output", output, "--max-steps", str(steps), "--max-length", "256",
                                "--checkpoint-every", "1000", "--quiet"])
    first = None
    while process.poll() is None:
        if first is None and metrics.exists() and metrics.stat().st_size > 0:
            first = (time.monotonic() - started, resident(process, "VmRSS"))
        time.sleep(0.005)
    if process.returncode != 0:
        sys.exit(process.returncode)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    trained = max(line["peak_rss_mb"] for line in lines if "loss" in line)
    return {"first": first[0], "resident": first[1], "peak": trained, "with_evaluation": lines[-1]["peak_rss_mb"]}


def main(programs, output, large=10_000_000, rows_a_group=100_000, form="parquet"):
    program, output, large = Path(programs).resolve() / "sft", Path(output), int(large)
    model = output / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(CONFIG))
    files = {rows: output / f"{rows}-by-{rows_a_group}.{form}" for rows in (10_000, large)}
    for rows, path in files.items():
        make(path, rows, int(rows_a_group), form)
    # A tokenizer of its own, so that none is trained on the data.
    run(program, output / "tokenizer", model, files[10_000], 1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((output / "tokenizer" / name).read_bytes())
    found = {rows: run(program, output / f"run-{rows}", model, path, STEPS) for rows, path in files.items()}
    print("| rows | file | row groups of | to the first step | resident then | peak of 700 steps | with the evaluation |\n| --- | --- | --- | --- | --- | --- | --- |")
    for rows, of in found.items():
        size = os.path.getsize(files[rows]) / 1e6
        print(f"| {rows:,} | {size:,.0f} MB | {int(rows_a_group):,} rows | {of['first']:.2f} s | {of['resident']:.0f} MB | {of['peak']:.0f} MB | "
              f"{of['with_evaluation']:.0f} MB |")
    few, many = found[10_000], found[large]
    ratios = ", ".join(f"{what} {many[key] / few[key]:.2f}" for what, key in
                       [("resident", "resident"), ("peak", "peak"), ("with the evaluation", "with_evaluation")])
    print(f"\n{large:,} rows over 10,000 rows: {ratios}")


if __name__ == "__main__":
    main(*sys.argv[1:])
