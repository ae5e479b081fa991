"""Whether a checkpoint is what was saved: everything in it is read, without a model and on the host alone."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from moejax.checkpoint import arrays, digest, manifest
from moejax.checkpoint.manifest import Damaged, Unverified


class Result(NamedTuple):
    """What was looked at, and each thing that is wrong in words."""

    arrays: int
    files: int
    size: int
    wrong: list[str]


def verify(folder: Path) -> Result:
    """Compares all files and arrays of a checkpoint with its manifest."""
    try:
        stored = manifest.read(folder)
    except Unverified:
        return Result(0, 0, 0, ["no manifest (of an older version): it can be read, not verified"])
    except Damaged as error:
        return Result(0, 0, 0, [str(error)])
    wrong = []
    for compare in (manifest.check_step, partial(manifest.check_files, thorough=True)):
        try:
            compare(folder, stored)
        except Damaged as error:
            wrong.append(str(error))
    for item, named in stored.arrays.items():
        for name, one in named.items():
            if problem := _wrong(folder / item, name, one):
                wrong.append(f"array {item}/{name} {problem}")
    return Result(sum(map(len, stored.arrays.values())), len(stored.sizes), sum(stored.sizes.values()), wrong)


def _wrong(folder: Path, name: str, stored: manifest.Stored) -> str:
    """What is wrong with an array; empty if it is what was saved."""
    try:
        shape, dtype = arrays.look(folder, name)
        if (shape, dtype) != (stored.shape, stored.dtype):  # and may be too large to be read
            return f"has shape {shape} and type {dtype}, where {stored.shape} and {stored.dtype} were saved"
        found = arrays.read_whole(folder, name)
    except Damaged as error:
        return str(error)
    return "" if digest.text(digest.on_host(found)) == stored.digest else "is not what was saved (its hash differs)"
