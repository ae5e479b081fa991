"""Grouped matmul on GPU: rows sorted by expert, each times its expert's matrix, with gradients by the same kernels.

XLA's own lowering of `jax.lax.ragged_dot` multiplies every row with every expert there: with jax 0.11.2 on an H200, 64
experts took fifty times as long, and the weights' gradient wanted 138 GB. On a CPU the kernels run interpreted, for tests.
"""

from functools import partial
from typing import Any

import jax
from jax import Array

from moejax.moe import grouped_hopper, grouped_triton

KERNELS = {"triton": grouped_triton, "hopper": grouped_hopper}
"""Modules with `rows_times`, `weights_of` and `check_fit`."""


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def matmul(x_RD: Array, w_EDF: Array, sizes_E: Array, kernels: str) -> Array:
    """Rows times their expert's matrix, accumulated in float32.

    Args:
      x_RD: rows; the first sizes_E[0] belong to expert 0, and so on. What lies behind never counts.
      w_EDF: of the same type.
      sizes_E: int32, of sum R at most.
      kernels: a name in `KERNELS`.

    Returns:
      y_RF, of the same type. Beyond the groups lies anything, not a number included; so it does in the gradient of x.
    """
    return _forward(x_RD, w_EDF, sizes_E, kernels)[0]


def _forward(x_RD: Array, w_EDF: Array, sizes_E: Array, kernels: str) -> tuple[Array, Any]:
    KERNELS[kernels].check_fit(w_EDF, x_RD.shape[0])
    return KERNELS[kernels].rows_times(x_RD, w_EDF, sizes_E, transposed=False), (x_RD, w_EDF, sizes_E)


def _backward(kernels: str, saved: Any, dy_RF: Array) -> tuple[Array, Array, None]:
    x_RD, w_EDF, sizes_E = saved
    return (KERNELS[kernels].rows_times(dy_RF, w_EDF, sizes_E, transposed=True),
            KERNELS[kernels].weights_of(x_RD, dy_RF, sizes_E), None)


matmul.defvjp(_forward, _backward)
