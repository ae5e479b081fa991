"""The grouped matmul as Triton kernels through Pallas, for any shape, in tiles that no two experts share.

A tile is up to `rows` rows of one expert, so a group may begin anywhere, have any size and be empty.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moejax.gpus import cuda_capability
from moejax.moe.tiles import owners


class Tile(NamedTuple):
    """How a kernel parts its work.

    Attributes:
      rows: rows of the result that one program computes.
      columns: columns of it.
      depth: how much of the contracted dimension is loaded at once.
      warps: of 32 threads, for one program.
      stages: loads in flight.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


HOPPER = Tile(128, 256, 64, 8, 3)
OTHERS = Tile(128, 128, 32, 8, 3)
"""For processors with 200 KiB of shared memory, and for those with at least 48."""


def check_fit(w_EDF: Array, rows: int) -> None:
    """Any shape fits."""
    del w_EDF, rows


@partial(jax.jit, static_argnames=("transposed", "tile"))
def rows_times(x_RD: Array, w_EDF: Array, sizes_E: Array, transposed: bool, tile: Tile | None = None) -> Array:
    """Rows times their expert's matrix, or its transpose.

    Args:
      x_RD: grouped by expert.
      w_EDF: [E, D, F]; transposed, [E, F, D].
      sizes_E: int32.
      transposed: as said.
      tile: how the work is parted; None chooses.

    Returns:
      [R, F]; beyond the groups lies anything.
    """
    rows, depth = x_RD.shape
    experts, columns = w_EDF.shape[0], w_EDF.shape[1 if transposed else 2]
    tile = _fit(tile, x_RD.dtype, rows, columns, depth)
    # Each expert ends with at most one tile that is not full, so this many are enough. Those left over begin at their end.
    tiles = rows // tile.rows + experts
    expert_M, number_M = owners(-(-sizes_E // tile.rows), tiles)
    end_E = jnp.cumsum(sizes_E)
    start_M = (end_E - sizes_E)[expert_M] + number_M * tile.rows
    across = pl.cdiv(columns, tile.columns)

    def kernel(expert_M, start_M, end_M, x_RD, w_EDF, y_RF):
        # Neighbouring programs share rows, which are then read from memory once.
        m, column = pl.program_id(0) // across, pl.program_id(0) % across * tile.columns
        expert, start, end = expert_M[m], start_M[m], end_M[m]
        row_r1 = (start + jnp.arange(tile.rows) < end)[:, None]
        at_c, column_1c = pl.ds(column, tile.columns), _within(column, tile.columns, columns)

        def step(k, y_rc):
            at_d = pl.ds(k * tile.depth, tile.depth)
            depth_1d = _within(k * tile.depth, tile.depth, depth)
            x_rd = triton.load(x_RD.at[pl.ds(start, tile.rows), at_d], mask=row_r1 & depth_1d, other=0)
            if transposed:
                w_cd = triton.load(w_EDF.at[expert, at_c, at_d], mask=column_1c.T & depth_1d, other=0)
                return y_rc + _dot(x_rd, w_cd.T)
            w_dc = triton.load(w_EDF.at[expert, at_d, at_c], mask=depth_1d.T & column_1c, other=0)
            return y_rc + _dot(x_rd, w_dc)

        steps = (start < end).astype(jnp.int32) * pl.cdiv(depth, tile.depth)
        y_rc = jax.lax.fori_loop(0, steps, step, jnp.zeros((tile.rows, tile.columns), jnp.float32))
        triton.store(y_RF.at[pl.ds(start, tile.rows), at_c], y_rc.astype(y_RF.dtype), mask=row_r1 & column_1c)

    return _call(kernel, tiles * across, (rows, columns), tile)(expert_M, start_M, end_E[expert_M], x_RD, w_EDF)


@partial(jax.jit, static_argnames="tile")
def weights_of(x_RD: Array, dy_RF: Array, sizes_E: Array, tile: Tile | None = None) -> Array:
    """Each expert's x^T dy, [E, D, F], of rows grouped by expert."""
    (rows, width), columns = x_RD.shape, dy_RF.shape[1]
    tile = _fit(tile, x_RD.dtype, width, columns, rows)
    down, across = pl.cdiv(width, tile.rows), pl.cdiv(columns, tile.columns)
    end_E = jnp.cumsum(sizes_E)

    def kernel(start_E, end_E, x_RD, dy_RF, w_EDF):
        expert, part = pl.program_id(0) // (down * across), pl.program_id(0) % (down * across)
        row, column = part // across * tile.rows, part % across * tile.columns
        start, end = start_E[expert], end_E[expert]
        row_1r, column_1c = _within(row, tile.rows, width), _within(column, tile.columns, columns)

        def step(k, w_rc):
            first = start + k * tile.depth
            depth_d1 = (first + jnp.arange(tile.depth) < end)[:, None]
            x_dr = triton.load(x_RD.at[pl.ds(first, tile.depth), pl.ds(row, tile.rows)], mask=depth_d1 & row_1r, other=0)
            dy_dc = triton.load(dy_RF.at[pl.ds(first, tile.depth), pl.ds(column, tile.columns)],
                                mask=depth_d1 & column_1c, other=0)
            return w_rc + _dot(x_dr.T, dy_dc)

        w_rc = jax.lax.fori_loop(0, pl.cdiv(end - start, tile.depth), step,
                                 jnp.zeros((tile.rows, tile.columns), jnp.float32))
        triton.store(w_EDF.at[expert, pl.ds(row, tile.rows), pl.ds(column, tile.columns)], w_rc.astype(w_EDF.dtype),
                     mask=row_1r.T & column_1c)

    shape = (sizes_E.shape[0], width, columns)
    return _call(kernel, shape[0] * down * across, shape, tile)(end_E - sizes_E, end_E, x_RD, dy_RF)


def _fit(tile: Tile | None, dtype: Any, rows: int, columns: int, depth: int) -> Tile:
    """No larger than what there is and what shared memory holds, and no smaller than what a matrix unit takes."""
    if tile is None:
        tile = HOPPER if cuda_capability() == (9, 0) else OTHERS
        tile = tile._replace(depth=tile.depth * 2 // jnp.dtype(dtype).itemsize)

    def fit(size: int, length: int) -> int:
        return max(16, min(size, pl.next_power_of_2(length)))
    return tile._replace(rows=fit(tile.rows, rows), columns=fit(tile.columns, columns), depth=fit(tile.depth, depth))


def _within(begin: Any, size: int, length: int) -> Array:
    """Which of `size` places from `begin` on are less than `length`, bool [1, size]."""
    if length % size == 0:
        return jnp.ones((1, size), bool)
    return (begin + jnp.arange(size) < length)[None]


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _call(kernel: Any, programs: int, shape: tuple[int, ...], tile: Tile) -> Any:
    """Runs a kernel over whole arrays, the last of which it writes, of the type of the one before."""
    def call(*arrays: Array) -> Array:
        last = jax.typeof(arrays[-1])
        return pl.pallas_call(
            kernel, grid=(programs,), out_shape=jax.ShapeDtypeStruct(shape, last.dtype, manual_axis_type=last.mat),
            compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
            interpret=jax.default_backend() == "cpu", name=kernel.__qualname__.split(".")[0],
        )(*arrays)
    return call
