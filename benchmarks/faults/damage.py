"""Damage to the files of a checkpoint, chosen by a seeded generator; each function says in words what it has done."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from moejax.checkpoint import manifest


def files(folder: Path) -> list[Path]:
    """All files below a folder that hold something, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def flip_bit(folder: Path, rng: np.random.Generator, path: Path | None = None) -> str:
    """Turns one bit of a file over.

    Args:
      folder: of the checkpoint.
      rng: chooses the bit, and the file, each file as likely as another.
      path: of the file; None leaves it to the generator.
    """
    path = _chosen(folder, rng) if path is None else path
    content = bytearray(path.read_bytes())
    place, bit = int(rng.integers(len(content))), int(rng.integers(8))
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} of {path.relative_to(folder)}"


def truncate(folder: Path, rng: np.random.Generator) -> str:
    """Cuts off the end of a file, of at least one byte."""
    path = _chosen(folder, rng)
    content = path.read_bytes()
    kept = int(rng.integers(len(content)))
    path.write_bytes(content[:kept])
    return f"{path.relative_to(folder)} cut from {len(content)} to {kept} bytes"


def delete(folder: Path, rng: np.random.Generator) -> str:
    """Removes a file."""
    path = _chosen(folder, rng)
    path.unlink()
    return f"{path.relative_to(folder)} deleted"


def tear_manifest(folder: Path, rng: np.random.Generator) -> str:
    """Leaves of the manifest what a crash may leave: none, nothing, its beginning, or zeros for its end."""
    path = folder / manifest.NAME
    content = path.read_bytes()
    kept, how = int(rng.integers(1, len(content))), int(rng.integers(4))
    if how == 0:
        path.unlink()
        return "manifest deleted"
    left = [b"", content[:kept], content[:kept] + bytes(len(content) - kept)][how - 1]
    path.write_bytes(left)
    return f"manifest torn: {['empty', f'first {kept} bytes', f'zeros from byte {kept}'][how - 1]}"


KINDS: dict[str, Callable[[Path, np.random.Generator], str]] = {
    "bit flip": flip_bit, "truncation": truncate, "deletion": delete, "torn manifest": tear_manifest}


def _chosen(folder: Path, rng: np.random.Generator) -> Path:
    paths = files(folder)
    return paths[int(rng.integers(len(paths)))]
