"""Which tokens are a prefix."""

import numpy as np

from moejax.objectives.prefix_lm import draw_prefix


def test_every_segment_has_a_beginning_of_any_size_but_the_whole():
    segments = np.array([1, 1, 1, 2, 2, 2, 2, 3, 0, 0])
    found = np.array([draw_prefix(segments, np.random.default_rng(seed)) for seed in range(400)])
    sizes = [found[:, segments == segment].sum(axis=1) for segment in (1, 2, 3)]
    assert [sorted(set(size.tolist())) for size in sizes] == [[0, 1, 2], [0, 1, 2, 3], [0]]
    assert not found[:, segments == 0].any()
    assert all((np.bincount(size) > 60).all() for size in sizes)
    for segment, size in zip((1, 2, 3), sizes):  # a prefix is the first tokens
        np.testing.assert_array_equal(found[:, segments == segment],
                                      np.arange((segments == segment).sum()) < size[:, None])
