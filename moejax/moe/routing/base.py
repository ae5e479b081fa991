"""What a router is: five pure functions and a line of metadata."""

from typing import Callable, Mapping, NamedTuple

from jax import Array

from moejax.config import MoEConfig
from moejax.moe.types import RouterOutput, RoutingContext


class Parameter(NamedTuple):
    """Shape, logical axes and initial standard deviation of a router parameter (always float32)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    stddev: float


class Router(NamedTuple):
    """One routing algorithm.

    Attributes:
      parameters: (config, D) -> its learned parameters by name.
      initial_state: config -> its state by name, carried between optimizer steps but not learned; {} for none.
      route: (config, parameters, state, x_TD, context) -> RouterOutput. score -> select -> weight -> losses.
      update: (config, state, statistics) -> state, once per optimizer step, with the statistics of the whole batch.
      loss_weights: config -> the weight of each of its losses by name.
      paper: where it was published.
      causal: whether the choice for a token never depends on later tokens.
      needs_token_ids: whether it reads the tokens' ids.
    """

    parameters: Callable[[MoEConfig, int], dict[str, Parameter]]
    initial_state: Callable[[MoEConfig], dict[str, Array]]
    route: Callable[[MoEConfig, Mapping[str, Array], Mapping[str, Array], Array, RoutingContext], RouterOutput]
    update: Callable[[MoEConfig, Mapping[str, Array], Mapping[str, Array]], dict[str, Array]]
    loss_weights: Callable[[MoEConfig], dict[str, float]]
    paper: str
    causal: bool
    needs_token_ids: bool = False


def no_state(config: MoEConfig) -> dict[str, Array]:
    """The initial state of a router that has none."""
    return {}


def keep_state(config: MoEConfig, state: Mapping[str, Array], statistics: Mapping[str, Array]) -> dict[str, Array]:
    """The update of a router whose state never changes."""
    return dict(state)
