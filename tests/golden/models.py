"""Tiny models of every family with random weights, and what `transformers` and PyTorch make of them.

For each family a folder `<name>/` as `save_pretrained` writes it, with `expected.safetensors`: `input_ids`, `logits`, `loss_mask`
(over predicted positions), `loss` (mean cross-entropy of the masked-in targets) and `grad.<parameter>` of that loss.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

HERE = Path(__file__).parent
VOCABULARY, LENGTH = 96, 24
COMMON = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, bos_token_id=1, eos_token_id=2)
LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 16}


def configurations():
    return {
        "llama": LlamaConfig(**COMMON, tie_word_embeddings=False),
        "llama3": LlamaConfig(**COMMON, tie_word_embeddings=True, rope_theta=500.0, rope_scaling=dict(LLAMA3_SCALING)),
        "mistral": MistralConfig(**COMMON, tie_word_embeddings=False, sliding_window=6),
        "qwen2": Qwen2Config(**COMMON, tie_word_embeddings=True),
        "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
                           bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    }


def randomise(model):
    """Norms and biases too, so that none of them is left out unnoticed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                centre = 0.0 if name.endswith("bias") else 1.0
                parameter.copy_(centre + 0.3 * torch.randn_like(parameter))


def expected(model, input_ids, loss_mask):
    model.zero_grad()
    logits = model(input_ids=input_ids).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), input_ids[:, 1:].reshape(-1), reduction="none")
    mask = loss_mask[:, 1:].reshape(-1).float()
    loss = (losses * mask).sum() / mask.sum()
    loss.backward()
    result = {"input_ids": input_ids, "logits": logits.detach(), "loss_mask": loss_mask, "loss": loss.detach().reshape(1)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            result[f"grad.{name}"] = parameter.grad.detach().clone()
    return {name: tensor.contiguous() for name, tensor in result.items()}


def inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    loss_mask = torch.randint(0, 2, (2, LENGTH), generator=generator)
    return input_ids, loss_mask


def main():
    torch.set_num_threads(1)
    for seed, (name, config) in enumerate(configurations().items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        randomise(model)
        folder = HERE / name
        model.save_pretrained(folder)
        input_ids, loss_mask = inputs(seed)
        result = expected(model, input_ids, loss_mask)
        save_file(result, folder / "expected.safetensors")
        (folder / "generation_config.json").unlink(missing_ok=True)
        if name == "llama3":
            # The form of config.json that most files in the world have.
            path = folder / "config.json"
            written = json.loads(path.read_text())
            for field in ("rope_parameters", "dtype"):
                written.pop(field, None)
            written.update(rope_theta=500.0, rope_scaling=LLAMA3_SCALING, torch_dtype="float32")
            path.write_text(json.dumps(written, indent=2) + "\n")
            again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
            assert torch.allclose(again(input_ids=input_ids).logits, result["logits"], atol=1e-5)
        if name == "llama":
            half = model.to(torch.bfloat16)
            half.save_pretrained(HERE / "llama-sharded", max_shard_size="20KB")
            (HERE / "llama-sharded" / "generation_config.json").unlink(missing_ok=True)
            # Read again, as casting a model casts its table of rotary frequencies too.
            again = AutoModelForCausalLM.from_pretrained(HERE / "llama-sharded", dtype=torch.float32, attn_implementation="eager")
            logits = again.eval()(input_ids=input_ids).logits
            save_file({"input_ids": input_ids, "logits": logits.detach().contiguous()},
                      HERE / "llama-sharded" / "expected.safetensors")


if __name__ == "__main__":
    main()
