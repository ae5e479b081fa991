"""The sparse feed-forward layer: route -> dispatch -> experts -> combine."""

import dataclasses
from functools import partial
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from moejax import axes, sharding
from moejax.architecture import PLAIN, Architecture
from moejax.config import MoEConfig, check
from moejax.layers.mlp import SWIGLU, Activation
from moejax.moe import balance, blocked, capacity, experts, merged, slots
from moejax.moe.dispatch import DISPATCHERS, Dispatcher, Sizes
from moejax.moe.routing import get_router
from moejax.moe.types import Assignments, ExpertLoad, LayerRecord, Merger, RouterOutput, RoutingContext, Slots
from moejax.moe.weights import expert_weights

INTO = "into_E"
"""In the state of a layer whose experts have been merged: the expert that each one of the router's is now, int32 [E]."""


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


class Mixed(NamedTuple):
    """What a sparse layer returns.

    Attributes:
      y_TD: its output.
      record: what happened.
      carry_TC: what the router of the next sparse layer gets to see, or None.
      assignments: what the router decided, before any dropping.
    """

    y_TD: Array
    record: LayerRecord
    carry_TC: Array | None
    assignments: Assignments | Slots | Merger


def mixture(config: MoEConfig, router_parameters: Mapping[str, Array], state: Mapping[str, Array], w_in_EDGF: Array,
            w_out_EFD: Array, x_TD: Array, context: RoutingContext, key: Array | None,
            latent: tuple[Array, Array] | None = None, biases: tuple[Array, Array] | None = None,
            activation: Activation = SWIGLU, seen_TD: Array | None = None) -> Mixed:
    """A mixture of experts as a pure function of [T, D].

    `latent` holds the projections into the experts' smaller space and back, if they have one (LatentMoE 2601.18089); the
    router sees the tokens as they are, or `seen_TD` if that is given. `biases` are those of the experts, [E, G, F] and
    [E, D].
    """
    seen_TD = x_TD if seen_TD is None else seen_TD
    routed = get_router(config.router).route(config, router_parameters, state, seen_TD, context)
    if latent is not None:
        x_TD = x_TD @ latent[0]
    if routed.input_scale_T is not None:
        x_TD = x_TD * routed.input_scale_T[:, None].astype(x_TD.dtype)
    check(biases is None or isinstance(routed.assignments, Assignments), f"config.moe.router={config.router} mixes tokens "
          "or experts, which have no biases there; set config.model.architecture.expert_bias=False")
    match routed.assignments:
        case Assignments() as chosen:
            if INTO in state:
                chosen = chosen.replace(expert_N=state[INTO][chosen.expert_N])
                config = dataclasses.replace(config, num_experts=w_in_EDGF.shape[0])
            kept = drop(config, chosen, context)
            b_in_EGF, b_out_ED = biases or (None, None)
            work = experts.hidden_layers(w_in_EDGF, w_out_EFD, b_in_EGF, activation, config.expert_dropout)
            y_TD, received_E, replayed_E = sparse(config, kept, work, x_TD, context.sequences, key)
            if b_out_ED is not None:
                y_TD = y_TD + (weights_of(kept, len(x_TD), config.num_experts) @ b_out_ED).astype(y_TD.dtype)
            assigned_E = balance.count_per_expert(chosen, config.num_experts)[0]
            dropped_E = assigned_E - balance.count_per_expert(kept, config.num_experts)[0]
        case Slots() as chosen:
            y_TD, received_E = slots.feed_forward(chosen, x_TD, w_in_EDGF, w_out_EFD, config.expert_dropout, key,
                                                  activation)
            assigned_E, dropped_E, replayed_E = received_E, 0 * received_E, 0 * received_E
        case Merger() as chosen:
            y_TD, received_E = merged.feed_forward(chosen, x_TD, context.mask_T, w_in_EDGF, w_out_EFD,
                                                   config.expert_dropout, key, activation)
            assigned_E, dropped_E, replayed_E = received_E, 0 * received_E, 0 * received_E
    if latent is not None:
        y_TD = y_TD @ latent[1]
    if routed.added_TD is not None:
        y_TD = y_TD + routed.added_TD.astype(y_TD.dtype)
    record = told(routed, context, assigned_E, dropped_E, received_E, replayed_E)
    return Mixed(y_TD, record, routed.carry_TC, routed.assignments)


