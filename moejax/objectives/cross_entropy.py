"""Cross-entropy of tokens: the loss of every objective that predicts tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class OfTargets(NamedTuple):
    """What scores say of the targets: the log-normaliser, the target's score, and whether no other token outscores it."""

    log_z_BL: Array
    target_BL: Array
    right_BL: Array


def of_targets(logits_BLV: Array, targets_BL: Array) -> OfTargets:
    """Reads float32 scores. A score that is no number is not right."""
    # A masked sum rather than a gather: its gradient is elementwise and fuses, where a gather's would scatter.
    is_target_BLV = jnp.arange(logits_BLV.shape[-1]) == targets_BL[..., None]
    target_BL = jnp.sum(jnp.where(is_target_BLV, logits_BLV, 0.0), axis=-1)
    return OfTargets(jax.nn.logsumexp(logits_BLV, axis=-1), target_BL, target_BL >= jnp.max(logits_BLV, axis=-1))


def cross_entropy(logits_BLV: Array, targets_BL: Array, mask_BL: Array, *, label_smoothing: float = 0.0,
               head_z_weight: float = 0.0) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of the targets, summed over the tokens that count.

    Args:
      logits_BLV: float32 scores.
      targets_BL: int32 ids.
      mask_BL: bool, which targets are real.
      label_smoothing: share of the target's probability that is spread evenly over the vocabulary.
      head_z_weight: weight of log(sum exp(logits))^2, which keeps the normaliser near 1 (PaLM, arXiv 2204.02311).

    Returns:
      The sum to minimise, and sums to report: `loss` (negative log-likelihood alone, nats), `aux/head_z`, `accuracy`
      (targets that no other token outscores).
    """
    log_z_BL, target_BL, right_BL = of_targets(logits_BLV, targets_BL)

    def total(per_token_BL: Array) -> Array:
        return jnp.sum(jnp.where(mask_BL, per_token_BL, 0.0))

    loss = total(log_z_BL - target_BL)
    head_z = total(log_z_BL**2)
    objective = loss
    if label_smoothing > 0:
        spread = total(log_z_BL - jnp.mean(logits_BLV, axis=-1))
        objective = (1 - label_smoothing) * loss + label_smoothing * spread
    if head_z_weight > 0:
        objective += head_z_weight * head_z
    accuracy = total(right_BL.astype(jnp.float32))
    return objective, {"loss": loss, "aux/head_z": head_z, "accuracy": accuracy}
