"""Batches of rows, on Grain.

The order of the rows is a function of config.seed and the batch number alone. Every process computes the numbers of the
rows of the whole global batch and makes only the rows that its devices hold, so neither the batches nor the saved
position (the number of batches taken) depend on how many processes there are.
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from moejax.config import Config
from moejax.data.rows import Row, Rows


def train_loader(rows: Rows, config: Config, own: np.ndarray | slice = slice(None)) -> grain.DatasetIterator:
    """Endless batches of the training rows; each row comes once an epoch, and batches may straddle epochs.

    With config.data.shuffle the rows have a new order in each epoch, else always that of the data. What an objective draws
    for a row is a function of the seed, the batch and the place in it.

    Args:
      rows: of the training split.
      config: data.batch_size (B), data.shuffle and seed.
      own: which of the B rows of each global batch to make, b of them.

    Returns:
      An iterator of dicts with the arrays of the rows, each [b, ...]. Its `get_state` and `set_state` save and restore the
      position, whatever `own` is.
    """
    data = config.data
    numbers = grain.MapDataset.range(rows.count)
    if data.shuffle:
        numbers = numbers.seed(config.seed).shuffle()  # `repeat` draws a new order for each epoch
    places_b = np.arange(data.batch_size)[own]
    batches = numbers.repeat().batch(data.batch_size).map_with_index(lambda batch, numbers_B: _batch(
        rows, numbers_B[own], [(config.seed, TRAINING, batch, place) for place in places_b.tolist()]))
    # Making rows takes well under a millisecond, so a thread would cost more than it hides.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def eval_batches(rows: Rows, config: Config, own: np.ndarray | slice = slice(None)) -> Iterator[dict[str, np.ndarray]]:
    """All rows once, in order, or the first config.train.eval_batches batches of them; always with the same draws.

    Batches have `eval_size` rows; the last one is filled up with rows of zeros (mask False, segments 0), so all have one
    shape and every process gets as many. Arguments are those of `train_loader`; each call starts anew.
    """
    size = eval_size(config)
    batches = -(-rows.count // size)
    if config.train.eval_batches is not None:
        batches = min(batches, config.train.eval_batches)
    for number in range(batches):
        numbers_b = np.arange(number * size, (number + 1) * size)[own]
        yield _batch(rows, numbers_b, [(config.seed, EVALUATION, row) for row in numbers_b.tolist()])


def eval_size(config: Config) -> int:
    """Rows of a global batch in evaluation."""
    return config.data.eval_batch_size or config.data.batch_size


TRAINING, EVALUATION = 0, 1
"""Parts of the seed of a row's draws."""


def _batch(rows: Rows, numbers_b: np.ndarray, seeds_b: Sequence[tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Rows of these numbers, with a seed for the draws of each."""
    return stack_rows([rows.make(row, np.random.default_rng(seed))
                       for row, seed in zip(numbers_b.tolist(), seeds_b, strict=True)])


def stack_rows(made: Sequence[Row]) -> dict[str, np.ndarray]:
    """Rows as the arrays of a batch."""
    return {key: np.stack([row[key] for row in made]) for key in made[0]}
