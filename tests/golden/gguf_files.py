"""GGUF files, written with llama.cpp's own Python package, and what they hold.

`gguf/blocks.gguf` holds a tensor of each block type that is read, of random blocks; `gguf/blocks.safetensors` what the package makes of them.
`gguf/<family>.gguf` is a tiny random model of `transformers`, under the names of the package's own table and with the changes that llama.cpp's
converter makes to weights; `gguf/<family>.safetensors` holds `input_ids` and `logits`. `gguf/sentencepiece.gguf` holds a SentencePiece model,
`gguf/sentencepiece.json` texts and their ids by SentencePiece itself.
"""

import io
import json
import math
import random
import re
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch
import transformers as tr
from safetensors.numpy import save_file

OUT = Path(__file__).parent / "gguf"
LENGTH = 20
COMMON = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=2)
ROPE = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
ARCHITECTURES = gguf.MODEL_ARCH


def models():
    """Name, llama.cpp's architecture, configuration."""
    return {
        "llama": (ARCHITECTURES.LLAMA, tr.LlamaConfig(**COMMON, tie_word_embeddings=False, rope_parameters=ROPE)),
        "llama3": (ARCHITECTURES.LLAMA, tr.LlamaConfig(**COMMON, head_dim=16, tie_word_embeddings=True, rope_parameters=LLAMA3)),
        "qwen2": (ARCHITECTURES.QWEN2, tr.Qwen2Config(**COMMON, tie_word_embeddings=True, rope_parameters=ROPE)),
        "qwen3": (ARCHITECTURES.QWEN3, tr.Qwen3Config(**COMMON, head_dim=8, tie_word_embeddings=True, rope_parameters=ROPE)),
        "gemma2": (ARCHITECTURES.GEMMA2, tr.Gemma2Config(**COMMON, head_dim=8, query_pre_attn_scalar=8, sliding_window=6,
                                                         attn_logit_softcapping=2.0, final_logit_softcapping=5.0, rope_parameters=ROPE)),
        "gemma3": (ARCHITECTURES.GEMMA3, tr.Gemma3TextConfig(**COMMON | {"num_hidden_layers": 6}, head_dim=8, query_pre_attn_scalar=8, sliding_window=6,
                                                             rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE | {"rope_theta": 10000.0}})),
        "phi3": (ARCHITECTURES.PHI3, tr.Phi3Config(**COMMON, pad_token_id=0, tie_word_embeddings=False, rope_parameters=ROPE | {"partial_rotary_factor": 1.0})),
        "phi3-long": (ARCHITECTURES.PHI3, tr.Phi3Config(**COMMON | {"max_position_embeddings": 256}, pad_token_id=0, tie_word_embeddings=True, sliding_window=8,
                                                        original_max_position_embeddings=64,
                                                        rope_parameters={"rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 1.0,
                                                                         "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0], "original_max_position_embeddings": 64})),
        "olmo2": (ARCHITECTURES.OLMO2, tr.Olmo2Config(**COMMON, tie_word_embeddings=False, rope_parameters=ROPE)),
        "granite": (ARCHITECTURES.GRANITE, tr.GraniteConfig(**COMMON, tie_word_embeddings=True, rope_parameters=ROPE, attention_multiplier=0.4,
                                                            embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0)),
        "smollm3": (ARCHITECTURES.SMOLLM3, tr.SmolLM3Config(**COMMON | {"num_hidden_layers": 4}, pad_token_id=0, tie_word_embeddings=True, rope_parameters=ROPE)),
        "gpt2": (ARCHITECTURES.GPT2, tr.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3,
                                                   bos_token_id=1, eos_token_id=2, layer_norm_epsilon=0.01)),
        "gptneox": (ARCHITECTURES.GPTNEOX, tr.GPTNeoXConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                                            num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3,
                                                            layer_norm_eps=0.01, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
                                                            rope_parameters=ROPE | {"partial_rotary_factor": 0.5})),
    }


def permuted(weights, heads):
    """Llama's rows of queries and keys, in the order of llama.cpp's rotary positions."""
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def converted(name, own, tensor, family, config):
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    is_permuted = family in ("llama", "llama3", "granite", "smollm3")
    if is_permuted and ".attn_q." in own:
        return permuted(tensor, heads)
    if is_permuted and ".attn_k." in own:
        return permuted(tensor, kv_heads)
    if family in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        return tensor + 1
    if family == "gpt2" and re.search(r"c_(attn|proj|fc)\.weight$", name):
        return tensor.T
    if family == "gptneox" and "query_key_value" in name:
        split = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
        return np.concatenate([split[:, part].reshape(-1, *tensor.shape[1:]) for part in range(3)])
    return tensor


