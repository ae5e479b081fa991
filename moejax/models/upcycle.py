"""From a dense model to one with experts that computes the same at first. Komatsuzaki et al. 2022, arXiv 2212.05055.

Of each dense layer's hidden units the first ones may become a shared expert; the others are cut into `granularity` shards,
of which each set of as many experts holds a copy. The scores of a set are equal, so a token takes whole sets, and with
weights that sum to 1 the sum of their outputs is the dense layer's (virtual groups, 2410.07524). `drop` draws a share of
each expert's units anew (Drop-Upcycling, 2502.19261), and `noise` moves all of them: both make the experts differ, and the
model no longer the same.
"""

import dataclasses
from typing import Any, Mapping, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import AUTO, MoEConfig, check
from moejax.models import transformer
from moejax.models.stacks import kinds, places, plan_stacks
from moejax.moe import routing
from moejax.moe.routing.topk import TOPK


class Upcycling(NamedTuple):
    """How a dense layer becomes experts.

    Attributes:
      granularity: shards into which its units are cut; a divisor of the number of experts and of the choices.
      drop: share of each expert's units that are drawn anew, with the mean and deviation of the old weights.
      noise: standard deviation of what is added to every weight of an expert, over that of the weights.
    """

    granularity: int = 1
    drop: float = 0.0
    noise: float = 0.0


