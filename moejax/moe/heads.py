"""Experts that are attention heads: each makes a token's queries and reads what its heads bring back.

Mixture of attention heads (Zhang et al. 2022, arXiv 2210.05144), as JetMoE (2404.07413) has it. A token and one of its
experts are a pair; between both projections every pair has heads of its own, so here pairs travel as tokens do elsewhere.
"""

from typing import Mapping, NamedTuple

import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig
from moejax.moe import balance, experts
from moejax.moe.layer import drop, sparse, told
from moejax.moe.routing import get_router
from moejax.moe.types import Assignments, LayerRecord, RoutingContext


class Queries(NamedTuple):
    """What makes the queries of a layer returns.

    Attributes:
      q_TKF: queries of the heads of each chosen expert, side by side; zero for a pair that is not valid.
      assignments: what the router decided, before any dropping.
      kept: the pairs behind dropping, each a token of its own.
      record: what happened.
    """

    q_TKF: Array
    assignments: Assignments
    kept: Assignments
    record: LayerRecord


def queries(config: MoEConfig, router_parameters: Mapping[str, Array], state: Mapping[str, Array], w_EDF: Array,
            x_TD: Array, context: RoutingContext) -> Queries:
    """route -> dispatch -> experts' queries, for a router that gives every token K experts."""
    routed = get_router(config.router).route(config, router_parameters, state, x_TD, context)
    chosen = routed.assignments
    dropped = drop(config, chosen, context)
    kept = dropped.replace(token_N=jnp.arange(len(dropped.token_N), dtype=jnp.int32), choices=1)
    # Queries are as they are: the weights count behind the heads.
    q_NF, received_E, replayed_E = sparse(config, kept.replace(weight_N=jnp.ones_like(kept.weight_N)), experts.projections(
        w_EDF, outward=True), jnp.repeat(x_TD, chosen.choices, axis=0), context.sequences, None)
    assigned_E, kept_E = (balance.count_per_expert(pairs, config.num_experts)[0] for pairs in (chosen, dropped))
    record = told(routed, context, assigned_E, assigned_E - kept_E, received_E, replayed_E)
    return Queries(q_NF.reshape(len(x_TD), chosen.choices, -1), chosen, kept, record)


def outputs(config: MoEConfig, kept: Assignments, w_EFD: Array, o_TKF: Array, sequences: int) -> Array:
    """What heads bring back -> dispatch -> experts' outputs -> combine: [T, K, F] -> [T, D]."""
    tokens, choices, width = o_TKF.shape
    y_ND = sparse(config, kept, experts.projections(w_EFD, outward=False), o_TKF.reshape(-1, width), sequences, None).y_TD
    return jnp.sum(y_ND.reshape(tokens, choices, -1), axis=1, dtype=jnp.float32).astype(y_ND.dtype)
