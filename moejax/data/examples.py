"""Records to examples: a text, and for some objectives its target text or its label."""

import math
import string
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from moejax.config import Config, UserError, check
from moejax.data import sources
from moejax.data.labels import names_in
from moejax.task import PAIRS, TEXT, Task, normal

LABEL_KEY = "config.data.task.label"


class Example(NamedTuple):
    """One example.

    Attributes:
      text: what the model reads.
      target: what it is to write; None without.
      label: a name, a number, or several names; None without.
    """

    text: str
    target: str | None = None
    label: Any = None


class Reader:
    """Reads the examples of sources, and counts the records that it leaves out.

    Args:
      config: `data.task`, `data.text_key` and `data.on_bad_record`.

    Attributes:
      left_out: why each bad record or blank document was left out.
      first: the place of the first record with each label.
      unwanted: how many good examples whoever reads did not take, by reason.
    """

    def __init__(self, config: Config):
        self.task, self.text_key = config.data.task, config.data.text_key
        self.skips = config.data.on_bad_record == "skip"
        self.left_out: list[str] = []
        self.first: dict[str, str] = {}
        self.unwanted: Counter[str] = Counter()

    def read(self, source: str) -> Iterator[Example]:
        """The examples of a source. Raises `UserError` on a bad record, unless these are left out, or if there is none."""
        found = 0
        if self.task.data == TEXT and not self.skips:
            for text in sources.documents(source, self.text_key, self.left_out):
                yield Example(normal(self.task, text))
            return
        for record in sources.records(source):
            try:
                example = self.example(record)
            except UserError as error:
                if not self.skips:
                    raise
                self.left_out.append(str(error))
                continue
            found += 1
            yield example
        check(found > 0, f"source {source!r} holds no example; give files that are not empty"
              + (f" (the first record that was left out: {self.left_out[0]})" if self.left_out else ""))

    def example(self, record: sources.Record) -> Example:
        """One example. Raises `UserError` with place and reason if the record is bad."""
        task, key = self.task, "config.data.task"
        if task.data == TEXT:
            text = sources.document(record, self.text_key)
            check(bool(text.strip()), f"{record.where}: the text is empty")
            return Example(normal(task, text))
        text = normal(task, fill(record, task.input, f"{key}.input"))
        if task.data == PAIRS:
            return Example(text, normal(task, fill(record, task.target, f"{key}.target")))
        label = read_label(record, task)
        for name in names_in(task, label):
            self.first.setdefault(name, record.where)
        return Example(text, label=label)


def fill(record: sources.Record, template: str, key: str) -> str:
    """A template with a record's fields. Raises `UserError` if one is missing or the text is empty."""
    parts = [(before, name) for before, name, _, _ in string.Formatter().parse(template)]
    values = {name: text_of(record, name, key) for _, name in parts if name is not None}
    empty = [name for name, value in values.items() if not value.strip()]
    check(not empty, f"{record.where}: field {empty and empty[0]!r} is empty; leave the record out, or set "
          "config.data.on_bad_record=skip")
    return "".join(before + values.get(name, "") for before, name in parts)


def text_of(record: sources.Record, name: str, key: str) -> str:
    """A field as text; numbers are written out."""
    number = plain(sources.value(record, name, key))
    if isinstance(number, (int, float)) and not isinstance(number, bool):
        return str(number)
    return sources.field(record, name, key)


def plain(value: Any) -> Any:
    """A value without the types of numpy, as TFDS has them."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [plain(part) for part in value] if isinstance(value, list) else value


def read_label(record: sources.Record, task: Task) -> Any:
    """The label of a record: a name, a finite number (regression), or a sorted tuple of names (multi_label)."""
    value = plain(sources.value(record, task.label, LABEL_KEY))
    if task.objective == "regression":
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        check(abs(number) <= float(np.finfo(np.float32).max),
              f"{record.where}: field {task.label!r} holds {value!r}, which is no number (float32)")
        return number
    if task.objective == "classification":
        return name_of(record, value, task)
    check(isinstance(value, (list, tuple)),
          f"{record.where}: field {task.label!r} holds {value!r}, which is no list of labels")
    return tuple(sorted({name_of(record, label, task) for label in value}))


def name_of(record: sources.Record, label: Any, task: Task) -> str:
    """The name of a label. Raises `UserError` unless it is text, with letters, or a finite number, and one of the task."""
    if isinstance(label, (str, bytes)):
        name = sources.text_in(record, task.label, label, LABEL_KEY)
        check(bool(name.strip()), f"{record.where}: field {task.label!r} holds an empty label; leave the record out, or "
              "set config.data.on_bad_record=skip")
    else:
        check(isinstance(label, int) or isinstance(label, float) and math.isfinite(label),
              f"{record.where}: field {task.label!r} holds {label!r}, which is no label")
        name = str(label)
    name = normal(task, name)
    check(task.labels is None or name in task.labels, f"{record.where}: label {name!r} is none of "
          f"{', '.join(task.labels or ())}, those of config.data.task.labels or else of the training records")
    return name
