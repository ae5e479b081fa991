"""Records of a run: one JSON object a line in metrics.jsonl, and the same numbers for TensorBoard."""

import json
import math
from pathlib import Path
from typing import Any, Sequence

import jax
import numpy as np

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
    """Appends records to a workdir. Only process 0 of a multi-host run should make one."""

    def __init__(self, workdir: Path):
        from tensorboardX import SummaryWriter  # slow to import, and of no use to those who only load a model
        self._path = workdir / "metrics.jsonl"
        self._events = SummaryWriter(str(workdir / "tensorboard"))
        self._end_last_line()

    def _end_last_line(self) -> None:
        """A killed run may leave half a line; start on a new one."""
        if self._path.exists() and (text := self._path.read_bytes()) and not text.endswith(b"\n"):
            with self._path.open("ab") as file:
                file.write(b"\n")

    def write(self, record: dict[str, Any]) -> None:
        """Adds one record; it must hold `step` and `split`."""
        with self._path.open("a") as file:
            file.write(json.dumps(record := finite(record), allow_nan=False) + "\n")
        for name, value in record.items():
            if isinstance(value, list) and all(isinstance(entry, (int, float)) for entry in value):
                for layer, entry in enumerate(value):
                    self._events.add_scalar(f"{record['split']}/{name}/layer_{layer}", entry, record["step"])
            elif isinstance(value, (int, float)) and name != "step":
                self._events.add_scalar(f"{record['split']}/{name}", value, record["step"])
        self._events.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._events.close()


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
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[record["step"], record["split"]] = record
    return sorted(records.values(), key=lambda record: (record["step"], record["split"] == "eval"))
