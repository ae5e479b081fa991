"""Attention of a decoder to what an encoder made (Vaswani et al. 2017, arXiv 1706.03762)."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from moejax.config import ModelConfig
from moejax.layers.attention import Cache, Encoded, attend_sharded, output, project_heads


class CrossAttention(nn.Module):
    """Projections around `attend`, without positions. The attributes are those of `Attention`."""

    model: ModelConfig
    out_scale: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: Array, encoded: Encoded, cache: Cache | None) -> tuple[Array, Cache | None]:
        """Attends to what is encoded, whose keys and values are written to the cache, if there is one, or read from there.

        Returns:
          [B, L, D] and the new cache.
        """
        model, design = self.model, self.model.architecture
        q_BLQH = project_heads(self, "q", x_BLD, model.heads, "q_heads")
        if encoded.x_BSD is not None:
            k_BSGH, v_BSGH = (project_heads(self, name, encoded.x_BSD, model.kv_heads, "kv_heads") for name in "kv")
            cache = None if cache is None else cache.replace(cross=(k_BSGH, v_BSGH))
        else:
            k_BSGH, v_BSGH = cache.cross
        o_BLQH = attend_sharded(model.attention, q_BLQH, k_BSGH, v_BSGH, encoded.visible_BLS, False,
                                design.attention_scale)
        return output(self, o_BLQH, x_BLD.shape[-1], self.out_scale, design.output_bias), cache
