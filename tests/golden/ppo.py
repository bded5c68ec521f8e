"""PPO's numbers by the formulas of TRL 1.12 (`PPOTrainer.train`), with its own `masked_mean` and `masked_whiten`.

One difference is deliberate. TRL puts the score of an answer that ended early one position after its last token, where it also
trains a value; here, as in InstructGPT, it stands at the last token. The two agree for answers that fill the row, so each answer's rewards,
advantages and returns are computed by TRL's formulas in a row of its own length; whitening and losses use TRL's masks over all rows.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from trl.experimental.ppo.ppo_trainer import masked_mean, masked_whiten

HERE = Path(__file__).parent
KL_COEFFICIENT, GAMMA, LAMBDA, CLIP, VALUE_CLIP, VALUE_COEFFICIENT = 0.05, 0.99, 0.95, 0.2, 0.2, 0.1
LENGTHS = [7, 3, 5, 1, 7]


def row(logprobs, ref_logprobs, values, score):
    logr = ref_logprobs - logprobs
    kl = -logr
    rewards = -KL_COEFFICIENT * kl
    rewards[-1] += score
    last, reversed_advantages = 0, []
    for t in reversed(range(len(values))):
        next_value = values[t + 1] if t < len(values) - 1 else 0.0
        delta = rewards[t] + GAMMA * next_value - values[t]
        last = delta + GAMMA * LAMBDA * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1])
    return rewards, advantages, advantages + values


def main():
    torch.manual_seed(100)
    rows, width = len(LENGTHS), max(LENGTHS)
    mask = torch.arange(width)[None] < torch.tensor(LENGTHS)[:, None]
    logprobs = -torch.rand(rows, width) * 3
    ref_logprobs = logprobs + 0.5 * torch.randn(rows, width)
    values = torch.randn(rows, width)
    scores = torch.randn(rows)
    rewards, advantages, returns = (torch.zeros(rows, width) for _ in range(3))
    for index, length in enumerate(LENGTHS):
        of_row = row(logprobs[index, :length], ref_logprobs[index, :length], values[index, :length], scores[index])
        for target, source in zip((rewards, advantages, returns), of_row):
            target[index, :length] = source
    whitened = masked_whiten(advantages, mask)

    new_logprobs = (logprobs + 0.3 * torch.randn(rows, width)).requires_grad_()
    new_values = (values + 0.3 * torch.randn(rows, width)).requires_grad_()
    clipped_values = torch.clamp(new_values, values - VALUE_CLIP, values + VALUE_CLIP)
    value_losses, clipped_losses = torch.square(new_values - returns), torch.square(clipped_values - returns)
    value_loss = 0.5 * masked_mean(torch.max(value_losses, clipped_losses), mask)
    value_clip_fraction = masked_mean((clipped_losses > value_losses).float(), mask)
    difference = new_logprobs - logprobs
    ratio = torch.exp(difference)
    policy_losses, clipped_policy = -whitened * ratio, -whitened * torch.clamp(ratio, 1.0 - CLIP, 1.0 + CLIP)
    policy_loss = masked_mean(torch.max(policy_losses, clipped_policy), mask)
    clip_fraction = masked_mean((clipped_policy > policy_losses).float(), mask)
    approximate_kl = 0.5 * masked_mean(difference**2, mask)
    (policy_loss + VALUE_COEFFICIENT * value_loss).backward()

    scalars = {"policy_loss": policy_loss, "value_loss": value_loss, "clip_fraction": clip_fraction,
               "value_clip_fraction": value_clip_fraction, "approximate_kl": approximate_kl,
               "ratio": masked_mean(ratio, mask)}
    tensors = {"lengths": torch.tensor(LENGTHS), "logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values,
               "scores": scores, "rewards": rewards, "advantages": advantages, "whitened": whitened, "returns": returns,
               "new_logprobs": new_logprobs, "new_values": new_values, "grad.new_logprobs": new_logprobs.grad,
               "grad.new_values": new_values.grad}
    tensors |= {name: scalar.reshape(1) for name, scalar in scalars.items()}
    (HERE / "ppo").mkdir(exist_ok=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, HERE / "ppo" / "expected.safetensors")


if __name__ == "__main__":
    main()
