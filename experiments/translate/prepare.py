"""User-interface strings in English and three languages, as pairs, and a translation memory on the same split.

    python -m experiments.translate.prepare runs/translate/data

Strings of Home Assistant (homeassistant 2026.2.3, Apache-2.0, whose wheel pip fetches) of 2 to 12 words. A tenth is held
out by a hash of the words of the English text, the same for all languages. A pair is not trained on if either side of it,
without case and punctuation, is a side of a held-out pair of its language. The translation memory answers with the
translation of the training text whose TF-IDF vector is the nearest: of words, or of 1 to 4 letters, for each score
whichever has the higher one on the held-out pairs.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.baselines import nearest
from experiments.multitask.prepare import interface, translations
from experiments.records import command, write
from experiments.sentiment.prepare import held_out
from moejax.metrics.text import scorers, text_metrics

LANGUAGES = {"de": "german", "fr": "french", "es": "spanish"}
WORDS = range(2, 13)
"""That a text may have."""

Pair = tuple[str, str]


def plain(text: str) -> str:
    """The words of a text, without case and punctuation, by which duplicates are found and texts held out."""
    return " ".join(re.findall(r"\w+", text.lower()))


def split(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """(to train on, held out), no text of the one part in the other.

    A text is held out once, on either side; an English one is trained on once, with the first of its translations.
    """
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    seen: tuple[set[str], set[str]] = (set(), set())
    for held in (True, False):
        own: tuple[set[str], set[str]] = (set(), set())
        for pair in pairs:
            sides = [plain(text) for text in pair]
            known = any(side in before for side, before in zip(sides, seen))
            repeated = sides[0] in own[0] if not held else any(side in mine for side, mine in zip(sides, own))
            if held_out(sides[0]) == held and not known and not repeated:
                parts[held].append(pair)
                for side, mine in zip(sides, own):
                    mine.add(side)
        seen = own
    return parts


def memory(train: Sequence[Pair], test: Sequence[Pair]) -> dict[str, float]:
    """The better of two translation memories by each score, with the texts themselves to be told as references."""
    found = []
    for how in ({"analyzer": "word", "token_pattern": r"\w+"}, {"analyzer": "char_wb", "ngram_range": (1, 4)}):
        indices, _ = nearest([english for english, _ in train], [english for english, _ in test], **how)
        found.append(text_metrics([train[index][1] for index in indices], [other for _, other in test]))
    return {name: max(scores[name] for scores in found) for name in found[0]}


def main(folder: Path) -> None:
    """Writes the files, and prints sizes and the translation memory's scores."""
    scorers()  # which raises before anything is fetched or written
    strings = interface(("en", *LANGUAGES))
    for language, name in LANGUAGES.items():
        train, test = split(translations(strings, language, WORDS))
        for part, pairs in (("train", train), ("eval", test)):
            write(folder / f"{name}_{part}.jsonl", ({"en": source, language: target} for source, target in pairs))
        scores = memory(train, test)
        print(f"{name}: {len(train):,} pairs to train on, {len(test):,} held out; translation memory: BLEU "
              f"{scores['bleu']:.2f}, chrF {scores['chrf']:.2f}, exact {scores['exact_match']:.4f}")


if __name__ == "__main__":
    sys.exit(command(main, "translate"))
