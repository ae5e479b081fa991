"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its stretched forms.

linear: Chen et al. 2306.15595; llama3: as in the Llama 3.1 models (2407.21783); yarn: Peng et al. 2309.00071.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.architecture import PLAIN, Rope


def frequencies(dims: int, base: float, rope: Rope) -> np.ndarray:
    """Radians that each of the dims/2 pairs turns from one position to the next, float32."""
    turn = base ** (-np.arange(0, dims, 2) / dims)
    slow = turn / rope.factor
    if rope.scaling == "linear":
        turn = slow
    elif rope.scaling == "llama3":
        turns = rope.original_length * turn / (2 * math.pi)
        kept = np.clip((turns - rope.low_factor) / (rope.high_factor - rope.low_factor), 0, 1)
        turn = kept * turn + (1 - kept) * slow
    elif rope.scaling == "yarn":
        first, last = (dims * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))
                       for turns in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dims - 1)
        stretched = np.clip((np.arange(dims // 2) - first) / max(last - first, 1e-3), 0, 1)
        turn = stretched * slow + (1 - stretched) * turn
    return turn.astype(np.float32)


def yarn_scale(factor: float, mscale: float) -> float:
    """YaRN's factor on queries and keys for a context `factor` times as long."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def amplitude(rope: Rope) -> float:
    """Factor on cosine and sine."""
    if rope.scaling != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_scale(rope.factor, rope.mscale) / yarn_scale(rope.factor, rope.mscale_all_dim)
    return yarn_scale(rope.factor, 1.0)


def angles(positions_BL: Array, dims: int, base: float, rope: Rope = PLAIN.rope) -> tuple[Array, Array]:
    """Cosine and sine of position times frequency for `dims` dimensions, each float32 [B, L, 1, dims/2]."""
    angle = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies(dims, base, rope)
    cos, sin = jax.lax.platform_dependent(angle, cpu=_in_a_loop, default=lambda angle: (jnp.cos(angle), jnp.sin(angle)))
    return amplitude(rope) * cos, amplitude(rope) * sin


def _in_a_loop(angle: Array) -> tuple[Array, Array]:
    """Cosine and sine that XLA:CPU cannot fuse into each rotation, to take them anew for every head of every layer."""
    cos, sin = jax.lax.map(lambda which: jax.lax.cond(which == 0, jnp.cos, jnp.sin, angle), jnp.arange(2))
    return cos, sin


def rotate(x_BLQH: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (x_i, x_{i + R/2}) of the first R dimensions of a head, two for each angle; others stay."""
    rotated, dims = x_BLQH.astype(jnp.float32), 2 * cos.shape[-1]
    first, second = jnp.split(rotated[..., :dims], 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    rest = [rotated[..., dims:]] if dims < x_BLQH.shape[-1] else []
    return jnp.concatenate(turned + rest, axis=-1).astype(x_BLQH.dtype)
