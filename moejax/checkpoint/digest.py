"""A content hash of an array that does not depend on how it is cut over devices and processes.

Each 32-bit word of the array is mixed with its index in the whole array, and what comes out is summed modulo 2**32 in two
lanes. Sums of parts add up to the sum of the whole, so that devices hash what they hold, in one pass and without a copy to
the host, and any other topology can check it. The mixing of one index is a bijection of the word, so that a change of a
single word, one bit or all 32, always changes the first lane; any other damage stays unseen with probability 2**-64. It is
against faults, not against forgers.
"""

import math
from functools import partial
from typing import Any, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

_GOLDEN, _FIRST, _SECOND, _OTHER = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x846CA68B
_BLOCK = 1 << 16
"""Words hashed at once on the host: their copies stay in the cache."""


def on_devices(a: jax.Array) -> list[jax.Array]:
    """The hashes of the parts of an array for which this process answers, each on the device where the part is.

    Nothing is summed over devices: on CPUs many programs at once that do can stand still, each waiting for a thread that
    another holds.

    Args:
      a: of any type of 1, 2, 4 or 8 bytes.

    Returns:
      uint32, 2 numbers each, for `own_part`; those of all processes add up to the hash of the array.
    """
    if all(device.platform == "cpu" for device in a.sharding.device_set):  # there nothing needs to compile
        return [on_host(np.asarray(shard.data), _begin(shard.index, a.shape), a.shape)
                for shard in a.addressable_shards if shard.replica_id == 0]
    return on_accelerators(a)


def on_accelerators(a: jax.Array) -> list[jax.Array]:
    """What `on_devices` does where arrays are not on the host."""
    if not isinstance(a.sharding, NamedSharding):
        return [_of_part(a, np.zeros(a.ndim + 1, np.uint32), a.shape)]
    mesh, index_of = a.sharding.mesh, a.sharding.devices_indices_map(a.shape)
    begins = np.array([[*_begin(index_of[device], a.shape), 0] for device in mesh.devices.flat], np.uint32)
    one_each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    found = _of_parts(a, jax.make_array_from_callback(begins.shape, one_each, begins.__getitem__), a.sharding)
    by_device = {shard.device: shard.data for shard in found.addressable_shards}
    return [by_device[shard.device] for shard in a.addressable_shards if shard.replica_id == 0]


