"""The sparse feed-forward layer: route -> dispatch -> experts -> combine."""

from functools import partial
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from moejax import axes, sharding
from moejax.config import MoEConfig, check
from moejax.moe import balance, blocked, capacity, experts
from moejax.moe.dispatch import DISPATCHERS, Dispatcher, Sizes
from moejax.moe.routing import get_router
from moejax.moe.types import Assignments, ExpertLoad, LayerRecord, RoutingContext


class Moved(NamedTuple):
    """What comes back from the experts.

    Attributes:
      y_TD: the layer's output.
      received_E: int32, rows that reached each expert.
      replayed_E: int32, pairs that did not fit in the first transport's buffers.
    """

    y_TD: Array
    received_E: Array
    replayed_E: Array


def mixture(config: MoEConfig, router_parameters: Mapping[str, Array], state: Mapping[str, Array], w_in_ED2F: Array,
            w_out_EFD: Array, x_TD: Array, context: RoutingContext, key: Array | None) -> tuple[Array, LayerRecord]:
    """A mixture of experts as a pure function: [T, D] -> [T, D] and what happened."""
    routed = get_router(config.router).route(config, router_parameters, state, x_TD, context)
    kept = drop(config, routed.assignments, context)
    assignments = fit_to_mesh(kept, context.sequences)
    dispatcher = choose_dispatcher(config, assignments.local)

    def on_device(dispatcher: Dispatcher, x_TD: Array, assignments: Assignments, w_in_ED2F: Array, w_out_EFD: Array,
                  key: Array | None) -> Moved:
        compute = experts.choose_compute(config.compute)
        block_rows = blocked.fit_block(config.block_rows, assignments.expert_N.shape[0], w_in_ED2F.shape[0])
        plan = dispatcher.plan(assignments, Sizes(
            x_TD.shape[0], w_in_ED2F.shape[0], experts.spare_rows(compute, block_rows), experts.row_multiple(compute),
            config.buffer_factor))

        def move(x_TD: Array, w_in_ED2F: Array, w_out_EFD: Array) -> tuple[Array, Array]:
            rows = dispatcher.dispatch(x_TD, plan)
            if dispatcher.manual:
                rows = experts.feed_forward(rows, plan.sizes_E, w_in_ED2F, w_out_EFD, compute=compute,
                                            block_rows=block_rows, dropout_rate=config.expert_dropout, key=key)
            else:
                rows = experts.dense_feed_forward(rows, w_in_ED2F, w_out_EFD, config.expert_dropout, key)
            return dispatcher.combine(rows, plan), plan.sizes_E

        if not dispatcher.bounded:
            return Moved(*move(x_TD, w_in_ED2F, w_out_EFD), jnp.zeros(config.num_experts, jnp.int32))

        def replay(x_TD: Array, w_in_ED2F: Array, w_out_EFD: Array) -> tuple[Array, Array]:
            return on_device(DISPATCHERS["all_gather"], x_TD, assignments, w_in_ED2F, w_out_EFD, key)[:2]

        # All devices of the expert axis agree. The replay is recomputed in the backward pass, so it holds no memory.
        fits = jax.lax.psum(jnp.sum(plan.lost_E), axes.EXPERT) == 0
        return Moved(*jax.lax.cond(fits, move, jax.checkpoint(replay), x_TD, w_in_ED2F, w_out_EFD), plan.lost_E)

    y_TD, received_E, replayed_E = on_every_device(partial(on_device, dispatcher), dispatcher)(
        x_TD, assignments, w_in_ED2F, w_out_EFD, key)
    assigned_E = balance.count_per_expert(routed.assignments, config.num_experts)[0]
    load = ExpertLoad(assigned_E, assigned_E - balance.count_per_expert(kept, config.num_experts)[0], received_E,
                      replayed_E, tokens=jnp.sum(context.mask_T, dtype=jnp.int32), entropy=routed.entropy)
    return y_TD, LayerRecord(routed.losses, jax.lax.stop_gradient(load), jax.lax.stop_gradient(routed.statistics))


def drop(config: MoEConfig, assignments: Assignments, context: RoutingContext) -> Assignments:
    """Applies the capacity of training or of evaluation, if there is one, to a token-choice list."""
    factor = config.capacity_factor if context.train else config.eval_capacity_factor
    if factor is None or assignments.choices == 0:
        return assignments
    groups = context.sequences if config.routing_group == "sequence" else 1
    return capacity.limit(assignments, context.mask_T, factor, config.drop_policy, groups, config.num_experts)


def fit_to_mesh(assignments: Assignments, sequences: int) -> Assignments:
    """Makes a list that the devices divide evenly, and marks it as not local where that parts pairs from their tokens."""
    mesh = sharding.current_mesh()
    devices = 1 if mesh is None else sharding.size(mesh, axes.TOKEN_AXES)
    if assignments.choices > 0 or (assignments.local and sequences % devices == 0):
        return assignments
    missing = -assignments.expert_N.shape[0] % devices
    padded = jax.tree.map(lambda a: jnp.pad(a, (0, missing)), assignments)  # the pairs added are not valid
    return padded.replace(local=False)


