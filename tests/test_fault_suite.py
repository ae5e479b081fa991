"""The fault suite in its short form, of which the quickest by default: every fault is survived, and what is not is seen."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.faults import damage, scene, suite


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The workdir of a run that met no fault."""
    workdir = scene.set_scene(tmp_path_factory.mktemp("faults") / "scene") / "straight"
    assert scene.finished(workdir.parent, f"--workdir={workdir.name}") is None
    return workdir


NAMES = [name for name in suite.faults(Path("straight"), suite.SHORT, 0) if not name.startswith("fuzz")]
"""Of the readers test_fuzz.py has more."""
QUICK = ("kills at random", "signals: twice", "damage: bit flip", "damage: torn manifest", "topology 0")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_survived(straight, name):
    row = suite.faults(straight, suite.SHORT, 0)[name]()
    assert not row.problems
    assert row.injected == row.survived > 0


def test_the_straight_run_has_all_that_is_compared(straight):
    assert scene.saved(straight) == list(range(scene.EVERY, scene.STEPS + 1, scene.EVERY))
    assert {name.split("/")[0] for name in scene.values(straight, scene.STEPS)} == {"model", "training", "data"}
    assert not list(scene.differences(straight, straight))


@pytest.mark.parametrize("lose, said", (
    (lambda workdir: shutil.rmtree(workdir / "checkpoints" / "4"), "there is no checkpoint of step 4"),
    (lambda workdir: damage.tear_manifest(workdir / "checkpoints" / "4", np.random.default_rng(0)), "step 4: manifest"),
    (lambda workdir: change_a_line(workdir, 3), "metrics.jsonl tells of another run"),
    (lambda workdir: (workdir / "checkpoints" / "4").rename(workdir / "checkpoints" / "six") and shutil.copytree(
        workdir / "checkpoints" / "6", workdir / "checkpoints" / "4"), "step 4: manifest.json is that of step 6"),
))
def test_what_is_lost_is_seen(straight, tmp_path, lose, said):
    workdir = Path(shutil.copytree(straight, tmp_path / "w"))
    lose(workdir)
    assert next(scene.differences(workdir, straight)).startswith(said)


def change_a_line(workdir: Path, number: int) -> None:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | {"loss": 1.0})
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
