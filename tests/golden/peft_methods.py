"""The other lightweight methods as PEFT writes them, on the models of `models.py`.

For each of `METHODS` a folder as `peft_lora.py` makes them: `expected.safetensors` with `input_ids`, `logits`, `loss_mask`, `loss` and
`grad.<key of adapter_model.safetensors>`. Where virtual tokens stand before the real ones the logits are those of the real tokens.

Of an encoder that makes the virtual tokens PEFT stores the output alone; its parameters are in `encoder.safetensors`, under the names of
PEFT's module, and `expected.safetensors` has `grad.<parameter>` of them.

The folders of `SCORED` hold a head besides the adapter, and `expected.safetensors` has `input_ids` and `scores`.

`initialisation` shows how LoRA's matrices begin: `pissa.product` (scale times B A) and `pissa.residual` (the frozen weight that is left)
of `weight`, rank 4, alpha 8; and one draw of `orthogonal.lora_A` and `orthogonal.lora_B`, whose product is 0.
"""

import json
import shutil
from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from models import LENGTH, expected, inputs
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoder,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.prefix_tuning import PrefixEncoder
from peft_lora import HERE, base_of, check_written, finish
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

VIRTUAL = dict(num_virtual_tokens=5)
LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
PATTERNS = dict(
    r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    # The first that matches counts, in the order of the file; `proj` is no whole name and matches nothing.
    rank_pattern={"^model.layers.0.self_attn.q_proj": 2, r"layers\.1\.mlp\..*_proj": 3, "proj": 7, "q_proj": 5, "v_proj": 6},
    alpha_pattern={"^model.layers.1.self_attn.v_proj": 20, "down_proj": 3, "layers.0.self_attn.(q|o)_proj": 12})
