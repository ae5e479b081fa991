"""Token rounding: top-k with every expert's load rounded to whole tiles of the grouped matmul. SonicMoE, arXiv 2512.14080.

In training an expert gives up its lowest-scored tokens, or takes the best of those that did not choose it, until its
number of tokens is the multiple of the tile nearest to its top-k load, so that no tile computes padding. Evaluation
takes the top-k choices as they are.
"""

import dataclasses
from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig, check, key
from moejax.moe.routing import select, topk
from moejax.moe.routing.base import Router, balance_and_z, balances_whole, jitters, refuse_constant_weight
from moejax.moe.types import Assignments, RouterOutput, RoutingContext


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of token rounding."""

    tile: int = key(128, "rows of a tile: the load of an expert in a routing group is a multiple of it", low=1)


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Top-k, in training with rounded loads; the losses are those of the plain top-k choices; see `Router.route`."""
    logits_TE = select.linear(select.add_jitter(x_TD, config, context), parameters["w_DE"])
    plain = topk.route_by_logits(config, topk.Options(), logits_TE, None, context)
    if not context.train:
        return plain
    log_scores_TE = select.log_scores(logits_TE, config.score)
    expert_TK = plain.assignments.expert_N.reshape(len(x_TD), -1)
    groups = context.groups(config.routing_group)
    tile, size = config.options.tile, len(x_TD) // groups
    check(tile <= size, f"config.moe.options.tile={tile} is more than the {size} tokens of a routing group, so every load "
          "would be rounded to 0; take a smaller tile or a larger config.moe.routing_group")
    kept_GSE = rounded(log_scores_TE, expert_TK, context.mask_T, groups, tile)
    if config.renormalize:
        log_chosen_TK = jnp.take_along_axis(log_scores_TE, expert_TK, axis=1)
        log_scores_TE = log_scores_TE - jax.nn.logsumexp(log_chosen_TK, axis=1, keepdims=True)
    return plain.replace(assignments=compacted(config, kept_GSE, log_scores_TE))


def rounded(log_scores_TE: Array, expert_TK: Array, mask_T: Array, groups: int, tile: int) -> Array:
    """Which pairs there are when the load of each expert in each group of S tokens is rounded: bool [G, S, E]."""
    experts = log_scores_TE.shape[1]
    mask_GS1 = mask_T.reshape(groups, -1, 1)
    chosen_TE = jnp.any(expert_TK[:, :, None] == jnp.arange(experts), axis=1)
    chosen_GSE = chosen_TE.reshape(groups, -1, experts) & mask_GS1
    whole_G1E = jnp.sum(mask_GS1, axis=1, keepdims=True) // tile * tile
    load_G1E = jnp.minimum((jnp.sum(chosen_GSE, axis=1, keepdims=True) + tile // 2) // tile * tile, whole_G1E)

    # Tokens that chose the expert come first, then other real ones, then padding; each by score.
    score_GSE = jax.lax.stop_gradient(log_scores_TE).reshape(groups, -1, experts)
    order_GSE = jnp.lexsort((-score_GSE, ~chosen_GSE, jnp.broadcast_to(~mask_GS1, chosen_GSE.shape)), axis=1)
    return jnp.argsort(order_GSE, axis=1) < load_G1E


def compacted(config: MoEConfig, kept_GSE: Array, log_weight_TE: Array) -> Assignments:
    """The list of the pairs that are kept, group by group, each with room for the most pairs that rounding can make."""
    groups, size, experts = kept_GSE.shape
    tile = config.options.tile
    most = min(config.experts_per_token * size + experts * (tile // 2), size // tile * tile * experts)
    pair_GN = jax.vmap(lambda kept_SE: jnp.nonzero(kept_SE.reshape(-1), size=most, fill_value=0)[0])(kept_GSE)
    valid_GN = jnp.arange(most) < jnp.sum(kept_GSE, axis=(1, 2))[:, None]
    token_GN = pair_GN // experts + size * jnp.arange(groups)[:, None]
    expert_GN = pair_GN % experts
    weight_GN = jnp.where(valid_GN, config.route_scale * jnp.exp(log_weight_TE[token_GN, expert_GN]), 0.0)
    return Assignments(
        token_N=token_GN.reshape(-1).astype(jnp.int32),
        expert_N=expert_GN.reshape(-1).astype(jnp.int32),
        weight_N=weight_GN.reshape(-1),
        valid_N=valid_GN.reshape(-1),
        choices=0,
        local=config.routing_group == "sequence",
    )


ROUNDING = Router("Token rounding", "2512.14080", "top-k with the experts' loads rounded to whole tiles", route,
                  causal=False, evaluation="plain top-k", variable=True,
                  defaults={"renormalize": False, "routing_group": "global", "balance_weight": 0.01},
                  options=Options(), parameters=topk.parameters, loss_weights=balance_and_z, noisy=jitters,
                  needs_whole=balances_whole, by_group=True, check=refuse_constant_weight)
