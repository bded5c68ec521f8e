"""Tiny sequence classifiers with random weights and tokenizers of their kinds, and the probabilities that `transformers` gives texts and pairs.

For each a folder `classifiers/<name>/` as `save_pretrained` writes it, with `tokenizer.json`, `tokenizer_config.json` and `expected.json`:
`longest` (tokens of the longest text that is not cut) and `texts`, each with `text`, `pair` (or null), `ids` and `types` (of its tokens), `cut`
(whether something was lost), `logits` and `probabilities` (softmax or sigmoid, as the text-classification pipeline decides).
`classifiers/buckets.json` holds the bucket of every distance for some numbers of buckets and positions.

With the folder of the real all-MiniLM-L6-v2 as argument, writes `classifiers/minilm/` too: a head of fixed seed on top of it, its
probabilities, and the mean of the hidden states of some texts.
"""

import base64
import json
import random
import shutil
import sys
import unicodedata
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy
import sentencepiece
import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
from transformers.pipelines.text_classification import sigmoid, softmax

HERE = Path(__file__).parent / "classifiers"
NLI = {0: "contradiction", 1: "entailment", 2: "neutral"}
TOXIC = {0: "toxicity", 1: "severe_toxicity", 2: "obscene", 3: "threat", 4: "insult", 5: "identity_attack"}

WORDS = ("a man is playing the guitar on a stage while people listen and nobody sleeps at night in an old town near the river "
         "two dogs run across the wet grass because they have seen a small red ball she reads every letter twice before "
         "answering and never forgets what was said you are kind not stupid this is the worst idea of all").split()
LONG = " ".join(WORDS)
TEXTS = [
    ("A man is playing the guitar.", None),
    ("", None),
    ("Grüße aus Zürich: ﬁne “naïve” Ｃａｆé … ½ €5,\u00a0привет, 你好 🙂", None),
    ("two  dogs\trun\n\nacross the grass  ", None),
    (LONG, None),
    ("You are not kind [SEP] </s>", None),
    ("A man is playing the guitar.", "Nobody is playing."),
    ("Two dogs run.", ""),
    ("", "She reads a letter."),
    ("Das ﬁnde ich schön.", "これはペンです。"),
    (LONG, "the worst idea"),
    ("the worst idea", LONG),
    (LONG, LONG),
    (LONG, LONG + " of all"),
    (LONG + " of all", LONG),
]


def corpus():
    generator = random.Random(7)
    lines = [" ".join(generator.choices(WORDS, k=12)).capitalize() + "." for _ in range(300)]
    return lines + ["Grüße aus Zürich, naïve Café.", "привет", "You are not kind, are you?"] * 8


def word_pieces():
    """Every other word of the corpus whole, the rest in pieces. (The trainer of `tokenizers` numbers its pieces anew each time.)"""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = sorted(set("".join(corpus()).lower()) - {" "} | set("ueno,.?!:"))
    pieces = ["##ing", "##er", "##ass", "##ed", "##ight", "##orst", "no", "gr", "pl", "aus", "zu"]
    vocabulary = special + letters + [f"##{letter}" for letter in letters] + pieces + sorted(set(WORDS))[::2]
    numbers = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    around(tokenizer, "[CLS]", "[SEP]", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")
    # A limit and padding in the file are those of whoever wrote it.
    tokenizer.enable_truncation(12)
    tokenizer.enable_padding(length=16)
    return tokenizer, dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special))


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    names = ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token")
    return tokenizer, dict(zip(names, special)) | {"bos_token": "<s>", "eos_token": "</s>"}


