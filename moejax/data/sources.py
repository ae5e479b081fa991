"""Where text comes from: one function from a spec string to documents, whatever holds them.

    path/to/*.jsonl.zst         files or globs (`**` for any depth), sorted by name: `.jsonl` has one record a line, `.csv`
                                and `.tsv` too, with names of fields in the first one; any other suffix is one document a
                                file; `.gz` and `.zst` are unpacked on the way
    package:NAME/GLOB           the same inside an installed Python package, which is not imported
    pairs:FILE,FILE             two files (or package:NAME/FILE) whose lines of equal number belong together, such as
                                pairs:train.en,train.de.gz: a record each, with fields named after the suffixes, `en` and
                                `de`, or if these are the same after the files or their folders
    tfds:NAME[/CONFIG][:SPLIT]  TensorFlow Datasets without TensorFlow, e.g. tfds:tfds_sotu or tfds:lm1b:train[:10%];
                                kept as array_record under TFDS_DATA_DIR (~/tensorflow_datasets by default)
"""

import csv
import glob
import hashlib
import importlib
import importlib.util
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moejax.bounded import parse_json
from moejax.config import UserError, check
from moejax.data import unpack

LONE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which is no text; Python also decodes bytes that are not UTF-8 to these, if it is to go on."""
WHOLE_FILE = "text"
"""The field of the only record of a file that is not made of records."""
TFDS_RECORDS = 1000
"""Records of one read: TFDS returns them several times as fast together as one by one."""
OUR_BUILDERS = {"tfds_sotu": "moejax.data.tfds_sotu.tfds_sotu_dataset_builder"}
"""TFDS builders that come with moejax; importing the module registers the name."""
EXTRAS = {"sotu": '-e ".[examples]"'}
"""Packages that an extra of moejax installs."""


class Record(NamedTuple):
    """One record of a source.

    Attributes:
      where: its place, for people.
      fields: by name.
      problem: why it cannot be read, one line; then it has no fields.
      whole: whether it is a whole file that is not made of records; its text is the field `text`.
    """

    where: str
    fields: Mapping[str, Any]
    problem: str | None = None
    whole: bool = False


def documents(source: str, text_key: str, left_out: list[str] | None = None) -> Iterator[str]:
    """Every document of a source as text, exactly as stored, in a fixed order. Blank documents are left out.

    Args:
      source: a spec string as above.
      text_key: the field that holds the text in records.
      left_out: takes a line about each blank document, if it is there.

    Raises:
      UserError: nothing found, a file, line or record that cannot be read, a missing field, or no text at all.
    """
    empty = True
    for record in records(source):
        text = document(record, text_key)
        if text.strip():
            empty = False
            yield text
        elif left_out is not None:
            left_out.append(f"{record.where}: the text is empty")
    check(not empty, f"source {source!r} holds no text; give files that are not empty")


def records(source: str) -> Iterator[Record]:
    """Every record of a source in a fixed order. Raises `UserError` if nothing is found or a file cannot be read."""
    if source.startswith("pairs:"):
        return _from_pair(*files(source), source)
    return _from_tfds(source) if source.startswith("tfds:") else _from_files(files(source))


def value(record: Record, name: str, key: str) -> Any:
    """A field, or what lies in one: `answers.text.0` is the first of the list `text` in `answers`.

    Raises:
      UserError: it is not there, with the place, the reason, and the `key` of the config that names it.
    """
    check(record.problem is None, f"{record.where}: {record.problem}")
    if name in record.fields:
        return record.fields[name]
    inner, parts = record.fields, name.split(".")
    try:
        for depth, part in enumerate(parts):
            check(not isinstance(inner, (str, bytes)), f"{record.where}: no field {name!r}, as {'.'.join(parts[:depth])!r} "
                  f"is a text, not a list; set {key}")
            inner = inner[part] if isinstance(inner, dict) else inner[int(part)]
    except (KeyError, IndexError, ValueError, TypeError):
        known = f" to one of {', '.join(record.fields)}" if record.fields else ""
        raise UserError(f"{record.where}: no field {name!r}; set {key}{known}") from None
    return inner


def field(record: Record, name: str, key: str) -> str:
    """A field that holds text. Raises `UserError` as `value` does, or if it holds none."""
    return text_in(record, name, value(record, name, key), key)


def document(record: Record, text_key: str) -> str:
    """The text of a record, or of a whole file. Raises `UserError` as `field` does."""
    return field(record, WHOLE_FILE if record.whole else text_key, "config.data.text_key")


def text_in(record: Record, name: str, text: Any, key: str) -> str:
    """What a field holds, or a part of it, as text. Raises `UserError` if it is none, not UTF-8, or half a letter."""
    text = _decode(text, record.where) if isinstance(text, bytes) else text
    check(isinstance(text, str), f"{record.where}: field {name!r} holds no string; set {key}")
    check(not _broken(text),
          f"{record.where}: half of a surrogate pair is no text; repair the \\ud... escape in field {name!r}")
    return text


def files(source: str) -> list[Path]:
    """The files of a path, glob or `package:` spec, sorted, or the two of a `pairs:` spec. Raises UserError if there is
    none.
    """
    if source.startswith("pairs:"):
        return _pair(source)
    pattern = _package_pattern(source) if source.startswith("package:") else os.path.expanduser(source)
    try:
        names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    except ValueError:  # a letter that no path has
        names = []
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


def is_drawn(text: str, fraction: float) -> bool:
    """Whether a document is in the share, from 0 to 1, that is held out. Its `digest` alone decides, so copies stay
    together, and what a smaller share holds a larger one holds too.
    """
    return int(digest(text)[:8], 16) / 2**32 < fraction


def _package_pattern(source: str) -> str:
    name, _, pattern = source.removeprefix("package:").partition("/")
    check(bool(pattern) and name.isidentifier(), f"{source!r} must have the form package:NAME/GLOB, with the name of a "
          "package that lies in no other")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    check(spec is not None,
          f"{source!r}: the package {name} is not installed; run pip install {EXTRAS.get(name, name)}")
    check(bool(spec.submodule_search_locations), f"{source!r}: {name} is a single module and holds no files")
    return os.path.join(glob.escape(spec.submodule_search_locations[0]), pattern)


def _from_files(paths: Iterable[Path]) -> Iterator[Record]:
    for path in paths:
        plain = unpack.plain_name(path)
        if plain.suffix == ".jsonl":
            for number, line in enumerate(unpack.lines(path), 1):
                if line.strip():
                    yield _object(line, f"{path}, line {number}")
        elif plain.suffix in (".csv", ".tsv"):
            yield from _from_table(path, "," if plain.suffix == ".csv" else "\t")
        else:
            # How large a file is everybody sees, but not what it unpacks to.
            content = b"".join(unpack.chunks(path)) if plain == path else unpack.joined(unpack.chunks(path), str(path))
            yield Record(str(path), {WHOLE_FILE: content}, whole=True)


def _from_table(path: Path, delimiter: str) -> Iterator[Record]:
    """The rows of a file whose first row names the fields. A tab-separated file has no quotes."""
    csv.field_size_limit(unpack.MOST_BYTES)
    lines = (line.decode("utf-8", "surrogateescape").rstrip("\r") + "\n" for line in unpack.lines(path))
    rows = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE)
    names: list[str] | None = None
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if names is None:
                names = [name.removeprefix("\ufeff") for name in row]
            elif row:
                problem = None
                if any(map(_broken, row)):
                    problem = "not UTF-8; convert the file to UTF-8"
                elif len(row) != len(names):
                    problem = f"has {len(row)} fields, not the {len(names)} of the first line; repair it"
                yield Record(where, {} if problem else dict(zip(names, row)), problem)
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}; repair the line") from error


def _pair(source: str) -> list[Path]:
    sides = source.removeprefix("pairs:").split(",")
    check(len(sides) == 2 and all(sides), f"{source!r} must have the form pairs:FILE,FILE; no path may hold a comma")
    found = [files(side) for side in sides]
    for side, paths in zip(sides, found):
        check(len(paths) == 1, f"{source!r}: {side} matches {len(paths)} files; name one")
    return [path for path, in found]


def _from_pair(first: Path, second: Path, source: str) -> Iterator[Record]:
    """A record for each pair of lines, up to the last that are not both empty."""
    paths = first, second
    plain = list(map(unpack.plain_name, paths))
    choices = ([path.suffix.removeprefix(".") for path in plain], [path.stem for path in plain],
               [path.parent.name for path in plain])
    names = next((names for names in choices if all(names) and names[0] != names[1]), None)
    check(names is not None, f"{source!r}: nothing tells the names of the two fields apart; give the files suffixes, as in "
          "train.en and train.de")
    pairs = _up_to_the_end(map(unpack.lines, paths))
    for number, lines in pairs:
        if None not in lines:
            yield _of_lines(paths, names, lines, number)
            continue
        longer = lines.index(None) ^ 1
        surplus = [place for place, both in itertools.chain([(number, lines)], pairs) if both[longer].strip()]
        counts = [number - 1, number - 1]
        counts[longer] = surplus[-1]
        for place in surplus:
            yield Record(f"{paths[longer]}, line {place}", {}, f"belongs to no line of the other file, as {first} has "
                         f"{counts[0]:,} lines and {second} {counts[1]:,}; give files with as many lines")


def _up_to_the_end(sides: Iterable[Iterator[bytes]]) -> Iterator[tuple[int, tuple[bytes | None, ...]]]:
    """Lines of equal number, with their number; None where a side has ended. At the end empty ones are left out."""
    held = []
    for number, lines in enumerate(itertools.zip_longest(*sides), 1):
        held.append((number, lines))
        if any(line is not None and line.strip() for line in lines):
            yield from held
            held = []


def _of_lines(paths: tuple[Path, Path], names: list[str], lines: tuple[bytes, bytes], number: int) -> Record:
    texts = []
    for path, line in zip(paths, lines):
        where = f"{path}, line {number}"
        try:
            texts.append(_decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, where).removesuffix("\r"))
        except UserError as error:
            return Record(where, {}, str(error).removeprefix(f"{where}: "))
    empty = [not text.strip() for text in texts]
    if not any(empty):
        return Record(f"{paths[0]}, line {number}", dict(zip(names, texts)))
    other, state = (paths[1], "is empty too") if all(empty) else (paths[empty.index(False)], "is not")
    return Record(f"{paths[empty.index(True)]}, line {number}", {}, f"is empty, and that of {other} {state}; give both a "
                  "text, or set config.data.on_bad_record=skip")


def _broken(text: str) -> bool:
    """Whether there is half of a surrogate pair in it."""
    return not text.isascii() and bool(LONE.search(text))


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error


def _object(line: bytes, where: str) -> Record:
    """One jsonl line."""
    try:
        found = parse_json(_decode(line.removeprefix(b"\xef\xbb\xbf"), where))
    except ValueError as error:
        reason = getattr(error, "msg", error)
        return Record(where, {}, f"not JSON ({reason}); a .jsonl file holds one JSON object a line")
    except UserError as error:
        return Record(where, {}, str(error).removeprefix(f"{where}: "))
    return Record(where, found if isinstance(found, dict) else {})


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


def _from_tfds(source: str) -> Iterator[Record]:
    """The records of a TFDS split, in its stored order; prepares the data set on first use."""
    builder, split = _builder(source)
    try:
        builder.download_and_prepare()
    except ImportError as error:
        raise UserError(f"{source!r}: preparing this data set needs a package ({error}); install it") from error
    except OSError as error:
        raise UserError(f"{source!r}: cannot be prepared ({error}); check network and disk, or set TFDS_DATA_DIR to a "
                        "folder that holds it as array_record") from error
    try:
        stored = builder.as_data_source(split=split)
    except (ValueError, KeyError) as error:
        raise UserError(f"{source!r}: no split {split!r}; there are {', '.join(builder.info.splits)}") from error
    for start in range(0, len(stored), TFDS_RECORDS):
        batch = stored.__getitems__(range(start, min(start + TFDS_RECORDS, len(stored))))
        for number, found in enumerate(batch, start):
            yield Record(f"{source!r}, record {number}", found)
