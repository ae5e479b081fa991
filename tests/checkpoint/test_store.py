"""Checkpoints: which are kept, what may be read back where, and what a kill can leave behind."""

import contextlib
import math
import os
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from moejax import sharding
from moejax.checkpoint import Store, place
from moejax.config import MeshConfig, UserError

LOSSES = st.one_of(st.none(), st.just(math.nan), st.floats(0, 9).map(lambda loss: round(loss, 1)))


def tree(step: int) -> dict:
    return {"w_DF": jnp.arange(6.0).reshape(2, 3) + step, "count": jnp.int32(step)}


def shapes() -> dict:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree(0))


def like() -> dict:
    here = SingleDeviceSharding(jax.devices()[0])
    return place(shapes(), jax.tree.map(lambda _: here, shapes()))


def save(workdir: Path, steps, keep: int = 9, losses=None) -> None:
    store = Store(workdir, keep)
    for step in steps:
        loss = (losses or {}).get(step)
        store.save(step, {"model": tree(step)}, {"position": step}, loss)
    store.close()


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """All paths below a folder with their time of change and content."""
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path in sorted(folder.rglob("*"))}


@settings(max_examples=6, deadline=None)
@given(st.lists(LOSSES, min_size=3, max_size=6), st.integers(1, 3), st.integers(0, 6))
def test_newest_and_best_stay_even_when_a_run_is_continued(losses, keep, cut):
    by_step = dict(enumerate(losses, 1))
    with tempfile.TemporaryDirectory() as folder:
        for part in (range(1, len(losses) + 1)[:cut], range(1, len(losses) + 1)[cut:]):
            save(Path(folder), part, keep, by_step)
        store = Store(Path(folder), keep, read_only=True)
        kept = store.steps()
        store.close()
    real = {step: loss for step, loss in by_step.items() if loss is not None and not math.isnan(loss)}
    best = [max(step for step in real if real[step] == min(real.values()))] if real else []
    assert kept == sorted({*list(by_step)[-keep:], *best})


def test_restores_what_was_saved_newest_by_default_and_only_the_items_asked_for(tmp_path):
    store = Store(tmp_path, keep=2)
    for step in (4, 7):
        store.save(step, {"model": tree(step), "training": {"m": jnp.ones(5)}}, {"position": [step]}, None)
    store.close()
    store = Store(tmp_path, read_only=True)
    for step in (4, 7):
        restored = store.restore({"model": like()}, None if step == 7 else step)
        assert restored.step == step and restored.data == {"position": [step]} and list(restored.items) == ["model"]
        jax.tree.map(np.testing.assert_array_equal, restored.items["model"], tree(step))
    with pytest.raises(UserError, match=r"--step=5; there are 4, 7$"):
        store.restore({"model": like()}, 5)
    store.close()


def test_no_checkpoint_is_a_user_error(tmp_path):
    store = Store(tmp_path, read_only=True)
    with pytest.raises(UserError, match="no checkpoint; train first"):
        store.restore({"model": like()})
    store.close()


def test_reading_writes_nothing(tmp_path):
    store = Store(tmp_path, read_only=True)
    store.close()
    assert not list(tmp_path.iterdir())
    save(tmp_path, (1, 2))
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    before = snapshot(tmp_path)
    store = Store(tmp_path, read_only=True)
    store.restore({"model": like()}, 1)
    store.close()
    assert snapshot(tmp_path) == before


def test_torn_checkpoint_is_passed_over_and_its_step_saved_again(tmp_path):
    save(tmp_path, (1, 2))
    folder = tmp_path / "checkpoints"
    torn = folder / "3.orbax-checkpoint-tmp"
    shutil.copytree(folder / "2", torn)
    (torn / "commit_success.txt").unlink(missing_ok=True)
    shutil.rmtree(torn / "model")
    store = Store(tmp_path, keep=9)
    assert store.steps() == [1, 2]
    assert store.restore({"model": like()}).step == 2
    store.save(3, {"model": tree(3)}, {"position": 3}, None)
    store.close()
    assert sorted(os.listdir(folder)) == ["1", "2", "3"]
    store = Store(tmp_path, read_only=True)
    jax.tree.map(np.testing.assert_array_equal, store.restore({"model": like()}).items["model"], tree(3))
    store.close()


@pytest.mark.parametrize("lost", ("manifest.json", "_CHECKPOINT_METADATA", "model", "data"))
def test_half_removed_old_checkpoint_does_not_disturb(tmp_path, lost):
    """Older versions removed an old checkpoint file by file, and a kill might come meanwhile."""
    save(tmp_path, (1, 2), losses={1: 0.5, 2: 0.7})
    gone = tmp_path / "checkpoints" / "1" / lost
    assert gone.exists(), "Orbax has another layout now"
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    save(tmp_path, (3, 4), keep=1, losses={4: 0.6})
    store = Store(tmp_path, read_only=True)
    jax.tree.map(np.testing.assert_array_equal, store.restore({"model": like()}).items["model"], tree(4))
    assert store.steps()[-1] == 4
    store.close()


