"""Whatever users and others wrote is read, or refused in one line; and the fuzz sees what is neither."""

import sys
import time

import pytest

from benchmarks.faults import fuzz
from moejax.config import UserError

COSTLY = ("set-up", "generate", "import")
"""Readers whose inputs take longest."""


@pytest.mark.parametrize("kind", fuzz.READERS)
def test_readers_take_or_refuse_what_they_are_given(kind, tmp_path):
    result = fuzz.feed(kind, 6 if kind in COSTLY else 20, 0, tmp_path)
    assert result.inputs >= 6 and not result.failures, result.first
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz.READERS)
def test_readers_take_or_refuse_many_more(kind, tmp_path):
    result = fuzz.feed(kind, 40 if kind in COSTLY else 300, 1, tmp_path)
    assert not result.failures, result.first


def law(work, folder, statuses=(0, 2)):
    return fuzz.broken(work, folder, statuses)


def refuse(message="a file: is wrong; correct it"):
    raise UserError(message)


def test_what_breaks_the_law_is_seen(tmp_path, monkeypatch):
    def write_and_refuse():
        (tmp_path / "new").touch()
        refuse()

    def say_more_and_refuse():
        print("Traceback", file=sys.stderr)
        refuse()

    assert law(lambda: None, tmp_path) == law(lambda: 0, tmp_path) == law(refuse, tmp_path) == ""
    assert law(lambda: 1, tmp_path).startswith("status 1") and law(lambda: 1, tmp_path, (0, 1)) == ""
    assert law(lambda: 1 / 0, tmp_path).startswith("ZeroDivisionError")
    assert law(lambda: sys.exit(3), tmp_path).startswith("status 3")
    assert law(lambda: refuse(""), tmp_path).startswith("not one line")
    assert law(say_more_and_refuse, tmp_path).startswith("not one line")
    assert law(write_and_refuse, tmp_path).startswith("what was refused has changed files")
    monkeypatch.setattr(fuzz, "SECONDS", 0.01)
    assert law(lambda: time.sleep(0.1), tmp_path).startswith("took")
    monkeypatch.undo()
    monkeypatch.setattr(fuzz, "KIB", -1)
    assert law(lambda: None, tmp_path).startswith("took")


def test_the_fuzz_counts_what_it_finds(tmp_path, monkeypatch, capsys):
    reader = fuzz.READERS["lock"]
    broken = reader._replace(plant=lambda value, folder: lambda: 1 / 0)
    monkeypatch.setitem(fuzz.READERS, "lock", broken)
    result, = fuzz.run(7, 0, tmp_path, ["lock"])
    assert result.kind == "lock" and result.inputs == result.failures == 7 and result.first.startswith("ZeroDivisionError")
    assert fuzz.main(["--inputs=5", "--only=lock"]) == 1
    assert "7 failures" not in (out := capsys.readouterr().out) and "5 failures" in out
