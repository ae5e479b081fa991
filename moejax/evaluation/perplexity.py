"""Loss, accuracy and routing over a held-out set."""

import math
from functools import partial
from typing import Any, Callable, Iterable, Mapping, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Sharding

from moejax.metrics.record import total_records
from moejax.models.transformer import in_order
from moejax.moe.types import LayerRecord


class Evaluation(NamedTuple):
    """Results over a whole set.

    Attributes:
      means: of what the objective reports for each target; `loss` in nats, `accuracy` where there is one; and where the
        objective counts rows, `sequence_accuracy`, the share of rows without an error.
      targets: number of targets.
      records: of the sparse layers in order; loads are sums, losses are means over the batches.
      scores, labels: of all rows with a label, in order, if the model scores classes; else None.
    """

    means: dict[str, float]
    targets: int
    records: list[LayerRecord]
    scores: np.ndarray | None
    labels: np.ndarray | None


def make_eval_step(forward: Callable[..., tuple[Array, Any]], objective: Callable[..., tuple[Array, dict[str, Array]]],
                   where: Sharding | None = None, options: Mapping[str, str] | None = None, with_scores: bool = False
                   ) -> Callable[..., tuple[dict[str, Array], Any, Any]]:
    """A jitted (params, router_state, batch) -> (sums, records in order, (scores, labels, mask) or None).

    Args:
      forward: (params, router_state, batch) -> (x, records).
      objective: (params, x, batch) -> (sum to minimise, sums to report).
      where: the results are to lie.
      options: for the compiler.
      with_scores: whether x holds the scores of rows, which are kept.
    """
    @partial(jax.jit, out_shardings=where, compiler_options=options)
    def eval_step(params: Any, router_state: Any, batch: Mapping[str, Array]) -> tuple[dict[str, Array], Any, Any]:
        x, records = forward(params, router_state, batch)
        _, sums = objective(params, x, batch)
        told = [record.replace(statistics={}) for record in in_order(records)]
        scores = (x, batch["targets"], batch["mask"]) if with_scores else None
        return sums | {"targets": batch["mask"].sum()}, told, scores
    return eval_step


def evaluate(eval_step: Callable[..., tuple[dict[str, Array], Any, Any]], params: Any, router_state: Any,
             batches: Iterable[Mapping[str, Array]]) -> Evaluation:
    """Runs `eval_step` over all batches. Padded rows count for nothing; sums are kept in float64."""
    results = jax.device_get([eval_step(params, router_state, batch) for batch in batches])
    sums = {name: math.fsum(float(result[0][name]) for result in results) for name in results[0][0]}
    targets, rows = sums.pop("targets"), sums.pop("rows", None)
    of_rows = {} if rows is None else {"sequence_accuracy": sums.pop("faultless") / max(rows, 1)}
    scores = labels = None
    if results[0][2] is not None:
        scores, labels, mask = (np.concatenate(parts) for parts in zip(*(result[2] for result in results)))
        scores, labels = scores[mask], labels[mask]
    return Evaluation({name: total / max(targets, 1) for name, total in sums.items()} | of_rows, int(targets),
                      total_records([result[1] for result in results]), scores, labels)


def bits_per_byte(loss: float, tokens: int, size: int) -> float:
    """Nats per token as bits per byte of the text.

    Args:
      loss: mean nats per target.
      tokens: targets in the whole text.
      size: bytes of the whole text in UTF-8.
    """
    return loss / math.log(2) * tokens / size
