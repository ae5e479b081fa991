"""Reading what others wrote within bounds, writing where others may have written, and saying so in one line.

Files are files of a size that fits, and JSON is not endlessly nested.
"""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moejax.config import UserError, check

LIMIT = 64 << 20
"""Bytes of a file that is read as a whole, at most."""
DEPTH = 100
"""Lists and objects of JSON that lie in each other, at most: what walks through them is recursive."""
LETTERS = 4000
"""Of a message, at most: it may tell what a file holds."""


def read_file(path: Path, links: bool = True) -> bytes:
    """The bytes of a file, which is no pipe or device. Raises `OSError`, or `ValueError` if it is none of such a size.

    Args:
      path: of the file.
      links: whether it may be a link to one.
    """
    status = os.stat(path) if links else os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > LIMIT:
        raise ValueError(f"not a file of at most {LIMIT >> 20} MiB")
    return path.read_bytes()


def parse_json(text: bytes | str) -> Any:
    """What JSON holds. Raises `ValueError` if it is none, or nested too deeply."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    brackets = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if sum(map(text.count, brackets)) > DEPTH and _deeper(found, DEPTH):
        raise ValueError("nested too deeply")
    return found


def _deeper(tree: Any, depth: int) -> bool:
    level = [tree]
    for _ in range(depth + 1):
        level = [inner for node in level if isinstance(node, (dict, list))
                 for inner in (node.values() if isinstance(node, dict) else node)]
    return bool(level)


def read_object(path: Path, unreadable: str, broken: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: the file cannot be read, with the advice `unreadable`; or holds no JSON object, with the advice `broken`.
    """
    try:
        found = parse_json(read_file(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {unreadable}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); {broken}") from None
    check(isinstance(found, dict), f"{path}: not a JSON object; {broken}")
    return found


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what making a file or folder raises into `UserError`, with its place in the workdir."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); move what is in its place, make room on "
                        "the disk, or take another --workdir") from error


def one_line(message: str) -> str:
    """A message in one line, without letters that a terminal takes for commands; of a very long one the two ends."""
    line = "".join(letter if letter.isprintable() else " " for letter in message)
    return line if len(line) <= LETTERS else f"{line[:LETTERS // 2]} ... {line[-LETTERS // 2:]}"
