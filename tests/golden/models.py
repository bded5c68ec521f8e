"""Tiny models of every family with random weights, and what `transformers` and PyTorch make of them.

For each family a folder `<name>/` as `save_pretrained` writes it, with `expected.safetensors`: `input_ids`, `logits`, `loss_mask`
(position `t` says whether token `t`, predicted from those before it, counts), `loss` (mean cross-entropy of the counted tokens of both
rows together) and `grad.<parameter>` of that loss. A tied embedding has one gradient, under the embedding's name.

Each configuration differs from the defaults where a reader of it could overlook a field; `main` asserts that the fields matter.
"""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

HERE = Path(__file__).parent
VOCABULARY, LENGTH = 96, 24
COMMON = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, bos_token_id=1, eos_token_id=2)
NEOX = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, initializer_range=0.2, bos_token_id=1, eos_token_id=2, layer_norm_eps=0.01,
            hidden_act="gelu", hidden_dropout=0.0, attention_dropout=0.0)
LLAMA3_THETA = 500.0
# The wavelengths of the four rotations are 6, 30, 140 and 664 positions: below, between and above 32/4 and 32/1.
LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 32}


def configurations():
    return {
        "llama": LlamaConfig(**COMMON, tie_word_embeddings=False),
        "llama3": LlamaConfig(**COMMON, tie_word_embeddings=True, rope_parameters={"rope_theta": LLAMA3_THETA, **LLAMA3_SCALING}),
        "mistral": MistralConfig(**COMMON, tie_word_embeddings=False, sliding_window=6, head_dim=16, rms_norm_eps=0.01,
                                 rope_parameters={"rope_type": "default", "rope_theta": 300.0}),
        "qwen2": Qwen2Config(**COMMON, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1000.0}),
        "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
                           bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                           layer_norm_epsilon=0.01),
        "qwen3": Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True, rms_norm_eps=0.01,
                             rope_parameters={"rope_type": "default", "rope_theta": 1000.0}),
        "gpt-neox": GPTNeoXConfig(**NEOX, use_parallel_residual=True, tie_word_embeddings=False,
                                  rope_parameters={"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5}),
        "gpt-neox-sequential": GPTNeoXConfig(**NEOX, use_parallel_residual=False, tie_word_embeddings=True, attention_bias=False,
                                             rope_parameters={"rope_type": "default", "rope_theta": 300.0,
                                                              "partial_rotary_factor": 0.25}),
        "gemma2": Gemma2Config(**COMMON, head_dim=16, tie_word_embeddings=True, rms_norm_eps=0.01, sliding_window=6,
                               layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=9,
                               attn_logit_softcapping=2.0, final_logit_softcapping=5.0,
                               rope_parameters={"rope_type": "default", "rope_theta": 300.0}),
    }


# What a reader of the configuration could overlook, and what it would take it for.
OVERLOOKED = {
    "llama3": {"rope_scaling": None, "rope_theta": 10000.0},
    "mistral": {"sliding_window": None, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "gpt2": {"layer_norm_epsilon": 1e-5},
    "qwen3": {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "gpt-neox": {"use_parallel_residual": False, "layer_norm_eps": 1e-5, "hidden_act": "relu",
                 "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 1.0}},
    "gpt-neox-sequential": {"use_parallel_residual": True},
    "gemma2": {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 16,
               "layer_types": ["full_attention", "full_attention"], "sliding_window": 24, "rms_norm_eps": 1e-6},
}


def randomise(model):
    """Norms and biases too, so that none of them is left out unnoticed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                # Gemma multiplies with one more than its norms' weights.
                centre = 0.0 if name.endswith("bias") or model.config.model_type == "gemma2" else 1.0
                parameter.copy_(centre + 0.3 * torch.randn_like(parameter))


def expected(model, input_ids, loss_mask):
    model.zero_grad()
    # Virtual tokens of a prompt stand before the real ones, and their logits are left out.
    logits = model(input_ids=input_ids).logits[:, -input_ids.shape[1]:]
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


def load(folder):
    """The model of a folder in f32. (A model cast from bf16 would keep rotary frequencies rounded to bf16.)"""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits_with(folder, input_ids, changes):
    """The logits if some fields of `config.json` had other values."""
    with TemporaryDirectory() as changed:
        shutil.copy(folder / "model.safetensors", changed)
        config = json.loads((folder / "config.json").read_text()) | changes
        (Path(changed) / "config.json").write_text(json.dumps(config))
        return load(changed)(input_ids=input_ids).logits


def write_in_the_older_form(folder):
    """The form of `config.json` that most files in the world have."""
    path = folder / "config.json"
    written = json.loads(path.read_text())
    for field in ("rope_parameters", "dtype"):
        del written[field]
    written |= {"rope_theta": LLAMA3_THETA, "rope_scaling": LLAMA3_SCALING, "torch_dtype": "float32"}
    path.write_text(json.dumps(written, indent=2) + "\n")


def save_in_half_precision_and_parts(model, input_ids, folder):
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    logits = load(folder)(input_ids=input_ids).logits
    save_file({"input_ids": input_ids, "logits": logits.detach().contiguous()}, folder / "expected.safetensors")


def main():
    torch.set_num_threads(1)
    for seed, (name, config) in enumerate(configurations().items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        randomise(model)
        folder = HERE / name
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        input_ids, loss_mask = inputs(seed)
        result = expected(model, input_ids, loss_mask)
        if name.startswith("gpt-neox"):
            # The file calls the output matrix as it always did.
            result = {key.replace("grad.lm_head", "grad.embed_out"): tensor for key, tensor in result.items()}
        save_file(result, folder / "expected.safetensors")
        torch.testing.assert_close(load(folder)(input_ids=input_ids).logits, result["logits"], atol=1e-5, rtol=0)
        if name == "llama3":
            write_in_the_older_form(folder)
            torch.testing.assert_close(load(folder)(input_ids=input_ids).logits, result["logits"], atol=1e-5, rtol=0)
        for field, value in OVERLOOKED.get(name, {}).items():
            difference = (logits_with(folder, input_ids, {field: value}) - result["logits"]).abs().max()
            assert difference > 0.01, f"{name}: {field} does not matter"
        if name == "llama":
            save_in_half_precision_and_parts(model, input_ids, HERE / "llama-sharded")


if __name__ == "__main__":
    main()
