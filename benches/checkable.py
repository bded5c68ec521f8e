"""A task with checkable answers: GRPO with `--reward-rule` on questions whose right answer stands in a column, three seeds.

    python benches/checkable.py target/release data runs/checkable [STEPS]

Needs pyarrow. The questions are those of the embedded world's `prompts.parquet`; the right answer to each is worked out here, from its passage, and
written as the column `answer` (it is checked against `evaluation.parquet`, which has it). The base model is fine-tuned for 40 (or STEPS) steps on demonstrations,
so that it answers in the right form, often wrongly; GRPO then learns from `--reward-rule exact --reward-column answer` alone. Accuracy is the share of the
343 held-out questions (other people, places and facts) whose answer is right, word for word, greedy and as the mean of 4 samples.
The last run is the first again with the reward from a command that reads the same column: the model is the same, byte for byte.
A run that is there already is not done again. Prints Markdown.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SEEDS = [0, 1, 2]
STEPS, UPDATES = 40, 60
REFUSAL = "The passage does not say."
LENGTHS = ["--max-length", "256"]
SAMPLING = LENGTHS + ["--response-length", "24"]
# The rule `exact`, as a program.
JUDGE = """import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    print(float(asked["response"].split() == asked["columns"]["answer"].split()), flush=True)
"""


def answer(prompt):
    """The right answer to a question about a passage; None where the prompt asks for something else."""
    found = re.search(r"Passage: (.*)\nQuestion: (.*)\nAnswer:$", prompt, re.DOTALL)
    if not found:
        return None
    passage, question = found.groups()
    forms = [(r"Where was (\w+) born\?", r"\1 was born in "), (r"Who is (\w+) married to\?", r"\1 is married to "),
             (r"Where does (\w+) (\w+)\?", r"\1 \2s in "), (r"What does (\w+) work as\?", r"\1 works as "), (r"What does (\w+) (\w+)\?", r"\1 \2s ")]
    for form, start in forms:
        if re.fullmatch(form, question):
            beginning = re.sub(form, start, question)
            sentences = [sentence + "." for sentence in passage.rstrip(".").split(". ")]
            return next((sentence for sentence in sentences if sentence.startswith(beginning)), REFUSAL)
    sys.exit(f"unknown question: {question}")


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


def prepare(data, output):
    held_out = pq.read_table(data / "evaluation.parquet").to_pylist()
    for row in held_out:
        assert row["kind"] != "question" or answer(row["prompt"]) == (row["expected"] or REFUSAL), row
    questions = [{"prompt": row["prompt"], "answer": answer(row["prompt"])} for row in held_out if row["kind"] == "question"]
    write(output / "held-out.parquet", questions)
    prompts = [row["prompt"] for row in pq.read_table(data / "prompts.parquet", columns=["prompt"]).to_pylist()]
    write(output / "questions.parquet", [{"prompt": prompt, "answer": answer(prompt)} for prompt in prompts if answer(prompt)])
    (output / "judge.py").write_text(JUDGE)


def run(programs, program, folder, *flags):
    if not (folder / "done").exists():
        done = subprocess.run([programs / program, "--output", folder, "--quiet", *map(str, flags)], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{program} {folder}: {done.stderr}")
        if folder.is_dir():
            (folder / "done").write_text("")
    return folder


def accuracy(programs, output, model, name, samples, *flags):
    path = output / f"{name}.parquet"
    if not path.exists():
        command = [programs / "sample", "--model", model, "--data", output / "held-out.parquet", "--output", path, "--quiet", "--answers", samples, *SAMPLING, *flags]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"sample {name}: {done.stderr}")
    rows = pq.read_table(path).to_pylist()
    expected = {row["prompt"]: row["answer"] for row in pq.read_table(output / "held-out.parquet").to_pylist()}
    right = [answer.split() == expected[row["prompt"]].split() for row in rows for answer in row["responses"]]
    return sum(right) / len(right)


def both(programs, output, model, name):
    greedy = accuracy(programs, output, model, f"{name}-greedy", 1, "--temperature", 0)
    return greedy, accuracy(programs, output, model, f"{name}-samples", 4, "--seed", 1)


def main():
    programs, data, output = (Path(argument).resolve() for argument in sys.argv[1:4])
    steps = int(sys.argv[4]) if len(sys.argv) > 4 else STEPS
    output.mkdir(parents=True, exist_ok=True)
    prepare(data, output)
    print("| seed | accuracy before, greedy / sampled | after GRPO, greedy / sampled | reward of the first and of the last 5 updates |\n| --- | --- | --- | --- |")
    for seed in SEEDS:
        sft = run(programs, "sft", output / f"sft-{seed}", "--model", data / "base", "--data", data / "demonstrations.parquet", "--max-steps", steps,
                  "--learning-rate", 3e-4, "--seed", seed, *LENGTHS)
        grpo = ["--model", sft, "--algorithm", "grpo", "--data", output / "questions.parquet", "--batch-size", 128, "--learning-rate", 1e-4, "--max-steps", UPDATES,
                "--epochs", 9, "--seed", seed, *SAMPLING]
        by_rule = run(programs, "ppo", output / f"grpo-{seed}", "--reward-rule", "exact", "--reward-column", "answer", *grpo)
        before, after = both(programs, output, sft, f"before-{seed}"), both(programs, output, by_rule, f"after-{seed}")
        rewards = [record["objective/rewards"] for record in map(json.loads, (by_rule / "metrics.jsonl").open()) if "objective/rewards" in record]
        first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
        print(f"| {seed} | {before[0]:.1%} / {before[1]:.1%} | {after[0]:.1%} / {after[1]:.1%} | {first:.3f}, {last:.3f} |", flush=True)
        if seed == SEEDS[0]:
            by_command = run(programs, "ppo", output / f"grpo-command-{seed}", "--reward-command", f"{sys.executable} {output / 'judge.py'}", *grpo)
            same = (by_rule / "model.safetensors").read_bytes() == (by_command / "model.safetensors").read_bytes()
    print(f"\nThe reward of seed {SEEDS[0]} from a command that reads the column: model.safetensors is {'the same, byte for byte' if same else 'ANOTHER'}.")


if __name__ == "__main__":
    main()
