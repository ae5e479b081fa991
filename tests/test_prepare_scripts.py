"""What the experiments' prepare scripts share: files of packages, records as files, baselines, and how a command ends."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest

from experiments import baselines, records
from moejax.config import UserError
from moejax.data import sources

NAMES = ("masked_lm", "multitask", "sentiment", "summarize", "translate")


def pip(monkeypatch, status, stderr="", name=None):
    """Puts another program in pip's place, which may write a file."""
    def run(command, **_):
        assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "some==1.0"
        if name is not None:
            (records.Path(command[command.index("-d") + 1]) / name).write_text("content")
        return subprocess.CompletedProcess(command, status, "", stderr)

    monkeypatch.setattr(records.subprocess, "run", run)


def test_a_fetched_file_is_gone_afterwards(monkeypatch):
    pip(monkeypatch, 0, name="some-1.0.whl")
    with records.fetched("some==1.0", "--only-binary=:all:") as path:
        assert path.name == "some-1.0.whl" and path.read_text() == "content"
    assert not path.exists()


@pytest.mark.parametrize("stderr, said", (("WARNING: retrying\nERROR: no such version\n", "ERROR: no such version"),
                                          ("", "it says nothing")))
def test_a_failing_pip_is_one_line(monkeypatch, stderr, said):
    pip(monkeypatch, 1, stderr)
    with pytest.raises(UserError) as caught, records.fetched("some==1.0"):
        pass
    assert str(caught.value) == (
        f"pip could not fetch some==1.0 ({said}); it needs the network or a package index that has it")


def test_records_come_back(tmp_path):
    rows = [{"text": "caf\u00e9\n", "label": "a"}, {"text": "\u4e2d", "label": "b"}]
    for name, ascii_only in (("plain", False), ("ascii", True)):
        path = tmp_path / "new" / "folder" / f"{name}.jsonl"
        records.write(path, iter(rows), ascii_only)
        assert [dict(record.fields) for record in sources.records(str(path))] == rows
        assert path.read_bytes().isascii() == ascii_only
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows
    with pytest.raises(UserError, match=r"plain.jsonl/a: cannot be written \(.+\); give another folder"):
        records.write(tmp_path / "new" / "folder" / "plain.jsonl" / "a", rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_folder_is_told_in_one_line(name, monkeypatch, capsys):
    prepare = importlib.import_module(f"experiments.{name}.prepare")
    assert f"    python -m experiments.{name}.prepare runs/{name}/data\n" in prepare.__doc__
    for given in ([], ["--help"], ["one", "two"]):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *given])
        assert records.command(prepare.main, name) == 2
        assert capsys.readouterr().err == ("moejax: give the folder to write, as in: python -m experiments."
                                           f"{name}.prepare runs/{name}/data\n")


def test_an_unwritable_folder_is_told_before_anything_is_fetched(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "data"):
        monkeypatch.setattr(sys, "argv", ["prepare.py", str(folder)])
        assert records.command(lambda path: pytest.fail("it went on"), "translate") == 2
        assert capsys.readouterr().err == f"moejax: {folder}: cannot be written; give another folder\n"
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ("summarize", "translate"))
def test_missing_scorers_are_told_before_anything_is_written(name, tmp_path, monkeypatch, capsys):
    prepare = importlib.import_module(f"experiments.{name}.prepare")
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path / "data")])
    assert records.command(prepare.main, name) == 2
    assert "scores of texts need the package sacrebleu" in capsys.readouterr().err and not (tmp_path / "data").exists()


def test_a_linear_classifier_tells_words_apart():
    def texts(count):
        return [(f"{word} number {n}", label) for n in range(count) for word, label in (("good", "yes"), ("bad", "no"))]
    assert baselines.linear(texts(6), texts(3)) == (1, 1)
    told = baselines.linear(texts(6), [*texts(2), ("good number 1", "no"), ("good number 4", "yes")])
    assert told.accuracy == pytest.approx(5 / 6) and told.macro_f1 == pytest.approx((6 / 7 + 4 / 5) / 2)


def test_the_nearest_is_the_first_of_the_most_similar(monkeypatch):
    monkeypatch.setattr(baselines, "ROWS", 2)
    known = ["red light", "blue lamp here", "red light", "green door"]
    indices, cosines = baselines.nearest(known, ["green", "a red light", "blue lamp", "nothing of it", "red light"])
    np.testing.assert_array_equal(indices, [3, 0, 1, 0, 0])
    np.testing.assert_allclose(cosines[[1, 3, 4]], [1, 0, 1], atol=1e-12)
    assert 0 < cosines[0] < 1 and 0 < cosines[2] < 1
    assert baselines.nearest(known, ["lam"], analyzer="char_wb", ngram_range=(1, 4))[0] == [1]
