"""Expert threshold: an expert takes every token whose score exceeds the expert's cutoff. Sun et al. 2026, arXiv 2603.11535.

The cutoff is a moving average of the score that a share K/E of the batch's tokens exceeds: expert choice over all tokens
seen so far rather than over the batch, hence causal. A token takes K experts on average, and maybe none.
"""

import dataclasses
import math
from statistics import NormalDist
from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig, check, key
from moejax.moe import balance
from moejax.moe.routing import select, topk
from moejax.moe.routing.base import Router, jitters, z_loss_alone
from moejax.moe.routing.quantile import histogram, upper_quantile
from moejax.moe.types import RouterOutput, RoutingContext


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of expert threshold routing."""

    decay: float = key(0.99, "weight of the past in the moving average of the cutoffs", low=0, high=0.9999)
    bins: int = key(4096, "bins of the histogram of scores from which quantiles are read", low=1, high=1 << 20)


def initial_state(config: MoEConfig, vocab_size: int) -> dict[str, Array]:
    """The cutoffs that let through a share K/E of the initial logits, which are about normal, and no step yet."""
    passed = config.experts_per_token / config.num_experts
    logit = -math.inf if passed == 1 else NormalDist().inv_cdf(1 - passed) * config.router_init
    return {"cutoff_E": jnp.full(config.num_experts, jax.nn.sigmoid(logit), jnp.float32), "steps": jnp.zeros(())}


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Routes each token to the experts whose cutoff its score exceeds, weighted by that score; see `Router.route`."""
    logits_TE = select.linear(select.add_jitter(x_TD, config, context), parameters["w_DE"])
    log_scores_TE = select.log_scores(logits_TE, config.score)
    score_TE = jnp.exp(log_scores_TE)
    # Experts for all tokens have the cutoff 0, which a score that underflows does not exceed.
    on_TE = (score_TE > state["cutoff_E"]) | (config.experts_per_token == config.num_experts)

    expert_TE = select.best(jnp.where(on_TE, log_scores_TE, -jnp.inf), config.num_experts, context)
    valid_TE = jnp.take_along_axis(on_TE, expert_TE, axis=1) & context.mask_T[:, None]
    weight_TE = config.route_scale * jnp.where(valid_TE, jnp.take_along_axis(score_TE, expert_TE, axis=1), 0.0)
    return RouterOutput(
        select.listed(expert_TE, weight_TE, valid_TE),
        {"router_z": balance.z_loss(logits_TE, context)},
        balance.entropy(jax.nn.log_softmax(log_scores_TE), context.mask_T),
        {"score_EM": histogram(score_TE, context.mask_T, 0.0, 1.0, config.options.bins)})


def update(config: MoEConfig, state: Mapping[str, Array], statistics: Mapping[str, Array]) -> dict[str, Array]:
    """Moves the cutoffs towards the batch's quantiles; the average weighs the steps so far alone, not the start."""
    decay, score_EM = config.options.decay, statistics["score_EM"]
    tokens = jnp.sum(score_EM[0])
    quantile_E = upper_quantile(score_EM, config.experts_per_token * tokens / config.num_experts, 0.0, 1.0)
    steps = state["steps"] + 1
    rate = (1 - decay) / (1 - decay**steps)
    moved = {"cutoff_E": state["cutoff_E"] + rate * (quantile_E - state["cutoff_E"]), "steps": steps}
    return {name: jnp.where(tokens > 0, value, state[name]) for name, value in moved.items()}


def check_config(config: MoEConfig) -> None:
    """Raises `UserError` on weights that would compare experts, which are decided one by one."""
    check(config.score == "sigmoid" and not config.renormalize,
          "config.moe.router=expert_threshold weighs each expert by its own sigmoid; leave config.moe.score and "
          "config.moe.renormalize at auto")


THRESHOLD = Router("Expert threshold", "2603.11535", "each expert takes the tokens above its running quantile; causal",
                   route, variable=True,
                   defaults={"score": "sigmoid", "renormalize": False, "z_weight": 0.0},
                   options=Options(), parameters=topk.parameters, initial_state=initial_state, update=update,
                   loss_weights=z_loss_alone, noisy=jitters, check=check_config)
