"""Attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245), segments and a key-value cache.

Windows: Beltagy et al. 2004.05150; parts of a sequence and blocks without rotation: Llama 4; sinks: GPT-OSS 2508.10925;
relative position bias: T5 1910.10683.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from moejax import axes, sharding
from moejax.config import ModelConfig
from moejax.layers import cudnn
from moejax.layers.norm import RMSNorm, rms_norm
from moejax.layers.rotary import rotate


@struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, [B, S, G, H]; stacked along a leading axis over equal layers.

    Attributes:
      k_BSGH, v_BSGH: as named.
      on_BS: which of them the layer's block worked on, if some may pass it.
      cross: keys and values of an encoder's tokens, if there is one.
    """

    k_BSGH: Array
    v_BSGH: Array
    on_BS: Array | None = None
    cross: tuple[Array, Array] | None = None


@struct.dataclass
class Encoded:
    """What a decoder sees of an encoder.

    Attributes:
      x_BSD: the encoder's vectors; None if the cache holds all that is needed of them.
      visible_BLS: bool, which of them a token sees.
    """

    x_BSD: Array | None
    visible_BLS: Array


@struct.dataclass
class Sight:
    """Where the tokens stand and what they see.

    Attributes:
      cos, sin: of the rotation, see `moejax.layers.rotary.angles`; None without one.
      visible: by kind of attention, bool [B, L, S]: the keys that a token sees.
      temperature_BL: factor on the queries of unrotated blocks, or None.
      bias_BQLS: what distance adds to the scores, float32, or None; B is 1 if it is the same for all rows.
      encoded: what else they see, or None.
      causal: whether no token sees one in a later slot.
    """

    cos: Array | None
    sin: Array | None
    visible: dict[str, Array]
    temperature_BL: Array | None = None
    bias_BQLS: Array | None = None
    encoded: Encoded | None = None
    causal: bool = struct.field(pytree_node=False, default=True)


QUERY_BLOCK, MOST_BLOCKS = 128, 16
"""Queries in a block of causal attention, unless that made more blocks than this: each is compiled on its own."""


