"""The labels of a set of records: their names, and as numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moejax.config import Config, check
from moejax.task import Task


def name_labels(config: Config, labels: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
    """The names of all labels, of each split by its name.

    Raises:
      UserError: the model has not a score for each, or training lacks one of the others.
    """
    task, classes = config.data.task, config.model.classes
    if task.objective == "regression":
        check(classes == 1, "config.data.task.objective=regression gives one number; set config.model.classes=1, not "
              f"{classes}")
        return ()
    each = (lambda label: label) if task.objective == "multi_label" else (lambda label: (label,))
    seen = {split: {name for label in labels[split] for name in each(label)} for split in labels}
    names = task.labels or tuple(sorted(seen["train"]))
    listed = ", ".join(names[:9]) + (", ..." if len(names) > 9 else "")
    check(len(names) == classes, f"there are {len(names)} labels ({listed}); set config.model.classes={len(names)}, not "
          f"{classes}")
    for split in labels:
        unknown = sorted(seen[split] - set(names))
        check(not unknown, f"label {unknown and unknown[0]!r} occurs in the {split} records only, so nothing learns it; "
              "name all in config.data.task.labels")
    return names


def number_labels(task: Task, labels: Sequence[Any], names: tuple[str, ...]) -> np.ndarray:
    """Labels as the loss takes them."""
    if task.objective == "regression":
        return np.asarray(labels, np.float32)
    place = {name: i for i, name in enumerate(names)}
    if task.objective == "classification":
        return np.array([place[label] for label in labels], np.int32)
    numbered = np.zeros((len(labels), len(names)), np.float32)
    for row, label in zip(numbered, labels):
        row[[place[name] for name in label]] = 1
    return numbered
