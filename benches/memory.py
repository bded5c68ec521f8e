"""Peak memory of `sft` and `ppo` against what their plans expect: models from 1 M to 0.5 B numbers, every method, with and without gradient checkpointing,
frozen bases as they are stored and quantised.

    python benches/memory.py target/release data/base shared/data runs/memory [shape,... [word,...]]

`data/base` is any model with a tokenizer, `shared/data` a folder with demonstrations-train, hh-rlhf-explicit-train, hh-prompts-train and toxicity-labelled-test.parquet. Shapes are
1m (that model itself), 9m, 52m, 135m and 500m; of their rows those are run that have one of the words, such as `reward` (which `ppo` needs). Writes a row as soon as it is measured, and goes on where it was stopped. Prints a Markdown table.
"""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
         "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"}
SHAPES = {
    "9m": LLAMA | {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8},
    "52m": LLAMA | {"vocab_size": 16384, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 9,
                    "num_key_value_heads": 3},
    # SmolLM2-135M's.
    "135m": LLAMA | {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3},
    # Qwen2.5-0.5B's.
    "500m": LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
                     "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
}
METHODS = ["full", "lora", "lora --use-dora", "prefix-tuning", "p-tuning-v2", "prompt-tuning", "p-tuning", "adapters", "ia3", "bitfit"]
CHECKPOINTS = "--gradient-checkpointing blocks"
# By shape: the settings of `sft`, and the tokens of its examples.
SETTINGS = {
    "1m": [(method, more) for method in METHODS for more in ("", CHECKPOINTS)],
    "9m": [(method, more) for method in METHODS for more in ("", CHECKPOINTS)],
    "52m": [(method, more) for method in METHODS for more in ("", CHECKPOINTS)],
    "135m": [("full", ""), ("full", CHECKPOINTS), ("lora", ""), ("lora", CHECKPOINTS), ("lora", "--base-precision q8_0"),
             ("lora", f"{CHECKPOINTS} --base-precision q4_k"), ("prefix-tuning", CHECKPOINTS)],
    "500m": [("lora", CHECKPOINTS), ("lora", f"{CHECKPOINTS} --base-precision q8_0")],
}

SHORT = ["lora", "probing", "prompt-tuning", "ia3"]


def run(line, output):
    done = subprocess.run([*line.split(), "--output", str(output)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{line}: {done.stderr}")
    measured = re.search(r"memory at its peak (\d+) MB, expected (\d+) MB", done.stderr)
    return tuple(int(number) for number in measured.groups()) if measured else None


def base_of(shape, programs, tokenizer, demonstrations, output):
    """A model of random weights, in bf16 so that a frozen base is kept so."""
    if shape == "1m":
        return tokenizer
    base = output / f"{shape}-base"
    if not (base / "model.safetensors").exists():
        config = output / f"{shape}-config"
        config.mkdir(parents=True, exist_ok=True)
        (config / "config.json").write_text(json.dumps(SHAPES[shape]))
        for file in tokenizer.glob("tokenizer*"):
            (config / file.name).write_bytes(file.read_bytes())
        run(f"{programs}/sft --model {config} --data {demonstrations} --method full --max-steps 1 --batch-size 1 --max-length 32 --evaluation-share 0"
            " --save-dtype bf16", base)
    return base


def measure(programs, tokenizer, data, output, shapes):
    demonstrations = data / "demonstrations-train.parquet"
    for shape in shapes:
        base = base_of(shape, programs, tokenizer, demonstrations, output)
        # Steps of several sizes: then everything has been held that ever is.
        size = "--batch-size 2 --max-length 1024 --max-steps 2" if shape == "500m" else "--batch-size 16 --max-length 512 --max-steps 6"
        shared = f"--evaluation-share 0 {size}"
        for number, (method, more) in enumerate(SETTINGS[shape]):
            line = f"{programs}/sft --model {base} --data {demonstrations} {shared} --method {method} {more}"
            yield shape, f"sft --method {method} {more}".strip(), lambda line=line, number=number: run(line, output / f"{shape}-{number}")
        if shape in ("9m", "52m"):
            lora = f"--model {base} --method lora --max-length 512 --batch-size 16 --max-steps 2"
            reward = output / f"{shape}-reward"
            line = f"{programs}/reward {lora} --data {data}/hh-rlhf-explicit-train.parquet --normalize none --evaluation-share 0.01"
            yield shape, "reward --method lora", lambda line=line, reward=reward: run(line, reward)
            line = f"{programs}/ppo {lora} --data {data}/hh-prompts-train.parquet --reward-model {reward} --response-length 48"
            yield shape, "ppo --method lora", lambda line=line, shape=shape: run(line, output / f"{shape}-ppo")
        if shape in ("9m", "135m"):
            # Steps of short texts, behind virtual tokens that are as many rows; passes over all texts that learn nothing are larger than those.
            classify = "--objective classification --labels 0 1 --batch-size 16 --max-length 512 --max-steps 6"
            texts = f"--data {data}/toxicity-labelled-test.parquet --evaluation-share 0.2"
            for method in SHORT:
                line = f"{programs}/sft --model {base} {texts} {classify} --method {method}"
                yield shape, f"sft --objective classification --method {method}", lambda line=line, method=method: run(line, output / f"{shape}-short-{method}")


def main(programs, tokenizer, data, output, shapes="1m,9m,52m,135m,500m", only=""):
    programs, tokenizer, data, output = Path(programs).resolve(), Path(tokenizer), Path(data), Path(output)
    output.mkdir(parents=True, exist_ok=True)
    kept = output / "measured.jsonl"
    known = dict(json.loads(line) for line in kept.read_text().splitlines()) if kept.exists() else {}
    # Of other programs it is measured anew.
    build = hashlib.sha256(b"".join((programs / name).read_bytes() for name in ("sft", "reward", "ppo"))).hexdigest()[:12]
    print("| model | run | peak, measured | expected by the plan | difference |\n| --- | --- | --- | --- | --- |")
    for shape, name, run_it in measure(programs, tokenizer, data, output, shapes.split(",")):
        if not any(word in name for word in only.split(",")):
            continue
        key = f"{build} {shape} {name}"
        if key not in known:
            known[key] = run_it()
            with kept.open("a") as file:
                file.write(json.dumps([key, known[key]]) + "\n")
        measured, expected = known[key]
        print(f"| {shape} | `{name}` | {measured} MB | {expected} MB | {100 * (expected - measured) / measured:+.0f}% |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
