"""Adam's moments, changed where they lie. Kingma and Ba 2014, arXiv 1412.6980.

optax computes a parameter from the old moments. They must then outlive the new ones, and as XLA:CPU cannot tell that it
could do the parameters first, it copies both in every step, and goes over the gradients three times. Here a parameter
comes from the new moments. For the same reason whether a step counts is asked here, and not once all is computed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array


class Moments(NamedTuple):
    """What Adam remembers, with the names of optax's state, so that checkpoints are the same.

    Attributes:
      count: int32 scalar, steps that counted.
      mu, nu: moving averages of gradients and of their squares.
    """

    count: Array
    mu: Any
    nu: Any


def where_sound(sound: Array, new: Any, old: Any) -> Any:
    """The new tree if the step counts, else the old one; `Moments` are taken as they are, having asked before."""
    return jax.tree.map(lambda new, old: new if isinstance(new, Moments) else jnp.where(sound, new, old), new, old,
                        is_leaf=lambda node: isinstance(node, Moments))


def scale_by_adam(beta1: float, beta2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, whose update also takes `sound`: a bool scalar, without which the state stays as it is.

    What it returns as updates then is anything.
    """
    def init(params: Any) -> Moments:
        return Moments(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(grads: Any, state: Moments, params: Any = None, *, sound: Array, **others: Any) -> tuple[Any, Moments]:
        del params, others
        new = Moments(optax.safe_increment(state.count), optax.tree.update_moment(grads, state.mu, beta1, 1),
                      optax.tree.update_moment_per_elem_norm(grads, state.nu, beta2, 2))
        state = jax.tree.map(lambda new, old: jnp.where(sound, new, old), new, state)
        # GPUs' and TPUs' compilers do all in one pass, so there is nothing to keep apart for them.
        mu, nu = jax.lax.platform_dependent((state.mu, state.nu), cpu=jax.lax.optimization_barrier, default=lambda x: x)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), optax.tree.bias_correction(mu, beta1, state.count),
                               optax.tree.bias_correction(nu, beta2, state.count))
        return updates, Moments(state.count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)
