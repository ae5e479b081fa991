"""Experts that compute nothing: token choice among E real experts and, behind them, Z special ones.

In order: zero experts give 0, copy experts their input x, and constant expert j gives a_1 x + a_2 v_j with
(a_1, a_2) = softmax(x W_j). A token takes its K best of all, so how many real experts it reaches is up to the router.
AdaMoE (2406.13233) has zero experts, MoE++ (2410.07348) one of each kind and two constants, LongCat-Flash (2509.01322)
copies. Here the suffix E counts the special experts, too.
"""

import dataclasses
from typing import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.config import MoEConfig, check, key
from moejax.moe import balance
from moejax.moe.routing import select
from moejax.moe.routing.base import Parameter, Router, balance_and_z, balances_whole, jitters, refuse_constant_weight
from moejax.moe.types import RouterOutput, RoutingContext


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of routers with special experts."""

    zero: int = key(0, "experts that give 0", low=0, high=1 << 20)
    copy: int = key(0, "experts that give their input", low=0, high=1 << 20)
    constant: int = key(0, "experts that give a learned mixture of their input and a learned vector", low=0, high=1 << 20)
    tau: float = key(1.0, "factor of special experts in the load-balancing loss; below 1 they get more tokens", low=0.01)
    expected: float = key(0.0, "real experts a token takes on average, to which the bias leads; 0 is K E / (E + Z)", low=0)
    gating_residual: bool = key(False, "add a learned map of the logits of the sparse layer before")


def count(config: MoEConfig) -> int:
    """E + Z: real and special experts."""
    return config.num_experts + config.options.zero + config.options.copy + config.options.constant


def expected(config: MoEConfig) -> float:
    """K_e, the real experts that a token takes on average: as the option says, else in proportion to their number."""
    return config.options.expected or config.experts_per_token * config.num_experts / count(config)


def parameters(config: MoEConfig, width: int) -> dict[str, Parameter]:
    """One score vector per expert, the map of the layer before, and the constant experts' own."""
    options, experts = config.options, count(config)
    own = {"w_DE": Parameter((width, experts), ("embed", "router"), config.router_init * width**-0.5)}
    if options.gating_residual:
        # As in the released code: a layer adds a third of the variance before it, so depth adds up to half of one layer's.
        own["residual_EE"] = Parameter((experts, experts), ("router", None), (3 * experts)**-0.5)
    if options.constant:
        own["mix_CD2"] = Parameter((options.constant, width, 2), (None, "embed", None), width**-0.5)
        own["constant_CD"] = Parameter((options.constant, width), (None, "embed"), 1.0)
    return own


