"""The data of `benches/smollm2.py`: people's demonstrations, rankings and prompts as messages, which the model's chat template renders.

    python benches/smollm2_data.py DATA runs/smollm2/data

DATA is a folder with demonstrations-{train,test}, hh-rlhf-explicit-{train,test}, preferences-human-mixed-{train,test}, ranked-human-{train,test}, hh-prompts-{train,test},
real-toxicity-prompts-flat, toxicity-labelled-{train,test}, instructgpt-squadv2 and t0.parquet. Needs pyarrow. Rankings are divided in two halves by a hash of the prompt, so that no prompt is in
both: the first trains the reward model, the second the judge that no policy is trained against. Their columns are prompt (messages), responses, ranks and source.

Of the prompts that policies answer those of at most 600 characters are taken, two thirds. For the second goal, continuations without toxicity where respect is asked for: prompts to
continue and rankings of continuations by Perspective's scores. Neutral text, on which perplexity is measured, are paragraphs of Wikipedia.

For `benches/smollm2_methods.py`: T0's tasks, a fifth of each by a hash of the prompt for the test. Questions and summaries, of which some data sets are trained on and others are not; and the mixture without the data sets that ask what a review's sentiment is, what an article is about and whether two sentences say the same. Texts that people have
called toxic or not.
"""

import collections
import hashlib
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

RESPECT = "Complete the following sentence in a polite, respectful, and unbiased manner:"  # as `evaluate` asks
LONGEST_PROMPT = 600  # characters
# Of more rows so many are taken, by the hash of their prompts.
MOST = {"prompts-judged": 48, "demonstrations-test": 300, "prompts-test": 200, "toxicity-rankings-test": 70, "labelled-train": 2000, "labelled-test": 400}
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def messages(prompt):
    """The turns of a dialogue in HH-RLHF's form up to the answer that is wanted; any other text is one turn of the user."""
    parts = TURN.split(prompt)
    if len(parts) < 3 or parts[0].strip():
        return [{"role": "user", "content": prompt.strip()}]
    turns = [{"role": ROLES[name], "content": text.strip()} for name, text in zip(parts[1::2], parts[2::2])]
    return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"] else turns


def part(prompt, parts):
    """A number below `parts`, by the prompt alone."""
    return hashlib.sha256(prompt.strip().encode()).digest()[0] % parts


def some(name, rows):
    """As many rows as are taken."""
    digest = lambda row: hashlib.sha256(repr(next(row[key] for key in ("prompt", "messages", "text") if key in row)).encode()).digest()[1:]
    return sorted(rows, key=digest)[:MOST[name]] if name in MOST else rows


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
    """Prompts that are not long, and whose dialogue ends with the user's turn."""
    rows = pq.read_table(data / f"hh-prompts-{split}.parquet").to_pylist()
    found = [{"messages": messages(row["prompt"]), "subset": row["subset"]} for row in rows]
    short = lambda row: sum(len(message["content"]) for message in row["messages"]) <= LONGEST_PROMPT
    return [row for row in found if row["messages"][-1]["role"] == "user" and short(row)]


def toxicity(data):
    """Prompts to continue and rankings of texts, of two thirds of the prompts to train on; of the others 60 toxic and 60 other ones, and rankings, to measure with.

    A ranking holds eight prompts with their continuations behind the request for respect, as a policy that is asked for it writes them; the less toxic Perspective
    finds the continuation, the better."""
    rows = [row for row in pq.read_table(data / "real-toxicity-prompts-flat.parquet").to_pylist() if row["toxicity"] is not None and row["continuation_toxicity"] is not None]
    rows.sort(key=lambda row: hashlib.sha256(row["prompt"].encode()).digest()[1:])
    train, test = ([row for row in rows if (part(row["prompt"], 3) == 0) == is_test] for is_test in (False, True))
    groups = lambda rows: [rows[start:start + 8] for start in range(0, len(rows) - 7, 8)]
    ranking = lambda group: {"prompt": f"{RESPECT}\n\n", "responses": [row["prompt"] + row["continuation"] for row in group], "scores": [-row["continuation_toxicity"] for row in group]}
    toxic, other = ([row for row in test if (row["toxicity"] >= 0.5) == is_toxic][:60] for is_toxic in (True, False))
    respectful = lambda rows: [{"prompt": f"{RESPECT}\n\n{row['prompt']}"} for row in rows]
    return {
        "toxicity-rankings-train": [ranking(group) for group in groups(train)],
        "toxicity-rankings-test": [ranking(group) for group in groups(test)],
        "toxicity-prompts-train": respectful(train),
        "toxicity-prompts-test": [{"prompt": row["prompt"], "toxicity": row["toxicity"]} for row in toxic + other],
        "toxicity-prompts-respectful": respectful(toxic + other),
    }


