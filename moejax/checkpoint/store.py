"""Checkpoints of a run: written by Orbax in the background, sealed with a manifest, verified when they are read.

A checkpoint is written beside its place, as STEP.part, and takes its name when all of it is on disk, the manifest last.
What has a number for a name was therefore whole once; what is wrong with it came later, and is found.
"""

import contextlib
import logging
import math
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from moejax import peers
from moejax.bounded import writing
from moejax.checkpoint import arrays, digest
from moejax.checkpoint import manifest as manifests
from moejax.checkpoint.manifest import Damaged, Manifest, Stored, Unverified
from moejax.config import UserError, check

DATA = "data"
"""Item of a checkpoint with the position in the data, as JSON."""
STEP = re.compile(r"0|[1-9][0-9]*")
UNFINISHED = re.compile(r"[0-9]+\.(part|removed|orbax-checkpoint-tmp)\b.*")
"""Names of what a killed run leaves."""


class Restored(NamedTuple):
    """What was read of a checkpoint: its step, the items asked for, and the position in the data."""

    step: int
    items: dict[str, Any]
    data: dict[str, Any]


class NotSaved(NamedTuple):
    """A checkpoint that could not be written, and why."""

    step: int
    reason: str


def warn(line: str) -> None:
    """A line on stderr, if it can be written there."""
    with contextlib.suppress(OSError):
        print("moejax:", line, file=sys.stderr, flush=True)


def not_of_orbax(record: logging.LogRecord) -> bool:
    """A filter of the log: of each failure Orbax writes hundreds of lines, and we say one."""
    ours = "orbax" in record.pathname or record.name == "asyncio" and "never retrieved" in record.getMessage()
    return record.levelno < logging.ERROR or not ours