def upcycle(model: transformer.Transformer, variables: Mapping[str, Any], moe: MoEConfig, how: Upcycling, key: Array
            ) -> tuple[transformer.Transformer, dict[str, Any]]:
    """A sparse model of a dense one.

    Args:
      model: without experts.
      variables: {"params": ..., "router": ...}.
      moe: of the new model. Its `ffn` is left out: the width of an expert follows from the dense layer; `shared_ffn` says
        how many units become shared.
      how: see `Upcycling`.
      key: PRNG key of the routers and of what is drawn anew.

    Raises:
      UserError: a model that has experts already, widths that do not divide, or a router whose weights do not sum to 1.
    """
    dense, hidden = model.model, model.model.ffn
    check(how.granularity >= 1 and 0 <= how.drop <= 1 and how.noise >= 0, f"{how}: granularity must be at least 1, drop "
          "between 0 and 1, and noise not negative")
    check(not any(kind.sparse for kind in kinds(dense, model.moe)),
          "this model has experts already; only a dense one can be upcycled")
    check(not dense.architecture.shortcut, "config.model.architecture.shortcut keeps a dense layer beside experts, so that "
          "experts made of that layer would change the outputs; set it to False")
    check(not dense.architecture.expert_heads, "config.model.architecture.expert_heads makes attention of sparse blocks "
          "another one; only feed-forward layers can be upcycled, so set it to False")
    shared = (moe.shared_ffn or 0) if moe.shared_experts not in (0, AUTO) else 0
    check(bool(shared) == (moe.shared_experts not in (0, AUTO)) and shared < hidden,
          f"config.moe.shared_ffn={moe.shared_ffn}: with shared experts, say how many of the {hidden} units of a dense "
          "layer become shared, and leave some to the others")
    check((hidden - shared) % how.granularity == 0, f"granularity={how.granularity} does not divide the {hidden - shared} "
          "hidden units that become experts")
    check(moe.num_experts % how.granularity == 0, f"granularity={how.granularity} does not divide config.moe.num_experts="
          f"{moe.num_experts}")
    moe = dataclasses.replace(moe, ffn=(hidden - shared) // how.granularity)
    moe = routing.resolve(moe)
    check(bool(moe.shared_experts) == bool(shared), f"config.moe.router={moe.router} has shared experts of its own; set "
          "config.moe.shared_experts and shared_ffn")
    check(moe.experts_per_token % how.granularity == 0, f"granularity={how.granularity} does not divide "
          f"config.moe.experts_per_token={moe.experts_per_token}")
    router = routing.get_router(moe.router)
    check(router.route is TOPK.route and moe.options.gate == "output",
          f"config.moe.router={moe.router} has a rule of its own, by which the weights of a token's experts need not sum "
          "to 1; take topk or one of its named forms")
    check(moe.capacity_factor is moe.eval_capacity_factor is moe.capacity_places is None, "a capacity drops tokens, which "
          "changes the outputs: set config.moe.capacity_factor=None, eval_capacity_factor=None and capacity_places=None")
    check(moe.renormalize and moe.route_scale == 1 and moe.shared_gate == "none" and moe.latent_divisor == 1,
          "the weights of a token's experts must sum to 1, or the outputs change: set config.moe.renormalize=True, "
          "route_scale=1, shared_gate=none, latent_divisor=1")
    design = dataclasses.replace(dense.architecture, expert_bias=dense.architecture.ffn_bias)
    sparse = model.clone(moe=moe, model=dataclasses.replace(dense, architecture=design))
    here, there = places(dense, model.moe), places(dense, moe)
    init_key, key = jax.random.split(key)
    routers = initial_routers(sparse, init_key)
    old = transformer.split_layers(model, variables["params"])
    stacked: dict[str, dict[str, list[Any]]] = {}
    for layer, (kind, (stack, block, repeat), (new_stack, new_block, new_repeat)) in enumerate(
            zip(kinds(dense, moe), here, there)):
        own = old[stack][repeat][block]
        if kind.sparse:
            router = jax.tree.map(lambda a, r=new_repeat: a[r], routers[new_stack][new_block])
            own = {name: own[name] for name in own if name != "feed_forward"} | experts_of(
                own["feed_forward"], router, moe.num_experts, shared, how, jax.random.fold_in(key, layer))
        stacked.setdefault(new_stack, {}).setdefault(new_block, []).append(own)
    params = {name: tree for name, tree in variables["params"].items() if name not in {stack for stack, _, _ in here}}
    for stack, runs in stacked.items():
        params[stack] = {block: jax.tree.map(lambda *layers: jnp.stack(layers), *own) for block, own in runs.items()}
    return sparse, {"params": params, "router": transformer.initial_router_state(dense, moe)}


def initial_routers(model: transformer.Transformer, key: Array) -> dict[str, dict[str, dict[str, Array]]]:
    """Fresh parameters of a model's routers by stack, sparse block and name; jitted, so that no expert is drawn."""
    names = [f"router_{name}" for name in routing.get_router(model.moe.router).parameters(model.moe, model.model.embed)]

    def drawn(key: Array) -> dict[str, dict[str, dict[str, Array]]]:
        params = transformer.initial_params(model, key)
        return {stack_name: {f"block_{j}": {name: params[stack_name][f"block_{j}"]["moe"][name] for name in names}
                             for j, sparse in enumerate(stack.sparse) if sparse}
                for stack_name, stack in plan_stacks(model.model, model.moe).items()}
    return jax.jit(drawn)(key)


def experts_of(dense: Mapping[str, Array], router: Mapping[str, Array], experts: int, shared: int, how: Upcycling,
               key: Array) -> dict[str, Any]:
    """Parameters of a sparse layer (`moe`, and `shared` if there is one) of those of a dense one and a fresh router."""
    granularity = how.granularity
    shard_E = jnp.arange(experts) % granularity

    def shards(w: Array, axis: int) -> Array:
        """[..., units, ...] -> [E, ..., units of a shard, ...]."""
        routed = jax.lax.slice_in_dim(w, shared, w.shape[axis], axis=axis)
        return jnp.stack(jnp.split(routed, granularity, axis=axis))[shard_E]

    # A set's weight is spread over its shards, so each counts `granularity` times; the last bias is added by all alike.
    w_in_EDGF, w_out_EFD = shards(dense["w_in"], 2), shards(dense["w_out"], 0) * granularity
    in_key, out_key, drop_key, noise_key = jax.random.split(key, 4)
    if how.drop > 0:
        units = w_in_EDGF.shape[3]
        order_EF = jnp.argsort(jax.random.uniform(drop_key, (experts, units)), axis=1)
        dropped_EF = order_EF < round(how.drop * units)
        w_in_EDGF = jnp.where(dropped_EF[:, None, None], redrawn(w_in_EDGF, in_key), w_in_EDGF)
        w_out_EFD = jnp.where(dropped_EF[:, :, None], redrawn(w_out_EFD, out_key), w_out_EFD)
    if how.noise > 0:
        one, other = jax.random.split(noise_key)
        w_in_EDGF += how.noise * jnp.std(w_in_EDGF) * jax.random.normal(one, w_in_EDGF.shape)
        w_out_EFD += how.noise * jnp.std(w_out_EFD) * jax.random.normal(other, w_out_EFD.shape)
    # Experts are the last dimension of all that a top-k router learns. The first of each set scores for it.
    scores = {name: jnp.repeat(value[..., ::granularity], granularity, axis=-1) for name, value in router.items()}
    moe = {"w_in": w_in_EDGF, "w_out": w_out_EFD} | scores
    first = {"w_in": dense["w_in"][..., :shared], "w_out": dense["w_out"][:shared]}
    if "b_in" in dense:
        moe |= {"b_in": shards(dense["b_in"], 1), "b_out": jnp.tile(dense["b_out"], (experts, 1))}
        first |= {"b_in": dense["b_in"][..., :shared], "b_out": jnp.zeros_like(dense["b_out"])}
    return {"moe": moe, "shared": first} if shared else {"moe": moe}


def redrawn(w: Array, key: Array) -> Array:
    """Normal values with the mean and standard deviation of a matrix."""
    return jnp.mean(w) + jnp.std(w) * jax.random.normal(key, w.shape)
