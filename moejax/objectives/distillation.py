"""Learning from a teacher's scores beside the targets. Hinton, Vinyals and Dean 2015, arXiv 1503.02531."""

from typing import Callable

import jax
import jax.numpy as jnp
from jax import Array


def distillation(objective: Callable[..., tuple[Array, dict[str, Array]]], weight: float, temperature: float
                 ) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """An objective of which a share is the divergence from a teacher.

    With teacher scores t and own scores z it is (1 - weight) * objective + weight * T^2 * KL(softmax(t/T) || softmax(z/T));
    T^2 keeps the gradient's size independent of T.

    Args:
      objective: (logits_BLV, targets_BL, mask_BL) -> (sum to minimise, sums to report).
      weight: share of the teacher.
      temperature: T.

    Returns:
      The same with one more argument, teacher_BLV; reports also `aux/teacher`, the divergence at T in nats.
    """
    def both(logits_BLV: Array, targets_BL: Array, mask_BL: Array, teacher_BLV: Array) -> tuple[Array, dict[str, Array]]:
        total, sums = objective(logits_BLV, targets_BL, mask_BL)
        wanted_BLV = jax.nn.log_softmax(teacher_BLV.astype(jnp.float32) / temperature)
        found_BLV = jax.nn.log_softmax(logits_BLV / temperature)
        apart_BL = jnp.sum(jnp.exp(wanted_BLV) * (wanted_BLV - found_BLV), axis=-1)
        apart = jnp.sum(jnp.where(mask_BL, apart_BL, 0.0))
        return (1 - weight) * total + weight * temperature**2 * apart, sums | {"aux/teacher": apart}
    return both