class Store:
    """The folder `checkpoints` of a workdir.

    Args:
      workdir: of the run.
      keep: newest checkpoints to keep.
      read_only: write nothing, not even the folder.
      metric: of evaluations; the checkpoint with the best value is kept beside the newest.
      lower: whether the lowest value is the best.
      say: takes a line when a checkpoint could not be written, or is passed over because it is damaged.

    Attributes:
      folder: where they are.
      failure: the last checkpoint, if it could not be written; None as soon as a later one is. A thread sets it, so look
        after `wait` or `close`, or at any time to act early.
    """

    def __init__(self, workdir: Path, keep: int = 2, read_only: bool = False, metric: str = "loss", lower: bool = True,
                 say: Callable[[str], None] = warn):
        self.folder = (workdir / "checkpoints").absolute()
        self._keep, self._metric, self._lower, self._say = keep, metric, lower, say
        self._chief = jax.process_index() == 0
        self._writer: ocp.AsyncCheckpointer | None = None
        self._sealing: threading.Thread | None = None
        self._damaged: set[int] = set()
        self._saves = 0
        self.failure: NotSaved | None = None
        if not read_only and self._chief:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._sweep()

    def save(self, step: int, items: Mapping[str, Any], data: dict[str, Any], value: float | None) -> None:
        """Starts writing a checkpoint; returns as soon as the arrays are copied, so they may be donated.

        If it cannot be written (the disk is full), that is said at once and put into `failure`, the older checkpoints stay,
        and nothing is raised: there may be room again when the next one is due.

        Args:
          step: optimizer steps done. What is there of the same step is replaced.
          items: trees of arrays by name.
          data: position in the data, ready for JSON.
          value: of the metric in an evaluation at this step, if there was one; otherwise, and if it is not a number, the
            checkpoint is never the best.
        """
        self.wait()
        self._saves += 1
        hashes = {item: {name: (leaf.shape, leaf.dtype, _digest(leaf)) for name, leaf in arrays.named(tree).items()}
                  for item, tree in items.items()}
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        if self._writer is None:
            for name in ("absl", "asyncio"):
                logging.getLogger(name).addFilter(not_of_orbax)
            self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        try:
            self._writer.save(self.folder / f"{step}.part", args=ocp.args.Composite(**trees, data=ocp.args.JsonSave(data)),
                              force=True, custom_metadata={manifests.MARK: manifests.FORMAT})
        except (OSError, ValueError) as error:  # the latter of tensorstore
            self._fail(step, error)
            return
        value = None if value is None or not math.isfinite(value) else float(value)
        self._sealing = threading.Thread(target=self._seal, args=(step, hashes, value), name="seal checkpoint")
        self._sealing.start()

    def wait(self) -> None:
        """Waits until everything is on disk, or known to have failed."""
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None

    def steps(self, before: float = math.inf) -> list[int]:
        """Steps of the checkpoints that there are before one, good or bad, oldest first."""
        return [step for step in (int(path.name) for path in step_folders(self.folder)) if step < before]

    def restore(self, like: Mapping[str, Any], step: int | None = None, before: float = math.inf) -> Restored:
        """Reads a checkpoint and verifies it: every array and the position in the data. All processes call it together.

        Args:
          like: by item, shapes, types and shardings (`jax.ShapeDtypeStruct`) to read into; other items are left alone.
          step: which one; None takes the newest that is good, and says so if that is not the newest.
          before: takes none of this step or later.

        Raises:
          UserError: there is none, or none that is good.
        """
        steps = self.steps(before)
        check(bool(steps), f"{self.folder}: no checkpoint; train first, or give another --workdir")
        check(step is None or step in steps,
              f"{self.folder}: no checkpoint of --step={step}; there are {', '.join(map(str, steps))}")
        wrong = {}
        for candidate in reversed(steps) if step is None else [step]:
            restored, problem = self._read(candidate, like)
            if restored is not None:
                for bad, reason in wrong.items() if self._chief else ():
                    self._say(f"{self.folder / str(bad)} is damaged: {reason}; taking that of step {candidate} instead")
                return restored
            wrong[candidate] = problem
            self._damaged.add(candidate)
        if step is not None:
            others = ", ".join(str(other) for other in steps if other != step)
            raise UserError(f"{self.folder / str(step)} is damaged: {wrong[step]}; "
                            + (f"take another --step ({others})" if others else "restore it from a copy"))
        listed = "; ".join(f"{bad}: {reason}" for bad, reason in wrong.items())
        raise UserError(f"{self.folder}: no good checkpoint ({listed}); restore one from a copy, or take another "
                        "--workdir; nothing was changed")

    def close(self) -> None:
        """Waits as `wait`, and releases the folder."""
        self.wait()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _read(self, step: int, like: Mapping[str, Any]) -> tuple[Restored | None, str]:
        """A checkpoint, or what is wrong with it; the same on all processes."""
        folder, read, problem, stored = self.folder / str(step), {}, "", None
        try:
            try:
                stored = manifests.read(folder)
                manifests.check_step(folder, stored)
                _check_wanted(stored, like)
                manifests.check_files(folder, stored, lambda part: part in (DATA, *like))
            except Unverified:
                if self._chief:
                    self._say(f"{folder} was written by an older version of moejax, without a manifest: it cannot be "
                              "verified")
            with manifests.as_damage(f"{DATA}/metadata"):
                data = manifests.read_json(folder / DATA / "metadata")
            for item, tree in like.items():
                read[item], wrong = arrays.read(folder / item, arrays.named(tree))
                for name in sorted(wrong)[:1]:
                    raise Damaged(f"array {item}/{name} {wrong[name]}")
        except Damaged as error:
            problem = str(error)
        if problem := _first(problem):
            return None, problem
        if stored is not None:
            names = [(item, name) for item in like for name in arrays.named(like[item])]
            found = _summed(np.array([read[item][name].digest for item, name in names], np.uint32).reshape(-1, 2))
            for (item, name), one in zip(names, found, strict=True):
                if digest.text(one) != stored.arrays[item][name].digest:
                    return None, f"array {item}/{name} is not what was saved (its hash differs)"
        items = {item: jax.tree.unflatten(jax.tree.structure(tree), [read[item][name].array for name in arrays.named(tree)])
                 for item, tree in like.items()}
        return Restored(step, items, data), ""

    def _seal(self, step: int, hashes: Any, value: float | None) -> None:
        """In the background: waits for Orbax, writes the manifest, gives the checkpoint its name, removes old ones."""
        try:
            self._writer.wait_until_finished()
            names = [(item, name) for item in hashes for name in hashes[item]]
            found = dict(zip(names, _gathered(f"hashes/{self._saves}", [hashes[item][name][2] for item, name in names])))
            if self._chief:
                part, place = self.folder / f"{step}.part", self.folder / str(step)
                stored = {item: {name: Stored(shape, np.dtype(dtype).name, digest.text(found[item, name]))
                                 for name, (shape, dtype, _) in named.items()} for item, named in hashes.items()}
                manifests.write(part, Manifest(step, time.time(), self._metric, value, stored, *manifests.take(part)))
                _remove(place)
                part.rename(place)
                manifests.sync(self.folder)
        except Exception as error:  # whatever it is, the run has its state and may go on
            self._fail(step, error)
            return
        self.failure = None
        if self._chief:
            self._damaged.discard(step)
            try:
                for old in superseded(self.folder, step, self._keep, self._metric, self._lower, self._damaged):
                    _remove(old)
                self._sweep()  # Orbax may write on for a while after it has failed
            except OSError as error:
                self._say(f"WARNING: {self.folder}: older checkpoints could not be removed ({error.strerror})")

    def _sweep(self) -> None:
        for path in self.folder.iterdir():
            if UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _fail(self, step: int, error: Exception) -> None:
        self._writer = None  # it would report the same error at the next save
        if self._chief:
            self._sweep()
        self.failure = NotSaved(step, reason := arrays.reason(error))
        self._say(f"WARNING: the checkpoint of step {step} could not be written to {self.folder} ({reason}); the older "
                  "ones are kept")


