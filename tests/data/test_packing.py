"""Laws of windows: nothing lost, nothing twice, documents apart."""

import hypothesis
import numpy as np
from hypothesis import strategies

from moejax.data.packing import KEYS, num_windows, pack

SEPARATOR = 3
streams = strategies.lists(strategies.integers(0, 5), min_size=2, max_size=40).map(lambda ids: np.array(ids, np.uint16))
settings = hypothesis.settings(max_examples=60, deadline=None)


def rows(tokens_N, length, boundaries):
    count = num_windows(len(tokens_N), length)
    packed = [pack(tokens_N, SEPARATOR, length, boundaries, index) for index in range(count)]
    return {key: np.stack([row[key] for row in packed]) for key in KEYS}


@settings
@hypothesis.given(streams, strategies.integers(1, 9), strategies.booleans())
def test_each_token_but_the_first_is_predicted_once_from_the_one_before(tokens_N, length, boundaries):
    batch = rows(tokens_N, length, boundaries)
    mask = batch["mask"]
    np.testing.assert_array_equal(batch["tokens"][mask], tokens_N[:-1])
    np.testing.assert_array_equal(batch["targets"][mask], tokens_N[1:])
    assert mask[:-1].all() and mask[-1].any(), "only the last window is padded, and it is not empty"
    np.testing.assert_array_equal(batch["segments"] > 0, mask)
    for key in KEYS:
        assert batch[key].shape == mask.shape and not batch[key][~mask].any()
        assert batch[key].dtype == (bool if key == "mask" else np.int32)


@settings
@hypothesis.given(streams, strategies.integers(1, 9))
def test_a_segment_is_a_document_part_and_positions_count_in_it(tokens_N, length):
    batch = rows(tokens_N, length, boundaries=True)
    for tokens, mask, segments, positions in zip(*(batch[key] for key in ("tokens", "mask", "segments", "positions"))):
        for at in np.flatnonzero(mask):
            begins = at == 0 or tokens[at] == SEPARATOR
            assert positions[at] == (0 if begins else positions[at - 1] + 1)
            assert segments[at] == (1 if at == 0 else segments[at - 1] + begins)


@settings
@hypothesis.given(streams, strategies.integers(1, 9))
def test_without_boundaries_a_window_is_one_segment(tokens_N, length):
    batch = rows(tokens_N, length, boundaries=False)
    np.testing.assert_array_equal(batch["segments"], batch["mask"].astype(int))
    np.testing.assert_array_equal(batch["positions"], np.arange(length) * batch["mask"])


def test_behind_the_stream_there_is_only_padding():
    beyond = pack(np.arange(10), SEPARATOR, 4, True, num_windows(10, 4))
    assert all(not beyond[key].any() and beyond[key].shape == (4,) for key in KEYS)
    assert num_windows(1, 4) == num_windows(0, 4) == 0
