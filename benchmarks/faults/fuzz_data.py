"""A fuzz of texts: records, tables, archives, specs of sources, tokenizers, and what was prepared before."""

import functools
import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from hypothesis import strategies as st

from benchmarks.faults.fuzz_configs import TINY
from benchmarks.faults.fuzz_inputs import TEXT, VALUES, Reader, changed, damaged, json_file, json_of, read_all, write
from moejax import config as config_lib
from moejax.config import Config
from moejax.data import sources
from moejax.data.baselines import unigram_bits_per_byte, xz_bits_per_byte
from moejax.data.mixing import rows_of_tasks
from moejax.data.prepare import prepare
from moejax.data.prepared import load_prepared, load_references
from moejax.data.tokenizers import load_tokenizer, make_tokenizer
from moejax.models import transformer

RECORDS = [{"text": f"document {n} of sheep", "target": "sheep " * (n % 3 + 1), "label": "ab"[n % 2], "number": n / 7,
            "labels": ["a", "b"][n % 2:], "deep": {"answers": [{"text": "yes"}]}} for n in range(12)]
TASKS = (None, {"objective": "seq2seq", "input": "{text} {deep.answers.0.text}"},
         {"objective": "classification", "input": "{text}"},
         {"objective": "multi_label", "input": "{text}", "label": "labels"},
         {"objective": "regression", "input": "{text}", "label": "number"},
         {"objective": "seq2seq", "input": "{text}", "normalize": "nfkc", "collapse_space": True, "deduplicate": True,
          "input_mask_rate": 0.5},
         {"tasks": {"a": {"source": "FILE"}, "b": {"objective": "seq2seq", "source": "FILE", "input": "{text}"}}})


def config_for(task: dict[str, Any] | None, path: str, **data: Any) -> Config:
    """The tiny config with a task on the texts of a path."""
    labels = (task or {}).get("objective") in ("classification", "multi_label", "regression")
    model = {"head": "classes", "classes": 1 if task["objective"] == "regression" else 2} if labels else {}
    if task and "tasks" in task:
        task = {"tasks": {name: {**one, "source": path} for name, one in task["tasks"].items()}}
    return transformer.resolve(config_lib.build(
        {**TINY, "model": {**TINY["model"], **model}, "data": {**TINY["data"], "source": path, "task": task, **data}}))


def packed(suffix: str, content: bytes) -> bytes:
    """Bytes as a file with that suffix holds them."""
    if suffix == ".gz":
        return gzip.compress(content, 1, mtime=0)
    return zstandard.ZstdCompressor(level=1).compress(content) if suffix == ".zst" else content


def texts(given: tuple[str, bytes, dict | None, str], folder: Path) -> Callable[[], Any]:
    """A file of texts, prepared for a task; then a row of each split is made."""
    name, content, task, bad = given
    write(folder, {name: content})
    config = config_for(task, str(folder / name), on_bad_record=bad)

    def work() -> None:
        prepared = prepare(config, folder / "data", lambda line: None)
        for split in ("train", "eval"):
            for rows in rows_of_tasks(prepared, config, split).values():
                rows.make(0, np.random.default_rng(0))
    return work


def spec(source: str, folder: Path) -> Callable[[], Any]:
    """A source by its name. Names in braces are files that there are."""
    write(folder, {"a.txt": b"text", "b.jsonl": b'{"text": "a"}'})
    return lambda: [next(sources.documents(source.replace("HERE", str(folder)), "text"), None), sources.identity(
        source.replace("HERE", str(folder)))]


@functools.cache
def tokenizer_samples() -> dict[str, bytes]:
    """Files of whole tokenizers."""
    import tokenizers
    words = "document of sheep a b".split()
    level = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "[UNK]": 1} | {
        word: n + 2 for n, word in enumerate(words)}, unk_token="[UNK]"))
    level.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    single = {letter: n + 1 for n, letter in enumerate("abcdefgh")}
    merges = [("a", "b"), ("ab", "c")]
    letters = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, **single, "ab": 9, "abc": 10}, merges))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    letters.decoder = tokenizers.decoders.ByteLevel()
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "[SEP]": 1, "a": 2, "##b": 3},
                                                              unk_token="[UNK]"))
    pieces.normalizer = tokenizers.normalizers.BertNormalizer()
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 1), ("[SEP]", 1))
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([("<s>", 0.0), ("<unk>", -1.0), ("a", -2.0)], 1, False))
    unigram.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer("sentencepiece", 290, [record["text"] for record in RECORDS], Path(folder))
        model = (Path(folder) / "tokenizer.model").read_bytes()
    found = {f"{n}.json": one.to_str().encode() for n, one in enumerate((level, letters, pieces, unigram))}
    return found | {"tokenizer.model": model}


