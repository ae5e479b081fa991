"""Token choice: every token takes its K best experts, by a linear score.

One rule with switches covers most published routers; `presets.py` sets them as each paper does. Groups: only experts of
the `kept_groups` best groups of experts may be chosen (DeepSeek-V2 2405.04434 by a group's largest score, DeepSeek-V3
2412.19437 by the sum of its two largest). Bias: auxiliary-loss-free balancing (2408.15664).
"""

import dataclasses
from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig, check, key
from moejax.moe import balance
from moejax.moe.routing import select
from moejax.moe.routing.base import Parameter, Router, balance_and_z, balances_whole, jitters, refuse_constant_weight
from moejax.moe.types import RouterOutput, RoutingContext


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the top-k family."""

    gate: str = key("output", "what the weight multiplies: an expert's output, or its input (Llama-4; K = 1 only)",
                    choices=("output", "input"))
    groups: int = key(1, "equal groups of experts, a divisor of E; 1 has none", low=1)
    kept_groups: int = key(1, "groups among whose experts a token may choose", low=1)
    group_score: str = key("max", "score of a group: its largest or the sum of its two largest (biased) scores",
                           choices=("max", "top2"))
    group_balance_weight: float = key(0.0, "weight of the load-balancing loss over groups (device-level balance)", low=0)
    communication_weight: float = key(0.0, "weight of the balance of tokens sent to groups (DeepSeek-V2)", low=0)
    bias: bool = key(False, "a learned bias on the scores (GPT-OSS)")
    unbiased_balance: bool = key(False, "the load-balancing loss counts the choices as they were without the bias")


def parameters(config: MoEConfig, width: int) -> dict[str, Parameter]:
    """One score vector per expert."""
    return {"w_DE": Parameter((width, config.num_experts), ("embed", "router"), config.router_init * width**-0.5)}


def parameters_with_bias(config: MoEConfig, width: int) -> dict[str, Parameter]:
    """The same, and a bias per expert if that is set."""
    bias = {"b_E": Parameter((config.num_experts,), ("router",), 0.0)} if config.options.bias else {}
    return parameters(config, width) | bias


def initial_state(config: MoEConfig, vocab_size: int) -> dict[str, Array]:
    """The selection bias, if it is in use."""
    return {"bias_E": jnp.zeros(config.num_experts, jnp.float32)} if config.bias_rate > 0 else {}


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Routes each token to its K best experts; see `Router.route`."""
    logits_TE = select.linear(select.add_jitter(x_TD, config, context), parameters["w_DE"])
    if config.options.bias:
        logits_TE += parameters["b_E"]
    return route_by_logits(config, config.options, logits_TE, state.get("bias_E"), context)


def route_by_logits(config: MoEConfig, options: Options, logits_TE: Array, bias_E: Array | None,
                    context: RoutingContext) -> RouterOutput:
    """The rule from the logits on: choice, weights, losses, statistics."""
    log_scores_TE = select.log_scores(logits_TE, config.score)
    # Logarithms rank experts as the scores do and do not underflow, but sums of scores need the scores.
    plain_TE = log_scores_TE if bias_E is None and options.group_score == "max" else jnp.exp(log_scores_TE)
    # The bias enters the choice alone: weights and losses come from the scores themselves.
    ranking_TE = plain_TE if bias_E is None else plain_TE + bias_E
    expert_TK = select.best(within_groups(ranking_TE, options), config.experts_per_token, context)
    weight_TK = config.route_scale * select.gate(log_scores_TE, expert_TK, config.renormalize)
    mask_TK = select.real(context, config.experts_per_token)
    by_input = options.gate == "input"
    assignments = select.listed(expert_TK, jnp.ones_like(weight_TK) if by_input else weight_TK, mask_TK)

    log_probs_TE = jax.nn.log_softmax(log_scores_TE)
    probs_TE, counted = jnp.exp(log_probs_TE), assignments
    statistics = {"assigned_E": balance.count_per_expert(assignments, config.num_experts)[0]}
    if options.unbiased_balance and bias_E is not None:
        counted_TK = select.best(within_groups(plain_TE, options), config.experts_per_token, context)
        counted = select.listed(counted_TK, weight_TK, mask_TK)
        statistics["preferred_E"] = balance.count_per_expert(counted, config.num_experts)[0]
    whole_E = context.whole_sum("preferred_E" if "preferred_E" in statistics else "assigned_E")
    losses = balance.balance_and_z(probs_TE, logits_TE, counted, context, config.balance_scope, whole_E)
    if options.groups > 1:
        group_TK = expert_TK // (config.num_experts // options.groups)
        probs_TG = jnp.sum(probs_TE.reshape(len(probs_TE), options.groups, -1), axis=-1)
        statistics["grouped_E"] = balance.count_per_expert(select.listed(group_TK, weight_TK, mask_TK), options.groups)[0]
        reached_TG = context.mask_T[:, None] & jnp.any(group_TK[:, :, None] == jnp.arange(options.groups), axis=1)
        statistics["reached_E"] = jnp.sum(reached_TG, axis=0, dtype=jnp.int32)
        for name, count, most in (("group_balance", "grouped_E", config.experts_per_token),
                                  ("communication", "reached_E", options.kept_groups)):
            count_G = (context.whole or statistics)[count]
            losses[name] = balance.balance_of_counts(probs_TG, count_G / most, context)
    return RouterOutput(assignments, losses, balance.entropy(log_probs_TE, context.mask_T), statistics,
                        input_scale_T=weight_TK[:, 0] if by_input else None)


