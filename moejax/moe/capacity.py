"""Capacity: which pairs are dropped because an expert is full. It changes `valid_N` and nothing else."""

from fractions import Fraction

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.types import Assignments


def places(mask_T: Array, factor: float, groups: int, num_experts: int, per_token: float) -> Array:
    """C = ceil(factor * pairs / E) places of an expert in each group of tokens, int32 [groups].

    Args:
      mask_T: real tokens; padding takes no place.
      factor: room of an expert over its mean load.
      groups: number of equal runs of tokens that are decided on their own.
      num_experts: E.
      per_token: the pairs of a token on average, K if it does not vary.
    """
    tokens_G = jnp.sum(mask_T.reshape(groups, -1), axis=1)
    # In whole numbers: rounding of a float would add a place where factor * pairs / E is one.
    share = Fraction(str(factor)) * Fraction(str(per_token)) / num_experts
    largest = 2**31 - 1
    most = largest // max(mask_T.size // groups, 1)  # more would be more places than there can be pairs
    share = min(share, Fraction(most))
    if share.numerator > most or share.denominator > largest:  # the nearest of which the products are int32
        nearest = share.limit_denominator(max(int(most // (share + 1)), 1))
        share = max(nearest, Fraction(1, largest)) if share else share
    return -(-tokens_G * share.numerator // share.denominator)


def limit(assignments: Assignments, places_G: Array, policy: str, num_experts: int) -> Assignments:
    """Keeps at most so many pairs per expert in each group of tokens; weights stay as they are.

    Who stays is up to `policy`: `token_major` earlier tokens first with all their choices; `choice_major` all first choices
    before any second, earlier tokens first (GShard 2006.16668); `token_weight` choice by choice, tokens with the largest
    weight first (batch-prioritised routing, V-MoE 2106.05974); `weight` pairs with the larger weight first. Only the first
    is causal.

    Args:
      assignments: a token-major list (`choices` > 0).
      places_G: pairs that an expert may keep in each of the equal runs of tokens that are decided on their own.
      policy: see above.
      num_experts: E.
    """
    choices, groups = assignments.choices, len(places_G)
    expert_GN = assignments.expert_N.reshape(groups, -1)
    valid_GN = assignments.valid_N.reshape(groups, -1)
    weight_GN = jax.lax.stop_gradient(assignments.weight_N).reshape(groups, -1)
    order_N = jnp.arange(expert_GN.shape[1])
    priorities = {
        "token_major": lambda weight_N: (order_N,),
        "choice_major": lambda weight_N: (order_N % choices,),
        "token_weight": lambda weight_N: (
            order_N % choices, -jnp.repeat(jnp.max(weight_N.reshape(-1, choices), axis=1), choices)),
        "weight": lambda weight_N: (-weight_N,),
    }[policy]

    def keep(expert_N: Array, valid_N: Array, weight_N: Array, capacity: Array) -> Array:
        queue_N = jnp.where(valid_N, expert_N, num_experts)
        keys = (queue_N, *priorities(weight_N))
        sorted_queue_N, *_, who_N = jax.lax.sort((*keys, order_N), num_keys=len(keys), is_stable=True)
        place_N = order_N - jnp.searchsorted(sorted_queue_N, sorted_queue_N, side="left")
        return valid_N & jnp.zeros_like(valid_N).at[who_N].set(place_N < capacity)

    valid_GN = jax.vmap(keep)(expert_GN, valid_GN, weight_GN, places_G)
    return assignments.replace(valid_N=valid_GN.reshape(-1))