@st.composite
def tokenizer_files(draw: st.DrawFn) -> tuple[str, dict[str, bytes]]:
    """A damaged tokenizer, and perhaps something beside it."""
    name = draw(st.sampled_from(sorted(tokenizer_samples())))
    content = tokenizer_samples()[name]
    if name.endswith(".json"):
        found = draw(json_file(json.loads(content)))
        beside = draw(st.one_of(st.none(), json_file({"bos_token": "<s>", "eos_token": {"content": "</s>"}})))
        return name, {name: found} | ({} if beside is None else {"tokenizer_config.json": beside})
    return name, {name: draw(damaged(content))}


def tokenizer(given: tuple[str, dict[str, bytes]], folder: Path) -> Callable[[], Any]:
    """A tokenizer's file: made, used, saved, and loaded again."""
    name, files = given
    write(folder, files)

    def work() -> None:
        own = folder / "data"
        made = make_tokenizer(str(folder / name), 2000, (), own)
        made.frame_batch([record["text"] for record in RECORDS[:3]] + ["\u2581ä\U0001f600\0 ", ""])
        made.decode(range(0, made.vocab_size))
        made.word_bounds()
        made.named(("<s>", "[MASK]", "<unk>"))
        made.controls()
        if (sampling := made.sampling(0.5, 1)) is not None:
            sampling.encode_batch([record["text"] for record in RECORDS[:3]] + ["\u2581ä\U0001f600\0 ", ""])
        load_tokenizer(own).encode_batch(["a b"])

    def careful() -> None:
        (folder / "data").mkdir()
        try:
            work()
        finally:
            for path in (*(folder / "data").iterdir(), folder / "data"):
                path.rmdir() if path.is_dir() else path.unlink()
    return careful


@functools.cache
def prepared_samples() -> list[tuple[Any, dict[str, bytes]]]:
    """What was prepared for each task, with the task."""
    found = []
    for task in TASKS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "corpus.jsonl"
            write(Path(folder), {path.name: b"\n".join(map(json_of, RECORDS))})
            prepare(config_for(task, str(path)), Path(folder) / "data", lambda line: None)
            found.append((task, read_all(Path(folder) / "data") | {"baselines.json": b'{"xz_bits_per_byte": 1.5}'}))
    return found


NPY = st.sampled_from((
    b"{'descr': '<u2', 'fortran_order': False, 'shape': (4611686018427387904,), }",
    b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
    b"{'descr': '<u2', 'fortran_order': False, 'shape': (-1,), }",
    b"{'descr': '<f8', 'fortran_order': True, 'shape': (), }",
    b"{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (2, 2), }",
    b"{'descr': '<u2', 'fortran_order': False, 'shape': (2L,), }", b"{'shape': 1}", b"(" * 9000, b"'''"))
"""Headers of numpy's files."""


@st.composite
def prepared_files(draw: st.DrawFn) -> tuple[Any, dict[str, bytes]]:
    """A prepared folder with a damaged file, or without one."""
    task, files = draw(st.sampled_from(prepared_samples()))
    name = draw(st.sampled_from(sorted(files)))
    how = draw(st.sampled_from(("damage", "damage", "gone", "zip", "header")))
    if how == "gone":
        return task, {other: content for other, content in files.items() if other != name}
    if how == "zip":
        found = b"PK\x03\x04" + draw(st.binary(max_size=30))
    elif how == "header":
        header = draw(NPY)
        found = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(16)
    else:
        found = draw(json_file(json.loads(files[name])) if name.endswith(".json") else damaged(files[name]))
    return task, files | {name: found}


def prepared(given: tuple[Any, dict[str, bytes]], folder: Path) -> Callable[[], Any]:
    """A prepared folder is loaded, and every row of it made."""
    task, files = given
    write(folder / "data", files)
    config = config_for(task, str(folder / "corpus.jsonl"))

    def work() -> None:
        found = load_prepared(folder / "data")
        load_tokenizer(folder / "data").encode("a")
        if (folder / "data" / "eval_references.json").exists():
            load_references(folder / "data")
        for split in ("train", "eval"):
            for rows in rows_of_tasks(found, config, split).values():
                for index in range(min(rows.count, 12)):
                    rows.make(index, np.random.default_rng(0))
        if found.eval is not None:
            for baseline in (xz_bits_per_byte, unigram_bits_per_byte):
                baseline(found) + 1.0
    return work


