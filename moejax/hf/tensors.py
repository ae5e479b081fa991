"""One line of a family's table: a tensor on disk, where it lies in the model, and how its dimensions are arranged.

Read one way a table imports, read the other way it exports.
"""

import math
import re
from typing import Iterable, NamedTuple, Sequence

import numpy as np
from einops import rearrange


class Tensor(NamedTuple):
    """A tensor on disk, or a part of one.

    Attributes:
      disk: its name.
      path: of the parameter: within its block, or of the whole tree if `layer` is None. The first part is `params`, or
        `router` for what is a router's state.
      layout: `dimensions on disk -> dimensions of the parameter`, as einops writes them; on the right there are no groups.
      layer: number of the block.
      at: index of the parameter at which the piece lies; None takes a dimension whole; missing ones are whole.
      axis: of the tensor on disk along which this is only a part.
      part: (first, behind the last) index along that axis; None is all of it.
      pairs: (axis, first) of the piece: from there on, dimensions on disk are interleaved pairs for the rotation, where
        the model has first all first ones, then all second ones.
      unread: shape of a tensor on disk, or of the part of one, that fills no parameter; see `unread`.
    """

    disk: str
    path: tuple[str, ...]
    layout: str
    layer: int | None = None
    at: tuple[int | None, ...] = ()
    axis: int = 0
    part: tuple[int, int] | None = None
    pairs: tuple[int, int] | None = None
    unread: tuple[int, ...] | None = None

    @property
    def sides(self) -> tuple[str, str]:
        """The two sides of the layout."""
        left, right = self.layout.split("->")
        return left.strip(), right.strip()


def unread(disk: str, shape: tuple[int, ...], part: tuple[int, int] | None = None) -> Tensor:
    """A tensor, or a part of one along its first axis, that other libraries allot and nothing computes with.

    What is there on disk does not count, a whole tensor may be missing, and zeros are written.
    """
    return Tensor(disk, (), "", part=part, unread=shape)


def needed(lines: Iterable[Tensor]) -> bool:
    """Whether something of a tensor on disk fills a parameter."""
    return any(line.unread is None for line in lines)


Index = tuple[int | None, ...]
"""For the first dimensions of a parameter an index, or None for all of a dimension; those behind are whole."""


def locate(tensor: Tensor, places: Sequence[tuple[str, str, int]]) -> tuple[tuple[str, ...], Index]:
    """Path of the parameter in the tree of all variables, and where in it the piece lies.

    Args:
      tensor: a line of a table.
      places: stack, block and repeat of every layer, see `moejax.models.stacks.places`.
    """
    if tensor.layer is None:
        return tensor.path, tensor.at
    stack, block, repeat = places[tensor.layer]
    return (tensor.path[0], stack, block, *tensor.path[1:]), (repeat, *tensor.at)


def slices(index: Index) -> tuple[int | slice, ...]:
    """The index as numpy takes it."""
    return tuple(slice(None) if i is None else i for i in index)


def piece_shape(index: Index, parameter_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the piece of a parameter that lies at an index."""
    whole = (*index, *(None,) * (len(parameter_shape) - len(index)))
    return tuple(size for size, i in zip(parameter_shape, whole, strict=True) if i is None)


def disk_shape(tensor: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape on disk, of the part, for a piece of that shape."""
    left, right = tensor.sides
    sizes = dict(zip(right.split(), shape, strict=True)) | {"1": 1}
    groups = re.findall(r"\(([^)]*)\)|(\S+)", left)
    return tuple(math.prod(sizes[name] for name in (group or single).split()) for group, single in groups)


def to_piece(tensor: Tensor, on_disk: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """What fills the parameter, from the (part of the) tensor on disk."""
    left, right = tensor.sides
    grouped = {name for group in re.findall(r"\(([^)]*)\)", left) for name in group.split()}
    piece = rearrange(on_disk, tensor.layout, **{name: n for name, n in zip(right.split(), shape) if name in grouped})
    return piece if tensor.pairs is None else _reorder(piece, *tensor.pairs, split=True)


def to_disk(tensor: Tensor, piece: np.ndarray) -> np.ndarray:
    """The (part of the) tensor on disk, from what fills the parameter."""
    left, right = tensor.sides
    if tensor.pairs is not None:
        piece = _reorder(piece, *tensor.pairs, split=False)
    return rearrange(piece, f"{right} -> {left}")


def _reorder(piece: np.ndarray, axis: int, first: int, split: bool) -> np.ndarray:
    """Interleaved pairs to two halves (`split`), or back, along an axis from an index on."""
    piece = np.moveaxis(piece, axis, -1)
    pairs = piece[..., first:]
    order = np.arange(pairs.shape[-1]).reshape(*((-1, 2) if split else (2, -1))).T.reshape(-1)
    return np.moveaxis(np.concatenate([piece[..., :first], pairs[..., order]], axis=-1), -1, axis)


def by_disk(table: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """The lines of a table by the name on disk."""
    grouped: dict[str, list[Tensor]] = {}
    for tensor in table:
        grouped.setdefault(tensor.disk, []).append(tensor)
    return grouped
