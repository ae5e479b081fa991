"""The experts' matrices: as numbers to train, or in few bits for inference.

In few bits, each output of a matrix has a scale for all of its inputs (8 bits) or for every GROUP of them (4 bits), and the
numbers are rounded to the nearest multiple of it, symmetric around 0 (absmax, as in LLM.int8() 2208.07339 and QLoRA
2305.14314). They become numbers again where a layer uses them, so only one layer's are ever whole.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

GROUP = 32
"""Inputs that share a scale at 4 bits, or what of it divides their number."""


def inputs_of_a_scale(inputs: int, bits: int) -> int:
    """Inputs of a matrix that share a scale."""
    return inputs if bits == 8 else math.gcd(inputs, GROUP)


def quantise(w: Array, bits: int) -> tuple[Array, Array]:
    """Rounds matrices.

    Args:
      w: float32 [E, inputs, ...].
      bits: 8, or 4, for which inputs must be even.

    Returns:
      int8 [E, inputs, ...], or at 4 bits uint8 [E, inputs/2, ...] with two numbers in each; and float32 scales
      [E, inputs/g, ...].
    """
    experts, inputs, *outputs = w.shape
    grouped = w.reshape(experts, -1, inputs_of_a_scale(inputs, bits), *outputs)
    most = 2**(bits - 1) - 1
    scale = jnp.max(jnp.abs(grouped), axis=2) / most
    rounded = jnp.round(grouped / jnp.where(scale == 0, 1, scale)[:, :, None]).astype(jnp.int8).reshape(w.shape)
    if bits == 8:
        return rounded, scale
    low, high = rounded[:, 0::2].astype(jnp.uint8), rounded[:, 1::2].astype(jnp.uint8)
    return (low & 15) | (high << 4), scale


def dequantise(rounded: Array, scale: Array, bits: int, dtype: Any) -> Array:
    """The matrices that `quantise` has rounded, [E, inputs, ...]."""
    if bits == 4:
        # Shifted up as signed numbers and down again, each half brings its sign.
        pair = jnp.stack([(rounded << 4).astype(jnp.int8) >> 4, rounded.astype(jnp.int8) >> 4], axis=2)
        rounded = pair.reshape(rounded.shape[0], -1, *rounded.shape[2:])
    grouped = rounded.reshape(scale.shape[0], scale.shape[1], -1, *scale.shape[2:])
    return (grouped * scale[:, :, None]).reshape(rounded.shape).astype(dtype)


def expert_weights(module: nn.Module, name: str, shape: tuple[int, ...], names: tuple[str, ...], stddev: float, bits: int,
                   dtype: Any) -> Array:
    """Declares the experts' matrices in a module, and returns them as numbers.

    Args:
      module: of the layer.
      name: of the parameter; scales are beside it.
      shape: [E, inputs, ...].
      names: logical axes.
      stddev: initial standard deviation.
      bits: 0 for numbers that are trained, or in how many the matrices are stored.
      dtype: compute type.
    """
    if not bits:
        return module.param(name, nn.with_logical_partitioning(nn.initializers.normal(stddev), names), shape).astype(dtype)
    experts, inputs, *outputs = shape
    rounded = module.param(name, nn.with_logical_partitioning(nn.initializers.zeros, names),
                           (experts, inputs * bits // 8, *outputs), jnp.int8 if bits == 8 else jnp.uint8)
    scale = module.param(f"{name}_scale", nn.with_logical_partitioning(nn.initializers.zeros, (
        names[0], None, *names[2:])), (experts, inputs // inputs_of_a_scale(inputs, bits), *outputs))
    return dequantise(rounded, scale, bits, dtype)