@st.composite
def archives(draw: st.DrawFn) -> tuple[str, bytes, Any, str]:
    """A file of texts, of which one of the layers that it is made of is wrong."""
    kind, suffix = draw(st.sampled_from((".jsonl", ".csv", ".tsv", ".txt"))), draw(st.sampled_from(("", ".gz", ".zst")))
    if kind == ".jsonl":
        records = draw(changed(RECORDS, st.one_of(VALUES, TEXT)))
        content = draw(st.sampled_from((b"\n", b"\r\n", b"\n\n"))).join(map(json_of, records))
    elif kind == ".txt":
        content = draw(st.one_of(st.binary(max_size=50), TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))))
    else:
        between = "," if kind == ".csv" else "\t"
        names = draw(st.one_of(st.just(["text", "target", "label"]), st.lists(TEXT, max_size=3)))
        rows = draw(st.lists(st.lists(TEXT, min_size=2, max_size=4), max_size=9))
        lines = [names, *([str(RECORDS[n][key]) for key in ("text", "target", "label")] for n in range(9)), *rows]
        content = "\n".join(between.join(line) for line in lines).encode("utf-8", "surrogatepass")
    content = draw(st.one_of(st.just(content), damaged(content)))
    content = packed(suffix, content)
    if suffix:
        content = draw(st.one_of(st.just(content), damaged(content)))
    return f"t{kind}{suffix}", content, draw(st.sampled_from(TASKS)), draw(st.sampled_from(("error", "skip")))


@st.composite
def aligned(draw: st.DrawFn) -> tuple[dict[str, bytes], str]:
    """Two files of lines that belong together, one of which is wrong, and what becomes of bad lines."""
    files = {}
    for name, field in (("t.en", "text"), ("t.de", "target")):
        suffix, end = draw(st.sampled_from(("", ".gz", ".zst"))), draw(st.sampled_from(("\n", "\r\n")))
        lines = [record[field] for record in RECORDS] + draw(st.lists(TEXT, max_size=2))
        files[name + suffix] = packed(suffix, end.join(lines).encode("utf-8", "surrogatepass"))
    name = draw(st.sampled_from(sorted(files)))
    return files | {name: draw(damaged(files[name]))}, draw(st.sampled_from(("error", "skip")))


def pair(given: tuple[dict[str, bytes], str], folder: Path) -> Callable[[], Any]:
    """Two files of lines that belong together, prepared."""
    files, bad = given
    write(folder, files)
    config = config_for({"objective": "seq2seq", "input": "{en}", "target": "{de}"},
                        "pairs:" + ",".join(str(folder / name) for name in files), on_bad_record=bad)
    return lambda: prepare(config, folder / "data", lambda line: None)


SPECS = st.one_of(
    TEXT.filter(lambda text: not text.startswith(("~", "."))), TEXT.map(lambda text: f"package:{text}"),
    TEXT.map(lambda text: f"HERE/{text}"), st.sampled_from((
        "HERE", "HERE/*", "pairs:", "pairs:,", "pairs:HERE/a.txt", "pairs:HERE/a.txt,HERE/b.jsonl",
        "pairs:HERE/a.txt,HERE/a.txt", "pairs:HERE/*,HERE/*", "pairs:pairs:HERE/a.txt,HERE/b.jsonl", "pairs:a\0,HERE/[",
        "HERE/**/*.jsonl", "HERE/a.txt/b", "HERE/*\0/*", "HERE/[", "HERE/[!", "package:", "package:a", "package:/x",
        "package:sys/x", "package:json/nothing*", "package:json/../json/__init__.py", "package:a..b/x", "package:.a/x",
        "package:__main__/x", "package:os.path/x", "package:json.tool.x/y", "package:numpy.nothing/x", "package:a\0b/x",
        "package:json/\0*/x", "/dev/null", "/dev/zero", "HERE/\ud800*/x")))
"""Names of sources; a task names what is in a folder by HERE."""

READERS = {
    "texts": Reader(archives(), texts, share=4),
    "pairs": Reader(aligned(), pair),
    "sources": Reader(SPECS, spec),
    "tokenizers": Reader(st.deferred(tokenizer_files), tokenizer, share=3),
    "prepared data": Reader(st.deferred(prepared_files), prepared, share=3),
}
