"""Damaged checkpoints: found by name, passed over for the newest good one, and never read as other values."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from benchmarks.faults import damage
from moejax import sharding
from moejax.checkpoint import Store, manifest, place
from moejax.checkpoint.__main__ import main
from moejax.checkpoint.store import superseded
from moejax.checkpoint.verify import verify
from moejax.config import MeshConfig, UserError

HERE = SingleDeviceSharding(jax.devices()[0])


def trees(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {"model": {"w_DF": jnp.float32(rng.normal(size=(50, 70))), "b_F": jnp.bfloat16(rng.normal(size=70))},
            "training": {"m_DF": jnp.float32(rng.normal(size=(50, 70))), "count": jnp.int32(step),
                         "zeros_F": jnp.zeros(70), "few": jnp.int8(rng.integers(-9, 9, (3, 5)))}}


def like(tree=None):
    tree = trees(0) if tree is None else tree
    return place(tree, jax.tree.map(lambda _: HERE, tree))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints of steps 10 and 20, not to be changed."""
    workdir = tmp_path_factory.mktemp("saved")
    store = Store(workdir, keep=2)
    for step in (10, 20):
        store.save(step, trees(step), {"position": step}, step / 7)
    store.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "w"))


def restore(workdir, step=None, wanted=None):
    """What was read, and the lines said."""
    lines = []
    store = Store(workdir, read_only=True, say=lines.append)
    try:
        return store.restore(like() if wanted is None else wanted, step), lines
    finally:
        store.close()