def told(routed: RouterOutput, context: RoutingContext, assigned_E: Array, dropped_E: Array, received_E: Array,
         replayed_E: Array) -> LayerRecord:
    """The record of a layer; see `ExpertLoad` for the counts."""
    load = ExpertLoad(assigned_E, dropped_E, received_E, replayed_E, tokens=jnp.sum(context.mask_T, dtype=jnp.int32),
                      entropy=routed.entropy)
    return LayerRecord(routed.losses, jax.lax.stop_gradient(load), jax.lax.stop_gradient(routed.statistics))


def weights_of(assignments: Assignments, tokens: int, num_experts: int) -> Array:
    """The sum of the weights with which each token reaches each expert, float32 [T, E]."""
    weight_N = jnp.where(assignments.valid_N, assignments.weight_N, 0)
    return jnp.zeros((tokens, num_experts)).at[assignments.token_N, assignments.expert_N].add(weight_N)


def sparse(config: MoEConfig, kept: Assignments, work: experts.Work, x_TD: Array, sequences: int, key: Array | None
           ) -> Moved:
    """dispatch -> experts -> combine, for a list of pairs."""
    assignments = fit_to_mesh(kept, sequences)
    dispatcher = choose_dispatcher(config, assignments.local, assignments.expert_N.shape[0] / x_TD.shape[0])

    def on_device(dispatcher: Dispatcher, x_TD: Array, assignments: Assignments, weights: tuple[Array | None, ...],
                  key: Array | None) -> Moved:
        pairs, local = assignments.expert_N.shape[0], weights[0].shape[0]
        compute = experts.choose_compute(config.compute, weights[:2], pairs)  # what follows are biases
        block_rows = blocked.fit_block(config.block_rows, pairs, local)
        plan = dispatcher.plan(assignments, Sizes(
            x_TD.shape[0], local, experts.spare_rows(compute, block_rows), experts.row_multiple(compute),
            config.buffer_factor))

        def move(x_TD: Array, weights: tuple[Array | None, ...]) -> tuple[Array, Array]:
            rows = dispatcher.dispatch(x_TD, plan)
            if dispatcher.manual:
                rows = work.grouped(rows, plan.sizes_E, weights, compute, block_rows, key)
            else:
                rows = work.dense(rows, weights, key)
            return dispatcher.combine(rows, plan), plan.sizes_E

        if not dispatcher.bounded:
            return Moved(*move(x_TD, weights), jnp.zeros(config.num_experts, jnp.int32))

        def replay(x_TD: Array, weights: tuple[Array | None, ...]) -> tuple[Array, Array]:
            return on_device(DISPATCHERS["all_gather"], x_TD, assignments, weights, key)[:2]

        # All devices of the expert axis agree. The replay is recomputed in the backward pass, so it holds no memory.
        fits = jax.lax.psum(jnp.sum(plan.lost_E), axes.EXPERT) == 0
        return Moved(*jax.lax.cond(fits, move, jax.checkpoint(replay), x_TD, weights), plan.lost_E)

    return on_every_device(partial(on_device, dispatcher), dispatcher, work)(x_TD, assignments, work.weights, key)


