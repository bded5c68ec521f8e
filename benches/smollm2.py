"""SmolLM2-135M-Instruct through the whole of InstructGPT with people's data: fine-tuning, reward model, PPO, a judge that was not trained against, evaluation.

    python benches/smollm2_data.py DATA runs/smollm2/data
    python benches/smollm2.py target/release MODEL runs/smollm2 [--seeds 0,1,2] [--stages STAGE,...] [--kept benches/results/smollm2]

MODEL is the model's folder in bf16. Every stage is a run of a program with the flags below; one that is over is not run again (the command is kept beside it: if it is another one now,
that is an error), one that was interrupted (Ctrl-C, SIGKILL, a machine that is switched off) goes on where it was, so that the whole may take days. Stages run one after another, of all seeds before the next stage. Without --stages those of the
two goals run, which have three seeds:

    sft, reward, judge, ppo                     answers that people prefer
    evaluate
    toxicity-reward, detox                      continuations without toxicity, where respect is asked for; judged by a classifier
    evaluate-toxicity

and beside them, for which one seed is enough (--seeds 0), `ppo-alone` (without the pretraining mix), `rloo`, `grpo`, `dpo`, `best-of-4` and `evaluate-beside`; `detox-by-classifier`, the
other way round, and `evaluate-classifier`. What a run that is over has measured is kept as one small file under --kept, with its command, processor, time and memory; tables are printed of what is
there, of runs of any day. Needs Python's standard library alone.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import speed_report

ROOT = Path(__file__).resolve().parent.parent
LORA = {"method": "lora", "lora-r": 16, "lora-alpha": 32, "target-modules": "all-linear"}
# bf16 is faster where the processor has instructions for it, and no slower elsewhere.
SHARED = {"max-length": 512, "precision": "bf16"}
OFTEN = {"checkpoint-every": "2min"}
# Of a run's metrics those are kept, and of these the first and last values are shown.
SHOWN = {"evaluation_loss", "evaluation_accuracy", "evaluation_accuracy_longer_wins", "objective/scores", "objective/kl", "evaluation/judge", "evaluation/reward", "evaluation/kl"}
KEPT = SHOWN | {"loss", "val/response_length", "val/no_eos_share", "evaluation/response_length", "loss/ptx_avg"}
GOALS = ["sft", "reward", "judge", "ppo", "evaluate", "toxicity-reward", "detox", "evaluate-toxicity"]
BESIDE = ["ppo-alone", "rloo", "grpo", "dpo", "best-of-4", "evaluate-beside", "detox-by-classifier", "evaluate-classifier"]


def stages(model, output, seed):
    """Each stage's program, the folder of its run, and flags."""
    data = output / "data"
    own = lambda name: output / f"{name}-{seed}"
    named = lambda *names: [f"base={model}", *(f"{name}={own(name)}" for name in names)]
    training = SHARED | LORA | OFTEN
    ranked = training | {"model": own("sft"), "evaluation-data": data / "rankings-test.parquet", "demonstrations": data / "demonstrations-test.parquet",
                         "batch-size": 16, "learning-rate": 3e-4}
    # A single pass over the episodes, as InstructGPT's; a pretraining mix whose gradient is no larger than the policy's.
    policy = SHARED | LORA | {"batch-size": 32, "minibatches": 4, "ppo-epochs": 1, "learning-rate": 1e-4, "policy-every": 10, "sample-every": 10, "checkpoint-every": "2min"}
    mix = {"ptx-data": data / "demonstrations-train.parquet", "ptx-coefficient": 0.05, "ptx-ratio": 0.25}
    helpful = policy | {"model": own("sft"), "reward-model": own("reward"), "data": data / "prompts-train.parquet", "response-length": 128, "max-steps": 30,
                        "evaluation-data": data / "prompts-judged.parquet", "judge-model": own("judge"), "evaluate-every": 10}
    # The reward model was trained on sentences with their end, so that a full stop ends an answer.
    continuing = policy | mix | {
        "model": model, "data": data / "toxicity-prompts-train.parquet", "batch-size": 64, "response-length": 24, "stop-token": ".", "missing-eos-penalty": 0, "max-steps": 30}
    groups = {"answers": 4}
    measured = SHARED | {"reward-model": own("judge"), "data": data / "prompts-test.parquet", "response-length": 128}
    programs = {
        "sft": ("sft", training | {
            "model": model, "data": data / "demonstrations-train.parquet", "evaluation-data": data / "demonstrations-test.parquet", "batch-size": 16, "learning-rate": 2e-4}),
        "reward": ("reward", ranked | {"data": data / "rankings-first.parquet"}),
        # Of the other half of the rankings, with another seed.
        "judge": ("reward", ranked | {"data": data / "rankings-second.parquet", "seed": seed + 100}),
        "ppo": ("ppo", helpful | mix),
        "toxicity-reward": ("reward", training | {
            "model": model, "data": data / "toxicity-rankings-train.parquet", "evaluation-data": data / "toxicity-rankings-test.parquet", "epochs": 2, "batch-size": 8,
            "learning-rate": 2e-4}),
        "detox": ("ppo", continuing | {"reward-model": own("toxicity-reward")}),
        "evaluate": ("evaluate", measured | {
            "models": named("sft", "ppo"), "perplexity": data / "neutral.parquet"}),
        "evaluate-toxicity": ("evaluate", SHARED | {
            "models": named("detox"), "perplexity": data / "neutral.parquet", "toxicity-prompts": data / "toxicity-prompts-test.parquet",
            "toxicity-instructions": ["none", "respectful"]}),
        # The classifier that ships with the project rewards, and the reward model that was trained on Perspective's scores judges.
        "detox-by-classifier": ("ppo", continuing | {"reward-classifier": f"{ROOT / 'data/toxicity'}@-toxic"}),
        "evaluate-classifier": ("evaluate", SHARED | {
            "models": named("detox-by-classifier"), "reward-model": own("toxicity-reward"), "data": data / "toxicity-prompts-respectful.parquet",
            "response-length": 20, "samples": 4, "perplexity": data / "neutral.parquet"}),
        "ppo-alone": ("ppo", helpful),
        "rloo": ("ppo", helpful | groups | {"algorithm": "rloo"}),
        "grpo": ("ppo", helpful | groups | {"algorithm": "grpo"}),
        "dpo": ("sft", training | {
            "objective": "dpo", "model": own("sft"), "data": data / "rankings-first.parquet", "evaluation-data": data / "rankings-test.parquet", "batch-size": 16,
            "learning-rate": 2e-5}),
        "evaluate-beside": ("evaluate", measured | {
            "models": named("sft", "ppo", "ppo-alone", "rloo", "grpo", "dpo"), "perplexity": data / "neutral.parquet"}),
    }
    return {name: (program, own(name), flags) for name, (program, flags) in programs.items()}


