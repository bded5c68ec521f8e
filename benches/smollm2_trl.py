"""Held-out accuracy of TRL 1.12's `RewardTrainer` beside `reward`: the same base, LoRA, rankings of people (HH-RLHF), epochs and learning rates.

    python benches/smollm2_trl.py target/release MODEL DATA runs/smollm2-trl [--rates 1e-4,2e-5] [--pairs 0] [--sides rlhf,trl]

MODEL is the model's folder in 32 bits, which both read; DATA the folder of hh-rlhf-explicit-{train,test}.parquet. --pairs takes so many of the training pairs, 0 all.
Both train in f32 on dialogues as the model's chat template renders them, in batches of 16 pairs; pairs with an answer of which prompt and answer have more than 512 tokens are left out
(TRL drops them, `reward` would cut them). The learning rate warms up for 3% of the steps, rounded down, and falls to a tenth by a cosine. Needs torch, transformers, peft, datasets and trl.
Runs that are over are not run again. Prints a Markdown table with 95% intervals (Wilson); minutes are those of training and of one evaluation, without reading.
"""

import argparse
import json
import math
import os
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from smollm2_data import messages

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, LONGEST, RANK, ALPHA = 16, 512, 16, 32


def pairs(tokenizer, data, split, count=0):
    """Pairs as messages."""
    rows = pq.read_table(data / f"hh-rlhf-explicit-{split}.parquet").to_pylist()
    answer = lambda text: [{"role": "assistant", "content": text.strip()}]
    found = [{"prompt": messages(row["prompt"]), "chosen": answer(row["chosen"]), "rejected": answer(row["rejected"])} for row in rows]
    tokens = lambda dialogue: len(tokenizer(tokenizer.apply_chat_template(dialogue, tokenize=False), add_special_tokens=False)["input_ids"])
    fits = lambda row: all(tokens(row["prompt"] + row[side]) < LONGEST for side in ("chosen", "rejected"))
    differs = lambda row: row["chosen"] != row["rejected"]
    return [row for row in found if differs(row) and fits(row)][:count or None]


def of_rlhf(programs, model, rows, rate, output):
    for split, of in rows.items():
        pq.write_table(pa.Table.from_pylist(of), output / f"{split}.parquet")
    flags = {"model": model, "data": output / "train.parquet", "evaluation-data": output / "test.parquet", "output": output / "run", "method": "lora", "lora-r": RANK,
             "lora-alpha": ALPHA, "target-modules": "all-linear", "batch-size": BATCH, "max-length": LONGEST, "learning-rate": rate, "beta2": 0.999, "normalize": "none"}
    command = [programs / "reward", "--quiet", *(word for name, value in flags.items() for word in (f"--{name}", value))]
    subprocess.run([*map(str, command), *(["--resume"] if (output / "run/checkpoints").is_dir() else [])], check=True)
    evaluation = json.loads((output / "run/evaluation.json").read_text())
    lines = [json.loads(line) for line in (output / "run/metrics.jsonl").read_text().splitlines()]
    return {"accuracy": evaluation["accuracy"], "pairs": evaluation["pairs"], "seconds": lines[-1]["seconds"]}


def of_trl(model, rows, rate, output):
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from trl import RewardConfig, RewardTrainer

    # The head and LoRA's matrices are drawn before the trainer sets its seed.
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    scorer.config.pad_token_id = tokenizer.pad_token_id
    warmup = int(0.03 * math.ceil(len(rows["train"]) / BATCH))
    config = RewardConfig(
        output_dir=str(output), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no", per_device_train_batch_size=BATCH // 4,
        gradient_accumulation_steps=4, per_device_eval_batch_size=8, learning_rate=rate, num_train_epochs=1, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1}, warmup_steps=warmup, adam_beta2=0.999, weight_decay=0.0, max_length=LONGEST, seed=0, dataloader_pin_memory=False)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, task_type="SEQ_CLS", modules_to_save=["score"])
    trainer = RewardTrainer(scorer, config, train_dataset=Dataset.from_list(rows["train"]), eval_dataset=Dataset.from_list(rows["test"]),
                            processing_class=tokenizer, peft_config=lora)
    started = time.monotonic()
    trainer.train()
    # The trainer's own accuracy is a mean of batches' means.
    trainer.model.eval()
    right = 0
    with torch.no_grad():
        for row in trainer.eval_dataset:
            chosen, rejected = (trainer.model(input_ids=torch.tensor([row[ids]])).logits.item() for ids in ("chosen_ids", "rejected_ids"))
            right += chosen > rejected
    count = len(trainer.eval_dataset)
    assert count == len(rows["test"]), "TRL left out pairs"
    return {"accuracy": right / count, "pairs": count, "seconds": time.monotonic() - started}


def wilson(share, count):
    """The 95% interval of a share of `count`."""
    z = 1.96
    middle, width = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - width) / (1 + z * z / count), (middle + width) / (1 + z * z / count)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("programs", "model", "data", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--rates", default="1e-4,2e-5")
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--sides", default="rlhf,trl")
    given = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rows = {"train": pairs(tokenizer, given.data, "train", given.pairs), "test": pairs(tokenizer, given.data, "test")}
    print(f"{len(rows['train'])} pairs to train on\n\n| side | learning rate | accuracy | held-out pairs | minutes |\n| --- | --- | --- | --- | --- |")
    for side in given.sides.split(","):
        for rate in given.rates.split(","):
            folder = given.output / f"{side}-{len(rows['train'])}-{rate}"
            folder.mkdir(parents=True, exist_ok=True)
            kept = folder / "result.json"
            if not kept.exists():
                found = of_rlhf(given.programs, given.model, rows, rate, folder) if side == "rlhf" else of_trl(given.model, rows, float(rate), folder)
                kept.write_text(json.dumps(found))
            found = json.loads(kept.read_text())
            low, high = wilson(found["accuracy"], found["pairs"])
            print(f"| {side} | {rate} | {100 * found['accuracy']:.1f}% [{100 * low:.1f}, {100 * high:.1f}] | {found['pairs']} | {found['seconds'] / 60:.1f} |", flush=True)


if __name__ == "__main__":
    main()
