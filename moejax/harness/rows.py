"""Rows of tokens that the harness asks about: cut to what a model has room for, and scored."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.generation import score
from moejax.generation.begin import bucket
from moejax.models.transformer import Transformer


def cut(tokens: Sequence[int], length: int) -> list[int]:
    """At most so many tokens: the first one, which says how the text is to be read, and the last ones."""
    return list(tokens) if len(tokens) <= length else [tokens[0], *tokens[len(tokens) - length + 1:]]


def fit(prompt: Sequence[int], room: int, wanted: int) -> tuple[list[int], int]:
    """A prompt, and how many new tokens may follow it, of a row of so many tokens.

    A prompt is cut only if it leaves less than is wanted and less than half of the room; it keeps at least the other half.
    """
    least = min(wanted, room // 2)
    prompt = cut(prompt, room - least)
    return prompt, min(wanted, room - len(prompt))


def score_rows(model: Transformer, variables: Mapping[str, Any], rows: Sequence[tuple[Sequence[int], int]], *, size: int,
               room: int, prefix: bool) -> list[tuple[float, bool]]:
    """The log-probability of the last tokens of each row, and whether greedy decoding gives them.

    Args:
      model, variables: of a decoder.
      rows: tokens, and how many of them are scored; at least one stands before those.
      size: rows that are computed, for few compilations.
      room: tokens that the model reads of a row at most.
      prefix: whether the tokens before the scored ones, but the last, see each other in both directions; as of `generate`.
    """
    length = bucket(max(len(row) for row, _ in rows) - 1, room)
    tokens_BL = np.zeros((size, length + 1), np.int32)
    mask_BL, prefix_BL = np.zeros(tokens_BL.shape, bool), np.zeros((size, length), bool)
    for b, (row, told) in enumerate(rows):
        tokens_BL[b, :len(row)], mask_BL[b, :len(row)] = row, True
        prefix_BL[b, :len(row) - told - 1] = True
    mask_BL[len(rows):, :2] = True  # a row of nothing else is refused
    batch, _ = score.arrays(model, tokens_BL[:, :-1], mask_BL[:, 1:], None, None, None)
    batch |= {"prefix": prefix_BL} if prefix else {}
    log_BL, most_BL = map(np.asarray, _score(model, variables, batch, tokens_BL[:, 1:]))
    told_in = [(b, slice(len(row) - 1 - told, len(row) - 1)) for b, (row, told) in enumerate(rows)]
    return [(float(log_BL[b, at].sum(dtype=np.float64)), bool(most_BL[b, at].all())) for b, at in told_in]


@partial(jax.jit, static_argnames="model")
def _score(model: Transformer, variables: Mapping[str, Any], batch: Mapping[str, Array], next_BL: Array
           ) -> tuple[Array, Array]:
    logits_BLV = score.forward(model, variables, batch, "logits_BLV")[:next_BL.shape[0], :next_BL.shape[1]]
    own_BL = jnp.take_along_axis(logits_BLV, next_BL[..., None], axis=2)[..., 0]
    return own_BL - jax.nn.logsumexp(logits_BLV, axis=2), jnp.argmax(logits_BLV, axis=2) == next_BL
