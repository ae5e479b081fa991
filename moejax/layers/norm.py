"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) and LayerNorm (Ba et al. 2016, arXiv 1607.06450)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array


def rms_norm(x: Array, scale: Array | float, eps: float, axes: int | tuple[int, ...] = -1) -> Array:
    """x over the root of its mean square along the axes, times scale; computed in float32, returned as x.dtype."""
    x_f32 = x.astype(jnp.float32)
    return (x_f32 * jax.lax.rsqrt(jnp.mean(x_f32**2, axis=axes, keepdims=True) + eps) * scale).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array | float, eps: float) -> Array:
    """x less its mean, over its standard deviation, along the last axis, times scale plus bias; as `rms_norm`."""
    x_f32 = x.astype(jnp.float32)
    centred = x_f32 - jnp.mean(x_f32, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + eps) * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` over the last axes, with a learned scale.

    Attributes:
      eps: added to the mean square.
      axes: logical names of the last axes.
    """

    eps: float
    axes: tuple[str, ...] = ("embed",)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns an array like x."""
        over = len(self.axes)
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, self.axes), x.shape[-over:])
        return rms_norm(x, scale, self.eps, tuple(range(-over, 0)))


class LayerNorm(nn.Module):
    """`layer_norm` over the last axis, D, with a learned scale and perhaps a bias.

    Attributes:
      eps: added to the variance.
      use_bias: whether there is a bias.
    """

    eps: float
    use_bias: bool

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        """Returns an array like x_BLD."""
        def own(name: str, initial: nn.initializers.Initializer) -> Array:
            return self.param(name, nn.with_logical_partitioning(initial, ("embed",)), x_BLD.shape[-1:])
        bias = own("bias", nn.initializers.zeros) if self.use_bias else 0.0
        return layer_norm(x_BLD, own("scale", nn.initializers.ones), bias, self.eps)


def make_norm(kind: str, eps: float, name: str) -> nn.Module:
    """The norm of that kind, a choice of `Architecture.norm`."""
    return RMSNorm(eps, name=name) if kind == "rms" else LayerNorm(eps, kind == "layer", name=name)
