"""SparseMixer-v2: experts drawn one after another among those near the best, with Heun's estimate of the router's gradient.

Liu et al. 2023, arXiv 2310.00811, as GRIN (2409.12136) and PhiMoE use it. Let L_e(w) be the loss if expert e is chosen with
weight w = p_e. The expected loss has the gradient sum_e (L_e(p_e) - L_e(0)) dp_e, which needs the outputs of all experts.
One draw e ~ p estimates it by (L_e(p_e) - L_e(0)) dp_e / p_e, and the third-order rule
L(w) - L(0) = w (L'(w) + 3 L'(w / 3)) / 4 makes derivatives of the difference: one time in four e enters with its weight and
else with a third of it, and each time the weight has the whole gradient dp_e.
"""

import dataclasses
from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig, check, key
from moejax.moe import balance
from moejax.moe.routing import select, topk
from moejax.moe.routing.base import Router, balance_and_z, balances_whole
from moejax.moe.types import RouterOutput, RoutingContext


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of SparseMixer."""

    jitter_eps: float = key(0.01, "a choice leaves out experts whose logit is below the best by more than twice this share "
                            "of the larger of its size and the best; from 1 on, none. If all others are left out, the "
                            "choice teaches the router nothing", low=0)


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Routes each token to K experts near its best ones, drawn in training; see `Router.route`."""
    jitter_key, choice_key = jax.random.split(context.key) if context.train else (None, None)
    logits_TE = select.linear(select.add_jitter(x_TD, config, context.replace(key=jitter_key)), parameters["w_DE"])
    expert_TK, weight_TK = choose(logits_TE, config.experts_per_token, config.options.jitter_eps,
                                  context.replace(key=choice_key))
    assignments = select.listed(expert_TK, config.route_scale * weight_TK, select.real(context, config.experts_per_token))

    log_probs_TE = jax.nn.log_softmax(logits_TE)
    statistics = {"assigned_E": balance.count_per_expert(assignments, config.num_experts)[0]}
    losses = balance.balance_and_z(jnp.exp(log_probs_TE), logits_TE, assignments, context, config.balance_scope,
                                   context.whole_sum("assigned_E"))
    return RouterOutput(assignments, losses, balance.entropy(log_probs_TE, context.mask_T), statistics)


def choose(logits_TE: Array, choices: int, jitter_eps: float, context: RoutingContext) -> tuple[Array, Array]:
    """The experts of each token and their weights: int32 [T, K] and float32 [T, K].

    Each choice is made like the first, among the experts that are left. Its weight is the expert's share of the softmax
    over all that were near the best in that choice, so the K weights do not sum to 1.
    """
    keys = jax.random.split(context.key, (choices, 2)) if context.train else None
    left_TE, experts, weights = logits_TE, [], []
    for choice in range(choices):
        near_TE = jnp.where(near(logits_TE, jnp.max(left_TE, axis=1, keepdims=True), jitter_eps), left_TE, -jnp.inf)
        expert_T1 = best_T1 = select.best(near_TE, 1, context)
        if context.train:
            draw_key, part_key = keys[choice]
            expert_T1 = select.best(near_TE + jax.random.gumbel(draw_key, near_TE.shape), 1, context)
        weight_T1 = jnp.take_along_axis(jax.nn.softmax(near_TE), expert_T1, axis=1)
        if context.train:
            # As published, the best expert always enters whole, as it does in evaluation.
            whole_T1 = (expert_T1 == best_T1) | (jax.random.uniform(part_key, expert_T1.shape) < 0.25)
            weight_T1 = in_part(weight_T1, jnp.where(whole_T1, 1.0, 1 / 3))
        experts.append(expert_T1)
        weights.append(weight_T1)
        left_TE = jnp.where(jnp.arange(logits_TE.shape[1]) == expert_T1, -jnp.inf, left_TE)
    return jnp.concatenate(experts, axis=1), jnp.concatenate(weights, axis=1)


def near(logits_TE: Array, best_T1: Array, jitter_eps: float) -> Array:
    """Whether (best - logit) / max(|logit|, best) <= 2 jitter_eps, without a division by 0: bool [T, E]."""
    return best_T1 - logits_TE <= 2 * jitter_eps * jnp.maximum(jnp.abs(logits_TE), best_T1)


def in_part(weight_T1: Array, part_T1: Array) -> Array:
    """The product in value, with the gradient of the whole weight."""
    return weight_T1 + jax.lax.stop_gradient((part_T1 - 1) * weight_T1)


def check_config(config: MoEConfig) -> None:
    """Raises `UserError` on scores that are no softmax, and on weights that are divided by their sum."""
    check(config.score == "softmax", f"config.moe.router={config.router} has softmax weights; set "
          f"config.moe.score=softmax instead of {config.score}")
    check(not config.renormalize, f"config.moe.router={config.router} estimates the gradient of weights as they are; set "
          "config.moe.renormalize=False")


SPARSE_MIXER = Router(
    "SparseMixer-v2 (GRIN)", "2409.12136", "experts drawn among those near the best logit; Heun's estimate of the gradient",
    route, evaluation="the best experts, not drawn",
    defaults={"experts_per_token": 2, "renormalize": False, "balance_weight": 0.001, "z_weight": 0.0}, options=Options(),
    parameters=topk.parameters, loss_weights=balance_and_z, noisy=lambda config: True, needs_whole=balances_whole,
    check=check_config)
