"""Load-balancing losses and state updates that routers share.

Every loss is a share: a sum over the tokens at hand divided by a size of the whole batch. The shares of micro-batches
add up to the loss of the big batch, which is what makes gradient accumulation exact.
"""

from typing import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.types import Assignments, RoutingContext


def count_per_expert(assignments: Assignments, num_experts: int, groups: int = 1) -> Array:
    """Valid pairs per group and expert, int32 [groups, E]; groups are equal runs of the list."""
    expert_GN = assignments.expert_N.reshape(groups, -1)
    valid_GN = assignments.valid_N.reshape(groups, -1).astype(jnp.int32)
    return jax.vmap(lambda e, v: jnp.zeros(num_experts, jnp.int32).at[e].add(v))(expert_GN, valid_GN)


def entropy(log_probs_TE: Array, mask_T: Array) -> Array:
    """Sum over real tokens of the entropy, in nats, of a distribution over experts given by its logarithm."""
    per_token_T = -jnp.sum(jnp.exp(log_probs_TE) * log_probs_TE, axis=-1)
    return jnp.sum(jnp.where(mask_T, per_token_T, 0.0))


def load_balancing_loss(probs_TE: Array, assignments: Assignments, context: RoutingContext, scope: str,
                        whole_E: Array | None = None) -> Array:
    """E * sum_e f_e P_e: 1 at perfect balance for every k, up to E when one expert takes all.

    f_e is the share of the pairs that expert e got before any dropping (no gradient flows through it) and P_e the mean
    of its router probability, both over the tokens of `scope`: each sequence, each shard of the batch, or the whole
    batch. Switch Transformers, arXiv 2101.03961, equation 4, with counts divided by k; the global scope is that of
    "Demons in the Detail", arXiv 2501.11873.

    Args:
      probs_TE: the router's distribution over experts for each token.
      assignments: a token-major list.
      context: mask and totals.
      scope: sequence, shard or global.
      whole_E: for the global scope the pairs per expert in the whole batch, if it comes in parts.

    Returns:
      A float32 scalar.
    """
    num_experts = probs_TE.shape[-1]
    groups = {"sequence": context.sequences, "shard": context.shards, "global": 1}[scope]
    probs_GE = jnp.sum(jnp.where(context.mask_T[:, None], probs_TE, 0.0).reshape(groups, -1, num_experts), axis=1)
    if scope == "global" and whole_E is not None:
        count_GE = whole_E[None].astype(jnp.float32)
    else:
        count_GE = count_per_expert(assignments, num_experts, groups).astype(jnp.float32)
    share_GE = jax.lax.stop_gradient(count_GE / jnp.maximum(jnp.sum(count_GE, axis=-1, keepdims=True), 1.0))
    if scope == "global":
        return num_experts * jnp.sum(share_GE * probs_GE) / jnp.maximum(context.totals.tokens, 1.0)
    tokens_G = jnp.sum(context.mask_T.reshape(groups, -1), axis=1)
    loss_G = num_experts * jnp.sum(share_GE * probs_GE, axis=-1) / jnp.maximum(tokens_G, 1)
    nonempty = context.totals.sequences if scope == "sequence" else jnp.sum(tokens_G > 0)
    return jnp.sum(loss_G) / jnp.maximum(nonempty, 1.0)


def balance_of_counts(probs_TG: Array, count_G: Array, context: RoutingContext) -> Array:
    """G * sum_g f_g P_g over the whole batch, for f_g = count_g / tokens, without gradient, and P_g the mean probability.

    With groups of experts these are the device-level and communication losses of DeepSeek-V2, arXiv 2405.04434; both are
    1 at perfect balance, if `count_G` counts one pair a token.
    """
    tokens = jnp.maximum(context.totals.tokens, 1.0)
    probs_G = jnp.sum(jnp.where(context.mask_T[:, None], probs_TG, 0.0), axis=0) / tokens
    return probs_TG.shape[-1] * jnp.sum(jax.lax.stop_gradient(count_G / tokens) * probs_G)


def of_sums(function: Callable[[Array], Array], part_E: Array, whole_E: Array | None, context: RoutingContext) -> Array:
    """A loss that is a function of sums over the whole batch, of which this part holds `part_E`.

    The value is the part's share by tokens of function(whole), and the gradient that of function at the whole sums
    through this part's summands; so the shares of all parts add up to the loss of the big batch in value and gradient.
    """
    if whole_E is None:
        return function(part_E)
    value, pull_back = jax.vjp(function, jax.lax.stop_gradient(whole_E.astype(jnp.float32)))
    slope_E, = pull_back(jnp.ones_like(value))
    share = jnp.sum(context.mask_T) / jnp.maximum(context.totals.tokens, 1.0)
    return jax.lax.stop_gradient(share * value) + jnp.sum(
        jax.lax.stop_gradient(slope_E) * (part_E - jax.lax.stop_gradient(part_E)))


def squared_variation(sum_E: Array) -> Array:
    """Variance over squared mean, the variance that of a whole population; 0 if all sums are 0. Shazeer et al. 2017."""
    # It does not depend on the scale, and the square of a tiny mean would be 0.
    most = jax.lax.stop_gradient(jnp.max(jnp.abs(sum_E)))
    sum_E = sum_E / jnp.where(most == 0, 1.0, most)
    mean = jnp.mean(sum_E)
    return jnp.mean((sum_E - mean)**2) / jnp.where(mean == 0, 1.0, mean)**2


def z_loss(logits_TE: Array, context: RoutingContext) -> Array:
    """Mean over real tokens of logsumexp(logits)^2, of the raw logits. ST-MoE, arXiv 2202.08906, equation 5."""
    log_z_T = jax.nn.logsumexp(logits_TE, axis=-1)
    return jnp.sum(jnp.where(context.mask_T, log_z_T**2, 0.0)) / jnp.maximum(context.totals.tokens, 1.0)


def balance_and_z(probs_TE: Array, logits_TE: Array, counted: Assignments, context: RoutingContext, scope: str,
                  whole_E: Array | None) -> dict[str, Array]:
    """The two losses that most token-choice routers have: `balance` (see `load_balancing_loss`) and `router_z`."""
    return {"balance": load_balancing_loss(probs_TE, counted, context, scope, whole_E),
            "router_z": z_loss(logits_TE, context)}


def update_bias(bias_E: Array, assigned_E: Array, rate: float, rule: str) -> Array:
    """One step of auxiliary-loss-free balancing: the selection bias of overloaded experts falls, of others it rises.

    Args:
      bias_E: float32.
      assigned_E: pairs per expert in the whole batch of this optimizer step, before dropping.
      rate: size of the step.
      rule: `sign` moves by rate * sign(mean - assigned); `proportional` by rate * (mean - assigned) / mean.

    Wang et al. 2024, arXiv 2408.15664.
    """
    assigned_E = assigned_E.astype(jnp.float32)
    mean = jnp.mean(assigned_E)
    error_E = mean - assigned_E
    return bias_E + rate * (jnp.sign(error_E) if rule == "sign" else error_E / jnp.where(mean > 0, mean, 1.0))
