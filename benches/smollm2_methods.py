"""Every method on SmolLM2-135M-Instruct: fine-tuning, classification, questions and summaries in and out of domain, and what instruction tuning does to tasks it has never seen.

    python benches/smollm2_data.py DATA runs/smollm2/data
    python benches/smollm2_methods.py target/release MODEL runs/smollm2 [--stages tuning,heads,words,domains,zero-shot] [--methods lora,ia3] [--kept benches/results/smollm2]

As `benches/smollm2.py`, whose runs and tables these stand beside: a run that is over is not run again, one that was interrupted goes on. One seed.

    tuning      every method on people's demonstrations: held-out loss, ROUGE-L with people's answers; how often the judge of seed 0 prefers the answers to the base's
    heads       every method with a head that tells what people have called toxic (`--objective classification`)
    words       the same by the language model's own words (`--label-words`)
    domains     questions and summaries of some of T0's data sets, asked on those and on others: F1, ROUGE-L (Lester et al. 2021, section 5; Li and Liang 2021, section 6.4)
    zero-shot   LoRA on T0's mixture without the data sets that are asked: accuracy by rank classification, three templates each (Wei et al. 2022; Sanh et al. 2022)
"""

import argparse
import json
from pathlib import Path

from smollm2 import LORA, ROOT, SHARED, interval, run, table

# Flags of each method but its learning rate, which is the program's.
METHODS = {
    "full": {"method": "full"},
    "lora": LORA,
    "dora": LORA | {"use-dora": True},
    "rslora": LORA | {"use-rslora": True},
} | {name: {"method": name} for name in ("prefix-tuning", "prompt-tuning", "p-tuning", "p-tuning-v2", "adapters", "ia3", "bitfit", "probing")}
COMPARED = ["full", "lora", "prompt-tuning", "prefix-tuning"]
CLASSES = ["harmless", "toxic"]
STAGES = ["tuning", "heads", "words", "domains", "zero-shot"]


def training(given, train, test, steps, more):
    data = given.output / "data"
    found = SHARED | {"model": given.model, "data": data / f"{train}.parquet", "batch-size": 16, "max-steps": steps, "checkpoint-every": "2min"} | more
    return found | ({"evaluation-data": data / f"{test}.parquet"} if test else {"evaluation-share": 0})


def runs(given, stage):
    """Name, program and flags of each run of a stage."""
    data = given.output / "data"
    of = lambda name, method: given.output / f"{name}-{method}-0"
    models = lambda name, methods: [f"base={given.model}", *(f"{method}={of(name, method)}" for method in methods)]
    if stage == "tuning":
        for method in given.methods:
            yield f"tuning-{method}", "sft", training(given, "demonstrations-train", "demonstrations-test", 60, METHODS[method])
        yield "tuning-evaluate", "evaluate", SHARED | {
            "models": models("tuning", given.methods), "data": data / "prompts-judged.parquet", "reward-model": given.output / "judge-0", "response-length": 128,
            "tasks": data / "answers-test.parquet"}
    elif stage in ("heads", "words"):
        more = {"objective": "classification", "labels": ",".join(CLASSES)} | ({"label-words": ",".join(CLASSES)} if stage == "words" else {})
        for method in given.methods:
            yield f"{stage}-{method}", "sft", training(given, "labelled-train", "labelled-test", 60, METHODS[method] | more)
    elif stage == "domains":
        for kind in ("questions", "summaries"):
            for method in (method for method in COMPARED if method in given.methods):
                yield f"{kind}-{method}", "sft", training(given, f"{kind}-train", None, 40, METHODS[method])
            yield f"{kind}-evaluate", "evaluate", SHARED | {
                "models": models(kind, [method for method in COMPARED if method in given.methods]), "tasks": data / f"{kind}-test.parquet", "most-classes": 1}
    else:
        yield "zero-shot-lora", "sft", training(given, "zero-shot-train", None, 150, METHODS["lora"])
        yield "zero-shot-evaluate", "evaluate", SHARED | {"models": models("zero-shot", ["lora"]), "tasks": data / "zero-shot-test.parquet"}


def report(kept):
    """Tables of what is kept."""
    of = {path.stem.removesuffix("-0"): json.loads(path.read_text()) for path in sorted(kept.glob("*-0.json"))}
    for stage in ("tuning", "heads", "words", "questions", "summaries", "zero-shot"):
        names = [name for name in (f"{stage}-{method}" for method in METHODS) if name in of]
        metrics = sorted({metric for name in names for metric in of[name].get("curves", {}) if metric.startswith("evaluation_")})
        lines = []
        for name in names:
            run = of[name]
            last = [run.get("curves", {}).get(metric) for metric in metrics]
            lines.append([f"`{name}`", run.get("trainable", "-"), run.get("learning_rate", "-"), *(f"{curve[-1][1]:.3f}" if curve else "-" for curve in last),
                          f"{run['minutes']:.1f}", f"{run['peak_mb']} ({100 * (run['expected_mb'] / run['peak_mb'] - 1):+.0f}%)"])
        if lines:
            print(table(["run", "trainable", "learning rate", *(metric.replace("_", " ") for metric in metrics), "minutes", "peak, MB (expected)"], lines))
        evaluation = of.get(f"{stage}-evaluate", {}).get("evaluation", {})
        for measure, tasks in evaluation.get("tasks", {}).items():
            if isinstance(tasks, dict) and all("models" in found for found in tasks.values()):
                models = list(next(iter(tasks.values()))["models"])
                print(table([measure.replace("_", " "), *models], [[task, *(interval(found["models"][model], True) if found["models"][model] else "-" for model in models)] for task, found in tasks.items()]))
        preferred = {model: measured["preferred_to_base"] for model, measured in evaluation.get("models", {}).items() if measured.get("preferred_to_base")}
        if preferred:
            print(table(["", "preferred to the base's answers"], [[model, interval(measure, True)] for model, measure in preferred.items()]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--kept", type=Path, default=ROOT / "benches/results/smollm2", help="folder of what runs measured")
    given = parser.parse_args()
    given.methods = given.methods.split(",")
    for stage in filter(None, given.stages.split(",")):
        for name, program, flags in runs(given, stage):
            run(given, name, given.output / f"{name}-0", 0, program, flags)
    report(given.kept)


if __name__ == "__main__":
    main()
