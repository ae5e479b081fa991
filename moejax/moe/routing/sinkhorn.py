"""S-BASE: experts are chosen by a plan that uses all of them equally. Clark et al. 2022, arXiv 2202.01169.

In training Sinkhorn's algorithm scales the rows and columns of exp(logits) until each token has the same mass and each
expert, too; a token goes to the experts with its largest shares. Shares are spread evenly, but their maxima need not be,
so a capacity still matters. In evaluation a token goes to the experts with its largest logits.
"""

import dataclasses
import math
from functools import partial
from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig, key
from moejax.moe import balance
from moejax.moe.routing import select, topk
from moejax.moe.routing.base import Router, jitters, z_loss_alone
from moejax.moe.types import RouterOutput, RoutingContext


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of S-BASE."""

    iterations: int = key(32, "times that rows and columns are scaled", low=1)


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Routes by the plan, and weighs by the raw logits: their sigmoid for K = 1, their softmax over all experts for K > 1.

    See `Router.route`. The weights are those of Megatron-LM.
    """
    logits_TE = select.linear(select.add_jitter(x_TD, config, context), parameters["w_DE"])
    ranking_TE = logits_TE
    if context.train:
        groups = context.groups(config.routing_group)
        scale = jax.vmap(partial(log_plan, iterations=config.options.iterations))
        ranking_TE = scale(jax.lax.stop_gradient(logits_TE).reshape(groups, -1, config.num_experts),
                           context.mask_T.reshape(groups, -1)).reshape(logits_TE.shape)
    expert_TK = select.best(ranking_TE, config.experts_per_token, context)
    log_scores_TE = select.log_scores(logits_TE, "sigmoid" if config.experts_per_token == 1 else "softmax")
    weight_TK = config.route_scale * select.gate(log_scores_TE, expert_TK, renormalize=False)
    entropy = balance.entropy(jax.nn.log_softmax(log_scores_TE), context.mask_T)
    return RouterOutput(select.listed(expert_TK, weight_TK, select.real(context, config.experts_per_token)),
                        {"router_z": balance.z_loss(logits_TE, context)}, entropy, {})


def log_plan(logits_TE: Array, mask_T: Array, iterations: int) -> Array:
    """Logarithm of the plan of one group of tokens: exp(logits), scaled to row sums 1/tokens and column sums 1/E. [T, E].

    The column sums are exact; the row sums approach theirs with the number of iterations.
    """
    # A group of nothing but padding counts as real, or the logarithm of its mass would be infinite.
    mask_T1 = (mask_T | ~jnp.any(mask_T))[:, None]

    def iterate(_: int, log_plan_TE: Array) -> Array:
        log_plan_TE = jax.nn.log_softmax(log_plan_TE)  # the same mass for each token; how much, the columns settle
        column_E = jax.nn.logsumexp(jnp.where(mask_T1, log_plan_TE, -jnp.inf), axis=0)
        return log_plan_TE - column_E - math.log(logits_TE.shape[1])

    return jax.lax.fori_loop(0, iterations, iterate, logits_TE)


SINKHORN = Router("S-BASE", "2202.01169", "the largest shares of a plan with equally used experts (Sinkhorn)", route,
                  causal=False, evaluation="the largest raw logits", options=Options(),
                  defaults={"experts_per_token": 1, "renormalize": False, "z_weight": 0.0}, parameters=topk.parameters,
                  loss_weights=z_loss_alone, noisy=jitters, by_group=True)
