"""Sentiment, translation and languages as records, and linear baselines on the same splits.

    python -m experiments.multitask.prepare runs/multitask/data

Writes for each task NAME_train.jsonl and NAME_eval.jsonl: `sentiment`, the film snippets of experiments/sentiment;
`german`, strings of Home Assistant's user interface with their translations (homeassistant 2026.2.3, Apache-2.0, whose
wheel pip fetches); `language`, such strings in six languages. A tenth is held out by a hash of the text, for strings of the
English one, so that what one task holds out no other learns from.
"""

import json
import random
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments.baselines import linear
from experiments.records import command, fetched, write
from experiments.sentiment.prepare import held_out, snippets

LANGUAGES = {"en": "English", "de": "German", "fr": "French", "es": "Spanish", "nl": "Dutch", "pl": "Polish"}
WORDS = range(3, 31)
"""That a string may have."""
STRINGS = 4000
"""Of each language, for its task."""

Record = dict[str, str]


def strings(wheel: zipfile.ZipFile, language: str) -> dict[tuple[str, ...], str]:
    """The strings of a language by component and place."""
    def flat(tree: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
        for name, value in tree.items():
            yield from flat(value, (*place, name)) if isinstance(value, dict) else [((*place, name), value)]

    found = {}
    for name in wheel.namelist():
        if name.endswith(f"/translations/{language}.json"):
            found |= flat(json.loads(wheel.read(name)), (name.rsplit("/", 2)[0],))
    return found


def interface(languages: Iterable[str]) -> dict[str, dict[tuple[str, ...], str]]:
    """The strings of these languages, from the wheel that pip fetches."""
    with fetched("homeassistant==2026.2.3", "--only-binary=:all:", "--python-version=3.14") as path:
        with zipfile.ZipFile(path) as wheel:
            return {language: strings(wheel, language) for language in languages}


def usable(text: str, words: range) -> bool:
    """Whether a string is a text of so many words, without places to fill in."""
    return len(text.split()) in words and not set("{}[]%<>`|\n") & set(text)


def translations(found: dict[str, dict[tuple[str, ...], str]], language: str, words: range) -> list[tuple[str, str]]:
    """(English, other) of every string once, sorted; both of so many words and, but for English itself, not the same."""
    english = found["en"]
    return sorted({(english[place], text) for place, text in found[language].items()
                   if usable(english.get(place, ""), words) and usable(text, words)
                   and (language == "en" or english[place] != text)})


def tasks() -> dict[str, list[tuple[bool, Record]]]:
    """(whether it is held out, record) of every record of each task."""
    found, rng = interface(LANGUAGES), random.Random(0)
    rows = {"sentiment": [(held_out(text), {"text": text, "label": label}) for text, label in snippets()],
            "german": [(held_out(en), {"en": en, "de": de}) for en, de in translations(found, "de", WORDS)],
            "language": []}
    for language, name in LANGUAGES.items():
        pairs = translations(found, language, WORDS)
        for en, text in rng.sample(pairs, min(STRINGS, len(pairs))):
            rows["language"].append((held_out(en), {"text": text, "language": name}))
    return rows


def main(folder: Path) -> None:
    """Writes the files and prints sizes and baselines."""
    found = tasks()
    for name, rows in found.items():
        for split, held in (("train", False), ("eval", True)):
            part = [row for kept, row in rows if kept == held]
            write(folder / f"{name}_{split}.jsonl", part)
            print(f"{name}: {len(part):,} records to {'evaluate' if held else 'train'} on")
    for name, label in (("sentiment", "label"), ("language", "language")):
        train, test = ([(row["text"], row[label]) for kept, row in found[name] if kept == held] for held in (False, True))
        print(f"{name}: TF-IDF and a linear SVM: accuracy {linear(train, test).accuracy:.4f}")


if __name__ == "__main__":
    sys.exit(command(main, "multitask"))
