"""Top-p: a token takes its best experts until their probabilities add up to a threshold. Huang et al., arXiv 2403.07652.

A token whose distribution is flat takes many experts, one that is sure takes one; the entropy loss keeps the flat ones
from becoming the rule.
"""

import dataclasses
from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig, check, key
from moejax.moe import balance
from moejax.moe.routing import select, topk
from moejax.moe.routing.base import Router, balance_and_z, balances_whole, jitters
from moejax.moe.types import RouterOutput, RoutingContext


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of top-p routing."""

    threshold: float = key(0.4, "probability p that the chosen experts of a token reach together", low=0, high=1)
    most: int = key(0, "experts that a token may take at most; 0 is all E", low=0)
    entropy_weight: float = key(1e-4, "weight of the mean entropy of the router's distribution", low=0)


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Routes each token to the smallest set of its best experts that reaches the threshold; see `Router.route`."""
    options = config.options
    logits_TE = select.linear(select.add_jitter(x_TD, config, context), parameters["w_DE"])
    log_probs_TE = jax.nn.log_softmax(select.log_scores(logits_TE, config.score))
    bound = options.most or config.num_experts
    expert_TK = select.best(log_probs_TE, bound, context)
    log_chosen_TK = jnp.take_along_axis(log_probs_TE, expert_TK, axis=1)

    # An expert is needed while those before it fall short, so the best one always is.
    sum_TK = jnp.cumsum(jnp.exp(jax.lax.stop_gradient(log_chosen_TK)), axis=1)
    needed_TK = jnp.pad(sum_TK[:, :-1] < options.threshold, ((0, 0), (1, 0)), constant_values=True)
    if config.renormalize:
        weight_TK = jax.nn.softmax(jnp.where(needed_TK, log_chosen_TK, -jnp.inf))
    else:
        weight_TK = jnp.exp(log_chosen_TK)
    valid_TK = needed_TK & select.real(context, bound)
    assignments = select.listed(expert_TK, jnp.where(valid_TK, config.route_scale * weight_TK, 0.0), valid_TK)

    statistics = {"assigned_E": balance.count_per_expert(assignments, config.num_experts)[0]}
    entropy = balance.entropy(log_probs_TE, context.mask_T)
    losses = {"entropy": entropy / jnp.maximum(context.totals.tokens, 1.0)} | balance.balance_and_z(
        jnp.exp(log_probs_TE), logits_TE, assignments, context, config.balance_scope, context.whole_sum("assigned_E"))
    return RouterOutput(assignments, losses, entropy, statistics)


def loss_weights(config: MoEConfig) -> dict[str, float]:
    """Load-balancing loss, entropy, router z-loss."""
    return balance_and_z(config) | {"entropy": config.options.entropy_weight}


def check_config(config: MoEConfig) -> None:
    """Raises `UserError` on an impossible bound and on a single renormalised choice, whose router would never learn."""
    most, experts = config.options.most, config.num_experts
    check(most <= experts, f"config.moe.options.most={most} is more than config.moe.num_experts={experts}")
    check(not (most == 1 and config.renormalize),
          "config.moe.renormalize=True with config.moe.options.most=1 makes every weight 1, so the router gets no "
          "gradient; set config.moe.renormalize=False")


TOP_P = Router("Top-p", "2403.07652", "the fewest best experts whose probabilities reach p together", route, variable=True,
               defaults={"renormalize": False, "balance_weight": 0.01, "z_weight": 0.0}, options=Options(),
               parameters=topk.parameters, loss_weights=loss_weights, noisy=jitters, needs_whole=balances_whole,
               check=check_config)
