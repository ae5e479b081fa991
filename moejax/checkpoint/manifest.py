"""What a checkpoint should hold, written as its last file: sizes and hashes of files, shapes and hashes of arrays."""

import contextlib
import hashlib
import json
import os
import re
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

from moejax.bounded import parse_json, read_file

NAME = "manifest.json"
MARK = "moejax_manifest"
"""What Orbax's own metadata of a checkpoint says if there is to be a manifest; older versions of moejax wrote none."""
FORMAT = 1
SMALL = 1 << 20
"""Bytes of a file up to which it is hashed though it holds arrays."""


class Damaged(Exception):
    """A checkpoint is not what was saved; the message names the file or the array."""


class Unverified(Exception):
    """A checkpoint of an older version of moejax, which wrote no manifest."""


@dataclass(frozen=True)
class Stored:
    """An array in a checkpoint: its shape, the name of its type, and its hash in hexadecimal digits."""

    shape: tuple[int, ...]
    dtype: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint should hold.

    Attributes:
      step: optimizer steps done.
      saved: seconds since 1970.
      metric: by which the best checkpoint is kept.
      value: of the metric, if there was an evaluation at this step.
      arrays: by item and name.
      sizes: bytes of all files, by path in the checkpoint.
      hashes: SHA-256 of the files that hold no arrays, and of the small ones of the others. The large ones hold little but
        arrays, for which `arrays` vouches, and reading them back would take as long as writing them.
    """

    step: int
    saved: float
    metric: str
    value: float | None
    arrays: Mapping[str, Mapping[str, Stored]]
    sizes: Mapping[str, int]
    hashes: Mapping[str, str]


def holds_arrays(path: str) -> bool:
    """Whether a file of a checkpoint is one of those in which Orbax keeps arrays (OCDBT: folders named d)."""
    return "d" in path.split("/")[:-1]


def take(folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Sizes and hashes, as in `Manifest`, of the files that a folder holds, and makes these last as `sync` does.

    Those that hold arrays the store has synchronised itself.
    """
    found = sorted(path for path in folder.rglob("*") if path.name != NAME)
    paths = [path for path in found if path.is_file()]
    for path in found:
        if path.is_dir() or not holds_arrays(path.relative_to(folder).as_posix()):
            sync(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    return sizes, {name: _sha256(folder / name) for name, size in sizes.items() if size <= SMALL or not holds_arrays(name)}


def write(folder: Path, manifest: Manifest) -> None:
    """Writes a manifest so that it is there whole or not at all, and stays if the machine loses power."""
    body = json.dumps({"format": FORMAT} | asdict(manifest), sort_keys=True).encode()
    head = json.dumps({"sha256_of_next_line": hashlib.sha256(body).hexdigest()}).encode()
    part = folder / f".{NAME}.part"
    with part.open("wb") as file:
        file.write(head + b"\n" + body + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / NAME)
    sync(folder)


def sync(path: Path) -> None:
    """Makes a file, or new names in a folder, last through a loss of power, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
      Damaged: there is none where there should be one, or it is not what was written.
      Unverified: it was written by an older version of moejax.
    """
    if not os.path.lexists(folder / NAME):
        with as_damage("_CHECKPOINT_METADATA"):
            metadata = read_json(folder / "_CHECKPOINT_METADATA")
            if metadata["custom_metadata"] in (None, {}):
                raise Unverified
        raise Damaged(f"{NAME} is missing")
    with as_damage(NAME):
        content = read_file(folder / NAME, links=False)
        head, _, rest = content.partition(b"\n")
        body, _, nothing = rest.partition(b"\n")
        wanted = json.dumps({"sha256_of_next_line": hashlib.sha256(body).hexdigest()}).encode()
        if head != wanted or nothing or not rest.endswith(b"\n"):
            raise Damaged(f"{NAME} is torn or damaged")
        return _parsed(parse_json(body))


def check_step(folder: Path, manifest: Manifest) -> None:
    """Raises `Damaged` if a manifest is that of another checkpoint than the folder's name says."""
    if str(manifest.step) != folder.name:
        raise Damaged(f"{NAME} is that of step {manifest.step}")


def check_files(folder: Path, manifest: Manifest, parts: Callable[[str], bool] = lambda part: True,
                thorough: bool = False) -> None:
    """Compares files with a manifest: first the sizes of all, then the hashes of those that hold no arrays.

    Args:
      folder: of the checkpoint.
      manifest: of it.
      parts: whether to look at an item (or a file beside the items).
      thorough: compare all hashes. A file of arrays also holds what Orbax has left behind in it and nobody reads.

    Raises:
      Damaged: a file is missing or changed.
    """
    names = [name for name in manifest.sizes if parts(name.partition("/")[0])]
    for name in names:
        with as_damage(name):
            status = os.lstat(folder / name)
            inside = (folder / name).resolve().is_relative_to(folder.resolve())
            if not stat.S_ISREG(status.st_mode) or not inside:
                raise Damaged(f"{name} is no file of this checkpoint")
            if status.st_size != manifest.sizes[name]:
                raise Damaged(f"{name} has {status.st_size:,} bytes and should have {manifest.sizes[name]:,}")
    for name in names:
        if name in manifest.hashes and (thorough or not holds_arrays(name)):
            with as_damage(name):
                if _sha256(folder / name) != manifest.hashes[name]:
                    raise Damaged(f"{name} has changed since it was written")


def read_json(path: Path) -> Any:
    """A file of JSON, which is no link. Raises `OSError` or `ValueError`."""
    return parse_json(read_file(path, links=False))


@contextlib.contextmanager
def as_damage(name: str) -> Iterator[None]:
    """Turns what reading a damaged file raises into `Damaged` with the file's name."""
    try:
        yield
    except FileNotFoundError:
        raise Damaged(f"{name} is missing") from None
    except OSError as error:
        raise Damaged(f"{name} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise Damaged(f"{name} is damaged") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed(tree: Any) -> Manifest:
    """A manifest from JSON. Raises `ValueError`, `TypeError`, `KeyError`, `OverflowError` or `AttributeError` if not."""
    if tree["format"] != FORMAT:
        raise Damaged(f"{NAME} has format {repr(tree['format'])[:40]}, which this version of moejax does not know")
    arrays = {_inside(item): {_text(name): _stored(one) for name, one in named.items()}
              for item, named in tree["arrays"].items()}
    value = tree["value"]
    return Manifest(
        step=_number(tree["step"]), saved=float(tree["saved"]), metric=_text(tree["metric"]),
        value=None if value is None else float(value), arrays=arrays,
        sizes={_inside(name): _number(size) for name, size in tree["sizes"].items()},
        hashes={_inside(name): _digits(digest, 64) for name, digest in tree["hashes"].items()})


def _stored(tree: Any) -> Stored:
    return Stored(tuple(_number(size) for size in tree["shape"]), _text(tree["dtype"]), _digits(tree["digest"], 16))


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(value)
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > 1000 or not value.isprintable():
        raise ValueError(value)
    return value


def _digits(value: Any, count: int) -> str:
    if not re.fullmatch(rf"[0-9a-f]{{{count}}}", value):
        raise ValueError(value)
    return value


def _inside(name: str) -> str:
    """A path that stays in the folder where it starts. Raises `ValueError` for others."""
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(name)
    return name
