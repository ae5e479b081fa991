"""What masked language modelling hides: by laws, and by hand where the draws leave no choice."""

import hypothesis
import numpy as np
from hypothesis import strategies

from moejax.objectives.masked_lm import mask_tokens

MASK, VOCAB = 99, 50


class Draws:
    """A generator with draws of our own."""

    def __init__(self, order, fates, tokens):
        self.order, self.fates, self.tokens = order, fates, tokens

    def permutation(self, units):
        return np.asarray(units)[self.order]

    def random(self, size):
        return np.asarray(self.fates)

    def integers(self, low, high, size):
        assert (low, high) == (0, VOCAB)
        return np.asarray(self.tokens)


def test_by_hand():
    """Of six real tokens half are told: those drawn first, one behind the mask, one behind a random token, one as it is."""
    tokens, real = np.arange(10, 18), np.arange(8) < 6
    draws = Draws([4, 1, 2, 0, 3, 5], [0, .79, .9, 0, .8, 0, 0, 0], np.arange(20, 28))
    seen, told = mask_tokens(tokens, real, np.ones(8, bool), 0.5, MASK, VOCAB, draws)
    assert seen.tolist() == [10, MASK, 12, 13, 24, 15, 16, 17]
    assert np.flatnonzero(told).tolist() == [1, 2, 4]


def test_whole_words_by_hand():
    """Words [10 11] [12] [13 14 15]; two of six tokens are wanted, and the word that is drawn has three."""
    tokens, starts = np.arange(10, 16), np.array([1, 0, 1, 1, 0, 0], bool)
    seen, told = mask_tokens(tokens, np.ones(6, bool), starts, 0.33, MASK, VOCAB, Draws([2, 0, 1], [0] * 6, [0] * 6))
    assert seen.tolist() == [10, 11, 12, MASK, MASK, MASK] and np.flatnonzero(told).tolist() == [3, 4, 5]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(strategies.integers(0, 2**32 - 1), strategies.integers(0, 40), strategies.floats(0.01, 1.0),
                  strategies.booleans())
def test_laws(seed, count, rate, words):
    rng = np.random.default_rng(seed)
    tokens, real = rng.integers(0, VOCAB, 40), np.arange(40) < count
    starts = rng.random(40) < 0.4 if words else np.ones(40, bool)
    seen, told = mask_tokens(tokens, real, starts, rate, MASK, VOCAB, rng)
    assert (seen == tokens)[~told].all() and not told[~real].any()
    wanted = max(round(rate * count), 1) if count else 0
    assert told.sum() >= wanted if words else told.sum() == wanted
    if words and count:  # whole words: two real neighbours of one word share their fate
        same = real[1:] & real[:-1] & ~starts[1:]
        assert (told[1:] == told[:-1])[same].all()


def test_shares_are_80_10_10():
    rng = np.random.default_rng(0)
    tokens = np.full(200_000, 7)
    seen, told = mask_tokens(tokens, np.ones(len(tokens), bool), np.ones(len(tokens), bool), 0.15, MASK, VOCAB, rng)
    assert told.sum() == 30_000
    shares = [(seen[told] == MASK).mean(), (seen[told] == 7).mean()]
    np.testing.assert_allclose(shares, [0.8, 0.1 + 0.1 / VOCAB], atol=0.01)
