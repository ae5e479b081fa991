"""The labels of a set of records: their names, and as numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moejax.config import Config, UserError, check
from moejax.task import Task


def names_in(task: Task, label: Any) -> tuple[str, ...]:
    """The names of which a record's label consists; none for a number."""
    if task.objective == "regression":
        return ()
    return tuple(label) if task.objective == "multi_label" else (label,)


def name_labels(config: Config, labels: Mapping[str, Sequence[Any]], first: Mapping[str, str]) -> tuple[str, ...]:
    """The names of all labels.

    Args:
      config: whose task has labels.
      labels: of each split by its name.
      first: the place of the first record with each label.

    Raises:
      UserError: the model has not a score for each, or training lacks one of the others.
    """
    task, classes = config.data.task, config.model.classes
    if task.objective == "regression":
        check(classes == 1, "config.data.task.objective=regression gives one number; set config.model.classes=1, not "
              f"{classes}")
        return ()
    seen = {split: Counter(name for label in labels[split] for name in names_in(task, label)) for split in labels}
    names = task.labels or tuple(sorted(seen["train"]))
    listed = ", ".join(names[:9]) + (", ..." if len(names) > 9 else "")
    rare = min(seen["train"], key=seen["train"].get) if seen["train"] and len(names) > classes else None
    hint = "" if rare is None else f" (the rarest, {rare!r}, is first in {first[rare]})"
    check(len(names) == classes, f"there are {len(names)} labels ({listed}); set config.model.classes={len(names)}, not "
          f"{classes}{hint}")
    for split in labels:
        unknown = sorted(set(seen[split]) - set(names))
        if unknown:
            raise UserError(f"{first[unknown[0]]}: label {unknown[0]!r} occurs in the {split} records only, so nothing "
                            "learns it; name all in config.data.task.labels, or set config.data.on_bad_record=skip")
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
