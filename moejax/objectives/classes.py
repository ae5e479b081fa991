"""Losses of what is said of a whole row: one label, several, or a number."""

import jax
import jax.numpy as jnp
from jax import Array


def classification(logits_BC: Array, label_B: Array, mask_B: Array, weight_C: Array | None = None,
                   label_smoothing: float = 0.0) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of the labels, summed over the rows that count.

    Args:
      logits_BC: float32 scores.
      label_B: int32.
      mask_B: bool, rows that count.
      weight_C: factor on the loss of each label's rows.
      label_smoothing: share of the label's probability that is spread evenly over all.

    Returns:
      The sum to minimise, and sums to report: `loss` (nats, unweighted) and `accuracy`.
    """
    log_probs_BC = jax.nn.log_softmax(logits_BC)
    nll_B = -jnp.take_along_axis(log_probs_BC, label_B[:, None], axis=1)[:, 0]
    smooth_B = (1 - label_smoothing) * nll_B - label_smoothing * jnp.mean(log_probs_BC, axis=1)
    weight_B = mask_B if weight_C is None else jnp.where(mask_B, weight_C[label_B], 0.0)
    right_B = jnp.argmax(logits_BC, axis=1) == label_B
    return jnp.sum(smooth_B * weight_B), {"loss": jnp.sum(nll_B * mask_B),
                                          "accuracy": jnp.sum(right_B & mask_B, dtype=jnp.float32)}


def multi_label(logits_BC: Array, label_BC: Array, mask_B: Array) -> tuple[Array, dict[str, Array]]:
    """Binary cross-entropy of every label, averaged over the labels; label_BC holds 0 and 1. As `classification`.

    `accuracy` is the share of the labels on whose presence the sign of the score is right.
    """
    nll_BC = jax.nn.softplus(logits_BC) - logits_BC * label_BC
    loss = jnp.sum(jnp.mean(nll_BC, axis=1) * mask_B)
    right_BC = (logits_BC > 0) == (label_BC > 0.5)
    return loss, {"loss": loss, "accuracy": jnp.sum(jnp.mean(right_BC, axis=1, dtype=jnp.float32) * mask_B)}


def regression(logits_BC: Array, label_B: Array, mask_B: Array) -> tuple[Array, dict[str, Array]]:
    """Squared error of the only score. As `classification`, without accuracy."""
    loss = jnp.sum((logits_BC[:, 0] - label_B)**2 * mask_B)
    return loss, {"loss": loss}
