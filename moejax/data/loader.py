"""Batches of packed windows, on Grain.

The order of the windows is a function of config.seed and the batch number alone. Every process computes the window
numbers of the whole global batch and packs only the rows that its devices hold, so neither the batches nor the saved
position (the number of batches taken) depend on how many processes there are.
"""

from collections.abc import Iterator

import grain
import numpy as np

from moejax.config import Config, check
from moejax.data.packing import num_windows, pack
from moejax.data.prepare import TokenStream


def train_loader(stream: TokenStream, separator_id: int, config: Config, rows: np.ndarray | slice = slice(None),
                 ) -> grain.DatasetIterator:
    """Endless batches of the training stream; each window comes once an epoch, and batches may straddle epochs.

    With config.data.shuffle the windows have a new order in each epoch, else always that of the stream.

    Args:
      stream: the training split.
      separator_id: the tokenizer's.
      config: data.length (L), data.batch_size (B), data.boundaries, data.shuffle and seed.
      rows: which of the B rows of each global batch to pack, b of them.

    Returns:
      An iterator of dicts with the arrays of `packing.pack`, each [b, L]. Its `get_state` and `set_state` save and
      restore the position, whatever the rows.

    Raises:
      UserError: the stream holds nothing to predict.
    """
    data = config.data
    windows = grain.MapDataset.range(_windows(stream, data.length))
    if data.shuffle:
        windows = windows.seed(config.seed).shuffle()  # `repeat` draws a new order for each epoch
    batches = windows.repeat().batch(data.batch_size).map(
        lambda indices_B: _batch(stream.tokens, separator_id, config, indices_B[rows]))
    # Packing takes well under a millisecond, so a thread would cost more than it hides.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def eval_batches(stream: TokenStream, separator_id: int, config: Config, rows: np.ndarray | slice = slice(None),
                 ) -> Iterator[dict[str, np.ndarray]]:
    """The whole stream once, in order, or its first config.train.eval_batches batches.

    Batches have `eval_size` rows; the last one is filled up with rows of zeros (mask False, segments 0), so all have one
    shape and every process gets as many. Arguments and errors are those of `train_loader`; each call starts anew.
    """
    data = config.data
    size = eval_size(config)
    batches = -(-_windows(stream, data.length) // size)
    if config.train.eval_batches is not None:
        batches = min(batches, config.train.eval_batches)
    return (_batch(stream.tokens, separator_id, config, np.arange(number * size, (number + 1) * size)[rows])
            for number in range(batches))


def eval_size(config: Config) -> int:
    """Rows of a global batch in evaluation."""
    return config.data.eval_batch_size or config.data.batch_size


def _batch(tokens_N: np.ndarray, separator_id: int, config: Config, indices_b: np.ndarray) -> dict[str, np.ndarray]:
    packed = [pack(tokens_N, separator_id, config.data.length, config.data.boundaries, index)
              for index in indices_b.tolist()]
    return {key: np.stack([row[key] for row in packed]) for key in packed[0]}


def _windows(stream: TokenStream, length: int) -> int:
    count = num_windows(len(stream.tokens), length)
    check(count > 0, "a data split has fewer than two tokens; take more text in config.data.source")
    return count
