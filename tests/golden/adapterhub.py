"""Bottleneck adapters as AdapterHub's `adapters` writes them, on models of `models.py` and `encoders.py`, with logits (or hidden states), loss and gradients.

It needs an environment of its own, as `adapters` is made for an older `transformers`: see the README.
"""

import json
from pathlib import Path

import adapters
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

HERE = Path(__file__).parent
PLACEMENTS = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=8),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=4),
    "parallel": adapters.ParBnConfig(reduction_factor=8),
}
BASES = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification}


def base_of(base):
    model = BASES[base].from_pretrained(HERE / base, attn_implementation="eager").eval()
    golden = load_file(HERE / base / "expected.safetensors")
    inputs = {name: golden[name] for name in ("input_ids", "token_type_ids") if name in golden}
    torch.testing.assert_close(model(**inputs).logits, golden["logits"], atol=1e-5, rtol=0)
    return model, golden, inputs


def loss_of(logits, golden):
    if "labels" in golden:
        return torch.nn.functional.cross_entropy(logits, golden["labels"])
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), golden["input_ids"][:, 1:].reshape(-1), reduction="none")
    mask = golden["loss_mask"][:, 1:].reshape(-1).float()
    return (losses * mask).sum() / mask.sum()


def write(base, placement, seed):
    model, golden, inputs = base_of(base)
    without = model(**inputs).logits
    adapters.init(model)
    model.add_adapter("golden", config=PLACEMENTS[placement])
    model.train_adapter("golden")
    model.set_active_adapters("golden")
    model.eval()
    torch.manual_seed(seed)
    trained = {name: parameter for name, parameter in model.named_parameters() if ".golden." in name}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    logits = model(**inputs).logits
    assert (logits - without).abs().max() > 0.01
    loss = loss_of(logits, golden)
    loss.backward()
    folder = HERE / f"adapter-{placement}-{base}"
    model.save_adapter(str(folder), "golden", with_head=False, use_safetensors=True)
    # Written sorted, so that the bytes are the same each time.
    file = folder / "adapter.safetensors"
    save_file(dict(sorted(load_file(file).items())), file)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["model_name"] = f"../{base}"
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    gradients = {f"grad.{name}": parameter.grad for name, parameter in trained.items()}
    assert {key.removeprefix("grad.") for key in gradients} == set(load_file(file)), "keys of gradients"
    inputs |= {name: golden[name] for name in ("labels", "loss_mask") if name in golden}
    result = inputs | {"logits": logits.detach(), "loss": loss.detach().reshape(1)} | gradients
    save_file({name: tensor.contiguous() for name, tensor in result.items()}, folder / "expected.safetensors")
    check_read(base, folder, logits)


def check_read(base, folder, logits):
    """AdapterHub reads back what it wrote."""
    model, _, inputs = base_of(base)
    adapters.init(model)
    model.load_adapter(str(folder), set_active=True, use_safetensors=True)
    torch.testing.assert_close(model.eval()(**inputs).logits, logits, atol=1e-5, rtol=0)


def main():
    torch.set_num_threads(1)
    for seed, base in enumerate(BASES, start=90):
        if (HERE / base).is_dir():
            for placement in PLACEMENTS:
                write(base, placement, seed)


if __name__ == "__main__":
    main()
