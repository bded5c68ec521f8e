"""Folders that our programs wrote, read by PEFT or AdapterHub: the log-probabilities of demonstrations, compared with those of our `score`.

    python tests/golden/read_by_others.py peft|adapterhub base-model demonstrations.parquet adapter-folder...

AdapterHub needs the environment of `adapterhub.py`. Run in the repository's root after `cargo build --release`.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = 12


def read(library, base, folder):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if library == "peft":
        from peft import PeftModel
        return PeftModel.from_pretrained(model, folder).eval()
    import adapters
    adapters.init(model)
    model.load_adapter(folder, set_active=True, use_safetensors=True)
    return model.eval()


def scored(folder, data, output):
    subprocess.run(["target/release/score", "--model", folder, "--data", data, "--output", output, "--quiet"], check=True)
    return pq.read_table(output).to_pylist()


def largest_difference(model, tokenizer, rows):
    differences = []
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"], return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, -ids.shape[1]:]
        log_probs = torch.log_softmax(logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        differences.append(abs(log_probs[-row["tokens"]:].sum().item() - row["log_prob"]))
    return max(differences)


def main(library, base, data, *folders):
    tokenizer = AutoTokenizer.from_pretrained(base)
    with TemporaryDirectory() as scratch:
        few = Path(scratch) / "few.parquet"
        pq.write_table(pq.read_table(data).slice(0, ROWS), few)
        for folder in folders:
            rows = scored(folder, few, Path(scratch) / "scored.parquet")
            difference = largest_difference(read(library, base, folder), tokenizer, rows)
            print(f"{folder}: largest difference of a sum of log-probabilities {difference:.1e}", flush=True)
            assert difference < 1e-4 * max(1, max(abs(row["log_prob"]) for row in rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
