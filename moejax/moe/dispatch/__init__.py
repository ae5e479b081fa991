"""HOW TOKENS MOVE: one file per transport, one interface: plan, dispatch, combine."""

from typing import Any, Callable, NamedTuple

from jax import Array

from moejax.moe.dispatch import all_gather, dense, sort
from moejax.moe.types import Assignments


class Dispatcher(NamedTuple):
    """One way to bring tokens to experts and results back.

    Attributes:
      plan: (assignments, tokens, experts, alignment) -> plan; on a mesh, all counted on one device.
      dispatch: (x_TD, plan) -> rows for the experts.
      combine: (rows, plan) -> y_TD.
      manual: whether it runs inside `jax.shard_map`, with rows grouped by expert (plan.sizes_E).
      splits_experts: whether each device of the expert axis holds its own experts, or all of them.
    """

    plan: Callable[[Assignments, int, int, int], Any]
    dispatch: Callable[[Array, Any], Array]
    combine: Callable[[Array, Any], Array]
    manual: bool
    splits_experts: bool


DISPATCHERS: dict[str, Dispatcher] = {
    "dense": Dispatcher(dense.plan, dense.dispatch, dense.combine, manual=False, splits_experts=True),
    "sort": Dispatcher(sort.plan, sort.dispatch, sort.combine, manual=True, splits_experts=False),
    "all_gather": Dispatcher(all_gather.plan, all_gather.dispatch, all_gather.combine, manual=True, splits_experts=True),
}

__all__ = ["DISPATCHERS", "Dispatcher"]
