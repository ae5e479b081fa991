"""The plain forward pass: a model's scores of tokens or classes, and vectors that stand for whole texts."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax import axes
from moejax.config import check
from moejax.generation import prompts
from moejax.layers.pool import pool
from moejax.models import transformer
from moejax.models.transformer import Transformer


def logits(model: Transformer, params: Mapping[str, Any], tokens: Any, mask: Any = None, decoder_tokens: Any = None,
           decoder_mask: Any = None, types: Any = None, prefix: Any = None) -> Array:
    """Scores of tokens at every position, or of classes for every row. Can be differentiated by `params`.

    Args:
      model: a decoder scores the next token, an encoder the token at each position, or the classes if that is its head.
      params: {"params": parameters, "router": router state}.
      tokens: concrete int [B, L], or a list of B lists of ids, which are then padded on the right. What the encoder reads,
        if the model has an encoder and a decoder.
      mask: bool [B, L], false at padding, which changes no other score; None: every token is real.
      decoder_tokens, decoder_mask: the same for the decoder of a model with both, start token included.
      types: int [B, L], of the tokens, if the model has types; None: all are of the first.
      prefix: bool [B, L], tokens of a decoder's input that all see, also those before; None: none.

    Returns:
      float32 [B, L, V]; at padding some finite value. Or [B, C].

    Raises:
      UserError: malformed tokens or mask, an id out of the vocabulary, a row longer than the context, tokens for a decoder
        that there is not, or none for one that there is, or a model without such a head.
    """
    check(model.model.head != "none", "this model has no head that scores; moejax.embed gives its vectors")
    batch, size = arrays(model, tokens, mask, decoder_tokens, decoder_mask, types)
    if prefix is not None:
        prefix_BL = np.asarray(prefix, bool)
        check(prefix_BL.shape == size and model.model.kind == "decoder",
              "prefix must be [B, L] like the tokens of a decoder")
        batch["prefix"] = prompts.pad_to(prefix_BL, batch["tokens"].shape) & (batch["segments"] > 0)
    if model.model.head == "classes":
        return forward(model, params, batch, "logits_BC")[:size[0]]
    return forward(model, params, batch, "logits_BLV")[:size[0], :size[1]]


def embed(model: Transformer, params: Mapping[str, Any], tokens: Any, mask: Any = None, *, kind: str = "mean",
          types: Any = None) -> Array:
    """One vector a row, of length 1, so that products are cosines: of the last activations of an encoder or a decoder.

    Args:
      model, params, tokens, mask, types: see `logits`.
      kind: what stands for a row: the mean of its tokens, the first or the last.

    Returns:
      float32 [B, D].

    Raises:
      UserError: as `logits`, or an unknown kind.
    """
    check(kind in ("mean", "first", "last"), f"kind={kind!r} must be mean, first or last")
    check(model.model.kind != "encoder_decoder", "a model with an encoder and a decoder has no one vector for a text")
    batch, size = arrays(model, tokens, mask, None, None, types)
    x_BLD = forward(model, params, batch, "hidden_BLD")
    x_BD = pool(x_BLD.astype(jnp.float32), batch["segments"] > 0, kind)[:size[0]]
    return x_BD / jnp.maximum(jnp.linalg.norm(x_BD, axis=1, keepdims=True), 1e-12)


def arrays(model: Transformer, tokens: Any, mask: Any, decoder_tokens: Any, decoder_mask: Any, types: Any
           ) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
    """A batch as `transformer.apply_batch` takes it, filled up to what the mesh can split, and its size before that."""
    both = model.model.kind == "encoder_decoder"
    check(both == (decoder_tokens is not None), "decoder_tokens are what the decoder of a model with an encoder and a "
          f"decoder reads; this model is {model.model.kind}, so {'give' if both else 'leave out'} them")
    check(types is None or model.model.architecture.token_types > 0, "types: this model has no types of tokens")
    rows = {"": (decoder_tokens, decoder_mask), "source_": (tokens, mask)} if both else {"": (tokens, mask)}
    batch: dict[str, np.ndarray] = {}
    sizes = []
    for name, (given, real) in rows.items():
        tokens_BL, mask_BL = prompts.read(given, real, model.model.vocab_size)
        by_slots = model.model.architecture.positions == "relative" or set(model.model.architecture.attention) - {"full"}
        check(not by_slots or prompts.unbroken(mask_BL), "this model counts distances in slots, so padding must lie before "
              "or behind the tokens of a row, not between them")
        sizes.append(tokens_BL.shape)
        longest = int(mask_BL.sum(axis=1).max())
        check(longest <= model.model.max_length, f"a row of {longest} tokens is longer than the model's context of "
              f"{model.model.max_length} (config.model.max_length); shorten it")
        # A mesh needs equal parts. A last column of padding is behind every token, and a last row is alone.
        shape = prompts.round_up(len(tokens_BL), axes.BATCH_AXES), prompts.round_up(tokens_BL.shape[1], (axes.CONTEXT,))
        tokens_BL, mask_BL = (prompts.pad_to(a_BL, shape) for a_BL in (tokens_BL, mask_BL))
        batch |= {f"{name}tokens": tokens_BL, f"{name}positions": prompts.count_positions(mask_BL),
                  f"{name}segments": mask_BL.astype(np.int32)}
    check(sizes[0][0] == sizes[-1][0], f"there are {sizes[-1][0]} rows of tokens, but {sizes[0][0]} of decoder_tokens")
    if types is not None:
        types_BL = np.asarray(types, np.int32)
        check(types_BL.shape == sizes[0] and 0 <= types_BL.min() <= types_BL.max() < model.model.architecture.token_types,
              f"types must be [B, L] like tokens, from 0 below {model.model.architecture.token_types}")
        batch["types"] = prompts.pad_to(types_BL, batch["tokens"].shape)
    return batch, sizes[0]


@partial(jax.jit, static_argnames=("model", "wanted"))
def forward(model: Transformer, params: Mapping[str, Any], batch: Mapping[str, Array], wanted: str) -> Array:
    """One field of `ModelOutput`, without cache or noise. Compiled once for each model and shapes."""
    return getattr(transformer.apply_batch(model, params["params"], params["router"], batch), wanted)
