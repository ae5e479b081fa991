"""Batches whose rows come from several tasks.

Which task a row comes from follows the rates as closely as whole rows can: the next row is of the task that is furthest
behind its rate. So a task never has more than one row beyond its share, whatever the length of the run; drawing tasks at
random would leave the composition of a batch to chance. Grain's own mixing is as resumable, but rounds rates to whole
numbers of which the least is 100, and gives a task the same places in every batch, so that one device or micro-batch would
see one task only; here the places within a batch are shuffled.

All of it is a function of seed and position, and the position (batches, and rows of each task) that of the whole global
batch. So batches and saved positions do not depend on how many processes there are.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from moejax.config import Config, check
from moejax.data.loader import TRAINING, stack_rows, train_loader
from moejax.data.prepared import Prepared
from moejax.data.rows import Rows, make_rows
from moejax.mixture import Mixture, parts, rates

PLACES = 2
"""Part of the seed of the places of the tasks in a batch, beside those of the draws of rows."""


class Position(NamedTuple):
    """Where a run is in its data: batches taken, and of each task rows taken."""

    batches: int
    taken: tuple[int, ...]


class Drawn(NamedTuple):
    """What the rows of a global batch are.

    Attributes:
      task_B: number of the task.
      turn_B: how many rows of that task came before.
      after: the position behind the batch.
    """

    task_B: np.ndarray
    turn_B: np.ndarray
    after: Position


def draw(shares: Sequence[float], position: Position, size: int, seed: int) -> Drawn:
    """The tasks of the next batch.

    Args:
      shares: of each task in all rows; they sum to 1.
      position: batches and rows taken before.
      size: B.
      seed: of the places of the tasks in the batch.
    """
    share_N, taken_N = np.asarray(shares, np.float64), np.array(position.taken, np.int64)
    first, task_B = int(taken_N.sum()), np.zeros(size, np.int64)
    for place in range(size):
        task_B[place] = np.argmax(share_N * (first + place + 1) - taken_N)
        taken_N[task_B[place]] += 1
    task_B = np.random.default_rng((seed, PLACES, position.batches)).permutation(task_B)
    turn_B = np.zeros(size, np.int64)
    for task, before in enumerate(position.taken):
        turn_B[task_B == task] = before + np.arange(np.count_nonzero(task_B == task))
    return Drawn(task_B, turn_B, Position(position.batches + 1, tuple(taken_N.tolist())))


class MixtureLoader(Iterator[dict[str, np.ndarray]]):
    """Endless batches of the training rows of all tasks; the rows of each come as `train_loader` has them.

    Args:
      rows: of each task by name, as `rows_of_tasks` gives them.
      config: data.task, data.batch_size (B), data.shuffle and seed.
      own: which of the B rows of each global batch to make, b of them.

    Attributes:
      rates: the share of each task in the rows.
    """

    def __init__(self, rows: Mapping[str, Rows], config: Config, own: np.ndarray | slice = slice(None)):
        self._rows, self._config, self._own = rows, config, own
        self.rates = rates(config.data.task, [each.count for each in rows.values()])
        self._numbers = [_order(each.count, config, task) for task, each in enumerate(rows.values())]
        self._position = Position(0, (0,) * len(rows))

    def __next__(self) -> dict[str, np.ndarray]:
        seed, size, position = self._config.seed, self._config.data.batch_size, self._position
        drawn = draw(self.rates, position, size, seed)
        self._position = drawn.after
        makers, made = list(self._rows.values()), []
        for place in np.arange(size)[self._own].tolist():
            task = int(drawn.task_B[place])
            rng = np.random.default_rng((seed, TRAINING, position.batches, place))
            made.append(makers[task].make(int(self._numbers[task][int(drawn.turn_B[place])]), rng))
        return stack_rows(made)

    def get_state(self) -> dict[str, Any]:
        """The position, for JSON."""
        return {"batches": self._position.batches, "taken": dict(zip(self._rows, self._position.taken, strict=True))}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position that `get_state` gave. Raises `UserError` if it is one of other tasks."""
        taken = state.get("taken", {})
        check(set(taken) == set(self._rows), f"the checkpoint is of a run on {', '.join(taken) or 'one task'}, not on the "
              f"tasks {', '.join(self._rows)}; take another --workdir")
        self._position = Position(state["batches"], tuple(taken[name] for name in self._rows))


def open_loader(prepared: Prepared, config: Config, own: np.ndarray | slice = slice(None)
                ) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of the training rows, with `get_state` and `set_state`; arguments are those of `train_loader`."""
    rows = rows_of_tasks(prepared, config, "train")
    if isinstance(config.data.task, Mixture):
        return MixtureLoader(rows, config, own)
    return train_loader(rows[""], config, own)


def rows_of_tasks(prepared: Prepared, config: Config, split: str) -> dict[str, Rows]:
    """The rows of a split by task, that of a single one being "".

    In a mixture every row carries `task`, the number of its task, and arrays that only other tasks have as zeros.
    """
    own = parts(config)
    check(set(own) == (set(prepared.tasks) or {""}), f"{prepared.folder}: holds prepared data of other tasks; delete the "
          "folder and start again")
    found = {name: make_rows(getattr(prepared.tasks[name] if name else prepared, split), prepared.tokenizer, each,
                             training=split == "train") for name, each in own.items()}
    if not isinstance(config.data.task, Mixture):
        return found
    blank = {}
    for rows in found.values():  # behind the last row are only zeros
        blank |= rows.make(rows.count, np.random.default_rng(0))
    return {name: _numbered(rows, task, blank) for task, (name, rows) in enumerate(found.items())}


def _numbered(rows: Rows, task: int, blank: Mapping[str, np.ndarray]) -> Rows:
    return Rows(rows.count, lambda index, rng: {**blank, **rows.make(index, rng), "task": np.int32(task)})


def _order(count: int, config: Config, task: int) -> grain.MapDataset:
    """The numbers of a task's rows, again and again; shuffled, tasks of equal rows have orders of their own."""
    numbers = grain.MapDataset.range(count)
    if config.data.shuffle:
        numbers = numbers.seed((config.seed + task) % 2**32).shuffle()
    return numbers.repeat()
