"""The best evaluation of a run: what early stopping goes by, and which checkpoint is kept."""

import math
from typing import Any, Mapping, NamedTuple

from moejax.finetune import Finetune


class Best(NamedTuple):
    """The best evaluation so far.

    Attributes:
      step: at which it was; None before the first.
      value: of the metric.
      since: evaluations after it, none of them better.
      metric: of which it is the best.
    """

    step: int | None = None
    value: float | None = None
    since: int = 0
    metric: str = "loss"

    def after(self, options: Finetune, record: Mapping[str, Any]) -> "Best":
        """The best with one more evaluation; a metric that is not defined there is not better."""
        value = record.get(options.metric, math.nan)
        if options.better(value, self.value):
            return Best(record["step"], value, metric=options.metric)
        return self._replace(since=self.since + 1)

    def exhausted(self, options: Finetune) -> bool:
        """Whether as many evaluations in a row were not better as the run has patience for."""
        return options.patience is not None and self.since >= options.patience

    def said(self, options: Finetune) -> str:
        """For people."""
        if self.value is None:
            return f"{options.metric.replace('_', ' ')} was never a number"
        return f"best {options.metric.replace('_', ' ')} {self.value:.4f} at step {self.step}"