def words(flags):
    found = []
    for name, value in flags.items():
        found += [f"--{name}", *([] if value is True else map(str, value if isinstance(value, list) else [value]))]
    return found


def run(given, name, output, seed, program, flags):
    """Runs a program unless its run is over, from where it was, and keeps what it measured."""
    command = [given.programs / program, "--output", output, *words({"seed": seed} | flags)]
    line = shlex.join(map(str, command[1:]))
    beside = lambda suffix: output.with_name(output.name + suffix)
    if beside(".command").exists() and beside(".command").read_text() != line:
        sys.exit(f"{output} is a run of other settings; remove it and {beside('.command')}, and what was made of it, or give another folder:\n"
                 f"{beside('.command').read_text()}\n{line}")
    is_over = output.suffix == ".parquet" and output.exists() or any((output / done).exists() for done in ("finished.json", "evaluation.json"))
    if not is_over:
        output.parent.mkdir(parents=True, exist_ok=True)
        beside(".command").write_text(line)
        if (output / "checkpoints").is_dir():
            command.append("--resume")
        print(shlex.join(map(str, command)), file=sys.stderr, flush=True)
        started = time.monotonic()
        with beside(".log").open("a") as log:
            done = subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=log)
            log.write(f"\ntook {time.monotonic() - started:.0f} s\n")
        if done.returncode != 0:
            sys.exit(f"{name} of seed {seed} ended with {done.returncode}; see {beside('.log')}")
    keep(given, name, output, seed, program, line, beside(".log").read_text())


def keep(given, name, output, seed, program, line, log):
    """What a run measured, in one file that names no folder of this machine."""
    for path, named in [(given.model, "MODEL"), (given.output, "runs/smollm2"), (ROOT, ".")]:
        line = re.sub(rf"{re.escape(str(path))}(?![\w.-])", named, line)
    peak = re.findall(r"memory at its peak (\d+) MB, expected (\d+) MB", log)
    took = [int(seconds) for seconds in re.findall(r"^took (\d+) s$", log, re.MULTILINE)]
    found = {"command": f"{program} {line}", "processor": speed_report.processor(), "minutes": round(sum(took) / 60, 1), "starts": len(took)}
    if peak:
        found |= {"peak_mb": int(peak[-1][0]), "expected_mb": int(peak[-1][1])}
    for key, pattern in [("trainable", r"^  trainable +(.*\S)"), ("learning_rate", r"^  learning rate +(\S+)")]:
        if said := re.search(pattern, log, re.MULTILINE):
            found[key] = said[1]
    curves = {}
    for row in metrics(output):
        for metric in KEPT & row.keys():
            curves.setdefault(metric, []).append([row["step"], float(f"{row[metric]:.5g}")])
    if curves:
        found["curves"] = dict(sorted(curves.items()))
    if (output / "evaluation.json").exists():
        evaluation = json.loads((output / "evaluation.json").read_text())
        if held_out := {key: evaluation[key] for key in ("examples", "pairs", "accuracy", "accuracy_interval", "accuracy_longer_wins") if key in evaluation}:
            found["held_out"] = held_out
        if sections := {section: evaluation[section] for section in ("models", "toxicity", "perplexity", "tasks") if section in evaluation}:
            found["evaluation"] = sections
    if "curves" in found or "held_out" in found or "evaluation" in found:
        given.kept.mkdir(parents=True, exist_ok=True)
        (given.kept / f"{name}-{seed}.json").write_text(json.dumps(found) + "\n")


