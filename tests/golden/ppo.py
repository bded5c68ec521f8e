"""PPO's numbers from the code of TRL 1.12 itself: the lines of `PPOTrainer.train` between a rollout and its loss are cut out and run.

`ppo/trl.safetensors` is TRL as it is, on a padded batch. `ppo/expected.safetensors` differs in one deliberate point. TRL puts the
score of an answer that ended early one position after its last token, where it also trains a value; here, as in InstructGPT, it stands
at the last token. The two agree for answers that fill the row, so each answer's rewards, advantages and returns come from TRL's lines
run on a row of its own length; whitening and losses come from TRL's lines with the mask of real tokens over all rows.
"""

import inspect
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from trl.experimental.ppo import ppo_trainer
from trl.experimental.ppo.ppo_trainer import PPOTrainer, first_true_indices, masked_whiten, truncate_response

HERE = Path(__file__).parent
SETTINGS = dict(kl_coef=0.05, gamma=0.99, lam=0.95, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, temperature=0.7,
                kl_estimator="k1", missing_eos_penalty=None, whiten_rewards=False)
# Answers of these lengths in a row of seven; the first fills it without an end-of-sequence token, the last with one.
LENGTHS = [7, 3, 5, 1, 7]
VOCABULARY, PAD, EOS = 11, 0, 2


def lines_of_train(first, last):
    """The lines of `PPOTrainer.train` from the one that begins with `first` to the one that begins with `last`, as a program."""
    lines = inspect.getsource(PPOTrainer.train).splitlines()
    begins = [number for number, line in enumerate(lines) if line.strip().startswith(first)]
    assert len(begins) == 1, first
    end = next(number for number, line in enumerate(lines) if number >= begins[0] and line.strip().startswith(last))
    return compile(dedent("\n".join(lines[begins[0]:end + 1])), f"PPOTrainer.train: {first}", "exec")


ADVANTAGES = lines_of_train("contain_eos_token =", "advantages = torch.masked_fill(")
LOSS = lines_of_train("mb_advantage = advantages[", "loss = pg_loss +")
STATISTICS = lines_of_train("pg_clipfrac = masked_mean(", "approxkl =")


def trl(**variables):
    """What the lines of TRL see: its module's names, the settings and the variables of the trainer."""
    settings = SimpleNamespace(**(SETTINGS | variables.pop("settings", {})))
    tokens = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
    trainer = SimpleNamespace(args=settings, processing_class=tokens)
    return vars(ppo_trainer) | {"args": settings, "processing_class": tokens, "self": trainer} | variables


def advantages(batch, settings=None, whiten=masked_whiten):
    """Runs the lines from scores to advantages."""
    truncated = truncate_response(EOS, PAD, batch["responses"])
    names = trl(settings=settings or {}, responses=batch["responses"], postprocessed_responses=truncated,
                sequence_lengths=first_true_indices(truncated == PAD) - 1, masked_whiten=whiten,
                **{name: batch[name].clone() for name in ("logprobs", "ref_logprobs", "values", "scores")})
    exec(ADVANTAGES, names)
    names["advantages_before_whitening"] = torch.stack(names["advantages_reversed"][::-1], axis=1)
    return names


def update(names, batch, logits, new_values):
    """Runs the lines from new logits and values to the loss, and differentiates it."""
    logits, new_values = logits.clone().requires_grad_(), new_values.clone().requires_grad_()
    found = {}

    def forward(*_):
        # TRL reads the logits one position before the token, and drops those of the last position.
        of_last = torch.zeros_like(logits[:, :1])
        output = SimpleNamespace(logits=torch.cat([logits, of_last], 1))
        return output, torch.cat([new_values, torch.zeros_like(new_values[:, :1])], 1).unsqueeze(-1)

    def log_probs_of(scaled_logits, tokens):
        found["new_logprobs"] = ppo_trainer.selective_log_softmax(scaled_logits, tokens)
        found["new_logprobs"].retain_grad()
        return found["new_logprobs"]

    names = names | {"micro_batch_inds": torch.arange(len(logits)), "query_responses": batch["responses"], "context_length": 1,
                     "model": None, "forward": forward, "selective_log_softmax": log_probs_of}
    exec(LOSS, names)
    names["loss"].backward()
    with torch.no_grad():
        exec(STATISTICS, names)
    gradients = {"grad.new_logprobs": found["new_logprobs"].grad, "grad.new_values": new_values.grad, "grad.logits": logits.grad}
    return names, {"new_logprobs": found["new_logprobs"], "new_values": new_values, **gradients}


