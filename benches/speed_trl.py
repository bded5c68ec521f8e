"""The baselines of `benches/speed.py`: TRL 1.12.0's trainers and transformers' `generate`, on a CPU. One measurement, or the search for the fastest setting.

    python benches/speed_trl.py measure|search '{"kind": "sft", "model": "inputs/9m", "data": "inputs/sft-9m.parquet", "threads": 2, ...}'

Prints results as lines of JSON. What both sides do alike: the same weights, the same rows in every step (one batch, again and again, so that all steps
are equal work), the same tokens (end-of-text token included), LoRA of the same rank and alpha on the same layers without dropout, no gradient
checkpointing, no evaluation, and nothing saved. A step's time is that between the ends of two steps, reading and collating the batch included.

Settings that are searched through (`torch.compile` is not among them):
- numbers: f32; f32 weights under bf16 autocast (TRL's default); bf16 weights (LoRA in f32, as PEFT makes it)
- layout of sft: padded; padding-free (what `packing=True` with TRL's default strategy does with this batch); rows packed to `max_length`, one at a time;
  padded in four micro-batches of rows of like length (`train_sampling_strategy="group_by_length"`). Reward and PPO: padded, reward grouped by length too.
Always: SDPA attention, fused AdamW, `loss_type="chunked_nll"` (TRL's default: logits of supervised tokens only).
"""

import copy
import json
import multiprocessing
import os
import sys
import threading
import time

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import accelerate
import peft
import pyarrow.parquet as pq
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.data_utils import pack_dataset
from trl.experimental.ppo import PPOConfig, PPOTrainer

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUMBERS = ["f32", "bf16 autocast", "bf16 weights"]
LAYOUTS = {"sft": ["padded", "padding-free", "packed", "grouped"], "reward": ["padded", "grouped"], "ppo": ["padded"], "sample": ["padded"]}
# Micro-batches of a step with "grouped".
PARTS = 4


class Clock(TrainerCallback):
    """The times at which steps end, and the first loss. `overdue` is called in a step that takes longer than `limits` (seconds of the first and of any other):
    by a thread, as a step may be within one call of PyTorch for minutes."""

    def __init__(self, limits=None, overdue=None):
        self.ends, self.loss, self.gave_up = [], None, False
        if limits:
            threading.Thread(target=self.watch, args=(limits, overdue), daemon=True).start()

    def watch(self, limits, overdue):
        while not self.ends or time.perf_counter() - self.ends[-1] < limits[min(len(self.ends), 2) - 1]:
            time.sleep(0.1)
        self.ends.append(time.perf_counter())
        self.gave_up = True
        overdue(self.found())

    def tick(self):
        """A step ends, and the next one begins."""
        self.ends.append(time.perf_counter())

    def on_train_begin(self, args, state, control, **_):
        self.tick()

    def on_step_end(self, args, state, control, **_):
        self.tick()

    def on_log(self, args, state, control, logs=None, **_):
        if self.loss is None:
            self.loss = logs.get("loss")

    def found(self):
        return {"seconds": [end - start for start, end in zip(self.ends, self.ends[1:])], "loss": self.loss, "gave_up": self.gave_up}


def load(kind, folder, numbers):
    dtype = torch.bfloat16 if numbers == "bf16 weights" else torch.float32
    return kind.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")


def lora(spec, task):
    if not spec.get("lora"):
        return None
    rank, alpha = spec["lora"]
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=LINEARS, task_type=task, modules_to_save=["score"] if task == "SEQ_CLS" else None)


def shared(spec, numbers, rows):
    """Of all trainers' settings those that matter, as `sft`, `reward` and `ppo` have them."""
    parts = spec.get("parts", 1)
    return {"output_dir": spec["output"], "use_cpu": True, "bf16": numbers == "bf16 autocast", "gradient_checkpointing": False, "report_to": [],
            "save_strategy": "no", "per_device_train_batch_size": rows // parts, "gradient_accumulation_steps": parts, "learning_rate": 1e-5,
            "adam_beta2": 0.999, "weight_decay": 0.0, "max_grad_norm": 1.0, "optim": "adamw_torch_fused", "disable_tqdm": True,
            "dataloader_pin_memory": False, "seed": 0}