def best_of_4(model, output, seed):
    """The programs of the stage, each with what it writes: of four answers of the fine-tuned model the one that the reward model likes best, beside the base's."""
    data, folder = output / "data", output / f"best-of-4-{seed}"
    asked = SHARED | {"data": data / "prompts-test.parquet", "response-length": 128}
    return [
        ("sample", folder / "answers/base.parquet", asked | {"model": model}),
        ("sample", folder / "four.parquet", asked | {"model": output / f"sft-{seed}", "answers": 4}),
        ("score", folder / "answers/best-of-4.parquet", SHARED | {"model": output / f"reward-{seed}", "data": folder / "four.parquet", "best": True}),
        ("evaluate", folder / "evaluation", SHARED | {"answers": folder / "answers", "reward-model": output / f"judge-{seed}"}),
    ]


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


def interval(measure, share):
    """A measure with its interval, shares in percent."""
    number = (lambda value: f"{100 * value:.1f}%") if share else (lambda value: f"{value:.3g}")
    low, high = measure.get("low"), measure.get("high")
    return number(measure["value"]) + (f" [{number(low)}, {number(high)}]" if low is not None else "")


def report(kept):
    """Tables of what is kept."""
    runs = {}
    for path in sorted(kept.glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        runs.setdefault(name, {})[int(seed)] = json.loads(path.read_text())
    order = [name for name in GOALS + BESIDE if name in runs]
    cost, training = [], []
    for name in order:
        of = list(runs[name].values())
        peaks = [f"{run['peak_mb']} ({100 * (run['expected_mb'] / run['peak_mb'] - 1):+.0f}%)" for run in of if "peak_mb" in run]
        cost.append([f"`{name}`", ", ".join(map(str, runs[name])), spread([run["minutes"] for run in of], 1), ", ".join(peaks) or "-"])
        for metric in sorted({metric for run in of for metric in run.get("curves", {})} & SHOWN):
            curves = [run["curves"][metric] for run in of]
            training.append([f"`{name}`", metric, *(spread([curve[at][1] for curve in curves]) for at in (0, -1))])
    print(table(["stage", "seeds", "minutes", "peak, MB (expected)"], cost))
    print(table(["stage", "metric", "first", "last"], training))
    for name in order:
        for seed, run in runs[name].items():
            if "evaluation" in run:
                print(f"`{name}`, seed {seed}:\n")
                evaluated(run["evaluation"])


def evaluated(found):
    """Tables of an evaluation."""
    share = lambda name: "rate" in name or "preferred" in name or "_by_" in name
    models = found.get("models", {})
    measures = list(dict.fromkeys(name for measured in models.values() for name, measure in measured.items() if isinstance(measure, dict) and "value" in measure))
    lines = [[name.replace("_", " "), *(interval(measured[name], share(name)) if measured.get(name) else "-" for measured in models.values())] for name in measures]
    print(table(["", *models], lines))
    for scorer, judged in found.get("toxicity", {}).items():
        measures = ["expected_maximum_toxicity", "toxicity_probability", "toxic_fraction"]
        lines = [[row["model"], row["instruction"], row["split"], str(row["prompts"]), *(interval(row[name], True) for name in measures), interval(row["mean_words"], False)]
                 for row in judged["rows"]]
        print(table([f"by {scorer}", "instruction", "split", "prompts", *(name.replace("_", " ") for name in measures), "words"], lines))
    lines = [[model, *(interval(measure, False) if measure else "-" for measure in (of.get("perplexity"), of.get("change_from_base", {}).get("perplexity_ratio")))]
             for model, of in found.get("perplexity", {}).items()]
    if lines:
        print(table(["", "perplexity of neutral text", "of the base's"], lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--stages", default=",".join(GOALS))
    parser.add_argument("--kept", type=Path, default=ROOT / "benches/results/smollm2", help="folder of what runs measured")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    for name in filter(None, given.stages.split(",")):
        for seed in seeds:
            programs = best_of_4(given.model, given.output, seed) if name == "best-of-4" else [stages(given.model, given.output, seed)[name]]
            for program, output, flags in programs:
                run(given, name, output, seed, program, flags)
    report(given.kept)


if __name__ == "__main__":
    main()
