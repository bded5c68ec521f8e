"""Folders that our programs write of every family, loaded by `transformers`: no tensor is missing or left over, and the numbers are those of the folder
that was trained, as the learning rate is 0.

    python tests/golden/saved_by_us.py [NAME...]

Run in the repository's root after `cargo build --release`. It writes nothing into the repository.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma3ForConditionalGeneration

HERE = Path(__file__).parent
DECODERS = ["llama", "llama3", "llama-dynamic", "llama-yarn", "mistral", "qwen2", "qwen3", "gpt2", "gpt2-unscaled", "gpt-neox",
            "gpt-neox-sequential", "gemma2", "gemma3", "gemma3-with-images", "smollm3", "olmo2", "olmo3", "phi3", "granite"]
ENCODERS = ["bert", "roberta", "modernbert", "modernbert-mean"]
WORDS, LENGTH = 96, 12


def base_with_tokenizer(name, scratch):
    """The golden folder with a tokenizer of as many words as the model has tokens."""
    folder = scratch / name
    shutil.copytree(HERE / name, folder)
    words = {f"w{index}": index for index in range(3, WORDS)} | {"[UNK]": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "[UNK]"}))
    return folder


def trained(folder, scratch, *arguments):
    output = scratch / "out"
    shutil.rmtree(output, ignore_errors=True)
    subprocess.run(["target/release/sft", "--model", folder, "--output", output, "--learning-rate", "0", "--batch-size", "2", "--epochs", "1",
                    "--quiet", *arguments], check=True, capture_output=True)
    return output


def loaded(kind, folder):
    model, info = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def check(name, scratch):
    text = lambda row: " ".join(f"w{3 + (7 * row + 5 * place) % 90}" for place in range(LENGTH))
    data = scratch / "data.parquet"
    folder = base_with_tokenizer(name, scratch)
    if name in ENCODERS:
        kind = source = AutoModelForSequenceClassification
        labels = [f"LABEL_{row % 3}" for row in range(6)]
        pq.write_table(pa.table({"text": [text(row) for row in range(6)], "label": labels}), data)
        arguments = ["--objective", "classification", "--labels", "LABEL_0,LABEL_1,LABEL_2"]
    else:
        kind = source = AutoModelForCausalLM
        pq.write_table(pa.table({"prompt": [text(row) for row in range(4)], "completion": [text(row + 9) for row in range(4)]}), data)
        arguments = []
    if name == "gemma3-with-images":
        source = Gemma3ForConditionalGeneration
    ids = torch.randint(3, WORDS, (2, 24), generator=torch.Generator().manual_seed(1))
    before = source.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()(input_ids=ids).logits
    for method in ["full", "lora"]:
        output = trained(folder, scratch, "--data", data, "--method", method, *arguments)
        if method == "lora":
            base = source.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            after = PeftModel.from_pretrained(base, output).eval()(input_ids=ids).logits
        else:
            after = loaded(kind, output)(input_ids=ids).logits
        difference = (after - before).abs().max().item()
        print(f"{name}, {method}: largest difference of a logit {difference:.1e}", flush=True)
        assert difference < 1e-5, name


def main(chosen):
    torch.set_num_threads(1)
    for name in chosen or DECODERS + ENCODERS:
        with TemporaryDirectory() as scratch:
            check(name, Path(scratch))


if __name__ == "__main__":
    main(sys.argv[1:])
