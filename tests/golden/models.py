"""Tiny models of every family with random weights, and what `transformers` and PyTorch make of them.

For each family a folder `<name>/` as `save_pretrained` writes it, with `expected.safetensors`: `input_ids`, `logits`, `loss_mask`
(position `t` says whether token `t`, predicted from those before it, counts), `loss` (mean cross-entropy of the counted tokens of both
rows together) and `grad.<parameter>` of that loss. A tied embedding has one gradient, under the embedding's name.

Each configuration differs from the defaults where a reader of it could overlook a field; `main` asserts that the fields matter. Where rotations depend
on the length of a sequence, `short.input_ids` and `short.logits` are of sequences of the original length.

    python models.py [NAME...]     # these folders, or all
"""

import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
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
        "gpt2-unscaled": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
                                    bos_token_id=1, eos_token_id=2, scale_attn_weights=False),
        "llama-dynamic": LlamaConfig(**COMMON | dict(max_position_embeddings=ORIGINAL), rope_parameters={
            "rope_type": "dynamic", "factor": 3.0, "rope_theta": 300.0}),
        "llama-yarn": LlamaConfig(**COMMON, rope_parameters={
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 300.0, "original_max_position_embeddings": ORIGINAL, "beta_fast": 2.5,
            "beta_slow": 0.3, "mscale": 3.0, "mscale_all_dim": 1.5, "truncate": False}),
        "gemma3": Gemma3TextConfig(**COMMON, **GEMMA3),
        "smollm3": SmolLM3Config(**COMMON, pad_token_id=0, no_rope_layers=[0, 1], use_sliding_window=True, sliding_window=6,
                                 tie_word_embeddings=False, rms_norm_eps=0.01, attention_bias=True, mlp_bias=True,
                                 rope_parameters={"rope_type": "default", "rope_theta": 300.0}),
        "olmo2": Olmo2Config(**COMMON, rms_norm_eps=0.01, rope_parameters={
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 300.0, "original_max_position_embeddings": ORIGINAL}),
        "olmo3": Olmo3Config(**COMMON, rms_norm_eps=0.01, sliding_window=6, attention_bias=True,
                             layer_types=["sliding_attention", "full_attention"], rope_parameters={
                                 "full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 300.0,
                                                    "original_max_position_embeddings": ORIGINAL, "attention_factor": 1.5},
                                 "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}),
        # Half of each head of 8 is rotated, by two pairs.
        "phi3": Phi3Config(**COMMON, pad_token_id=0, rms_norm_eps=0.01, sliding_window=9, original_max_position_embeddings=ORIGINAL,
                           rope_parameters={"rope_type": "longrope", "rope_theta": 300.0, "partial_rotary_factor": 0.5,
                                            "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]}),
        "granite": GraniteConfig(**COMMON, rms_norm_eps=0.01, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
                                 embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.3, logits_scaling=2.5,
                                 rope_parameters={"rope_type": "default", "rope_theta": 300.0}),
    }


ORIGINAL = 16
GEMMA3 = dict(head_dim=16, rms_norm_eps=0.01, sliding_window=6, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=9,
              final_logit_softcapping=5.0, rope_parameters={
                  "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
                  "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}})
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)


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
    "gpt2-unscaled": {"scale_attn_weights": True},
    "llama-dynamic": {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    "llama-yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 300.0, "original_max_position_embeddings": 16}},
    "gemma3": {"final_logit_softcapping": None, "query_pre_attn_scalar": 16, "layer_types": ["full_attention", "full_attention"],
               "sliding_window": 24, "rms_norm_eps": 1e-6, "rope_parameters": None},
    "smollm3": {"no_rope_layers": [1, 1], "sliding_window": 24, "rms_norm_eps": 1e-6},
    "olmo2": {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    "olmo3": {"rms_norm_eps": 1e-5, "sliding_window": 24, "layer_types": ["full_attention", "full_attention"], "rope_parameters": None},
    "phi3": {"sliding_window": None, "original_max_position_embeddings": 64,
             "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5}},
    "granite": {"embedding_multiplier": 1.0, "attention_multiplier": 0.35, "residual_multiplier": 1.0, "logits_scaling": 1.0},
}


def randomise(model):
    """Norms and biases too, so that none of them is left out unnoticed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                # Gemma multiplies with one more than its norms' weights.
                centre = 0.0 if name.endswith("bias") or "gemma" in model.config.model_type else 1.0
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


def write_with_images(text, result):
    """The same model as the text part of one of text and images, with the names and nesting of such a folder."""
    config = Gemma3Config(text_config=Gemma3TextConfig(**COMMON, **GEMMA3).to_dict(), vision_config=VISION, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    folder = HERE / "gemma3-with-images"
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    again = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    logits = again(input_ids=result["input_ids"]).logits
    # This class of transformers caps no logits.
    cap = GEMMA3["final_logit_softcapping"]
    torch.testing.assert_close(cap * torch.tanh(logits / cap), result["logits"], atol=1e-5, rtol=0)
    save_file({"input_ids": result["input_ids"], "logits": logits.detach().contiguous()}, folder / "expected.safetensors")


def main(chosen):
    torch.set_num_threads(1)
    for seed, (name, config) in enumerate(configurations().items()):
        if chosen and name not in chosen:
            continue
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
        if name in ("llama-dynamic", "phi3"):
            short = input_ids[:, :ORIGINAL].contiguous()
            result |= {"short.input_ids": short, "short.logits": load(folder)(input_ids=short).logits.detach().contiguous()}
            difference = (result["short.logits"] - result["logits"][:, :ORIGINAL]).abs().max()
            assert difference > 0.01, f"{name}: the length does not matter"
        save_file(result, folder / "expected.safetensors")
        torch.testing.assert_close(load(folder)(input_ids=input_ids).logits, result["logits"], atol=1e-5, rtol=0)
        if name == "gemma3":
            write_with_images(model, result)
        if name == "llama3":
            write_in_the_older_form(folder)
            torch.testing.assert_close(load(folder)(input_ids=input_ids).logits, result["logits"], atol=1e-5, rtol=0)
        for field, value in OVERLOOKED.get(name, {}).items():
            difference = (logits_with(folder, input_ids, {field: value}) - result["logits"]).abs().max()
            assert difference > 0.01, f"{name}: {field} does not matter"
        if name == "llama":
            save_in_half_precision_and_parts(model, input_ids, HERE / "llama-sharded")


if __name__ == "__main__":
    main(sys.argv[1:])
