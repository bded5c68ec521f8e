"""Token ids of tokenizers whose tokens are declared in several files, by transformers: declared_tokens.json.

    pip install transformers==5.24.0
    python tests/golden/declared_tokens.py

Each case is a set of files next to one small tokenizer.json (byte-level, made here), texts, and what AutoTokenizer makes of them. Cases that this project refuses, though
transformers reads them (an id that cannot be given, an end token that exists nowhere), have `refused` in place of ids.
"""
import json, os, tempfile
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
TEXTS = ["the bell rings <|new|> at noon", "a<|end|> b <|new|>c", "  <|other|> x", "The Bell’s ring <|im|>, twice ."]


def flags(content, special=True, **more):
    base = {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {**base, **more}


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0, "<s>": 1, **{letter: 2 + i for i, letter in enumerate(alphabet)}}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "r"), ("l", "l")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<s>"])
    tokenizer.add_tokens([AddedToken("<|im|>", normalized=False, special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return json.loads(tokenizer.to_str())


def word_piece(lowercase):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "The", "bell", "Bell", "ring", "##s", "'", "s", ".", ",", "twice", "at", "noon", "a", "b", "x", "<", ">", "|"]
    tokenizer = Tokenizer(models.WordPiece(vocab={word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return json.loads(tokenizer.to_str())


BYTES, CASED, UNCASED = byte_level(), word_piece(False), word_piece(True)
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
END = {**FAST, "eos_token": "<|end|>"}
NEXT = max(token["id"] for token in BYTES["added_tokens"]) + 1
BERT = {"tokenizer_class": "BertTokenizer", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
CASES = [
    ("plain", BYTES, {"tokenizer_config.json": END}),
    ("no tokenizer_config.json", BYTES, {}),
    ("added_tokens.json", BYTES, {"tokenizer_config.json": END, "added_tokens.json": {"<|other|>": NEXT + 1, "<|new|>": NEXT}}),
    ("added_tokens.json keeps flags of tokenizer.json", BYTES, {"tokenizer_config.json": END, "added_tokens.json": {"<|im|>": NEXT - 1, "<|end|>": 0}}),
    ("added_tokens.json, special in the map", BYTES, {"tokenizer_config.json": END, "added_tokens.json": {"<|new|>": NEXT}, "special_tokens_map.json": {"additional_special_tokens": ["<|new|>"]}}),
    ("added_tokens_decoder", BYTES, {"tokenizer_config.json": {**END, "added_tokens_decoder": {str(NEXT): flags("<|new|>", rstrip=True), str(NEXT + 1): flags("<|other|>", special=False, lstrip=True)}}}),
    ("flags of added_tokens_decoder count over tokenizer.json", BYTES, {"tokenizer_config.json": {**END, "added_tokens_decoder": {str(NEXT - 1): flags("<|im|>", lstrip=True, rstrip=True)}}}),
    ("added_tokens_decoder makes the map and added_tokens.json void", BYTES, {"tokenizer_config.json": {**END, "added_tokens_decoder": {"0": flags("<|end|>")}}, "special_tokens_map.json": {"eos_token": "<s>"}, "added_tokens.json": {"<|new|>": NEXT}}),
    ("the map counts over the configuration", BYTES, {"tokenizer_config.json": END, "special_tokens_map.json": {"eos_token": {"content": "<s>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}, "pad_token": "<|new|>"}}),
    ("additional_special_tokens", BYTES, {"tokenizer_config.json": {**END, "additional_special_tokens": ["<|new|>", "<|other|>"]}}),
    ("extra_special_tokens count over additional ones", BYTES, {"tokenizer_config.json": {**END, "extra_special_tokens": ["<|other|>"], "additional_special_tokens": ["<|new|>"]}}),
    ("additional tokens of the map do not count where the configuration has some", BYTES, {"tokenizer_config.json": {**END, "additional_special_tokens": ["<|other|>"]}, "special_tokens_map.json": {"additional_special_tokens": ["<|new|>"]}}),
    ("additional tokens next to an object of extra ones", BYTES, {"tokenizer_config.json": {**END, "extra_special_tokens": {"image_token": "<|other|>"}, "additional_special_tokens": ["<|new|>"]}}),
    ("extra tokens of the map are added to those of the configuration", BYTES, {"tokenizer_config.json": {**END, "extra_special_tokens": ["<|new|>"]}, "special_tokens_map.json": {"extra_special_tokens": [{"content": "<|other|>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}]}}),
    ("extra_special_tokens as an object", BYTES, {"tokenizer_config.json": {**END, "extra_special_tokens": {"image_token": "<|new|>", "audio_token": "<|other|>"}}}),
    ("named tokens come before extra ones, in their order", BYTES, {"tokenizer_config.json": {**END, "additional_special_tokens": ["<|other|>"], "pad_token": "<|pad|>", "unk_token": "<|new|>"}}),
    ("a named token of its own", BYTES, {"tokenizer_config.json": {**END, "image_token": "<|new|>", "mask_token": {"content": "<|other|>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False, "__type": "AddedToken"}}}),
    ("add_bos_token false is ignored", BYTES, {"tokenizer_config.json": {**END, "bos_token": "<s>", "add_bos_token": False}}),
    ("add_eos_token true is ignored", BYTES, {"tokenizer_config.json": {**END, "add_eos_token": True}}),
    ("add_prefix_space is ignored", BYTES, {"tokenizer_config.json": {**END, "add_prefix_space": True}}),
    ("add_prefix_space of GPT-2's class", BYTES, {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", "bos_token": "<s>", "unk_token": "<|end|>", "add_prefix_space": True}}),
    ("split_special_tokens", BYTES, {"tokenizer_config.json": {**END, "split_special_tokens": True}}),
    ("clean_up_tokenization_spaces of bytes", BYTES, {"tokenizer_config.json": {**END, "clean_up_tokenization_spaces": True}}),
    ("do_lower_case of BERT's class", CASED, {"tokenizer_config.json": {**BERT, "do_lower_case": True}}),
    ("do_lower_case false of BERT's class", UNCASED, {"tokenizer_config.json": {**BERT, "do_lower_case": False, "clean_up_tokenization_spaces": True}}),
    ("do_lower_case without a class counts for a model of BERT's type", CASED, {"tokenizer_config.json": {**BERT, "tokenizer_class": None, "do_lower_case": True}, "config.json": {"model_type": "bert"}}),
    ("do_lower_case of another class is ignored", CASED, {"tokenizer_config.json": {**FAST, "unk_token": "[UNK]", "do_lower_case": True}}),
]
REFUSED = [
    ("an id that is not the next", BYTES, {"tokenizer_config.json": {**END, "added_tokens_decoder": {str(NEXT + 7): flags("<|new|>")}}}, "<|new|>"),
    ("an id that tokenizer.json gives otherwise", BYTES, {"tokenizer_config.json": END, "added_tokens.json": {"<|im|>": NEXT + 3, "<|new|>": 5}}, "declared with the id"),
    ("an end token that exists nowhere", BYTES, {"tokenizer_config.json": {**FAST, "eos_token": "<|fin|>"}}, "<|fin|>"),
]


def main():
    out = {"tokenizers": {"bytes": BYTES, "cased": CASED, "uncased": UNCASED}, "cases": []}
    name_of = {id(BYTES): "bytes", id(CASED): "cased", id(UNCASED): "uncased"}
    for name, tokenizer, files in CASES:
        with tempfile.TemporaryDirectory() as folder:
            for file, content in {"tokenizer.json": tokenizer, **files}.items():
                json.dump(content, open(os.path.join(folder, file), "w"))
            found = AutoTokenizer.from_pretrained(folder)
            ids = [found(text)["input_ids"] for text in TEXTS]
            decoded = [found.decode(tokens, skip_special_tokens=True) for tokens in ids]
            out["cases"].append({"name": name, "tokenizer": name_of[id(tokenizer)], "files": files, "ids": ids, "decoded": decoded, "eos": found.eos_token_id, "bos": found.bos_token_id, "pad": found.pad_token_id, "class": type(found).__name__})
    for name, tokenizer, files, needle in REFUSED:
        out["cases"].append({"name": name, "tokenizer": name_of[id(tokenizer)], "files": files, "refused": needle})
    out["texts"] = TEXTS
    with open(os.path.join(HERE, "declared_tokens.json"), "w", encoding="utf-8") as file:
        json.dump(out, file, ensure_ascii=False, separators=(",", ":"))
        file.write("\n")
    for case in out["cases"]:
        print(case["name"], case.get("class"), case.get("eos"), case.get("ids", [None])[0])


main()