def drop(config: MoEConfig, assignments: Assignments, context: RoutingContext) -> Assignments:
    """Applies the capacity of training or of evaluation, if there is one, to a token-choice list."""
    factor = config.capacity_factor if context.train else config.eval_capacity_factor
    if (factor is None and config.capacity_places is None) or assignments.choices == 0:
        return assignments
    groups = context.groups(config.routing_group)
    if config.capacity_places is not None:
        places_G = jnp.full(groups, config.capacity_places)
    else:
        per_token = get_router(config.router).passes(config, len(context.mask_T) // context.sequences)
        places_G = capacity.places(context.mask_T, factor, groups, config.num_experts, per_token)
    return capacity.limit(assignments, places_G, config.drop_policy, config.num_experts)


def fit_to_mesh(assignments: Assignments, sequences: int) -> Assignments:
    """Makes a list that the devices divide evenly, and marks it as not local where that parts pairs from their tokens."""
    mesh = sharding.current_mesh()
    devices = 1 if mesh is None else sharding.size(mesh, axes.TOKEN_AXES)
    if assignments.choices > 0 or (assignments.local and sequences % devices == 0):
        return assignments
    missing = -assignments.expert_N.shape[0] % devices
    padded = jax.tree.map(lambda a: jnp.pad(a, (0, missing)), assignments)  # the pairs added are not valid
    return padded.replace(local=False)


def choose_dispatcher(config: MoEConfig, local: bool, pairs: float) -> Dispatcher:
    """Resolves `auto`: sort where all experts and tokens are at hand, else the transport that moves fewer rows.

    With P devices on the expert axis, all_gather brings each device P times its own tokens; all_to_all has room for
    buffer_factor times the `pairs` of a token in the list, valid or not.

    Raises:
      UserError: a transport that cannot reach the tokens that a list names.
    """
    mesh, name = sharding.current_mesh(), config.dispatch
    devices, split = (1, 1) if mesh is None else (mesh.size, mesh.shape[axes.EXPERT])
    if name == "auto":
        cheaper = config.buffer_factor is not None and split > config.buffer_factor * pairs
        gather = "all_to_all" if local and cheaper else "all_gather"
        name = gather if split > 1 or (devices > 1 and not local) else "sort"
    if mesh is None and name not in ("dense", "sort"):
        name = "sort"  # without a mesh all is at hand
    check(local or devices == 1 or DISPATCHERS[name].reaches_all, f"config.moe.dispatch={name} cannot reach the tokens "
          "of other devices, which this router chooses from; use auto or all_gather")
    return DISPATCHERS[name]


def on_every_device(function: Callable[..., Moved], dispatcher: Dispatcher, work: experts.Work) -> Callable[..., Moved]:
    """Runs (x_TD, assignments, weights, key) -> Moved on each device's tokens and experts; no mesh, as it is."""
    mesh = sharding.current_mesh()
    if mesh is None or not dispatcher.manual:
        return function

    def local(x_TD: Array, assignments: Assignments, weights: tuple[Array | None, ...], key: Array | None) -> Moved:
        if assignments.local:
            first = jax.lax.axis_index(axes.TOKEN_AXES) * x_TD.shape[0]
            assignments = assignments.replace(token_N=assignments.token_N - first)
        if key is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axes.MESH_AXES))
        # What arrives equal on several devices is marked as varying, so that its gradient is summed over them.
        varying = jax.tree.map(lambda a: sharding.varying_over(a, axes.MESH_AXES), (x_TD, assignments, weights))
        moved = function(*varying, key)

        def total(count_E: Array, over: Sequence[str]) -> Array:
            # The devices of the model axis share their tokens, so each has counted the same.
            return jax.lax.psum(sharding.varying_over(count_E, over), tuple(over)) // jax.lax.axis_size(axes.MODEL)

        counted_over = [name for name in axes.MESH_AXES if name != expert]
        return Moved(moved.y_TD if work.split_out else jax.lax.psum(moved.y_TD, axes.MODEL),
                     total(moved.received_E, counted_over), total(moved.replayed_E, axes.MESH_AXES))

    def of_tokens(split: bool) -> P:
        return P(axes.TOKEN_AXES, axes.MODEL if split else None)

    expert = axes.EXPERT if dispatcher.splits_experts else None
    weights = tuple(P(expert, *names) for names in work.split)
    return jax.shard_map(local, in_specs=(of_tokens(work.split_in), P(axes.TOKEN_AXES), weights, P()),
                         out_specs=Moved(of_tokens(work.split_out), P(expert), P()))


def normal(stddev: float, mean: float) -> Callable[..., Array]:
    """A Flax initialiser: normal around a mean."""
    return lambda key, shape, dtype=jnp.float32: mean + stddev * jax.random.normal(key, shape, dtype)


def router_parameters(module: nn.Module, config: MoEConfig, width: int) -> dict[str, Array]:
    """Declares, in a module, the parameters of its router."""
    return {name: module.param(f"router_{name}", nn.with_logical_partitioning(normal(own.stddev, own.mean), own.axes),
                               own.shape)
            for name, own in get_router(config.router).parameters(config, width).items()}


