"""The classification of `ag_news.py` with PyTorch and PEFT: LoRA on a frozen encoder, a linear head on the mean of the hidden states, no dropout, the optimizer and
schedule of `sft`.

    python benches/ag_news_peft.py encoder-folder train.parquet test.parquet [first-seed last-seed]
"""

import math
import random
import sys
import time

import pyarrow.parquet as pq
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer

EPOCHS, BATCH, RATE, LENGTH, WARMUP, FLOOR = 20, 16, 1e-3, 128, 0.03, 0.1
CLASSES = ["business", "science"]


class Classifier(torch.nn.Module):
    def __init__(self, folder):
        super().__init__()
        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        self.encoder = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=["query", "value"]))
        self.head = torch.nn.Linear(model.config.hidden_size, len(CLASSES))
        torch.nn.init.normal_(self.head.weight, std=1 / (model.config.hidden_size + 1))
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, inputs):
        hidden = self.encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None].float()
        return self.head((hidden * mask).sum(1) / mask.sum(1))


def schedule(step, total):
    warmup = max(1, round(WARMUP * total))
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share))


def read(path):
    rows = pq.read_table(path).to_pylist()
    return [(row["text"], CLASSES.index(row["label"])) for row in rows]


def run(folder, train, test, seed):
    torch.manual_seed(seed)
    generator = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # No dropout: `sft` has none either.
    model = Classifier(folder).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    steps = EPOCHS * math.ceil(len(train) / BATCH)

    def encode(texts):
        return tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")

    started, step = time.time(), 0
    for _ in range(EPOCHS):
        order = generator.sample(train, len(train))
        for start in range(0, len(order), BATCH):
            texts, labels = zip(*order[start:start + BATCH])
            loss = torch.nn.functional.cross_entropy(model(encode(list(texts))), torch.tensor(labels))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = RATE * schedule(step, steps)
            optimizer.step()
            step += 1
    seconds = time.time() - started
    with torch.no_grad():
        texts, labels = zip(*test)
        predicted = model(encode(list(texts))).argmax(-1)
    return (predicted == torch.tensor(labels)).float().mean().item(), seconds


def main(folder, train, test, first=0, last=2):
    train, test = read(train), read(test)
    for seed in range(int(first), int(last) + 1):
        accuracy, seconds = run(folder, train, test, seed)
        print(f"seed {seed}: accuracy {100 * accuracy:.1f}%, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
