"""Random routing: what a mixture of experts gains without choosing. The control of routing experiments.

Like THOR (Zuo et al. 2021, arXiv 2110.04260) without its consistency loss, and with a draw for every token rather than
one for the batch.
"""

from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig
from moejax.moe.routing import hash
from moejax.moe.routing.base import Router
from moejax.moe.types import RouterOutput, RoutingContext


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """K distinct experts, uniformly at random for every token, each with weight 1/K; see `Router.route`."""
    if context.train:
        bits_TE = jax.random.bits(context.key, (len(x_TD), config.num_experts), jnp.uint32)
        _, expert_TK = jax.lax.top_k(bits_TE, config.experts_per_token)
    else:
        expert_TK = hash.choose(context.token_ids_T, config.num_experts, config.experts_per_token)
    return hash.equally_weighted(config, expert_TK, context)


def always(config: MoEConfig) -> bool:
    """Yes, whatever the config."""
    return True


RANDOM = Router("Random routing", "", "K experts at random for every token", route,
                evaluation="by hash of the token id", needs_token_ids=True, noisy=always)
