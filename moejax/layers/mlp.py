"""The dense feed-forward layer, and the pieces that experts share with it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from moejax import sharding


def gated(h: Array) -> Array:
    """SwiGLU's non-linearity: silu(gate) * up, for [..., 2, F] -> [..., F]. Shazeer 2020, arXiv 2002.05202."""
    gate, up = jnp.split(h, 2, axis=-2)  # whose gradient is one concatenation
    return jnp.squeeze(jax.nn.silu(gate) * up, axis=-2)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout of any array; nothing without a key or at rate 0."""
    if key is None or rate == 0:
        return x
    if rate == 1:
        return jnp.zeros_like(x)
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU on [B, L, D].

    Attributes:
      hidden: F.
      out_scale: factor on the initial standard deviation of the down projection.
      dtype: compute type.
    """

    hidden: int
    out_scale: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        """Returns [B, L, D]."""
        width = x_BLD.shape[-1]
        w_in_D2F = self.param("w_in", nn.with_logical_partitioning(
            nn.initializers.normal(width**-0.5), ("embed", "gate_up", "ffn")), (width, 2, self.hidden))
        w_out_FD = self.param("w_out", nn.with_logical_partitioning(
            nn.initializers.normal(self.out_scale * self.hidden**-0.5), ("ffn", "embed")), (self.hidden, width))
        h_BLF = gated(jnp.einsum("bld,dgf->blgf", x_BLD, w_in_D2F.astype(self.dtype)))
        return sharding.constrain(h_BLF @ w_out_FD.astype(self.dtype), "batch", "length", None)
