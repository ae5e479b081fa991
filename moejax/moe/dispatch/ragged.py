"""Ragged all-to-all: as `all_to_all`, but each device sends exactly the rows that it has for another.

Only what a device receives in all is bounded, by its receive buffer. TPU and GPU have the collective; XLA:CPU does not,
so there it is emulated by gathering everything and picking. These functions run inside `jax.shard_map`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from moejax import axes, sharding
from moejax.moe.dispatch import sort
from moejax.moe.dispatch.all_to_all import received_rows
from moejax.moe.dispatch.base import Sizes
from moejax.moe.types import Assignments


@struct.dataclass
class Lanes:
    """One direction of an exchange, as `jax.lax.ragged_all_to_all` takes it: an entry for each device P of the axis.

    Attributes:
      input_offset_P: first row for device P in this device's input.
      send_P: rows for device P.
      output_offset_P: where they begin in the output of device P.
      receive_P: rows that come from device P.
      rows: of the output.
    """

    input_offset_P: Array
    send_P: Array
    output_offset_P: Array
    receive_P: Array
    rows: int = struct.field(pytree_node=False)


@struct.dataclass
class RaggedPlan:
    """From tokens to rows by expert, over to their devices and back, and to the rows of the local experts.

    Attributes:
      send: rows are this device's pairs by expert of all devices.
      there, back: the exchange.
      receive: tokens are the rows of the receive buffer.
      lost_E: this device's pairs per expert, of all devices, that found no place.
    """

    send: sort.SortPlan
    there: Lanes
    back: Lanes
    receive: sort.SortPlan
    lost_E: Array

    @property
    def sizes_E(self) -> Array:
        """Rows of each local expert."""
        return self.receive.sizes_E


def plan(assignments: Assignments, sizes: Sizes) -> RaggedPlan:
    """Orders the pairs by expert, and from everyone's counts works out what goes where."""
    devices, local = jax.lax.axis_size(axes.EXPERT), sizes.experts
    here, pairs = jax.lax.axis_index(axes.EXPERT), assignments.expert_N.shape[0]
    most = devices * pairs
    room = most if sizes.buffer_factor is None else max(1, min(most, math.ceil(pairs * sizes.buffer_factor)))

    send = sort.plan(assignments, Sizes(sizes.tokens, devices * local, spare=0))
    # Of device S (source), how many rows for each expert e of device P: everyone knows all of it.
    count_SPe = jax.lax.all_gather(send.sizes_E.reshape(devices, local), axes.EXPERT)
    count_SP = jnp.sum(count_SPe, axis=2)
    start_SP = jnp.cumsum(count_SP, axis=1) - count_SP  # in the source's rows
    arrive_SP = jnp.cumsum(count_SP, axis=0) - count_SP  # in the receive buffer
    sent_SP = jnp.clip(room - arrive_SP, 0, count_SP)

    owner_R = jnp.searchsorted(jnp.cumsum(count_SPe[:, here].reshape(-1)), jnp.arange(room), side="right")
    owner_R = jnp.where(owner_R < devices * local, owner_R % local, local)
    end_Pe = jnp.cumsum(count_SPe[here], axis=1)
    sent_Pe = jnp.diff(jnp.minimum(end_Pe, sent_SP[here][:, None]), axis=1, prepend=0)
    return RaggedPlan(
        send=send,
        there=Lanes(start_SP[here], sent_SP[here], arrive_SP[here], sent_SP[:, here], room),
        back=Lanes(arrive_SP[:, here], sent_SP[:, here], start_SP[:, here], sent_SP[here], pairs),
        receive=sort.plan(received_rows(owner_R, local), sizes._replace(tokens=room)),
        lost_E=send.sizes_E - sent_Pe.reshape(-1))


@jax.custom_vjp
def exchange(x_RD: Array, there: Lanes, back: Lanes) -> Array:
    """Sends rows as `there` says; rows of the output that nobody sends are zero. The gradient goes `back`."""
    return jax.lax.platform_dependent(x_RD, there, cpu=emulated, default=native)


exchange.defvjp(
    lambda x_RD, there, back: (exchange(x_RD, there, back), (there, back)),
    lambda lanes, dy_RD: (exchange(dy_RD, lanes[1], lanes[0]), None, None),
)


def native(x_RD: Array, lanes: Lanes) -> Array:
    """The collective of the device."""
    output_RD = sharding.varying_like(jnp.zeros((lanes.rows, x_RD.shape[1]), x_RD.dtype), x_RD)
    return jax.lax.ragged_all_to_all(x_RD, output_RD, lanes.input_offset_P, lanes.send_P, lanes.output_offset_P,
                                     lanes.receive_P, axis_name=axes.EXPERT)


def emulated(x_RD: Array, lanes: Lanes) -> Array:
    """The same by gathering the rows of all devices. What comes from device S lies before what comes from S + 1."""
    gather = partial(jax.lax.all_gather, axis_name=axes.EXPERT)
    here = jax.lax.axis_index(axes.EXPERT)
    x_SRD, from_S = gather(x_RD), gather(lanes.input_offset_P)[:, here]
    begin_S = gather(lanes.output_offset_P)[:, here]
    row_R = jnp.arange(lanes.rows)
    source_R = jnp.sum(row_R[:, None] >= (begin_S + lanes.receive_P)[None, :], axis=1)
    nearest_R = jnp.minimum(source_R, begin_S.shape[0] - 1)
    index_R = nearest_R * x_RD.shape[0] + from_S[nearest_R] + row_R - begin_S[nearest_R]
    sent_R = (source_R < begin_S.shape[0]) & (row_R >= begin_S[nearest_R])
    nothing = x_SRD.shape[0] * x_SRD.shape[1]
    return sort.take(x_SRD.reshape(nothing, -1), jnp.where(sent_R, index_R, nothing))


def dispatch(x_TD: Array, plan: RaggedPlan) -> Array:
    """Sends each token to the devices of its experts, and copies what arrives to the rows of the local ones."""
    return sort.dispatch(exchange(sort.dispatch(x_TD, plan.send), plan.there, plan.back), plan.receive)


def combine(y_RD: Array, plan: RaggedPlan) -> Array:
    """Sends the results back and adds each token's."""
    return sort.combine(exchange(sort.combine(y_RD, plan.receive), plan.back, plan.there), plan.send)
