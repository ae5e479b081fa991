"""All-to-all: experts are split over the expert axis, and each device sends every other one a cell of rows.

Cells have a fixed size, so this runs everywhere. A device whose pairs for one other device do not fit in the cell counts
them in `lost_E`; the layer then takes another transport. These functions run inside `jax.shard_map`.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from moejax import axes, sharding
from moejax.moe.dispatch import sort
from moejax.moe.dispatch.base import Sizes
from moejax.moe.types import Assignments


@struct.dataclass
class CellPlan:
    """From tokens to the cells of the send buffer, and from the receive buffer to the rows of the local experts.

    Attributes:
      send: rows are those of the send buffer, cell after cell.
      receive: tokens are the rows of the receive buffer.
      lost_E: this device's pairs per expert, of all devices, that found no place.
    """

    send: sort.SortPlan
    receive: sort.SortPlan
    lost_E: Array

    @property
    def sizes_E(self) -> Array:
        """Rows of each local expert."""
        return self.receive.sizes_E


def plan(assignments: Assignments, sizes: Sizes) -> CellPlan:
    """Gives every pair a place in the cell of its expert's device, and orders what arrives by expert."""
    devices, local = jax.lax.axis_size(axes.EXPERT), sizes.experts
    pairs, experts = assignments.expert_N.shape[0], devices * local
    cell = pairs if sizes.buffer_factor is None else max(1, min(pairs, math.ceil(pairs * sizes.buffer_factor / devices)))

    place_N, expert_N, first_E = sort.order(assignments, experts)
    device_N = expert_N // local
    in_cell_N = place_N - first_E[device_N * local]
    row_N = jnp.where((device_N < devices) & (in_cell_N < cell), device_N * cell + in_cell_N, devices * cell)

    # Within a cell the rows are ordered by expert, so how many there are of each tells the receiver whose they are.
    bounds_Pe = first_E[:-1].reshape(devices, local), first_E[1:].reshape(devices, local)
    begin_Pe, end_Pe = (jnp.minimum(bound_Pe - bounds_Pe[0][:, :1], cell) for bound_Pe in bounds_Pe)
    sent_Pe = end_Pe - begin_Pe
    arrived_Pe = jax.lax.all_to_all(sent_Pe, axes.EXPERT, 0, 0, tiled=True)
    owner_Pc = jax.vmap(lambda end_e: jnp.searchsorted(end_e, jnp.arange(cell), side="right"))(
        jnp.cumsum(arrived_Pe, axis=1))
    return CellPlan(
        send=sort.lay_out(assignments, row_N, devices * cell, sizes.tokens, sent_Pe.reshape(-1)),
        receive=sort.plan(received_rows(owner_Pc.reshape(-1), local), sizes._replace(tokens=devices * cell)),
        lost_E=jnp.diff(first_E) - sent_Pe.reshape(-1))


def received_rows(owner_R: Array, local: int) -> Assignments:
    """The list that takes each row of a receive buffer to its local expert; an owner of `local` or more means none."""
    owner_R = owner_R.astype(jnp.int32)
    row_R = sharding.varying_like(jnp.arange(owner_R.shape[0], dtype=jnp.int32), owner_R)
    one_R = sharding.varying_like(jnp.ones(owner_R.shape[0], jnp.float32), owner_R)
    return Assignments(row_R, owner_R, one_R, owner_R < local, choices=1)


def dispatch(x_TD: Array, plan: CellPlan) -> Array:
    """Sends each token to the devices of its experts, and copies what arrives to the rows of the local ones."""
    cells_RD = jax.lax.all_to_all(sort.dispatch(x_TD, plan.send), axes.EXPERT, 0, 0, tiled=True)
    return sort.dispatch(cells_RD, plan.receive)


def combine(y_RD: Array, plan: CellPlan) -> Array:
    """Sends the results back and adds each token's."""
    cells_RD = jax.lax.all_to_all(sort.combine(y_RD, plan.receive), axes.EXPERT, 0, 0, tiled=True)
    return sort.combine(cells_RD, plan.send)
