"""An objective taken over chunks of the tokens, so that the logits of a whole batch never exist at once.

The gradient of a chunk is computed with its value, while its logits are in the cache: a batch of 2,048 tokens and 8,192
words has 64 MiB of logits, which otherwise pass through memory several times.
"""

from functools import partial
from typing import Any, Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from moejax import axes, sharding

Objective = Callable[..., tuple[Array, dict[str, Array]]]
"""(logits_BLV, targets_BL, mask_BL, ...) -> (sum over tokens to minimise, sums to report)."""


def over_chunks(objective: Objective, chunk_tokens: int | None, head_DV: Array, x_BLD: Array,
                *rows_BL: Array) -> tuple[Array, dict[str, Array]]:
    """An objective of the logits x @ head, in chunks of the sequences; only the sum to minimise is differentiated.

    Args:
      objective: see `Objective`; its sums over chunks must add up to its sums over all.
      chunk_tokens: tokens in a chunk on one device, at most; None takes all at once.
      head_DV: float32, used in the type of x.
      x_BLD: last activations.
      rows_BL: targets, mask and whatever else the objective takes for each token.

    Returns:
      What the objective returns.
    """
    if sharding.current_mesh() is None:
        return _scanned(objective, chunk_tokens, head_DV, x_BLD, rows_BL)

    def on_device(head_DV: Array, x_BLD: Array, rows_BL: tuple[Array, ...]) -> tuple[Array, dict[str, Array]]:
        # Marked as varying, so that its gradient is summed over the devices once, after all chunks.
        head_DV = sharding.varying_over(head_DV, axes.TOKEN_AXES)
        return jax.lax.psum(_scanned(objective, chunk_tokens, head_DV, x_BLD, rows_BL), axes.TOKEN_AXES)

    rows = P(axes.BATCH_AXES, axes.CONTEXT)
    return jax.shard_map(on_device, in_specs=(P(), rows, rows), out_specs=P(), axis_names=set(axes.TOKEN_AXES))(
        head_DV, x_BLD, rows_BL)


def chunks_of(batch: int, length: int, chunk_tokens: int | None) -> int:
    """The fewest equal parts of the length with at most `chunk_tokens` tokens in a part; at most one part a position."""
    if chunk_tokens is None:
        return 1
    return next(n for n in range(1, length + 1) if length % n == 0 and (batch * length <= n * chunk_tokens or n == length))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scanned(objective, chunk_tokens, head_DV, x_BLD, rows_BL):
    values = jax.lax.map(lambda part: objective(_logits(part[0], head_DV), *part[1:]),
                         _split(chunk_tokens, x_BLD, *rows_BL))
    return jax.tree.map(lambda a: jnp.sum(a, axis=0), values)


def _forward(objective, chunk_tokens, head_DV, x_BLD, rows_BL):
    def step(d_head_DV: Array, part: Any) -> tuple[Array, Any]:
        x_BlD, *rest = part
        value, d_logits_BlV = jax.value_and_grad(objective, has_aux=True)(_logits(x_BlD, head_DV), *rest)
        d_logits_NV = d_logits_BlV.reshape(-1, d_logits_BlV.shape[-1]).astype(x_BlD.dtype)
        # Transposed for real: XLA:CPU takes twice as long for a matmul that sums over the first axis of both.
        x_DN = jax.lax.optimization_barrier(x_BlD.reshape(-1, x_BlD.shape[-1]).T)
        d_head_DV += jnp.matmul(x_DN, d_logits_NV, preferred_element_type=jnp.float32)
        dx_BlD = jnp.einsum("nv,dv->nd", d_logits_NV, head_DV.astype(x_BlD.dtype)).reshape(x_BlD.shape)
        return d_head_DV, (value, dx_BlD)

    zeros_DV = sharding.varying_like(jnp.zeros_like(head_DV), head_DV)
    d_head_DV, (values, dx_CBlD) = jax.lax.scan(step, zeros_DV, _split(chunk_tokens, x_BLD, *rows_BL))
    dx_BLD = jnp.moveaxis(dx_CBlD, 0, 2).reshape(x_BLD.shape)
    return jax.tree.map(lambda a: jnp.sum(a, axis=0), values), (d_head_DV, dx_BLD)


def _backward(objective, chunk_tokens, gradients, cotangents):
    d_head_DV, dx_BLD = jax.tree.map(lambda a: (cotangents[0] * a).astype(a.dtype), gradients)
    return d_head_DV, dx_BLD, None


_scanned.defvjp(_forward, _backward)


def _logits(x_BlD: Array, head_DV: Array) -> Array:
    logits_BlV = jnp.einsum("bld,dv->blv", x_BlD, head_DV.astype(x_BlD.dtype), preferred_element_type=jnp.float32)
    return sharding.constrain(logits_BlV, None, None, "vocab")


def _split(chunk_tokens: int | None, *arrays_BL: Array) -> tuple[Array, ...]:
    """[B, L, ...] -> [chunks, B, L/chunks, ...] by taking every chunks-th token."""
    batch, length = arrays_BL[0].shape[:2]
    chunks = chunks_of(batch, length, chunk_tokens)
    return tuple(jnp.moveaxis(a.reshape(batch, length // chunks, chunks, *a.shape[2:]), 2, 0) for a in arrays_BL)
