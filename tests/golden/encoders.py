"""Tiny encoders with random weights, and what `transformers` and PyTorch make of them.

`expected.safetensors` holds `input_ids`, `token_type_ids` (BERT), `labels`, `hidden` (the last hidden state), `logits` of the classification head, `loss` (cross-entropy
of both rows) and `grad.<parameter>`; `unpadded.logits` are those of the second row's first 15 tokens alone.

    python encoders.py [NAME...]     # these folders, or all
"""

import sys
from pathlib import Path

import torch
from models import VOCABULARY, randomise
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

HERE = Path(__file__).parent
LENGTH, CUT = 24, 15
COMMON = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
              initializer_range=0.2, layer_norm_eps=0.01)


def kinds():
    bert = dict(**COMMON, max_position_embeddings=64, type_vocab_size=2)
    roberta = dict(**COMMON, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    modern = {key: value for key, value in COMMON.items() if key != "layer_norm_eps"}
    modern |= dict(max_position_embeddings=64, norm_eps=0.01, local_attention=8, num_labels=3, pad_token_id=0,
                   bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
                   layer_types=["full_attention", "sliding_attention"], rope_parameters={
                       "full_attention": {"rope_type": "default", "rope_theta": 300.0},
                       "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}})
    biases = dict(norm_bias=True, classifier_bias=True, attention_bias=True, mlp_bias=True)
    return {
        "bert": (BertForSequenceClassification, BertConfig(**bert, num_labels=3)),
        "bert-reward": (BertForSequenceClassification, BertConfig(**bert, num_labels=1)),
        "roberta": (RobertaForSequenceClassification, RobertaConfig(**roberta, num_labels=3)),
        "modernbert": (ModernBertForSequenceClassification, ModernBertConfig(**modern, **biases)),
        "modernbert-mean": (ModernBertForSequenceClassification,
                            ModernBertConfig(**modern, classifier_pooling="mean", classifier_activation="relu")),
    }


def inputs(name, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    if not name.startswith("bert"):
        return {"input_ids": ids}
    types = torch.zeros_like(ids)
    types[0, LENGTH // 2:] = 1
    types[1, 10:] = 1
    return {"input_ids": ids, "token_type_ids": types}


def check_padded(model, batch, cut):
    """The same logits come from a batch that is padded and masked."""
    padded = {key: value[1:].clone() for key, value in batch.items()}
    padded["input_ids"][:, CUT:] = model.config.pad_token_id
    mask = (torch.arange(LENGTH) < CUT).long()[None]
    torch.testing.assert_close(model(**padded, attention_mask=mask).logits, cut, atol=1e-5, rtol=0)


def write(name, kind, config, seed):
    torch.manual_seed(seed)
    model = kind._from_config(config, attn_implementation="eager").eval()
    randomise(model)
    folder = HERE / name
    model.save_pretrained(folder)
    batch = inputs(name, seed)
    output = model(**batch, output_hidden_states=True)
    cut = model(**{key: value[1:, :CUT] for key, value in batch.items()}).logits
    check_padded(model, batch, cut)
    result = batch | {"hidden": output.hidden_states[-1], "logits": output.logits, "unpadded.logits": cut}
    if config.num_labels > 1:
        result["labels"] = torch.tensor([2, 0])
        loss = torch.nn.functional.cross_entropy(output.logits, result["labels"])
        loss.backward()
        result["loss"] = loss.reshape(1)
        result |= {f"grad.{key}": value.grad for key, value in model.named_parameters() if value.grad is not None}
    save_file({key: value.detach().contiguous() for key, value in result.items()}, folder / "expected.safetensors")
    return model, result


def write_bare(bert, result):
    """The encoder alone, whose names have no beginning."""
    folder = HERE / "bert-encoder"
    bert.bert.save_pretrained(folder)
    kept = {key: result[key].detach().contiguous() for key in ("input_ids", "token_type_ids", "hidden")}
    save_file(kept, folder / "expected.safetensors")


def main(chosen):
    torch.set_num_threads(1)
    for seed, (name, (kind, config)) in enumerate(kinds().items(), start=110):
        if chosen and name not in chosen:
            continue
        model, result = write(name, kind, config, seed)
        if name == "bert":
            write_bare(model, result)


if __name__ == "__main__":
    main(sys.argv[1:])
