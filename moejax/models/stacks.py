"""How blocks are stacked for scanning: runs of a repeating pattern of blocks."""

from functools import lru_cache
from typing import NamedTuple

from moejax.config import ModelConfig, MoEConfig, check


class Kind(NamedTuple):
    """What a block is: whether it holds experts, its kind of attention, and whether it also attends to an encoder."""

    sparse: bool
    attention: str
    cross: bool = False


class Stack(NamedTuple):
    """`repeats` times a run of blocks, of which each is of its own kind."""

    kinds: tuple[Kind, ...]
    repeats: int

    @property
    def sparse(self) -> tuple[bool, ...]:
        """Which blocks of the run hold experts."""
        return tuple(kind.sparse for kind in self.kinds)


class Trunk(NamedTuple):
    """A way through blocks from tokens to vectors.

    Attributes:
      prefix: what the names of its parameters begin with.
      causal: whether no token sees a later one.
      cross: whether its blocks also attend to what an encoder made.
      layers: number of blocks.
    """

    prefix: str
    causal: bool
    cross: bool
    layers: int


HEADS = "_heads"
"""What the name of a block ends with where its router of attention heads is meant, beside that of its experts."""


def routers(model: ModelConfig, stack: Stack) -> list[str]:
    """Names under which the routers of a stack's run have their state and tell their records."""
    kinds = ("", HEADS) if model.architecture.expert_heads else ("",)
    return [f"block_{j}{kind}" for j, sparse in enumerate(stack.sparse) if sparse for kind in kinds]


ENCODER = "encoder_"
"""Prefix of the encoder before a decoder. The only trunk of a model, and a decoder, have none."""


def trunks(model: ModelConfig) -> tuple[Trunk, ...]:
    """The trunks of a model in the order in which they run."""
    own = Trunk("", model.kind != "encoder", model.kind == "encoder_decoder", model.layers)
    return (Trunk(ENCODER, False, False, model.encoder_layers or model.layers), own) if own.cross else (own,)


def kinds(model: ModelConfig, moe: MoEConfig) -> tuple[Kind, ...]:
    """The kind of every block, first block first, an encoder's before its decoder's.

    Without a list, block i of a trunk is sparse if i >= first_dense and (i - first_dense + 1) is a multiple of `every`;
    `every` 0 means none.
    """
    return tuple(kind for trunk in trunks(model) for kind in trunk_kinds(model, moe, trunk))


def trunk_kinds(model: ModelConfig, moe: MoEConfig, trunk: Trunk) -> tuple[Kind, ...]:
    """The kind of every block of a trunk."""
    pattern, listed, named = model.architecture.attention, moe.sparse_blocks, "config.moe.sparse_blocks"
    if trunk.prefix == ENCODER and model.architecture.encoder_sparse_blocks is not None:
        listed, named = model.architecture.encoder_sparse_blocks, "config.model.architecture.encoder_sparse_blocks"
    check(not listed or max(listed) < trunk.layers,
          f"{named}={listed} names blocks beyond the {trunk.layers} that there are (config.model."
          f"{'encoder_' if trunk.prefix else ''}layers)")

    def sparse(i: int) -> bool:
        if not moe.every:
            return False
        if listed is not None:
            return i in listed
        return i >= moe.first_dense and (i - moe.first_dense + 1) % moe.every == 0

    return tuple(Kind(sparse(i), pattern[i % len(pattern)], trunk.cross) for i in range(trunk.layers))


def plan_stacks(model: ModelConfig, moe: MoEConfig) -> dict[str, Stack]:
    """All stacks by name, in the order in which they run."""
    return {name: stack for trunk in trunks(model) for name, stack in trunk_stacks(model, moe, trunk).items()}


def trunk_stacks(model: ModelConfig, moe: MoEConfig, trunk: Trunk) -> dict[str, Stack]:
    """A trunk's blocks in stacks that can be scanned: the fewest blocks to compile, in the fewest stacks."""
    return {f"{trunk.prefix}stack_{i}": stack for i, stack in enumerate(_plan(trunk_kinds(model, moe, trunk)))}


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
    """Where each block's parameters lie, in the order of `kinds`: stack, block of the run, repeat."""
    return [(name, f"block_{j}", repeat) for name, stack in plan_stacks(model, moe).items()
            for repeat in range(stack.repeats) for j in range(len(stack.kinds))]


def sparse_places(model: ModelConfig, moe: MoEConfig) -> list[tuple[str, str, int]]:
    """Those of the blocks with experts."""
    return [place for place, kind in zip(places(model, moe), kinds(model, moe)) if kind.sparse]
