"""COMPUTE: what experts do with the rows they received. No communication, no knowledge of routing."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from moejax import sharding
from moejax.layers.mlp import dropout, gated


def feed_forward(x_RD: Array, sizes_E: Array, w_in_ED2F: Array, w_out_EFD: Array, *, compute: str, block_rows: int,
                 dropout_rate: float = 0.0, key: Array | None = None) -> Array:
    """SwiGLU experts on rows that are grouped by expert.

    Args:
      x_RD: rows; the first sizes_E[0] belong to expert 0, and so on. Rows beyond the sum give zeros.
      sizes_E: int32; multiples of `alignment(compute, block_rows)`.
      w_in_ED2F: gate and up projections.
      w_out_EFD: down projection.
      compute: `blocked` or `ragged_dot`.
      block_rows: rows of a block for `blocked`.
      dropout_rate: rate of dropout on the hidden units.
      key: its PRNG key, or None for no dropout.

    Returns:
      y_RD.
    """
    experts, width, _, hidden = w_in_ED2F.shape
    h_RF = grouped_matmul(x_RD, w_in_ED2F.reshape(experts, width, 2 * hidden), sizes_E, compute, block_rows)
    h_RF = dropout(gated(h_RF.reshape(-1, 2, hidden)), dropout_rate, key)
    return grouped_matmul(h_RF, w_out_EFD, sizes_E, compute, block_rows)


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


def fit_block(block_rows: int, pairs: int, num_experts: int) -> int:
    """Rows of a block for a list of this length: no more than the power of two above an expert's mean share."""
    return min(block_rows, 1 << (max(1, pairs // num_experts) - 1).bit_length())


def alignment(compute: str, block_rows: int) -> int:
    """Rows to which every group must be padded."""
    return block_rows if compute == "blocked" else 1


def grouped_matmul(x_RD: Array, w_EDF: Array, sizes_E: Array, compute: str, block_rows: int) -> Array:
    """Multiplies each row with the matrix of its group; see `feed_forward`. Returns [R, F]."""
    if compute == "ragged_dot":
        return jax.lax.ragged_dot(x_RD, w_EDF, sizes_E)
    return blocked_matmul(x_RD, w_EDF, sizes_E, block_rows)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocked_matmul(x_RD: Array, w_EDF: Array, sizes_E: Array, block_rows: int) -> Array:
    """A loop over blocks of rows, each with one expert's matrix: dense matmul speed without a grouped kernel.

    Only blocks in use are computed, so padding for the worst case costs memory but no time.
    """
    return _loop(x_RD, w_EDF, sizes_E, block_rows, transposed=False)


def _forward(x_RD, w_EDF, sizes_E, block_rows):
    return blocked_matmul(x_RD, w_EDF, sizes_E, block_rows), (x_RD, w_EDF, sizes_E)


def _backward(block_rows, saved, dy_RF):
    x_RD, w_EDF, sizes_E = saved
    blocks, expert_of = _blocks(sizes_E, x_RD.shape[0], block_rows)

    def accumulate(i, dw_EDF):
        x_bD = jax.lax.dynamic_slice_in_dim(x_RD, i * block_rows, block_rows)
        dy_bF = jax.lax.dynamic_slice_in_dim(dy_RF, i * block_rows, block_rows)
        dw_DF = jnp.einsum("bd,bf->df", x_bD, dy_bF, preferred_element_type=jnp.float32)
        e = expert_of[i]
        return jax.lax.dynamic_update_index_in_dim(dw_EDF, dw_EDF[e] + dw_DF, e, 0)

    dw_EDF = jax.lax.fori_loop(0, blocks, accumulate, sharding.varying_like(jnp.zeros(w_EDF.shape), x_RD))
    return _loop(dy_RF, w_EDF, sizes_E, block_rows, transposed=True), dw_EDF.astype(w_EDF.dtype), None


def _loop(x_RD: Array, w_EDF: Array, sizes_E: Array, block_rows: int, transposed: bool) -> Array:
    blocks, expert_of = _blocks(sizes_E, x_RD.shape[0], block_rows)
    width = w_EDF.shape[1 if transposed else 2]

    def step(i, y_RF):
        x_bD = jax.lax.dynamic_slice_in_dim(x_RD, i * block_rows, block_rows)
        w_DF = w_EDF[expert_of[i]]
        y_bF = x_bD @ (w_DF.T if transposed else w_DF)
        return jax.lax.dynamic_update_slice_in_dim(y_RF, y_bF, i * block_rows, 0)

    empty = sharding.varying_like(jnp.zeros((x_RD.shape[0], width), x_RD.dtype), x_RD)
    return jax.lax.fori_loop(0, blocks, step, empty)


def _blocks(sizes_E: Array, rows: int, block_rows: int) -> tuple[Array, Array]:
    """Number of blocks in use, and the expert of each block."""
    ends_E = jnp.cumsum(sizes_E) // block_rows
    expert_of = jnp.searchsorted(ends_E, jnp.arange(rows // block_rows), side="right")
    return ends_E[-1], jnp.minimum(expert_of, sizes_E.shape[0] - 1).astype(jnp.int32)


blocked_matmul.defvjp(_forward, _backward)
