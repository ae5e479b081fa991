"""What the public functions take as tokens: checked, made rectangular, and laid out for the model."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from moejax.config import UserError, check


def read(tokens: Any, mask: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids as arrays.

    Args:
      tokens: int [B, L], or a list of B lists that may differ in length.
      mask: bool (or 0 and 1) [B, L], false at padding, wherever it lies; None: every token is real.
      vocab_size: V.

    Returns:
      tokens_BL int32, 0 at padding; mask_BL bool.

    Raises:
      UserError: wrong shapes or types, no token at all, or an id of a real token that is not below V.
    """
    rows = [np.asarray(row) for row in (tokens if isinstance(tokens, (list, tuple)) else np.atleast_1d(tokens))]
    check(all(row.ndim == 1 and (row.dtype.kind in "iu" or row.size == 0) for row in rows),
          "tokens must be integers [B, L], or a list of lists of integers; put a single prompt into a list")
    lengths_B = np.array([len(row) for row in rows], np.int64)
    check(bool(lengths_B.any()), "tokens is empty; give at least one prompt with one token")
    tokens_BL = np.zeros((len(rows), lengths_B.max()), np.int64)
    mask_BL = np.arange(tokens_BL.shape[1]) < lengths_B[:, None]
    tokens_BL[mask_BL] = np.concatenate([row.astype(np.int64) for row in rows])
    if mask is not None:
        given = np.asarray(mask)
        check(given.shape == tokens_BL.shape, f"mask has shape {given.shape}, but tokens {tokens_BL.shape}")
        check(given.dtype.kind in "biu" and bool(np.isin(given, (0, 1)).all()),
              "mask must be bool: true for real tokens, false for padding")
        mask_BL &= given.astype(bool)
    outside = np.argwhere(mask_BL & ((tokens_BL < 0) | (tokens_BL >= vocab_size)))
    if len(outside):
        row, column = outside[0]
        raise UserError(f"token id {tokens_BL[row, column]} in row {row}, column {column} of tokens is out of the"
                        f" vocabulary of {vocab_size} ids (config.model.vocab_size); use the model's own tokenizer")
    return np.where(mask_BL, tokens_BL, 0).astype(np.int32), mask_BL


def pack_left(tokens_BL: np.ndarray, mask_BL: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Moves all padding to the left and adds or cuts padding there, so that every row ends in the last column.

    Args:
      tokens_BL: int32, 0 at padding.
      mask_BL: bool, real tokens.
      length: columns wanted, at least the real tokens of every row.

    Returns:
      tokens and mask, [B, length].
    """
    order_BL = np.argsort(mask_BL, axis=1, kind="stable")
    kept = min(length, order_BL.shape[1])
    order_BL = order_BL[:, order_BL.shape[1] - kept:]
    return tuple(np.pad(np.take_along_axis(a_BL, order_BL, axis=1), ((0, 0), (length - kept, 0)))
                 for a_BL in (tokens_BL, mask_BL))


def pack_right(tokens_BL: np.ndarray, mask_BL: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """As `pack_left`, with all padding on the right."""
    return tuple(a_BL[:, ::-1] for a_BL in pack_left(tokens_BL[:, ::-1], mask_BL[:, ::-1], length))


def unbroken(mask_BL: np.ndarray) -> bool:
    """Whether the real tokens of every row lie one behind the other."""
    return bool((np.abs(np.diff(mask_BL.astype(int), axis=1, prepend=0, append=0)).sum(axis=1) <= 2).all())


def count_positions(mask_BL: np.ndarray) -> np.ndarray:
    """The position of each real token among the real tokens of its row, from 0; any small number at padding. Int32."""
    return np.maximum(np.cumsum(mask_BL, axis=1) - 1, 0).astype(np.int32)


def pad_to(a: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Adds zeros at the end of each dimension."""
    return np.pad(a, [(0, wanted - had) for had, wanted in zip(a.shape, shape, strict=True)])


def round_up(count: int, mesh_axes: Sequence[str]) -> int:
    """The least number from `count` on that the mesh set by `jax.set_mesh` splits evenly over these axes."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in mesh_axes)
    return -(-count // parts) * parts
