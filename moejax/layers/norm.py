"""RMSNorm. Zhang and Sennrich 2019, arXiv 1910.07467."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x over the root of its mean square along the last axis, times scale; computed in float32, returned as x.dtype."""
    x_f32 = x.astype(jnp.float32)
    return (x_f32 * jax.lax.rsqrt(jnp.mean(x_f32**2, axis=-1, keepdims=True) + eps) * scale).astype(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` over the last axis, with a learned scale.

    Attributes:
      eps: added to the mean square.
      axis: logical name of the last axis.
    """

    eps: float
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns an array like x."""
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)), x.shape[-1:])
        return rms_norm(x, scale, self.eps)
