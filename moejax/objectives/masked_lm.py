"""Masked language modelling (Devlin et al. 2019, arXiv 1810.04805): some tokens are hidden, and to be told."""

import numpy as np


def mask_tokens(tokens_L: np.ndarray, real_L: np.ndarray, starts_L: np.ndarray, rate: float, mask_id: int, vocab_size: int,
                rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Chooses tokens and hides them: 80 % behind the mask, 10 % behind a random token; 10 % stay as they are.

    Args:
      tokens_L: int ids.
      real_L: bool, tokens that may be chosen.
      starts_L: bool, where a unit that is chosen as a whole begins: every token, or words.
      rate: share of these to choose, rounded, at least one if there is any; the last unit chosen may go beyond.
      mask_id: the mask.
      vocab_size: random tokens are below it.
      rng: draws.

    Returns:
      What the model reads, int [L], and which tokens it is to tell, bool [L].
    """
    unit_L = np.cumsum(starts_L | ~real_L | np.roll(~real_L, 1))
    wanted = max(round(rate * real_L.sum()), 1) if real_L.any() and rate > 0 else 0
    units = rng.permutation(np.unique(unit_L[real_L]))
    sizes = np.array([np.sum(unit_L[real_L] == unit) for unit in units], int) if len(units) < real_L.sum() else np.ones(
        len(units), int)
    taken = units[:np.searchsorted(np.cumsum(sizes), wanted) + 1] if wanted else units[:0]
    chosen_L = real_L & np.isin(unit_L, taken)
    fate_L = rng.random(len(tokens_L))
    random_L = rng.integers(0, vocab_size, len(tokens_L))
    hidden_L = np.where(fate_L < 0.8, mask_id, np.where(fate_L < 0.9, random_L, tokens_L))
    return np.where(chosen_L, hidden_L, tokens_L), chosen_L
