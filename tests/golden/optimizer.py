"""AdamW of PyTorch, the clipping of gradients by their global norm, and the learning-rate schedules of `transformers`."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup,
                          get_cosine_with_min_lr_schedule_with_warmup, get_linear_schedule_with_warmup)

HERE = Path(__file__).parent
WARMUP, TOTAL = 4, 20
# How large the gradients of each step are; those of the last but one are below the largest norm allowed, so they are not clipped.
SIZES = [1.0, 2.0, 30.0, 0.05, 4.0]


def main():
    torch.manual_seed(120)
    weight, bias = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(4))
    result = {"weight.0": weight.detach().clone(), "bias.0": bias.detach().clone()}
    optimizer = torch.optim.AdamW(
        [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step, size in enumerate(SIZES, start=1):
        weight.grad, bias.grad = size * torch.randn(3, 4), size * torch.randn(4)
        result[f"weight.grad.{step}"], result[f"bias.grad.{step}"] = weight.grad.clone(), bias.grad.clone()
        result[f"norm.{step}"] = torch.nn.utils.clip_grad_norm_([weight, bias], 1.0).reshape(1)
        assert (result[f"norm.{step}"] < 1.0) == (step == 4)
        result[f"weight.clipped.{step}"], result[f"bias.clipped.{step}"] = weight.grad.clone(), bias.grad.clone()
        optimizer.step()
        result[f"weight.{step}"], result[f"bias.{step}"] = weight.detach().clone(), bias.detach().clone()

    def rates(make):
        dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule, found = make(dummy), []
        for _ in range(TOTAL):
            found.append(schedule.get_last_lr()[0])
            dummy.step()
            schedule.step()
        return torch.tensor(found, dtype=torch.float32)

    result["schedule.constant"] = rates(lambda o: get_constant_schedule_with_warmup(o, WARMUP))
    result["schedule.linear"] = rates(lambda o: get_linear_schedule_with_warmup(o, WARMUP, TOTAL))
    result["schedule.cosine_to_zero"] = rates(lambda o: get_cosine_schedule_with_warmup(o, WARMUP, TOTAL))
    result["schedule.linear_without_warmup"] = rates(lambda o: get_linear_schedule_with_warmup(o, 0, TOTAL))
    result["schedule.cosine"] = rates(lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, WARMUP, TOTAL, min_lr_rate=0.1))
    (HERE / "optimizer").mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in result.items()}, HERE / "optimizer" / "expected.safetensors")


if __name__ == "__main__":
    main()
