"""SmolLM2-135M-Instruct through the whole of InstructGPT with people's data: fine-tuning, reward model, PPO, a judge that was not trained against, evaluation.

    python benches/smollm2_data.py DATA runs/smollm2/data
    python benches/smollm2.py target/release MODEL runs/smollm2 [--seeds 0,1,2] [--stages sft,reward,judge,ppo,evaluate]

MODEL is the model's folder in bf16. Every stage is a run of a program with the flags below; one that is over is not run again, one that was interrupted (Ctrl-C, SIGKILL,
a machine that is switched off) goes on where it was, so that the whole may take days. Stages run one after another, of all seeds before the next stage. Prints the
tables that `benches/results/smollm2.md` holds, of what is there; needs Python's standard library alone.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

LORA = {"method": "lora", "lora-r": 16, "lora-alpha": 32, "target-modules": "all-linear"}
LENGTH = {"max-length": 512}


def stages(model, output, seed):
    """Each stage's program and flags. The judge has another seed and the other half of the rankings."""
    data = output / "data"
    own = lambda name: output / f"{name}-{seed}"
    ranked = LENGTH | LORA | {"model": own("sft"), "evaluation-data": data / "rankings-test.parquet", "epochs": 1, "batch-size": 16, "learning-rate": 1e-4,
                              "evaluate-every": 1000, "checkpoint-every": 10}
    return {
        "sft": ("sft", LENGTH | LORA | {
            "model": model, "data": data / "demonstrations-train.parquet", "evaluation-data": data / "demonstrations-test.parquet", "epochs": 1, "batch-size": 16,
            "learning-rate": 2e-4, "evaluate-every": 1000, "checkpoint-every": 10}),
        "reward": ("reward", ranked | {"data": data / "rankings-first.parquet", "demonstrations": data / "demonstrations-test.parquet"}),
        "judge": ("reward", ranked | {"data": data / "rankings-second.parquet", "demonstrations": data / "demonstrations-test.parquet", "seed": seed + 100}),
        "ppo": ("ppo", LENGTH | LORA | {
            "model": own("sft"), "reward-model": own("reward"), "data": data / "prompts-train.parquet", "batch-size": 32,
            "response-length": 64, "max-steps": 40, "learning-rate": 5e-5, "missing-eos-penalty": 1, "ptx-data": data / "demonstrations-train.parquet",
            "policy-every": 10, "sample-every": 10, "checkpoint-every": 1}),
        "evaluate": ("evaluate", LENGTH | {
            "models": [f"base={model}", f"sft={own('sft')}", f"ppo={own('ppo')}"], "reward-model": own("judge"), "data": data / "prompts-test.parquet",
            "response-length": 64, "perplexity": data / "demonstrations-test.parquet"}),
    }


def words(flags):
    found = []
    for name, value in flags.items():
        found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found


def run(programs, output, name, seed, program, flags):
    """Runs a stage unless it is over, from where it was."""
    folder = output / f"{name}-{seed}"
    if (folder / "finished.json").exists() or (folder / "evaluation.json").exists() and program == "evaluate":
        return
    command = [programs / program, "--output", folder, "--quiet", *words({"seed": seed} | flags)]
    if (folder / "checkpoints").is_dir():
        command.append("--resume")
    print(shlex.join(map(str, command)), file=sys.stderr, flush=True)
    done = subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        sys.exit(f"{name}-{seed} ended with {done.returncode}")


def metrics(folder):
    """The lines of a run's metrics."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def spread(values, digits=3):
    """Mean and standard deviation over seeds."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def table(header, lines):
    return "\n".join(["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |", *("| " + " | ".join(line) + " |" for line in lines), ""])


def last(rows, name):
    """The last value of a metric."""
    return next((row[name] for row in reversed(rows) if name in row), None)


def report(output, seeds):
    """Tables of what there is."""
    cost, training = [], []
    for name in ("sft", "reward", "judge", "ppo"):
        runs = [rows for rows in (metrics(output / f"{name}-{seed}") for seed in seeds) if rows]
        if not runs:
            continue
        of = lambda metric: [value for value in (last(rows, metric) for rows in runs) if value is not None]
        cost.append([f"`{name}`", str(len(runs)), spread([value / 60 for value in of("seconds")], 1), spread(of("peak_rss_mb"), 0)])
        for metric in ("evaluation_loss", "evaluation_accuracy", "objective/scores", "objective/kl"):
            if of(metric):
                training.append([f"`{name}`", metric, spread([next(row[metric] for row in rows if metric in row) for rows in runs]), spread(of(metric))])
    print(table(["stage", "seeds", "minutes", "peak, MB"], cost))
    print(table(["stage", "metric", "first", "last"], training))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--stages", default="sft,reward,judge,ppo,evaluate")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    for name in filter(None, given.stages.split(",")):
        for seed in seeds:
            program, flags = stages(given.model, given.output, seed)[name]
            run(given.programs, given.output, name, seed, program, flags)
    report(given.output, seeds)


if __name__ == "__main__":
    main()
