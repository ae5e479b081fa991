"""A layer whose experts are merged, parameter by parameter, into one for each run of tokens (`Merger`)."""

import jax.numpy as jnp
from jax import Array

from moejax.layers.mlp import SWIGLU, Activation, activate, dropout
from moejax.moe.types import Merger


def feed_forward(merger: Merger, x_TD: Array, mask_T: Array, w_in_EDKF: Array, w_out_EFD: Array, dropout_rate: float,
                 key: Array | None, activation: Activation = SWIGLU) -> tuple[Array, Array]:
    """Runs each group of tokens through the average of the experts under its weights.

    All merged experts are held at once: as much memory as that many plain ones.

    Returns:
      [T, D], and for each expert the real tokens whose group gives it the largest weight, int32 [E].
    """
    groups, count = merger.weight_GE.shape
    weight_GE = merger.weight_GE.astype(x_TD.dtype)
    w_in_GDKF = jnp.einsum("ge,edkf->gdkf", weight_GE, w_in_EDKF)
    w_out_GFD = jnp.einsum("ge,efd->gfd", weight_GE, w_out_EFD)
    x_GND = x_TD.reshape(groups, -1, x_TD.shape[-1])
    h_GNF = dropout(activate(jnp.einsum("gnd,gdkf->gnkf", x_GND, w_in_GDKF), activation), dropout_rate, key)
    y_TD = jnp.einsum("gnf,gfd->gnd", h_GNF, w_out_GFD).reshape(x_TD.shape)
    favourite_G = jnp.argmax(merger.weight_GE, axis=1)
    tokens_G = jnp.sum(mask_T.reshape(groups, -1), axis=1, dtype=jnp.int32)
    return jnp.where(mask_T[:, None], y_TD, 0), jnp.zeros(count, jnp.int32).at[favourite_G].add(tokens_G)