METHODS = {
    "lora-bias": ("qwen2", LoraConfig, dict(**LORA, bias="all")),
    "lora-bias-only": ("qwen2", LoraConfig, dict(**LORA, bias="lora_only")),
    "lora-embedding": ("llama", LoraConfig, dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"])),
    "lora-modules-to-save": ("llama", LoraConfig, dict(**LORA, modules_to_save=["lm_head", "embed_tokens"])),
    "lora-dora": ("llama", LoraConfig, dict(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True)),
    "lora-dora-gpt2": ("gpt2", LoraConfig, dict(r=4, lora_alpha=8, target_modules=["c_attn", "mlp.c_fc"], fan_in_fan_out=True,
                                                use_dora=True)),
    "lora-patterns": ("llama", LoraConfig, PATTERNS),
    "ia3-llama": ("llama", IA3Config, {}),
    "ia3-gpt2": ("gpt2", IA3Config, dict(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"],
                                         fan_in_fan_out=True)),
    "prompt-llama": ("llama", PromptTuningConfig, VIRTUAL),
    "prompt-gpt2": ("gpt2", PromptTuningConfig, VIRTUAL),
    "p-tuning-mlp": ("llama", PromptEncoderConfig, dict(**VIRTUAL, encoder_hidden_size=24)),
    "p-tuning-lstm": ("llama", PromptEncoderConfig, dict(**VIRTUAL, encoder_hidden_size=24, encoder_num_layers=2,
                                                         encoder_reparameterization_type="LSTM", encoder_dropout=0.0)),
    "prefix-llama": ("llama", PrefixTuningConfig, VIRTUAL),
    "prefix-gpt2": ("gpt2", PrefixTuningConfig, VIRTUAL),
    "prefix-projection": ("llama", PrefixTuningConfig, dict(**VIRTUAL, encoder_hidden_size=24, prefix_projection=True)),
}
ENCODERS = {"p-tuning-mlp": PromptEncoder, "p-tuning-lstm": PromptEncoder, "prefix-projection": PrefixEncoder}
# The folder, the settings, the number of scores and the key of the head.
SCORED = {
    "prompt-reward": (PromptTuningConfig, VIRTUAL, 1, "base_model.score.weight"),
    "prefix-reward": (PrefixTuningConfig, VIRTUAL, 1, "base_model.score.weight"),
    "ia3-reward": (IA3Config, {}, 1, "base_model.model.score.weight"),
    "lora-classifier": (LoraConfig, LORA, 3, "base_model.model.score.weight"),
}


def randomise_trained(model):
    """What begins as a copy or as ones stays near that, the rest is drawn around 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = 0.3 * torch.randn_like(parameter)
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + noise)
            elif "ia3_l" in name:
                parameter.copy_(1 + noise)
            elif "modules_to_save" in name:
                parameter.add_(noise)
            else:
                parameter.copy_(noise)


def adapted(kind, base, config, seed, **options):
    torch.manual_seed(seed)
    model = get_peft_model(base_of(kind, base, **options), config).eval()
    randomise_trained(model)
    return model


def key_on_disk(name, encoder):
    """What a trained parameter is called in `adapter_model.safetensors` or, if PEFT stores an encoder's output, in its own file."""
    name = name.replace(".modules_to_save.default", "").replace(".default", "")
    name = name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    if not encoder:
        name = name.replace("prompt_encoder.embedding.weight", "prompt_embeddings")
    return name.replace("prompt_encoder.", "")


def check_gradients(result, stored):
    """Every stored parameter is trained, but the embedding that PEFT writes beside LoRA's matrices for it."""
    trained = {key.removeprefix("grad.") for key in result if key.startswith("grad.")}
    assert trained == {key for key in stored if not key.endswith("embed_tokens.base_layer.weight")}
    for key in trained:
        assert result[f"grad.{key}"].abs().max() > 1e-3, f"{key} does not matter"


def write_encoder(model, folder, kind):
    """The parameters of the encoder, whose output is what PEFT has stored."""
    parameters = model.prompt_encoder["default"].state_dict()
    save_file(parameters, folder / "encoder.safetensors")
    again = kind(model.peft_config["default"])
    again.load_state_dict(load_file(folder / "encoder.safetensors"))
    stored = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    made = again(torch.arange(VIRTUAL["num_virtual_tokens"])[None])[0]
    torch.testing.assert_close(made, stored, atol=1e-6, rtol=0)
    return parameters


def logits_behind_prompt(base_model, prompt, input_ids):
    words = base_model.get_input_embeddings()(input_ids)
    rows = torch.cat([prompt.expand(len(words), -1, -1), words], dim=1)
    return base_model(inputs_embeds=rows).logits[:, len(prompt):]


def logits_behind_prefix(base_model, prefix, input_ids, first_position):
    """A prefix is laid out as [token, layer, key or value, head, size]. Its keys are not rotated."""
    config = base_model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    layers = prefix.view(len(prefix), config.num_hidden_layers, 2, heads, -1).permute(1, 2, 3, 0, 4)
    rows = len(input_ids)
    cache = DynamicCache([(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1)) for key, value in layers])
    positions = first_position + torch.arange(LENGTH)[None]
    return base_model(input_ids=input_ids, past_key_values=cache, position_ids=positions).logits


def check_virtual_tokens(name, base, result):
    """The logits follow from the stored array as README.md describes it."""
    virtual = load_file(HERE / name / "adapter_model.safetensors")["prompt_embeddings"]
    base_model, input_ids = base_of(AutoModelForCausalLM, base), result["input_ids"]
    if not name.startswith("prefix"):
        logits = logits_behind_prompt(base_model, virtual, input_ids)
    else:
        logits = logits_behind_prefix(base_model, virtual, input_ids, first_position=len(virtual))
        overlooked = logits_behind_prefix(base_model, virtual, input_ids, first_position=0)
        assert (overlooked - result["logits"]).abs().max() > 0.01
    torch.testing.assert_close(logits, result["logits"], atol=1e-5, rtol=0)


