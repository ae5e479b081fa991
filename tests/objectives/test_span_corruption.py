"""Which spans are cut out, and what becomes of the text."""

import hypothesis
import numpy as np
from hypothesis import strategies

from moejax.objectives.span_corruption import corrupt, draw_spans
from moejax.task import num_spans

END = 1


def test_by_hand():
    """The example of the T5 paper: "Thank you <X> me to your party <Y> week"."""
    text = np.array([10, 11, 12, 13, 14, 15, 16, 17, 18, 19])  # thank you for inviting me to your party last week
    noise = np.isin(text, [12, 13, 18])
    source, target = corrupt(text, noise, [90, 91, 92], END)
    assert source.tolist() == [10, 11, 90, 14, 15, 16, 17, 91, 19]
    assert target.tolist() == [90, 12, 13, 91, 18, END]


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(strategies.integers(0, 2**32 - 1), strategies.integers(2, 120), strategies.floats(0.05, 0.9),
                  strategies.floats(1, 20))
def test_the_text_comes_back(seed, size, density, mean_span):
    rng = np.random.default_rng(seed)
    noise, spans = num_spans(size, density, mean_span)
    cut = draw_spans(size, noise, spans, rng)
    begins = cut & ~np.append(False, cut[:-1])
    assert len(cut) == size and cut.sum() == noise and begins.sum() == spans and not cut[0]
    text, sentinels = rng.integers(100, 200, size), list(range(10, 10 + spans))
    source, target = corrupt(text, cut, sentinels, END)
    assert len(source) == size - noise + spans and len(target) == noise + spans + 1 and target[-1] == END
    pieces, open_span = {}, None
    for token in target[:-1]:
        if token < 100:
            pieces[open_span := int(token)] = []
        else:
            pieces[open_span].append(int(token))
    assert list(pieces) == sentinels
    restored = [token for t in source for token in (pieces[int(t)] if t < 100 else [int(t)])]
    assert restored == text.tolist()


def test_all_cuts_are_equally_likely():
    """Of six tokens three in two spans: 2 ways to cut what stays (1 + 2, 2 + 1) times 2 for what goes."""
    rng = np.random.default_rng(0)
    found = [tuple(draw_spans(6, 3, 2, rng)) for _ in range(4000)]
    counts = [found.count(way) for way in set(found)]
    assert len(counts) == 4 and min(counts) > 900
