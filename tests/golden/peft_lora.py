"""LoRA adapters as PEFT writes them, on the models of `models.py`, with logits, loss and gradients."""

import json
from pathlib import Path

import torch
from models import expected, inputs
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

HERE = Path(__file__).parent
ADAPTERS = {
    "lora-llama": ("llama", dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
    "lora-llama-all": ("llama", dict(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True)),
    "lora-gpt2": ("gpt2", dict(r=4, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)),
}


def randomise_adapter(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))


def finish(model, folder, base, result):
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text())
    written["base_model_name_or_path"] = f"../{base}"
    if isinstance(written.get("target_modules"), list):
        written["target_modules"] = sorted(written["target_modules"])
    path.write_text(json.dumps(written, indent=2) + "\n")
    (folder / "README.md").unlink(missing_ok=True)
    save_file(result, folder / "expected.safetensors")


def main():
    torch.set_num_threads(1)
    for seed, (name, (base, settings)) in enumerate(ADAPTERS.items(), start=60):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(HERE / base, attn_implementation="eager")
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        randomise_adapter(model)
        result = expected(model, *inputs(seed))
        result = {key.replace(".default", ""): tensor for key, tensor in result.items()}
        finish(model, HERE / name, base, result)

    torch.manual_seed(70)
    model = AutoModelForSequenceClassification.from_pretrained(HERE / "llama", num_labels=1, pad_token_id=0)
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(model, config).eval()
    randomise_adapter(model)
    input_ids, _ = inputs(70)
    scores = model(input_ids=input_ids).logits.detach().reshape(-1).contiguous()
    finish(model, HERE / "lora-reward", "llama", {"input_ids": input_ids, "scores": scores})


if __name__ == "__main__":
    main()
