"""The log-probability of target tokens and the entropy at a temperature, from hidden states and the output matrix.

With `z = hidden Wᵀ / temperature`: `logprob = log_softmax(z)[target]` and `entropy = -Σ softmax(z) log_softmax(z)`. `grad.*` are
those of `Σ a logprob + Σ b entropy` with random `a` and `b`, `logprob.grad.*` and `entropy.grad.*` those of the two sums alone. Computed
in double precision and rounded at the end. The log-probabilities are also compared with TRL's `selective_log_softmax`.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from trl.trainer.utils import selective_log_softmax

HERE = Path(__file__).parent
TARGETS, WIDTH, VOCABULARY, TEMPERATURE = 13, 16, 50, 0.7


def main():
    torch.set_num_threads(1)
    torch.manual_seed(110)
    hidden = 0.4 * torch.randn(TARGETS, WIDTH)
    hidden[-1] *= 8  # One distribution is sharp.
    hidden, weight = (tensor.double().requires_grad_() for tensor in (hidden, torch.randn(VOCABULARY, WIDTH)))
    targets = torch.randint(0, VOCABULARY, (TARGETS,))
    scaled_logits = hidden @ weight.T / TEMPERATURE
    log_softmax = scaled_logits.log_softmax(-1)
    logprob = log_softmax.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    torch.testing.assert_close(logprob, selective_log_softmax(scaled_logits, targets))
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=scaled_logits).entropy())

    a, b = torch.randn(TARGETS), torch.randn(TARGETS)
    result = {"hidden": hidden, "weight": weight, "targets": targets, "a": a, "b": b, "logprob": logprob, "entropy": entropy,
              "temperature": torch.tensor([TEMPERATURE])}
    sums = {"logprob.": (a * logprob).sum(), "entropy.": (b * entropy).sum()}
    for name, value in (sums | {"": sum(sums.values())}).items():
        gradients = torch.autograd.grad(value, (hidden, weight), retain_graph=True)
        result[f"{name}grad.hidden"], result[f"{name}grad.weight"] = gradients
    (HERE / "logprob").mkdir(exist_ok=True)
    floats = {name: tensor.detach().float() if tensor.is_floating_point() else tensor for name, tensor in result.items()}
    save_file({name: tensor.contiguous() for name, tensor in floats.items()}, HERE / "logprob" / "expected.safetensors")


if __name__ == "__main__":
    main()