def attend(q_BLQH: Array, k_BSGH: Array, v_BSGV: Array, visible_BLS: Array, causal: bool, scale: float | None = None,
           window: int | None = None, sinks_Q: Array | None = None, bias_BQLS: Array | None = None) -> Array:
    """Softmax attention; each key and value head serves Q/G query heads. The softmax is taken in float32.

    Args:
      q_BLQH: queries.
      k_BSGH: keys.
      v_BSGV: values, of any width.
      visible_BLS: bool, which keys a query may see. A query that sees none returns a mean of values.
      causal: whether L = S and no query sees a later key, so that blocks of queries can leave out the keys behind them.
      scale: factor on the scores; None is 1/sqrt(H).
      window: if causal, a bound on the keys up to its own that a query sees, so that these blocks can leave out others.
      sinks_Q: a score for each query head that takes its part of the softmax and adds nothing, or None.
      bias_BQLS: float32, added to the scores, or None; B may be 1.

    Returns:
      [B, L, Q, V].
    """
    batch, length, heads, head_dim = q_BLQH.shape
    groups = k_BSGH.shape[2]
    # Heads before positions, so that every head's matmuls read rows that lie together.
    per_group, scale = heads // groups, head_dim**-0.5 if scale is None else scale
    q_BGRLH = jnp.transpose((q_BLQH * scale).reshape(batch, length, groups, per_group, head_dim), (0, 2, 3, 1, 4))
    k_BGSH, v_BGSV = jnp.swapaxes(k_BSGH, 1, 2), jnp.swapaxes(v_BSGV, 1, 2)

    def block(begin: int, end: int, first: int, keys: int) -> Array:
        rows_BGNH = q_BGRLH[:, :, :, begin:end].reshape(batch, groups, -1, head_dim)
        scores_BGNS = jnp.einsum("bgnh,bgsh->bgns", rows_BGNH, k_BGSH[:, :, first:keys], preferred_element_type=jnp.float32)
        if bias_BQLS is not None:
            part_BQLS = bias_BQLS[:, :, begin:end, first:keys]
            scores_BGNS += part_BQLS.reshape(len(part_BQLS), groups, -1, keys - first)
        # One mask for every query head of a group, whose rows follow each other.
        shown_BGNS = jnp.tile(visible_BLS[:, None, begin:end, first:keys], (1, 1, per_group, 1))
        scores_BGNS = jnp.where(shown_BGNS, scores_BGNS, jnp.finfo(jnp.float32).min)
        most_BGN1 = jax.lax.stop_gradient(jnp.max(scores_BGNS, axis=-1, keepdims=True))
        if sinks_Q is not None:
            sinks_1GR = sinks_Q.astype(jnp.float32).reshape(1, groups, per_group)
            sink_1GN1 = jnp.repeat(sinks_1GR, end - begin, axis=2)[..., None]
            most_BGN1 = jnp.maximum(most_BGN1, jax.lax.stop_gradient(sink_1GN1))
        # Divided by its sum after the values: a row of H numbers rather than S, and the same for its gradient.
        weight_BGNS = jnp.exp(scores_BGNS - most_BGN1)
        sum_BGNV = jnp.einsum("bgns,bgsv->bgnv", weight_BGNS.astype(v_BSGV.dtype), v_BGSV[:, :, first:keys],
                              preferred_element_type=jnp.float32)
        total_BGN1 = jnp.sum(weight_BGNS, axis=-1, keepdims=True)
        if sinks_Q is not None:
            total_BGN1 += jnp.exp(sink_1GN1 - most_BGN1)
        o_BGNV = (sum_BGNV / total_BGN1).astype(v_BSGV.dtype)
        return o_BGNV.reshape(batch, groups, per_group, end - begin, -1)

    if causal:
        size = max(QUERY_BLOCK, -(-length // MOST_BLOCKS))
        bounds = [(begin, min(begin + size, length)) for begin in range(0, length, size)]
        reach = length if window is None else window
        o_BGRLV = jnp.concatenate([block(begin, end, max(begin + 1 - reach, 0), end) for begin, end in bounds], axis=3)
    else:
        o_BGRLV = block(0, length, 0, k_BSGH.shape[1])
    return jnp.transpose(o_BGRLV, (0, 3, 1, 2, 4)).reshape(batch, length, heads, -1)


class Attention(nn.Module):
    """Projections around `attend`.

    Attributes:
      model: sizes, and in `architecture` biases, norms, sinks and the like.
      kind: one of `moejax.architecture.ATTENTION_KINDS`.
      out_scale: factor on the initial standard deviation of the output projection.
      dtype: compute type.
    """

    model: ModelConfig
    kind: str
    out_scale: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: Array, sight: Sight, cache: Cache | None, at: Array | None, q_BLQH: Array | None = None
                 ) -> tuple[Array, Cache | None]:
        """Attends to the tokens themselves, or with a cache to all that it holds after x is written at slot `at`.

        Args:
          x_BLD: input.
          sight: positions and visible keys; S is L without a cache and its length with one.
          cache: of this layer.
          at: int32 scalar, first slot of the cache that x fills.
          q_BLQH: projected queries, if they are made elsewhere; there is no output projection either then.

        Returns:
          [B, L, D], or without an output projection [B, L, Q, H], and the new cache.
        """
        model, design, width = self.model, self.model.architecture, x_BLD.shape[-1]
        rotated = sight.cos is not None and self.kind != "unrotated"

        def project(name: str, heads: int, axis: str, y_BLQH: Array | None = None) -> Array:
            y_BLQH = project_heads(self, name, x_BLD, heads, axis) if y_BLQH is None else y_BLQH
            norm = design.qk_norm if model.qk_norm and name != "v" else None
            if norm == "projection":
                y_BLQH = RMSNorm(model.norm_eps, (axis, "head_dim"), name=f"{name}_norm")(y_BLQH)
            elif norm == "head":
                y_BLQH = RMSNorm(model.norm_eps, ("head_dim",), name=f"{name}_norm")(y_BLQH)
            if design.clip_qkv is not None:
                y_BLQH = jnp.clip(y_BLQH, -design.clip_qkv, design.clip_qkv)
            if rotated and name != "v":
                y_BLQH = rotate(y_BLQH, sight.cos, sight.sin)
            if norm == "rotated_head":
                y_BLQH = RMSNorm(model.norm_eps, ("head_dim",), name=f"{name}_norm")(y_BLQH)
            elif norm == "rotated_unit" and rotated:
                y_BLQH = rms_norm(y_BLQH, 1.0, model.norm_eps)
            return y_BLQH

        project_output = q_BLQH is None
        q_BLQH = project("q", model.heads, "q_heads", q_BLQH)
        k_BSGH = project("k", model.kv_heads, "kv_heads")
        v_BSGH = project("v", model.kv_heads, "kv_heads")
        if self.kind == "unrotated" and sight.temperature_BL is not None:
            q_BLQH = (q_BLQH * sight.temperature_BL[:, :, None, None]).astype(self.dtype)
        cache = write(cache, k_BSGH, v_BSGH, at)
        if cache is not None:
            k_BSGH, v_BSGH = cache.k_BSGH, cache.v_BSGH
        sinks_Q = self.param("sinks", nn.with_logical_partitioning(
            nn.initializers.zeros, ("q_heads",)), (model.heads,)) if design.sinks else None
        o_BLQH = attend_sharded(model.attention, q_BLQH, k_BSGH, v_BSGH, sight.visible[self.kind],
                                sight.causal and cache is None, design.attention_scale,
                                design.window if self.kind in ("sliding", "chunked") else None, sinks_Q, sight.bias_BQLS)
        if not project_output:
            return o_BLQH, cache
        return output(self, o_BLQH, width, self.out_scale, design.output_bias), cache


def project_heads(module: nn.Module, name: str, x_BLD: Array, heads: int, axis: str) -> Array:
    """Declares, in a module of attention, a projection to heads along a logical axis, and applies it: [B, L, heads, H]."""
    width, head_dim = x_BLD.shape[-1], module.model.head_dim
    w_DQH = module.param(f"w_{name}", nn.with_logical_partitioning(
        nn.initializers.normal(width**-0.5), ("embed", axis, "head_dim")), (width, heads, head_dim))
    y_BLQH = jnp.einsum("bld,dqh->blqh", x_BLD, w_DQH.astype(module.dtype))
    if module.model.architecture.qkv_bias:
        y_BLQH += module.param(f"b_{name}", nn.with_logical_partitioning(
            nn.initializers.zeros, (axis, "head_dim")), (heads, head_dim)).astype(module.dtype)
    return y_BLQH


def output(module: nn.Module, o_BLQV: Array, width: int, out_scale: float, use_bias: bool) -> Array:
    """Declares, in a module, the projection of all heads together, and applies it: [B, L, D]."""
    heads, value_dim = o_BLQV.shape[2:]
    w_o_QVD = module.param("w_o", nn.with_logical_partitioning(
        nn.initializers.normal(out_scale * (heads * value_dim)**-0.5), ("q_heads", "head_dim", "embed")),
        (heads, value_dim, width))
    y_BLD = jnp.einsum("blqv,qvd->bld", o_BLQV, w_o_QVD.astype(o_BLQV.dtype))
    if use_bias:
        b_o_D = module.param("b_o", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)), (width,))
        y_BLD += b_o_D.astype(y_BLD.dtype)
    return sharding.constrain(y_BLD, "batch", "length", None)


