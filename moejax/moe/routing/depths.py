"""Mixture-of-Depths: a block works on a sequence's C best tokens and lets the others pass. Raposo et al. 2024, 2404.02258.

The choice among a sequence's tokens looks at later ones, so in evaluation and generation a predictor decides for each token
alone whether it would have been chosen. It learns that from the choices in training and sends no gradient to the model.
"""

import dataclasses
import math
from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig, key
from moejax.moe.routing import select
from moejax.moe.routing.base import Parameter, Router
from moejax.moe.types import Passage, RouterOutput, RoutingContext


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of Mixture-of-Depths."""

    share: float = key(0.125, "share of a sequence's tokens that the block works on", low=0, high=1)
    predictor_weight: float = key(0.01, "weight of the predictor's cross-entropy", low=0)


def parameters(config: MoEConfig, width: int) -> dict[str, Parameter]:
    """The score of a token, and the predictor's."""
    scores = Parameter((width, 1), ("embed", "router"), config.router_init * width**-0.5)
    return {"w_D1": scores, "predictor_D1": scores}


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """In training the C = ceil(share * tokens) best of each sequence, else those predicted; see `Router.route`."""
    score_T = select.linear(x_TD, parameters["w_D1"])[:, 0]
    predicted_T = select.linear(jax.lax.stop_gradient(x_TD), parameters["predictor_D1"])[:, 0]
    mask_BL = context.mask_T.reshape(context.sequences, -1)
    length = mask_BL.shape[1]
    most = math.ceil(config.options.share * length)
    ranking_BL = jnp.where(mask_BL, jax.lax.stop_gradient(score_T).reshape(mask_BL.shape), -jnp.inf)
    order_BL = jnp.argsort(-ranking_BL, axis=1, stable=True)
    rank_BL = jnp.argsort(order_BL, axis=1)
    room_B1 = jnp.ceil(config.options.share * jnp.sum(mask_BL, axis=1, keepdims=True)).astype(jnp.int32)
    chosen_T = (mask_BL & (rank_BL < room_B1)).reshape(-1)
    on_T = chosen_T if context.train else context.mask_T & (predicted_T > 0)
    entropy_T = jax.nn.softplus(predicted_T) - jnp.where(chosen_T, predicted_T, 0.0)
    loss = jnp.sum(jnp.where(context.mask_T, entropy_T, 0.0)) / jnp.maximum(context.totals.tokens, 1.0)
    passage = Passage(on_T, score_T * config.route_scale, capacity=most if context.train else length)
    return RouterOutput(passage, {"predictor": loss}, jnp.zeros(()), {})


def loss_weights(config: MoEConfig) -> dict[str, float]:
    """The predictor's cross-entropy."""
    return {"predictor": config.options.predictor_weight}


MIXTURE_OF_DEPTHS = Router(
    "Mixture-of-Depths", "2404.02258", "a block works on a sequence's best tokens, the others pass", route, causal=False,
    evaluation="a predictor decides for each token alone", variable=True, options=Options(), parameters=parameters,
    loss_weights=loss_weights, level="block", passes=lambda config, length: config.options.share,
    defaults={"experts_per_token": 1})
