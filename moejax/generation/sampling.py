"""From logits to the next token: repetition penalty, temperature, top-k, top-p, and one random key a row.

The numbers may be traced, so changing them compiles nothing anew; a rule that is off costs nothing.
"""

import collections
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def penalise_repetition(logits_BV: Array, seen_BV: Array, penalty: Array | float) -> Array:
    """Divides positive and multiplies negative logits of seen tokens by `penalty`; 1 is off. CTRL, arXiv 1909.05858.

    Args:
      logits_BV: float32.
      seen_BV: bool, the tokens that the row holds.
      penalty: above 0; above 1 discourages repetition.
    """
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalised_BV, logits_BV)


def scale(logits_BV: Array, temperature: Array | float) -> Array:
    """Logits over a temperature above 0, shifted so that the largest is 0: no temperature makes them overflow."""
    return (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature


def keep_top_k(logits_BV: Array, k: Array | int) -> Array:
    """Minus infinity for all tokens that k others exceed, so equal ones stay together; k = 0 is off."""
    def cut() -> Array:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        least_B = jnp.take(sorted_BV, jnp.clip(k, 1, logits_BV.shape[-1]) - 1, axis=-1)
        return jnp.where(logits_BV >= least_B[:, None], logits_BV, -jnp.inf)

    return jax.lax.cond(k > 0, cut, lambda: logits_BV)


def keep_top_p(logits_BV: Array, p: Array | float) -> Array:
    """Minus infinity outside the nucleus: the fewest most probable tokens that together have probability p or more.

    Tokens as probable as the nucleus' last one stay too. p = 1 is off. Holtzman et al. 2019, arXiv 1904.09751.
    """
    def cut() -> Array:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV)
        inside_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV < p
        inside_BV = inside_BV.at[:, 0].set(True)  # p may round to 0
        least_B = jnp.min(jnp.where(inside_BV, sorted_BV, jnp.inf), axis=-1)
        return jnp.where(logits_BV >= least_B[:, None], logits_BV, -jnp.inf)

    return jax.lax.cond(p < 1, cut, lambda: logits_BV)


def sample(logits_BV: Array, keys_B: Array, temperature: Array | float = 1.0, top_k: Array | int = 0,
           top_p: Array | float = 1.0) -> Array:
    """Draws a token a row: temperature first, then top-k, then top-p among what is left.

    Args:
      logits_BV: float32, each row with a finite value.
      keys_B: random keys of type threefry2x32, so that a row's token does not depend on the other rows.
      temperature: at 0 the most probable token, the first of equal ones; the rest is then ignored.
      top_k: see `keep_top_k`.
      top_p: see `keep_top_p`.

    Returns:
      int32 [B].
    """
    def draw() -> Array:
        kept_BV = keep_top_p(keep_top_k(scale(logits_BV, temperature), top_k), top_p)
        return jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32))


def row_digests(prompts: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """64 bits a row, uint32 [B, 2], from the seed, the prompt's ids and how many equal prompts stand above it."""
    seen = collections.Counter()
    digests = []
    for prompt in prompts:
        ids = np.asarray(prompt, "<i4").tobytes()
        digests.append(hashlib.blake2b(f"{seed} {seen[ids]} ".encode() + ids, digest_size=8).digest())
        seen[ids] += 1
    return np.frombuffer(b"".join(digests), "<u4").reshape(-1, 2)


def row_keys(digests_B2: Array) -> Array:
    """A random key a row, [B], from `row_digests`. Threefry, whatever JAX's default: it is the same under `vmap`."""
    key = jax.random.key(0, impl="threefry2x32")
    return jax.vmap(lambda digest_2: jax.random.fold_in(jax.random.fold_in(key, digest_2[0]), digest_2[1]))(digests_B2)
