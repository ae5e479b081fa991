"""Prefix language modelling (Liu et al. 2018, arXiv 1801.10198; T5 1910.10683): a first part is seen in both directions."""

import numpy as np


def draw_prefix(segments_L: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The prefix of each segment, of any size from none to all but one of its tokens, all alike. Bool [L].

    Args:
      segments_L: int, 0 at padding.
      rng: draws.
    """
    prefix_L = np.zeros(len(segments_L), bool)
    for segment in np.unique(segments_L[segments_L > 0]):
        at = np.flatnonzero(segments_L == segment)
        prefix_L[at[:rng.integers(0, len(at))]] = True
    return prefix_L