def within_groups(ranking_TE: Array, options: Options) -> Array:
    """The ranking with experts outside a token's best groups at -inf: at 0 they could still win against a bias below 0."""
    if options.groups == 1:
        return ranking_TE
    tokens, experts = ranking_TE.shape
    ranking_TGE = jax.lax.stop_gradient(ranking_TE).reshape(tokens, options.groups, -1)
    if options.group_score == "top2":
        top_TG2 = jax.lax.top_k(ranking_TGE, min(2, experts // options.groups))[0]
        group_TG = jnp.sum(top_TG2, axis=-1)
    else:
        group_TG = jnp.max(ranking_TGE, axis=-1)
    _, kept_TM = jax.lax.top_k(group_TG, options.kept_groups)
    kept_TG = jnp.any(kept_TM[:, :, None] == jnp.arange(options.groups), axis=1)
    return jnp.where(kept_TG[:, :, None], ranking_TGE, -jnp.inf).reshape(tokens, experts)


def update(config: MoEConfig, state: Mapping[str, Array], statistics: Mapping[str, Array]) -> dict[str, Array]:
    """Moves the selection bias against the load of the whole batch."""
    if "bias_E" not in state:
        return {}
    return {"bias_E": balance.update_bias(state["bias_E"], statistics["assigned_E"], config.bias_rate,
                                          config.bias_rule)}


def loss_weights(config: MoEConfig) -> dict[str, float]:
    """Load-balancing loss, router z-loss and, with groups of experts, their balance."""
    weights = balance_and_z(config)
    if config.options.groups > 1:
        weights |= {"group_balance": config.options.group_balance_weight,
                    "communication": config.options.communication_weight}
    return weights


def needs_whole(config: MoEConfig) -> bool:
    """Losses over the load of the whole batch do."""
    weights = loss_weights(config)
    return balances_whole(config) or weights.get("group_balance", 0) > 0 or weights.get("communication", 0) > 0


def check_config(config: MoEConfig) -> None:
    """Raises `UserError` on a single renormalised choice, whose router would never learn, and on impossible groups."""
    options, experts, choices = config.options, config.num_experts, config.experts_per_token
    if experts > 1:  # with one expert there is nothing to learn
        refuse_constant_weight(config)
    check(options.gate == "output" or choices == 1,
          "config.moe.options.gate=input scales the input of a token's only expert; set config.moe.experts_per_token=1")
    check(experts % options.groups == 0, f"config.moe.options.groups={options.groups} does not divide "
          f"config.moe.num_experts={experts}")
    check(options.kept_groups <= options.groups, f"config.moe.options.kept_groups={options.kept_groups} is more than "
          f"config.moe.options.groups={options.groups}")
    room = experts // options.groups * options.kept_groups
    check(choices <= room, f"config.moe.experts_per_token={choices} is more than the {room} experts of "
          f"config.moe.options.kept_groups={options.kept_groups} groups")


TOPK = Router("Top-k", "", "the K best experts of a linear score; all switches at hand", route, options=Options(),
              parameters=parameters_with_bias, initial_state=initial_state, update=update, loss_weights=loss_weights,
              noisy=jitters, needs_whole=needs_whole, check=check_config)
