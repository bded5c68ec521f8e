"""Each method through sft on the embedded world, on the same budget of steps, and the best of a few learning rates by evaluation loss.

    python benches/world_methods.py target/release data runs/world-methods [first] [second]

Needs pyarrow. Prints a table (trainable share, size on disk, losses, hallucination, toxicity, time, memory), and a second one: full weights against prompt and prefix tuning, trained on passages
without two kinds of facts, asked about the kinds that they saw and about those that they did not, by token F1 (SQuAD's) and ROUGE-L.
"""

import collections
import json
import re
import string
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

RATES = {
    "full": [5e-4],
    "probing": [1e-3, 5e-3],
    "bitfit": [2e-3, 1e-2],
    "lora": [5e-3, 2e-2],
    "lora --target-modules all-linear": [5e-3, 1e-2],
    "prompt-tuning": [3e-2, 1e-1],
    "p-tuning": [3e-3, 1e-2],
    "prefix-tuning": [1e-2, 5e-2],
    "p-tuning-v2": [1e-2, 5e-2],
    "adapters": [2e-3, 5e-3],
    "ia3": [1e-2, 5e-2],
}
COMPARED = ["full", "prompt-tuning", "prefix-tuning"]
UNSEEN = re.compile(r"\b(plays?|married)\b")


def run(program, arguments):
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{program}: {done.stderr}")
    return done.stderr


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def sft(programs, data, demonstrations, output, method, rate):
    printed = run(programs / "sft", ["--model", data / "base", "--data", demonstrations, "--evaluation-data", data / "demonstrations-test.parquet",
                           "--output", output, "--batch-size", 16, "--epochs", 3, "--max-length", 256,
                           "--method", *method.split(), "--learning-rate", rate])
    (output / "trainable.txt").write_text(re.search(r"trainable +([\d,]+ \([\d.]+%\))", printed).group(1))
    return min(line["evaluation_loss"] for line in metrics(output) if "evaluation_loss" in line)


def best(programs, data, demonstrations, folder, method):
    """The run with the lowest evaluation loss."""
    runs = []
    for rate in RATES[method]:
        output = folder / f"{method.replace(' ', '_')}-{rate:g}"
        runs.append((sft(programs, data, demonstrations, output, method, rate), rate, output))
    return min(runs)


def evaluate(programs, data, models, output):
    run(programs / "evaluate", ["--models", *(f"{name}={folder}" for name, folder in models.items()), "--data", data / "evaluation.parquet",
                                "--output", output, "--response-length", 40, "--max-length", 256, "--quiet"])
    return json.loads((output / "evaluation.json").read_text()), pq.read_table(output / "answers.parquet").to_pylist()


def size(folder):
    """Bytes of what is saved."""
    names = ["adapter_model.safetensors", "adapter.safetensors", "model.safetensors"]
    return sum((folder / name).stat().st_size for name in names if (folder / name).is_file())


def first_line(row):
    """What counts as the answer."""
    return row["response"].strip().split("\n")[0]


def words(text):
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return [word for word in text.split() if word not in ("a", "an", "the")]


def f1(answer, expected):
    answer, expected = words(answer), words(expected)
    common = sum((collections.Counter(answer) & collections.Counter(expected)).values())
    return 2 * common / (len(answer) + len(expected)) if answer or expected else 1.0


def rouge_l(answer, expected):
    a, b = answer.lower().split(), expected.lower().split()
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            longest[i + 1][j + 1] = longest[i][j] + 1 if x == y else max(longest[i][j + 1], longest[i + 1][j])
    return 2 * longest[-1][-1] / (len(a) + len(b)) if a and b else 0.0


def first_table(programs, data, folder):
    chosen = {}
    for method in RATES:
        chosen[method] = best(programs, data, data / "demonstrations.parquet", folder, method)
        print(method, chosen[method], file=sys.stderr, flush=True)
    models = {"base": data / "base"} | {method.replace(" ", "_"): output for method, (_, _, output) in chosen.items()}
    evaluation, _ = evaluate(programs, data, models, folder / "evaluation")
    rates = evaluation["models"]
    print("| method | learning rate | trainable | on disk | evaluation loss | hallucination | toxicity | asked for respect | seconds | peak memory |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    print(f"| base | | | {size(data / 'base') / 1000:,.0f} kB | | {shown(rates['base'])} | | |")
    for method, (loss, rate, output) in chosen.items():
        last = metrics(output)[-1]
        memory = max(line.get("peak_rss_mb", 0) for line in metrics(output))
        found = rates[method.replace(" ", "_")]
        trainable = (output / "trainable.txt").read_text()
        print(f"| `{method}` | {rate:g} | {trainable} | {size(output) / 1000:,.0f} kB | {loss:.3f} | {shown(found)} | "
              f"{last['seconds']:.0f} | {memory:.0f} MB |")


def shown(rates):
    names = ["hallucination_rate", "toxicity_rate", "toxicity_rate_respectful"]
    return " | ".join(f"{100 * rates[name]['value']:.1f}%" for name in names)


def second_table(programs, data, folder):
    rows = pq.read_table(data / "demonstrations.parquet")
    seen = rows.filter([UNSEEN.search(row["prompt"] + row["completion"]) is None for row in rows.to_pylist()])
    path = folder / "demonstrations-without.parquet"
    pq.write_table(seen, path)
    print(f"\n{seen.num_rows} of {rows.num_rows} demonstrations without the kinds of facts that are asked about out of domain\n")
    models = {method: best(programs, data, path, folder / "without", method)[2] for method in COMPARED}
    _, answers = evaluate(programs, data, models, folder / "evaluation-without")
    cases = {row["prompt"]: row for row in pq.read_table(data / "evaluation.parquet").to_pylist()}
    scores = collections.defaultdict(list)
    for row in answers:
        case = cases[row["prompt"]]
        # Of questions that the passage does not answer no words are expected.
        if case["kind"] != "question" or case["expected"] is None:
            continue
        question = case["prompt"].split("Question:")[1]
        domain = "out" if UNSEEN.search(question) else "in"
        scores[row["model"], domain].append((f1(first_line(row), case["expected"]), rouge_l(first_line(row), case["expected"])))
    print("| method | in domain: F1 | ROUGE-L | out of domain: F1 | ROUGE-L |")
    print("| --- | --- | --- | --- | --- |")
    for method in COMPARED:
        means = [100 * sum(score[index] for score in scores[method, domain]) / len(scores[method, domain])
                 for domain in ("in", "out") for index in (0, 1)]
        print(f"| `{method}` | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
    print({f"{domain} domain": len(scores[COMPARED[0], domain]) for domain in ("in", "out")})


def main(programs, data, output, *tables):
    programs, data, output = Path(programs).resolve(), Path(data), Path(output)
    output.mkdir(parents=True, exist_ok=True)
    if not tables or "first" in tables:
        first_table(programs, data, output)
    if not tables or "second" in tables:
        second_table(programs, data, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
