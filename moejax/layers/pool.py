"""One vector for a whole row, and the scores of classes."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from moejax.config import ModelConfig


def pool(x_BLD: Array, real_BL: Array, kind: str) -> Array:
    """What stands for a row, a choice of `Architecture.pool`: [B, D]. Rows without tokens mean nothing."""
    if kind == "mean":
        count_B1 = jnp.maximum(jnp.sum(real_BL, axis=1, keepdims=True), 1)
        return (jnp.sum(x_BLD * real_BL[..., None], axis=1, dtype=jnp.float32) / count_B1).astype(x_BLD.dtype)
    at_B = jnp.argmax(real_BL, axis=1) if kind == "first" else real_BL.shape[1] - 1 - jnp.argmax(real_BL[:, ::-1], axis=1)
    return jnp.take_along_axis(x_BLD, at_B[:, None, None], axis=1)[:, 0]


class Pooled(nn.Module):
    """The head of a model that says something of whole rows.

    Attributes:
      model: `head`, `classes`, and `pool` and `pooler` of the architecture.
      dtype: compute type.
    """

    model: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: Array, real_BL: Array) -> tuple[Array, Array | None]:
        """Returns [B, D] and, if the head is `classes`, their scores, float32 [B, C]."""
        model, width = self.model, x_BLD.shape[-1]
        x_BD = pool(x_BLD, real_BL, model.architecture.pool or ("last" if model.kind == "decoder" else "first"))

        def dense(name: str, bias: str, x_BD: Array, size: int, axis: str | None) -> Array:
            w_DC = self.param(name, nn.with_logical_partitioning(
                nn.initializers.normal(width**-0.5), ("embed", axis)), (width, size))
            bias_C = self.param(bias, nn.with_logical_partitioning(nn.initializers.zeros, (axis,)), (size,))
            return x_BD @ w_DC.astype(x_BD.dtype) + bias_C.astype(x_BD.dtype)

        if model.architecture.pooler:
            x_BD = jnp.tanh(dense("w_pooler", "b_pooler", x_BD, width, None))
        if model.head == "none":
            return x_BD, None
        return x_BD, dense("classes", "classes_bias", x_BD.astype(jnp.float32), model.classes, "classes")
