"""The grouped matmul for Hopper GPUs as Mosaic kernels through Pallas: one warp group loads, two multiply.

The tensor memory accelerator moves whole tiles, so the tile that an expert's rows do not fill goes to an array of its own,
from which those rows are copied to their place.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

from moejax import sharding
from moejax.config import check
from moejax.gpus import cuda_capability
from moejax.moe.tiles import owners


class Tile(NamedTuple):
    """How a kernel parts its work.

    Attributes:
      rows, columns: of the result, for the two multiplying warp groups together, which share the rows.
      depth: how much of the contracted dimension is loaded at once.
      stages: loads in flight.
      across: tiles in a row before the next row of tiles.
    """

    rows: int = 128
    columns: int = 256
    depth: int = 64
    stages: int = 3
    across: int = 4


STORED = 64
"""Rows and columns that a warp group stores at once."""
ALIGNED = 8
"""Rows at which loads may begin."""
WHOLE, NOTHING = -1, -2


def misfit(w_EDF: Any) -> str:
    """Why these kernels do not take such matrices here; empty if they do."""
    tile, (_, width, columns) = Tile(), w_EDF.shape
    if cuda_capability() != (9, 0) or jax.__version_info__ < (0, 11):
        return "needs a Hopper GPU (H100, H200) and jax 0.11 or newer"
    if w_EDF.dtype not in ("bfloat16", "float16"):
        return "needs config.train.dtype=bfloat16"
    if width % tile.columns or columns % tile.columns:
        return f"takes matrices whose dimensions are multiples of {tile.columns}, not {width} by {columns}"
    return ""


def check_fit(w_EDF: Array, rows: int) -> None:
    """Raises `UserError` unless these kernels take that many rows and these matrices, here."""
    reason, tile = misfit(w_EDF), Tile()
    check(not reason, f"config.moe.compute=hopper {reason}; use auto")
    check(rows % tile.rows == 0 < rows, f"config.moe.compute=hopper takes multiples of {tile.rows} rows, not {rows}")


@functools.partial(jax.jit, static_argnames=("transposed", "tile"))  # else every layer's kernel is built anew, in seconds
def rows_times(x_RD: Array, w_EDF: Array, sizes_E: Array, transposed: bool, tile: Tile = Tile()) -> Array:  # noqa: B008
    """Rows times their expert's matrix, or its transpose. The dimensions must be multiples of the tile's.

    Args:
      x_RD: grouped by expert; R is at least a tile's rows, and a multiple of `ALIGNED`.
      w_EDF: [E, D, F]; transposed, [E, F, D].
      sizes_E: int32.
      transposed: as said.
      tile: how the work is parted.

    Returns:
      [R, F]; beyond the groups lies anything.
    """
    rows, depth = x_RD.shape
    experts, columns = w_EDF.shape[0], w_EDF.shape[1 if transposed else 2]
    across, steps = columns // tile.columns, depth // tile.depth
    tiles = _tiles(sizes_E, rows, tile.rows)
    count = len(tiles.expert_M)
    blocks = ((tile.rows, tile.depth), (tile.columns, tile.depth) if transposed else (tile.depth, tile.columns))
    at_step = (lambda k: (0, k)), (lambda k: (0, k) if transposed else (k, 0))

    def kernel(expert_M, start_M, part_M, x_RD, w_EDF, y_RF, part_PRF, loads, stored, _):
        group = jax.lax.axis_index("group")

        @mosaic.nd_loop((count * across,), collective_axes="processor")
        def _(loop):
            m, n = mosaic.planar_snake(loop.index[0], (count, across), 1, min(tile.across, across))
            expert, start, part = expert_M[m], pl.multiple_of(start_M[m], ALIGNED), part_M[m]

            def multiply(_, x_smem, w_smem, y_acc):
                x_own = x_smem.at[pl.ds(group * (tile.rows // 2), tile.rows // 2)]
                mosaic.wgmma(y_acc, x_own, w_smem.transpose((1, 0)) if transposed else w_smem)
                mosaic.wgmma_wait(0)
                return y_acc

            def copy(slot, row, column):
                at = pl.ds(n * tile.columns + column, STORED)

                @pl.when(part == WHOLE)
                def _():
                    mosaic.copy_smem_to_gmem(slot, y_RF.at[pl.ds(start + row, STORED), at])

                @pl.when(part >= 0)
                def _():
                    mosaic.copy_smem_to_gmem(slot, part_PRF.at[part, pl.ds(row, STORED), at])

            @pl.when(part != NOTHING)
            def _():
                at, own = pl.ds(n * tile.columns, tile.columns), w_EDF.at[expert]
                load = _loading(tile, blocks, at_step, steps, multiply, functools.partial(_store, tile, stored, copy))
                load(x_RD.at[pl.ds(start, tile.rows)], own.at[at] if transposed else own.at[:, at], allocations=loads)

    y_RF, part_PRF = _call(kernel, tile, blocks, at_step, ((rows, columns), (2 * experts, tile.rows, columns)))(
        tiles.expert_M, tiles.start_M, tiles.part_M, x_RD, w_EDF)
    return y_RF.at[tiles.row_PR.reshape(-1)].set(part_PRF.reshape(-1, columns), mode="drop")


@functools.partial(jax.jit, static_argnames="tile")
def weights_of(x_RD: Array, dy_RF: Array, sizes_E: Array, tile: Tile = Tile()) -> Array:  # noqa: B008
    """Each expert's x^T dy, [E, D, F]. The dimensions must be multiples of the tile's, where `rows` parts D.

    Args:
      x_RD, dy_RF: grouped by expert. What lies behind the groups never counts.
      sizes_E: int32.
      tile: how the work is parted.
    """
    (rows, width), columns = x_RD.shape, dy_RF.shape[1]
    experts, down, across = sizes_E.shape[0], width // tile.rows, columns // tile.columns
    end_E = jnp.cumsum(sizes_E)
    start_E = end_E - sizes_E
    first_E = jnp.minimum(start_E // tile.depth, rows // tile.depth - 1)
    # An empty expert takes a step, too, in which nothing is its own: so its zeros are written.
    steps_E = jnp.maximum(-(-end_E // tile.depth) - first_E, 1)
    blocks = ((tile.depth, tile.rows), (tile.depth, tile.columns))

    def kernel(start_E, end_E, first_E, steps_E, x_RD, dy_RF, w_EDF, loads, stored, met):
        group = jax.lax.axis_index("group")

        @mosaic.nd_loop((experts, down * across), collective_axes="processor")
        def _(loop):
            expert = loop.index[0]
            m, n = mosaic.planar_snake(loop.index[1], (down, across), 1, min(tile.across, across))
            start, end, first, steps = start_E[expert], end_E[expert], first_E[expert], steps_E[expert]

            def multiply(k, x_smem, dy_smem, w_acc):
                x_own, dy_half = (smem.at[:, pl.ds(group * (size // 2), size // 2)] for smem, size in (
                    (x_smem, tile.rows), (dy_smem, tile.columns)))

                # Where rows of other experts may lie, or what is no number: zero times that is none either. Each group
                # clears its own half of dy, which both multiply with.
                @pl.when((k[0] == 0) | (k[0] == steps - 1))
                def _():
                    for part in (x_own, dy_half):
                        row = (first + k[0]) * tile.depth + mosaic.layout_cast(
                            jax.lax.broadcasted_iota(jnp.int32, part.shape, 0), mosaic.Layout.WGMMA)
                        part[...] = jnp.where((row >= start) & (row < end), part[...], 0)
                    mosaic.commit_smem()
                    mosaic.barrier_arrive(met)
                    mosaic.barrier_wait(met)

                mosaic.wgmma(w_acc, x_own.transpose((1, 0)), dy_smem)
                mosaic.wgmma_wait(0)
                return w_acc

            def copy(slot, row, column):
                mosaic.copy_smem_to_gmem(slot, w_EDF.at[
                    expert, pl.ds(m * tile.rows + row, STORED), pl.ds(n * tile.columns + column, STORED)])

            load = _loading(tile, blocks, (lambda k: (first + k, 0),) * 2, steps, multiply,
                            functools.partial(_store, tile, stored, copy))
            load(x_RD.at[:, pl.ds(m * tile.rows, tile.rows)], dy_RF.at[:, pl.ds(n * tile.columns, tile.columns)],
                 allocations=loads)

    return _call(kernel, tile, blocks, (lambda k: (k, 0),) * 2, ((experts, width, columns),))(
        start_E, end_E, first_E, steps_E, x_RD, dy_RF)[0]


class Tiles(NamedTuple):
    """Which rows each tile takes.

    Attributes:
      expert_M: whose rows they are.
      start_M: the first of them, a multiple of `ALIGNED`.
      part_M: `WHOLE` if all are the expert's, else the place of its result among the parts, or `NOTHING`.
      row_PR: to which row of the result each row of a part belongs; R for none.
    """

    expert_M: Array
    start_M: Array
    part_M: Array
    row_PR: Array


def _tiles(sizes_E: Array, rows: int, tile_rows: int) -> Tiles:
    """Tiles from each expert's first row, or up to seven rows before it, on; the first and the last may be parts."""
    experts = sizes_E.shape[0]
    end_E = jnp.cumsum(sizes_E)
    begin_E = end_E - sizes_E
    aligned_E = begin_E // ALIGNED * ALIGNED
    count_E = jnp.where(sizes_E > 0, -(-(end_E - aligned_E) // tile_rows), 0)
    expert_M, number_M = owners(count_E, rows // tile_rows + 2 * experts)
    first_M = aligned_E[expert_M] + number_M * tile_rows
    whole_M = (first_M >= begin_E[expert_M]) & (first_M + tile_rows <= end_E[expert_M])
    part_M = jnp.where(number_M >= count_E[expert_M], NOTHING, jnp.where(whole_M, WHOLE, 2 * expert_M + (number_M > 0)))
    start_M = jnp.minimum(first_M, rows - tile_rows)  # no tile reaches behind the last row

    row_MR = start_M[:, None] + jnp.arange(tile_rows)
    own_MR = (row_MR >= jnp.maximum(first_M, begin_E[expert_M])[:, None]) & (row_MR < end_E[expert_M][:, None])
    row_PR = jnp.full((2 * experts, tile_rows), rows).at[jnp.where(part_M < 0, 2 * experts, part_M)].set(
        jnp.where(own_MR, row_MR, rows), mode="drop")
    return Tiles(expert_M, start_M, part_M, row_PR)


def _loading(tile: Tile, blocks: Any, at_step: Any, steps: Any, multiply: Any, finish: Any) -> Any:
    """A pipeline that loads blocks of two matrices, step by step, while the multiplying groups work on earlier ones."""
    return mosaic.emit_pipeline_warp_specialized(
        multiply, grid=(steps,), memory_registers=40, wg_axis="group", num_compute_wgs=2, max_concurrent_steps=tile.stages,
        compute_context=finish, in_specs=[
            mosaic.BlockSpec(block, at, transforms=_transforms(block[1]))
            for block, at in zip(blocks, at_step, strict=True)])


def _store(tile: Tile, stored: Any, copy: Any, run: Any) -> None:
    """Runs the pipeline with an accumulator of this warp group and copies the result, part by part, through `stored`."""
    group, rows = jax.lax.axis_index("group"), tile.rows // 2

    def with_accumulator(accumulator: Any) -> None:
        run(accumulator)
        result = accumulator[...].astype(stored.dtype)
        for number, (row, column) in enumerate((r, c) for r in range(0, rows, STORED)
                                               for c in range(0, tile.columns, STORED)):
            slot = stored.at[group, number % 2]
            mosaic.wait_smem_to_gmem(1, wait_read_only=True)  # the other slot may still be on its way
            slot[...] = result[row:row + STORED, column:column + STORED]
            mosaic.commit_smem()
            copy(slot, group * rows + row, column)

    pl.run_scoped(with_accumulator, mosaic.ACC((rows, tile.columns), jnp.float32))


def _transforms(columns: int) -> tuple[Any, Any]:
    """How matrices of 16-bit numbers lie in shared memory so that tensor cores read them without bank conflicts."""
    swizzle = mosaic.find_swizzle(columns * 16)
    return mosaic.TilingTransform((8, swizzle // 2)), mosaic.SwizzleTransform(swizzle)


def _call(kernel: Any, tile: Tile, blocks: Any, at_step: Any, shapes: tuple[tuple[int, ...], ...]) -> Any:
    """Runs a kernel on every processor of the GPU, with three warp groups; on a CPU, interpreted."""
    def call(*arrays: Array) -> list[Array]:
        dtype = arrays[-1].dtype
        unused = lambda *_, **__: None  # noqa: E731
        # Only asked for what it wants to be allocated; the kernel makes its own, of the same blocks.
        loading = _loading(tile, blocks, at_step, tile.stages, unused, unused)

        def body(*references: Any) -> None:
            first, second = references[len(arrays) - 2:len(arrays)]
            second = second.at[0] if len(second.shape) == 3 else second  # of matrices, that of one expert
            pl.run_scoped(
                lambda loads, stored, met: kernel(*references, loads, stored, met), collective_axes="group",
                loads=loading.get_allocations(first, second), met=mosaic.Barrier(num_arrivals=2),
                stored=mosaic.SMEM((2, 2, STORED, STORED), dtype, transforms=_transforms(STORED)))
            mosaic.wait_smem_to_gmem(0, wait_read_only=True)

        on_gpu = jax.default_backend() == "gpu"
        found = mosaic.kernel(
            body, grid=(jax.local_devices()[0].core_count if on_gpu else 3,), grid_names=("processor",), num_threads=3,
            thread_name="group", out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape in shapes],
            compiler_params=mosaic.CompilerParams(lowering_semantics=mosaic.LoweringSemantics.Warpgroup),
            interpret=None if on_gpu else mosaic.InterpretGPUParams(detect_races=True))(*arrays)
        return [sharding.varying_like(array, arrays[-1]) for array in found]
    return call