def sentence_pieces():
    """Pieces with their scores, and a compiled map of characters, as SentencePiece makes them."""
    ranges = [range(0xFF01, 0xFF5F), range(0xFB00, 0xFB07), (0x00A0, 0x2026, 0x00BD, 0x3000)]
    rules = [(code, unicodedata.normalize("NFKC", chr(code))) for codes in ranges for code in codes]
    rules += [(0x09, " "), (0x0A, " ")]
    with TemporaryDirectory() as folder:
        path = Path(folder)
        lines = (f"{code:X}\t{' '.join(f'{ord(character):X}' for character in text)}" for code, text in rules)
        (path / "rules.tsv").write_text("\n".join(lines) + "\n")
        (path / "corpus.txt").write_text("\n".join(corpus()))
        sentencepiece.SentencePieceTrainer.train(
            input=str(path / "corpus.txt"), model_prefix=str(path / "spm"), vocab_size=170, model_type="unigram",
            normalization_rule_tsv=str(path / "rules.tsv"), num_threads=1, minloglevel=2)
        model = sentencepiece_model_pb2.ModelProto.FromString((path / "spm.model").read_bytes())
    pieces = [(piece.piece, piece.score) for piece in model.pieces if piece.type == piece.NORMAL]
    return pieces, model.normalizer_spec.precompiled_charsmap


def unigram_roberta():
    pieces, characters = sentence_pieces()
    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + pieces + [("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Precompiled(characters)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")])
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    around(tokenizer, "<s>", "</s>", "<s> $A </s> </s> $B </s>")
    names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
    return tokenizer, names | {"unk_token": "<unk>", "mask_token": "<mask>"}


