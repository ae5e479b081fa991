"""Arrays of a checkpoint's item: their names, and how they are read, each by itself, into any sharding.

Orbax writes; this reads what it wrote, without it. Orbax reads an item as a whole and lets all processes meet while it
does, so that one bad array could neither be named nor be found by one process alone.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import tensorstore as ts

from moejax.checkpoint import digest
from moejax.checkpoint.manifest import Damaged

READERS = 8
"""Arrays read at a time; the host holds no more of them."""
CACHE = {"cache_pool": {"total_bytes_limit": 1 << 28}}
"""Bytes kept while an item is read: its index, which all arrays share, and parts that several devices have a share of."""
WRONG = (ValueError, KeyError, IndexError, NotImplementedError, OSError)
"""What tensorstore raises for files that are missing or damaged."""
Index = tuple[slice, ...]
T = TypeVar("T")


class Placed(NamedTuple):
    """An array where it belongs, and the hash of the part that this process answers for, uint32 [2]."""

    array: jax.Array
    digest: np.ndarray


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by the names under which Orbax stores them."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def read(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[dict[str, Placed], dict[str, str]]:
    """Reads arrays of an item of a checkpoint to where they belong.

    Args:
      folder: of the item.
      wanted: shape, type and sharding by name.

    Returns:
      What could be read, and what is wrong with the others, both by name.
    """
    context = ts.Context(CACHE)
    return _each(wanted, lambda name: _place(_open(folder, name, context), wanted[name]))


def look(folder: Path, name: str) -> tuple[tuple[int, ...], str]:
    """Shape and type of an array of an item, which is not read. Raises `Damaged`."""
    with _readable():
        store = _open(folder, name, ts.Context())
        return store.shape, store.dtype.name


def read_whole(folder: Path, name: str) -> np.ndarray:
    """An array of an item on the host. Raises `Damaged`."""
    with _readable():
        return _open(folder, name, ts.Context()).read().result()


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Turns what tensorstore raises into `Damaged`."""
    try:
        yield
    except WRONG as error:
        raise Damaged(f"cannot be read ({reason(error)})") from None


def _each(names: Mapping[str, Any], make: Callable[[str], T]) -> tuple[dict[str, T], dict[str, str]]:
    made, wrong = {}, {}

    def one(name: str) -> None:
        try:
            with _readable():
                made[name] = make(name)
        except Damaged as error:
            wrong[name] = str(error)

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(one, names))
    return made, wrong


def _open(folder: Path, name: str, context: ts.Context) -> ts.TensorStore:
    return ts.open({"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"},
                                                  "path": f"{name}/"}}, open=True, read=True, context=context).result()


def _place(store: ts.TensorStore, wanted: jax.ShapeDtypeStruct) -> Placed:
    """Reads what this process needs of an array, each region once, and puts it on its devices."""
    dtype = np.dtype(wanted.dtype)
    if store.shape != wanted.shape or store.dtype.numpy_dtype != dtype:
        raise Damaged(f"has shape {store.shape} and type {store.dtype.name}, where {wanted.shape} and {dtype.name} are "
                      "wanted")
    everywhere = wanted.sharding.devices_indices_map(wanted.shape)
    owners = {}  # of each region the device, of all processes, that answers for it
    for device, index in everywhere.items():
        if (region := _region(index, wanted.shape)) not in owners or device.id < owners[region].id:
            owners[region] = device
    here = wanted.sharding.addressable_devices
    mine = {device: _region(index, wanted.shape) for device, index in everywhere.items() if device in here}
    values = {region: store[tuple(slice(*ends) for ends in region)].read() for region in set(mine.values())}
    values = {region: value.result() for region, value in values.items()}
    hashes = [digest.on_host(value, [begin for begin, _ in region], wanted.shape)
              for region, value in values.items() if owners[region] in here]
    pieces = [jax.device_put(values[region], device) for device, region in mine.items()]
    return Placed(jax.make_array_from_single_device_arrays(wanted.shape, wanted.sharding, pieces),
                  digest.combine([np.zeros(2, np.uint32), *hashes]))


def _region(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """An index of slices as pairs of begin and end, which can be keys."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def reason(error: Exception) -> str:
    """What matters of an error of the system or of tensorstore, whose messages are long with paths and specifications."""
    message = " ".join(str(error).split())
    if code := re.search(r"os_error_code='(\d+)'", message):
        return os.strerror(int(code[1]))
    told = message.partition(" [tensorstore_spec")[0].partition(" [source")[0].rpartition('": ')[2][:200]
    return getattr(error, "strerror", None) or told or type(error).__name__
