"""Hash layers: a token's id alone decides its K experts, each with weight 1/K. Roller et al. 2021, arXiv 2106.04426."""

import math
from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig
from moejax.moe.routing.base import Parameter, Router, keep_state, no_state
from moejax.moe.types import Assignments, RouterOutput, RoutingContext


def parameters(config: MoEConfig, width: int) -> dict[str, Parameter]:
    """None: nothing is learned."""
    return {}


def mix(bits: Array) -> Array:
    """A bijection of uint32 whose output bits each depend on all input bits (the finaliser of MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Takes the K experts with the largest hash of (id, expert): distinct, and uniform over ids; see `Router.route`."""
    experts_E = mix(jnp.arange(1, config.num_experts + 1, dtype=jnp.uint32))
    priority_TE = mix(mix(context.token_ids_T.astype(jnp.uint32))[:, None] ^ experts_E)
    _, expert_TK = jax.lax.top_k(priority_TE, config.experts_per_token)
    tokens, choices = expert_TK.shape
    assignments = Assignments(
        token_N=jnp.repeat(jnp.arange(tokens, dtype=jnp.int32), choices),
        expert_N=expert_TK.reshape(-1),
        weight_N=jnp.full(tokens * choices, config.route_scale / choices, jnp.float32),
        valid_N=jnp.repeat(context.mask_T, choices),
        choices=choices,
    )
    entropy = math.log(choices) * jnp.sum(context.mask_T, dtype=jnp.float32)
    return RouterOutput(assignments, {}, entropy, {})


def loss_weights(config: MoEConfig) -> dict[str, float]:
    """None."""
    return {}


HASH = Router(parameters, no_state, route, keep_state, loss_weights,
              paper="Hash layers 2106.04426", causal=True, needs_token_ids=True)
