"""Dense: every expert computes every token and the weights pick. The oracle: E/K times the work, nothing to get wrong."""

import jax.numpy as jnp
from flax import struct
from jax import Array

from moejax.moe.types import Assignments


@struct.dataclass
class DensePlan:
    """The weight of every expert for every token; 0 where they were not paired."""

    weight_TE: Array


def plan(assignments: Assignments, tokens: int, num_experts: int, alignment: int) -> DensePlan:
    """Writes the list out as a matrix. `alignment` is of no use here."""
    weight_N = jnp.where(assignments.valid_N, assignments.weight_N, 0.0)
    weight_TE = jnp.zeros((tokens, num_experts)).at[assignments.token_N, assignments.expert_N].add(weight_N)
    return DensePlan(weight_TE)


def dispatch(x_TD: Array, plan: DensePlan) -> Array:
    """Gives every token to every expert: [E, T, D]."""
    return jnp.broadcast_to(x_TD, (plan.weight_TE.shape[1], *x_TD.shape))


def combine(y_ETD: Array, plan: DensePlan) -> Array:
    """Weighs and adds the experts' results: [T, D]."""
    return jnp.einsum("etd,te->td", y_ETD.astype(jnp.float32), plan.weight_TE).astype(y_ETD.dtype)
