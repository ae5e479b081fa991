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
    """

    disk: str
    path: tuple[str, ...]
    layout: str
    layer: int | None = None
    at: tuple[int | None, ...] = ()
    axis: int = 0
    part: tuple[int, int] | None = None
    pairs: tuple[int, int] | None = None

    @property
    def sides(self) -> tuple[str, str]:
        """The two sides of the layout."""
        left, right = self.layout.split("->")
        return left.strip(), right.strip()


def piece_shape(tensor: Tensor, parameter_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the piece of a parameter (of one layer) that a tensor fills."""
    at = (*tensor.at, *(None,) * (len(parameter_shape) - len(tensor.at)))
    return tuple(size for size, index in zip(parameter_shape, at, strict=True) if index is None)


def disk_shape(tensor: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape on disk, of the part, for a piece of that shape."""
    left, right = tensor.sides
    sizes = dict(zip(right.split(), shape, strict=True)) | {"1": 1}
    groups = re.findall(r"\(([^)]*)\)|(\S+)", left)
    return tuple(math.prod(sizes[name] for name in (group or single).split()) for group, single in groups)


def to_piece(tensor: Tensor, on_disk: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """What fills the parameter, from the (part of the) tensor on disk."""
    right = tensor.sides[1]
    piece = rearrange(on_disk, tensor.layout, **{name: size for name, size in zip(right.split(), shape) if f"{name}" in
                                                 _grouped(tensor.sides[0])})
    return piece if tensor.pairs is None else _reorder(piece, *tensor.pairs, split=True)


def to_disk(tensor: Tensor, piece: np.ndarray) -> np.ndarray:
    """The (part of the) tensor on disk, from what fills the parameter."""
    left, right = tensor.sides
    if tensor.pairs is not None:
        piece = _reorder(piece, *tensor.pairs, split=False)
    return rearrange(piece, f"{right} -> {left}")


def _grouped(side: str) -> set[str]:
    return {name for group in re.findall(r"\(([^)]*)\)", side) for name in group.split()}


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