def holds(restored, step: int) -> bool:
    wanted = trees(step)
    return (restored.step == step and restored.data == {"position": step}
            and all(np.asarray(a).tobytes() == np.asarray(b).tobytes() and a.dtype == b.dtype for a, b in zip(
                jax.tree.leaves(restored.items), jax.tree.leaves(wanted), strict=True)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def injure(saved: Path, parent: Path, kind: str, seed: int) -> bool:
    """Injures the newer checkpoint of a copy, and checks all laws; returns whether the damage was found on reading."""
    workdir = Path(shutil.copytree(saved, parent / f"{kind}{seed}".replace(" ", "_")))
    folder = workdir / "checkpoints" / "20"
    what = damage.KINDS[kind](folder, np.random.default_rng(seed))
    before = contents(workdir)
    restored, lines = restore(workdir)
    found = bool(lines)
    if found:
        line, = lines
        assert holds(restored, 10), (what, line)
        assert "\n" not in line and str(folder) in line and line.endswith("taking that of step 10 instead"), (what, line)
        with pytest.raises(UserError, match="is damaged: "):
            restore(workdir, 20)
    else:
        assert holds(restored, 20), what
    wrong = verify(folder).wrong
    assert wrong and all("\n" not in one and len(one) < 400 for one in wrong), what
    assert contents(workdir) == before
    shutil.rmtree(workdir)
    return found


@pytest.mark.parametrize("kind, count", (("bit flip", 6), ("truncation", 3), ("deletion", 3), ("torn manifest", 4)))
def test_damage_is_found_or_changes_nothing_that_is_read(saved, tmp_path, kind, count):
    found = [injure(saved, tmp_path, kind, seed) for seed in range(count)]
    assert any(found)  # others hit bytes that nobody reads


@pytest.mark.slow
@pytest.mark.parametrize("kind, count", (("bit flip", 200), ("truncation", 40), ("deletion", 30), ("torn manifest", 30)))
def test_much_damage_is_found_or_changes_nothing_that_is_read(saved, tmp_path, kind, count):
    found = [injure(saved, tmp_path, kind, 1000 + seed) for seed in range(count)]
    print(f"{kind}: {count} injected, {sum(found)} found on reading, {count - sum(found)} in nothing that is read")
    assert any(found)  # others hit bytes that nobody reads


def test_a_bit_in_any_file_with_array_data_names_the_array_or_changes_nothing(saved, tmp_path):
    named = set()
    folder = saved / "checkpoints" / "20"
    for number, path in enumerate(path for path in damage.files(folder) if path.parent.name == "d"):
        workdir = Path(shutil.copytree(saved, tmp_path / str(number)))
        damage.flip_bit(workdir / "checkpoints" / "20", np.random.default_rng(number),
                        workdir / "checkpoints" / "20" / path.relative_to(folder))
        restored, lines = restore(workdir)
        assert holds(restored, 10 if lines else 20)
        named |= {line.split("damaged: ")[1].split()[1] for line in lines if "damaged: array " in line}
    assert named & {"model/w_DF", "model/b_F"} and named & {"training/m_DF", "training/few", "training/count"}


def test_a_value_changed_with_all_checksums_of_the_store_right_is_found(workdir):
    """As a fault before the writing would have it: Orbax itself has nothing against these files."""
    folder = workdir / "checkpoints" / "20"
    stored = manifest.read(folder)
    changed = trees(20)
    changed["model"]["w_DF"] = changed["model"]["w_DF"].at[31, 7].multiply(1 + 2**-20)
    shutil.rmtree(folder)
    store = Store(workdir)
    store.save(20, changed, {"position": 20}, None)
    store.close()
    assert restore(workdir)[1] == []
    manifest.write(folder, manifest.Manifest(20, 0.0, "loss", None, stored.arrays, *manifest.take(folder)))
    restored, (line,) = restore(workdir)
    assert holds(restored, 10) and "array model/w_DF is not what was saved" in line
    assert verify(folder).wrong == ["array model/w_DF is not what was saved (its hash differs)"]


@pytest.mark.parametrize("change, message", (
    (lambda tree: {**tree, "w_DF": jnp.zeros((70, 50))}, r"array model/w_DF has shape \(50, 70\) and type float32, where"),
    (lambda tree: {**tree, "w_DF": jnp.zeros((50, 70), jnp.float16)}, "array model/w_DF has .* and float16 are wanted"),
    (lambda tree: {**tree, "other": jnp.zeros(3)}, "array model/other is not in it"),
))
def test_another_shape_type_or_name_is_an_error_that_names_the_array(workdir, change, message):
    with pytest.raises(UserError, match=f"no good checkpoint .20: {message}.*; 10: "):
        restore(workdir, wanted=like({"model": change(trees(0)["model"])}))


def test_where_no_checkpoint_is_good_nothing_is_changed(workdir):
    for step in (10, 20):
        damage.truncate(workdir / "checkpoints" / str(step) / "data", np.random.default_rng(0))
    before = contents(workdir)
    with pytest.raises(UserError, match="no good checkpoint .20: data/.* bytes and should have .*; 10: .*was changed$"):
        restore(workdir)
    assert contents(workdir) == before


def test_the_step_of_a_damaged_checkpoint_is_saved_again_and_it_counts_as_none(workdir):
    damage.tear_manifest(workdir / "checkpoints" / "20", np.random.default_rng(3))
    store = Store(workdir, keep=2)
    store.save(15, trees(15), {"position": 15}, None)
    store.wait()
    assert store.steps() == [10, 15, 20]  # the damaged one is not one of two to keep
    store.save(20, trees(20), {"position": 20}, None)
    store.close()
    assert store.failure is None and store.steps() == [10, 15, 20]  # 10 is the best
    restored, lines = restore(workdir)
    assert holds(restored, 20) and not lines


def test_what_only_reading_shows_to_be_damaged_counts_as_none_either(workdir):
    folder = workdir / "checkpoints" / "20"
    stored = manifest.read(folder)
    stored.arrays["model"]["w_DF"] = manifest.Stored((50, 70), "float32", "0" * 16)
    manifest.write(folder, stored)
    store = Store(workdir, keep=2, say=lambda line: None)
    assert store.restore(like()).step == 10
    for step, kept in ((15, [10, 15, 20]), (25, [10, 15, 20, 25]), (30, [10, 25, 30])):  # 10 is the best
        store.save(step, trees(step), {"position": step}, None)
        store.wait()
        assert store.steps() == kept
    store.close()


def test_checkpoints_of_later_steps_neither_go_nor_count(workdir):
    folder = workdir / "checkpoints"
    assert superseded(folder, 10, 1, "loss", False, set()) == []
    assert superseded(folder, 20, 1, "loss", False, set()) == [folder / "10"]


def test_a_model_is_read_though_only_what_training_needs_is_damaged(workdir):
    shutil.rmtree(workdir / "checkpoints" / "20" / "training")
    restored, lines = restore(workdir, wanted={"model": like()["model"]})
    assert restored.step == 20 and not lines
    assert restore(workdir)[0].step == 10


def as_by_an_older_version(folder: Path) -> None:
    (folder / manifest.NAME).unlink()
    path = folder / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": {}}))
    (folder / "metrics").mkdir()
    (folder / "metrics" / "metrics").write_text('{"loss": Infinity}' if folder.name == "20" else '{"loss": 0.5}')


def test_checkpoints_of_an_older_version_are_read_with_a_word_and_continued(workdir, capsys):
    for step in (10, 20):
        as_by_an_older_version(workdir / "checkpoints" / str(step))
    restored, (line,) = restore(workdir)
    assert holds(restored, 20) and "older version" in line and "cannot be verified" in line
    assert main(["verify", str(workdir)]) == 1 == main(["list", str(workdir)])
    assert "0.5" in capsys.readouterr().out
    store = Store(workdir, keep=1)
    store.save(30, trees(30), {"position": 30}, 9.0)
    store.close()
    assert store.steps() == [10, 30]  # the best and the newest


def test_verified_across_topologies(tmp_path):
    """What eight devices wrote in parts is verified where one reads it, and the other way round."""
    rng = np.random.default_rng(0)
    values = {"a_EDF": np.float32(rng.normal(size=(4, 6, 8))), "b_DF": jnp.bfloat16(rng.normal(size=(6, 16))),
              "c": np.uint32(7)}
    many = sharding.make_mesh(MeshConfig(data=4, model=2))
    where = [jax.tree.map(lambda _: HERE, values),
             {"a_EDF": NamedSharding(many, PartitionSpec("data", "model")), "c": NamedSharding(many, PartitionSpec()),
              "b_DF": NamedSharding(many, PartitionSpec(None, ("data", "model")))}]
    digests = []
    for step, (writer, reader) in enumerate(((0, 1), (1, 0), (1, 1)), 1):
        store = Store(tmp_path, keep=9)
        store.save(step, {"model": jax.device_put(values, where[writer])}, {}, None)
        store.close()
        folder = tmp_path / "checkpoints" / str(step)
        restored, lines = restore(tmp_path, wanted={"model": place(values, where[reader])})
        assert restored.step == step and not lines and not verify(folder).wrong
        digests.append({name: one.digest for name, one in manifest.read(folder).arrays["model"].items()})
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), restored.items["model"], values)
        wrong = manifest.read(folder)
        wrong.arrays["model"]["b_DF"] = manifest.Stored((6, 16), "bfloat16", "0" * 16)
        manifest.write(folder, wrong)
        with pytest.raises(UserError, match="array model/b_DF is not what was saved"):
            restore(tmp_path, step, {"model": place(values, where[reader])})
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("leave", ("30.part", "30.part.orbax-checkpoint-tmp", "5.removed", "30.orbax-checkpoint-tmp"))
def test_what_a_kill_leaves_is_no_checkpoint_and_goes(workdir, leave):
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "20", folder / leave)
    assert restore(workdir)[0].step == 20 and (folder / leave).exists()
    Store(workdir).close()
    assert sorted(os.listdir(folder)) == ["10", "20"]
