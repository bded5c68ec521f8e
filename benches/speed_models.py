"""Models of random weights, a tokenizer and data for `benches/speed.py`, which runs this with the interpreter of the baselines.

    python benches/speed_models.py runs/speed/inputs data/pretrain.parquet '{"models": [...], "sft": {...}, "reward": {...}, "prompts": {...}}'

Weights are drawn from seed 0. Texts are pieces of the given file, cut so that their number of tokens is known; a piece is used only where both sides
get the same tokens of it, whether prompt and completion are encoded together or apart.
"""

import json
import random
import sys
from itertools import combinations
from pathlib import Path

import gguf
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

SPECIAL = ["<pad>", "<s>", "</s>"]
TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "pad_token": "<pad>", "bos_token": "<s>",
                    "eos_token": "</s>"}
# Learned entries of the vocabulary; the rest of a model's vocabulary are tokens that no text is encoded to, so all models read the same tokens.
LEARNED = 8192
SHAPES = {
    "9m": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8,
           "vocab_size": 8192, "tie_word_embeddings": False},
    "52m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 9, "num_key_value_heads": 3,
            "vocab_size": 16384, "tie_word_embeddings": True},
    # SmolLM2-135M's.
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
             "vocab_size": 49152, "tie_word_embeddings": True},
}
# The last norm's weight of "135m-peaked": logits then have standard deviation 4.8, so that probabilities fall about as a power of their rank, as those of
# language do (Zipf), and the nucleus is of some tens to hundreds of tokens. With 1 all 49,152 tokens are about as probable, and so are in the nucleus.
PEAKED = 10.0


def train_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=LEARNED, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def save_tokenizer(tokenizer, folder, size):
    """The tokenizer with as many tokens as the model has logits."""
    described = json.loads(tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    for number in range(len(vocabulary), size):
        vocabulary[f"<unused{number}>"] = number
    (folder / "tokenizer.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))


def make_model(name, folder, tokenizer):
    if (folder / "tokenizer_config.json").exists():
        return
    shape, _, peaked = name.partition("-")
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=1024, rms_norm_eps=1e-5, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if peaked:
        torch.nn.init.constant_(model.model.norm.weight, PEAKED)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, config.vocab_size)


def make_gguf(base, path):
    """The same weights in Q8_0, for llama.cpp; norms in f32. Its rotation pairs other numbers, which is nothing to random weights."""
    if path.exists():
        return
    config, described = LlamaConfig.from_pretrained(base), json.loads((base / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(described["model"]["vocab"].items(), key=lambda token: token[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([gguf.TokenType.CONTROL if number < len(SPECIAL) else gguf.TokenType.NORMAL for _, number in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in load_file(base / "model.safetensors").items():
        values = tensor.float().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_reward_model(base, folder):
    """The same weights with a head: TRL's reward model, and what both sides train rewards from, so that their losses can be compared."""
    if (folder / "tokenizer_config.json").exists():
        return
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=model.config.hidden_size**-0.5)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_text((base / file).read_text())


class Pieces:
    """Cuts texts of wanted numbers of tokens from the joined texts of a file."""

    def __init__(self, texts, tokenizer):
        self.tokenizer, self.random = tokenizer, random.Random(0)
        self.random.shuffle(texts)
        self.ids = tokenizer.encode("\n".join(texts[:4000])).ids

    def cut(self, *lengths):
        """Texts of these numbers of tokens, each the beginning of the next one's; they encode to the same tokens joined and one by one."""
        while True:
            start = self.random.randrange(len(self.ids) - sum(lengths))
            parts = []
            for length in lengths:
                parts.append(self.ids[start:start + length])
                start += length
            texts = [self.tokenizer.decode(part) for part in parts]
            joined = [token for part in parts for token in part]
            apart = [self.tokenizer.encode(text).ids for text in texts]
            if apart == parts and self.tokenizer.encode("".join(texts)).ids == joined:
                return texts

    def answer(self, prompt, length):
        """A text of this number of tokens that can follow the prompt."""
        while True:
            text, = self.cut(length)
            if self.tokenizer.encode(prompt + text).ids == self.tokenizer.encode(prompt).ids + self.tokenizer.encode(text).ids:
                return text


def spread(shortest, longest, count):
    """So many lengths from the shortest to the longest, evenly."""
    return [shortest + (longest - shortest) * index // max(count - 1, 1) for index in range(count)]


def demonstrations(pieces, rows, shortest, longest):
    """Prompts and completions, each of `shortest` to `longest` tokens; long prompts with short and with long completions."""
    prompts, completions = spread(shortest, longest, rows), spread(shortest, longest, rows)
    pieces.random.shuffle(completions)
    pairs = [pieces.cut(*lengths) for lengths in zip(prompts, completions)]
    return {"prompt": [prompt for prompt, _ in pairs], "completion": [completion for _, completion in pairs]}


def rankings(pieces, prompts, answers, prompt_length, shortest, longest):
    rows = []
    for _ in range(prompts):
        prompt, = pieces.cut(prompt_length)
        rows.append((prompt, [pieces.answer(prompt, length) for length in spread(shortest, longest, answers)]))
    return {"prompt": [prompt for prompt, _ in rows], "responses": [answers for _, answers in rows],
            "ranks": [list(range(answers)) for _ in rows]}


def exploded(table):
    """A row for each pair of answers to a prompt."""
    pairs = [(prompt, better, worse) for prompt, answers in zip(table["prompt"], table["responses"]) for better, worse in combinations(answers, 2)]
    return {name: [pair[index] for pair in pairs] for index, name in enumerate(("prompt", "chosen", "rejected"))}


def main(output, data, wanted):
    output, wanted = Path(output), json.loads(wanted)
    output.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(data)
    columns = ["text"] if "text" in table.column_names else ["prompt", "completion"]
    texts = ["".join(row.values()) for row in table.select(columns).slice(0, 20000).to_pylist()]
    if not (output / "tokenizer.json").exists():
        train_tokenizer(texts).save(str(output / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    for name in wanted["models"]:
        make_model(name, output / name, tokenizer)
    for name in wanted["gguf"]:
        make_gguf(output / name, output / f"{name}-q8_0.gguf")
    make_reward_model(output / "9m", output / "9m-reward")
    pieces = Pieces(texts, tokenizer)
    for name, shape in wanted["sft"].items():
        pq.write_table(pa.table(demonstrations(pieces, **shape)), output / f"{name}.parquet")
    for name, shape in wanted["reward"].items():
        ranked = rankings(pieces, **shape)
        pq.write_table(pa.table(ranked), output / f"{name}.parquet")
        pq.write_table(pa.table(exploded(ranked)), output / f"{name}-pairs.parquet")
    for name, (rows, length) in wanted["prompts"].items():
        pq.write_table(pa.table({"prompt": [pieces.cut(length)[0] for _ in range(rows)]}), output / f"{name}.parquet")
    (output / "made.json").write_text(json.dumps(wanted))


if __name__ == "__main__":
    main(*sys.argv[1:])