def write_settings(writer, family, config):
    width = config.hidden_size
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * width)
    if family in ("gpt2", "gptneox"):
        writer.add_layer_norm_eps(config.layer_norm_epsilon if family == "gpt2" else config.layer_norm_eps)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if family == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads // 2)
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    if family in ("qwen3", "gemma2", "gemma3", "llama3"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if family.startswith(("llama", "phi3", "granite", "smollm3")):
        writer.add_rope_dimension_count(head_dim)
    if family == "gemma3":
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    elif family != "gpt2":
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family == "phi3-long":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        # llama.cpp's converter stores the factor of attention that follows from the lengths.
        scale = config.max_position_embeddings / config.original_max_position_embeddings
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(config.original_max_position_embeddings)))
    if family == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def llama3_factors(config):
    """What each frequency is divided by, as llama.cpp's converter computes it."""
    rope, dim = config.rope_parameters, config.head_dim
    factors = []
    for index in range(0, dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (index / dim)
        low, high = (rope["original_max_position_embeddings"] / rope[f"{end}_freq_factor"] for end in ("low", "high"))
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def write_tokens(writer, size=64):
    """A byte-level vocabulary of single letters, a merge and two special tokens."""
    tokens = ["<|pad|>", "<|bos|>", "<|turn|>"] + [chr(33 + index) for index in range(size - 5)] + ["Ġ", "AB"]
    assert len(tokens) == size == len(set(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (size - 3))
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def write_model(family, architecture, config):
    torch.manual_seed(0)
    model = tr.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                parameter += 0.3 * torch.randn_like(parameter)
    writer = gguf.GGUFWriter(OUT / f"{family}.gguf", gguf.MODEL_ARCH_NAMES[architecture])
    write_settings(writer, family, config)
    write_tokens(writer)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    if family == "phi3-long":
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(config.rope_parameters[f"{length}_factor"], dtype=np.float32))
    if family == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings or name.endswith((".attn.bias", ".masked_bias", "rotary_emb.inv_freq")):
            continue
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own, name
        writer.add_tensor(own, np.ascontiguousarray(converted(name, own, tensor.numpy(), family, config)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = torch.randint(0, 64, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits
    save_file({"input_ids": ids.numpy().astype(np.int64), "logits": logits.numpy()}, OUT / f"{family}.safetensors")


def write_blocks():
    """Random blocks, with scales that are ordinary numbers."""
    generator = np.random.default_rng(0)
    kinds = gguf.GGMLQuantizationType
    halves = {kinds.Q4_0: [0], kinds.Q4_1: [0, 2], kinds.Q5_0: [0], kinds.Q5_1: [0, 2], kinds.Q8_0: [0], kinds.Q2_K: [80, 82], kinds.Q3_K: [108],
              kinds.Q4_K: [0, 2], kinds.Q5_K: [0, 2], kinds.Q6_K: [208]}
    writer = gguf.GGUFWriter(OUT / "blocks.gguf", "llama")
    expected = {}
    for kind in [kinds.F32, kinds.F16, kinds.BF16, *halves]:
        name = kind.name.lower()
        if kind in halves:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            blocks = generator.integers(0, 256, (2 * 512 // block, size), dtype=np.uint8)
            for place in halves[kind]:
                blocks[:, place:place + 2] = generator.normal(0, 0.1, (len(blocks), 1)).astype(np.float16).view(np.uint8)
            data = blocks.reshape(2, -1)
            expected[name] = gguf.dequantize(data, kind).reshape(2, 512).astype(np.float32)
        else:
            numbers = generator.normal(0, 1, (2, 512)).astype(np.float32)
            data = gguf.quantize(numbers, kind)
            expected[name] = gguf.dequantize(data, kind).reshape(2, 512).astype(np.float32)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(expected, OUT / "blocks.safetensors")


def write_sentencepiece():
    words = "the a of to in and was lived river house keeps goat hen trumpet plays 1984 42 naïve Zürich Москва 日本 😀".split()
    random.seed(0)
    lines = [" ".join(random.choices(words, k=12)) for _ in range(400)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, vocab_size=380, model_type="bpe", byte_fallback=True,
                                             normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = pieces.vocab_size()
    kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1 for i in range(size)]
    writer = gguf.GGUFWriter(OUT / "sentencepiece.gguf", "llama")
    write_settings(writer, "llama", tr.LlamaConfig(**COMMON))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([pieces.get_score(i) for i in range(size)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    # Any weights: what is compared are tokens, and broken copies of this file go through the programs.
    torch.manual_seed(0)
    model = tr.LlamaForCausalLM(tr.LlamaConfig(**COMMON | {"vocab_size": size}, tie_word_embeddings=True))
    names = gguf.get_tensor_name_map(ARCHITECTURES.LLAMA, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    texts = lines[:30] + ["The  goat\tplays.", " leads and trails ", "new\nline", "ёжик 漢字 🙂", "x", "42nd of 1984", "the", "  two"]
    (OUT / "sentencepiece.json").write_text(json.dumps([[text, pieces.encode(text)] for text in texts], ensure_ascii=False, indent=0) + "\n")


def main():
    OUT.mkdir(exist_ok=True)
    for family, (architecture, config) in models().items():
        write_model(family, architecture, config)
    write_blocks()
    write_sentencepiece()


if __name__ == "__main__":
    main()
