"""How blocks are stacked for scanning: runs of a repeating pattern of dense and sparse blocks."""

from typing import NamedTuple

from moejax.config import MoEConfig


class Stack(NamedTuple):
    """`repeats` times a run of blocks; `sparse[j]` tells whether the j-th block of the run holds experts."""

    sparse: tuple[bool, ...]
    repeats: int


def plan_stacks(layers: int, moe: MoEConfig) -> tuple[Stack, ...]:
    """Splits the blocks into stacks that can be scanned.

    Block i is sparse if i >= first_dense and (i - first_dense + 1) is a multiple of `every`; `every` 0 means none.

    Args:
      layers: number of blocks.
      moe: `every` and `first_dense`.

    Returns:
      Stacks whose sizes add up to `layers`.
    """
    every = moe.every or 1
    leading = min(moe.first_dense, layers) if moe.every else 0
    repeats, rest = divmod(layers - leading, every)
    period = (False,) * (every - 1) + (bool(moe.every),)
    stacks = (Stack((False,), leading), Stack(period, repeats), Stack((False,), rest))
    return tuple(stack for stack in stacks if stack.repeats)
