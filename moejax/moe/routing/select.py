"""Pieces that token-choice routers share: scores, the best experts of a token, and the list of pairs."""

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig
from moejax.moe.types import Assignments, RoutingContext


def add_jitter(x_TD: Array, config: MoEConfig, context: RoutingContext) -> Array:
    """The router's own float32 copy of its input, times U(1-j, 1+j) in training; the experts' input stays clean."""
    x_TD = x_TD.astype(jnp.float32)
    if not (context.train and config.jitter > 0):
        return x_TD
    return x_TD * jax.random.uniform(context.key, x_TD.shape, minval=1 - config.jitter, maxval=1 + config.jitter)


def linear(x_TD: Array, w_DE: Array) -> Array:
    """x w in full float32, on devices whose matmuls round by default, too."""
    return jnp.einsum("td,de->te", x_TD.astype(jnp.float32), w_DE, precision=jax.lax.Precision.HIGHEST)


def unit(vectors: Array, axis: int) -> Array:
    """Vectors divided by their lengths, however long or short; zero vectors stay zero."""
    # Divided by the largest entry first, squares neither overflow nor vanish.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis, keepdims=True))
    vectors = vectors / jnp.where(largest > 0, largest, 1.0)
    squares = jnp.sum(vectors**2, axis, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0))


def log_scores(logits_TE: Array, score: str) -> Array:
    """Logarithm of the gate function; in logarithms, normalising needs no epsilon and survives any logit."""
    return jax.nn.log_softmax(logits_TE) if score == "softmax" else jax.nn.log_sigmoid(logits_TE)


def best(ranking_TE: Array, choices: int, context: RoutingContext) -> Array:
    """The experts with the highest ranks, best first: int32 [T, K]. No gradient.

    Equal ranks go by the token's id, else a router that starts at zero would send every token to the first experts.
    """
    tokens, experts = ranking_TE.shape
    first_T1 = (mix(context.token_ids_T.astype(jnp.uint32)) % experts).astype(jnp.int32)[:, None]
    turned_TE = (first_T1 + jnp.arange(experts)) % experts
    ranking_TE = jnp.take_along_axis(jax.lax.stop_gradient(ranking_TE), turned_TE, axis=1)
    _, place_TK = jax.lax.top_k(ranking_TE, choices)
    return (first_T1 + place_TK) % experts


def gate(log_scores_TE: Array, expert_TK: Array, renormalize: bool) -> Array:
    """The scores of the chosen experts, of each token's chosen ones divided by their sum if `renormalize`. [T, K]."""
    log_chosen_TK = jnp.take_along_axis(log_scores_TE, expert_TK, axis=-1)
    return jax.nn.softmax(log_chosen_TK) if renormalize else jnp.exp(log_chosen_TK)


def listed(expert_TK: Array, weight_TK: Array, valid_TK: Array) -> Assignments:
    """The token-major list of [T, K] choices."""
    tokens, choices = expert_TK.shape
    return Assignments(
        token_N=jnp.repeat(jnp.arange(tokens, dtype=jnp.int32), choices),
        expert_N=expert_TK.reshape(-1).astype(jnp.int32),
        weight_N=weight_TK.reshape(-1),
        valid_N=valid_TK.reshape(-1),
        choices=choices,
    )


def real(context: RoutingContext, choices: int) -> Array:
    """Which pairs are those of real tokens: bool [T, K]."""
    return jnp.broadcast_to(context.mask_T[:, None], (context.mask_T.shape[0], choices))


def mix(bits: Array) -> Array:
    """A bijection of uint32 whose output bits each depend on all input bits (the finaliser of MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