def unigram_deberta():
    pieces, characters = sentence_pieces()
    vocabulary = [("[PAD]", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("[UNK]", 0.0)] + pieces + [("[MASK]", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Strip(), normalizers.Precompiled(characters), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")])
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"])
    around(tokenizer, "[CLS]", "[SEP]", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")
    names = {"bos_token": "[CLS]", "eos_token": "[SEP]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return tokenizer, names | {"unk_token": "[UNK]", "mask_token": "[MASK]"}


def around(tokenizer, begin, end, pair):
    tokens = [(token, tokenizer.token_to_id(token)) for token in (begin, end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A {end}", pair=pair, special_tokens=tokens)


COMMON = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5,
              layer_norm_eps=0.01)
DEBERTA = dict(**COMMON, max_position_embeddings=48, relative_attention=True)
ROBERTA = dict(**COMMON, pad_token_id=1, bos_token_id=0, eos_token_id=2)


def kinds():
    """Name: tokenizer, `model_max_length` (None is transformers' "no limit"), class, configuration without vocabulary."""
    v3 = dict(max_relative_positions=-1, position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True, type_vocab_size=0,
              position_biased_input=False)
    return {
        "bert": (word_pieces, None, BertForSequenceClassification,
                 BertConfig(**COMMON, max_position_embeddings=40, id2label=NLI)),
        "roberta": (byte_level, 36, RobertaForSequenceClassification,
                    RobertaConfig(**ROBERTA, max_position_embeddings=50, type_vocab_size=1, id2label=TOXIC,
                                  problem_type="multi_label_classification")),
        "xlm-roberta": (unigram_roberta, None, XLMRobertaForSequenceClassification,
                        XLMRobertaConfig(**ROBERTA, max_position_embeddings=42, type_vocab_size=2, num_labels=1)),
        # As microsoft/deberta-v3-base.
        "deberta-v3": (unigram_deberta, 44, DebertaV2ForSequenceClassification,
                       DebertaV2Config(**DEBERTA, **v3, pos_att_type=["p2c", "c2p"], id2label=NLI)),
        # As microsoft/deberta-v2-xlarge.
        "deberta-v2-convolution": (unigram_deberta, None, DebertaV2ForSequenceClassification,
                                   DebertaV2Config(**DEBERTA, **v3, pos_att_type="c2p|p2c", attention_head_size=8, conv_kernel_size=3,
                                                   conv_act="gelu")),
        "deberta-v2-positions": (unigram_deberta, None, DebertaV2ForSequenceClassification,
                                 DebertaV2Config(**DEBERTA, max_relative_positions=12, type_vocab_size=2, embedding_size=12,
                                                 pos_att_type=["c2p"], pooler_hidden_act="tanh", hidden_act="gelu_new", num_labels=4,
                                                 problem_type="multi_label_classification")),
        "deberta-v2-groups": (unigram_deberta, None, DebertaV2ForSequenceClassification,
                              DebertaV2Config(**DEBERTA, max_relative_positions=30, position_buckets=10, pos_att_type=["p2c"],
                                              norm_rel_ebd="none", conv_kernel_size=5, conv_groups=4, num_labels=2)),
        "deberta-v2-absolute": (unigram_deberta, None, DebertaV2ForSequenceClassification,
                                DebertaV2Config(**(DEBERTA | {"relative_attention": False}), num_labels=2)),
    }


# What a reader of the configuration could overlook, and what it would take it for.
OVERLOOKED = {
    "bert": {"layer_norm_eps": 1e-12, "hidden_act": "relu"},
    "roberta": {"layer_norm_eps": 1e-12, "pad_token_id": 0},
    "xlm-roberta": {"layer_norm_eps": 1e-12},
    "deberta-v3": {"layer_norm_eps": 1e-7, "norm_rel_ebd": "none", "max_relative_positions": 24, "pos_att_type": ["c2p"],
                   "pooler_hidden_act": "tanh"},
    "deberta-v2-convolution": {"conv_kernel_size": 0, "conv_act": "tanh"},
    "deberta-v2-positions": {"type_vocab_size": 0, "position_biased_input": False, "hidden_act": "gelu", "relative_attention": False},
    "deberta-v2-groups": {"conv_kernel_size": 0, "conv_act": "relu", "max_relative_positions": 20},
    "deberta-v2-absolute": {"pos_att_type": ["c2p"]},
}


def randomise(model):
    """Large enough that labels and positions matter; norms and biases too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + (0.3 if parameter.dim() == 1 else 0.45) * torch.randn_like(parameter))


def spread(model, tokenizer, longest):
    """Moves the last layer, so that every label's score is sometimes above 0 and sometimes below."""
    logits = torch.tensor([result["logits"] for result in expected(model, tokenizer, longest)])
    out = getattr(model.classifier, "out_proj", model.classifier)
    scale = 1.5 / logits.std(dim=0)
    with torch.no_grad():
        out.weight.mul_(scale[:, None])
        out.bias.copy_((out.bias - logits.mean(dim=0)) * scale)


def probabilities(config, logits):
    """What the text-classification pipeline makes of logits."""
    several = config.problem_type == "multi_label_classification"
    return (sigmoid if several or config.num_labels == 1 else softmax)(logits.numpy())


def shorten(values):
    return [float(f"{value:.8g}") for value in numpy.asarray(values, dtype=numpy.float64)]


def encode(tokenizer, text, pair, longest):
    return tokenizer(text, pair, truncation=True, max_length=longest, padding="do_not_pad", return_token_type_ids=True)


def expected(model, tokenizer, longest):
    results = []
    for text, pair in TEXTS:
        encoded = encode(tokenizer, text, pair, longest)
        whole = tokenizer(text, pair, padding="do_not_pad", truncation=False)["input_ids"]
        types = {"token_type_ids": torch.tensor([encoded["token_type_ids"]])}
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([encoded["input_ids"]]), **types).logits[0]
        results.append({
            "text": text, "pair": pair, "ids": encoded["input_ids"], "types": encoded["token_type_ids"],
            "cut": len(whole) > len(encoded["input_ids"]), "logits": shorten(logits),
            "probabilities": shorten(probabilities(model.config, logits)),
        })
    return results


def check_padded(model, results):
    """The same logits come from one batch that is padded and masked."""
    def rows(key, fill):
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(result[key]) for result in results], batch_first=True, padding_value=fill)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(result["ids"]), dtype=torch.long) for result in results], batch_first=True)
    with torch.no_grad():
        found = model(input_ids=rows("ids", model.config.pad_token_id), token_type_ids=rows("types", 0), attention_mask=mask).logits
    torch.testing.assert_close(found, torch.tensor([result["logits"] for result in results]), atol=2e-5, rtol=0)