def _begin(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[int]:
    """Where a part of an array begins."""
    return [part.indices(size)[0] for part, size in zip(index, shape, strict=True)]


@partial(jax.jit, static_argnames="placed")
def _of_parts(a: jax.Array, begins: jax.Array, placed: NamedSharding) -> jax.Array:
    """The hash of each device's part, uint32 [devices, 2]."""
    axes = PartitionSpec(placed.mesh.axis_names)
    return jax.shard_map(lambda part, begin: _of_part(part, begin[0], a.shape)[None], mesh=placed.mesh,
                         in_specs=(placed.spec, axes), out_specs=axes, check_vma=False)(a, begins)


@partial(jax.jit, static_argnames="shape")
def _of_part(a: jax.Array, begin: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The hash of a part that begins there in an array of that shape."""
    if a.dtype.itemsize == 1:
        word = a.astype(jnp.uint8) if a.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(a, jnp.uint8)
    elif a.dtype.itemsize == 2:
        word = jax.lax.bitcast_convert_type(a, jnp.uint16)
    else:
        word = jax.lax.bitcast_convert_type(a, jnp.uint32)  # of 8 bytes: adds a dimension of 2, the low half first
    word = word.astype(jnp.uint32)
    index = jnp.zeros(word.shape, jnp.uint32)
    for axis, stride in enumerate(_strides((*shape, *word.shape[len(shape):]))):
        index += (begin[axis] + jax.lax.broadcasted_iota(jnp.uint32, word.shape, axis)) * np.uint32(stride)
    h = word + index * np.uint32(_GOLDEN)
    h = (h ^ (h >> 16)) * np.uint32(_FIRST)
    h = (h ^ (h >> 13)) * np.uint32(_SECOND)
    h ^= h >> 16
    other = ((h ^ (h >> 15)) * np.uint32(_OTHER)) ^ h
    # One reduction of both lanes: two would read the array twice, and on CPUs each took ten times as long.
    zero = np.uint32(0)
    return jnp.stack(jax.lax.reduce((h, other), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]),
                                    tuple(range(word.ndim))))


def on_host(part: np.ndarray, begin: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> np.ndarray:
    """The hash of a rectangular part of an array; those of parts that make up the whole add up to its hash.

    Args:
      part: the values.
      begin: index of its first value in the whole; None if it is the whole.
      shape: of the whole.

    Returns:
      uint32 [2].
    """
    begin, shape = (0,) * part.ndim if begin is None else tuple(begin), part.shape if shape is None else tuple(shape)
    size, width = part.shape, max(part.dtype.itemsize // 4, 1)
    words = np.ascontiguousarray(part).reshape(-1).view({1: np.uint8, 2: np.uint16}.get(part.dtype.itemsize, np.uint32))
    begin, size, shape = (0, *begin, 0), (1, *size, width), (1, *shape, width)
    while len(size) > 2 and size[-1] == shape[-1]:  # rows that lie one behind the other are one row
        begin = (*begin[:-2], begin[-2] * shape[-1])
        size, shape = (*size[:-2], size[-2] * size[-1]), (*shape[:-2], shape[-2] * shape[-1])
    rows = _rows(begin[:-1], size[:-1], _strides(shape)[:-1])
    total = np.zeros(2, np.uint32)
    words = words.reshape(len(rows), size[-1])
    for block, index in _blocks(words, rows, begin[-1]):
        total += _mixed(block.astype(np.uint32), index)
    return total


def combine(parts: Sequence[Any]) -> np.ndarray:
    """The hash of a whole from those of its parts, [..., 2] each."""
    return np.sum(np.asarray(parts, np.uint32), axis=0, dtype=np.uint32)


def own_part(parts: Sequence[Any]) -> np.ndarray:
    """What this process adds to the hash of an array, from what `on_devices` gave; waits for it."""
    return combine([np.zeros(2, np.uint32), *(np.asarray(part).reshape(2) for part in parts)])


def text(digest: Any) -> str:
    """16 hexadecimal digits."""
    return "".join(f"{int(lane):08x}" for lane in np.asarray(digest))


def of_text(digits: str) -> np.ndarray:
    """The hash that `text` wrote."""
    return np.array([int(digits[:8], 16), int(digits[8:], 16)], np.uint32)


def _strides(shape: Sequence[int]) -> list[int]:
    """Of each axis in the index of a row-major array, modulo 2**32."""
    return [math.prod(shape[axis + 1:]) % 2**32 for axis in range(len(shape))]


def _rows(begin: Sequence[int], size: Sequence[int], strides: Sequence[int]) -> np.ndarray:
    """Indices of the rows of a part in the whole, modulo 2**32, in order."""
    index = np.zeros(1, np.uint32)
    for first, length, stride in zip(begin, size, strides, strict=True):
        steps = (first + np.arange(length, dtype=np.uint64)) * np.uint64(stride)
        index = (index[:, None] + steps.astype(np.uint32)).reshape(-1)
    return index


def _blocks(words: np.ndarray, rows: np.ndarray, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts words [rows, columns] into blocks of at most `_BLOCK`, each with the indices of its words."""
    columns = max(words.shape[1], 1)
    high, wide = max(_BLOCK // columns, 1), min(columns, _BLOCK)
    for left in range(0, words.shape[1], wide):
        across = (first + left + np.arange(min(wide, words.shape[1] - left), dtype=np.uint64)).astype(np.uint32)
        for top in range(0, len(rows), high):
            yield words[top:top + high, left:left + wide], rows[top:top + high, None] + across


def _mixed(word: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Both lanes of a block; works in place, for speed."""
    index *= np.uint32(_GOLDEN)
    word += index
    for shift, factor in ((16, _FIRST), (13, _SECOND), (16, 1)):
        np.right_shift(word, np.uint32(shift), out=index)
        word ^= index
        word *= np.uint32(factor)
    np.right_shift(word, np.uint32(15), out=index)
    index ^= word
    index *= np.uint32(_OTHER)
    index ^= word
    return np.array([lane.sum(dtype=np.uint32) for lane in (word, index)])
