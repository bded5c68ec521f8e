"""PPO by TRL 1.12 on a policy and a reward model that `sft` and `reward` saved: what `ppo --preset trl` is compared with.

    python benches/ppo_trl.py runs/sft runs/reward prompts.parquet runs/trl seed=0 updates=60 learning_rate=1e-4 batch_size=64 response_length=40 policy_every=10

Needs torch, transformers, trl 1.12, datasets and pyarrow, as for the golden files. Writes the policy and `metrics.jsonl`, with TRL's names; beside them the mean length of an answer,
which TRL does not record, the seconds since the start and the peak memory.
"""

import copy
import json
import resource
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

# Of `--preset trl`; everything else is TRL's default.
SETTINGS = {"seed": 0, "updates": 60, "learning_rate": 3e-6, "batch_size": 64, "response_length": 53, "max_length": 256, "policy_every": 0}
LENGTHS = []


class Record(TrainerCallback):
    """Writes a line an update, and now and then the policy, as `ppo --policy-every` does."""

    def __init__(self, output, policy, tokenizer, policy_every):
        self.file, self.start = (output / "metrics.jsonl").open("w"), time.time()
        self.output, self.policy, self.tokenizer, self.every = output, policy, tokenizer, policy_every

    def on_step_end(self, args, state, control, **_):
        if self.every and state.global_step % self.every == 0:
            folder = self.output / "policies" / f"step-{state.global_step:06}"
            self.policy.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def on_log(self, args, state, control, logs=None, **_):
        if "objective/kl" in logs:
            more = {"val/response_length": LENGTHS[-1], "seconds": time.time() - self.start,
                    "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}
            self.file.write(json.dumps({"step": state.global_step} | logs | more) + "\n")
            self.file.flush()


def record_lengths():
    """Has the trainer's truncation say how long answers are, their end included."""
    truncate = ppo_trainer.truncate_response

    def truncate_response(stop_token_id, pad_token_id, responses):
        truncated = truncate(stop_token_id, pad_token_id, responses)
        LENGTHS.append((truncated != pad_token_id).sum(1).float().mean().item())
        return truncated

    ppo_trainer.truncate_response = truncate_response


def with_shift(model, folder):
    """The reward model with the shift and divisor of its scores, which transformers does not know, in its head."""
    head = json.loads((folder / "head.json").read_text())
    weight = load_file(folder / "model.safetensors")["score.weight"]
    model.score = torch.nn.Linear(weight.shape[1], 1)
    with torch.no_grad():
        model.score.weight.copy_(weight / head.get("divisor", 1.0))
        model.score.bias.fill_(-head.get("shift", 0.0) / head.get("divisor", 1.0))
    return model


def main(policy, reward, prompts, output, **settings):
    policy, reward, output = Path(policy), Path(reward), Path(output)
    given = SETTINGS | {name: type(SETTINGS[name])(value) for name, value in settings.items()}
    output.mkdir(parents=True, exist_ok=True)
    record_lengths()
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    reward_model = with_shift(AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1, dtype=torch.float32), reward)
    room = given["max_length"] - given["response_length"]
    rows = Dataset.from_parquet(prompts).map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"][-room:]})
    config = PPOConfig(
        output_dir=str(output), seed=given["seed"], learning_rate=given["learning_rate"], response_length=given["response_length"],
        per_device_train_batch_size=given["batch_size"], local_rollout_forward_batch_size=given["batch_size"], gradient_accumulation_steps=1,
        num_mini_batches=1, total_episodes=given["updates"] * given["batch_size"], stop_token="eos", logging_steps=1, num_sample_generations=0,
        save_strategy="no", report_to=[], bf16=False, use_cpu=True, disable_tqdm=True, gradient_checkpointing=False)
    trainer = PPOTrainer(args=config, processing_class=tokenizer, model=model, ref_model=copy.deepcopy(model), reward_model=reward_model,
                         value_model=copy.deepcopy(reward_model), train_dataset=rows.select_columns(["input_ids"]),
                         eval_dataset=rows.select_columns(["input_ids"]).select(range(8)), callbacks=[Record(output, model, tokenizer, given["policy_every"])])
    trainer.train()
    trainer.save_model(str(output))
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:5], **dict(argument.split("=") for argument in sys.argv[5:]))