def write(cache: Cache | None, k_BLGH: Array, v_BLGV: Array, at: Array | None) -> Cache | None:
    """The cache with keys and values of L more tokens from slot `at` on; None stays None."""
    if cache is None:
        return None
    return cache.replace(k_BSGH=jax.lax.dynamic_update_slice_in_dim(cache.k_BSGH, k_BLGH, at, axis=1),
                         v_BSGH=jax.lax.dynamic_update_slice_in_dim(cache.v_BSGH, v_BLGV, at, axis=1))


def attend_sharded(attention: str, q_BLQH: Array, k_BSGH: Array, v_BSGV: Array, visible_BLS: Array, causal: bool,
                   scale: float | None, window: int | None = None, sinks_Q: Array | None = None,
                   bias_BQLS: Array | None = None) -> Array:
    """`attend` on the current mesh, by the kernel that `attention` (config.model.attention) and the arrays allow.

    With the sequence split, each device keeps its queries and gathers keys and values.
    """
    q_BLQH = sharding.constrain(q_BLQH, "batch", "length", "q_heads", None)
    k_BSGH, v_BSGV = (sharding.constrain(a, "batch", None, "kv_heads", None) for a in (k_BSGH, v_BSGV))
    mesh = sharding.current_mesh()
    whole = mesh is None or mesh.shape[axes.CONTEXT] == 1
    if cudnn.chosen(attention, q_BLQH, k_BSGH, v_BSGV, not whole or sinks_Q is not None or bias_BQLS is not None):
        return cudnn.attend(q_BLQH, k_BSGH, v_BSGV, visible_BLS, causal, scale)
    return attend(q_BLQH, k_BSGH, v_BSGV, visible_BLS, causal and whole, scale, window, sinks_Q, bias_BQLS)
