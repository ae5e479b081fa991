"""COMPUTE: what experts do with the rows they received. No communication, no knowledge of routing."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import check
from moejax.gpus import cuda_capability
from moejax.layers.mlp import SWIGLU, Activation, activate, dropout
from moejax.moe import blocked, grouped


def feed_forward(x_RD: Array, sizes_E: Array, w_in_EDGF: Array, w_out_EFD: Array, *, compute: str, block_rows: int,
                 dropout_rate: float = 0.0, key: Array | None = None, b_in_EGF: Array | None = None,
                 activation: Activation = SWIGLU) -> Array:
    """Experts on rows that are grouped by expert.

    Args:
      x_RD: rows; the first sizes_E[0] belong to expert 0, and so on. Behind the groups lie at least
        `spare_rows(compute, block_rows)` more rows, whose results are anything, not a number included.
      sizes_E: int32.
      w_in_EDGF: gate and up projections (G = 2), or one projection (G = 1).
      w_out_EFD: down projection.
      compute: `blocked`, `ragged_dot`, `triton` or `hopper`.
      block_rows: rows of a block for `blocked`.
      dropout_rate: rate of dropout on the hidden units.
      key: its PRNG key, or None for no dropout.
      b_in_EGF: biases of the first projections, or None.
      activation: the non-linearity.

    Returns:
      y_RD.
    """
    if compute == "blocked":
        return blocked.feed_forward(x_RD, sizes_E, w_in_EDGF, w_out_EFD, b_in_EGF, key, block_rows, dropout_rate,
                                    activation)
    matmul = jax.lax.ragged_dot if compute == "ragged_dot" else partial(grouped.matmul, kernels=compute)
    experts, width, inputs, hidden = w_in_EDGF.shape
    h_RF = matmul(x_RD, w_in_EDGF.reshape(experts, width, inputs * hidden), sizes_E)
    h_RGF = h_RF.reshape(-1, inputs, hidden)
    if b_in_EGF is not None:
        b_RGF = jnp.repeat(b_in_EGF, sizes_E, axis=0, total_repeat_length=x_RD.shape[0])
        grouped_R = jnp.arange(x_RD.shape[0]) < jnp.sum(sizes_E)  # what lies behind the groups may have any gradient
        h_RGF = jnp.where(grouped_R[:, None, None], h_RGF + b_RGF, 0)
    h_RF = dropout(activate(h_RGF, activation), dropout_rate, key)
    return matmul(h_RF, w_out_EFD, sizes_E)


def dense_feed_forward(x_ETD: Array, w_in_EDGF: Array, w_out_EFD: Array, dropout_rate: float = 0.0,
                       key: Array | None = None, b_in_EGF: Array | None = None, activation: Activation = SWIGLU) -> Array:
    """The same on equal groups, as two plain einsums: the oracle's compute."""
    h_ETGF = jnp.einsum("etd,edgf->etgf", x_ETD, w_in_EDGF)
    if b_in_EGF is not None:
        h_ETGF += b_in_EGF[:, None]
    return jnp.einsum("etf,efd->etd", dropout(activate(h_ETGF, activation), dropout_rate, key), w_out_EFD)


def choose_compute(compute: str, w_in_EDGF: Array, w_out_EFD: Array, pairs: int) -> str:
    """Resolves `auto` by backend: XLA expands ragged_dot to E times the work on CPU and GPU, and has a kernel on TPU.

    Args:
      compute: the config's.
      w_in_EDGF, w_out_EFD: the device's weights; only their shapes and type count.
      pairs: of tokens and experts.

    Raises:
      UserError: kernels of `grouped` without a GPU.
    """
    if compute != "auto":
        check(compute not in grouped.KERNELS or jax.default_backend() == "gpu",
              f"config.moe.compute={compute} needs a GPU; use auto")
        return compute
    if jax.default_backend() == "cpu":
        return "blocked"
    if cuda_capability() < (8, 0):
        return "ragged_dot"
    count, width, inputs, hidden = w_in_EDGF.shape
    shapes = (count, width, inputs * hidden), w_out_EFD.shape
    return grouped.choose([jax.ShapeDtypeStruct(shape, w_in_EDGF.dtype) for shape in shapes], pairs)


def spare_rows(compute: str, block_rows: int) -> int:
    """Rows that must lie behind the groups."""
    return blocked.step_rows(block_rows) if compute == "blocked" else 0


def row_multiple(compute: str) -> int:
    """What the number of rows should be a multiple of. The TPU's tile is the largest power of two in it, up to 256."""
    return {"ragged_dot": 256, "hopper": 128}.get(compute, 1)
