"""Expert choice: every expert takes its C best tokens of the routing group. Zhou et al. 2022, arXiv 2202.09368.

The choice for a token depends on the tokens after it, so in a decoder the training loss is not that of a language
model: it needs `config.moe.allow_noncausal_routing`, and the model cannot generate.
"""

import math
from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig
from moejax.moe import balance
from moejax.moe.routing import select, topk
from moejax.moe.routing.base import Router, jitters, z_loss_alone
from moejax.moe.types import Assignments, RouterOutput, RoutingContext


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Lets each expert take C = ceil(K * tokens / E) tokens of each group, weighted by its score; see `Router.route`."""
    logits_TE = select.linear(select.add_jitter(x_TD, config, context), parameters["w_DE"])
    log_scores_TE = select.log_scores(logits_TE, config.score)

    groups = context.groups(config.routing_group)
    size = len(x_TD) // groups
    most = min(size, math.ceil(config.experts_per_token * size / config.num_experts))
    mask_GT = context.mask_T.reshape(groups, size)
    ranking_GTE = jnp.where(mask_GT[:, :, None], log_scores_TE.reshape(groups, size, -1), -jnp.inf)
    _, place_GEC = jax.lax.top_k(jax.lax.stop_gradient(ranking_GTE.swapaxes(1, 2)), most)

    # The capacity follows the real tokens, so padding takes no place in an expert.
    capacity_G = -(-config.experts_per_token * jnp.sum(mask_GT, axis=1) // config.num_experts)
    valid_GEC = (jnp.arange(most) < capacity_G[:, None, None]) & jnp.take_along_axis(mask_GT[:, None], place_GEC, axis=2)
    token_GEC = place_GEC + size * jnp.arange(groups)[:, None, None]
    expert_GEC = jnp.broadcast_to(jnp.arange(config.num_experts)[None, :, None], token_GEC.shape)
    assignments = Assignments(
        token_N=token_GEC.reshape(-1).astype(jnp.int32),
        expert_N=expert_GEC.reshape(-1).astype(jnp.int32),
        weight_N=config.route_scale * jnp.exp(log_scores_TE[token_GEC, expert_GEC]).reshape(-1),
        valid_N=valid_GEC.reshape(-1),
        choices=0,
        local=config.routing_group == "sequence",
    )
    entropy = balance.entropy(jax.nn.log_softmax(log_scores_TE), context.mask_T)
    return RouterOutput(assignments, {"router_z": balance.z_loss(logits_TE, context)}, entropy, {})


EXPERT_CHOICE = Router("Expert choice", "2202.09368", "each expert takes its C best tokens of the group", route,
                       causal=False, evaluation="the same rule, so it cannot generate", generates=False, variable=True,
                       parameters=topk.parameters, loss_weights=z_loss_alone, noisy=jitters, by_group=True)
