"""Span corruption (Raffel et al. 2020, arXiv 1910.10683): spans of a text are cut out, and to be told."""

from typing import Sequence

import numpy as np


def draw_spans(tokens: int, noise: int, spans: int, rng: np.random.Generator) -> np.ndarray:
    """Which tokens are cut out: `spans` runs of `noise` tokens in all, each with one before it that stays. Bool."""
    def cut(total: int) -> np.ndarray:
        """Random sizes, at least 1, of `spans` parts of a total, all ways alike."""
        marks = np.sort(rng.choice(total - 1, spans - 1, replace=False)) + 1 if spans > 1 else np.zeros(0, int)
        return np.diff(np.concatenate([[0], marks, [total]]))

    sizes = np.stack([cut(tokens - noise), cut(noise)], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, sizes)


def corrupt(tokens_N: np.ndarray, noise_N: np.ndarray, sentinels: Sequence[int], end_id: int
            ) -> tuple[np.ndarray, np.ndarray]:
    """Input and target of one text.

    Args:
      tokens_N: int ids.
      noise_N: bool, tokens that are cut out.
      sentinels: ids that stand for the spans, at least as many as there are.
      end_id: behind the target.

    Returns:
      The text with a sentinel for each span; and for each span its sentinel and its tokens, then the end.
    """
    begins_N = noise_N & ~np.concatenate([[False], noise_N[:-1]])
    sentinel_N = np.asarray(sentinels)[np.maximum(np.cumsum(begins_N) - 1, 0)]
    source = np.where(begins_N, sentinel_N, tokens_N)[~noise_N | begins_N]
    target = [part for at in np.flatnonzero(noise_N)
              for part in ((sentinel_N[at], tokens_N[at]) if begins_N[at] else (tokens_N[at],))]
    return source, np.array([*target, end_id])
