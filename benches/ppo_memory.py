"""Peak memory of ppo with LoRA against that of sft with LoRA, on the same base and micro-batch: a Llama of 52 M parameters.

    python benches/ppo_memory.py target/release shared/data runs/ppo-memory [tokens of a micro-batch]

The data is any folder with demonstrations-train, hh-rlhf-explicit-train and hh-prompts-train.parquet. Prints a Markdown table.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 16384, "hidden_size": 576, "intermediate_size": 1536,
          "num_hidden_layers": 12, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_act": "silu", "max_position_embeddings": 1024,
          "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"}


def run(program, output, **flags):
    given = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run([program, "--output", output, *given], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{program}: {done.stderr}")
    return output, done.stderr


def main(programs, data, output, tokens=4096):
    programs, data, output = Path(programs).resolve(), Path(data), Path(output)
    (output / "config").mkdir(parents=True, exist_ok=True)
    (output / "config" / "config.json").write_text(json.dumps(CONFIG))
    demonstrations = data / "demonstrations-train.parquet"
    shared = {"max_length": 512, "tokens_per_batch": tokens}
    # A base whose weights and tokenizer are on disk; how good it is does not matter here.
    base, _ = run(programs / "sft", output / "base", model=output / "config", data=demonstrations, max_steps=1, evaluation_share=0.01, **shared)
    # Two steps, each of several micro-batches: then everything has been held that ever is.
    lora = shared | {"method": "lora", "max_steps": 2, "batch_size": 64}
    sft, said = run(programs / "sft", output / "sft", model=base, data=demonstrations, evaluation_share=0.01, **lora)
    print(f"micro-batches of {tokens} tokens; {re.search(r'trainable +(.*)', said).group(1).strip()} trainable\n")
    reward, reward_said = run(programs / "reward", output / "reward", model=base, data=data / "hh-rlhf-explicit-train.parquet", normalize="none",
                               evaluation_share=0.01, **lora)
    ppo, ppo_said = run(programs / "ppo", output / "ppo", model=base, reward_model=reward, data=data / "hh-prompts-train.parquet",
                        response_length=53, ppo_epochs=1, **lora)
    peaks = {}
    print("| program | peak, measured | expected by the plan |\n| --- | --- | --- |")
    for name, text in {"sft": said, "reward": reward_said, "ppo": ppo_said}.items():
        measured, expected = re.search(r"memory at its peak (\d+) MB, expected (\d+) MB", text).groups()
        peaks[name] = int(measured)
        print(f"| `{name} --method lora` | {measured} MB | {expected} MB |")
    print(f"\nppo over sft: {peaks['ppo'] / peaks['sft']:.2f}\n")
    print(ppo_said[:ppo_said.index("ppo\n")].rstrip())


if __name__ == "__main__":
    main(*sys.argv[1:])
