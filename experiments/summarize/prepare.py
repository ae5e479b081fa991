"""Package descriptions with their one-line synopses, as train.jsonl and eval.jsonl, and two baselines on the same split.

    python -m experiments.summarize.prepare runs/summarize/data

Descriptions and synopses are those of the packages of a Debian (or Ubuntu) machine, which apt-get fetches into a folder of
its own (16 MB; no root needed, and the machine's lists stay as they are). Each source package gives one pair. Sources that
share a synopsis or the beginning of a description, numbers aside, are one family, and a tenth of the families is held out
by a hash of their name, but for descriptions that are almost the same as one in training. The baselines are the first words
of a description, and the synopsis of the most similar description in training.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.baselines import nearest
from experiments.records import command, last_line, write
from experiments.sentiment.prepare import held_out
from moejax.config import UserError, check
from moejax.data.sources import digest
from moejax.metrics.text import scorers, text_metrics

READ = 64
"""Words of a description that are kept: about what the model reads."""
SHORTEST = 20
"""Words of a description that has something to sum up."""
SYNOPSIS = range(3, 17)
"""Words that a synopsis may have."""
BEGINNING = 10
"""Words of a description by which a family is told."""
LARGEST = 50
"""Sources in a family that may be held out; in larger ones everything has the same form, so they are for training."""
COPY = 0.8
"""Cosine to a training description above which a held-out one is almost the same, and left out."""
ANSWERS = 500
"""The held-out pairs, from the first on, for which the README has models answer."""
TUNING = 2000
"""Training pairs on which the lead's length is chosen."""
METRICS = ("rouge1", "rouge2", "rougeL")


class Package(NamedTuple):
    """A binary package."""

    name: str
    source: str
    synopsis: str
    description: str


