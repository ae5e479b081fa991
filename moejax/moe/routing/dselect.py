"""DSelect-k: K selectors that each learn the bits of one expert's number. Hazimeh et al. 2021, arXiv 2106.03760.

A bit is a smooth step of a linear score, so while a selector is undecided it spreads over several experts, and all are
on at first; once decided it holds exactly one and has no gradient any more. This is the version with a choice per token.
"""

import dataclasses
from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import entr

from moejax.config import MoEConfig, check, key
from moejax.moe.routing import select
from moejax.moe.routing.base import Parameter, Router, jitters
from moejax.moe.types import RouterOutput, RoutingContext


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of DSelect-k."""

    gamma: float = key(1.0, "width of the smooth step: scores from half of it on are decided bits", low=1e-6)
    entropy_weight: float = key(1e-6, "weight of the mean entropy of the selectors' distributions", low=0)


def bits(config: MoEConfig) -> int:
    """M = log2 E: bits in an expert's number."""
    return config.num_experts.bit_length() - 1


def parameters(config: MoEConfig, width: int) -> dict[str, Parameter]:
    """For every selector a score vector per bit, that starts undecided, and one for its weight."""
    choices = config.experts_per_token
    own = {"w_DK": Parameter((width, choices), ("embed", "router"), config.router_init * width**-0.5)}
    if bits(config):
        own["bits_DKM"] = Parameter((width, choices, bits(config)), ("embed", "router", None),
                                    config.options.gamma / 100 * width**-0.5)
    return own


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Routes each token to all experts on which some selector has weight; see `Router.route`."""
    choices, experts = config.experts_per_token, config.num_experts
    x_TD = select.add_jitter(x_TD, config, context)
    mixture_TK = jax.nn.softmax(select.linear(x_TD, parameters["w_DK"]))
    z_TKM = jnp.zeros((len(x_TD), choices, 0))
    if bits(config):
        z_TKM = select.linear(x_TD, parameters["bits_DKM"].reshape(x_TD.shape[1], -1)).reshape(len(x_TD), choices, -1)
    # The complement of a bit as the step of -z: a difference to 1 would lose its digits.
    bit_TKM2 = jnp.stack([smooth_step(-z_TKM, config.options.gamma), smooth_step(z_TKM, config.options.gamma)], axis=-1)
    weight_TE = jnp.einsum("tk,tke->te", mixture_TK, selections(bit_TKM2), precision=jax.lax.Precision.HIGHEST)

    expert_TE = select.best(weight_TE, experts, context)
    chosen_TE = jnp.take_along_axis(weight_TE, expert_TE, axis=1)
    valid_TE = (chosen_TE > 0) & context.mask_T[:, None]
    assignments = select.listed(expert_TE, jnp.where(valid_TE, config.route_scale * chosen_TE, 0.0), valid_TE)

    entropy_T = jnp.sum(safe_entropy(bit_TKM2), axis=(1, 2, 3)) / choices  # of independent bits, so it is their sum
    loss = jnp.sum(jnp.where(context.mask_T, entropy_T, 0.0)) / jnp.maximum(context.totals.tokens, 1.0)
    spread_T = jnp.sum(entr(jax.lax.stop_gradient(weight_TE)), axis=1)
    return RouterOutput(assignments, {"dselect_entropy": loss}, jnp.sum(jnp.where(context.mask_T, spread_T, 0.0)), {})


def smooth_step(z: Array, gamma: float) -> Array:
    """0 up to -gamma/2, 1 from gamma/2 on, and between them -2 u^3 + 3 u/2 + 1/2 of u = z/gamma, which joins smoothly."""
    v = jnp.clip(z / gamma + 0.5, 0, 1)
    return v**2 * (3 - 2 * v)  # the same cubic, exactly 0 and 1 at its ends


def selections(bit_TKM2: Array) -> Array:
    """Every selector's distribution over experts [T, K, E]: products of bits or their complements, highest bit first."""
    tokens, choices, count, _ = bit_TKM2.shape
    share_TKE = jnp.ones((tokens, choices, 1))
    for m in range(count):
        share_TKE = (share_TKE[:, :, :, None] * bit_TKM2[:, :, m, None, :]).reshape(tokens, choices, -1)
    return share_TKE


def safe_entropy(p: Array) -> Array:
    """-p log p, with value and gradient 0 at 0: its derivative there is infinite, but a smooth step ends flat."""
    return jnp.where(p > 0, entr(jnp.where(p > 0, p, 1.0)), 0.0)


def loss_weights(config: MoEConfig) -> dict[str, float]:
    """The selectors' entropy."""
    return {"dselect_entropy": config.options.entropy_weight}


def check_config(config: MoEConfig) -> None:
    """Raises `UserError` unless every bit pattern is the number of an expert."""
    experts = config.num_experts
    check(experts.bit_count() == 1, f"config.moe.num_experts={experts} is not a power of two, which "
          "config.moe.router=dselect needs as it chooses experts by the bits of their numbers")


DSELECT = Router("DSelect-k", "2106.03760", "K selectors that learn the bits of experts' numbers; starts dense", route,
                 variable=True, options=Options(), parameters=parameters, loss_weights=loss_weights, noisy=jitters,
                 check=check_config)
