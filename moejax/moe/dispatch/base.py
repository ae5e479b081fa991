"""What a dispatcher is: three functions and what they need to know."""

from typing import Any, Callable, NamedTuple

from jax import Array

from moejax.moe.types import Assignments


class Sizes(NamedTuple):
    """What a plan is made for, all counted on one device.

    Attributes:
      tokens: T.
      experts: those that this device holds.
      spare: rows that the experts want behind theirs, at least.
      multiple: what the number of all rows must be a multiple of.
      buffer_factor: rows that a device has room to receive, over its own number of pairs; None for the worst case.
        Only bounded transports ask for it.
    """

    tokens: int
    experts: int
    spare: int
    multiple: int = 1
    buffer_factor: float | None = None


class Dispatcher(NamedTuple):
    """One way to bring tokens to experts and results back.

    Attributes:
      plan: (assignments, sizes) -> plan; on a mesh, this device's part of the list. `plan.sizes_E` counts the rows that
        reached each expert of this device.
      dispatch: (x_TD, plan) -> rows for the experts.
      combine: (rows, plan) -> y_TD.
      manual: whether it runs inside `jax.shard_map`, with rows grouped by expert.
      splits_experts: whether each device of the expert axis holds its own experts, or all of them.
      reaches_all: whether a list may name tokens of other devices.
      bounded: whether its buffers may be too small, and `plan.lost_E` counts this device's pairs that found no place.
    """

    plan: Callable[[Assignments, Sizes], Any]
    dispatch: Callable[[Array, Any], Array]
    combine: Callable[[Array, Any], Array]
    manual: bool = True
    splits_experts: bool = True
    reaches_all: bool = False
    bounded: bool = False
