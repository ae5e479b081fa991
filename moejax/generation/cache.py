"""The memory of decoding: keys and values of the tokens seen so far, and which slots hold real tokens."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.models.transformer import Source, Transformer, empty_cache


class Memory(NamedTuple):
    """What the model has read.

    Attributes:
      layers: keys and values by stack and block, with S slots a row; see `moejax.models.transformer.empty_cache`.
      segments_BS: int32, 1 where a slot holds a real token, 0 where it is empty or holds padding.
      source_segments_BS: the same of what an encoder has read; None without one.
    """

    layers: Mapping[str, Any]
    segments_BS: Array
    source_segments_BS: Array | None = None


def empty(model: Transformer, batch: int, slots: int) -> Memory:
    """A memory of `slots` tokens for each of `batch` rows."""
    layers = empty_cache(model.model, model.moe, batch, slots, model.dtype)
    return Memory(layers, jnp.zeros((batch, slots), jnp.int32))


def extend(model: Transformer, params: Mapping[str, Any], memory: Memory, tokens_BL: Array, positions_BL: Array,
           real_BL: Array, at: Array | int, source: Source | None = None, prefix_BL: Array | None = None
           ) -> tuple[Array, Memory]:
    """Reads L more tokens a row.

    Args:
      model: the decoder.
      params: {"params": parameters, "router": router state}.
      memory: of the tokens before.
      tokens_BL: int32 ids.
      positions_BL: int32, from 0 in each row, padding not counted.
      real_BL: bool, false for padding, which no token sees and no router counts.
      at: the first slot that the tokens take; the slots from there on are empty.
      source: what the encoder reads, the first time, if there is one.
      prefix_BL: bool, which of them all see, also those before; None: none.

    Returns:
      Scores of the next token, float32 [B, L, V], and the memory with the tokens.
    """
    segments_BL = real_BL.astype(jnp.int32)
    segments_BS = jax.lax.dynamic_update_slice_in_dim(memory.segments_BS, segments_BL, at, axis=1)
    source_segments_BS = memory.source_segments_BS if source is None else source.segments_BS
    output = model.apply({"params": params["params"]}, tokens_BL, positions_BL, segments_BL, params["router"],
                         prefix_BL=prefix_BL, source=source, source_segments_BS=source_segments_BS, cache=memory.layers,
                         at=at, cached_segments_BS=segments_BS)
    return output.logits_BLV, Memory(output.cache, segments_BS, source_segments_BS)


def read_prompts(model: Transformer, params: Mapping[str, Any], source: Source | None, tokens_BL: Array, mask_BL: Array,
                 slots: int, prefix: bool) -> tuple[Memory, Array]:
    """A memory of all but the last token of prompts, with room for `slots` more, and the positions of all.

    Args:
      model, params, source: see `extend`.
      tokens_BL, mask_BL: prompts, padded on the left.
      slots: new tokens, the last one of the prompts not counted.
      prefix: whether these tokens see each other in both directions.
    """
    positions_BL = jnp.maximum(jnp.cumsum(mask_BL, axis=1, dtype=jnp.int32) - 1, 0)
    batch, length = tokens_BL.shape
    # The scores of these tokens are not used, so the compiler leaves their [B, L, V] out.
    _, memory = extend(model, params, empty(model, batch, length - 1 + slots), tokens_BL[:, :-1], positions_BL[:, :-1],
                       mask_BL[:, :-1], at=0, source=source, prefix_BL=mask_BL[:, :-1] if prefix else None)
    return memory, positions_BL
