"""The order of batches is a function of seed and batch number: not of processes, interruptions or the split's end."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from moejax.config import UserError, build
from moejax.data.loader import eval_batches, train_loader
from moejax.data.packing import KEYS
from moejax.data.prepared import TokenStream
from moejax.data.rows import Rows, make_rows
from moejax.data.tokenizers import ByteTokenizer

LENGTH, WINDOWS, BATCH = 5, 11, 4
SEPARATOR = 0
# Every token is another number, so a row's first token tells its window.
STREAM = TokenStream(np.arange(LENGTH * WINDOWS - 1, dtype=np.uint16), np.zeros(1, np.int64), 1, 1)


def config(train=None, seed=7, **data):
    return build({"seed": seed, "data": {"length": LENGTH, "batch_size": BATCH, **data}, "train": train or {}})


def loader(cfg, own=slice(None)):
    return train_loader(rows_of(cfg), cfg, own)


def rows_of(cfg, stream=STREAM):
    return make_rows(stream, ByteTokenizer(separator_id=SEPARATOR), cfg)


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def order(batches):
    return [int(token) // LENGTH for batch in batches for token in batch["tokens"][:, 0]]


def same(left, right):
    return len(left) == len(right) and all(np.array_equal(a[key], b[key]) for a, b in zip(left, right) for key in KEYS)


def test_every_window_comes_once_an_epoch_in_a_new_order():
    windows = order(take(loader(config()), WINDOWS))  # BATCH epochs; the batches straddle them
    epochs = [tuple(windows[start:start + WINDOWS]) for start in range(0, len(windows), WINDOWS)]
    assert all(sorted(epoch) == list(range(WINDOWS)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)
    assert order(take(loader(config()), WINDOWS)) == windows
    assert order(take(loader(config(seed=8)), WINDOWS)) != windows


def test_without_shuffle_the_stream_is_read_in_order_again_and_again():
    windows = order(take(loader(config(shuffle=False)), WINDOWS))
    assert windows == list(range(WINDOWS)) * BATCH


@pytest.mark.parametrize("rows", ([0, 1, 2, 3], [2, 3], [1], [0, 3]), ids=str)
def test_rows_are_those_of_the_whole_batch(rows):
    whole, part = take(loader(config()), 6), take(loader(config(), np.array(rows)), 6)
    assert same(part, [{key: batch[key][rows] for key in KEYS} for batch in whole])


@hypothesis.settings(max_examples=6, deadline=None)
@hypothesis.given(strategies.integers(0, 9), strategies.sets(strategies.integers(0, BATCH - 1), min_size=1),
                  strategies.sets(strategies.integers(0, BATCH - 1), min_size=1))
def test_a_restored_iterator_goes_on_bitwise_even_with_other_rows(done, before, after):
    before, after = np.array(sorted(before)), np.array(sorted(after))
    straight = take(loader(config()), 13)[done:]
    first, restored = loader(config(), before), loader(config(), after)
    take(first, done)
    restored.set_state(first.get_state())
    assert same(take(restored, 13 - done), [{key: batch[key][after] for key in KEYS} for batch in straight])


@pytest.mark.parametrize("size", [3, 11, 16])
def test_evaluation_reads_the_stream_once_in_order(size):
    batches = list(eval_batches(rows_of(config()), config(eval_batch_size=size)))
    assert {batch[key].shape for batch in batches for key in KEYS} == {(size, LENGTH)}
    targets = np.concatenate([batch["targets"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(targets, STREAM.tokens[1:])
    filled = np.concatenate([batch["mask"].any(axis=1) for batch in batches])
    assert filled[:WINDOWS].all() and not filled[WINDOWS:].any() and len(batches) == -(-WINDOWS // size)
    assert not any(batch[key][~batch["mask"]].any() for batch in batches for key in KEYS)


def test_evaluation_takes_rows_and_is_cut_by_eval_batches():
    cfg = config()
    whole = list(eval_batches(rows_of(cfg), cfg))
    rows = np.array([1, 3])
    assert same(list(eval_batches(rows_of(cfg), cfg, rows)), [{k: batch[k][rows] for k in KEYS} for batch in whole])
    for limit in (1, 2, 99):
        assert same(list(eval_batches(rows_of(cfg), config(train={"eval_batches": limit}))), whole[:limit])


def test_a_stream_with_nothing_to_predict():
    with pytest.raises(UserError, match="fewer than two tokens"):
        rows_of(config(), STREAM._replace(tokens=STREAM.tokens[:1]))


def test_draws_of_evaluation_do_not_depend_on_the_batch_size():
    rows = Rows(7, lambda index, rng: {"drawn": rng.integers(0, 1 << 30, 3)})
    found = [np.concatenate([batch["drawn"] for batch in eval_batches(rows, config(eval_batch_size=size))])[:7]
             for size in (2, 4, 7)]
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all() and len(np.unique(found[0])) == 21


def test_draws_of_training_depend_on_batch_and_place():
    rows = Rows(3, lambda index, rng: {"drawn": rng.integers(0, 1 << 30, 3)})
    whole = np.stack([batch["drawn"] for batch in take(train_loader(rows, config()), 3)])
    part = np.stack([batch["drawn"] for batch in take(train_loader(rows, config(), np.array([1, 3])), 3)])
    np.testing.assert_array_equal(part, whole[:, [1, 3]])
    assert len(np.unique(whole)) == whole.size
