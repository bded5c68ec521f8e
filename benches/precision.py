"""What precisions do to results: losses, accuracies, rewards and KL of fine-tuning, reward model and PPO, three seeds each, against f32 with the same seed.

    python benches/precision.py target/release MODEL DATA runs/precision
        [--steps 300] [--learning-rate 1e-3] [--updates 30] [--ppo-learning-rate 5e-4] [--batch-size 16] [--prompts 32] [--precisions f32,bf16,...]

MODEL is a folder in 16 or 32 bits, such as data/base; DATA a folder with demonstrations.parquet, rankings.parquet and prompts.parquet, such as data/. LoRA
everywhere. Every stage starts from the stage before in its own precision. Runs that are there are not run again, with whatever settings they were run.
Prints a Markdown table: of each quantity the mean over seeds in f32, the standard deviation over seeds, and for each precision the mean of the
differences from f32 with the same seed and the largest of them. Where differences are far below the deviation over seeds, another seed changes more than the precision does.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

SEEDS = [0, 1, 2]
PRECISIONS = {
    "f32": {},
    "bf16": {"precision": "bf16"},
    "q8_0 base": {"base-precision": "q8_0"},
    "q4_k base": {"base-precision": "q4_k"},
    "bf16 cache": {"cache-precision": "bf16"},
}
# The quantities of each stage, by their names in metrics.jsonl.
QUANTITIES = {
    "sft": {"evaluation_loss": "loss on held-out demonstrations"},
    "reward": {"evaluation_loss": "loss on held-out rankings", "evaluation_accuracy": "accuracy on held-out pairs"},
    "ppo": {"objective/scores": "score of answers, last third", "objective/kl": "KL from the reference, nats an answer, last third"},
}


def run(program, output, flags):
    if not (output / "finished.json").exists():
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        done = subprocess.run([str(program), "--output", str(output), "--quiet", *words], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{program} {' '.join(words)}: {done.stderr}")
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def quantity(stage, rows, name):
    values = [row[name] for row in rows if name in row]
    return statistics.fmean(values[-(len(values) // 3 or 1):]) if stage == "ppo" else min(values) if "loss" in name else values[-1]


def results(given, precision, seed):
    """The quantities of all stages, by stage and name."""
    programs, model, data = given.programs.resolve(), given.model, given.data
    folder = given.output / f"{precision.replace(' ', '-')}-{seed}"
    # Only sampling has a cache.
    common = {name: value for name, value in PRECISIONS[precision].items() if name != "cache-precision"} | {"seed": seed, "method": "lora"}
    training = common | {"model": model, "evaluation-share": 0.1, "evaluate-every": given.steps, "max-steps": given.steps,
                         "batch-size": given.batch_size, "learning-rate": given.learning_rate}
    sft = run(programs / "sft", folder / "sft", training | {"data": data / "demonstrations.parquet"})
    reward = run(programs / "reward", folder / "reward", training | {"data": data / "rankings.parquet"})
    sampling = common | PRECISIONS[precision]
    ppo = run(programs / "ppo", folder / "ppo", sampling | {
        "model": folder / "sft", "reward-model": folder / "reward", "data": data / "prompts.parquet", "batch-size": given.prompts,
        "response-length": 40, "max-length": 256, "max-steps": given.updates, "learning-rate": given.ppo_learning_rate})
    stages = {"sft": sft, "reward": reward, "ppo": ppo}
    return {(stage, name): quantity(stage, stages[stage], name) for stage, names in QUANTITIES.items() for name in names}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("programs", "model", "data", "output"):
        parser.add_argument(name, type=Path)
    for name, default in {"steps": 300, "learning-rate": 1e-3, "updates": 30, "ppo-learning-rate": 5e-4, "batch-size": 16, "prompts": 32}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    given = parser.parse_args()
    precisions = list(dict.fromkeys(["f32", *given.precisions.split(",")]))
    found = {(precision, seed): results(given, precision, seed) for precision in precisions for seed in SEEDS}
    others = [precision for precision in precisions if precision != "f32"]
    print(f"| stage | quantity | f32, mean | deviation over seeds | {' | '.join(f'{other}: mean difference (largest)' for other in others)} |")
    print("| --- | --- | --- | --- |" + " --- |" * len(others))
    for stage, names in QUANTITIES.items():
        for name, words in names.items():
            exact = [found["f32", seed][stage, name] for seed in SEEDS]
            cells = []
            for other in others:
                differences = [found[other, seed][stage, name] - value for seed, value in zip(SEEDS, exact)]
                cells.append(f"{statistics.fmean(differences):+.2g} ({max(differences, key=abs):+.2g})")
            print(f"| {stage} | {words} | {statistics.fmean(exact):.4g} | {statistics.stdev(exact):.2g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