def make_batch():
    rows, width = len(LENGTHS), max(LENGTHS)
    mask = torch.arange(width)[None] < torch.tensor(LENGTHS)[:, None]
    responses = torch.where(mask, torch.randint(3, VOCABULARY, (rows, width)), PAD)
    for row, length in list(enumerate(LENGTHS))[1:]:
        responses[row, length - 1] = EOS
    logits = 2 * torch.randn(rows, width, VOCABULARY)
    logprobs = ppo_trainer.selective_log_softmax(logits / (SETTINGS["temperature"] + 1e-7), responses)
    batch = {"responses": responses, "logprobs": logprobs, "ref_logprobs": logprobs + 0.5 * torch.randn(rows, width),
             "values": torch.randn(rows, width), "scores": torch.randn(rows)}
    new_logits = logits + 0.3 * torch.randn(rows, width, VOCABULARY)
    return batch, mask, new_logits, batch["values"] + 0.3 * torch.randn(rows, width)


def as_trl(batch, new_logits, new_values):
    """`ppo/trl.safetensors`: three runs with other settings, and the loss of the first."""
    runs = {"k1": {}, "k3": {"kl_estimator": "k3", "missing_eos_penalty": 1.0}, "whitened_rewards": {"whiten_rewards": True}}
    result = {name: tensor.clone() for name, tensor in batch.items()}
    for run, settings in runs.items():
        names = advantages(batch, settings)
        for name in ("scores", "kl", "rewards", "advantages_before_whitening", "advantages", "returns"):
            result[f"{run}.{name}"] = names[name]
        if run == "k1":
            result |= {"padding_mask": names["padding_mask"].long(), "padding_mask_p1": names["padding_mask_p1"].long()}
            names, outputs = update(names, batch, new_logits, new_values)
            result |= outputs | {"logits": new_logits, "entropy": names["entropy"]}
            scalars = ("pg_loss", "vf_loss", "loss", "pg_clipfrac", "vf_clipfrac", "approxkl")
            result |= {name: names[name].reshape(1) for name in scalars} | {"ratio_mean": names["ratio"].mean().reshape(1)}
    return result


def with_the_score_at_the_last_token(batch, mask, new_logits, new_values):
    """`ppo/expected.safetensors`."""
    names = {name: torch.zeros(mask.shape) for name in ("rewards", "rewards_k3", "advantages", "returns")}
    padded = advantages(batch)
    for row, length in enumerate(LENGTHS):
        alone = {name: tensor[row:row + 1, :length] if tensor.dim() == 2 else tensor[row:row + 1] for name, tensor in batch.items()}
        # A single token cannot be whitened; whitening is for all rows together.
        of_row = advantages(alone, whiten=lambda advantages, mask: advantages)
        for name in ("rewards", "advantages", "returns"):
            names[name][row, :length] = of_row[name][0]
        names["rewards_k3"][row, :length] = advantages(alone, {"kl_estimator": "k3"}, lambda advantages, mask: advantages)["rewards"][0]
        if length == max(LENGTHS):
            assert torch.equal(names["returns"][row], padded["returns"][row])
    whitened = torch.where(mask, masked_whiten(names["advantages"], mask), 0.0)
    state = padded | {"advantages": whitened, "returns": names["returns"], "padding_mask_p1": padded["padding_mask"],
                      "values": torch.where(mask, batch["values"], 0.0)}
    after, outputs = update(state, batch, new_logits, new_values)
    difference = after["logprobs_diff"][mask]
    scalars = {"policy_loss": after["pg_loss"], "value_loss": after["vf_loss"], "clip_fraction": after["pg_clipfrac"],
               "value_clip_fraction": after["vf_clipfrac"], "approximate_kl": 0.5 * (difference**2).mean(),
               "ratio": difference.exp().mean(), "entropy_mean": after["entropy"][mask].mean()}
    assert 0 < scalars["clip_fraction"] < 1 and 0 < scalars["value_clip_fraction"] < 1
    result = batch | names | outputs | {name: scalar.reshape(1) for name, scalar in scalars.items()}
    return result | {"lengths": torch.tensor(LENGTHS), "whitened": whitened, "logits": new_logits, "entropy": after["entropy"]}


def main():
    torch.set_num_threads(1)
    torch.manual_seed(100)
    batch, mask, new_logits, new_values = make_batch()
    folder = HERE / "ppo"
    folder.mkdir(exist_ok=True)
    files = {"trl": as_trl(batch, new_logits, new_values),
             "expected": with_the_score_at_the_last_token(batch, mask, new_logits, new_values)}
    for name, tensors in files.items():
        # A tensor's memory may be another's too, and files hold each once.
        save_file({key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
