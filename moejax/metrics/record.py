"""Records of a run: one JSON object a line in metrics.jsonl, and the same numbers for TensorBoard."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.bounded import parse_json, writing
from moejax.moe.types import ExpertLoad, LayerRecord


def total_records(batches: Sequence[Sequence[LayerRecord]]) -> list[LayerRecord]:
    """Layer records of several batches as one a layer: counts are summed in float64, losses averaged over the batches."""
    layers = [jax.tree.map(lambda *parts: np.sum(np.asarray(parts, np.float64), axis=0), *layer)
              for layer in zip(*batches)]
    return [layer.replace(losses={name: total / len(batches) for name, total in layer.losses.items()})
            for layer in layers]


def routing_summary(records: Sequence[LayerRecord]) -> dict[str, Any]:
    """What the routers did, layer by layer.

    Args:
      records: of the sparse layers in order, as numpy arrays, summed over the batch or the evaluation set.

    Returns:
      Lists with one entry a sparse layer: `moe/load` (share of the pairs per expert, before dropping), `moe/dropped`
      (share of the pairs), `moe/replayed` (share that did not fit in a transport's buffers, so that the layer took
      another), `moe/entropy` (mean nats a token of the router's distribution), `moe/max_vio` (largest load over the mean,
      less 1; 2408.15664), `moe/dead` (experts without a token).

    Raises:
      RuntimeError: an expert received other than what was sent to it less what was dropped. Never the user's fault.
    """
    summary = {f"moe/{name}": [] for name in ("load", "dropped", "replayed", "entropy", "max_vio", "dead")}
    for layer, record in enumerate(records):
        check_accounts(layer, record.load)
        assigned_E = np.asarray(record.load.assigned_E, np.float64)
        pairs = max(assigned_E.sum(), 1.0)
        summary["moe/load"].append([round(share, 6) for share in (assigned_E / pairs).tolist()])
        summary["moe/dropped"].append(float(np.asarray(record.load.dropped_E).sum() / pairs))
        summary["moe/replayed"].append(float(np.asarray(record.load.replayed_E).sum() / pairs))
        summary["moe/entropy"].append(float(record.load.entropy / max(int(record.load.tokens), 1)))
        summary["moe/max_vio"].append(float(assigned_E.max() / (pairs / len(assigned_E)) - 1))
        summary["moe/dead"].append(int((assigned_E == 0).sum()))
    return summary if records else {}


def check_accounts(layer: int, load: ExpertLoad) -> None:
    """Raises `RuntimeError` unless every expert received what was sent to it less what was dropped."""
    sent_E, dropped_E, received_E = (np.asarray(a) for a in (load.assigned_E, load.dropped_E, load.received_E))
    for expert in np.flatnonzero(sent_E != received_E + dropped_E)[:1]:
        raise RuntimeError(f"sparse layer {layer}, expert {expert}: {sent_E[expert]:.0f} pairs were sent, "
                           f"{received_E[expert]:.0f} received and {dropped_E[expert]:.0f} dropped; tokens were lost on "
                           "the way, which is a defect of moejax: please report it with config.json")


def loss_summary(records: Sequence[LayerRecord]) -> dict[str, list[float]]:
    """`aux/NAME`: each router loss, unweighted, one entry a sparse layer."""
    names = records[0].losses if records else ()
    return {f"aux/{name}": [float(record.losses[name]) for record in records] for name in names}


class Recorder:
    """Appends records to a workdir. Only process 0 of a multi-host run should make one.

    A record that cannot be written (the disk is full) is left out whole, with a line on stderr, and the run goes on.
    """

    def __init__(self, workdir: Path):
        # Slow to import, and of no use to those who only load a model. Not its SummaryWriter: that hands everything to a
        # thread, which ends at the first error, and then the run waits for it for ever.
        from tensorboardX.event_file_writer import EventsWriter
        self._path = workdir / "metrics.jsonl"
        with writing(workdir / "tensorboard"):
            (workdir / "tensorboard").mkdir(exist_ok=True)
            self._events = EventsWriter(str(workdir / "tensorboard" / "events"), f".{time.time_ns()}")
        with writing(self._path):
            self._end_last_line()

    def _end_last_line(self) -> None:
        """A killed run may leave half a line; start on a new one."""
        if self._path.exists() and (text := self._path.read_bytes()) and not text.endswith(b"\n"):
            self._append("")

    def go_on_after(self, step: int) -> None:
        """Takes out what a killed run recorded after the step from which this one goes on, and lines torn by the kill."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        if not self._path.exists():
            return
        lines = self._path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if (record := _parsed(line)) is not None and record["step"] <= step]
        if len(kept) == len(lines):
            return
        part = self._path.with_name(f".{self._path.name}.part")
        with self._or_warn():
            part.write_bytes(b"".join(kept))
            os.replace(part, self._path)
        with self._or_warn():
            self._events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
            self._events.flush()

    def write(self, record: dict[str, Any]) -> None:
        """Adds one record; it must hold `step` and `split`."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar
        record, values = finite(record), {}
        self._append(json.dumps(record, allow_nan=False))
        for name, value in record.items():
            if isinstance(value, list) and all(isinstance(entry, (int, float)) for entry in value):
                values |= {f"{record['split']}/{name}/layer_{layer}": entry for layer, entry in enumerate(value)}
            elif isinstance(value, (int, float)) and name != "step":
                values[f"{record['split']}/{name}"] = value
        with self._or_warn():
            for name, value in values.items():
                self._events.write_event(Event(wall_time=time.time(), step=record["step"], summary=scalar(name, value)))
            self._events.flush()

    def close(self) -> None:
        """Closes the event file."""
        with self._or_warn():
            self._events.close()

    def _append(self, line: str) -> None:
        size = self._path.stat().st_size if self._path.exists() else 0
        with self._or_warn():
            try:
                with self._path.open("ab") as file:
                    file.write(line.encode() + b"\n")
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self._path, size)
                raise

    @contextlib.contextmanager
    def _or_warn(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError):  # stderr may be a file on the same disk
                print(f"moejax: WARNING: {self._path.parent}: a record could not be written ({error.strerror})",
                      file=sys.stderr, flush=True)


def finite(value: Any) -> Any:
    """None in place of numbers that JSON does not have, in dicts and lists too."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(workdir: Path) -> list[dict[str, Any]]:
    """All records of a workdir in order of steps.

    A line torn by a kill is passed over. Steps that were done again after a kill come once, as they were done last.
    """
    records = {}
    for line in (workdir / "metrics.jsonl").read_bytes().splitlines():
        if (record := _parsed(line)) is not None:
            records[record["step"], record["split"]] = record
    return sorted(records.values(), key=lambda record: (record["step"], record["split"] == "eval"))


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if the line is torn or of another origin."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int) and isinstance(record.get("split"), str)
    return record if whole else None
