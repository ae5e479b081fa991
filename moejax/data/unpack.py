"""The bytes and the lines of a file, which may be packed by gzip or zstd, within bounds."""

import functools
import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from moejax.config import UserError, check

CHUNK_BYTES = 1 << 20
MOST_BYTES = 1 << 30
"""Of one document, record or line, so that a file without an end of line does not fill the memory."""
PACKED_BYTES = 1 << 12
"""Bytes of a zstd file that are unpacked at a time; each may stand for 32 KiB."""
UNPACKED, RATIO = 1 << 28, 250
"""A file may unpack to so many bytes, and beyond them to so many times its own size: text packs much less."""


def plain_name(path: Path) -> Path:
    """What a file would be called if it were not packed."""
    return path.with_suffix("") if path.suffix in (".gz", ".zst") else path


def chunks(path: Path) -> Iterator[bytes]:
    """The unpacked bytes of a file in pieces."""
    try:
        if path.suffix == ".zst":
            yield from _no_bomb(path, _unpack_zstd(path))
        elif path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                yield from _no_bomb(path, iter(functools.partial(file.read, CHUNK_BYTES), b""))
        else:
            with open(path, "rb") as file:
                yield from iter(functools.partial(file.read, CHUNK_BYTES), b"")
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); make or download it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error


def _unpack_zstd(path: Path) -> Iterator[bytes]:
    # The package's own stream reader takes a file that is cut short for its end; only `eof` of a frame tells.
    import zstandard

    frame = None
    try:
        with open(path, "rb") as file:
            for data in iter(functools.partial(file.read, PACKED_BYTES), b""):
                while data:
                    frame = zstandard.ZstdDecompressor().decompressobj() if frame is None or frame.eof else frame
                    yield frame.decompress(data)
                    data = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: not a zstd file ({error}); make or download it again") from error
    check(frame is None or frame.eof, f"{path}: the zstd file is cut short; make or download it again")


def _no_bomb(path: Path, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces. Raises `UserError` if there are many times as many bytes as in the file."""
    total, most = 0, max(UNPACKED, RATIO * path.stat().st_size)
    for piece in pieces:
        total += len(piece)
        check(total <= most, f"{path}: unpacks to more than {RATIO} times its size, which text does not; unpack it "
              "yourself if it is what you want")
        yield piece


def joined(pieces: Iterable[bytes], where: str) -> bytes:
    """All pieces in one. Raises `UserError` if they are too many bytes."""
    held, size = [], 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        check(size <= MOST_BYTES, f"{where}: more than {MOST_BYTES:,} bytes in one piece; split it into documents, one a "
              "line of a .jsonl file, or one a file")
    return b"".join(held)


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file. Raises `UserError` if one is too long."""
    tail, size, number = [], 0, 1
    for chunk in chunks(path):
        first, *rest = chunk.split(b"\n")
        tail.append(first)
        size += len(first)
        check(size <= MOST_BYTES, f"{path}, line {number}: longer than {MOST_BYTES:,} bytes; split it")
        if rest:
            yield b"".join(tail)
            yield from rest[:-1]
            tail, size, number = [rest[-1]], len(rest[-1]), number + len(rest)
    if size:
        yield b"".join(tail)
