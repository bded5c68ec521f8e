"""Which tokens temperature, top-k and top-p leave, by the logits processors of transformers in the order of its `generate`.

Small vocabularies, with logits that are multiples of 1/4 so that ties occur at every edge. Cases in which the mass at the edge of the
nucleus is within 1e-5 of the share are left out: there rounding decides.
"""

import json
from pathlib import Path

import numpy
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

HERE = Path(__file__).parent


def kept(logits, temperature, top_k, top_p):
    scores = TemperatureLogitsWarper(temperature)(None, torch.tensor([logits]))
    if top_k > 0:
        scores = TopKLogitsWarper(top_k)(None, scores)
    left = torch.softmax(scores[0].double(), 0).sort(descending=True)[0].cumsum(0)
    is_near = top_p < 1 and bool(((left - top_p).abs() < 1e-5).any())
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return is_near, [token for token, score in enumerate(scores[0].tolist()) if score > -float("inf")]


def main():
    generator = numpy.random.default_rng(0)
    cases = []
    for number in range(240):
        size = int(generator.integers(1, 12))
        spread = float(generator.choice([0.5, 1.0, 3.0]))
        logits = (numpy.round(generator.normal(0, spread, size) * 4) / 4).tolist()
        temperature = float(generator.choice([0.5, 1.0, 2.0]))
        top_k = int(generator.choice([0, 1, 2, 3, 5, 20]))
        top_p = float(generator.choice([0.1, 0.3, 0.6, 0.9, 1.0]))
        is_near, tokens = kept(logits, temperature, top_k, top_p)
        if not is_near:
            cases.append({"logits": logits, "temperature": temperature, "top_k": top_k, "top_p": top_p, "kept": tokens})
    # What the whole distribution's nucleus would not cut: 1/5 of each of ten, of which top-k leaves none out because of ties.
    for top_k, top_p in [(2, 0.5), (3, 0.35)]:
        cases.append({"logits": [1.0] * 10, "temperature": 1.0, "top_k": top_k, "top_p": top_p,
                      "kept": kept([1.0] * 10, 1.0, top_k, top_p)[1]})
    text = "[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n"
    (HERE / "sampling.json").write_text(text)


if __name__ == "__main__":
    main()
