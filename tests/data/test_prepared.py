"""A prepared folder is whole, or refused in one line, whatever became of its files."""

import json

import numpy as np
import pytest

from moejax.config import UserError, build
from moejax.data.baselines import unigram_bits_per_byte, xz_bits_per_byte
from moejax.data.mixing import rows_of_tasks
from moejax.data.prepare import prepare
from moejax.data.prepared import load_prepared, load_references
from moejax.data.rows import make_rows
from moejax.models import transformer

PAIRS = {"objective": "seq2seq", "input": "{text}"}


def config(path, **data):
    return build({"model": {"vocab_size": 300}, "data": {"source": str(path), "tokenizer": "bytes", "eval_fraction": 0.4,
                                                         **data}})


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps({"text": f"document {n}", "target": str(n)}) for n in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare(config(tmp_path / "a.jsonl", task=PAIRS), tmp_path / "data", lambda line: None)
    return tmp_path / "data"


@pytest.mark.parametrize("name, change", (
    ("train_starts", lambda starts: starts[::-1]), ("train_starts", lambda starts: starts + 1),
    ("eval_starts", lambda starts: starts.astype(np.float64)), ("eval_starts", lambda starts: starts * 0),
    ("train", lambda tokens: tokens.astype(np.int16)), ("train", lambda tokens: tokens[None]),
    ("train_target", lambda tokens: tokens[:-1]), ("eval_target_starts", lambda starts: starts * 1000)))
def test_streams_that_are_not_what_was_written_are_refused(folder, name, change):
    np.save(folder / f"{name}.npy", change(np.load(folder / f"{name}.npy")))
    with pytest.raises(UserError, match="the prepared data is damaged; delete the folder"):
        load_prepared(folder)


@pytest.mark.parametrize("header", ("'shape': (4611686018427387904,)", "'shape': (-1,)", "'shape': ()", "'shape': (2L,)",
                                    "'descr': 'O', 'shape': (1,)", "(" * 9000, "'''"))
def test_a_header_can_ask_for_no_more_than_there_is(folder, header, recwarn):
    text = ("{'descr': '<u2', 'fortran_order': False, %s}" % header).encode()
    for name in ("train.npy", "eval_starts.npy"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64))
        with pytest.raises(UserError, match="the prepared data is damaged; delete the folder"):
            load_prepared(folder)
        (folder / name).write_bytes(kept)
    assert load_prepared(folder) and not recwarn.list


@pytest.mark.parametrize("key, value", (("train", 3), ("train", {}), ("labels", [1]), ("labels", 3), ("content", None),
                                        ("tasks", 3), ("tasks", ["a", 3])))
def test_a_summary_of_other_types_is_refused(folder, key, value):
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {key: value}))
    with pytest.raises(UserError, match="damaged|a task has letters"):
        load_prepared(folder)


def test_what_the_objective_needs_and_is_not_there_is_named(folder, tmp_path):
    summary = json.loads((folder / "summary.json").read_text())
    summary["train"]["target_tokens"] = 0
    (folder / "summary.json").write_text(json.dumps(summary))
    prepared = load_prepared(folder)
    for task, needed in ((PAIRS, "pairs"), ({"objective": "classification"}, "labels")):
        model = {"vocab_size": 300, "head": "classes"} if needed == "labels" else {"vocab_size": 300}
        own = build({"model": model, "data": {"source": "a", "tokenizer": "bytes", "task": task}})
        with pytest.raises(UserError, match=f"the prepared data has no {needed}, which .* needs; delete the folder data/"):
            make_rows(prepared.train, prepared.tokenizer, own)


@pytest.mark.parametrize("content", ("", "{}", "[1]", "3", "[" * 100_000))
def test_references_are_texts(folder, content):
    (folder / "eval_references.json").write_text(content)
    if content == "{}":
        assert load_references(folder) == []
    else:
        with pytest.raises(UserError, match="eval_references.json: missing or broken"):
            load_references(folder)


def test_baselines_are_numbers_of_what_is_there(folder):
    prepared = load_prepared(folder)
    (folder / "baselines.json").write_text('{"xz_bits_per_byte": "1.5", "unigram_bits_per_byte": null}')
    assert xz_bits_per_byte(prepared) > 1 and unigram_bits_per_byte(prepared) > 1
    (folder / "baselines.json").unlink()
    (folder / "eval.utf8").unlink()
    with pytest.raises(UserError, match="the prepared data is damaged .*eval.utf8"):
        xz_bits_per_byte(prepared)
    np.lib.format.open_memmap(folder / "eval.npy", "r+")[1] = 60_000
    with pytest.raises(UserError, match="the prepared data is damaged"):
        unigram_bits_per_byte(load_prepared(folder))


def test_data_of_other_tasks_is_not_that_of_the_config(folder):
    prepared, mixed = load_prepared(folder), {"tasks": {"a": {"source": "a"}}}
    own = build({"model": {"vocab_size": 300}, "data": {"source": "a", "tokenizer": "bytes", "task": mixed}})
    with pytest.raises(UserError, match="holds prepared data of other tasks; delete the folder"):
        rows_of_tasks(prepared, transformer.resolve(own), "train")
    both = prepared._replace(tasks={"a": prepared}, train=None)
    with pytest.raises(UserError, match="holds prepared data of other tasks; delete the folder"):
        rows_of_tasks(both, transformer.resolve(config("a", task=PAIRS)), "train")
