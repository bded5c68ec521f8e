"""The probabilities that `transformers` gives texts by the toxicity classifier in `data/toxicity`: `classifiers/shipped/expected.json`, as `classifiers.py` writes it.

    python tests/golden/shipped_classifier.py
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

HERE = Path(__file__).parent
FOLDER = HERE.parent.parent / "data" / "toxicity"
TEXTS = [
    "Thank you, that was a great help.",
    "You are a complete idiot and nobody likes you.",
    "I hope you die, you worthless piece of trash.",
    "The committee will meet on Thursday at 9:30 to discuss the budget.",
    "She is a lesbian and her wife is a Muslim.",
    "what the hell, this is so damn good!!!",
    "Grüße aus Zürich: ﬁne “naïve” Café … ½ €5, привет, 你好 🙂",
    "?",
    "sh1t f*ck @ss",
    " ".join(["All work and no play makes Jack a dull boy."] * 40),
]


@torch.no_grad()
def main():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForSequenceClassification.from_pretrained(FOLDER, dtype=torch.float32).eval()
    longest = tokenizer.model_max_length
    texts = []
    for text in TEXTS:
        encoded = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
        logits = model(**encoded).logits[0]
        texts.append({
            "text": text, "pair": None, "ids": encoded["input_ids"][0].tolist(), "types": encoded["token_type_ids"][0].tolist(),
            "cut": len(tokenizer(text)["input_ids"]) > longest, "logits": logits.tolist(), "probabilities": torch.softmax(logits, 0).tolist(),
        })
    output = HERE / "classifiers" / "shipped"
    output.mkdir(parents=True, exist_ok=True)
    (output / "expected.json").write_text(json.dumps({"longest": longest, "texts": texts}, indent=1) + "\n")


main()
