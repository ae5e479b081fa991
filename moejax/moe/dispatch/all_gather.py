"""All-gather: experts are split over the expert axis; tokens are gathered over it and the results reduce-scattered.

Dropless and exact on every mesh. These functions run inside `jax.shard_map`.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from moejax import axes
from moejax.moe.dispatch import sort
from moejax.moe.types import Assignments


@struct.dataclass
class GatherPlan:
    """A plan for the gathered tokens and the local experts, and the mesh axes over which tokens are gathered."""

    sort: sort.SortPlan
    token_axes: tuple[str, ...] = struct.field(pytree_node=False)

    @property
    def sizes_E(self) -> Array:
        """Rows of each local expert."""
        return self.sort.sizes_E


def plan(assignments: Assignments, tokens: int, num_experts: int, alignment: int) -> GatherPlan:
    """Orders the pairs of the local experts.

    Args:
      assignments: this device's part of the list; tokens counted on this device if the list is local, else over the
        whole batch.
      tokens: tokens on this device.
      num_experts: local experts.
      alignment: rows to which each expert is padded.
    """
    place = jax.lax.axis_index(axes.EXPERT)
    token_N = assignments.token_N + place * tokens if assignments.local else assignments.token_N
    token_N, expert_N, weight_N, valid_N = (
        jax.lax.all_gather(part_N, axes.EXPERT, tiled=True)
        for part_N in (token_N, assignments.expert_N, assignments.weight_N, assignments.valid_N))
    expert_N = expert_N - place * num_experts
    here_N = valid_N & (expert_N >= 0) & (expert_N < num_experts)
    # A list that is not local may name any token of the batch.
    token_axes = (axes.EXPERT,) if assignments.local else axes.TOKEN_AXES
    here = assignments.replace(token_N=token_N, expert_N=jnp.where(here_N, expert_N, num_experts), weight_N=weight_N,
                               valid_N=here_N)
    return GatherPlan(sort.plan(here, tokens * jax.lax.axis_size(token_axes), num_experts, alignment), token_axes)


def dispatch(x_TD: Array, plan: GatherPlan) -> Array:
    """Gathers the tokens and copies them to the rows of the local experts."""
    return sort.dispatch(jax.lax.all_gather(x_TD, plan.token_axes, tiled=True), plan.sort)


def combine(y_RD: Array, plan: GatherPlan) -> Array:
    """Adds up each token's rows over all devices and returns this device's tokens."""
    return jax.lax.psum_scatter(sort.combine(y_RD, plan.sort), plan.token_axes, tiled=True)
