"""All-gather: experts are split over the expert axis; tokens are gathered over it and the results reduce-scattered.

Dropless and exact on every mesh. These functions run inside `jax.shard_map`.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from moejax import axes
from moejax.moe.dispatch import sort
from moejax.moe.dispatch.base import Sizes
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


def plan(assignments: Assignments, sizes: Sizes) -> GatherPlan:
    """Orders the pairs of the local experts. A list that is local counts the tokens of this device, else of the batch."""
    place = jax.lax.axis_index(axes.EXPERT)
    token_N = assignments.token_N + place * sizes.tokens if assignments.local else assignments.token_N
    token_N, expert_N, weight_N, valid_N = (
        jax.lax.all_gather(part_N, axes.EXPERT, tiled=True)
        for part_N in (token_N, assignments.expert_N, assignments.weight_N, assignments.valid_N))
    expert_N = expert_N - place * sizes.experts
    here_N = valid_N & (expert_N >= 0) & (expert_N < sizes.experts)
    # A list that is not local may name any token of the batch.
    token_axes = (axes.EXPERT,) if assignments.local else axes.TOKEN_AXES
    here = assignments.replace(token_N=token_N, expert_N=jnp.where(here_N, expert_N, sizes.experts), weight_N=weight_N,
                               valid_N=here_N)
    gathered = sizes._replace(tokens=sizes.tokens * jax.lax.axis_size(token_axes))
    return GatherPlan(sort.plan(here, gathered), token_axes)


def dispatch(x_TD: Array, plan: GatherPlan) -> Array:
    """Gathers the tokens and copies them to the rows of the local experts."""
    return sort.dispatch(jax.lax.all_gather(x_TD, plan.token_axes, tiled=True), plan.sort)


def combine(y_RD: Array, plan: GatherPlan) -> Array:
    """Adds up each token's rows over all devices and returns this device's tokens."""
    return jax.lax.psum_scatter(sort.combine(y_RD, plan.sort), plan.token_axes, tiled=True)
