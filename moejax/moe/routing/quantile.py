"""Quantile balancing: token choice with a selection bias that is solved for, so that it needs no step size.

Token t takes the K experts with the largest s_te - beta_e. Between steps, alpha_t is the largest value that failed, the
(K+1)-th largest of s_te - beta_e over experts, and beta_e becomes the value that the margins s_te - alpha_t exceed for
a share K/E of the tokens: one sweep of coordinate descent on the dual of the balanced assignment problem. Su 2026,
kexue.fm/archives/11619; Kimi K3 technical report, section 2.3.3. Weights come from the scores alone.
"""

import dataclasses
from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig, key
from moejax.moe import balance
from moejax.moe.routing import select, topk
from moejax.moe.routing.base import Router, jitters, refuse_constant_weight, z_loss_alone
from moejax.moe.types import RouterOutput, RoutingContext

REACH = 2.0
"""Margins lie within this distance from 0, as scores are at most 1 and biases hardly larger; others count at its ends."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of quantile balancing."""

    rate: float = key(1.0, "weight of the new quantile in the moving average that is the bias; 1 has no memory", low=0,
                      high=1)
    bins: int = key(4096, "bins of the histogram of margins from which quantiles are read", low=1, high=1 << 20)


def initial_state(config: MoEConfig, vocab_size: int) -> dict[str, Array]:
    """The bias that is subtracted from the scores; its mean stays 0."""
    return {"beta_E": jnp.zeros(config.num_experts, jnp.float32)}


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Routes each token to the K experts with the largest score less bias; see `Router.route`."""
    choices, experts = config.experts_per_token, config.num_experts
    logits_TE = select.linear(select.add_jitter(x_TD, config, context), parameters["w_DE"])
    log_scores_TE = select.log_scores(logits_TE, config.score)
    score_TE = jnp.exp(log_scores_TE)
    ranking_TE = score_TE - state["beta_E"]
    ranked_TC = select.best(ranking_TE, min(choices + 1, experts), context)
    expert_TK, failed_TC = ranked_TC[:, :choices], ranked_TC[:, choices:]

    statistics = {}
    if choices < experts:  # else none fails, and there is nothing to balance
        margin_TE = score_TE - jnp.take_along_axis(ranking_TE, failed_TC, axis=1)
        statistics["margin_EM"] = histogram(margin_TE, context.mask_T, -REACH, REACH, config.options.bins)
    weight_TK = config.route_scale * select.gate(log_scores_TE, expert_TK, config.renormalize)
    return RouterOutput(
        select.listed(expert_TK, weight_TK, select.real(context, choices)),
        {"router_z": balance.z_loss(logits_TE, context)},
        balance.entropy(jax.nn.log_softmax(log_scores_TE), context.mask_T),
        statistics)


def histogram(values_TE: Array, mask_T: Array, low: float, high: float, bins: int) -> Array:
    """How many real tokens have a value in each of M equal bins between low and high, int32 [E, M]; additive."""
    experts = values_TE.shape[1]
    bin_TE = jnp.clip((values_TE - low) * (bins / (high - low)), 0, bins - 1).astype(jnp.int32)
    return jnp.zeros((experts, bins), jnp.int32).at[jnp.arange(experts), bin_TE].add(mask_T[:, None].astype(jnp.int32))


def upper_quantile(count_EM: Array, above: Array, low: float, high: float) -> Array:
    """The value of each column that `above` of its values exceed, linear inside a bin: float32 [E].

    For a whole number n that is the (n+1)-th largest value, up to the width of a bin; above all values, `low`.
    """
    experts, bins = count_EM.shape
    exceeded_EM = jnp.cumsum(count_EM[:, ::-1], axis=1).astype(jnp.float32)
    exceeded_EM = jnp.concatenate([jnp.zeros((experts, 1)), exceeded_EM], axis=1)
    edges_M = jnp.linspace(high, low, bins + 1)
    return jax.vmap(lambda exceeded_M: jnp.interp(above, exceeded_M, edges_M))(exceeded_EM)


def update(config: MoEConfig, state: Mapping[str, Array], statistics: Mapping[str, Array]) -> dict[str, Array]:
    """One sweep: the bias moves to the quantile of the margins of the whole batch and is centred."""
    if "margin_EM" not in statistics:
        return dict(state)
    beta_E, margin_EM = state["beta_E"], statistics["margin_EM"]
    tokens = jnp.sum(margin_EM[0])
    quantile_E = upper_quantile(margin_EM, config.experts_per_token * tokens / config.num_experts, -REACH, REACH)
    moved_E = beta_E + config.options.rate * (quantile_E - beta_E)
    return {"beta_E": jnp.where(tokens > 0, moved_E - jnp.mean(moved_E), beta_E)}


QUANTILE = Router("Quantile balancing", "", "sigmoid scores, choice biased by the quantile that evens the load", route,
                  defaults={"score": "sigmoid", "z_weight": 0.0}, options=Options(),
                  parameters=topk.parameters, initial_state=initial_state, update=update, loss_weights=z_loss_alone,
                  noisy=jitters, check=refuse_constant_weight)
