"""Exact match and F1 of SQuAD 2.0, by its official evaluation as `transformers` 4 carries it (version 5 does not)."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

from transformers.data.metrics.squad_metrics import compute_exact, compute_f1, get_raw_scores, normalize_answer

HERE = Path(__file__).parent / "metrics"
TEXTS = ["", "the", "A.", " ", "The Cat", "cat", "a cat, the cat & an owl!", "owl cat", "theatre", "An-other", "U.S.A.", "usa", "1,000 miles", "1000 Miles",
         "a\u2014the\u2014end", "\u2014 end", "STRASSE", "stra\u00dfe", "\u039f\u03a3", "\u03bf\u03c2", "a\u00a0b\u2003c", "a b c", "x\x1fy", "x y", "under_score",
         "un a deux", "deux un", "red red red", "red red", "\u201cred\u201d", "na\u00efve an", "\u0130 an", "the\u0301 end", "\u4e00\u500b a", "a1 the2"]


def main():
    generator = random.Random(7)
    words = ["the", "a", "cat", "Cat.", "owl", "red", "an", "sat"]
    lists = [[], [""], ["the", ""], ["cat", ""], ["cat", "the cat sat"], ["red red", "owl"]]
    lists += [[" ".join(generator.choices(words, k=generator.randint(1, 6))) for _ in range(generator.randint(1, 3))] for _ in range(30)]
    answers = ["", "The.", "cat"] + [" ".join(generator.choices(words, k=generator.randint(0, 6))) for _ in lists]
    questions = []
    for index, references in enumerate(lists):
        answer = answers[index]
        example = SimpleNamespace(qas_id="0", answers=[{"text": text} for text in references])
        exact, f1 = get_raw_scores([example], {"0": answer})
        questions.append({"answer": answer, "references": references, "exact_match": exact["0"], "f1": f1["0"]})
    pairs = [{"answer": a, "reference": b, "exact_match": compute_exact(b, a), "f1": compute_f1(b, a)}
             for a, b in zip(TEXTS, TEXTS[1:] + TEXTS[:1])]
    assert {0, 1} <= {pair["f1"] for pair in pairs} and any(0 < question["f1"] < 1 for question in questions)
    HERE.mkdir(exist_ok=True)
    normalized = [{"text": text, "normalized": normalize_answer(text)} for text in TEXTS]
    (HERE / "squad.json").write_text(json.dumps({"normalized": normalized, "pairs": pairs, "questions": questions}) + "\n")


if __name__ == "__main__":
    main()
