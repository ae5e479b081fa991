"""Multi-head latent attention: keys and values come from a small latent, which is all that a cache holds.

DeepSeek-AI 2024, arXiv 2405.04434. A head's query and key have two parts: one from the latents, without positions, and one
that is rotated; the rotated part of the key is the same for all heads. With a cache, what makes keys and values out of the
latent is multiplied to the queries and the outputs instead, so that the heads attend to the latents themselves.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from moejax.architecture import Rope
from moejax.config import ModelConfig
from moejax.layers.attention import Cache, Sight, attend, attend_sharded, output, write
from moejax.layers.norm import RMSNorm
from moejax.layers.rotary import rotate, yarn_scale

LATENT_EPS = 1e-6
"""Of the norms on latents, which DeepSeek's models have fixed whatever the eps of their other norms."""


def score_scale(head_dim: int, rope: Rope) -> float:
    """Factor on the scores: 1/sqrt(H), and the square of YaRN's factor where it is not on cosine and sine."""
    stretched = rope.scaling == "yarn" and rope.mscale_all_dim
    return head_dim**-0.5 * (yarn_scale(rope.factor, rope.mscale_all_dim)**2 if stretched else 1.0)


class LatentAttention(nn.Module):
    """Projections to latents and from them, around `attend`. The attributes are those of `Attention`."""

    model: ModelConfig
    kind: str
    out_scale: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: Array, sight: Sight, cache: Cache | None, at: Array | None) -> tuple[Array, Cache | None]:
        """As `Attention`; the cache holds latents and rotated keys as its keys, of one head, and no values."""
        model, design, latent = self.model, self.model.architecture, self.model.architecture.latent
        width, plain = x_BLD.shape[-1], model.head_dim - latent.rotary_dim

        def matrix(name: str, shape: tuple[int, ...], names: tuple[str | None, ...]) -> Array:
            return self.param(name, nn.with_logical_partitioning(nn.initializers.normal(shape[0]**-0.5), names),
                              shape).astype(self.dtype)

        def down(name: str, rank: int) -> Array:
            y_BLR = x_BLD @ matrix(f"w_{name}", (width, rank), ("embed", "latent"))
            if design.qkv_bias:
                y_BLR += self.param(f"b_{name}", nn.with_logical_partitioning(nn.initializers.zeros, ("latent",)),
                                    (rank,)).astype(self.dtype)
            return y_BLR

        def normed(name: str, y_BLR: Array) -> Array:
            y_BLR = RMSNorm(LATENT_EPS, ("latent",), name=name)(y_BLR)
            return y_BLR * jnp.asarray((width / y_BLR.shape[-1])**0.5, y_BLR.dtype) if latent.scaled else y_BLR

        source_BLR, names = x_BLD, ("embed", "q_heads", "head_dim")
        if latent.query_rank:
            source_BLR, names = normed("q_norm", down("q_down", latent.query_rank)), ("latent", "q_heads", "head_dim")
        w_q_RQH = matrix("w_q", (source_BLR.shape[-1], model.heads, model.head_dim), names)
        q_BLQH = jnp.einsum("blr,rqh->blqh", source_BLR, w_q_RQH)
        kv_BLR = down("kv_down", latent.rank + latent.rotary_dim)
        c_BSR = normed("kv_norm", kv_BLR[..., :latent.rank])
        w_kv_RQH = matrix("w_kv", (latent.rank, model.heads, plain + latent.value_dim),
                          ("latent", "q_heads", "head_dim"))
        w_k_RQH, w_v_RQV = w_kv_RQH[..., :plain], w_kv_RQH[..., plain:]

        q_rotated_BLQH = rotate(q_BLQH[..., plain:], sight.cos, sight.sin)
        k_rotated_BSGH = rotate(kv_BLR[:, :, None, latent.rank:], sight.cos, sight.sin)
        visible_BLS, scale = sight.visible[self.kind], score_scale(model.head_dim, design.rope)
        if cache is None:
            k_BSQH = jnp.concatenate([jnp.einsum("bsr,rqh->bsqh", c_BSR, w_k_RQH), jnp.broadcast_to(
                k_rotated_BSGH, (*q_rotated_BLQH.shape[:3], latent.rotary_dim))], axis=-1)
            v_BSQV = jnp.einsum("bsr,rqv->bsqv", c_BSR, w_v_RQV)
            q_BLQH = jnp.concatenate([q_BLQH[..., :plain], q_rotated_BLQH], axis=-1)
            o_BLQV = attend_sharded(model.attention, q_BLQH, k_BSQH, v_BSQV, visible_BLS, sight.causal, scale)
        else:
            c_BSGR = c_BSR[:, :, None]
            cache = write(cache, jnp.concatenate([c_BSGR, k_rotated_BSGH], axis=-1), c_BSGR[..., :0], at)
            q_BLQR = jnp.concatenate([jnp.einsum("blqh,rqh->blqr", q_BLQH[..., :plain], w_k_RQH), q_rotated_BLQH], axis=-1)
            o_BLQR = attend(q_BLQR, cache.k_BSGH, cache.k_BSGH[..., :latent.rank], visible_BLS, False, scale)
            o_BLQV = jnp.einsum("blqr,rqv->blqv", o_BLQR, w_v_RQV)
        return output(self, o_BLQV, width, self.out_scale, design.output_bias), cache
