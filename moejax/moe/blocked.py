"""The experts' feed-forward in blocks of rows, each a plain matmul: for CPUs that cannot use `moejax.moe.grouped_native`.

A loop over experts takes the matrices of one, and a loop inside it that expert's rows: whole blocks, then one last block
of the smallest size that holds the rest. Both projections, the gate and all gradients of a block are computed while it is
in the cache. The work is that of the rows in use, at most `step - 1` more an expert, whatever the skew.

A last block may reach into the next expert's rows. Forward, and for the gradient of the rows, that expert writes them
again later; in the weights' gradients they are masked.
"""

import itertools
from functools import partial
from typing import Any, Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax import sharding
from moejax.layers.mlp import SWIGLU, Activation, activate_parts, dropout

LARGE = 256
"""Rows from which a block has half as many sizes of last blocks. Each is compiled on its own: with all of them the train
step of experiments/bench_mixtral_small.py, with blocks of 384 rows, took 30 s to compile, not 14, and as long to run."""


def fit_block(block_rows: int, pairs: int, num_experts: int) -> int:
    """Rows of a block for a list of this length: one and a half times an expert's mean share, in whole steps.

    At balance an expert then is a single block; larger ones would only make larger steps.
    """
    wanted = -(-3 * pairs // (2 * num_experts))
    step = step_rows(wanted)
    return min(block_rows, -(-wanted // step) * step)


def step_rows(block_rows: int) -> int:
    """What the sizes of last blocks are multiples of; in fours, for a matmul of two rows was seen to take as long."""
    return -(-block_rows // (4 * (12 if block_rows >= LARGE else 24))) * 4


def rows_computed(size: int, block_rows: int) -> int:
    """Rows that are multiplied for an expert that holds `size`."""
    whole, rest = divmod(size, block_rows)
    step = step_rows(block_rows)
    return whole * block_rows + min(-(-rest // step) * step, block_rows)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def feed_forward(x_RD: Array, sizes_E: Array, w_in_EDGF: Array, w_out_EFD: Array, b_in_EGF: Array | None, key: Array | None,
                 block_rows: int, dropout_rate: float, activation: Activation = SWIGLU) -> Array:
    """Experts on rows grouped by expert.

    Args:
      x_RD: rows; the first sizes_E[0] belong to expert 0, and so on; at least `step_rows(block_rows)` more than these.
      sizes_E: int32.
      w_in_EDGF: gate and up projections (G = 2), or one projection (G = 1).
      w_out_EFD: down projections.
      b_in_EGF: biases of the first projections, or None.
      key: for dropout on the hidden units, or None.
      block_rows: rows of a whole block.
      dropout_rate: of the hidden units.
      activation: the non-linearity.

    Returns:
      y_RD; beyond the groups, anything finite.
    """
    return _forward(x_RD, sizes_E, w_in_EDGF, w_out_EFD, b_in_EGF, key, block_rows, dropout_rate, activation)[0]


def _forward(x_RD, sizes_E, w_in_EDGF, w_out_EFD, b_in_EGF, key, block_rows, dropout_rate, activation):
    width, inputs, hidden = w_in_EDGF.shape[1], w_in_EDGF.shape[2], w_in_EDGF.shape[2] * w_in_EDGF.shape[3]
    activated = partial(_activate, activation, key, dropout_rate)
    end_E = jnp.cumsum(sizes_E)

    def expert(e: Array, carry: Any) -> Any:
        w_in_DF, w_out_FD = w_in_EDGF[e].reshape(width, hidden), w_out_EFD[e]

        def block(carry: Any, start: Array, end: Array, rows: int, last: bool) -> Any:
            y_RD, h_RF = carry
            h_bF = _rows(x_RD, start, rows) @ w_in_DF
            if b_in_EGF is not None:
                h_bF += b_in_EGF[e].reshape(hidden)
            a_bF = activated(start, *jnp.split(h_bF, inputs, axis=1))
            return _write(y_RD, a_bF @ w_out_FD, start), _write(h_RF, h_bF, start)

        return _over_blocks(block, sizes_E[e], end_E[e], block_rows, x_RD.shape[0], carry)

    def empty(width: int) -> Array:
        return sharding.varying_like(jnp.zeros((x_RD.shape[0], width), x_RD.dtype), x_RD)

    y_RD, h_RF = jax.lax.fori_loop(0, sizes_E.shape[0], expert, (empty(width), empty(hidden)))
    # The weights are kept as they came, in which form a scan over layers already has them and need not stack them anew.
    return y_RD, (x_RD, h_RF, sizes_E, w_in_EDGF, w_out_EFD, b_in_EGF, key)


def _backward(block_rows, dropout_rate, activation, saved, dy_RD):
    x_RD, h_RF, sizes_E, w_in_EDGF, w_out_EFD, b_in_EGF, key = saved
    width, inputs, hidden = w_in_EDGF.shape[1], w_in_EDGF.shape[2], h_RF.shape[1]
    activated = partial(_activate, activation, key, dropout_rate)
    end_E = jnp.cumsum(sizes_E)

    matmul = partial(jnp.matmul, preferred_element_type=jnp.float32)  # the sum over blocks would stall in less

    def expert(e: Array, carry: Any) -> Any:
        w_in_DF, w_out_FD = w_in_EDGF[e].reshape(width, hidden), w_out_EFD[e]

        def block(carry: Any, start: Array, end: Array, rows: int, last: bool) -> Any:
            dx_RD, dw_in_EDGF, dw_out_EFD, db_in_EGF = carry
            dy_bD = _rows(dy_RD, start, rows)
            if last:
                dy_bD = jnp.where((start + jnp.arange(rows) < end)[:, None], dy_bD, 0)
            a_bF, pull = jax.vjp(partial(activated, start), *(_rows(h_RF, start, rows, g, inputs) for g in range(inputs)))
            dh_bF = jnp.concatenate(pull(dy_bD @ w_out_FD.T), axis=1)
            # Transposed for real: XLA:CPU is slower at a matmul that sums over the first axis of both. For the other one
            # the transpose would cost what it saves.
            x_Db = jax.lax.optimization_barrier(_rows(x_RD, start, rows).T)
            dw_in_EDGF = add(dw_in_EDGF, matmul(x_Db, dh_bF), last)
            dw_out_EFD = add(dw_out_EFD, matmul(a_bF.T, dy_bD), last)
            if db_in_EGF is not None:
                db_in_EGF = add(db_in_EGF, jnp.sum(dh_bF, axis=0, dtype=jnp.float32), last)
            return _write(dx_RD, dh_bF @ w_in_DF.T, start), dw_in_EDGF, dw_out_EFD, db_in_EGF

        def add(sums: Array, new_DF: Array, first: bool) -> Array:
            # The last block comes first, so it has nothing to add to.
            new = new_DF.reshape(sums.shape[1:])
            return jax.lax.dynamic_update_index_in_dim(sums, new if first else sums[e] + new, e, 0)

        return _over_blocks(block, sizes_E[e], end_E[e], block_rows, x_RD.shape[0], carry)

    def zeros(a: Array, dtype: Any) -> Array:
        return sharding.varying_like(jnp.zeros(a.shape, dtype), x_RD)

    dx_RD, *d_weights = jax.lax.fori_loop(0, sizes_E.shape[0], expert, (
        zeros(x_RD, x_RD.dtype), zeros(w_in_EDGF, jnp.float32), zeros(w_out_EFD, jnp.float32),
        None if b_in_EGF is None else zeros(b_in_EGF, jnp.float32)))
    dw_in_EDGF, dw_out_EFD, db_in_EGF = (
        None if d is None else d.astype(w.dtype) for d, w in zip(d_weights, (w_in_EDGF, w_out_EFD, b_in_EGF)))
    return dx_RD, None, dw_in_EDGF, dw_out_EFD, db_in_EGF, None


feed_forward.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(x_RD: Array, sizes_E: Array, w_EDF: Array, block_rows: int) -> Array:
    """One matrix an expert, on rows as for `feed_forward`: y_RF."""
    return _linear_forward(x_RD, sizes_E, w_EDF, block_rows)[0]


def _linear_forward(x_RD, sizes_E, w_EDF, block_rows):
    end_E = jnp.cumsum(sizes_E)

    def expert(e: Array, y_RF: Array) -> Array:
        def block(y_RF: Array, start: Array, end: Array, rows: int, last: bool) -> Array:
            return _write(y_RF, _rows(x_RD, start, rows) @ w_EDF[e], start)
        return _over_blocks(block, sizes_E[e], end_E[e], block_rows, x_RD.shape[0], y_RF)

    y_RF = sharding.varying_like(jnp.zeros((x_RD.shape[0], w_EDF.shape[2]), x_RD.dtype), x_RD)
    return jax.lax.fori_loop(0, sizes_E.shape[0], expert, y_RF), (x_RD, sizes_E, w_EDF)


def _linear_backward(block_rows, saved, dy_RF):
    x_RD, sizes_E, w_EDF = saved
    end_E = jnp.cumsum(sizes_E)

    def expert(e: Array, carry: Any) -> Any:
        def block(carry: Any, start: Array, end: Array, rows: int, last: bool) -> Any:
            dx_RD, dw_EDF = carry
            dy_bF = _rows(dy_RF, start, rows)
            if last:
                dy_bF = jnp.where((start + jnp.arange(rows) < end)[:, None], dy_bF, 0)
            dw_DF = jnp.matmul(_rows(x_RD, start, rows).T, dy_bF, preferred_element_type=jnp.float32)
            dw_EDF = jax.lax.dynamic_update_index_in_dim(dw_EDF, dw_DF if last else dw_EDF[e] + dw_DF, e, 0)
            return _write(dx_RD, dy_bF @ w_EDF[e].T, start), dw_EDF
        return _over_blocks(block, sizes_E[e], end_E[e], block_rows, x_RD.shape[0], carry)

    dx_RD, dw_EDF = jax.lax.fori_loop(0, sizes_E.shape[0], expert, tuple(
        sharding.varying_like(jnp.zeros(a.shape, dtype), x_RD) for a, dtype in ((x_RD, x_RD.dtype), (w_EDF, jnp.float32))))
    return dx_RD, None, dw_EDF.astype(w_EDF.dtype)


linear.defvjp(_linear_forward, _linear_backward)


def _over_blocks(block: Callable[..., Any], size: Array, end: Array, block_rows: int, available: int,
                 carry: Any) -> Any:
    """Runs `block(carry, start, end, rows, last)` over the `size` rows before `end`: the last block, then the whole ones.

    Sizes above the `available` rows of the array are never needed.
    """
    start, step, whole = end - size, step_rows(block_rows), size // block_rows
    tail, rest = start + whole * block_rows, size - whole * block_rows
    # Loops of no or one turn, as a conditional would copy the arrays that it writes. The start depends on i, or the
    # compiler would take the block out of the loop and compute every size each time.
    for below, rows in itertools.pairwise([*range(0, block_rows, step), block_rows]):
        if rows <= available:
            here = jnp.where((rest > below) & (rest <= rows), 1, 0)
            carry = jax.lax.fori_loop(0, here, lambda i, carry, rows=rows: block(
                carry, tail + i * block_rows, end, rows, True), carry)
    if block_rows > available:
        return carry
    return jax.lax.fori_loop(0, whole, lambda i, carry: block(
        carry, start + i * block_rows, end, block_rows, False), carry)


def _activate(activation: Activation, key: Array | None, dropout_rate: float, start: Array, *inputs_bF: Array) -> Array:
    """The non-linearity, and dropout by a key of the block's own."""
    if key is not None:
        key = jax.random.fold_in(key, start)
    return dropout(activate_parts(inputs_bF, activation), dropout_rate, key)


def _rows(a_RD: Array, start: Array, rows: int, part: int = 0, parts: int = 1) -> Array:
    """Rows, and of their columns one of so many equal parts.

    In one slice, for XLA:CPU uses no vector instructions for activations of columns sliced from sliced rows: an activation
    of 128 rows and its gradients then took twice as long.
    """
    width = a_RD.shape[1] // parts
    return jax.lax.dynamic_slice(a_RD, (start, part * width), (rows, width))


def _write(a_RD: Array, block_bD: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(a_RD, block_bD, start, 0)
