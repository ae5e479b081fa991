"""Merged experts: the experts' parameters are averaged under the router's weights, and the one result runs.

SMEAR (Muqeeth et al. 2023, 2306.03745) merges once for each sequence, by the mean of its tokens, later ones included. Lory
(Zhong et al. 2024, 2405.03133) merges for each segment by the mean of the segment before. The paper's first segment looks
at itself without gradient; here it takes all experts evenly, so that the layer is causal to the last bit.
"""

import dataclasses
from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig, check, key
from moejax.moe import balance
from moejax.moe.routing import select
from moejax.moe.routing.base import Router
from moejax.moe.routing.topk import parameters
from moejax.moe.types import Merger, RouterOutput, RoutingContext


@dataclasses.dataclass(frozen=True)
class SmearOptions:
    """Options of SMEAR."""

    expert_dropout: float = key(0.1, "share of the experts that a sequence leaves out in training", low=0, high=0.99)


@dataclasses.dataclass(frozen=True)
class LoryOptions:
    """Options of Lory."""

    segment: int = key(64, "tokens of a segment, a divisor of the length (the paper: 256 of 4,096)", low=1)


def mean_per_group(x_TD: Array, mask_T: Array, groups: int) -> Array:
    """Mean of the real tokens of each of equal runs, float32 [G, D]; 0 where there is none."""
    mask_GN1 = mask_T.reshape(groups, -1, 1)
    total_GD = jnp.sum(jnp.where(mask_GN1, x_TD.astype(jnp.float32).reshape(groups, -1, x_TD.shape[-1]), 0.0), axis=1)
    return total_GD / jnp.maximum(jnp.sum(mask_GN1, axis=1), 1)


def decide(log_weight_GE: Array, context: RoutingContext) -> RouterOutput:
    """The decision by the logarithms of its weights; the entropy is that of each token's group."""
    log_weight_TE = jnp.repeat(log_weight_GE, len(context.mask_T) // len(log_weight_GE), axis=0)
    return RouterOutput(Merger(jnp.exp(log_weight_GE)), {}, balance.entropy(log_weight_TE, context.mask_T), {})


def smear(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Merges by the softmax of the scores of a sequence's mean; see `Router.route`."""
    logits_GE = select.linear(mean_per_group(x_TD, context.mask_T, context.sequences), parameters["w_DE"])
    if context.train and config.options.expert_dropout > 0:
        out_GE = jax.random.bernoulli(context.key, config.options.expert_dropout, logits_GE.shape)
        # At least one stays, else there is nothing to normalise.
        out_GE &= jnp.arange(logits_GE.shape[1]) != jnp.argmax(logits_GE, axis=1, keepdims=True)
        logits_GE = jnp.where(out_GE, jnp.finfo(jnp.float32).min, logits_GE)
    return decide(jax.nn.log_softmax(logits_GE), context)


def lory(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
         context: RoutingContext) -> RouterOutput:
    """Merges by the softmax of the scores of the mean of the segment before; see `Router.route`."""
    length = len(x_TD) // context.sequences
    segment = min(config.options.segment, length)
    check(length % segment == 0, f"config.moe.options.segment={segment} does not divide the {length} tokens of a sequence")
    logits_GE = select.linear(mean_per_group(x_TD, context.mask_T, len(x_TD) // segment), parameters["w_DE"])
    logits_BGE = logits_GE.reshape(context.sequences, length // segment, -1)
    before_BGE = jnp.pad(logits_BGE[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return decide(jax.nn.log_softmax(before_BGE).reshape(logits_GE.shape), context)


SMEAR = Router("SMEAR", "2306.03745", "one expert a sequence, merged from all by the mean of its tokens", smear,
               causal=False, evaluation="the same rule, so it cannot generate", generates=False, variable=True,
               options=SmearOptions(), parameters=parameters, passes=lambda config, length: 1,
               noisy=lambda config: config.options.expert_dropout > 0)
LORY = Router("Lory", "2405.03133", "one expert a segment, merged from all by the segment before", lory,
              evaluation="the same rule; it cannot generate, as it needs the segment before", generates=False,
              variable=True, options=LoryOptions(), parameters=parameters, passes=lambda config, length: 1)
