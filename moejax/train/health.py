"""Whether steps were sound: which losses are spikes, and how many steps were skipped in a row."""

import math
import statistics
from typing import Any, Mapping, NamedTuple, Sequence

import jax
import numpy as np

from moejax.faults import Faults

SCALE = 1.4826
"""Makes the median absolute deviation of a normal distribution its standard deviation."""


class Outcome(NamedTuple):
    """What a step reported: its loss, and whether it changed nothing."""

    loss: float
    skipped: bool


class Health(NamedTuple):
    """What is known of the steps done.

    Attributes:
      recent: losses of the last steps that were not skipped, oldest first, as many as a spike is compared with.
      skipped: steps that were skipped in all.
      in_row: of these, the last ones without another between.
    """

    recent: tuple[float, ...] = ()
    skipped: int = 0
    in_row: int = 0

    def after(self, options: Faults, outcomes: Sequence[Outcome]) -> "Health":
        """What is known after more steps."""
        recent, skipped, in_row = list(self.recent), self.skipped, self.in_row
        for outcome in outcomes:
            if outcome.skipped:
                skipped, in_row = skipped + 1, in_row + 1
            else:
                recent, in_row = [*recent, outcome.loss], 0
        kept = recent[-options.spike_window:] if options.spike is not None else ()
        return Health(tuple(kept), skipped, in_row)

    def limit(self, options: Faults) -> float:
        """The largest loss of the next steps that is no spike."""
        if options.spike is None or len(self.recent) < options.spike_window:
            return math.inf
        middle = statistics.median(self.recent)
        return middle + options.spike * SCALE * statistics.median(abs(loss - middle) for loss in self.recent)

    def exhausted(self, options: Faults) -> bool:
        """Whether as many steps in a row were skipped as the run puts up with."""
        return options.max_skipped is not None and self.in_row >= options.max_skipped

    def saved(self) -> dict[str, Any]:
        """For a checkpoint, ready for JSON."""
        return self._asdict() | {"recent": list(self.recent)}


def restored(saved: dict[str, Any] | None) -> Health:
    """From a checkpoint, or a fresh one for None."""
    return Health(tuple(saved["recent"]), saved["skipped"], saved["in_row"]) if saved else Health()


LAG = 2
"""Steps that stay unread, so that the host never waits for the device. Health is that of the steps before them, whenever
it is asked for: so a run that was stopped in between takes the same decisions."""


class Watch:
    """Keeps the health of a run up to date.

    Args:
      options: of the run.
      saved: by `saved` in a checkpoint; None begins anew.
    """

    def __init__(self, options: Faults, saved: dict[str, Any] | None = None):
        self._options = options
        self.health = restored(saved and saved["health"])
        if self.exhausted():  # the run that ended so goes on: by another config, or because it was asked to
            self.health = self.health._replace(in_row=0, recent=())  # what seemed to be spikes may be how losses are now
        self._unread: list[Any] = [Outcome(*one) for one in saved["unread"]] if saved else []

    def limit(self) -> tuple[np.float32, ...]:
        """What the next step takes beside state and batch: the largest loss that is no spike, if there is one."""
        return () if self._options.spike is None else (np.float32(self.health.limit(self._options)),)

    def add(self, means: Mapping[str, jax.Array]) -> None:
        """Takes the report of a step."""
        self._unread.append(Outcome(means["loss"], means["skipped"]))
        done, self._unread = self._unread[:-LAG], self._unread[-LAG:]
        self.health = self.health.after(self._options, self._fetched(done))

    def exhausted(self) -> bool:
        """Whether the run has to end; see `Health.exhausted`."""
        return self.health.exhausted(self._options)

    def since_skipped(self) -> int:
        """How many steps ago the last one was that was skipped, among those that are unread; `LAG` if it was before."""
        last = [outcome.skipped for outcome in self._fetched(self._unread)][::-1]
        return last.index(True) if True in last else LAG

    def saved(self) -> dict[str, Any]:
        """For a checkpoint, ready for JSON; waits for the last steps."""
        return {"health": self.health.saved(), "unread": [list(one) for one in self._fetched(self._unread)]}

    def _fetched(self, outcomes: Sequence[Any]) -> list[Outcome]:
        return [Outcome(float(loss), bool(skipped)) for loss, skipped in jax.device_get(list(outcomes))]