def encode(tokenizer, *texts):
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def repeat(rows, steps):
    """The batch, once for each step."""
    return Dataset.from_list(rows * steps)


def sft(spec, numbers, layout, steps, clock):
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    rows = []
    for row in pq.read_table(spec["data"]).to_pylist():
        prompt, completion = encode(tokenizer, row["prompt"], row["completion"])
        completion = completion + [tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    tokens = sum(len(row["input_ids"]) for row in rows)
    if layout == "packed":
        rows = pack_dataset(Dataset.from_list(rows), spec["max_length"], "bfd").to_list()
        spec = spec | {"parts": len(rows)}
    elif layout == "grouped":
        rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
        spec = spec | {"parts": min(PARTS, len(rows))}
    config = SFTConfig(**shared(spec, numbers, len(rows)), max_steps=steps, logging_steps=10, logging_first_step=True, max_length=None,
                       train_sampling_strategy="sequential", padding_free=layout in ("padding-free", "packed"),
                       dataset_kwargs={"skip_prepare_dataset": True})
    trainer = SFTTrainer(load(AutoModelForCausalLM, spec["model"], numbers), config, train_dataset=repeat(rows, steps), processing_class=tokenizer,
                         peft_config=lora(spec, "CAUSAL_LM"), callbacks=[clock])
    return trainer, trainer.model, tokens


def reward(spec, numbers, layout, steps, clock):
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    rows = []
    for row in pq.read_table(spec["data"]).to_pylist():
        prompt, chosen, rejected = encode(tokenizer, row["prompt"], row["chosen"], row["rejected"])
        end = [tokenizer.eos_token_id]
        rows.append({"chosen_ids": prompt + chosen + end, "rejected_ids": prompt + rejected + end})
    tokens = sum(len(ids) for row in rows for ids in row.values())
    if layout == "grouped":
        rows = sorted(rows, key=lambda row: -max(map(len, row.values())))
        spec = spec | {"parts": min(PARTS, len(rows))}
    config = RewardConfig(**shared(spec, numbers, len(rows)), max_steps=steps, logging_steps=10, logging_first_step=True, max_length=None,
                          train_sampling_strategy="sequential")
    trainer = RewardTrainer(load(AutoModelForSequenceClassification, spec["model"], numbers), config, train_dataset=repeat(rows, steps),
                            processing_class=tokenizer, peft_config=lora(spec, "SEQ_CLS"), callbacks=[clock])
    return trainer, trainer.model, tokens


def ppo(spec, numbers, layout, steps, clock):
    """The policy with LoRA, its reference the same without; the value model with LoRA and head, injected so that TRL's code still finds its parts."""
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    prompts = [{"input_ids": encode(tokenizer, row["prompt"])[0]} for row in pq.read_table(spec["data"]).to_pylist()]
    rows, dataset = len(prompts), Dataset.from_list(prompts)
    settings = shared(spec, numbers, rows) | {"max_grad_norm": None, "learning_rate": 3e-6}
    # The trainer's own Accelerator reads this and not `bf16`; it is what `accelerate launch --mixed_precision` sets.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if numbers == "bf16 autocast" else "no"
    config = PPOConfig(**settings, total_episodes=steps * rows, response_length=spec["response_length"], num_ppo_epochs=spec["epochs"], num_mini_batches=1,
                       local_rollout_forward_batch_size=rows, num_sample_generations=0, stop_token=None, logging_steps=1, temperature=0.7)
    scores = load(AutoModelForSequenceClassification, spec["reward_model"], numbers)
    values = inject_adapter_in_model(lora(spec, None), copy.deepcopy(scores))
    for name, parameter in values.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("score."))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if numbers == "bf16 weights":
        values.score.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    trainer = PPOTrainer(args=config, processing_class=tokenizer, model=load(AutoModelForCausalLM, spec["model"], numbers), ref_model=None,
                         reward_model=scores, value_model=values, train_dataset=dataset, eval_dataset=dataset.select(range(1)),
                         peft_config=lora(spec, "CAUSAL_LM"), callbacks=[clock])
    return trainer, trainer.model, sum(len(row["input_ids"]) + spec["response_length"] for row in prompts)


