"""Token choice: every token takes its K best experts.

One family covers Switch (2101.03961: K=1, softmax, not renormalised), Mixtral (2401.04088: K=2, renormalised), OLMoE
(2409.02060: not renormalised), DeepSeekMoE (2401.06066: with shared experts) and, with sigmoid scores and a selection
bias, auxiliary-loss-free balancing (2408.15664) as in DeepSeek-V3 (2412.19437).
"""

from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig
from moejax.moe import balance
from moejax.moe.routing.base import Parameter, Router
from moejax.moe.types import Assignments, RouterOutput, RoutingContext


def parameters(config: MoEConfig, width: int) -> dict[str, Parameter]:
    """One score vector per expert."""
    return {"w_DE": Parameter((width, config.num_experts), ("embed", "router"), config.router_init * width**-0.5)}


def initial_state(config: MoEConfig) -> dict[str, Array]:
    """The selection bias, if it is in use."""
    return {"bias_E": jnp.zeros(config.num_experts, jnp.float32)} if config.bias_rate > 0 else {}


def log_scores(logits_TE: Array, score: str) -> Array:
    """Logarithm of the gate function; in logarithms, normalising needs no epsilon and survives any logit."""
    return jax.nn.log_softmax(logits_TE) if score == "softmax" else jax.nn.log_sigmoid(logits_TE)


def add_jitter(x_TD: Array, config: MoEConfig, context: RoutingContext) -> Array:
    """The router's own copy of its input times U(1-j, 1+j) in training; the experts' input stays clean."""
    if not (context.train and config.jitter > 0):
        return x_TD
    return x_TD * jax.random.uniform(context.key, x_TD.shape, minval=1 - config.jitter, maxval=1 + config.jitter)


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Routes each token to its K best experts; see `Router.route`."""
    x_TD = add_jitter(x_TD.astype(jnp.float32), config, context)
    logits_TE = jnp.einsum("td,de->te", x_TD, parameters["w_DE"], precision=jax.lax.Precision.HIGHEST)
    log_scores_TE = log_scores(logits_TE, config.score)

    # The bias enters the choice alone: weights and losses come from the scores themselves.
    ranking_TE = jnp.exp(log_scores_TE) + state["bias_E"] if "bias_E" in state else log_scores_TE
    _, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(ranking_TE), config.experts_per_token)

    log_chosen_TK = jnp.take_along_axis(log_scores_TE, expert_TK, axis=-1)
    weight_TK = jax.nn.softmax(log_chosen_TK) if config.renormalize else jnp.exp(log_chosen_TK)

    tokens, choices = expert_TK.shape
    assignments = Assignments(
        token_N=jnp.repeat(jnp.arange(tokens, dtype=jnp.int32), choices),
        expert_N=expert_TK.reshape(-1),
        weight_N=config.route_scale * weight_TK.reshape(-1),
        valid_N=jnp.repeat(context.mask_T, choices),
        choices=choices,
    )
    log_probs_TE = jax.nn.log_softmax(log_scores_TE)
    losses = {
        "balance": balance.load_balancing_loss(jnp.exp(log_probs_TE), assignments, context, config.balance_scope),
        "router_z": balance.z_loss(logits_TE, context),
    }
    statistics = {"assigned_E": balance.count_per_expert(assignments, config.num_experts)[0]}
    return RouterOutput(assignments, losses, balance.entropy(log_probs_TE, context.mask_T), statistics)


def update(config: MoEConfig, state: Mapping[str, Array], statistics: Mapping[str, Array]) -> dict[str, Array]:
    """Moves the selection bias against the load of the whole batch."""
    if "bias_E" not in state:
        return {}
    return {"bias_E": balance.update_bias(state["bias_E"], statistics["assigned_E"], config.bias_rate,
                                          config.bias_rule)}


def loss_weights(config: MoEConfig) -> dict[str, float]:
    """Load-balancing loss and router z-loss."""
    return {"balance": config.balance_weight, "router_z": config.z_weight}


TOPK = Router(parameters, initial_state, route, update, loss_weights,
              paper="Switch 2101.03961, Mixtral 2401.04088, DeepSeek-V3 2412.19437", causal=True)
