"""The grouped matmul in C++ for CPUs: `grouped_native.cc` beside this file, compiled on the machine that runs it.

XLA:CPU has no grouped matmul. In plain JAX an expert's rows are matmuls in a loop (`moejax.moe.blocked`), with a copy of
its matrices before each and sums of gradients that are cleared before they are written; benchmarks/README.md compares them.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moejax import native, sharding
from moejax.config import check

SOURCE = pathlib.Path(__file__).with_suffix(".cc")
FUNCTIONS = ("moejax_rows_times", "moejax_weights_of")


def misfit(w_EDF: Any) -> str:
    """Why such matrices cannot be multiplied here; nothing if they can. Compiles if this machine has not yet."""
    if w_EDF.dtype != jnp.float32:
        return f"multiplies float32, not {w_EDF.dtype}"
    if jax.default_backend() != "cpu":
        return f"needs a CPU, not {jax.default_backend()}"
    return native.unavailable(SOURCE, FUNCTIONS)


def check_fit(w_EDF: Array, rows: int) -> None:
    """Any shape fits.

    Raises:
      UserError: another type, another backend, or no compiler.
    """
    del rows
    reason = misfit(w_EDF)
    check(not reason, f"config.moe.compute=native cannot be used: {reason}; use auto")


def rows_times(x_RD: Array, w_EDF: Array, sizes_E: Array, transposed: bool) -> Array:
    """Rows times their expert's matrix, or its transpose.

    Args:
      x_RD: float32, grouped by expert.
      w_EDF: [E, D, F]; transposed, [E, F, D].
      sizes_E: int32.
      transposed: as said.

    Returns:
      [R, F]; beyond the groups 0.
    """
    shape = x_RD.shape[0], w_EDF.shape[1 if transposed else 2]
    return _call(FUNCTIONS[0], shape, x_RD, w_EDF, sizes_E, transposed=transposed)


def weights_of(x_RD: Array, dy_RF: Array, sizes_E: Array) -> Array:
    """Each expert's x^T dy, [E, D, F], of rows grouped by expert."""
    return _call(FUNCTIONS[1], (sizes_E.shape[0], x_RD.shape[1], dy_RF.shape[1]), x_RD, dy_RF, sizes_E)


def _call(name: str, shape: tuple[int, ...], *arrays: Array, **attributes: Any) -> Array:
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")
    return sharding.varying_like(call(*arrays, **attributes), arrays[0])
