"""Runs outlive damaged checkpoints and a full disk, and the continued run is the one that met neither."""

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.faults import damage, scene
from moejax.checkpoint import lock
from moejax.checkpoint.verify import verify
from moejax.main import main

CONFIG = """\
from moejax import config


def get_config():
    c = config.default()
    c.model.update(dict(vocab_size=257, layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, ffn=16, dropout=0.1))
    c.moe.update(dict(num_experts=3, experts_per_token=2, ffn=12, block_rows=4))
    c.data.update(dict(source="*.jsonl", tokenizer="bytes", length=16, batch_size=8, eval_fraction=0.3))
    c.train.update(dict(steps=8, checkpoint_every=2, keep=9, log_every=1, eval_every=4, eval_batches=1, sample_prompt=""))
    return c
"""
COMMAND = ["main", "--config=c.py", "--workdir=w"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A folder with a config, a corpus and a run of eight steps that met no fault."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "c.py").write_text(CONFIG)
    lines = [json.dumps({"text": f"document number {i}, about the number {i * i}"}) for i in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(COMMAND) == 0
    return folder


@pytest.fixture
def here(straight, tmp_path, monkeypatch):
    """A copy of it, in the current folder."""
    shutil.copytree(straight, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return Path("w")


def check_same(workdir: Path, straight: Path) -> None:
    assert scene.saved(straight / "w") == [2, 4, 6, 8] and not list(scene.differences(workdir, straight / "w"))
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]


def flip_in_arrays(workdir: Path, step: int) -> None:
    """Flips a bit that the model's arrays have; files also hold what the store has left behind."""
    folder = workdir / "checkpoints" / str(step)
    paths = [path for path in damage.files(folder / "model") if path.parent.name == "d"]
    for seed in range(100):
        before = {path: path.read_bytes() for path in paths}
        damage.flip_bit(folder, np.random.default_rng(seed), paths[seed % len(paths)])
        if any(wrong.startswith("array model/") for wrong in verify(folder).wrong):
            return
        for path, content in before.items():
            path.write_bytes(content)
    raise AssertionError("no flip was found")


@pytest.mark.slow
def test_a_run_with_damaged_checkpoints_goes_on_from_the_newest_good_one(here, straight, capfd):
    flip_in_arrays(here, 8)
    damage.tear_manifest(here / "checkpoints" / "6", np.random.default_rng(0))
    shutil.rmtree(here / "checkpoints" / "4" / "data")
    with (here / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "spl')
    assert main(COMMAND) == 0
    out, err = capfd.readouterr()
    assert "continuing at step 2\n" in out
    lines = [line for line in err.splitlines() if "damaged" in line]
    assert len(lines) == 3 and all(line.endswith("taking that of step 2 instead") for line in lines), err
    assert "w/checkpoints/8 is damaged: array " in lines[0] and "6 is damaged: manifest.json" in lines[1] and (
        "4 is damaged: data/" in lines[2] and "is missing" in lines[2])
    check_same(here, straight)


@pytest.mark.slow
def test_evaluation_takes_the_newest_good_checkpoint_and_says_so(here, capfd):
    flip_in_arrays(here, 8)
    assert main(["main", "--mode=eval", "--workdir=w"]) == 0
    out, err = capfd.readouterr()
    assert "step 6  held-out loss" in out and err.count("\n") == 1 and "taking that of step 6 instead" in err
    assert main(["main", "--mode=generate", "--workdir=w", "--prompt=doc", "--step=8", "--max_new_tokens=2"]) == 2
    out, err = capfd.readouterr()
    assert not out and err.startswith("moejax: ") and "8 is damaged: array " in err and "--step (2, 4, 6)" in err


@pytest.mark.slow
def test_without_a_good_checkpoint_the_run_ends_and_changes_nothing(here, capfd):
    for step in (2, 4, 6, 8):
        flip_in_arrays(here, step)
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert main(COMMAND) == 2
    err = capfd.readouterr().err
    assert err.startswith("moejax: ") and err.count("\n") == 1 and "no good checkpoint (8: array " in err
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_second_run_in_a_workdir_is_refused_and_changes_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(CONFIG)
    here = tmp_path / "w"
    here.mkdir()
    (here / "config.json").write_text("{}")
    alive = {"host": lock._host(), "process": 1, "started": None, "since": "noon"}
    (here / lock.NAME).write_text(json.dumps(alive))
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert main([*COMMAND, "--config.train.steps=9"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"in use by process 1 on {lock._host()} (since noon)" in err
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def run_without_room(workdir: Path, *options: str) -> int:
    """Goes on from step 2 where no file can grow as large as a checkpoint needs. Returns the exit status."""
    for step in (4, 6, 8):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7000, before[1]))
    try:
        return main([*COMMAND, *options])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_a_run_on_a_full_disk_goes_on_warns_and_does_not_say_that_all_is_saved(here, straight, capsys):
    status = run_without_room(here)
    out, err = capsys.readouterr()
    assert status == 2 and "step 8/8" in out and "done" not in out
    assert [line for line in err.splitlines() if "WARNING: the checkpoint of step 4 could not be written" in line]
    assert "step 8 is reached, but its checkpoint could not be written (File too large)" in err.splitlines()[-1]
    assert [name for name in os.listdir(here / "checkpoints") if name.isdigit()] == ["2"]
    assert main(COMMAND) == 0
    check_same(here, straight)


@pytest.mark.slow
def test_a_run_on_a_full_disk_ends_where_it_is_told_to(here, straight, capsys):
    status = run_without_room(here, "--config.train.faults.stop_unsaved=True", "--config.train.steps=99")
    out, err = capsys.readouterr()
    reached = int(err.splitlines()[-1].split("step ")[1].split()[0])
    assert status == 2 and 4 < reached < 99 and "done" not in out
    assert [name for name in os.listdir(here / "checkpoints") if name.isdigit()] == ["2"]
    assert main(COMMAND) == 0
    check_same(here, straight)