def train(make, spec, numbers, layout, steps, clock):
    trainer, model, tokens = make(spec, numbers, layout, steps, clock)
    trainer.remove_callback(PrinterCallback)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trainer.train()
    return {"tokens": tokens, "trainable": trainable}


def sample(spec, numbers, layout, steps, clock):
    """A step is a batch of so many rows, all of which get all their tokens."""
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    prompts = [encode(tokenizer, row["prompt"])[0] for row in pq.read_table(spec["data"]).to_pylist()]
    model = load(AutoModelForCausalLM, spec["model"], numbers).eval()
    model.generation_config.eos_token_id = None
    rows, length = spec["rows"], spec["response_length"]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=numbers == "bf16 autocast"):
        clock.tick()
        for step in range(steps):
            batch = torch.tensor([prompts[(step * rows + row) % len(prompts)] for row in range(rows)])
            found = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=length, min_new_tokens=length, do_sample=True,
                                   temperature=1.0, top_k=0, top_p=1.0, pad_token_id=tokenizer.pad_token_id)
            clock.tick()
            if found.shape != (rows, batch.shape[1] + length):
                sys.exit(f"generate gave {tuple(found.shape)} tokens")
    return {"tokens": rows * length}


def measure(spec, numbers, layout, steps, clock):
    if spec["kind"] == "sample":
        found = sample(spec, numbers, layout, steps, clock)
    else:
        found = train({"sft": sft, "reward": reward, "ppo": ppo}[spec["kind"]], spec, numbers, layout, steps, clock)
    return found | clock.found()


def attempt(spec, numbers, layout, steps, limits):
    """A measurement in a process of its own, which ends where a step is overdue."""
    ours, theirs = multiprocessing.Pipe()

    def give_up(found):
        theirs.send(found)
        os._exit(0)

    def work():
        torch.set_num_threads(spec["threads"])
        theirs.send(measure(spec, numbers, layout, steps, Clock(limits, give_up)))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found | {"numbers": numbers, "layout": layout}


def step_time(found):
    """Of a search, which has few steps: the shortest after the first."""
    return min(found["seconds"][1:] or found["seconds"])


def search(spec, steps):
    """Numbers first, padded, then layouts with the fastest numbers. A setting is given up in a step that takes 1.3 times the best one's (the first: 3 times)."""
    best = None
    for choose in ("numbers", "layout"):
        known = best
        kinds = [(numbers, "padded") for numbers in NUMBERS] if choose == "numbers" else [(known["numbers"], layout) for layout in LAYOUTS[spec["kind"]][1:]]
        for numbers, layout in kinds:
            limits = best and (3 * best["seconds"][0], 1.3 * step_time(best))
            found = attempt(spec, numbers, layout, steps, limits)
            print(json.dumps(found), flush=True)
            if best is None or not found["gave_up"] and step_time(found) < step_time(best):
                best = found


def main(what, given):
    spec = json.loads(given)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    versions = {module.__name__: module.__version__ for module in (trl, transformers, torch, peft, accelerate)}
    print(json.dumps({"versions": versions | {"python": sys.version.split()[0]}}), flush=True)
    if what == "search":
        search(spec, spec["steps"])
    else:
        torch.set_num_threads(spec["threads"])
        found = measure(spec, spec["numbers"], spec["layout"], spec["steps"], Clock())
        print(json.dumps(found | {"numbers": spec["numbers"], "layout": spec["layout"]}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
