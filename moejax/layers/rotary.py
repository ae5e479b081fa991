"""Rotary position embedding. Su et al. 2021, arXiv 2104.09864."""

import jax.numpy as jnp
from jax import Array


def angles(positions_BL: Array, head_dim: int, base: float) -> tuple[Array, Array]:
    """Cosine and sine of position times frequency, each float32 [B, L, 1, H/2]."""
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions_BL[:, :, None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BLQH: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (x_i, x_{i + H/2}) of every head by the angles of its position."""
    first, second = jnp.split(x_BLQH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLQH.dtype)
