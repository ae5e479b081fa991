"""What a router is: pure functions and some lines of metadata."""

import dataclasses
from types import MappingProxyType
from typing import Any, Callable, Mapping, NamedTuple

from jax import Array

from moejax.config import MoEConfig, check
from moejax.moe.types import RouterOutput, RoutingContext


class Parameter(NamedTuple):
    """Shape, logical axes and initial values (normal: standard deviation, mean) of a router parameter, always float32."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    stddev: float
    mean: float = 0.0


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of a router that the keys of `config.moe` describe in full."""


def no_parameters(config: MoEConfig, width: int) -> dict[str, Parameter]:
    """The parameters of a router that learns nothing."""
    return {}


def no_state(config: MoEConfig, vocab_size: int) -> dict[str, Array]:
    """The initial state of a router that has none."""
    return {}


def keep_state(config: MoEConfig, state: Mapping[str, Array], statistics: Mapping[str, Array]) -> dict[str, Array]:
    """The update of a router whose state never changes."""
    return dict(state)


def no_losses(config: MoEConfig) -> dict[str, float]:
    """The loss weights of a router without losses."""
    return {}


def z_loss_alone(config: MoEConfig) -> dict[str, float]:
    """The loss weights of a router that has only the router z-loss."""
    return {"router_z": config.z_weight}


def balance_and_z(config: MoEConfig) -> dict[str, float]:
    """The loss weights of a router with a load-balancing loss and the router z-loss."""
    return {"balance": config.balance_weight, "router_z": config.z_weight}


def balances_whole(config: MoEConfig) -> bool:
    """Whether a load-balancing loss over the whole batch is in use."""
    return config.balance_weight > 0 and config.balance_scope == "global"


def refuse_constant_weight(config: MoEConfig) -> None:
    """Raises `UserError` on a single renormalised choice, whose router would never learn."""
    check(not (config.experts_per_token == 1 and config.renormalize),
          "config.moe.renormalize=True with config.moe.experts_per_token=1 makes every weight 1, so the router gets no "
          "gradient; set config.moe.renormalize=False")


def never(config: MoEConfig) -> bool:
    """No, whatever the config."""
    return False


def jitters(config: MoEConfig) -> bool:
    """Whether the router's input is multiplied by noise."""
    return config.jitter > 0


def accept(config: MoEConfig) -> None:
    """Accepts every config."""


class Router(NamedTuple):
    """One routing algorithm.

    Attributes:
      paper: what it is called and where it was published, for people.
      arxiv: the paper's number, or "" if it is not there.
      rule: what it does, in a few words.
      route: (config, parameters, state, x_TD, context) -> RouterOutput. score -> select -> weight -> losses.
      causal: whether in training the choice for a token never depends on later tokens (dropless).
      evaluation: how evaluation and generation differ from training, in a few words; "" if they do not.
      generates: whether its evaluation rule needs nothing but the token itself, so that it can generate.
      variable: whether the number of experts differs from token to token.
      needs_token_ids: whether it reads the tokens' ids (other than to break ties).
      defaults: values of the keys of `config.moe` that are left to the router (`auto`).
      options: a frozen dataclass of `key` fields with the router's own options at their defaults.
      parameters: (config, D) -> its learned parameters by name.
      initial_state: (config, V) -> its state by name, carried between optimizer steps but not learned.
      update: (config, state, statistics) -> state, once per optimizer step, with the statistics of the whole batch.
      pools_layers: whether `update` gets statistics summed over all sparse layers, so that these share one state.
      loss_weights: config -> the weight of each of its losses by name.
      noisy: config -> whether it draws random numbers in training.
      needs_whole: config -> whether some loss needs `context.whole` when the batch comes in parts.
      carry: config -> number of values a token that it hands on to the router of the next sparse layer.
      by_group: whether it decides among the tokens of `config.moe.routing_group`.
      passes: (config, L) -> passes through one expert that a token of a sequence of L costs on average; for a router of
        level `block`, passes through the block.
      level: what it routes tokens to: experts in a `layer`, or through or past a whole `block`.
      check: config -> None; raises `UserError` on what the rule cannot do.
    """

    paper: str
    arxiv: str
    rule: str
    route: Callable[[MoEConfig, Mapping[str, Array], Mapping[str, Array], Array, RoutingContext], RouterOutput]
    causal: bool = True
    evaluation: str = ""
    generates: bool = True
    variable: bool = False
    needs_token_ids: bool = False
    defaults: Mapping[str, Any] = MappingProxyType({})
    options: Any = NoOptions()
    parameters: Callable[[MoEConfig, int], dict[str, Parameter]] = no_parameters
    initial_state: Callable[[MoEConfig, int], dict[str, Array]] = no_state
    update: Callable[[MoEConfig, Mapping[str, Array], Mapping[str, Array]], dict[str, Array]] = keep_state
    pools_layers: bool = False
    loss_weights: Callable[[MoEConfig], dict[str, float]] = no_losses
    noisy: Callable[[MoEConfig], bool] = never
    needs_whole: Callable[[MoEConfig], bool] = never
    carry: Callable[[MoEConfig], int] = lambda config: 0
    by_group: bool = False
    passes: Callable[[MoEConfig, int], float] = lambda config, length: config.experts_per_token
    level: str = "layer"
    check: Callable[[MoEConfig], None] = accept