def fetch() -> tuple[str, str]:
    """All that apt knows of packages and of their English descriptions, as two texts of paragraphs of fields.

    Raises:
      UserError: there is no apt-get, or it does not fetch all that it should.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "lists" / "partial").mkdir(parents=True)
        options = {"Dir::State": folder, "Dir::State::lists": f"{folder}/lists", "Dir::Cache": folder,
                   "Acquire::Languages": "en", "Acquire::GzipIndexes": "false", "APT::Sandbox::User": "root",
                   "APT::Update::Error-Mode": "any"}  # else it succeeds where some lists could not be fetched
        given = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        try:
            done = subprocess.run(["apt-get", "update", "-q", *given], capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError("there is no apt-get here; prepare the data on a Debian or Ubuntu machine and copy the folder"
                            ) from None
        parts = [sorted(Path(folder, "lists").glob(pattern)) for pattern in ("*_Packages", "*_Translation-en")]
        check(done.returncode == 0 and all(parts), f"apt-get could not fetch all lists ({last_line(done.stderr)}); check "
              "the network and /etc/apt/sources.list")
        packages, descriptions = ("\n\n".join(path.read_text(encoding="utf-8") for path in found) for found in parts)
        return packages, descriptions


def paragraphs(text: str) -> Iterator[dict[str, str]]:
    """The fields of each paragraph; a line that begins with a space goes on with the field before."""
    for paragraph in re.split(r"\n\n+", text.strip()):
        fields, name = {}, ""
        for line in paragraph.split("\n"):
            if line.startswith(" "):
                fields[name] += "\n" + line
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        yield fields


def read(packages: str, descriptions: str) -> list[Package]:
    """Every package once, by its name, with whitespace made single spaces and a description cut to READ words."""
    sources = {fields["Package"]: fields.get("Source", fields["Package"]).split()[0] for fields in paragraphs(packages)}
    found = {}
    for fields in paragraphs(descriptions):
        synopsis, _, description = fields["Description-en"].partition("\n")
        words = description.replace("\n .\n", "\n").split()[:READ]
        name = fields["Package"]
        found[name] = Package(name, sources.get(name, name), " ".join(synopsis.split()), " ".join(words))
    return [found[name] for name in sorted(found)]


def one_of_each(packages: Iterable[Package]) -> list[Package]:
    """The package that a source is named after or else the one with the shortest name, if it has something to sum up."""
    found = {}
    for package in packages:
        if len(package.description.split()) >= SHORTEST and len(package.synopsis.split()) in SYNOPSIS:
            found.setdefault(package.source, []).append(package)
    return [min(own, key=lambda package: (package.name != package.source, len(package.name), package.name))
            for own in found.values()]


def families(packages: Sequence[Package]) -> list[str]:
    """The family of each package, named after its first source.

    Two belong together if they have a synopsis or the first BEGINNING words of a description in common, letters only, or
    if each belongs with a third.
    """
    above: dict[tuple[str, str], tuple[str, str]] = {}

    def top(one: tuple[str, str]) -> tuple[str, str]:
        while above.setdefault(one, one) != one:
            above[one] = one = above[above[one]]
        return one

    def key(kind: str, text: str, words: int | None = None) -> tuple[str, str]:
        return kind, " ".join(re.findall(r"[^\W\d_]+", text.lower())[:words])

    for package in packages:
        own = top(("source", package.source))
        for shared in (key("synopsis", package.synopsis), key("beginning", package.description, BEGINNING)):
            above[top(shared)] = own
    tops = [top(("source", package.source)) for package in packages]
    names: dict[tuple[str, str], str] = {}
    for package, one in zip(packages, tops):
        names[one] = min(names.get(one, package.source), package.source)
    return [names[one] for one in tops]


def split(packages: Sequence[Package], names: Sequence[str]) -> tuple[list[Package], list[Package]]:
    """For training and held out by the names of their families, each in an order by hash, so that the first ones stand for
    all.
    """
    sizes, parts = Counter(names), ([], [])
    for package, family in zip(packages, names, strict=True):
        parts[sizes[family] <= LARGEST and held_out(family)].append(package)
    for part in parts:
        part.sort(key=lambda package: digest(package.name))
    return parts


def lead(description: str, words: int) -> str:
    """The first words."""
    return " ".join(description.split()[:words])


def best_lead(train: Sequence[Package]) -> int:
    """The number of words with the best ROUGE-L on training pairs."""
    def score(words: int) -> float:
        return scores([lead(package.description, words) for package in train[:TUNING]], train[:TUNING])["rougeL"]

    return max(SYNOPSIS, key=score)


def apart(train: Sequence[Package], test: Sequence[Package]) -> list[tuple[Package, Package]]:
    """(held out, the one in training with the most similar description) of those held out that are no near copies."""
    indices, cosines = nearest(*([package.description for package in part] for part in (train, test)))
    return [(one, train[index]) for one, index, cosine in zip(test, indices, cosines, strict=True) if cosine <= COPY]


def scores(answers: Sequence[str], packages: Sequence[Package]) -> dict[str, float]:
    """As --mode=eval scores answers."""
    return text_metrics(answers, [package.synopsis for package in packages])


def main(folder: Path) -> None:
    """Writes the two files and prints the baselines, on the pairs that models answer and on all that are held out."""
    scorers()  # which raises before anything is fetched or written
    packages = one_of_each(read(*fetch()))
    names = families(packages)
    train, held = split(packages, names)
    kept = apart(train, held)
    test = [one for one, _ in kept]
    for name, part in (("train", train), ("eval", test)):
        write(folder / f"{name}.jsonl", ({"description": package.description, "synopsis": package.synopsis}
                                         for package in part))
    print(f"{len(packages):,} pairs in {len(set(names)):,} families: {len(train):,} to train on, {len(test):,} held out; "
          f"{len(held) - len(test):,} more were left out, for training has almost the same description")
    length = best_lead(train)
    for name, answers in ((f"first {length} words", [lead(package.description, length) for package in test]),
                          ("most similar description", [other.synopsis for _, other in kept])):
        for count in (ANSWERS, len(test)):
            found = scores(answers[:count], test[:count])
            print(f"{name}, {min(count, len(test)):,} held out: "
                  + "  ".join(f"{metric} {found[metric]:.4f}" for metric in METRICS))


if __name__ == "__main__":
    sys.exit(command(main, "summarize"))
