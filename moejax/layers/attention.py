"""Causal attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245), segments and a key-value cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from moejax import axes, sharding
from moejax.layers.norm import RMSNorm
from moejax.layers.rotary import rotate


@struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, [B, S, G, H]; stacked along a leading axis over equal layers.

    `on_BS` tells which of them the layer's block worked on, if some may pass it.
    """

    k_BSGH: Array
    v_BSGH: Array
    on_BS: Array | None = None


QUERY_BLOCK, MOST_BLOCKS = 128, 16
"""Queries in a block of causal attention, unless that made more blocks than this: each is compiled on its own."""


def attend(q_BLQH: Array, k_BSGH: Array, v_BSGH: Array, visible_BLS: Array, causal: bool) -> Array:
    """Softmax attention; each key and value head serves Q/G query heads. The softmax is taken in float32.

    Args:
      q_BLQH: queries.
      k_BSGH: keys.
      v_BSGH: values.
      visible_BLS: bool, which keys a query may see. A query that sees none returns a mean of values.
      causal: whether L = S and no query sees a later key, so that blocks of queries can leave out the keys behind them.

    Returns:
      [B, L, Q, H].
    """
    batch, length, heads, head_dim = q_BLQH.shape
    groups = k_BSGH.shape[2]
    # Heads before positions, so that every head's matmuls read rows that lie together.
    q_BGRLH = jnp.transpose((q_BLQH * head_dim**-0.5).reshape(batch, length, groups, -1, head_dim), (0, 2, 3, 1, 4))
    k_BGSH, v_BGSH = jnp.swapaxes(k_BSGH, 1, 2), jnp.swapaxes(v_BSGH, 1, 2)

    def block(begin: int, end: int, keys: int) -> Array:
        rows_BGNH = q_BGRLH[:, :, :, begin:end].reshape(batch, groups, -1, head_dim)
        scores_BGNS = jnp.einsum("bgnh,bgsh->bgns", rows_BGNH, k_BGSH[:, :, :keys], preferred_element_type=jnp.float32)
        # One mask for every query head of a group, whose rows follow each other.
        shown_BGNS = jnp.tile(visible_BLS[:, None, begin:end, :keys], (1, 1, q_BGRLH.shape[2], 1))
        scores_BGNS = jnp.where(shown_BGNS, scores_BGNS, jnp.finfo(jnp.float32).min)
        # Divided by its sum after the values: a row of H numbers rather than S, and the same for its gradient.
        weight_BGNS = jnp.exp(scores_BGNS - jax.lax.stop_gradient(jnp.max(scores_BGNS, axis=-1, keepdims=True)))
        sum_BGNH = jnp.einsum("bgns,bgsh->bgnh", weight_BGNS.astype(v_BSGH.dtype), v_BGSH[:, :, :keys],
                              preferred_element_type=jnp.float32)
        o_BGNH = (sum_BGNH / jnp.sum(weight_BGNS, axis=-1, keepdims=True)).astype(v_BSGH.dtype)
        return o_BGNH.reshape(batch, groups, -1, end - begin, head_dim)

    if causal:
        size = max(QUERY_BLOCK, -(-length // MOST_BLOCKS))
        bounds = [(begin, min(begin + size, length)) for begin in range(0, length, size)]
        o_BGRLH = jnp.concatenate([block(begin, end, end) for begin, end in bounds], axis=3)
    else:
        o_BGRLH = block(0, length, k_BSGH.shape[1])
    return jnp.transpose(o_BGRLH, (0, 3, 1, 2, 4)).reshape(q_BLQH.shape)


class Attention(nn.Module):
    """Projections around `attend`.

    Attributes:
      heads, kv_heads, head_dim: Q, G, H.
      norm_eps: of the norms on queries and keys, or None for no such norms.
      out_scale: factor on the initial standard deviation of the output projection.
      dtype: compute type.
    """

    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float | None
    out_scale: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: Array, rotary: tuple[Array, Array], visible_BLS: Array, cache: Cache | None,
                 at: Array | None) -> tuple[Array, Cache | None]:
        """Attends to the tokens themselves, or with a cache to all that it holds after x is written at slot `at`.

        Args:
          x_BLD: input.
          rotary: cosine and sine of the positions.
          visible_BLS: bool; S is L without a cache and its length with one.
          cache: of this layer.
          at: int32 scalar, first slot of the cache that x fills.

        Returns:
          [B, L, D] and the new cache.
        """
        width = x_BLD.shape[-1]

        def project(name: str, heads: int, axis: str) -> Array:
            w_DQH = self.param(name, nn.with_logical_partitioning(
                nn.initializers.normal(width**-0.5), ("embed", axis, "head_dim")), (width, heads, self.head_dim))
            return jnp.einsum("bld,dqh->blqh", x_BLD, w_DQH.astype(self.dtype))

        q_BLQH = project("w_q", self.heads, "q_heads")
        k_BSGH = project("w_k", self.kv_heads, "kv_heads")
        v_BSGH = project("w_v", self.kv_heads, "kv_heads")
        if self.norm_eps is not None:
            q_BLQH = RMSNorm(self.norm_eps, "head_dim", name="q_norm")(q_BLQH)
            k_BSGH = RMSNorm(self.norm_eps, "head_dim", name="k_norm")(k_BSGH)
        q_BLQH, k_BSGH = rotate(q_BLQH, *rotary), rotate(k_BSGH, *rotary)
        if cache is not None:
            k_BSGH = jax.lax.dynamic_update_slice_in_dim(cache.k_BSGH, k_BSGH, at, axis=1)
            v_BSGH = jax.lax.dynamic_update_slice_in_dim(cache.v_BSGH, v_BSGH, at, axis=1)
            cache = cache.replace(k_BSGH=k_BSGH, v_BSGH=v_BSGH)
        # With the sequence split over the context axis, each device keeps its queries and gathers all keys and values.
        q_BLQH = sharding.constrain(q_BLQH, "batch", "length", "q_heads", None)
        k_BSGH, v_BSGH = (sharding.constrain(a, "batch", None, "kv_heads", None) for a in (k_BSGH, v_BSGH))
        mesh = sharding.current_mesh()
        whole = mesh is None or mesh.shape[axes.CONTEXT] == 1
        o_BLQH = attend(q_BLQH, k_BSGH, v_BSGH, visible_BLS, causal=cache is None and whole)
        w_o_QHD = self.param("w_o", nn.with_logical_partitioning(
            nn.initializers.normal(self.out_scale * (self.heads * self.head_dim)**-0.5),
            ("q_heads", "head_dim", "embed")), (self.heads, self.head_dim, width))
        y_BLD = jnp.einsum("blqh,qhd->bld", o_BLQH, w_o_QHD.astype(self.dtype))
        return sharding.constrain(y_BLD, "batch", "length", None), cache