TASK_VECTORS = "router_tasks"
"""The parameter of a sparse layer that holds a vector for each task, [tasks, D]."""


def with_task(module: nn.Module, tasks: int, x_TD: Array, task_T: Array | None) -> Array:
    """What a router sees: its input plus, if it is to know of tasks, the vector of each token's; declared in the module.

    The vectors begin at 0, so that a fresh model routes by its input alone. Of a single task no number is needed.
    """
    if not tasks:
        return x_TD
    vectors_ND = module.param(TASK_VECTORS, nn.with_logical_partitioning(nn.initializers.zeros, ("router", "embed")),
                              (tasks, x_TD.shape[1]))
    return x_TD.astype(jnp.float32) + vectors_ND[0 if task_T is None else task_T]


DECISIONS = "decisions"
"""The collection in which the routers' decisions are found, if it is asked for as mutable; else it costs nothing."""
INPUTS = "inputs"
"""The same for what sparse layers read."""


class MixtureOfExperts(nn.Module):
    """Parameters around `mixture`.

    Attributes:
      config: the sparse layers' settings.
      hidden: F.
      out_scale: factor on the initial standard deviation of the down projections.
      dtype: compute type of the experts; the router computes in float32.
      design: `activation`, `clamp` and options of experts of it.
    """

    config: MoEConfig
    hidden: int
    out_scale: float
    dtype: Any
    design: Architecture = PLAIN

    @nn.compact
    def __call__(self, x_BLD: Array, state: Mapping[str, Array], context: RoutingContext
                 ) -> tuple[Array, LayerRecord, Array | None]:
        """[B, L, D] -> [B, L, D], the layer's record, and what the next router gets to see."""
        batch, length, model_width = x_BLD.shape
        config, hidden, bits = self.config, self.hidden, self.design.expert_bits
        count = self.design.merged_experts or config.num_experts
        router = get_router(config.router)
        own = router_parameters(self, config, model_width)
        width, activation = model_width // config.latent_divisor, Activation(self.design.activation, self.design.clamp)
        # The expert axis is a stack of layers, so it is no part of the fan-in.
        w_in_EDGF = expert_weights(self, "w_in", (count, width, activation.inputs, hidden), (
            "experts", "embed", "gate_up", "expert_ffn"), width**-0.5, bits, self.dtype)
        w_out_EFD = expert_weights(self, "w_out", (count, hidden, width), ("experts", "expert_ffn", "embed"),
                                   self.out_scale * hidden**-0.5, bits, self.dtype)
        noisy = context.train and (router.noisy(config) or config.expert_dropout > 0)
        router_key, key = jax.random.split(self.make_rng("dropout")) if noisy else (None, None)
        x_TD, context = x_BLD.reshape(-1, model_width), context.replace(key=router_key)
        latent = None if config.latent_divisor == 1 else tuple(
            self.param(name, nn.with_logical_partitioning(nn.initializers.normal(shape[0]**-0.5), names), shape)
            .astype(self.dtype)
            for name, shape, names in (("latent_down", (model_width, width), ("embed", None)),
                                       ("latent_up", (width, model_width), (None, "embed"))))
        biases = None if not self.design.expert_bias else tuple(
            self.param(name, nn.with_logical_partitioning(nn.initializers.zeros, names), shape).astype(self.dtype)
            for name, shape, names in (("b_in", (count, activation.inputs, hidden), ("experts", "gate_up", "expert_ffn")),
                                       ("b_out", (count, width), ("experts", "embed"))))
        seen_TD = with_task(self, self.design.router_tasks, x_TD, context.task_T)
        mixed = mixture(config, own, state, w_in_EDGF, w_out_EFD, x_TD, context, key, latent, biases, activation, seen_TD)
        if not self.is_initializing():
            self.sow(DECISIONS, "assignments", mixed.assignments)
            self.sow(INPUTS, "x_TD", x_TD)
        y_TD = mixed.y_TD
        if self.design.mixture_bias:
            y_TD += self.param("b_mixed", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
                               (model_width,)).astype(self.dtype)
        y_BLD = sharding.constrain(y_TD.reshape(batch, length, model_width), "batch", "length", None)
        return y_BLD, mixed.record, mixed.carry_TC
