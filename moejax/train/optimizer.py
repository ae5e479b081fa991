"""Optimizers and schedules from optax, with masks taken from the parameters' logical axes rather than their names."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from moejax import axes, sharding
from moejax.config import OptimizerConfig
from moejax.matrices import is_matrix, sides
from moejax.train.adam import scale_by_adam


def make_schedule(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
    """The learning rate by step: linear warm-up, then the config's shape until `steps`.

    `wsd` (warm-up, stable, decay) stays at the peak and falls linearly over the last `decay_fraction` of the steps.
    """
    warmup = min(config.warmup_steps, steps)
    rest, last = max(steps - warmup, 1), config.final_fraction * peak
    decay = min(max(round(config.decay_fraction * steps), 1), rest)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, last, rest),
        "wsd": lambda: optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, last, decay)], [rest - decay]),
    }[config.schedule]()
    # Step 0 already moves: the warm-up goes from peak / warmup to peak.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


def muon_dimensions(names: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    """Input and output axes of a weight matrix for Muon, experts and layers apart; None for what Adam should update."""
    return optax.contrib.MuonDimensionNumbers(*sides(names)) if is_matrix(names) else None


def per_matrix(transform: optax.GradientTransformation, logical: Any) -> optax.GradientTransformation:
    """Applies a transformation to every stacked matrix on its own, so that no statistic mixes layers or experts."""

    def over_stack(function: Any, names: tuple[str | None, ...], arguments: int) -> Any:
        stacked = [i for i, name in enumerate(names) if name in axes.STACKING_AXES]
        for outer in range(len(stacked)):
            # Inner vmaps see arrays without the outer stacking axes.
            axis = stacked[-1 - outer] - (len(stacked) - 1 - outer)
            function = jax.vmap(function, in_axes=(axis,) * arguments if arguments == 1 else (axis, 0, axis),
                                out_axes=0 if arguments == 1 else (axis, 0))
        return function

    def by_leaf(function: Any, *trees: Any) -> Any:
        return jax.tree.map(function, logical, *trees, is_leaf=sharding.is_axes)

    def init(params: Any) -> Any:
        return by_leaf(lambda names, p: over_stack(transform.init, names, 1)(p), params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        pairs = by_leaf(lambda names, u, s, p: over_stack(transform.update, names, 3)(u, s, p), updates, state, params)
        return tuple(by_leaf(lambda names, pair, i=i: pair[i], pairs) for i in (0, 1))

    return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimizerConfig, steps: int, logical: Any) -> optax.GradientTransformationExtraArgs:
    """Clipping, then the update rule with its schedule. Its update takes `sound`, see `moejax.train.adam`.

    Args:
      config: settings.
      steps: optimizer steps of the whole run, for the schedule.
      logical: logical axes of every parameter; decides what decays and what Muon orthogonalises.

    AdamW 1711.05101, Lion 2302.06675, Adafactor 1804.04235, Muon as in 2502.16982 (updates scaled to Adam's size).
    """
    schedule = make_schedule(config, steps, config.learning_rate)
    decay = jax.tree.map(is_matrix, logical, is_leaf=sharding.is_axes)
    if config.name == "adamw":
        rule = optax.chain(scale_by_adam(config.beta1, config.beta2, config.eps),
                           optax.add_decayed_weights(config.weight_decay, decay), optax.scale_by_learning_rate(schedule))
    elif config.name == "lion":
        rule = optax.lion(schedule, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decay)
    elif config.name == "adafactor":
        scale = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        rule = optax.chain(per_matrix(scale, logical), optax.add_decayed_weights(config.weight_decay, decay),
                           optax.scale_by_learning_rate(schedule))
    else:
        dimensions = jax.tree.map(muon_dimensions, logical, is_leaf=sharding.is_axes)
        rule = optax.contrib.muon(
            schedule, beta=config.beta1, eps=config.eps, weight_decay=config.weight_decay, consistent_rms=0.2,
            adam_b1=config.beta1, adam_b2=config.beta2, muon_weight_dimension_numbers=dimensions,
            adam_learning_rate=make_schedule(config, steps, config.adam_learning_rate or config.learning_rate))
    if config.clip_norm is None:
        return optax.with_extra_args_support(rule)
    return optax.chain(clip_by_global_norm(config.clip_norm), rule)


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """Scales updates down to a global norm of `most`, as optax's does.

    By one multiplication, which XLA repeats wherever the result is used; optax's division takes a pass over all gradients.
    """
    def clip(updates: Any, params: Any = None) -> Any:
        del params
        scale = most / jnp.maximum(global_norm(updates), max(most, jnp.finfo(jnp.float32).tiny))
        return jax.tree.map(lambda update: (update * scale).astype(update.dtype), updates)

    return optax.stateless(clip)


def global_norm(tree: Any) -> Array:
    """Euclidean norm of all leaves together, in float32."""
    return jnp.sqrt(sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(tree)))