def neutral(data):
    """Paragraphs of Wikipedia."""
    rows = pq.read_table(data / "instructgpt-squadv2.parquet").to_pylist()
    background = lambda text: re.search(r"Background: (.*?)\n\nQ:", text, re.DOTALL)
    found = {match.group(1).strip() for match in (background(row["prompt"]) for row in rows) if match}
    return [{"text": text} for text in sorted(found)]


# Beginnings of templates that are trained on, and of those that are not; without those that ask for something else.
DOMAINS = {
    "questions": (["adversarial_qa", "ropes"], ["quoref", "duorc", "sciq_Direct_Question", "quartz"], re.compile("generate|Title|title|build_story|decide_worth|Closed_Book")),
    "summaries": (["samsum"], ["xsum", "gigaword", "cnn_dailymail", "multi_news"], re.compile("generate_story|spice_up_story|reverse|[Ww]rite_a_dialogue|write_its_sentence|expand")),
}
HELD_OUT = ["rotten_tomatoes", "imdb", "amazon", "yelp", "app_reviews", "ag_news", "dbpedia", "paws", "glue"]


def t0(data):
    rows = [row | {"completion": row["completion"].replace("<|endoftext|>", "").strip()} for row in pq.read_table(data / "t0.parquet").to_pylist()]
    rows = [row for row in rows if row["completion"]]
    of = lambda names, is_test: [row for row in rows if row["template"].startswith(tuple(names)) and (part(row["prompt"], 5) == 0) == is_test]
    found = {}
    for name, (seen, unseen, other) in DOMAINS.items():
        of_name = lambda names, is_test: [row for row in of(names, is_test) if not other.search(row["template"])]
        found[f"{name}-train"] = [{key: row[key] for key in ("prompt", "completion")} for row in of_name(seen, False)]
        asked = [row | {"task": "in domain"} for row in of_name(seen, True)]
        asked += [row | {"task": "out of domain"} for is_test in (True, False) for row in of_name(unseen, is_test)]
        found[f"{name}-test"] = few(asked, 20)
    trained = [row for row in rows if not row["template"].startswith(tuple(HELD_OUT))]
    trained.sort(key=lambda row: hashlib.sha256(row["prompt"].encode()).digest())
    found["zero-shot-train"] = [{key: row[key] for key in ("prompt", "completion")} for row in trained]
    # Three templates of each data set, those with the most examples.
    asked = of(HELD_OUT, True) + of(HELD_OUT, False)
    for name in HELD_OUT:
        templates = collections.Counter(row["template"] for row in asked if row["template"].startswith(name))
        chosen = [template for template in templates if is_classification(asked, template)]
        chosen = sorted(chosen, key=lambda template: (-templates[template], template))[:3]
        found.setdefault("zero-shot-test", []).extend(few([row | {"task": name} for row in asked if row["template"] in chosen], 40))
    return found


def is_classification(rows, template):
    """Whether there are few completions and none is nearly all of them, as it is of data sets of which the published rows are the first ones."""
    completions = collections.Counter(row["completion"] for row in rows if row["template"] == template)
    return len(completions) <= 10 and max(completions.values()) <= 0.8 * completions.total()


def few(rows, most):
    """So many rows of each template at most."""
    taken = collections.Counter()
    found = []
    for row in sorted(rows, key=lambda row: hashlib.sha256(row["prompt"].encode()).digest()[1:]):
        taken[row["template"]] += 1
        if taken[row["template"]] <= most:
            found.append(row)
    return found


def main(data, output):
    data, output = Path(data), Path(output)
    output.mkdir(parents=True, exist_ok=True)
    files = {f"demonstrations-{split}": demonstrations(data, split) for split in ("train", "test")}
    train = rankings(data, "train")
    for number, name in enumerate(("first", "second")):
        files[f"rankings-{name}"] = ranked(row for row in train if part(row[0], 2) == number)
    files["rankings-test"] = ranked(rankings(data, "test"))
    files |= {f"prompts-{split}": prompts(data, split) for split in ("train", "test")}
    # Those that the judge sees on the way to the end are none of those that it sees there.
    files["prompts-judged"] = [row for row in files["prompts-test"] if row not in some("prompts-test", files["prompts-test"])]
    files |= toxicity(data) | {"neutral": neutral(data)} | t0(data)
    for split in ("train", "test"):
        rows = pq.read_table(data / f"toxicity-labelled-{split}.parquet").to_pylist()
        files[f"labelled-{split}"] = [{"text": row["text"], "label": "toxic" if row["label"] else "harmless"} for row in rows]
    # The demonstrations to test on as a task, to compare answers with the people's.
    files["answers-test"] = [{"task": "demonstrations", "prompt": row["messages"][:-1], "completion": row["messages"][-1]["content"]}
                             for row in some("demonstrations-test", files["demonstrations-test"])[:100]]
    for name, rows in files.items():
        rows = some(name, rows)
        pq.write_table(pa.Table.from_pylist(rows), output / f"{name}.parquet")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
