"""Noisy top-k: token choice by logits with Gaussian noise, kept even by the squared variation of importance and load.

The noise makes the load a smooth function of the logits: the probability, over fresh noise for one expert, that it would
be among the K best, given the noisy logits of the others. Shazeer et al. 2017, arXiv 1701.06538, learns the size of the
noise; V-MoE, Riquelme et al. 2021, arXiv 2106.05974, fixes it at 1/E and fills full experts by batch priority.
"""

import dataclasses
from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig, check, key
from moejax.moe import balance
from moejax.moe.routing import select
from moejax.moe.routing.base import Parameter, Router, balance_and_z, balances_whole, refuse_constant_weight
from moejax.moe.types import RouterOutput, RoutingContext


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the noisy top-k family."""

    noise: str = key("learned", "standard deviation of the noise: softplus of a linear function of the token, or 1/E",
                     choices=("learned", "constant"))
    noise_floor: float = key(0.01, "added to the standard deviation that is learned", low=1e-6)
    importance_of: str = key("gates", "what the importance sums: the weights of the chosen experts, or the probabilities "
                             "without noise of all", choices=("gates", "probabilities"))
    load_threshold: str = key("exclusive", "what fresh noise has to beat: the K-th best of the other logits, or of all",
                              choices=("exclusive", "kth"))
    importance_weight: float = key(0.1, "weight of the squared variation of the importance", low=0)
    load_weight: float = key(0.1, "weight of the squared variation of the load", low=0)


def parameters(config: MoEConfig, width: int) -> dict[str, Parameter]:
    """One score vector per expert and, if it is learned, one for the size of its noise."""
    vectors = Parameter((width, config.num_experts), ("embed", "router"), config.router_init * width**-0.5)
    return {"w_DE": vectors} | ({"noise_DE": vectors} if config.options.noise == "learned" else {})


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Routes each token to the K experts with the best noisy logits, weighted by those; see `Router.route`."""
    jitter_key, noise_key = jax.random.split(context.key) if context.train else (None, None)
    x_TD = select.add_jitter(x_TD, config, context.replace(key=jitter_key))
    clean_TE = noisy_TE = select.linear(x_TD, parameters["w_DE"])
    if context.train:
        stddev_TE = (jax.nn.softplus(select.linear(x_TD, parameters["noise_DE"])) + config.options.noise_floor
                     if config.options.noise == "learned" else jnp.full_like(clean_TE, 1 / config.num_experts))
        noisy_TE = clean_TE + stddev_TE * jax.random.normal(noise_key, clean_TE.shape)

    experts, choices = config.num_experts, config.experts_per_token
    best_TM = select.best(noisy_TE, min(choices + 1, experts), context)  # the next one is what the chosen have to beat
    expert_TK = best_TM[:, :choices]
    log_scores_TE = jax.nn.log_softmax(noisy_TE)
    weight_TK = select.gate(log_scores_TE, expert_TK, config.renormalize)
    assignments = select.listed(expert_TK, config.route_scale * weight_TK, select.real(context, choices))
    count_E = balance.count_per_expert(assignments, experts)[0]

    if config.options.importance_of == "gates":
        chosen_TKE = expert_TK[:, :, None] == jnp.arange(experts)
        shares_TE = jnp.sum(jnp.where(chosen_TKE, weight_TK[:, :, None], 0.0), axis=1)
    else:
        shares_TE = jax.nn.softmax(clean_TE)
    importance_E = jnp.sum(jnp.where(context.mask_T[:, None], shares_TE, 0.0), axis=0)
    load_E = count_E.astype(jnp.float32)
    if context.train and choices < experts:
        chance_TE = chance(clean_TE, noisy_TE, stddev_TE, best_TM, config.options.load_threshold)
        load_E = jnp.sum(jnp.where(context.mask_T[:, None], chance_TE, 0.0), axis=0)
    statistics = {"assigned_E": count_E, "importance_E": importance_E, "load_E": load_E}
    losses = {
        "importance": balance.of_sums(balance.squared_variation, importance_E, context.whole_sum("importance_E"), context),
        "load": balance.of_sums(balance.squared_variation, load_E, context.whole_sum("load_E"), context),
    } | balance.balance_and_z(jnp.exp(log_scores_TE), clean_TE, assignments, context, config.balance_scope,
                              context.whole_sum("assigned_E"))
    return RouterOutput(assignments, losses, balance.entropy(log_scores_TE, context.mask_T), statistics)


def chance(clean_TE: Array, noisy_TE: Array, stddev_TE: Array, best_TM: Array, threshold: str) -> Array:
    """Probability that an expert is chosen if its own noise is drawn again: [T, E].

    Args:
      clean_TE: logits without noise.
      noisy_TE: the same with it.
      stddev_TE: standard deviation of the noise.
      best_TM: the M = K + 1 experts with the largest noisy logits, best first.
      threshold: `exclusive`, to be chosen a logit has to beat the K-th largest of the others', which for an expert that is
        among the K best is the one after; `kth`, the K-th largest for all (V-MoE).
    """
    *_, kth_T1, next_T1 = jnp.split(jnp.take_along_axis(noisy_TE, best_TM, axis=1), best_TM.shape[1], axis=1)
    if threshold == "exclusive":
        chosen_TE = jnp.any(best_TM[:, :-1, None] == jnp.arange(clean_TE.shape[1]), axis=1)
        kth_T1 = jnp.where(chosen_TE, next_T1, kth_T1)
    return jax.scipy.special.ndtr((clean_TE - kth_T1) / stddev_TE)


def loss_weights(config: MoEConfig) -> dict[str, float]:
    """Squared variation of importance and load, and the losses of the top-k family."""
    return balance_and_z(config) | {"importance": config.options.importance_weight, "load": config.options.load_weight}


def needs_whole(config: MoEConfig) -> bool:
    """Variations are no sums over tokens, nor is the load-balancing loss over the whole batch."""
    return config.options.importance_weight > 0 or config.options.load_weight > 0 or balances_whole(config)


def check_config(config: MoEConfig) -> None:
    """Raises `UserError` on scores that are no softmax, and on weights that are 1 whatever the router says."""
    check(config.score == "softmax", f"config.moe.router={config.router} has softmax weights; set "
          f"config.moe.score=softmax instead of {config.score}")
    refuse_constant_weight(config)


NOISY_TOPK = Router(
    "Noisy top-k", "1701.06538", "softmax over the K best logits with learned noise; importance and load losses", route,
    evaluation="no noise", defaults={"router_init": 0.0, "balance_weight": 0.0, "z_weight": 0.0}, options=Options(),
    parameters=parameters, loss_weights=loss_weights, noisy=lambda config: True, needs_whole=needs_whole,
    check=check_config)
V_MOE = NOISY_TOPK._replace(
    paper="V-MoE", arxiv="2106.05974", rule="top-k of softmax with noise of size 1/E; batch-prioritised capacity",
    defaults={"renormalize": False, "balance_weight": 0.0, "z_weight": 0.0, "capacity_factor": 1.05,
              "eval_capacity_factor": 1.05, "drop_policy": "token_weight"},
    options=Options(noise="constant", importance_of="probabilities", load_threshold="kth", importance_weight=0.005,
                    load_weight=0.005))
