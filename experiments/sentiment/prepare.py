"""Film snippets with their sentiment, as train.jsonl and eval.jsonl, and a linear baseline on the same split.

    python -m experiments.sentiment.prepare runs/sentiment/data

The snippets are in the source package of vaderSentiment 3.3.2 (MIT; Hutto and Gilbert 2014), which pip fetches: 10,605
sentences of film reviews with the mean of human scores from -4 to 4. Those above 0 are positive. A tenth is held out by a
hash of the text; a text that occurs twice with different signs is left out.
"""

import io
import sys
import tarfile
from pathlib import Path

from experiments.baselines import linear
from experiments.records import command, fetched, write
from moejax.data.sources import digest

ARCHIVE, FILE = "additional_resources/hutto_ICWSM_2014.tar.gz", "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def snippets() -> list[tuple[str, str]]:
    """(text, positive or negative) of every snippet, from the package that pip fetches."""
    with fetched("vaderSentiment==3.3.2", "--no-binary=vaderSentiment") as package, tarfile.open(package) as outer:
        inner = next(member for member in outer if member.name.endswith(ARCHIVE))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner).read())) as archive:
            lines = archive.extractfile(FILE).read().decode("utf-8").splitlines()
    found: dict[str, set[str]] = {}
    for line in lines:
        _, score, text = line.split("\t", 2)
        found.setdefault(text.strip(), set()).add("positive" if float(score) > 0 else "negative")
    return [(text, labels.pop()) for text, labels in found.items() if len(labels) == 1]


def held_out(text: str) -> bool:
    """Whether a snippet is in the tenth on which nothing is trained."""
    return int(digest(text), 16) % 10 == 0


def main(folder: Path) -> None:
    """Writes the two files and prints the baseline."""
    found = snippets()
    train = [pair for pair in found if not held_out(pair[0])]
    test = [pair for pair in found if held_out(pair[0])]
    for name, pairs in (("train", train), ("eval", test)):
        write(folder / f"{name}.jsonl", ({"text": text, "label": label} for text, label in pairs), ascii_only=True)
    print(f"{len(train):,} snippets to train on, {len(test):,} held out, of which "
          f"{sum(label == 'positive' for _, label in test) / len(test):.3f} are positive")
    print(f"TF-IDF and a linear SVM: accuracy {linear(train, test).accuracy:.4f}")


if __name__ == "__main__":
    sys.exit(command(main, "sentiment"))
