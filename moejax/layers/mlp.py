"""The dense feed-forward layer, and the pieces that experts share with it."""

from typing import NamedTuple, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from moejax import sharding
from moejax.architecture import GATED, PLAIN, Architecture


class Activation(NamedTuple):
    """A non-linearity: a name of `moejax.architecture.ACTIVATIONS`, and the bound of the clamped one."""

    name: str = PLAIN.activation
    clamp: float = PLAIN.clamp

    @property
    def inputs(self) -> int:
        """Projections that it takes: gate and up, or one."""
        return 2 if self.name in GATED else 1


SWIGLU = Activation()
GATES = {"swiglu": jax.nn.silu, "geglu": lambda h: jax.nn.gelu(h, approximate=False), "geglu_tanh": jax.nn.gelu}
PLAIN_ONES = {"silu": jax.nn.silu, "gelu": GATES["geglu"], "gelu_tanh": jax.nn.gelu, "relu": jax.nn.relu}


def activate(h: Array, activation: Activation = SWIGLU) -> Array:
    """The non-linearity, for [..., inputs, F] -> [..., F]."""
    parts = jnp.split(h, activation.inputs, axis=-2)  # whose gradient is one concatenation
    return activate_parts([jnp.squeeze(a, axis=-2) for a in parts], activation)


def activate_parts(inputs: Sequence[Array], activation: Activation = SWIGLU) -> Array:
    """The same, of its inputs apart.

    Gated: act(gate) * up, Shazeer 2020, arXiv 2002.05202; clamped_swiglu is that of GPT-OSS: gate * sigmoid(1.702 gate) *
    (up + 1), of inputs with bounds.
    """
    if activation.inputs == 1:
        return PLAIN_ONES[activation.name](*inputs)
    gate, up = inputs
    if activation.name == "clamped_swiglu":
        gate, up = jnp.minimum(gate, activation.clamp), jnp.clip(up, -activation.clamp, activation.clamp)
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
    return GATES[activation.name](gate) * up


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout of any array; nothing without a key or at rate 0."""
    if key is None or rate == 0:
        return x
    if rate == 1:
        return jnp.zeros_like(x)
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


class FeedForward(nn.Module):
    """The feed-forward layer on [B, L, D].

    Attributes:
      hidden: F.
      out_scale: factor on the initial standard deviation of the down projection.
      dtype: compute type.
      design: `activation`, `clamp` and `ffn_bias` of it.
    """

    hidden: int
    out_scale: float
    dtype: jnp.dtype
    design: Architecture = PLAIN

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        """Returns [B, L, D]."""
        width, activation = x_BLD.shape[-1], Activation(self.design.activation, self.design.clamp)
        w_in_DGF = self.param("w_in", nn.with_logical_partitioning(
            nn.initializers.normal(width**-0.5), ("embed", "gate_up", "ffn")), (width, activation.inputs, self.hidden))
        w_out_FD = self.param("w_out", nn.with_logical_partitioning(
            nn.initializers.normal(self.out_scale * self.hidden**-0.5), ("ffn", "embed")), (self.hidden, width))
        h_BLGF = jnp.einsum("bld,dgf->blgf", x_BLD, w_in_DGF.astype(self.dtype))
        if self.design.ffn_bias:
            h_BLGF += self.param("b_in", nn.with_logical_partitioning(nn.initializers.zeros, ("gate_up", "ffn")),
                                 w_in_DGF.shape[1:]).astype(self.dtype)
        y_BLD = activate(h_BLGF, activation) @ w_out_FD.astype(self.dtype)
        if self.design.ffn_bias:
            y_BLD += self.param("b_out", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
                                (width,)).astype(self.dtype)
        return sharding.constrain(y_BLD, "batch", "length", None)
