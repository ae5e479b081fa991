"""Grouped matmul on GPU: rows sorted by expert, each times its expert's matrix, with the kernels that the GPU is fast with.

XLA's own lowering of `jax.lax.ragged_dot` multiplies every row with every expert there: with jax 0.11.2 on an H200, 64
experts took fifty times as long, and the weights' gradient wanted 138 GB. On a CPU the kernels run interpreted, for tests.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe import grouped_hopper, grouped_triton


@jax.custom_vjp
def matmul(x_RD: Array, w_EDF: Array, sizes_E: Array) -> Array:
    """Rows times their expert's matrix, accumulated in float32.

    Args:
      x_RD: rows; the first sizes_E[0] belong to expert 0, and so on. What lies behind counts as zero.
      w_EDF: of the same type.
      sizes_E: int32, of sum R at most.

    Returns:
      y_RF, of the same type. Beyond the groups lies anything, not a number included; so it does in the gradient of x.
    """
    return _forward(x_RD, w_EDF, sizes_E)[0]


def _forward(x_RD: Array, w_EDF: Array, sizes_E: Array) -> tuple[Array, Any]:
    x_RD = _in_groups(x_RD, sizes_E)
    return _kernels(w_EDF, x_RD).rows_times(x_RD, w_EDF, sizes_E, transposed=False), (x_RD, w_EDF, sizes_E)


def _backward(saved: Any, dy_RF: Array) -> tuple[Array, Array, None]:
    x_RD, w_EDF, sizes_E = saved
    dy_RF, kernels = _in_groups(dy_RF, sizes_E), _kernels(w_EDF, x_RD)
    return kernels.rows_times(dy_RF, w_EDF, sizes_E, transposed=True), kernels.weights_of(x_RD, dy_RF, sizes_E), None


matmul.defvjp(_forward, _backward)


def _in_groups(x_RD: Array, sizes_E: Array) -> Array:
    """Zeros behind the groups: in the weights' gradient zero times what is no number would be no number."""
    return jnp.where(jnp.arange(x_RD.shape[0])[:, None] < jnp.sum(sizes_E), x_RD, 0)


def _kernels(w_EDF: Array, x_RD: Array) -> Any:
    return grouped_hopper if grouped_hopper.fits(w_EDF, x_RD.shape[0]) else grouped_triton
