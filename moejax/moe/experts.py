"""COMPUTE: what experts do with the rows they received. No communication, no knowledge of routing."""

import jax
import jax.numpy as jnp
from jax import Array

from moejax.layers.mlp import dropout, gated
from moejax.moe import blocked


def feed_forward(x_RD: Array, sizes_E: Array, w_in_ED2F: Array, w_out_EFD: Array, *, compute: str, block_rows: int,
                 dropout_rate: float = 0.0, key: Array | None = None) -> Array:
    """SwiGLU experts on rows that are grouped by expert.

    Args:
      x_RD: rows; the first sizes_E[0] belong to expert 0, and so on. Behind the groups lie at least
        `spare_rows(compute, block_rows)` more rows, whose results are anything, not a number included.
      sizes_E: int32.
      w_in_ED2F: gate and up projections.
      w_out_EFD: down projection.
      compute: `blocked` or `ragged_dot`.
      block_rows: rows of a block for `blocked`.
      dropout_rate: rate of dropout on the hidden units.
      key: its PRNG key, or None for no dropout.

    Returns:
      y_RD.
    """
    if compute == "blocked":
        return blocked.feed_forward(x_RD, sizes_E, w_in_ED2F, w_out_EFD, key, block_rows, dropout_rate)
    experts, width, _, hidden = w_in_ED2F.shape
    h_RF = jax.lax.ragged_dot(x_RD, w_in_ED2F.reshape(experts, width, 2 * hidden), sizes_E)
    h_RF = dropout(gated(h_RF.reshape(-1, 2, hidden)), dropout_rate, key)
    return jax.lax.ragged_dot(h_RF, w_out_EFD, sizes_E)


def dense_feed_forward(x_ETD: Array, w_in_ED2F: Array, w_out_EFD: Array, dropout_rate: float = 0.0,
                       key: Array | None = None) -> Array:
    """The same on equal groups, as two plain einsums: the oracle's compute."""
    h_ETF = dropout(gated(jnp.einsum("etd,edgf->etgf", x_ETD, w_in_ED2F)), dropout_rate, key)
    return jnp.einsum("etf,efd->etd", h_ETF, w_out_EFD)


def choose_compute(compute: str) -> str:
    """Resolves `auto` by backend: XLA:CPU expands ragged_dot to E times the work, TPU and GPU have kernels for it."""
    if compute != "auto":
        return compute
    return "blocked" if jax.default_backend() == "cpu" else "ragged_dot"


def spare_rows(compute: str, block_rows: int) -> int:
    """Rows that must lie behind the groups."""
    return blocked.step_rows(block_rows) if compute == "blocked" else 0


def row_multiple(compute: str) -> int:
    """What the number of rows should be a multiple of: the TPU kernel's tile, the largest power of two in it, up to 256."""
    return 256 if compute == "ragged_dot" else 1
