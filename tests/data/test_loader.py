"""The order of batches is a function of seed and batch number: not of processes, interruptions or the split's end."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from moejax.config import UserError, build
from moejax.data.loader import eval_batches, train_loader
from moejax.data.packing import KEYS
from moejax.data.prepare import TokenStream

LENGTH, WINDOWS, BATCH = 5, 11, 4
SEPARATOR = 0
# Every token is another number, so a row's first token tells its window.
STREAM = TokenStream(np.arange(LENGTH * WINDOWS - 1, dtype=np.uint16), np.zeros(1, np.int64), 1, 1)


def config(train=None, seed=7, **data):
    return build({"seed": seed, "data": {"length": LENGTH, "batch_size": BATCH, **data}, "train": train or {}})


def loader(cfg, index=0, count=1):
    return train_loader(STREAM, SEPARATOR, cfg, index, count)


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


@pytest.mark.parametrize("count", [2, 4])
def test_global_batches_do_not_depend_on_the_processes(count):
    whole = take(loader(config()), 6)
    parts = [take(loader(config(), index, count), 6) for index in range(count)]
    joined = [{key: np.concatenate([batch[key] for batch in step]) for key in KEYS} for step in zip(*parts)]
    assert same(joined, whole)


@hypothesis.settings(max_examples=6, deadline=None)
@hypothesis.given(strategies.integers(0, 9), strategies.sampled_from([1, 2, 4]), strategies.sampled_from([1, 2, 4]))
def test_a_restored_iterator_goes_on_bitwise_even_on_other_processes(done, before, after):
    straight = take(loader(config()), 13)[done:]
    first = loader(config(), before - 1, before)
    take(first, done)
    restored = [loader(config(), index, after) for index in range(after)]
    for iterator in restored:
        iterator.set_state(first.get_state())
    steps = zip(*(take(iterator, 13 - done) for iterator in restored))
    assert same([{key: np.concatenate([batch[key] for batch in step]) for key in KEYS} for step in steps], straight)


@pytest.mark.parametrize("size", [3, 11, 16])
def test_evaluation_reads_the_stream_once_in_order(size):
    batches = list(eval_batches(STREAM, SEPARATOR, config(eval_batch_size=size)))
    assert {batch[key].shape for batch in batches for key in KEYS} == {(size, LENGTH)}
    targets = np.concatenate([batch["targets"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(targets, STREAM.tokens[1:])
    filled = np.concatenate([batch["mask"].any(axis=1) for batch in batches])
    assert filled[:WINDOWS].all() and not filled[WINDOWS:].any() and len(batches) == -(-WINDOWS // size)
    assert not any(batch[key][~batch["mask"]].any() for batch in batches for key in KEYS)


def test_evaluation_is_split_over_processes_and_cut_by_eval_batches():
    cfg = config()
    whole = list(eval_batches(STREAM, SEPARATOR, cfg))
    parts = [list(eval_batches(STREAM, SEPARATOR, cfg, index, 2)) for index in range(2)]
    assert same([{key: np.concatenate([batch[key] for batch in step]) for key in KEYS} for step in zip(*parts)], whole)
    for limit in (1, 2, 99):
        assert same(list(eval_batches(STREAM, SEPARATOR, config(train={"eval_batches": limit}))), whole[:limit])


def test_errors_name_the_key():
    with pytest.raises(UserError, match=r"config\.data\.batch_size=4 is not a multiple of the 3 processes"):
        loader(config(), 0, 3)
    with pytest.raises(UserError, match=r"config\.data\.eval_batch_size=6"):
        eval_batches(STREAM, SEPARATOR, config(eval_batch_size=6), 0, 4)
    with pytest.raises(UserError, match="fewer than two tokens"):
        train_loader(STREAM._replace(tokens=STREAM.tokens[:1]), SEPARATOR, config())
