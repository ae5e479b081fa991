"""A layer in which experts work on mixtures of tokens (`Slots`), instead of dispatch and combine."""

import jax.numpy as jnp
from jax import Array

from moejax.layers.mlp import SWIGLU, Activation
from moejax.moe import experts
from moejax.moe.types import Slots


def feed_forward(slots: Slots, x_TD: Array, w_in_EDGF: Array, w_out_EFD: Array, dropout_rate: float,
                 key: Array | None, activation: Activation = SWIGLU) -> tuple[Array, Array]:
    """Mixes tokens into slots, runs each expert on its own slots, and mixes their outputs into tokens.

    Returns:
      [T, D], and the slots that each expert computed for, int32 [E].
    """
    batch, length, count, per_expert = slots.dispatch_BLES.shape
    x_BLD = x_TD.reshape(batch, length, -1)
    x_EBSD = jnp.einsum("bld,bles->ebsd", x_BLD, slots.dispatch_BLES.astype(x_TD.dtype))
    y_END = experts.dense_feed_forward(x_EBSD.reshape(count, batch * per_expert, -1), w_in_EDGF, w_out_EFD, dropout_rate,
                                       key, activation=activation)
    y_BLD = jnp.einsum("ebsd,bles->bld", y_END.reshape(count, batch, per_expert, -1).astype(jnp.float32),
                       slots.combine_BLES)
    return y_BLD.reshape(x_TD.shape).astype(x_TD.dtype), jnp.full(count, batch * per_expert, jnp.int32)