def choose_dispatcher(config: MoEConfig, local: bool) -> Dispatcher:
    """Resolves `auto`: sort where all experts and tokens are at hand, else the transport that moves fewer rows.

    With P devices on the expert axis, all_gather brings each device P times its own tokens; all_to_all has room for
    buffer_factor * K rows a token.

    Raises:
      UserError: a transport that cannot reach the tokens that a list names.
    """
    mesh, name = sharding.current_mesh(), config.dispatch
    devices, split = (1, 1) if mesh is None else (mesh.size, mesh.shape[axes.EXPERT])
    if name == "auto":
        cheaper = config.buffer_factor is not None and split > config.buffer_factor * config.experts_per_token
        gather = "all_to_all" if local and cheaper else "all_gather"
        name = gather if split > 1 or (devices > 1 and not local) else "sort"
    if mesh is None and name not in ("dense", "sort"):
        name = "sort"  # without a mesh all is at hand
    check(local or devices == 1 or DISPATCHERS[name].reaches_all, f"config.moe.dispatch={name} cannot reach the tokens "
          "of other devices, which this router chooses from; use auto or all_gather")
    return DISPATCHERS[name]


def on_every_device(function: Callable[..., Moved], dispatcher: Dispatcher) -> Callable[..., Moved]:
    """Runs (x_TD, assignments, w_in, w_out, key) -> Moved on each device's tokens and experts; no mesh, as it is."""
    mesh = sharding.current_mesh()
    if mesh is None or not dispatcher.manual:
        return function

    def local(x_TD: Array, assignments: Assignments, w_in_ED2F: Array, w_out_EFD: Array, key: Array | None) -> Moved:
        if assignments.local:
            first = jax.lax.axis_index(axes.TOKEN_AXES) * x_TD.shape[0]
            assignments = assignments.replace(token_N=assignments.token_N - first)
        if key is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axes.MESH_AXES))
        # What arrives equal on several devices is marked as varying, so that its gradient is summed over them.
        x_TD, assignments, w_in_ED2F, w_out_EFD = jax.tree.map(
            lambda a: sharding.varying_over(a, axes.MESH_AXES), (x_TD, assignments, w_in_ED2F, w_out_EFD))
        moved = function(x_TD, assignments, w_in_ED2F, w_out_EFD, key)

        def total(count_E: Array, over: Sequence[str]) -> Array:
            # The devices of the model axis share their tokens, so each has counted the same.
            return jax.lax.psum(sharding.varying_over(count_E, over), tuple(over)) // jax.lax.axis_size(axes.MODEL)

        counted_over = [name for name in axes.MESH_AXES if name != expert]
        return Moved(jax.lax.psum(moved.y_TD, axes.MODEL), total(moved.received_E, counted_over),
                     total(moved.replayed_E, axes.MESH_AXES))

    tokens = P(axes.TOKEN_AXES)
    expert = axes.EXPERT if dispatcher.splits_experts else None
    weights = (P(expert, None, None, axes.MODEL), P(expert, axes.MODEL, None))
    return jax.shard_map(local, in_specs=(tokens, tokens, *weights, P()), out_specs=Moved(tokens, P(expert), P()))


class MixtureOfExperts(nn.Module):
    """Parameters around `mixture`.

    Attributes:
      config: the sparse layers' settings.
      hidden: F.
      out_scale: factor on the initial standard deviation of the down projections.
      dtype: compute type of the experts; the router computes in float32.
    """

    config: MoEConfig
    hidden: int
    out_scale: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BLD: Array, state: Mapping[str, Array], context: RoutingContext) -> tuple[Array, LayerRecord]:
        """[B, L, D] -> [B, L, D] and the layer's record."""
        batch, length, width = x_BLD.shape
        count, hidden = self.config.num_experts, self.hidden
        router_parameters = {
            name: self.param(f"router_{name}", nn.with_logical_partitioning(nn.initializers.normal(stddev), names), shape)
            for name, (shape, names, stddev) in get_router(self.config.router).parameters(self.config, width).items()}
        # The expert axis is a stack of layers, so it is no part of the fan-in.
        w_in_ED2F = self.param("w_in", nn.with_logical_partitioning(
            nn.initializers.normal(width**-0.5), ("experts", "embed", "gate_up", "expert_ffn")),
            (count, width, 2, hidden))
        w_out_EFD = self.param("w_out", nn.with_logical_partitioning(
            nn.initializers.normal(self.out_scale * hidden**-0.5), ("experts", "expert_ffn", "embed")),
            (count, hidden, width))
        noisy = context.train and (self.config.jitter > 0 or self.config.expert_dropout > 0)
        router_key, key = jax.random.split(self.make_rng("dropout")) if noisy else (None, None)
        y_TD, record = mixture(self.config, router_parameters, state, w_in_ED2F.astype(self.dtype),
                               w_out_EFD.astype(self.dtype), x_BLD.reshape(-1, width), context.replace(key=router_key),
                               key)
        return sharding.constrain(y_TD.reshape(batch, length, width), "batch", "length", None), record
