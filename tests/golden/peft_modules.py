"""What PEFT's adapters hold beside their updates of linears, on the models of `models.py`: updates of the output matrix, whole modules, single
tokens, tables that are tied, tables of a grown vocabulary.

For each of `ADAPTERS` a folder as `peft_lora.py` makes them. Where PEFT stores a tied matrix a second time, `grad.<key>` is that of the numbers
behind both, under the key of the embeddings. The vocabulary of the folders called `grown-*` has two tokens more than the base's, which the
`input_ids` hold. The folders of `FROZEN` have no gradients.
"""

import torch
from models import expected, inputs
from peft import IA3Config, LoraConfig, TrainableTokensConfig, get_peft_model
from peft_lora import HERE, base_of, check_written, finish
from peft_methods import key_on_disk, randomise_trained
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

GPT2 = dict(fan_in_fan_out=True)
TOKENS = [7, 3, 41]
# The base, PEFT's configuration, by how many tokens the vocabulary grows.
ADAPTERS = {
    "lora-head": ("llama", LoraConfig, dict(target_modules=["q_proj", "lm_head"], lora_alpha=8), 0),
    "lora-head-dora": ("mistral", LoraConfig, dict(target_modules=["q_proj", "lm_head"], use_dora=True), 0),
    "lora-head-gpt2": ("gpt2", LoraConfig, dict(target_modules=["c_attn", "lm_head"], **GPT2), 0),
    "lora-saved-head-gpt2": ("gpt2", LoraConfig, dict(target_modules=["c_attn"], modules_to_save=["lm_head"], **GPT2), 0),
    "lora-saved-head-gpt-neox": ("gpt-neox", LoraConfig, dict(target_modules=["query_key_value"], modules_to_save=["lm_head"]), 0),
    "lora-head-gpt-neox": ("gpt-neox", LoraConfig, dict(target_modules=["query_key_value", "lm_head"]), 0),
    "lora-whole-qwen3": ("qwen3", LoraConfig, dict(target_modules=["v_proj"], modules_to_save=["norm", "gate_proj"]), 0),
    "lora-whole-gpt2": ("gpt2", LoraConfig, dict(target_modules=["c_attn"], modules_to_save=["ln_f", "mlp.c_fc"], **GPT2), 0),
    "lora-whole-gemma2": ("gemma2", LoraConfig, dict(target_modules=["q_proj"], modules_to_save=["input_layernorm"]), 0),
    "lora-embedding-gemma2": ("gemma2", LoraConfig, dict(target_modules=["q_proj", "embed_tokens"]), 0),
    "lora-tied": ("llama3", LoraConfig, dict(target_modules=["q_proj", "embed_tokens"], lora_alpha=8, ensure_weight_tying=True), 0),
    "lora-saved-tied": ("llama3", LoraConfig, dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"],
                                                   ensure_weight_tying=True), 0),
    "lora-tokens": ("llama", LoraConfig, dict(target_modules=["q_proj"], trainable_token_indices=TOKENS), 0),
    "lora-tokens-gpt2": ("gpt2", LoraConfig, dict(target_modules=["c_attn"], trainable_token_indices=TOKENS, **GPT2), 0),
    "lora-tokens-of-both": ("llama3", LoraConfig, dict(target_modules=["q_proj"], trainable_token_indices={
        "embed_tokens": TOKENS, "lm_head": [5]}), 0),
    "ia3-head": ("mistral", IA3Config, dict(modules_to_save=["lm_head", "norm"]), 0),
    "ia3-scaled-head": ("llama", IA3Config, dict(target_modules=["k_proj", "lm_head"], feedforward_modules=[]), 0),
    "grown-saved": ("llama", LoraConfig, dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]), 2),
    "grown-saved-embedding": ("llama", LoraConfig, dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), 2),
    "grown-plain-gpt2": ("gpt2", LoraConfig, dict(target_modules=["c_attn"], **GPT2), 2),
    "grown-updated-tied": ("qwen2", LoraConfig, dict(target_modules=["q_proj", "embed_tokens"]), 2),
    "grown-tokens": ("llama", LoraConfig, dict(target_modules=["q_proj"], trainable_token_indices=[96, 97],
                                               modules_to_save=["lm_head"]), 2),
    "tokens": ("llama", TrainableTokensConfig, dict(token_indices=TOKENS), 0),
    "tokens-gpt2": ("gpt2", TrainableTokensConfig, dict(token_indices=TOKENS), 0),
    "grown-tokens-alone": ("llama3", TrainableTokensConfig, dict(token_indices=[96, 97]), 2),
}
FROZEN = ["tokens", "tokens-gpt2", "grown-tokens-alone"]


def grown(base, tokens):
    model = base_of(AutoModelForCausalLM, base)
    if tokens:
        torch.manual_seed(7)
        model.resize_token_embeddings(model.config.vocab_size + tokens, mean_resizing=False)
    return model


def write(name, seed):
    base, kind, settings, tokens = ADAPTERS[name]
    if kind is LoraConfig:
        settings = dict(r=4) | settings
    torch.manual_seed(seed)
    model = get_peft_model(grown(base, tokens), kind(task_type="CAUSAL_LM", **settings)).eval()
    randomise_trained(model)
    input_ids, loss_mask = inputs(seed)
    # All listed tokens and all new ones are seen.
    input_ids[0, :3] = torch.tensor(TOKENS)
    input_ids[1, 4:4 + tokens] = 96 + torch.arange(tokens)
    result = {key_on_disk(key, None): tensor for key, tensor in expected(model, input_ids, loss_mask).items()}
    if name == "lora-tied":
        # PEFT's two parameters are views of the same numbers.
        prefix, table = "grad.base_model.model.lm_head.", "grad.base_model.model.model.embed_tokens."
        result[f"{table}lora_embedding_B"] += result.pop(f"{prefix}lora_A.weight").T
        result[f"{table}lora_embedding_A"] += result.pop(f"{prefix}lora_B.weight").T
    if name in FROZEN:
        result = {key: tensor for key, tensor in result.items() if not key.startswith("grad.")}
    finish(model, HERE / name, base, {key: tensor.contiguous() for key, tensor in result.items()})
    stored = load_file(HERE / name / "adapter_model.safetensors")
    trained = {key.removeprefix("grad.") for key in result if key.startswith("grad.")}
    assert trained <= set(stored), trained - set(stored)
    # A row that no text holds has no gradient in the embeddings, and all have one in the output.
    assert all(result[f"grad.{key}"].abs().max() > 1e-4 for key in trained)
    check_written(HERE / name, grown(base, tokens), input_ids, result["logits"])


def main():
    torch.set_num_threads(1)
    for seed, name in enumerate(ADAPTERS, start=150):
        write(name, seed)


if __name__ == "__main__":
    main()
