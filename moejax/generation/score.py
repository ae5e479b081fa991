"""The plain forward pass: the model's scores of the next token after every token."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jax import Array

from moejax import axes
from moejax.config import check
from moejax.generation import prompts
from moejax.models.transformer import Transformer


def logits(model: Transformer, params: Mapping[str, Any], tokens: Any, mask: Any = None) -> Array:
    """Scores the next token at every position. Can be differentiated by `params`.

    Args:
      model: the decoder.
      params: {"params": parameters, "router": router state}.
      tokens: concrete int [B, L], or a list of B lists of ids, which are then padded on the right.
      mask: bool [B, L], false at padding, which changes no other score; None: every token is real.

    Returns:
      float32 [B, L, V]; at padding some finite value.

    Raises:
      UserError: malformed tokens or mask, an id out of the vocabulary, or a row longer than the context.
    """
    tokens_BL, mask_BL = prompts.read(tokens, mask, model.model.vocab_size)
    batch, length = tokens_BL.shape
    longest = int(mask_BL.sum(axis=1).max())
    check(longest <= model.model.max_length, f"a row of {longest} tokens is longer than the model's context of "
          f"{model.model.max_length} (config.model.max_length); shorten it")
    # A mesh needs equal parts. A last column of padding is behind every token, and a last row is alone.
    rows, columns = prompts.round_up(batch, axes.BATCH_AXES), prompts.round_up(length, (axes.CONTEXT,))
    tokens_BL, mask_BL = (prompts.pad_to(a_BL, (rows, columns)) for a_BL in (tokens_BL, mask_BL))
    return forward(model, params, tokens_BL, prompts.count_positions(mask_BL), mask_BL)[:batch, :length]


@partial(jax.jit, static_argnames="model")
def forward(model: Transformer, params: Mapping[str, Any], tokens_BL: Array, positions_BL: Array,
            mask_BL: Array) -> Array:
    """The model without cache or noise, float32 [B, L, V]. Compiled once for each model and shape."""
    output = model.apply({"params": params["params"]}, tokens_BL, positions_BL, mask_BL.astype("int32"),
                         params["router"])
    return output.logits_BLV
