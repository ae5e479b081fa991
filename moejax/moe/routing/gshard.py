"""GShard top-2: the best expert always, the second at random in proportion to its weight. Lepikhin et al., 2006.16668.

The load-balancing loss counts first choices alone. A capacity is factor * 2 T / E places, so GShard's 2 T / E is a factor
of 1. Code in public differs in what becomes of the second choice; `options.second` has all readings.
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
    """Options of GShard top-2; g is the weight of the second expert beside that of the first, at most 1/2."""

    second: str = key("proportional", "training: the second expert is kept with probability min(1, 2 g), or min(1, g / "
                      "threshold) (Mesh TensorFlow), or is sampled among the others (torchscale), or is always kept",
                      choices=("proportional", "threshold", "sampled", "always"))
    threshold: float = key(0.2, "second=threshold: the g from which on it is always kept", low=0)


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Routes each token to its best expert and perhaps a second; see `Router.route`."""
    jitter_key, second_key = jax.random.split(context.key) if noisy(config) and context.train else (None, None)
    logits_TE = select.linear(select.add_jitter(x_TD, config, context.replace(key=jitter_key)), parameters["w_DE"])
    log_scores_TE = select.log_scores(logits_TE, config.score)
    expert_TK = select.best(log_scores_TE, 2, context)
    second = config.options.second if context.train else "always"
    if second == "sampled":
        expert_TK = sample_second(log_scores_TE, expert_TK[:, :1], second_key, context)
    valid_TK = select.real(context, 2)
    if second in ("proportional", "threshold"):
        certain = 0.5 if second == "proportional" else config.options.threshold
        share_T = select.gate(log_scores_TE, expert_TK, renormalize=True)[:, 1]
        kept_T = certain * jax.random.uniform(second_key, share_T.shape) < share_T
        valid_TK &= jnp.stack([jnp.ones_like(kept_T), kept_T], axis=1)
    # The weights are those of both experts even where the second is left out, so the first one's stays below 1.
    weight_TK = config.route_scale * select.gate(log_scores_TE, expert_TK, config.renormalize)
    assignments = select.listed(expert_TK, jnp.where(valid_TK, weight_TK, 0.0), valid_TK)

    log_probs_TE = jax.nn.log_softmax(log_scores_TE)
    first = select.listed(expert_TK[:, :1], weight_TK[:, :1], valid_TK[:, :1])
    statistics = {"first_E": balance.count_per_expert(first, config.num_experts)[0]}
    losses = balance.balance_and_z(jnp.exp(log_probs_TE), logits_TE, first, context, config.balance_scope,
                                   context.whole_sum("first_E"))
    return RouterOutput(assignments, losses, balance.entropy(log_probs_TE, context.mask_T), statistics)


def sample_second(log_scores_TE: Array, first_T1: Array, noise_key: Array, context: RoutingContext) -> Array:
    """The first expert and one drawn among the others in proportion to their scores (Gumbel-max): int32 [T, 2]."""
    drawn_TE = log_scores_TE + jax.random.gumbel(noise_key, log_scores_TE.shape)
    others_TE = jnp.where(jnp.arange(log_scores_TE.shape[1]) == first_T1, -jnp.inf, drawn_TE)
    return jnp.concatenate([first_T1, select.best(others_TE, 1, context)], axis=1)


def noisy(config: MoEConfig) -> bool:
    """Unless the second expert is always kept and the input is clean."""
    return config.options.second != "always" or config.jitter > 0


def check_config(config: MoEConfig) -> None:
    """Raises `UserError` unless a token has two experts."""
    check(config.experts_per_token == 2, f"config.moe.experts_per_token={config.experts_per_token} with "
          f"config.moe.num_experts={config.num_experts}: config.moe.router={config.router} takes two experts of two or "
          "more; set experts_per_token=2, or take router=topk")


GSHARD = Router(
    "GShard", "2006.16668", "the best expert, and the second at random by its weight; capacity, first choices first", route,
    evaluation="always both experts", variable=True,
    defaults={"experts_per_token": 2, "balance_weight": 0.01, "z_weight": 0.0, "capacity_factor": 1.0,
              "eval_capacity_factor": 1.0, "drop_policy": "choice_major", "routing_group": "sequence"},
    options=Options(), parameters=topk.parameters, loss_weights=balance_and_z, noisy=noisy, needs_whole=balances_whole,
    check=check_config)
