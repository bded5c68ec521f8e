"""What the scorers of `evaluate` are worth on people's labels and on published answers.

    python benches/evaluation.py target/release SHARED_DATA runs/evaluation [toxicity] [closed-domain] [hallucination] [choices]

SHARED_DATA: the folder of `instructgpt-toxicity.parquet`, `toxicity-labelled-test.parquet`, `qags-faithfulness.parquet` and so on. Needs pyarrow. Run in the root of the repository, where
`data/toxicity` and `data/base` are. Prints Markdown; without a list everything is measured.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TOXICITY = ["--toxicity-scorer", "classifier", "words={data}/toxic-words.parquet@en"]
GROUNDING = ["--hallucination-scorer", "grounding", "length"]
# The labels of each file, and what counts as hallucinated.
LABELS = {
    "qags-faithfulness": ["--positive", "0"],
    "xsum-hallucination": ["--positive", "1"],
    "begin-dialogue": ["--positive", "Not fully attributable"],
    "faithdial-audit": ["--label-column", "begin_labels", "--positive", "hallucination"],
    "halueval-general": ["--label-column", "hallucination", "--positive", "yes", "--text-column", "chatgpt_response", "--source-column", "user_query"],
    "halueval-qa": [],
}


# Whole words by which texts speak of groups of people.
IDENTITIES = {
    "gay, homosexual": ["gay", "gays", "homosexual", "homosexuals"], "lesbian": ["lesbian", "lesbians"], "queer": ["queer"], "trans": ["trans", "transgender"],
    "black": ["black", "blacks"], "white": ["white", "whites"], "African": ["african", "africans"], "Asian": ["asian", "asians", "chinese"], "Latino": ["mexican", "mexicans", "hispanic", "latino", "latinos"],
    "Muslim": ["muslim", "muslims", "islam"], "Jewish": ["jew", "jews", "jewish"], "Christian": ["christian", "christians"], "immigrant, refugee": ["immigrant", "immigrants", "refugee", "refugees"],
    "woman": ["woman", "women", "female", "females"], "man": ["man", "men", "male", "males"], "disabled": ["disabled", "disability", "blind", "deaf"],
}


class Bench:
    def __init__(self, programs, data, output):
        self.evaluate, self.data, self.output = Path(programs) / "evaluate", Path(data), Path(output)

    def run(self, name, *arguments):
        """Runs `evaluate`; gives what it found."""
        folder = self.output / name
        given = [str(argument).format(data=self.data) for argument in arguments]
        done = subprocess.run([self.evaluate, "--output", folder, "--quiet", *given], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{name}: {done.stderr}")
        return json.loads((folder / "evaluation.json").read_text())

    def toxicity(self):
        data = self.data
        given = ["--labelled", data / "instructgpt-toxicity.parquet", "--label-column", "scores", "--positive", "<=-0.5"]
        answers = self.run("instructgpt", *TOXICITY, *given, "--group-columns", "models", "prompt_type")
        continued = ["--labelled", data / "real-toxicity-prompts-flat.parquet", "--label-column", "continuation_toxicity", "--positive", ">=0.5"]
        continuations = self.run("continuations", *TOXICITY, *continued, "--text-column", "continuation")
        held_out = self.run("held-out", *TOXICITY, "--labelled", data / "toxicity-labelled-test.parquet", "--group-columns", "source", "category")
        print("### Toxicity: the shipped classifier beside a list of words\n")
        header("", "classifier, AUC", "words, AUC", "classifier, rank correlation of group means")
        for name, found in [("InstructGPT's answers, Perspective >= 0.5", answers), ("RealToxicityPrompts' continuations, Perspective >= 0.5", continuations), ("held-out labelled texts", held_out)]:
            agreement = found["agreement"]
            means = agreement["classifier"]["rank_correlation_of_group_means"]
            row(name, interval(agreement["classifier"]["all"]["auc"]), interval(agreement["toxic-words"]["all"]["auc"]), "" if means is None or found is held_out else f"{means:.3f}")
        print(f"\n{answers['agreement']['texts']}, {continuations['agreement']['texts']} and {held_out['agreement']['texts']} texts.")
        for column in ["source", "category"]:
            print(f"\nHeld out, by {column}:\n")
            header(column, "texts", "toxic", "false positive rate", "recall", "AUC")
            for group in held_out["agreement"]["classifier"]["by"][column]:
                row(group["name"], group["texts"], group["positives"], *(plain(group[name]) for name in ["false_positive_rate", "recall", "auc"]))
        self.identities()
        self.published_means()

    def identities(self):
        """The false positive rate by identity term: a row for each text and each term in it."""
        path = self.output / "identities.parquet"
        rows = [
            {"text": line["text"], "label": line["label"], "identity": name}
            for line in pq.read_table(self.data / "toxicity-labelled-test.parquet").to_pylist()
            for name, terms in IDENTITIES.items()
            if set(terms) & set(re.findall(r"[a-z]+", line["text"].lower()))
        ]
        pq.write_table(pa.Table.from_pylist(rows), path)
        found = self.run("identities", "--toxicity-scorer", "classifier", "--labelled", path, "--group-columns", "identity")
        print("\nHeld out, by identity term in the text:\n")
        header("term", "texts", "harmless", "false positive rate", "recall")
        for group in found["agreement"]["classifier"]["by"]["identity"]:
            row(group["name"], group["texts"], group["texts"] - group["positives"], plain(group["false_positive_rate"]), plain(group["recall"]))

    def published_means(self):
        """The means of the published scores, as `evaluate` finds them and as they follow from the file."""
        path = self.data / "instructgpt-toxicity.parquet"
        found = self.run("published", "--answers", path)["models"]
        scores = {}
        for line in pq.read_table(path).to_pylist():
            for model, score in zip(line["models"], line["scores"]):
                scores.setdefault((line["prompt_type"], model), []).append(score)
        kinds = sorted({kind for kind, _ in scores})
        print("\nMean Perspective toxicity of InstructGPT's answers, as published:\n")
        header("model", *kinds)
        differences = []
        for model in found:
            means = [found[model]["by_prompt_type"][kind]["mean_score"]["value"] for kind in kinds]
            differences += [abs(mean - sum(scores[kind, model]) / len(scores[kind, model])) for mean, kind in zip(means, kinds)]
            row(model, *(f"{-mean:.4f}" for mean in means))
        print(f"\nLargest difference from the means of the file: {max(differences):.1e}.\n")

    def closed_domain(self):
        print("### Closed-domain hallucination by grounding: InstructGPT's published answers\n")
        found = {name: self.run(name, "--answers", self.data / f"instructgpt-{name}.parquet", "--hallucination-scorer", "grounding")["models"] for name in ["squadv2", "tldr"]}
        header("model", *found)
        for model in found["tldr"]:
            row(model, *(interval(models[model]["hallucination_by_grounding"], 100, "%") for models in found.values()))
        print()

    def hallucination(self):
        print("### Hallucination: the scorers on people's labels\n")
        header("file", "texts", "hallucinated", "grounding: AUC", "balanced accuracy", "threshold of the other half", "the longer, the worse: AUC", "balanced accuracy", "threshold of the other half")
        row("chance", "", "", *["0.500"] * 6)
        for name, flags in LABELS.items():
            agreement = self.run(name, *GROUNDING, "--labelled", self.data / f"{name}.parquet", *flags)["agreement"]
            numbers = [interval(agreement[scorer]["all"][measure]) for scorer in ["grounding", "length"] for measure in ["auc", "balanced_accuracy", "balanced_accuracy_cross_fitted"]]
            row(name, agreement["texts"], agreement["positives"], *numbers)
        print()

    def choices(self):
        found = self.run("choices", "--models", "base=data/base", "--multiple-choice", self.data / "truthfulqa-mc.parquet", "--recognition", self.data / "halueval-qa.parquet")
        print("### The world's base model asked about the world of people\n")
        header("MC1", "MC2", "recognition: accuracy", "AUC")
        asked, recognised = found["multiple_choice"]["base"], found["recognition"]["base"]
        row(*(interval(estimate) for estimate in [asked["mc1"], asked["mc2"], recognised["accuracy"], recognised["auc"]]))


def header(*cells):
    row(*cells)
    row(*["---"] * len(cells))


def row(*cells):
    print(f"| {' | '.join(str(cell) for cell in cells)} |")


def plain(number):
    return "" if number is None else f"{number:.3f}"


def interval(estimate, factor=1, unit=""):
    if estimate is None:
        return ""
    digits = 1 if unit else 3
    value, low, high = (f"{factor * estimate[part]:.{digits}f}" for part in ["value", "low", "high"])
    return f"{value}{unit} [{low}, {high}]"


def main(programs, data, output, *wanted):
    bench = Bench(programs, data, output)
    for part in wanted or ["toxicity", "closed-domain", "hallucination", "choices"]:
        getattr(bench, part.replace("-", "_"))()


if __name__ == "__main__":
    main(*sys.argv[1:])
