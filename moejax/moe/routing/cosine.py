"""X-MoE: top-k by the cosine between a token and an expert in a small space. Chi et al. 2022, arXiv 2204.09179.

The score does not depend on the length of a token's vector, and in a space of few dimensions it pulls the tokens of an
expert less towards one point, which is what lets representations collapse.
"""

import dataclasses
import math
from typing import Mapping

import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig, check, key
from moejax.moe.routing import select, topk
from moejax.moe.routing.base import Parameter, Router, balance_and_z, balances_whole, jitters, refuse_constant_weight
from moejax.moe.types import RouterOutput, RoutingContext


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the cosine router."""

    dim: int = key(16, "dimensions of the space in which tokens and experts are compared", low=1)
    temperature: float = key(0.3, "initial divisor of the cosines, which is learned", low=1e-3)


def parameters(config: MoEConfig, width: int) -> dict[str, Parameter]:
    """The projection of the tokens (C = `options.dim`), a vector per expert, and the logarithm of the temperature."""
    dim = config.options.dim
    return {"w_DC": Parameter((width, dim), ("embed", "router"), config.router_init * width**-0.5),
            "expert_CE": Parameter((dim, config.num_experts), (None, "router"), config.router_init * dim**-0.5),
            "log_temperature": Parameter((), (), 0.0, math.log(config.options.temperature))}


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """The top-k rule with cosine(x w, expert) / temperature for logits; see `Router.route`."""
    token_TC = select.unit(select.linear(select.add_jitter(x_TD, config, context), parameters["w_DC"]), axis=1)
    cosine_TE = select.linear(token_TC, select.unit(parameters["expert_CE"], axis=0))
    logits_TE = cosine_TE * jnp.exp(-parameters["log_temperature"])
    return topk.route_by_logits(config, topk.Options(), logits_TE, state.get("bias_E"), context)


def check_config(config: MoEConfig) -> None:
    """Raises `UserError` on settings with which the router would never learn."""
    refuse_constant_weight(config)
    check(config.router_init > 0, f"config.moe.router={config.router} compares directions, and vectors of zeros have none; "
          "set config.moe.router_init above 0")


X_MOE = Router(
    "X-MoE", "2204.09179", "the best expert by cosine in a small space, over a learned temperature", route,
    defaults={"experts_per_token": 1, "renormalize": False, "balance_weight": 0.01, "z_weight": 0.0}, options=Options(),
    parameters=parameters, initial_state=topk.initial_state, update=topk.update, loss_weights=balance_and_z, noisy=jitters,
    needs_whole=balances_whole, check=check_config)
