"""python -m moejax.checkpoint: what it prints, and how it ends."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.faults import damage
from moejax.checkpoint import Store
from moejax.checkpoint.__main__ import ago, main


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    store = Store(workdir, keep=3, metric="accuracy")
    for step, value in ((5, 0.25), (10, None)):
        store.save(step, {"model": {"w": jnp.arange(3000.0) * step, "b": jnp.ones(3)}}, {}, value)
    store.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "w"))


def rows(capfd, command: str, workdir: Path, status: int) -> list[list[str]]:
    assert main([command, str(workdir)]) == status
    out, err = capfd.readouterr()
    assert not err
    head, *lines = out.splitlines()
    assert head.split()[0] == "step" and head.split()[-1] == "state"
    return [line.split(maxsplit=4) for line in lines]


def test_good_checkpoints(workdir, capfd):
    first, second = rows(capfd, "list", workdir, 0)
    assert first[0] == "5" and first[-1].endswith("good") and "accuracy 0.25" in " ".join(first)
    assert second[0] == "10" and "accuracy" not in " ".join(second)
    assert [(row[0], row[1], row[-1]) for row in rows(capfd, "verify", workdir, 0)] == [
        ("5", "2", "good"), ("10", "2", "good")]


def test_damage_is_shown_by_name_and_list_sees_what_sizes_tell(workdir, capfd):
    folder = workdir / "checkpoints" / "10"
    largest = max(damage.files(folder), key=lambda path: path.stat().st_size)
    damage.flip_bit(folder, np.random.default_rng(0), largest)
    assert rows(capfd, "list", workdir, 0)
    first, second = rows(capfd, "verify", workdir, 1)
    assert first[-1] == "good" and second[-1].startswith("BAD: ") and "array model/w " in second[-1]
    largest.unlink()
    name = largest.relative_to(folder).as_posix()
    for command in ("list", "verify"):
        assert f"BAD: {name} is missing" in " ".join(rows(capfd, command, workdir, 1)[1])


@pytest.mark.parametrize("arguments, message", (
    (["verify", "missing"], "missing: no such folder"), (["list", "."], ".: holds no checkpoint")))
def test_wrong_input_is_one_line_and_status_2(tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert not out and err.startswith(f"moejax: {message}") and err.count("\n") == 1


def test_help_says_what_each_command_does(capfd):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    out = capfd.readouterr().out
    assert ended.value.code == 0 and "verify WORKDIR" in out and "list WORKDIR" in out and "Exit status" in out


@pytest.mark.slow
def test_as_a_command(workdir):
    (workdir / "checkpoints" / "5" / "manifest.json").unlink()
    done = subprocess.run([sys.executable, "-m", "moejax.checkpoint", "verify", str(workdir)], capture_output=True,
                          text=True)
    assert done.returncode == 1 and not done.stderr and "BAD: manifest.json is missing" in done.stdout


@pytest.mark.parametrize("seconds, text", ((-3, "0 s"), (59, "59 s"), (600, "10 min"), (7200, "2 h"), (1e6, "12 d")))
def test_ages(seconds, text):
    assert ago(seconds) == text