def check_patterns(result):
    """Both kinds of patterns were found, and the fields that no shape shows matter."""
    folder = HERE / "lora-patterns"
    ranks = {len(tensor) for key, tensor in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in key}
    assert ranks == {2, 3, 4, 5, 6}
    for field, value in {"alpha_pattern": {}, "use_rslora": False}.items():
        with TemporaryDirectory() as changed:
            shutil.copy(folder / "adapter_model.safetensors", changed)
            config = json.loads((folder / "adapter_config.json").read_text()) | {field: value}
            (Path(changed) / "adapter_config.json").write_text(json.dumps(config))
            again = PeftModel.from_pretrained(base_of(AutoModelForCausalLM, "llama"), changed).eval()
            difference = again(input_ids=result["input_ids"]).logits - result["logits"]
            assert difference.abs().max() > 0.01, f"{field} does not matter"


def write_method(name, seed):
    base, kind, settings = METHODS[name]
    folder, encoder = HERE / name, ENCODERS.get(name)
    model = adapted(AutoModelForCausalLM, base, kind(task_type="CAUSAL_LM", **settings), seed)
    result = {key_on_disk(key, encoder): tensor for key, tensor in expected(model, *inputs(seed)).items()}
    finish(model, folder, base, result)
    stored = write_encoder(model, folder, encoder) if encoder else load_file(folder / "adapter_model.safetensors")
    check_gradients(result, stored)
    check_written(folder, base_of(AutoModelForCausalLM, base), result["input_ids"], result["logits"])
    if "num_virtual_tokens" in settings:
        check_virtual_tokens(name, base, result)
    if name == "lora-patterns":
        check_patterns(result)


def write_scored(name, seed):
    kind, settings, labels, head = SCORED[name]
    options = dict(num_labels=labels, pad_token_id=0)
    config = kind(task_type="SEQ_CLS", **settings)
    model = adapted(AutoModelForSequenceClassification, "llama", config, seed, **options)
    input_ids, _ = inputs(seed)
    outputs = model(input_ids=input_ids).logits
    outputs.sum().backward()
    for parameter in model.parameters():
        assert not parameter.requires_grad or parameter.grad.abs().max() > 1e-3
    outputs = outputs.detach()
    scores = outputs.reshape(-1) if labels == 1 else outputs
    finish(model, HERE / name, "llama", {"input_ids": input_ids, "scores": scores.contiguous()})
    assert head in load_file(HERE / name / "adapter_model.safetensors")
    another_head = base_of(AutoModelForSequenceClassification, "llama", **options)
    check_written(HERE / name, another_head, input_ids, outputs)


def initialised(weight, kind):
    """LoRA's matrices on a linear layer at the start, and the layer."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["linear"], init_lora_weights=kind)
    model = get_peft_model(torch.nn.Sequential(OrderedDict(linear=linear)), config)
    layer = model.base_model.model.linear
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach(), layer


def write_initialisation(seed):
    torch.manual_seed(seed)
    weight = 0.05 * torch.randn(48, 32)
    weight += 0.2 * torch.randn(48, 4) @ torch.randn(4, 32)
    result = {"weight": weight}
    down, up, layer = initialised(weight, "pissa")
    result |= {"pissa.product": layer.scaling["default"] * up @ down, "pissa.residual": layer.get_base_layer().weight.detach()}
    torch.testing.assert_close(result["pissa.product"] + result["pissa.residual"], weight, atol=1e-6, rtol=0)
    down, up, layer = initialised(weight, "orthogonal")
    assert (up @ down).abs().max() < 1e-6 and torch.equal(layer.get_base_layer().weight, weight)
    result |= {"orthogonal.lora_A": down, "orthogonal.lora_B": up}
    (HERE / "initialisation").mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in result.items()}, HERE / "initialisation" / "expected.safetensors")


def main():
    torch.set_num_threads(1)
    for seed, name in enumerate(METHODS, start=80):
        write_method(name, seed)
    for seed, name in enumerate(SCORED, start=110):
        write_scored(name, seed)
    write_initialisation(120)


if __name__ == "__main__":
    main()
