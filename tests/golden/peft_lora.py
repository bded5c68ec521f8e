"""LoRA adapters as PEFT writes them, on the models of `models.py` and `encoders.py`, with logits, loss and gradients.

    python peft_lora.py [NAME...]     # these folders, or all
"""

import json
import sys
from pathlib import Path

import torch
from models import expected, inputs
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma3ForConditionalGeneration

HERE = Path(__file__).parent
ADAPTERS = {
    "lora-llama": ("llama", dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
    "lora-llama-all": ("llama", dict(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True)),
    "lora-gpt2": ("gpt2", dict(r=4, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)),
}
# By seed: one adapter on each family that came later. A packed projection has one update over all of it.
LATER = {
    170: ("lora-gemma3", "gemma3", dict(r=4, lora_alpha=8)),
    171: ("lora-smollm3", "smollm3", dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
    172: ("lora-olmo2", "olmo2", dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
    173: ("lora-olmo3", "olmo3", dict(r=4, lora_alpha=8, target_modules="all-linear")),
    174: ("lora-phi3", "phi3", dict(r=4, lora_alpha=8, target_modules=["qkv_proj", "gate_up_proj", "down_proj"])),
    175: ("lora-granite", "granite", dict(r=4, lora_alpha=8, target_modules="all-linear")),
}


def base_of(kind, base, **options):
    return kind.from_pretrained(HERE / base, attn_implementation="eager", **options).eval()


# Updates of all linears at a scale of 4: with the deviation of the others, rounding in f32 grows 2,000 times on its way to the gradients, and by how much
# depends on the order of sums, which differs between processors.
DEVIATIONS = {"lora-llama-all": 0.1}


def randomise_adapter(model, deviation=0.3):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(deviation * torch.randn_like(parameter))


def check_written(folder, base_model, input_ids, outputs):
    """PEFT reads back what it wrote, from the file alone, and the adapter matters."""
    without = base_model(input_ids=input_ids).logits
    assert (without - outputs).abs().max() > 0.01
    again = PeftModel.from_pretrained(base_model, folder).eval()
    logits = again(input_ids=input_ids).logits[:, -outputs.shape[1]:]
    torch.testing.assert_close(logits, outputs, atol=1e-5, rtol=0)


def finish(model, folder, base, result):
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text())
    written["base_model_name_or_path"] = f"../{base}"
    for field in ("target_modules", "feedforward_modules"):
        if isinstance(written.get(field), list):
            written[field] = sorted(written[field])
    path.write_text(json.dumps(written, indent=2) + "\n")
    (folder / "README.md").unlink(missing_ok=True)
    save_file(result, folder / "expected.safetensors")


def write_of_encoder():
    """A classifier on ModernBERT: PEFT stores its last layer and leaves the prediction head with the base."""
    torch.manual_seed(176)
    model = base_of(AutoModelForSequenceClassification, "modernbert")
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["Wqkv", "mlp.Wo"])
    model = get_peft_model(model, config).eval()
    randomise_adapter(model)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.mul_(2.0)
    input_ids, _ = inputs(176)
    scores = model(input_ids=input_ids).logits.detach().contiguous()
    finish(model, HERE / "lora-modernbert", "modernbert", {"input_ids": input_ids, "scores": scores})
    check_written(HERE / "lora-modernbert", base_of(AutoModelForSequenceClassification, "modernbert"), input_ids, scores)


def write_of_text_part():
    """An adapter of the text part of a model of text and images."""
    torch.manual_seed(177)
    model = base_of(Gemma3ForConditionalGeneration, "gemma3-with-images")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    model = get_peft_model(model, config).eval()
    randomise_adapter(model)
    input_ids, _ = inputs(177)
    logits = model(input_ids=input_ids).logits.detach().contiguous()
    finish(model, HERE / "lora-gemma3-with-images", "gemma3-with-images", {"input_ids": input_ids, "logits": logits})
    check_written(HERE / "lora-gemma3-with-images", base_of(Gemma3ForConditionalGeneration, "gemma3-with-images"), input_ids, logits)


def main(chosen):
    torch.set_num_threads(1)
    first = [(seed, (name, *rest)) for seed, (name, rest) in enumerate(ADAPTERS.items(), start=60)]
    for seed, (name, base, settings) in first + list(LATER.items()):
        if chosen and name not in chosen:
            continue
        torch.manual_seed(seed)
        model = base_of(AutoModelForCausalLM, base)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        randomise_adapter(model, DEVIATIONS.get(name, 0.3))
        result = expected(model, *inputs(seed))
        result = {key.replace(".default", ""): tensor for key, tensor in result.items()}
        finish(model, HERE / name, base, result)
        written = {f"grad.{key}" for key in load_file(HERE / name / "adapter_model.safetensors")}
        assert written == {key for key in result if key.startswith("grad.")}
        check_written(HERE / name, base_of(AutoModelForCausalLM, base), result["input_ids"], result["logits"])

    if not chosen or "lora-modernbert" in chosen:
        write_of_encoder()
    if not chosen or "lora-gemma3-with-images" in chosen:
        write_of_text_part()
    if chosen and "lora-reward" not in chosen:
        return
    torch.manual_seed(70)
    model = base_of(AutoModelForSequenceClassification, "llama", num_labels=1, pad_token_id=0)
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(model, config).eval()
    randomise_adapter(model)
    input_ids, _ = inputs(70)
    scores = model(input_ids=input_ids).logits.detach().reshape(-1).contiguous()
    finish(model, HERE / "lora-reward", "llama", {"input_ids": input_ids, "scores": scores})
    assert "base_model.model.score.weight" in load_file(HERE / "lora-reward" / "adapter_model.safetensors")
    another_head = base_of(AutoModelForSequenceClassification, "llama", num_labels=1, pad_token_id=0)
    check_written(HERE / "lora-reward", another_head, input_ids, scores[:, None])


if __name__ == "__main__":
    main(sys.argv[1:])