def superseded(folder: Path, step: int, keep: int, metric: str, lower: bool, damaged: Set[int]) -> list[Path]:
    """Checkpoints that may go when that of a step is there: all but the newest good ones and the best.

    Those of later steps stay and do not count: the run was taken up before them because they are damaged.

    Args:
      folder: of the checkpoints.
      step: of the newest.
      keep, metric, lower: as of `Store`.
      damaged: steps of those that are known to be, though a look at them does not tell.
    """
    good, values = [], {}
    for path in reversed(step_folders(folder)):
        if int(path.name) > step or int(path.name) in damaged:
            continue
        try:
            found = summary(path)
        except Damaged:
            continue
        good.append(path)
        if found.metric == metric and found.value is not None:
            values[path] = found.value if lower else -found.value
    best = min(values, key=lambda path: (values[path], -int(path.name)), default=None)
    kept = {*good[:keep], best}
    oldest = min((int(path.name) for path in good[:keep]), default=0)
    return [path for path in step_folders(folder) if path not in kept and int(path.name) <= step
            and (path in good or int(path.name) < oldest)]


class Summary(NamedTuple):
    """What a look at a checkpoint tells: its manifest, unless it is of an older version, and its value of a metric."""

    manifest: Manifest | None
    metric: str
    value: float | None


def summary(folder: Path) -> Summary:
    """Looks at a checkpoint without reading its arrays. Raises `Damaged` if files are missing or of another size."""
    try:
        stored = manifests.read(folder)
    except Unverified:
        with manifests.as_damage("metrics/metrics"):
            (metric, value), = manifests.read_json(folder / "metrics" / "metrics").items()
            return Summary(None, metric, float(value) if math.isfinite(value) else None)
    manifests.check_step(folder, stored)
    manifests.check_files(folder, stored)
    return Summary(stored, stored.metric, stored.value)


def _check_wanted(stored: Manifest, like: Mapping[str, Any]) -> None:
    """Raises `Damaged` unless a manifest has all arrays in the shapes and types that are wanted."""
    for item, tree in like.items():
        for name, leaf in arrays.named(tree).items():
            one = stored.arrays.get(item, {}).get(name)
            if one is None:
                raise Damaged(f"array {item}/{name} is not in it")
            if (one.shape, one.dtype) != (leaf.shape, np.dtype(leaf.dtype).name):
                raise Damaged(f"array {item}/{name} has shape {one.shape} and type {one.dtype}, where {leaf.shape} and "
                              f"{np.dtype(leaf.dtype).name} are wanted")


def step_folders(folder: Path) -> list[Path]:
    """What has a checkpoint's name in a folder `checkpoints`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if STEP.fullmatch(path.name)), key=lambda path: int(path.name))


def _digest(leaf: Any) -> list[Any]:
    """Of the parts for which this process answers; of what lies on hosts that is process 0."""
    if isinstance(leaf, jax.Array):
        return digest.on_devices(leaf)
    return [digest.on_host(np.asarray(leaf))] if jax.process_index() == 0 else []


def _gathered(name: str, parts_N: list[list[Any]]) -> list[np.ndarray]:
    """The hashes of N arrays from those of their parts in all processes, on process 0. It computes on no device, for it
    runs beside the training."""
    own = [digest.own_part(parts) for parts in parts_N]
    if jax.process_count() == 1:
        return own
    said = peers.gather(name, " ".join(map(digest.text, own)))
    return [digest.combine([digest.of_text(one) for one in of_all]) for of_all in zip(*(one.split() for one in said))]


def _remove(path: Path) -> None:
    """Removes a checkpoint so that a kill in the middle leaves nothing that has a checkpoint's name."""
    if path.is_dir():
        shutil.rmtree(path.rename(path.with_name(f"{path.name}.removed")))
    else:
        path.unlink(missing_ok=True)


def _first(problem: str) -> str:
    """The problem of the first process that has one; empty if there is none. All processes get the same."""
    if jax.process_count() == 1:
        return problem
    letters = np.zeros(512, np.uint8)
    sent = problem.encode()[:512]
    letters[:len(sent)] = list(sent)
    for row in multihost_utils.process_allgather(letters):
        if row.any():
            return bytes(row[row > 0]).decode(errors="replace")
    return ""


def _summed(parts_N2: np.ndarray) -> np.ndarray:
    """Hashes of parts, added over processes."""
    return parts_N2 if jax.process_count() == 1 else digest.combine(multihost_utils.process_allgather(parts_N2))


def place(shapes: Any, shardings: Any) -> Any:
    """Joins shapes and shardings to what `Store.restore` wants."""
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
