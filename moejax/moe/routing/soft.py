"""Soft MoE: every slot of every expert takes its own mixture of a sequence's tokens. Puigcerver et al. 2023, 2308.00951.

Nothing is dropped and nothing is sparse, but a slot mixes early tokens with later ones, so the layer is not causal. Experts
compute for E * p slots a sequence; p = K * L / E slots cost what K experts a token do.
"""

import dataclasses
from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig, key
from moejax.moe import balance
from moejax.moe.routing import select
from moejax.moe.routing.base import Parameter, Router
from moejax.moe.types import RouterOutput, RoutingContext, Slots


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of Soft MoE."""

    slots: int = key(1, "slots of an expert for each sequence (p)", low=1)


def parameters(config: MoEConfig, width: int) -> dict[str, Parameter]:
    """A direction for every slot, and the sharpness of the softmaxes."""
    shape = (width, config.num_experts, config.options.slots)
    return {"phi_DES": Parameter(shape, ("embed", "router", None), config.router_init * width**-0.5),
            "scale": Parameter((), (), 0.0, mean=1.0)}


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Softmax over tokens for what a slot takes in, over slots for what a token gets back; see `Router.route`."""
    x_BLD = select.unit(x_TD.astype(jnp.float32), axis=-1).reshape(context.sequences, -1, x_TD.shape[-1])
    logits_BLES = parameters["scale"] * jnp.einsum(
        "bld,des->bles", x_BLD, select.unit(parameters["phi_DES"], axis=0), precision=jax.lax.Precision.HIGHEST)
    batch, length, experts, per_expert = logits_BLES.shape
    mask_BL11 = context.mask_T.reshape(batch, length, 1, 1)
    # Finite, so that a sequence of nothing but padding has numbers to mask.
    lowest = jnp.finfo(jnp.float32).min
    dispatch_BLES = jax.nn.softmax(jnp.where(mask_BL11, logits_BLES, lowest), axis=1) * mask_BL11
    log_combine_BLN = jax.nn.log_softmax(logits_BLES.reshape(batch, length, -1))
    combine_BLES = jnp.exp(log_combine_BLN).reshape(logits_BLES.shape) * mask_BL11
    log_share_BLE = jax.nn.logsumexp(log_combine_BLN.reshape(logits_BLES.shape), axis=-1)
    entropy = balance.entropy(log_share_BLE.reshape(-1, experts), context.mask_T)
    return RouterOutput(Slots(dispatch_BLES, config.route_scale * combine_BLES), {}, entropy, {})


SOFT_MOE = Router("Soft MoE", "2308.00951", "experts work on learned mixtures of a sequence's tokens", route, causal=False,
                  evaluation="the same rule, so it cannot generate", generates=False, variable=True, options=Options(),
                  parameters=parameters,
                  passes=lambda config, length: config.num_experts * config.options.slots / length)