def check_fields_matter(name, folder, tokenizer, longest, results):
    for field, value in OVERLOOKED[name].items():
        with TemporaryDirectory() as changed:
            shutil.copy(folder / "model.safetensors", changed)
            config = json.loads((folder / "config.json").read_text()) | {field: value}
            (Path(changed) / "config.json").write_text(json.dumps(config))
            model = AutoModelForSequenceClassification.from_pretrained(changed, ignore_mismatched_sizes=True).eval()
            found = expected(model, tokenizer, longest)
        most = max(abs(a - b) for one, other in zip(found, results) for a, b in zip(one["probabilities"], other["probabilities"]))
        assert most > 5e-4, f"{name}: {field} matters too little: {most}"


def write(name, make_tokenizer, limit, kind, config, seed):
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    backend, special = make_tokenizer()
    config.vocab_size = backend.get_vocab_size()
    torch.manual_seed(seed)
    model = kind._from_config(config, attn_implementation="eager").eval()
    randomise(model)
    backend.save(str(folder / "tokenizer.json"))
    # transformers' own form of this number for "no limit".
    limit_in_file = limit or int(1e30)
    written = special | {"model_max_length": limit_in_file, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(written, indent=2) + "\n")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    positions = config.max_position_embeddings - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)
    longest = min(limit or positions, positions)
    spread(model, tokenizer, longest)
    model.save_pretrained(folder)
    results = expected(model, tokenizer, longest)
    check_padded(model, results)
    check_fields_matter(name, folder, tokenizer, longest, results)
    values = numpy.array([result["probabilities"] for result in results])
    assert values.std(axis=0).min() > 0.08, f"{name}: probabilities hardly vary: {values.std(axis=0)}"
    assert sum(result["cut"] for result in results) >= 5 and max(len(result["ids"]) for result in results) == longest
    dump(folder / "expected.json", {"longest": longest, "texts": results})


def dump(path, value):
    """One text a line."""
    lines = ",\n".join(json.dumps(text, ensure_ascii=False) for text in value.pop("texts"))
    head = "".join(f"{json.dumps(key)}: {json.dumps(entry)},\n" for key, entry in value.items())
    path.write_text(f'{{{head}"texts": [\n{lines}\n]}}\n')


def write_buckets():
    table = {}
    for buckets, positions in [(256, 512), (8, 48), (10, 30), (32, 128), (64, 300)]:
        distances = torch.arange(positions + 80)
        found = make_log_bucket_position(distances, buckets, positions).to(torch.long)
        back = make_log_bucket_position(-distances, buckets, positions).to(torch.long)
        assert torch.equal(found, -back)
        table[f"{buckets},{positions}"] = found.tolist()
    (HERE / "buckets.json").write_text(json.dumps(table) + "\n")


def write_minilm(source):
    """A head of fixed seed."""
    folder = HERE / "minilm"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    encoder = AutoModel.from_pretrained(source, attn_implementation="eager").eval()
    model = BertForSequenceClassification._from_config(
        BertConfig(**(encoder.config.to_dict() | {"id2label": NLI, "label2id": None})), attn_implementation="eager").eval()
    model.bert.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        model.classifier.weight.copy_(torch.randn(model.classifier.weight.shape, generator=torch.Generator().manual_seed(5)))
    spread(model, tokenizer, 512)
    head = {f"classifier.{name}": parameter.detach() for name, parameter in model.classifier.named_parameters()}
    save_file(head, folder / "head.safetensors", metadata={"format": "pt"})
    results = expected(model, tokenizer, 512)
    for result in results:
        with torch.no_grad():
            hidden = encoder(input_ids=torch.tensor([result["ids"]]), token_type_ids=torch.tensor([result["types"]])).last_hidden_state
        result["mean"] = [float(f"{value:.6f}") for value in hidden[0].mean(dim=0)] if result["text"] in TEXTS[0] + TEXTS[2] else None
    dump(folder / "expected.json", {"longest": 512, "texts": results})


def main():
    torch.set_num_threads(1)
    for seed, (name, kind) in enumerate(kinds().items(), start=300):
        write(name, *kind, seed)
    write_buckets()
    if len(sys.argv) > 1:
        write_minilm(sys.argv[1])


if __name__ == "__main__":
    main()
