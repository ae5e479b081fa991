"""Does a model look ahead? What a token's loss changes by when only tokens after it change."""

from functools import partial
from typing import Any, Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.models.transformer import Transformer


def leak(model: Transformer, variables: Mapping[str, Any], batch: Mapping[str, Any], train: bool = True) -> Array:
    """The change of each early token's loss when the second half of every row is replaced by that of the next row.

    Documents and padding stay where they are, and noise is the same. A causal model answers with zeros, up to the rounding
    of sums in another order.

    Args:
      model: a decoder.
      variables: {"params": parameters, "router": router state}.
      batch: arrays [B, L] as `moejax.data.packing` makes them, B > 1.
      train: under the rules of training or of evaluation.

    Returns:
      float32 [B, L // 2]: loss with another future less the loss with the true one, in nats; 0 at padding.
    """
    cut = batch["tokens"].shape[1] // 2
    tokens = batch["tokens"]
    other = jnp.concatenate([tokens[:, :cut], jnp.roll(tokens, 1, axis=0)[:, cut:]], axis=1)
    losses = [_losses(model, train, variables, batch | {"tokens": t})[:, :cut] for t in (other, tokens)]
    return jnp.where(batch["mask"][:, :cut], losses[0] - losses[1], 0.0)


@partial(jax.jit, static_argnums=(0, 1))
def _losses(model: Transformer, train: bool, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> Array:
    """Negative log-likelihood of each target, [B, L]."""
    logits = model.apply({"params": variables["params"]}, batch["tokens"], batch["positions"], batch["segments"],
                         variables["router"], train=train, rngs={"dropout": jax.random.key(0)}).logits_BLV
    chosen = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