def test_any_mesh_reads_what_any_other_wrote(tmp_path):
    rng = np.random.default_rng(0)
    values = {"w_EDF": np.float32(rng.normal(size=(4, 6, 8))), "m_DF": np.float32(rng.normal(size=(6, 10))),
              "step": np.int32(3), "key": rng.integers(0, 2**32, 2, dtype=np.uint32)}
    logical = {"w_EDF": ("experts", "embed", "expert_ffn"), "m_DF": ("embed", None), "step": (), "key": (None,)}
    meshes = [sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1]),
              sharding.make_mesh(MeshConfig(data=2, expert=4)),
              sharding.make_mesh(MeshConfig(data=2, expert=2, model=2))]
    for step, (writer, reader) in enumerate(((0, 1), (1, 0), (1, 2), (2, 1)), 1):
        where = [sharding.shardings(logical, meshes[i]) for i in (writer, reader)]
        store = Store(tmp_path, keep=9)
        store.save(step, {"model": jax.device_put(values, where[0])}, {}, None)
        store.close()
        store = Store(tmp_path, read_only=True)
        read = store.restore({"model": place(values, where[1])}).items["model"]
        store.close()
        for name, array in read.items():
            assert array.sharding.is_equivalent_to(where[1][name], array.ndim), name
            np.testing.assert_array_equal(np.asarray(array), values[name])
            assert array.dtype == values[name].dtype


@pytest.mark.parametrize("devices", (1, 8))
def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path, devices):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    rows = NamedSharding(mesh, PartitionSpec("data"))
    host = {f"w_{i}": np.arange(i, i + (1 << 19), dtype=np.int32).reshape(8, -1) for i in range(4)}

    def advance(tree):
        return jax.tree.map(lambda a: a * 3 + 1, tree)

    step = jax.jit(advance, donate_argnums=0)
    state = jax.device_put(host, rows)
    store, saved = Store(tmp_path, keep=9), {}
    for number in range(1, 4):
        state, host = step(state), advance(host)
        store.save(number, {"model": state}, {}, None)
        saved[number] = host
        for _ in range(5):
            donated, state, host = state, step(state), advance(host)
        assert all(a.is_deleted() for a in donated.values())
    store.close()
    store = Store(tmp_path, read_only=True)
    for number, wanted in saved.items():
        read = store.restore({"model": place(wanted, jax.tree.map(lambda _: rows, wanted))}, number).items["model"]
        jax.tree.map(np.testing.assert_array_equal, read, wanted)
    store.close()


@contextlib.contextmanager
def files_of_at_most(size: int):
    """As on a full disk: the system refuses to write more into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def noise(step: int) -> dict:
    return {"w_DF": jnp.float32(np.random.default_rng(step).normal(size=(200, 201)))}


@pytest.mark.parametrize("size", (0, 50, 60000), ids=("any file", "metadata", "arrays"))
def test_what_cannot_be_written_is_said_and_the_rest_stays_and_is_continued(tmp_path, capfd, size):
    lines = []
    store = Store(tmp_path, keep=2, say=lines.append)
    for step in (1, 2):
        store.save(step, {"model": noise(step)}, {}, None)
    store.wait()
    before = snapshot(tmp_path / "checkpoints" / "1")
    with files_of_at_most(size):
        store.save(3, {"model": noise(3)}, {}, None)
        store.wait()
    assert store.failure.step == 3 and store.failure.reason == "File too large"
    line, = lines
    assert line.startswith("WARNING: the checkpoint of step 3 could not be written") and "\n" not in line
    assert store.steps() == [1, 2] and snapshot(tmp_path / "checkpoints" / "1") == before
    store.save(5, {"model": noise(5)}, {}, None)
    store.close()
    assert store.failure is None and sorted(os.listdir(store.folder)) == ["2", "5"] and lines == [line]
    assert capfd.readouterr() == ("", "")  # and Orbax says nothing beside it
    store = Store(tmp_path, read_only=True)
    here = SingleDeviceSharding(jax.devices()[0])
    read = store.restore({"model": place(noise(0), {"w_DF": here})})
    np.testing.assert_array_equal(read.items["model"]["w_DF"], noise(5)["w_DF"])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_full_disk_keeps_what_is_there(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted")
    try:
        lines = []
        store = Store(tmp_path, keep=9, say=lines.append)
        for step in range(1, 7):
            store.save(step, {"model": noise(step)}, {}, None)
        store.close()
        assert store.failure.reason == "No space left on device" and 2 <= len(store.steps()) < 6
        assert len(lines) == 6 - len(store.steps())
        for step in store.steps():
            read = Store(tmp_path, read_only=True).restore({"model": place(noise(0), {"w_DF": SingleDeviceSharding(
                jax.devices()[0])})}, step)
            np.testing.assert_array_equal(read.items["model"]["w_DF"], noise(step)["w_DF"])
    finally:
        subprocess.run(["umount", str(folder)], check=True)
