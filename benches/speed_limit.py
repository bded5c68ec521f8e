"""The limit that the rows of `benches/speed.py` are held against: their products with the model's matrices alone, at the rate of PyTorch's in f32.

    python benches/speed_limit.py '{"threads": 2, "products": [[rows, d_in, d_out, times], ...]}'

Of a step, or of a batch of sampling. Left out is everything else: attention, low-rank updates, norms, activations, softmax, optimizer, reading, drawing.
Each shape goes through matrices of its own, as many as a pass has and 128 MB at most, so that a small one does not stay in the cache.
"""

import json
import statistics
import sys
import time

# How often the list of products is gone through, at least; the median time of each counts, as that of steps does.
PASSES = 5
SECONDS = 10.0


def matrices(config):
    """`(d_in, d_out, how many)` of the linear layers of a Llama's folder, and of its output matrix."""
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    keys = width // heads * config["num_key_value_heads"]
    layers = config["num_hidden_layers"]
    return [(width, width, 2 * layers), (width, keys, 2 * layers), (width, inner, 2 * layers), (inner, width, layers)], (width, config["vocab_size"])


def passes(config, rows, logits, trained=None, times=1):
    """Products of a pass over `rows` tokens with logits of so many of them: forward; with gradients of activations ("lora"), of weights too ("full")."""
    linears, (width, vocabulary) = matrices(config)
    found = [[rows, d_in, d_out, count] for d_in, d_out, count in linears] + [[logits, width, vocabulary, 1]] * (logits > 0)
    if trained:
        found += [[rows, d_out, d_in, count] for rows, d_in, d_out, count in found]
    if trained == "full":
        found += [[d_out, rows, d_in, count] for d_in, d_out, count in linears] + [[vocabulary, logits, width, 1]] * (logits > 0)
    return [[*shape, count * times] for *shape, count in found]


def generation(config, rows, prompt, answer):
    """Products of sampling: the prompts, then a token of every row at a time."""
    return passes(config, rows * prompt, rows) + passes(config, rows, rows, times=answer - 1)


def products(kind, config, row, tokens, prompt):
    """Products of a step of a row whose batch has so many tokens."""
    trained = "lora" if "lora" in row.more else "full"
    if kind == "sft":
        # Prompts and completions are of the same lengths; an end token follows each completion.
        return passes(config, tokens, tokens // 2, trained)
    if kind.startswith("reward"):
        return passes(config, tokens, 0, trained)
    answer = row.more["response_length"]
    if kind.startswith("sample"):
        return generation(config, row.more["rows"], prompt, answer)
    # The policy draws; policy, reference, value and reward model judge; policy and value model learn.
    rows = row.unit
    whole, learned = rows * (prompt + answer), rows * answer
    judged = passes(config, whole, learned, times=2) + passes(config, whole, 0, times=2)
    epochs = row.more["epochs"]
    return generation(config, rows, prompt, answer) + judged + passes(config, whole, learned, trained, epochs) + passes(config, whole, 0, trained, epochs)


def measured(wanted):
    """Seconds of all products, at the median of each."""
    import torch
    torch.set_num_threads(wanted["threads"])
    merged = {}
    for *shape, times in wanted["products"]:
        merged[tuple(shape)] = merged.get(tuple(shape), 0) + times
    inputs = {shape: torch.randn(shape[0], shape[1]) for shape in merged}
    # Matrices of 128 MB in turn are in no cache.
    weights = {shape: [torch.randn(shape[2], shape[1]) for _ in range(max(1, min(merged[shape], 32_000_000 // (shape[1] * shape[2]))))] for shape in merged}
    found = {shape: [] for shape in merged}
    started, passed = time.perf_counter(), 0
    while passed < PASSES or time.perf_counter() - started < SECONDS:
        for shape, matrices in weights.items():
            begun = time.perf_counter()
            for matrix in matrices:
                torch.nn.functional.linear(inputs[shape], matrix)
            found[shape].append((time.perf_counter() - begun) / len(matrices))
        passed += 1
    flops = sum(2 * rows * d_in * d_out * times for (rows, d_in, d_out), times in merged.items())
    seconds = sum(statistics.median(found[shape]) * times for shape, times in merged.items())
    return {"limit_seconds": seconds, "gflops": flops / seconds / 1e9}


if __name__ == "__main__":
    print(json.dumps(measured(json.loads(sys.argv[1]))))
