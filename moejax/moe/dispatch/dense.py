"""Dense: every expert computes every token and the weights pick. The oracle: E/K times the work, nothing to get wrong."""

import jax.numpy as jnp
from flax import struct
from jax import Array

from moejax.moe.dispatch.base import Sizes
from moejax.moe.types import Assignments


@struct.dataclass
class DensePlan:
    """The weight of every expert for every token, 0 where they were not paired; and the pairs of each expert."""

    weight_TE: Array
    sizes_E: Array


def plan(assignments: Assignments, sizes: Sizes) -> DensePlan:
    """Writes the list out as a matrix."""
    weight_N = jnp.where(assignments.valid_N, assignments.weight_N, 0.0)
    pair_N = assignments.token_N, assignments.expert_N
    weight_TE = jnp.zeros((sizes.tokens, sizes.experts)).at[pair_N].add(weight_N)
    pairs_TE = jnp.zeros((sizes.tokens, sizes.experts), jnp.int32).at[pair_N].add(assignments.valid_N.astype(jnp.int32))
    return DensePlan(weight_TE, jnp.sum(pairs_TE, axis=0))


def dispatch(x_TD: Array, plan: DensePlan) -> Array:
    """Gives every token to every expert: [E, T, D]."""
    return jnp.broadcast_to(x_TD, (plan.weight_TE.shape[1], *x_TD.shape))


def combine(y_ETD: Array, plan: DensePlan) -> Array:
    """Weighs and adds the experts' results: [T, D]."""
    return jnp.einsum("etd,te->td", y_ETD.astype(jnp.float32), plan.weight_TE).astype(y_ETD.dtype)
