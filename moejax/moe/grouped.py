"""Grouped matmul on CPU and GPU: rows sorted by expert, each times its expert's matrix, with gradients by the same kernels.

XLA's own lowering of `jax.lax.ragged_dot` multiplies every row with every expert there: with jax 0.11.2 on an H200, 64
experts took fifty times as long, and the weights' gradient wanted 138 GB. On a CPU GPUs' run interpreted, for tests.
"""

from functools import partial
from types import ModuleType
from typing import Any, Sequence

import jax
from jax import Array

from moejax.config import check
from moejax.moe import grouped_native

GPU_KERNELS = ("triton", "hopper")
"""`moejax.moe.grouped_triton` and `moejax.moe.grouped_hopper`. Like `moejax.moe.grouped_native`, for CPUs, each has
`rows_times`, `weights_of` and `check_fit`."""
HOPPER_ROWS = 128
"""Rows for each expert, on average, from which Hopper's kernels are chosen: with fewer their tiles are mostly empty."""


def _module(kernels: str) -> ModuleType:
    """Imported when it is wanted: Pallas takes a while, and its parts come and go with versions of jax."""
    if kernels == "native":
        return grouped_native
    if kernels == "hopper":
        from moejax.moe import grouped_hopper
        return grouped_hopper
    from moejax.moe import grouped_triton
    return grouped_triton


def choose(weights: Sequence[jax.ShapeDtypeStruct], rows: int) -> str:
    """The faster kernels that take such [E, D, F] matrices, for so many rows, on the GPU that there is.

    In the layer of benchmarks/README.md `hopper` takes 0.93 of the time of `triton`.
    """
    if jax.__version_info__ < (0, 11) or rows < HOPPER_ROWS * weights[0].shape[0]:
        return "triton"
    return "triton" if any(_module("hopper").misfit(w_EDF) for w_EDF in weights) else "hopper"


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def matmul(x_RD: Array, w_EDF: Array, sizes_E: Array, kernels: str) -> Array:
    """Rows times their expert's matrix, accumulated in float32; of float32 the GPU rounds factors to TF32, as XLA does,
    unless `jax.default_matmul_precision` says otherwise.

    Args:
      x_RD: rows; the first sizes_E[0] belong to expert 0, and so on. What lies behind never counts.
      w_EDF: of the same type; bfloat16, float16 or float32, `native` only the last.
      sizes_E: int32, of sum R at most.
      kernels: `native`, or a name in `GPU_KERNELS`.

    Returns:
      y_RF, of the same type. Beyond the groups lies anything, not a number included; so it does in the gradient of x.
    """
    return _forward(x_RD, w_EDF, sizes_E, kernels)[0]


def _forward(x_RD: Array, w_EDF: Array, sizes_E: Array, kernels: str) -> tuple[Array, Any]:
    check(x_RD.dtype == w_EDF.dtype, f"rows of {x_RD.dtype} cannot be multiplied with matrices of {w_EDF.dtype}")
    _module(kernels).check_fit(w_EDF, x_RD.shape[0])
    return _module(kernels).rows_times(x_RD, w_EDF, sizes_E, transposed=False), (x_RD, w_EDF, sizes_E)


def _backward(kernels: str, saved: Any, dy_RF: Array) -> tuple[Array, Array, None]:
    x_RD, w_EDF, sizes_E = saved
    return (_module(kernels).rows_times(dy_RF, w_EDF, sizes_E, transposed=True),
            _module(kernels).weights_of(x_RD, dy_RF, sizes_E), None)


matmul.defvjp(_forward, _backward)
