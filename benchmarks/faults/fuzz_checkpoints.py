"""A fuzz of what a run keeps in its workdir: checkpoints with their manifests, the lock file, and records."""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from benchmarks.faults.fuzz_inputs import DEEP, TEXT, VALUES, Reader, changed, damaged, json_file, json_of, read_all, write
from moejax.checkpoint import Store, lock, manifest, place
from moejax.checkpoint.__main__ import main
from moejax.checkpoint.store import superseded
from moejax.exit_status import WRONG_INPUT
from moejax.metrics import record

TREES = {"model": {"w_DF": np.arange(35, dtype=np.float32).reshape(5, 7)}, "training": {"count": np.int32(7)}}
INDEX = manifest.NAME


@functools.cache
def sample() -> dict[str, bytes]:
    """The files of a checkpoint of step 10."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        store.save(10, jax.tree.map(jnp.asarray, TREES), {"position": 10, "loader": {}}, 0.5)
        store.close()
        return read_all(Path(folder) / "checkpoints" / "10")


def sealed(body: bytes) -> bytes:
    """A manifest that says of itself that it is whole."""
    return json_of({"sha256_of_next_line": hashlib.sha256(body).hexdigest()}) + b"\n" + body + b"\n"


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, bytes]:
    """The files of a checkpoint with a changed manifest, changed metadata, or any damaged file."""
    files, how = sample(), draw(st.sampled_from(("manifest", "manifest", "older", "data", "any")))
    if how == "manifest":
        body = json.loads(files[INDEX].splitlines()[1])
        names = st.one_of(VALUES, st.sampled_from(("../x", "/etc/passwd", "model", "0" * 64, [2**40, 2**40], [1 << 62])))
        return files | {INDEX: draw(st.one_of(json_file(body, names).map(sealed), st.sampled_from(DEEP).map(sealed)))}
    if how == "data":  # with a manifest that vouches for it
        content = draw(json_file(json.loads(files["data/metadata"])))
        body = json.loads(files[INDEX].splitlines()[1])
        body["sizes"]["data/metadata"] = len(content)
        body["hashes"]["data/metadata"] = hashlib.sha256(content).hexdigest()
        return files | {"data/metadata": content, INDEX: sealed(json_of(body))}
    if how == "older":
        files = {name: content for name, content in files.items() if name != INDEX}
        metadata = json.loads(files["_CHECKPOINT_METADATA"]) | {"custom_metadata": None}
        return files | {"_CHECKPOINT_METADATA": draw(st.one_of(st.just(json_of(metadata)), json_file(metadata))),
                        "metrics/metrics": draw(json_file({"loss": 0.5}))}
    name = draw(st.sampled_from(sorted(files)))
    return files | {name: draw(damaged(files[name]))}


def commands(files: dict[str, bytes], folder: Path) -> Callable[[], int]:
    """What looks at checkpoints."""
    write(folder / "checkpoints" / "10", files)
    return lambda: look_at(folder)


def look_at(workdir: Path) -> int:
    """Both commands, unless the first finds nothing."""
    status = main(["list", str(workdir)])
    return status if status == WRONG_INPUT else max(status, main(["verify", str(workdir)]))


def restore(files: dict[str, bytes], folder: Path) -> Callable[[], Any]:
    """A checkpoint is read into arrays, and looked at when others are removed."""
    write(folder / "checkpoints" / "10", files)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = place(TREES, jax.tree.map(lambda _: here, TREES))

    def work() -> None:
        superseded(folder / "checkpoints", 20, 1, "loss", True, set())
        read = Store(folder, read_only=True, say=lambda line: None).restore(like)
        if not all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(read.items), jax.tree.leaves(TREES))):
            raise AssertionError("other values than were saved")
    return work


NAMES = st.one_of(TEXT.filter(lambda name: "\0" not in name and "/" not in name and 0 < len(name.encode(
    "utf-8", "surrogatepass")) < 200 and "\ud800" not in name and name not in (".", "..")),
    st.sampled_from(("10", "007", "1" * 200, "-1", "1_0", "\u0663", "10.part", "10.removed", "x.part")))


def folders(names: list[tuple[str, str]], folder: Path) -> Callable[[], int]:
    """A folder of checkpoints in which other things have names like theirs."""
    (folder / "checkpoints").mkdir()
    for name, kind in dict(names).items():
        path = folder / "checkpoints" / name
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to("/")
        elif kind == "dangling":
            path.symlink_to("nowhere")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.write_bytes(b"x")
    return lambda: look_at(folder)


OWNER = {"host": "elsewhere", "process": 7, "started": 5, "since": "2025-01-01 00:00:00 +0000"}


def locked(content: bytes, folder: Path) -> Callable[[], Any]:
    """The file of a writer that is gone, or of none."""
    write(folder, {lock.NAME: content})

    def work() -> None:
        with lock.one_writer(folder, lambda line: None, stale=0.01):
            pass
    return work


def records(content: bytes, folder: Path) -> Callable[[], Any]:
    """metrics.jsonl is read and written on."""
    write(folder, {"metrics.jsonl": content})

    def work() -> None:
        record.read(folder)
        recorder = record.Recorder(folder)
        recorder.go_on_after(5)
        recorder.write({"step": 7, "split": "train", "loss": 0.5})
        recorder.close()
        if record.read(folder)[-1]["step"] != 7:
            raise AssertionError("the new record is not the last")
    return work


LINES = [{"step": step, "split": split, "loss": 1 / (step + 1)} for step in range(9) for split in ("train", "eval")]

READERS = {
    "checkpoint commands": Reader(st.deferred(checkpoints), commands, share=1, statuses=(0, 1, 2)),
    "restoring": Reader(st.deferred(checkpoints), restore, share=1),
    "checkpoint folders": Reader(st.lists(st.tuples(NAMES, st.sampled_from((
        "folder", "file", "link", "dangling", "pipe"))), max_size=4), folders, share=0.5, statuses=(0, 1, 2)),
    "lock": Reader(st.one_of(json_file(OWNER), json_file(OWNER | {"host": os.uname().nodename})), locked, share=0.5),
    "records": Reader(st.one_of(changed(LINES).map(lambda lines: b"\n".join(map(json_of, lines))),
                                damaged(b"\n".join(map(json_of, LINES)))), records, share=1),
}
