"""A token stream cut into windows of equal length, and the arrays that a model reads of one window.

Window i of length L has the inputs stream[i*L : i*L + L] and as targets the same one token later, so over all windows
each token of the stream but the first is predicted exactly once. Only the last window may be padded.
"""

import numpy as np

KEYS = ("tokens", "targets", "mask", "segments", "positions")


def num_windows(num_tokens: int, length: int) -> int:
    """Windows of a stream: ceil((num_tokens - 1) / length)."""
    return max(0, -(-(num_tokens - 1) // length))


def pack(tokens_N: np.ndarray, separator_id: int, length: int, boundaries: bool, index: int) -> dict[str, np.ndarray]:
    """The arrays of one window, each [length]; all zero (mask False) if the window lies behind the stream's end.

    Args:
      tokens_N: the whole stream, any integer type; a memory map is read only where the window lies.
      separator_id: the token that begins each document.
      length: L.
      boundaries: whether documents are kept apart; if not, the window counts as one document.
      index: i, at least 0.

    Returns:
      tokens, targets: int32 token ids;
      mask: bool, whether the position's target is a token of the stream;
      segments: int32, 0 for padding, then 1, 2, ... for the documents, or parts of them, in the window;
      positions: int32, from 0 in each segment; 0 in padding.
    """
    part = np.asarray(tokens_N[index * length:index * length + length + 1], np.int32)
    size = max(0, len(part) - 1)
    packed = {key: np.zeros(length, bool if key == "mask" else np.int32) for key in KEYS}
    offsets = np.arange(size, dtype=np.int32)
    begins = part[:size] == separator_id if boundaries else np.zeros(size, bool)
    begins[:1] = True  # a document that goes on from the window before starts a segment too
    packed["tokens"][:size] = part[:size]
    packed["targets"][:size] = part[1:]
    packed["mask"][:size] = True
    packed["segments"][:size] = np.cumsum(begins)
    packed["positions"][:size] = offsets - np.maximum.accumulate(np.where(begins, offsets, 0))
    return packed
