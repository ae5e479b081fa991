"""Checkpoints of a run, with Orbax: written in the background, the newest few and the best kept."""

import math
from pathlib import Path
from typing import Any, Mapping, NamedTuple

import jax
import orbax.checkpoint as ocp

from moejax.config import check


class Restored(NamedTuple):
    """What was read of a checkpoint: its step, the items asked for, and the position in the data."""

    step: int
    items: dict[str, Any]
    data: dict[str, Any]


class Store:
    """The folder `checkpoints` of a workdir.

    Args:
      workdir: of the run.
      keep: newest checkpoints to keep.
      read_only: write nothing, not even the folder.
      metric: of evaluations; the checkpoint with the best value is kept beside the newest.
      lower: whether the lowest value is the best.
    """

    def __init__(self, workdir: Path, keep: int = 2, read_only: bool = False, metric: str = "loss", lower: bool = True):
        self.folder = (workdir / "checkpoints").absolute()
        self._metric, self._worst = metric, math.inf if lower else -math.inf
        managers = ocp.checkpoint_managers
        best = managers.BestN(n=1, get_metric_fn=self._value, reverse=lower)
        # Without best_fn Orbax would not write the metrics, and a continued run would forget which checkpoint is best.
        # Its own read_only is not used, for it warns on stderr each time; with these options it writes nothing either.
        self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(keep), best]), best_fn=self._value,
            best_mode="min" if lower else "max", create=not read_only, cleanup_tmp_directories=not read_only))

    def save(self, step: int, items: Mapping[str, Any], data: dict[str, Any], value: float | None) -> None:
        """Starts writing a checkpoint; returns as soon as the arrays are copied, so they may be donated.

        Args:
          step: optimizer steps done.
          items: trees of arrays by name.
          data: position in the data, ready for JSON.
          value: of the metric in an evaluation at this step, if there was one; otherwise, and if it is not a number, the
            checkpoint is never the best.
        """
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**arrays, data=ocp.args.JsonSave(data)),
                           metrics={self._metric: self._worst if value is None or math.isnan(value) else value})

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def restore(self, like: Mapping[str, Any], step: int | None = None) -> Restored:
        """Reads a checkpoint.

        Args:
          like: by item, shapes, types and shardings (`jax.ShapeDtypeStruct`) to read into; other items are left alone.
          step: which one; None takes the newest.

        Raises:
          UserError: there is none.
        """
        steps = self.steps()
        check(bool(steps), f"{self.folder}: no checkpoint; train first, or give another --workdir")
        step = steps[-1] if step is None else step
        check(step in steps, f"{self.folder}: no checkpoint of --step={step}; there are {', '.join(map(str, steps))}")
        arrays = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        read = self._manager.restore(step, args=ocp.args.Composite(**arrays, data=ocp.args.JsonRestore()))
        return Restored(step, {name: read[name] for name in like}, read["data"])

    def close(self) -> None:
        """Waits until everything is on disk, and releases the folder."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _value(self, metrics: Mapping[str, float]) -> float:
        return metrics.get(self._metric, self._worst)


def place(shapes: Any, shardings: Any) -> Any:
    """Joins shapes and shardings to what `Store.restore` wants."""
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
