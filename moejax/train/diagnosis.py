"""What was not a finite number in a step: a parameter, a block's output, the loss, or a gradient; whichever comes first."""

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import Config
from moejax.models.stacks import places
from moejax.sharding import flat
from moejax.train.state import TrainState
from moejax.train.step import Batch, Functions, gradients

SOUND = "all parameters, outputs and gradients are finite"


class Findings(NamedTuple):
    """Whether all numbers are finite.

    Attributes:
      params: bool in the structure of the parameters.
      outputs: by stack and `after_` block, a tuple with bool [repeats].
      loss: of the batch.
      grads: bool in the structure of the parameters that move.
    """

    params: Any
    outputs: dict[str, dict[str, tuple[Array]]]
    loss: Array
    grads: Any


def examine(functions: Functions, outputs: Callable[..., Any], parts: int, state: TrainState,
            batch: Batch, back: Array | int = 0) -> Findings:
    """Does a step over again, as far as the gradients, and looks at what it is made of.

    Args:
      functions: of the step.
      outputs: (params, router_state, batch, key, totals) -> `Findings.outputs`.
      parts: micro-batches.
      state: before the step, or after it and others that changed nothing.
      batch: of it.
      back: how many those were.
    """
    state = state.replace(step=state.step - back)
    def finite(tree: Any) -> Any:
        return jax.tree.map(lambda a: jnp.all(jnp.isfinite(a)), tree)
    grads, means, _ = gradients(functions, state, batch, parts)
    key = jax.random.fold_in(state.key, state.step)
    seen = outputs(state.params, state.router_state, batch, key, functions.totals(batch))
    return Findings(finite(state.params), seen, jnp.isfinite(means["loss"]), finite(grads))


def first_unsound(config: Config, findings: Findings) -> str:
    """What came first that was no finite number, by name; the config is resolved."""
    found = jax.device_get(findings)
    bad = ["/".join(path) for path, sound in flat(found.params).items() if not sound]
    if bad:
        return f"parameter {named(bad)} holds what is no finite number"
    for number, (stack, block, repeat) in enumerate(places(config.model, config.moe)):
        if not found.outputs[stack][f"after_{block}"][0][repeat]:
            return f"the output of block {number} ({stack}/{block}, repeat {repeat}) is the first that is not finite"
    if not found.loss:
        return "the outputs of all blocks are finite, the loss is not"
    bad = ["/".join(path) for path, sound in flat(found.grads).items() if not sound]
    if bad:
        return f"the loss is finite, the gradient of {named(bad)} is not"
    return SOUND


def named(names: list[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] + (f" (and of {len(names) - 1} more)" if len(names) > 1 else "")
