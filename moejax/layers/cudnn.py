"""Attention by cuDNN, which keeps no head's scores (FlashAttention 2205.14135): GPU, bfloat16, whole sequences."""

import jax
from jax import Array

from moejax.config import check
from moejax.gpus import cuda_capability


def chosen(attention: str, q_BLQH: Array, k_BSGH: Array, v_BSGV: Array, plain_only: bool) -> bool:
    """Whether these arrays go to cuDNN under `config.model.attention`.

    Args:
      attention: `auto`, `plain` or `cudnn`.
      q_BLQH, k_BSGH, v_BSGV: as `moejax.layers.attention.attend` takes them.
      plain_only: whether scores have a bias or sinks, or the sequence is split over devices.

    Raises:
      UserError: `cudnn` where there is no such GPU or the compute type is another.
    """
    if attention == "plain":
        return False
    able = cuda_capability() >= (8, 0) and q_BLQH.dtype in ("bfloat16", "float16")
    check(able or attention == "auto", "config.model.attention=cudnn needs an NVIDIA GPU of compute capability 8.0 or "
          "newer and config.train.dtype=bfloat16; use auto")
    length, width = q_BLQH.shape[1], q_BLQH.shape[3]
    # Queries of a cache are few, and there is no kernel for them; nor for values of another width than the keys, nor in
    # training with a mask for an odd length.
    return able and not plain_only and length == k_BSGH.shape[1] and length % 2 == 0 and (
        v_BSGV.shape[3] == width <= 128) and width % 8 == 0


def attend(q_BLQH: Array, k_BSGH: Array, v_BSGV: Array, visible_BLS: Array, causal: bool, scale: float | None) -> Array:
    """What `moejax.layers.attention.attend` computes, [B, L, Q, V]; the gradient of q adds up in no fixed order."""
    return jax.nn.dot_product_attention(q_BLQH, k_BSGH, v_BSGV, mask=visible_BLS[:, None], is_causal=causal, scale=scale,
                                        implementation="cudnn")
