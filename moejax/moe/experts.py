"""COMPUTE: what experts do with the rows they received. No communication, no knowledge of routing."""

import math
from functools import partial
from typing import Any, Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from moejax import axes
from moejax.config import check
from moejax.gpus import cuda_capability
from moejax.layers.mlp import SWIGLU, Activation, activate, dropout
from moejax.moe import blocked, grouped_native
from moejax.moe.grouped import GPU_KERNELS, choose
from moejax.moe.grouped import matmul as grouped_matmul


class Work(NamedTuple):
    """Experts as a transport sees them.

    Attributes:
      weights: arrays [E, ...], and None for what there is not.
      split: for each, the mesh axis that splits each dimension behind E, or None.
      grouped: (rows, sizes_E, weights, compute, block_rows, key) -> rows, on rows grouped by expert as for `feed_forward`.
      dense: (rows [E, T, D], weights, key) -> [E, T, D]: the same on equal groups, the oracle's compute.
      split_in, split_out: whether the model axis splits the width of what goes in, and of what comes out. If it does not
        split what comes out, every device gives a part of the sum.
    """

    weights: tuple[Array | None, ...]
    split: tuple[tuple[str | None, ...], ...]
    grouped: Callable[..., Array]
    dense: Callable[..., Array]
    split_in: bool = False
    split_out: bool = False


def hidden_layers(w_in_EDGF: Array, w_out_EFD: Array, b_in_EGF: Array | None, activation: Activation, dropout_rate: float
                  ) -> Work:
    """Experts that are feed-forward layers; see `feed_forward` for the arguments."""
    def grouped(x_RD: Array, sizes_E: Array, weights: Any, compute: str, block_rows: int, key: Array | None) -> Array:
        w_in_EDGF, w_out_EFD, b_in_EGF = weights
        return feed_forward(x_RD, sizes_E, w_in_EDGF, w_out_EFD, compute=compute, block_rows=block_rows,
                            dropout_rate=dropout_rate, key=key, b_in_EGF=b_in_EGF, activation=activation)

    def dense(x_ETD: Array, weights: Any, key: Array | None) -> Array:
        w_in_EDGF, w_out_EFD, b_in_EGF = weights
        return dense_feed_forward(x_ETD, w_in_EDGF, w_out_EFD, dropout_rate, key, b_in_EGF, activation)

    return Work((w_in_EDGF, w_out_EFD, b_in_EGF), ((None, None, axes.MODEL), (axes.MODEL, None), (None, axes.MODEL)),
                grouped, dense)


def projections(w_EDF: Array, outward: bool) -> Work:
    """Experts that are one matrix; the model axis splits F.

    Args:
      w_EDF: matrices.
      outward: whether F, the inner width, is that of what comes out, or of what goes in: then they are w_EFD.
    """
    def dense(x_ETD: Array, weights: Any, key: Array | None) -> Array:
        return jnp.einsum("etd,edf->etf", x_ETD, weights[0])

    def grouped(x_RD: Array, sizes_E: Array, weights: Any, compute: str, block_rows: int, key: Array | None) -> Array:
        if compute == "blocked":
            return blocked.linear(x_RD, sizes_E, weights[0], block_rows)
        matmul = jax.lax.ragged_dot if compute == "ragged_dot" else partial(grouped_matmul, kernels=compute)
        return matmul(x_RD, weights[0], sizes_E)

    split = (None, axes.MODEL) if outward else (axes.MODEL, None)
    return Work((w_EDF,), (split,), grouped, dense, split_in=not outward, split_out=outward)


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
      compute: `native`, `blocked`, `ragged_dot`, `triton` or `hopper`.
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
    matmul = jax.lax.ragged_dot if compute == "ragged_dot" else partial(grouped_matmul, kernels=compute)
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


def choose_compute(compute: str, weights: Sequence[Array], pairs: int) -> str:
    """Resolves `auto` by backend: XLA expands ragged_dot to E times the work on CPU and GPU, and has a kernel on TPU.

    On a CPU float32 goes to `native`, where it can be compiled, and all else to `blocked`.

    Args:
      compute: the config's.
      weights: the device's matrices, [E, in, out ...]; only their shapes and type count.
      pairs: of tokens and experts.

    Raises:
      UserError: kernels for GPUs without one.
    """
    if compute != "auto":
        check(compute not in GPU_KERNELS or jax.default_backend() == "gpu",
              f"config.moe.compute={compute} needs a GPU; use auto")
        return compute
    if jax.default_backend() == "cpu":
        return "blocked" if any(map(grouped_native.misfit, weights)) else "native"
    if cuda_capability() < (8, 0):
        return "ragged_dot"
    return choose([jax.ShapeDtypeStruct((*w.shape[:2], math.prod(w.shape[2:])), w.dtype) for w in weights], pairs)


def spare_rows(compute: str, block_rows: int) -> int:
    """Rows that must lie behind the groups."""
    return blocked.step_rows(block_rows) if compute == "blocked" else 0


def row_multiple(compute: str) -> int:
    """What the number of rows should be a multiple of. The TPU's tile is the largest power of two in it, up to 256."""
    return {"ragged_dot": 256, "hopper": 128}.get(compute, 1)
