"""The loss of transformers on texts and on completions after prompts, under the embedded world's base model."""

import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
BASE = HERE.parent.parent / "data" / "base"
TEXTS = [
    (None, "Passage: Vubek lives in Dradale. Vubek keeps a hen.\nQuestion: What does Vubek keep?\nAnswer: Vubek keeps a hen."),
    (None, "Grüße aus Zürich, 你好 🙂"),
    (None, "Message: You are a robot.\nReply: I hear you. I am here to help."),
    ("Passage: Anna drinks tea.\nQuestion: What does Anna drink?\nAnswer:", " Anna drinks tea."),
    ("Passage: Anna drinks tea.\nQuestion: What does Anna drink?\nAnswer:", " Anna drinks milk."),
    (None, "Boris plays the harp. " * 12),
]
MAX_LENGTH = 64


def main():
    torch.set_num_threads(1)
    tokenizer, model = AutoTokenizer.from_pretrained(BASE), AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    result = []
    with torch.no_grad():
        for prompt, completion in TEXTS:
            encoded = tokenizer((prompt or "") + completion, return_offsets_mapping=True)
            ids, offsets = encoded["input_ids"][:MAX_LENGTH], encoded["offset_mapping"][:MAX_LENGTH]
            start = len(tokenizer(prompt)["input_ids"]) if prompt else 0
            labels = [-100] * start + ids[start:]
            loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
            # transformers shifts: nothing predicts the first token.
            predicted = max(start, 1)
            tokens, text = len(ids) - predicted, (prompt or "") + completion
            size = len(text[offsets[predicted][0]:offsets[-1][1]].encode())
            result.append({"prompt": prompt or "", "completion": completion, "loss": loss, "tokens": tokens, "bytes": size,
                           "left_out": len(encoded["input_ids"]) - len(ids)})
    nats, tokens, size = (sum(of(row) for row in result) for of in
                          (lambda row: row["loss"] * row["tokens"], lambda row: row["tokens"], lambda row: row["bytes"]))
    whole = {"max_length": MAX_LENGTH, "texts": result, "nats_per_token": nats / tokens, "perplexity": math.exp(nats / tokens),
             "bits_per_byte": nats / math.log(2) / size}
    (HERE / "perplexity" / "expected.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
