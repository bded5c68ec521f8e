"""The data of `benches/smollm2.py`: people's demonstrations, rankings and prompts as messages, which the model's chat template renders.

    python benches/smollm2_data.py DATA runs/smollm2/data

DATA is a folder with demonstrations-{train,test}, hh-rlhf-explicit-{train,test}, preferences-human-mixed-{train,test}, ranked-human-{train,test} and
hh-prompts-{train,test}.parquet. Needs pyarrow. Rankings are divided in two halves by a hash of the prompt, so that no prompt is in both: the first trains the
reward model, the second the judge that no policy is trained against. Their columns are prompt (messages), responses, ranks and source.
"""

import hashlib
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def messages(prompt):
    """The turns of a dialogue in HH-RLHF's form up to the answer that is wanted; any other text is one turn of the user."""
    parts = TURN.split(prompt)
    if len(parts) < 3 or parts[0].strip():
        return [{"role": "user", "content": prompt.strip()}]
    turns = [{"role": ROLES[name], "content": text.strip()} for name, text in zip(parts[1::2], parts[2::2])]
    return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"] else turns


def half(prompt):
    """0 or 1, by the prompt alone."""
    return hashlib.sha256(prompt.strip().encode()).digest()[0] % 2


def demonstrations(data, split):
    rows = pq.read_table(data / f"demonstrations-{split}.parquet").to_pylist()
    return [{"messages": messages(row["prompt"]) + [{"role": "assistant", "content": row["completion"].strip()}]} for row in rows]


def rankings(data, split):
    """Rankings of all files, with the prompt as it was."""
    found = []
    for name in ("hh-rlhf-explicit", "preferences-human-mixed"):
        for row in pq.read_table(data / f"{name}-{split}.parquet").to_pylist():
            found.append((row["prompt"], [row["chosen"], row["rejected"]], [0, 1], name))
    for row in pq.read_table(data / f"ranked-human-{split}.parquet").to_pylist():
        found.append((row["prompt"], row["responses"], row["ranks"], "ranked-human"))
    return found


def ranked(rows):
    return [{"prompt": messages(prompt), "responses": [answer.strip() for answer in responses], "ranks": ranks, "source": source}
            for prompt, responses, ranks, source in rows]


def prompts(data, split):
    """Prompts whose dialogue ends with the user's turn."""
    rows = pq.read_table(data / f"hh-prompts-{split}.parquet").to_pylist()
    found = [{"messages": messages(row["prompt"]), "subset": row["subset"]} for row in rows]
    return [row for row in found if row["messages"][-1]["role"] == "user"]


def main(data, output):
    data, output = Path(data), Path(output)
    output.mkdir(parents=True, exist_ok=True)
    files = {f"demonstrations-{split}": demonstrations(data, split) for split in ("train", "test")}
    train = rankings(data, "train")
    for number, name in enumerate(("first", "second")):
        files[f"rankings-{name}"] = ranked(row for row in train if half(row[0]) == number)
    files["rankings-test"] = ranked(rankings(data, "test"))
    files |= {f"prompts-{split}": prompts(data, split) for split in ("train", "test")}
    for name, rows in files.items():
        pq.write_table(pa.Table.from_pylist(rows), output / f"{name}.parquet")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
