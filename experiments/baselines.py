"""What the models of the experiments are compared with: a linear classifier and the most similar text, both on TF-IDF."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

ROWS = 200
"""Texts that are compared with all known ones at a time, so that the cosines fit the memory."""


class Told(NamedTuple):
    """How good a classifier's labels are, from 0 to 1."""

    accuracy: float
    macro_f1: float


def linear(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> Told:
    """A linear support vector machine on TF-IDF of words and pairs of words.

    Args:
      train: (text, label) to learn from.
      test: (text, label) to be told.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC
    machine = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LinearSVC())
    machine.fit(*zip(*train))
    texts, labels = zip(*test)
    told = machine.predict(texts)
    return Told(accuracy_score(labels, told), f1_score(labels, told, average="macro"))


def nearest(known: Sequence[str], asked: Sequence[str], **vectors: Any) -> tuple[np.ndarray, np.ndarray]:
    """For each of M asked texts the most similar of the known ones, and of equal ones the first.

    Args:
      known: texts, from which the frequencies are.
      asked: texts, at least one.
      vectors: options of sklearn's TfidfVectorizer, which without them counts words of two letters and more.

    Returns:
      Its index among the known ones, [M], and the cosine of the TF-IDF vectors, [M].
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    machine = TfidfVectorizer(sublinear_tf=True, **vectors)
    known_VN = machine.fit_transform(known).T.tocsr()
    asked_MV = machine.transform(asked)
    indices, cosines = [], []
    for begin in range(0, len(asked), ROWS):
        cosines_RN = (asked_MV[begin:begin + ROWS] @ known_VN).toarray()
        indices.append(cosines_RN.argmax(axis=1))
        cosines.append(cosines_RN.max(axis=1))
    return np.concatenate(indices), np.concatenate(cosines)
