"""How blocks are stacked for scanning: runs of a repeating pattern of blocks."""

from functools import lru_cache
from typing import NamedTuple

from moejax.config import ModelConfig, MoEConfig, check


class Kind(NamedTuple):
    """What a block is: whether it holds experts, and its kind of attention."""

    sparse: bool
    attention: str


class Stack(NamedTuple):
    """`repeats` times a run of blocks, of which each is of its own kind."""

    kinds: tuple[Kind, ...]
    repeats: int

    @property
    def sparse(self) -> tuple[bool, ...]:
        """Which blocks of the run hold experts."""
        return tuple(kind.sparse for kind in self.kinds)


def kinds(model: ModelConfig, moe: MoEConfig) -> tuple[Kind, ...]:
    """The kind of every block, first block first.

    Without a list, block i is sparse if i >= first_dense and (i - first_dense + 1) is a multiple of `every`; `every` 0
    means none.
    """
    if moe.sparse_blocks is not None:
        check(not moe.sparse_blocks or max(moe.sparse_blocks) < model.layers,
              f"config.moe.sparse_blocks={moe.sparse_blocks} names blocks beyond config.model.layers={model.layers}")
    pattern = model.architecture.attention

    def sparse(i: int) -> bool:
        if not moe.every:
            return False
        if moe.sparse_blocks is not None:
            return i in moe.sparse_blocks
        return i >= moe.first_dense and (i - moe.first_dense + 1) % moe.every == 0

    return tuple(Kind(sparse(i), pattern[i % len(pattern)]) for i in range(model.layers))


def plan_stacks(model: ModelConfig, moe: MoEConfig) -> tuple[Stack, ...]:
    """Splits the blocks into stacks that can be scanned: the fewest blocks to compile, in the fewest stacks."""
    return _plan(kinds(model, moe))


@lru_cache
def _plan(blocks: tuple[Kind, ...]) -> tuple[Stack, ...]:
    best: list[tuple[int, int, tuple[Stack, ...]]] = [(0, 0, ())]
    for end in range(1, len(blocks) + 1):
        options = []
        for period in range(1, end + 1):
            run, start = blocks[end - period:end], end
            while start >= period and blocks[start - period:start] == run:
                start -= period
                compiled, stacks, before = best[start]
                options.append((compiled + period, stacks + 1, (*before, Stack(run, (end - start) // period))))
        best.append(min(options, key=lambda option: option[:2]))
    return best[-1][2]


def places(model: ModelConfig, moe: MoEConfig) -> list[tuple[str, str, int]]:
    """Where each block's parameters lie, first block first: stack, block of the run, repeat."""
    return [(f"stack_{i}", f"block_{j}", repeat) for i, stack in enumerate(plan_stacks(model, moe))
            for repeat in range(stack.repeats) for j in range(len(stack.kinds))]
