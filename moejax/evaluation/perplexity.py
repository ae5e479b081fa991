"""Language-model loss, accuracy and routing over a held-out set."""

import math
from functools import partial
from typing import Any, Callable, Iterable, Mapping, NamedTuple

import jax
from jax import Array
from jax.sharding import Sharding

from moejax.metrics.record import total_records
from moejax.models.transformer import in_order
from moejax.moe.types import LayerRecord


class Evaluation(NamedTuple):
    """Results over a whole set.

    Attributes:
      loss: negative log-likelihood per target, in nats.
      accuracy: share of the targets that the model ranks first.
      targets: number of targets.
      records: of the sparse layers in order; loads are sums, losses are means over the batches.
    """

    loss: float
    accuracy: float
    targets: int
    records: list[LayerRecord]


def make_eval_step(forward: Callable[..., tuple[Array, Any]], objective: Callable[..., tuple[Array, dict[str, Array]]],
                   where: Sharding | None = None, options: Mapping[str, str] | None = None
                   ) -> Callable[..., tuple[dict[str, Array], Any]]:
    """A jitted (params, router_state, batch) -> (sums, records in order).

    Args:
      forward: (params, router_state, batch) -> (x_BLD, records).
      objective: (params, x_BLD, targets_BL, mask_BL) -> (sum to minimise, sums to report).
      where: the results are to lie.
      options: for the compiler.
    """
    @partial(jax.jit, out_shardings=where, compiler_options=options)
    def eval_step(params: Any, router_state: Any, batch: Mapping[str, Array]) -> tuple[dict[str, Array], Any]:
        x_BLD, records = forward(params, router_state, batch)
        _, sums = objective(params, x_BLD, batch["targets"], batch["mask"])
        told = [record.replace(statistics={}) for record in in_order(records)]
        return sums | {"targets": batch["mask"].sum()}, told
    return eval_step


def evaluate(eval_step: Callable[..., tuple[dict[str, Array], Any]], params: Any, router_state: Any,
             batches: Iterable[Mapping[str, Array]]) -> Evaluation:
    """Runs `eval_step` over all batches. Padded rows count for nothing; sums are kept in float64."""
    results = jax.device_get([eval_step(params, router_state, batch) for batch in batches])
    sums = {name: math.fsum(float(result[0][name]) for result in results) for name in results[0][0]}
    targets = max(sums["targets"], 1)
    return Evaluation(sums["loss"] / targets, sums["accuracy"] / targets, int(sums["targets"]),
                      total_records([result[1] for result in results]))


def bits_per_byte(loss: float, tokens: int, size: int) -> float:
    """Nats per token as bits per byte of the text.

    Args:
      loss: mean nats per target.
      tokens: targets in the whole text.
      size: bytes of the whole text in UTF-8.
    """
    return loss / math.log(2) * tokens / size
