"""Makes a text classification of the ag_news templates in a t0.parquet: the articles without their templates, each once, with the class that the answers name.

    python benches/ag_news.py t0.parquet train.parquet test.parquet
"""

import re
import sys
import zlib

import pyarrow as pa
import pyarrow.parquet as pq

QUESTIONS = [
    r"What label best describes this news article\?",
    r"Which section of a newspaper would this article likely appear in\?",
    r"Is this a piece of news regarding world politics, sports, business, or science and technology\?",
    r"Would you recommend the following article to a politician, an athlete, a business executive, or a scientist\?",
    r"Which of the following sections of a newspaper would this article likely appear in\? [^\n]*",
]
CLASSES = {"scien": "science", "busin": "business"}


def main(source, train, test):
    articles = {}
    for row in pq.read_table(source).to_pylist():
        if not row["template"].startswith("ag_news"):
            continue
        text = row["prompt"]
        for question in QUESTIONS:
            text = re.sub(question, "", text)
        text = " ".join(text.replace("\\", " ").split())
        articles[text] = CLASSES[row["completion"][:5].lower()]
    # A third of the articles for the test, by a checksum of the text.
    parts = {train: [], test: []}
    for text, label in sorted(articles.items()):
        parts[test if zlib.crc32(text.encode()) % 3 == 0 else train].append((text, label))
    for path, rows in parts.items():
        texts, labels = zip(*rows)
        pq.write_table(pa.table({"text": texts, "label": labels}), path)
        print(path, len(rows), {label: labels.count(label) for label in sorted(set(labels))})


if __name__ == "__main__":
    main(*sys.argv[1:])
