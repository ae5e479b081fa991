"""What was prepared of the documents, read from the folder that `moejax.data.prepare` has made and describes."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from moejax.bounded import parse_json, read_file
from moejax.config import UserError, check
from moejax.data.tokenizers import Tokenizer, load_tokenizer
from moejax.mixture import task_name

SPLITS = ("train", "eval")
REFERENCES = "eval_references.json"


class TokenStream(NamedTuple):
    """One split.

    Attributes:
      tokens: memory map uint16 or uint32 [N].
      starts: int64 [documents], offsets of their first tokens: separators, or what else a tokenizer begins a text with.
      bytes: size of the text in UTF-8 without separators.
      documents: their number.
      target: the same of the documents' targets, or None.
      labels: of the documents, see above, or None.
    """

    tokens: np.ndarray
    starts: np.ndarray
    bytes: int
    documents: int
    target: "TokenStream | None" = None
    labels: np.ndarray | None = None

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document."""
        end = self.starts[index + 1] if index + 1 < self.documents else len(self.tokens)
        return self.tokens[self.starts[index]:end]


class Prepared(NamedTuple):
    """All that training and evaluation need of the data.

    Attributes:
      tokenizer: of all texts.
      train, eval: the splits; None of a mixture.
      folder: where it lies.
      content: hash of the data.
      labels: their names in the order of the scores.
      tasks: the data of each task of a mixture.
      samplings: how often each training document is there, each time cut into other tokens; of a mixture 1.
    """

    tokenizer: Tokenizer
    train: TokenStream | None
    eval: TokenStream | None
    folder: Path
    content: str
    labels: tuple[str, ...] = ()
    tasks: "Mapping[str, Prepared]" = MappingProxyType({})
    samplings: int = 1


def load_prepared(folder: Path) -> Prepared:
    """What an earlier `prepare` left in a folder. Raises UserError if that is missing or not whole."""
    summary = read_json(folder / "summary.json")
    check(bool(summary), f"{folder} holds no prepared data (summary.json); train with this workdir first")
    streams, names, labels, content = [None, None], (), (), summary.get("content")
    try:
        if "tasks" in summary:
            names = tuple(map(task_name, summary["tasks"]))
        else:
            labels = tuple(map(_text, summary.get("labels", ())))
            streams = [_load_stream(folder, split, summary[split]) for split in SPLITS]
        samplings = summary.get("samplings", 1)
        whole = isinstance(content, str) and isinstance(samplings, int)
    except (PermissionError, TimeoutError) as error:
        raise UserError(f"{folder}: the prepared data cannot be read ({error.strerror}); check its permissions and the disk"
                        ) from None
    except Exception:  # numpy raises what it likes on a damaged file
        whole = False
    check(whole, f"{folder}: the prepared data is damaged; delete the folder and start again")
    tasks = {name: load_prepared(folder / name) for name in names}
    return Prepared(load_tokenizer(folder), *streams, folder, content, labels, tasks, samplings)


def load_references(folder: Path) -> list[str]:
    """The held-out targets of a prepared folder, as they were before they became tokens."""
    try:
        return list(map(_text, parse_json((folder / REFERENCES).read_bytes())))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{folder / REFERENCES}: missing or broken; delete the folder and give the training command "
                        "again") from None


def _load_stream(folder: Path, split: str, counts: dict[str, int]) -> TokenStream:
    """One split. Raises ValueError if a file has not the size that it should have, and what numpy raises."""
    def load(name: str, tokens: int, **more: Any) -> TokenStream:
        stream = TokenStream(_load_array(folder / f"{name}.npy"), np.array(_load_array(folder / f"{name}_starts.npy")),
                             counts["bytes"], counts["documents"], **more)
        ends = np.diff(stream.starts, append=tokens)
        numbers = stream.tokens.dtype in (np.uint16, np.uint32) and stream.starts.dtype == np.int64
        shapes = stream.tokens.shape == (tokens,) and stream.starts.shape == (stream.documents,)
        if not (numbers and shapes and stream.starts[0] == 0 and (ends > 0).all() and stream.bytes > 0):
            raise ValueError(name)
        return stream

    path, labels = folder / f"{split}_labels.npy", None
    if path.exists():
        labels = np.array(_load_array(path))
        if labels.dtype not in (np.int32, np.float32) or len(labels) != counts["documents"]:
            raise ValueError(split)
    return load(split, counts["tokens"], labels=labels,
                target=load(f"{split}_target", counts["target_tokens"]) if counts.get("target_tokens") else None)


def _load_array(path: Path) -> np.ndarray:
    """A file of numbers as a memory map, whose header can ask for no more than there is. Not `np.load`, which also opens
    archives."""
    with warnings.catch_warnings(action="error"):
        return np.lib.format.open_memmap(path, mode="r")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing or broken."""
    try:
        found = parse_json(read_file(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