def initial_state(config: MoEConfig, vocab_size: int) -> dict[str, Array]:
    """The selection bias of real and special experts, if it is in use."""
    return {"bias_E": jnp.zeros(count(config), jnp.float32)} if config.bias_rate > 0 else {}


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Routes each token to its K best experts, of which only the real ones are dispatched; see `Router.route`."""
    options, real, choices = config.options, config.num_experts, config.experts_per_token
    logits_TE = select.linear(select.add_jitter(x_TD, config, context), parameters["w_DE"])
    if options.gating_residual and context.carry_TC is not None:
        logits_TE = logits_TE + select.linear(context.carry_TC, parameters["residual_EE"])
    log_scores_TE = select.log_scores(logits_TE, config.score)
    # The bias enters the choice alone.
    ranking_TE = jnp.exp(log_scores_TE) + state["bias_E"] if "bias_E" in state else log_scores_TE
    expert_TK = select.best(ranking_TE, choices, context)

    mask_TK = select.real(context, choices)
    zero_TK = (expert_TK >= real) & (expert_TK < real + options.zero)
    weight_TK = gate(log_scores_TE, expert_TK, zero_TK, config.renormalize)
    weight_TK = jnp.where(mask_TK & ~zero_TK, config.route_scale * weight_TK, 0.0)
    real_TK = mask_TK & (expert_TK < real)
    assignments = select.listed(jnp.minimum(expert_TK, real - 1), jnp.where(real_TK, weight_TK, 0.0), real_TK)

    chosen = select.listed(expert_TK, weight_TK, mask_TK)
    statistics = {"assigned_E": balance.count_per_expert(chosen, count(config))[0]}
    log_probs_TE = jax.nn.log_softmax(log_scores_TE)
    losses = balance.balance_and_z(select.linear(jnp.exp(log_probs_TE), jnp.asarray(pull(config))), logits_TE, chosen,
                                   context, config.balance_scope, context.whole_sum("assigned_E"))
    return RouterOutput(assignments, losses, balance.entropy(log_probs_TE, context.mask_T), statistics,
                        added_TD=added(config, parameters, x_TD.astype(jnp.float32), expert_TK, weight_TK),
                        carry_TC=logits_TE if options.gating_residual else None)


def gate(log_scores_TE: Array, expert_TK: Array, zero_TK: Array, renormalize: bool) -> Array:
    """The chosen experts' scores [T, K]; if `renormalize`, divided by the sum of those that are not of zero experts.

    A token with nothing but zero experts has no such sum: it gets finite weights here that do not count.
    """
    log_chosen_TK = jnp.take_along_axis(log_scores_TE, expert_TK, axis=1)
    if not renormalize:
        return jnp.exp(log_chosen_TK)
    return jax.nn.softmax(jnp.where(zero_TK, jnp.finfo(jnp.float32).min, log_chosen_TK))


def added(config: MoEConfig, parameters: Mapping[str, Array], x_TD: Array, expert_TK: Array,
          weight_TK: Array) -> Array | None:
    """What copy and constant experts give, weighted, in float32: [T, D]; None if there are none of them."""
    options = config.options
    first = config.num_experts + options.zero
    if options.copy + options.constant == 0:
        return None
    copy_TK = (expert_TK >= first) & (expert_TK < first + options.copy)
    scale_T = jnp.sum(jnp.where(copy_TK, weight_TK, 0.0), axis=1)
    if options.constant == 0:
        return scale_T[:, None] * x_TD
    constant_TKC = expert_TK[:, :, None] == first + options.copy + jnp.arange(options.constant)
    weight_TC = jnp.sum(jnp.where(constant_TKC, weight_TK[:, :, None], 0.0), axis=1)
    logits_TC2 = jnp.einsum("td,cdm->tcm", x_TD, parameters["mix_CD2"], precision=jax.lax.Precision.HIGHEST)
    weight_TC2 = weight_TC[:, :, None] * jax.nn.softmax(logits_TC2)
    scale_T = scale_T + jnp.sum(weight_TC2[:, :, 0], axis=1)
    return scale_T[:, None] * x_TD + select.linear(weight_TC2[:, :, 1], parameters["constant_CD"])


def pull(config: MoEConfig) -> np.ndarray:
    """The matrix [E, E] that turns probabilities P into the terms which loads f multiply in the load-balancing loss.

    The loss is E sum_e eta_e f_e P_e, with eta = 1 for real experts and tau for special ones (MoE++), over the harmonic
    mean of eta: 1 at the loads that make it least for P = f, those in proportion to 1 / eta, and where all are 1. Experts
    that do the same share one averaged load (AdaMoE, for its null experts); to average their P is the same.
    """
    options, real = config.options, config.num_experts
    kind_E = np.concatenate([np.arange(real), np.full(options.zero, -1), np.full(options.copy, -2),
                             real + np.arange(options.constant)])
    eta_E = np.where(np.arange(count(config)) < real, 1.0, options.tau)
    same_EE = (kind_E[:, None] == kind_E).astype(np.float64)
    return (same_EE / same_EE.sum(axis=0) * eta_E * np.mean(1 / eta_E)).astype(np.float32)


def update(config: MoEConfig, state: Mapping[str, Array], statistics: Mapping[str, Array]) -> dict[str, Array]:
    """Moves the selection bias of real experts towards their share of all choices, that of special ones never.

    LongCat-Flash: the step is rate * (K_e / (K E) - T_e / (K T)), or the sign of it, for K_e expected real experts a token.
    """
    if "bias_E" not in state:
        return {}
    real, choices = config.num_experts, config.experts_per_token
    assigned_E = statistics["assigned_E"].astype(jnp.float32)
    total = jnp.sum(assigned_E)
    error_E = expected(config) / (choices * real) - assigned_E / jnp.maximum(total, 1.0)
    step_E = config.bias_rate * (jnp.sign(error_E) if config.bias_rule == "sign" else error_E)
    moves_E = (jnp.arange(count(config)) < real) & (total > 0)
    return {"bias_E": state["bias_E"] + jnp.where(moves_E, step_E, 0.0)}


def carry(config: MoEConfig) -> int:
    """The logits of all experts, for the gating residual."""
    return count(config) if config.options.gating_residual else 0


def check_config(config: MoEConfig) -> None:
    """Raises `UserError` on a single renormalised choice, whose router would never learn, and on too many expected."""
    choices = config.experts_per_token
    refuse_constant_weight(config)
    check(config.options.expected <= choices, f"config.moe.options.expected={config.options.expected} is more than "
          f"config.moe.experts_per_token={choices}")


ADAMOE = Router("AdaMoE", "2406.13233", "the K best of real and null experts; null ones give 0", route, variable=True,
                defaults={"experts_per_token": 4, "balance_weight": 0.01, "z_weight": 0.0}, options=Options(zero=4),
                parameters=parameters, initial_state=initial_state, update=update, loss_weights=balance_and_z,
                noisy=jitters, needs_whole=balances_whole, carry=carry, check=check_config,
                passes=lambda config, length: expected(config))
MOE_PP = ADAMOE._replace(
    paper="MoE++", arxiv="2410.07348", rule="the K best of real, zero, copy and constant experts; gating residual",
    defaults={"experts_per_token": 2, "renormalize": False, "balance_weight": 0.01, "z_weight": 0.0},
    options=Options(zero=1, copy=1, constant=2, tau=0.75, gating_residual=True))
# The rate is not published. An expert without tokens gains rate / (E + Z), here 1% of the mean score, whatever E is; with 8
# experts that is about the step of loss-free balancing with softmax scores.
LONGCAT = ADAMOE._replace(
    paper="LongCat-Flash", arxiv="2509.01322", rule="the K best of real and identity experts, biased to a mean of K_e real",
    defaults={"experts_per_token": 4, "renormalize": False, "bias_rate": 0.01, "bias_rule": "proportional",
              "balance_weight": 0.0, "z_weight": 0.0},
    options=Options(copy=4))
