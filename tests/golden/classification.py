"""A tiny reward model: scores at the last token of answers, and the k-wise loss of one prompt with k = 4 ranked answers, a tie among them."""

from itertools import combinations
from pathlib import Path

import torch
from models import COMMON, VOCABULARY, randomise
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForSequenceClassification

HERE = Path(__file__).parent
RANKS = [1, 0, 2, 1]


def check_padded(model, prompt, answers, scores):
    """The same scores come from one batch padded on the right, where transformers finds each row's last token itself."""
    rows = [torch.cat([prompt, answer]) for answer in answers]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    torch.testing.assert_close(model(input_ids=padded, attention_mask=mask).logits[:, 0], scores, atol=1e-5, rtol=0)


def main():
    torch.set_num_threads(1)
    torch.manual_seed(40)
    config = LlamaConfig(**COMMON, tie_word_embeddings=False, num_labels=1, pad_token_id=0)
    model = LlamaForSequenceClassification._from_config(config, attn_implementation="eager").eval()
    randomise(model)
    folder = HERE / "llama-reward"
    model.save_pretrained(folder)
    prompt = torch.randint(3, VOCABULARY, (9,))
    answers = [torch.randint(3, VOCABULARY, (length,)) for length in (5, 2, 7, 4)]
    scores = torch.cat([model(input_ids=torch.cat([prompt, answer])[None]).logits.reshape(1) for answer in answers])
    check_padded(model, prompt, answers, scores)
    terms = []
    for a, b in combinations(range(4), 2):
        if RANKS[a] != RANKS[b]:
            better, worse = (a, b) if RANKS[a] < RANKS[b] else (b, a)
            terms.append(-torch.nn.functional.logsigmoid(scores[better] - scores[worse]))
    loss = torch.stack(terms).mean()
    loss.backward()
    result = {"prompt": prompt, "ranks": torch.tensor(RANKS), "scores": scores.detach(), "loss": loss.detach().reshape(1)}
    result |= {f"answer.{index}": answer for index, answer in enumerate(answers)}
    result |= {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    save_file({name: tensor.contiguous() for name, tensor in result.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
