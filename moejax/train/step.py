"""One optimizer step as a pure function. The model, the objective and the router update arrive as functions."""

import math
from typing import Any, Callable, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from moejax.moe.types import LayerRecord
from moejax.train.adam import where_sound
from moejax.train.optimizer import global_norm
from moejax.train.state import TrainState

Batch = Mapping[str, Array]
"""Arrays of B rows: what the model reads, and targets and mask, which may be of other shapes; see `moejax.data`."""


class Functions(NamedTuple):
    """What a step is made of.

    Attributes:
      split: params -> (those that move, those that stay).
      join: puts them together again.
      counted: gradients of those that move -> the same with zeros for the parts of them that stay.
      totals: batch -> the `totals` argument of `forward`.
      forward: (params, router_state, batch, train, key, totals, wholes) -> (x, records), x being what the objective takes.
      objective: (params, x, batch) -> (sum to minimise, sums to report).
      measure: the same, with what evaluations report.
      wholes: records -> the `wholes` argument of `forward`; None if no loss needs the statistics of the whole batch.
      update_router: (router_state, records) -> router_state.
      loss_weights: weight of each router loss, which is averaged over the sparse layers.
    """

    split: Callable[[Any], tuple[Any, Any]]
    join: Callable[[Any, Any], Any]
    counted: Callable[[Any], Any]
    totals: Callable[[Batch], Any]
    forward: Callable[..., tuple[Array, Any]]
    objective: Callable[[Any, Array, Batch], tuple[Array, dict[str, Array]]]
    measure: Callable[[Any, Array, Batch], tuple[Array, dict[str, Array]]]
    wholes: Callable[[Any], Any] | None
    update_router: Callable[[Any, Any], Any]
    loss_weights: Mapping[str, float]


def auxiliary_loss(records: Any, weights: Mapping[str, float]) -> Array:
    """The weighted router losses, averaged over the sparse layers."""
    total, layers = jnp.zeros(()), 0
    for record in jax.tree.leaves(records, is_leaf=lambda node: isinstance(node, LayerRecord)):
        layers += record.load.tokens.shape[0]
        total += sum(weights[name] * jnp.sum(values) for name, values in record.losses.items())
    return total / max(layers, 1)


def micro_batches(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B/parts, ...], by taking every parts-th row, so that no row leaves its device."""
    return {name: jnp.swapaxes(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]), 0, 1) for name, a in batch.items()}


def gradients(functions: Functions, state: TrainState, batch: Batch, parts: int) -> tuple[Any, dict[str, Array], Any]:
    """Gradient of the mean loss of a batch, taken in `parts` micro-batches.

    Every loss is a sum over the tokens at hand divided by a size of the whole batch, so the parts add up to exactly the
    big batch. Losses over the load of the whole batch also need its statistics, which takes a forward pass of its own
    when there are several parts.

    Returns:
      Gradients of the parameters that move, means over the batch to report, and the layer records of the whole batch.
    """
    key = jax.random.fold_in(state.key, state.step)
    totals = functions.totals(batch)
    targets = jnp.maximum(jnp.sum(batch["mask"], dtype=jnp.float32), 1.0)

    moving, still = functions.split(state.params)

    def loss(moving: Any, part: Batch, part_key: Array, wholes: Any) -> tuple[Array, tuple[dict[str, Array], Any]]:
        params = functions.join(moving, still)
        x, records = functions.forward(params, state.router_state, part, True, part_key, totals, wholes)
        objective, sums = functions.objective(params, x, part)
        means = {name: value / targets for name, value in sums.items()}
        return objective / targets + auxiliary_loss(records, functions.loss_weights), (means, records)

    differentiate = jax.grad(loss, has_aux=True)
    if parts == 1:
        grads, (means, records) = differentiate(moving, batch, key, None)
        return functions.counted(grads), means, records

    split = micro_batches(batch, parts)
    keys = jax.random.split(key, parts)

    def add_up(function: Callable[[Batch, Array], Any]) -> Any:
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(
            function, jax.tree.map(lambda a: a[0], split), keys[0]))
        return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, function(*part)), None), zeros,
                            (split, keys))[0]

    wholes = None
    if functions.wholes is not None:
        wholes = functions.wholes(add_up(lambda part, part_key: functions.forward(
            state.params, state.router_state, part, True, part_key, totals, None)[1]))
    grads, (means, records) = add_up(lambda part, part_key: differentiate(moving, part, part_key, wholes))
    return functions.counted(grads), means, records


def train_step(functions: Functions, optimizer: optax.GradientTransformationExtraArgs, parts: int, state: TrainState,
               batch: Batch, limit: Array | float = math.inf) -> tuple[TrainState, dict[str, Array], Any]:
    """One optimizer step, which changes nothing but its number if the loss or a gradient is not finite.

    Args:
      functions: model, objective, router update.
      optimizer: of the parameters that move; its update is told `sound`, and `Moments` that it returns heed that.
      parts: micro-batches.
      state: is consumed if jitted with donation.
      batch: global.
      limit: of the loss, above which the step changes nothing either.

    Returns:
      The new state; scalars to report, `skipped` among them, 1 if it is the old one; and the layer records of the batch,
      without statistics.
    """
    grads, means, records = gradients(functions, state, batch, parts)
    norm = global_norm(grads)  # not finite if any gradient is not
    sound = jnp.isfinite(means["loss"]) & jnp.isfinite(norm) & (means["loss"] <= limit)
    moving, still = functions.split(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, moving, sound=sound)
    changed = optax.apply_updates(moving, updates), opt_state, functions.update_router(state.router_state, records)
    moving, opt_state, router_state = where_sound(sound, changed, (moving, state.opt_state, state.router_state))
    new = TrainState(step=state.step + 1, params=functions.join(moving, still), opt_state=opt_state,
                     router_state=router_state, key=state.key)
    # The statistics have done their work, and some routers' are large.
    told = jax.tree.map(lambda record: record.replace(statistics={}), records,
                        is_leaf=lambda node: isinstance(node, LayerRecord))
    return new, means | {"gradient_norm": norm, "skipped": 1 - sound.astype(jnp.float32)}, told
