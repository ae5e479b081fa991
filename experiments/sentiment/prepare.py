"""Film snippets with their sentiment, as train.jsonl and eval.jsonl, and a linear baseline on the same split.

    python experiments/sentiment/prepare.py runs/sentiment/data

The snippets are in the source package of vaderSentiment 3.3.2 (MIT; Hutto and Gilbert 2014), which pip fetches: 10,605
sentences of film reviews with the mean of human scores from -4 to 4. Those above 0 are positive. A tenth is held out by a
hash of the text; a text that occurs twice with different signs is left out.
"""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ARCHIVE, FILE = "additional_resources/hutto_ICWSM_2014.tar.gz", "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def snippets() -> list[tuple[str, str]]:
    """(text, positive or negative) of every snippet, from the package that pip fetches."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "vaderSentiment", "-d",
                        folder, "vaderSentiment==3.3.2"], check=True)
        package, = Path(folder).glob("*.tar.gz")
        with tarfile.open(package) as outer:
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
    return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16) % 10 == 0


def baseline(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> float:
    """Accuracy of a linear support vector machine on TF-IDF of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC
    machine = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LinearSVC())
    machine.fit(*zip(*train))
    return machine.score(*zip(*test))


def main(folder: Path) -> None:
    """Writes the two files and prints the baseline."""
    folder.mkdir(parents=True, exist_ok=True)
    found = snippets()
    train = [pair for pair in found if not held_out(pair[0])]
    test = [pair for pair in found if held_out(pair[0])]
    for name, pairs in (("train", train), ("eval", test)):
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs))
    print(f"{len(train):,} snippets to train on, {len(test):,} held out, of which "
          f"{sum(label == 'positive' for _, label in test) / len(test):.3f} are positive")
    print(f"TF-IDF and a linear SVM: accuracy {baseline(train, test):.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
