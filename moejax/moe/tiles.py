"""Which expert a tile of the grouped kernels works for."""

import jax.numpy as jnp
from jax import Array


def owners(count_E: Array, tiles: int) -> tuple[Array, Array]:
    """Gives tiles to experts, in their order; those left over count on behind the last expert's.

    Args:
      count_E: tiles of each expert, int32.
      tiles: M, at least their sum.

    Returns:
      int32: the expert of each tile [M], and its number among the expert's [M].
    """
    after_E = jnp.cumsum(count_E)
    index_M = jnp.arange(tiles)
    owner_M = jnp.searchsorted(after_E, index_M, side="right", method="compare_all")
    expert_M = jnp.minimum(owner_M, len(count_E) - 1)
    return expert_M, index_M - (after_E - count_E)[expert_M]
