"""The manifest: comes back as written, or is refused by name; no input crashes it or leads out of the folder."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
import tensorstore as ts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moejax import bounded
from moejax.checkpoint import Store, manifest
from moejax.checkpoint.__main__ import main
from moejax.checkpoint.manifest import Damaged, Manifest, Stored
from moejax.checkpoint.verify import verify

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = Manifest(7, 1.5, "loss", 0.25, {"model": {"w_DF": Stored((2, 3), "float32", "0123456789abcdef")}},
                   {"model/d/0": 9, "data/metadata": 2}, {"data/metadata": hashlib.sha256(b"{}").hexdigest()})
BODY = json.dumps({"format": 1} | dataclasses.asdict(EXAMPLE))
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda inner: st.lists(
    inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8)
FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def sealed(body: bytes) -> bytes:
    """A body with the hash that vouches for it."""
    return json.dumps({"sha256_of_next_line": hashlib.sha256(body).hexdigest()}).encode() + b"\n" + body + b"\n"


def body_of(folder: Path) -> dict:
    return json.loads((folder / manifest.NAME).read_bytes().splitlines()[1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    store = Store(workdir)
    store.save(7, {"model": {"w_DF": jnp.arange(6.0).reshape(2, 3)}}, {"position": 7}, 0.5)
    store.close()
    return workdir


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "w")
    return tmp_path / "w" / "checkpoints" / "7"


def test_comes_back_as_written_and_nothing_else_is_left(tmp_path):
    manifest.write(tmp_path, EXAMPLE)
    assert manifest.read(tmp_path) == EXAMPLE and os.listdir(tmp_path) == [manifest.NAME]


def test_every_changed_byte_and_every_shorter_file_is_refused(tmp_path):
    manifest.write(tmp_path, EXAMPLE)
    content = (tmp_path / manifest.NAME).read_bytes()
    for place in range(0, len(content), 5):
        for changed in (content[:place], content[:place] + bytes([content[place] ^ 4]) + content[place + 1:]):
            (tmp_path / manifest.NAME).write_bytes(changed)
            with pytest.raises(Damaged, match="manifest.json is (torn or )?damaged"):
                manifest.read(tmp_path)


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_damage(tmp_path, content):
    for given_content in (content, sealed(content.replace(b"\n", b""))):
        (tmp_path / manifest.NAME).write_bytes(given_content)
        with pytest.raises(Damaged):
            manifest.read(tmp_path)


@FUZZ
@given(st.lists(st.sampled_from(("step", "saved", "metric", "value", "arrays", "sizes", "hashes", "format")), min_size=1,
                max_size=2), JSON, st.booleans())
def test_any_json_in_any_place_is_a_manifest_or_damage(tmp_path, keys, value, drop):
    body = json.loads(BODY)
    for key in keys:
        if drop:
            body.pop(key, None)
        else:
            body[key] = value
    (tmp_path / manifest.NAME).write_bytes(sealed(json.dumps(body).encode()))
    try:
        found = manifest.read(tmp_path)
        assert type(found.step) is int and found.step >= 0
        manifest.check_files(tmp_path, found)
    except Damaged as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ("../secret", "/etc/passwd", "model/../../secret", "a//b", "./a", "..", "a\\b", "a\0b", "",
                                  "a/", "a\nb"))
@pytest.mark.parametrize("group", ("sizes", "hashes", "arrays"))
def test_a_path_that_leads_elsewhere_is_refused(folder, name, group):
    body = body_of(folder)
    body[group][name] = {"sizes": 6, "hashes": "0" * 64, "arrays": {}}[group]
    (folder / manifest.NAME).write_bytes(sealed(json.dumps(body).encode()))
    with pytest.raises(Damaged, match="manifest.json is damaged"):
        manifest.read(folder)


def test_a_link_is_no_file_of_a_checkpoint(folder, tmp_path):
    for path in (folder / "data" / "metadata", folder / "model", folder / manifest.NAME):
        moved = path.rename(tmp_path / "elsewhere")
        path.symlink_to(moved)
        assert "data/metadata" in verify(folder).wrong[0] or "model/" in verify(folder).wrong[0] or (
            path.name == manifest.NAME and verify(folder).wrong)
        path.unlink()
        moved.rename(path)
    assert not verify(folder).wrong


def test_what_is_too_large_or_no_file_is_not_read(folder):
    path = folder / manifest.NAME
    with path.open("ab") as file:
        file.truncate(bounded.LIMIT + 1)  # a sparse file
    with pytest.raises(Damaged, match="manifest.json is damaged"):
        manifest.read(folder)
    path.unlink()
    os.mkfifo(path)  # reading it would wait for ever
    with pytest.raises(Damaged, match="manifest.json is damaged"):
        manifest.read(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_verify_answers_whatever_bytes_are_in_any_file(saved, tmp_path, capfd, data):
    workdir = tmp_path / "w"
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(saved, workdir)
    folder = workdir / "checkpoints" / "7"
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in data.draw(st.lists(st.sampled_from(paths), min_size=1, max_size=3)):
        content = path.read_bytes()
        place = data.draw(st.integers(0, len(content)))
        insert = data.draw(st.binary(max_size=20))
        path.write_bytes(content[:place] + insert + content[place + data.draw(st.integers(0, 20)):])
    for command in ("list", "verify"):
        assert main([command, str(workdir)]) in (0, 1)
    out, err = capfd.readouterr()
    assert not err and out.count("\n") == 4, (out, err)


def test_an_array_of_another_shape_is_not_read_whatever_its_size(folder):
    """2 TiB of zeros take no room on disk."""
    shutil.rmtree(folder / "model")
    (folder / "model").mkdir()
    ts.open({"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{folder}/model/", "path": "w_DF/"}},
            create=True, shape=[1 << 39], dtype=ts.float32).result()
    wrong = verify(folder).wrong
    assert any("array model/w_DF has shape (549755813888,) and type float32, where (2, 3) and" in line for line in wrong)


def test_nothing_in_a_checkpoint_is_a_pickle(saved):
    for path in saved.rglob("*"):
        assert not path.is_file() or not path.read_bytes().startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
