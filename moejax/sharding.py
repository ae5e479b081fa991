"""Where arrays lie: one table from logical axes to mesh axes, the mesh itself, and checks at start-up."""

import math
from typing import Any, Mapping, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax import axes
from moejax.config import MeshConfig, check, nearest

RULES: dict[str, tuple[str, ...]] = {
    "batch": axes.BATCH_AXES,
    "length": (axes.CONTEXT,),
    "embed": (axes.DATA,),
    "q_heads": (axes.MODEL,),
    "kv_heads": (axes.MODEL,),
    "head_dim": (),
    "vocab": (axes.MODEL,),
    "layers": (),
    "experts": (axes.EXPERT,),
    "ffn": (axes.MODEL,),
    "expert_ffn": (axes.MODEL,),
    "gate_up": (),
    "router": (),
    "latent": (),
    "positions": (),
    "classes": (),
    "rank": (),
}
"""Logical axis -> the mesh axes over which it is split."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh of a config, with all five axes; -1 takes the devices that are left.

    Raises:
      UserError: the axes' sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(config, name) for name in axes.MESH_AXES}
    check(0 not in sizes.values(), f"config.mesh: an axis has size 0: {sizes}")
    free = [name for name, size in sizes.items() if size == -1]
    check(len(free) <= 1, f"config.mesh: only one axis may be -1, not {' and '.join(free)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        check(len(devices) % fixed == 0, f"config.mesh: {fixed} (product of the axes that are set) does not divide the "
              f"{len(devices)} devices, so config.mesh.{free[0]}=-1 has no value")
        sizes[free[0]] = len(devices) // fixed
    total = math.prod(sizes.values())
    check(total == len(devices), f"config.mesh: {' x '.join(f'{n}={s}' for n, s in sizes.items())} needs {total} "
          f"devices, but there are {len(devices)}; set one axis to -1")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def spec(logical: Sequence[str | None]) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical axes.

    Raises:
      ValueError: an unknown logical axis, or one mesh axis for two dimensions.
    """
    entries = []
    for name in logical:
        if name is not None and name not in RULES:
            raise ValueError(f"unknown logical axis {name!r}{nearest(name, list(RULES))}")
        entries.append(RULES[name] or None if name is not None else None)
    used = [axis for entry in entries if entry for axis in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(logical)} use a mesh axis twice: {used}")
    return PartitionSpec(*entries)


def shardings(logical: Any, mesh: Mesh) -> Any:
    """A tree of `NamedSharding` for a tree whose leaves are tuples of logical axes."""
    return jax.tree.map(lambda names: NamedSharding(mesh, spec(names)), logical, is_leaf=is_axes)


def is_axes(leaf: Any) -> bool:
    """Whether a tree node is the tuple of logical axes of one array."""
    return isinstance(leaf, tuple) and all(name is None or isinstance(name, str) for name in leaf)


class Placement(NamedTuple):
    """How one array of a tree lies on a mesh.

    Attributes:
      name: its path in the tree.
      shape: of the whole array.
      spec: the mesh axes over which each dimension is split.
      parts: pieces into which it is split; each lies on `mesh.size / parts` devices.
      bytes: on one device.
    """

    name: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    parts: int
    bytes: int


def placements(shapes: Any, logical: Any, mesh: Mesh) -> list[Placement]:
    """The `Placement` of every array of a tree.

    Raises:
      UserError: a dimension that the mesh does not divide; the message names the parameter, dimension and mesh axes.
      ValueError: an unknown logical axis, or one mesh axis for two dimensions; the message names the parameter.
    """
    flat_logical, placed = jax.tree.leaves(logical, is_leaf=is_axes), []
    for (path, shape), names in zip(jax.tree_util.tree_leaves_with_path(shapes), flat_logical, strict=True):
        parameter, parts = jax.tree_util.keystr(path, simple=True, separator="/"), 1
        try:
            partition = spec(names)
        except ValueError as error:
            raise ValueError(f"parameter {parameter}: {error}") from None
        for length, name in zip(shape.shape, names, strict=True):
            split = RULES[name] if name else ()
            check(length % size(mesh, split) == 0, f"parameter {parameter}: dimension {name}={length} cannot be split over "
                  f"mesh axis {', '.join(split)} of size {size(mesh, split)}; change config.mesh or this size")
            parts *= size(mesh, split)
        placed.append(Placement(parameter, shape.shape, partition, parts, bytes_of(shape) // parts))
    return placed


def validate(placed: Sequence[Placement], mesh: Mesh, replicated_mib: float) -> None:
    """Raises `UserError` if an array of more than `replicated_mib` MiB lies whole on every device of a mesh."""
    for name, _, _, parts, bytes_ in placed:
        check(mesh.size == 1 or parts > 1 or bytes_ <= replicated_mib * 2**20,
              f"parameter {name}: its {bytes_ / 2**20:,.0f} MiB would lie whole on each of the {mesh.size} devices; split "
              "it with config.mesh.data or config.mesh.model, or raise config.mesh.replicated_mib")


def table(placed: Sequence[Placement]) -> str:
    """Parameter, shape, spec and bytes on one device, a line each, and the sum."""
    rows = [("parameter", "shape", "split over", "pieces", "bytes on a device")]
    for name, shape, partition, parts, bytes_ in placed:
        split = ", ".join("+".join(entry) if isinstance(entry, tuple) else entry or "-" for entry in partition)
        rows.append((name, "x".join(map(str, shape)), split, str(parts), f"{bytes_:,}"))
    rows.append(("in all", "", "", "", f"{sum(p.bytes for p in placed):,}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([cell.ljust(width) for cell, width in zip(row[:3], widths)]
                               + [cell.rjust(width) for cell, width in zip(row[3:], widths[3:])]).rstrip() for row in rows)


def current_mesh() -> Any:
    """The mesh set by `jax.set_mesh`, as seen while tracing; None if there is none or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x: Array, *logical: str | None) -> Array:
    """Tells the compiler where an activation lies; no mesh, no effect. One name per dimension.

    Raises:
      ValueError: a dimension that its mesh axes do not divide (the compiler would replicate it in silence).
    """
    partition, mesh = spec(logical), current_mesh()
    if mesh is None:
        return x
    for length, name in zip(x.shape, logical, strict=True):
        if length % size(mesh, RULES[name] if name else ()):
            raise ValueError(f"array of shape {x.shape} cannot be split as {logical} over {dict(mesh.shape)}")
    return jax.lax.with_sharding_constraint(x, partition)


def varying_over(x: Array, mesh_axes: Sequence[str]) -> Array:
    """Inside `jax.shard_map`, marks x as different on each device along these axes; its gradient is then summed."""
    wanted = tuple(axis for axis in mesh_axes if axis not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, wanted, to="varying") if wanted else x


def varying_like(x: Array, other: Array) -> Array:
    """Marks x as different along the axes along which `other` is; outside `jax.shard_map` x itself."""
    return varying_over(x, tuple(jax.typeof(other).mat.varying))


def size(mesh: Any, mesh_axes: Sequence[str]) -> int:
    """Product of the sizes of some mesh axes."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes)


def in_words(mesh: Mesh) -> str:
    """The axes that split something, with their sizes."""
    return " x ".join(f"{name}={count}" for name, count in mesh.shape.items() if count > 1) or "one device"


def divisible(count: int, mesh: Mesh, mesh_axes: Sequence[str], what: str) -> None:
    """Raises `UserError` unless `count` splits evenly over the mesh axes."""
    parts = size(mesh, mesh_axes)
    check(count % parts == 0, f"{what}={count} cannot be split over the mesh axes {', '.join(mesh_axes)} of {parts} "
          "devices together")


def batch_rows(mesh: Mesh, count: int) -> np.ndarray:
    """The rows of a batch of `count`, or parts of rows, that the devices of this process hold, in order."""
    split = NamedSharding(mesh, spec(("batch",)))
    return np.unique([np.arange(count)[index] for index in split.addressable_devices_indices_map((count,)).values()])


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
    """The rows of this process (`batch_rows`), whole, as global arrays [B, L], or [B] or [B, C], on the mesh.

    Arrays of whole numbers and truth values with two dimensions have a length, which the context axis splits.

    A mesh may give a row to several processes, or each of them a part of its length, so the rows of a process need not
    be B over the number of processes, nor lie together.
    """
    parts = size(mesh, RULES["batch"])
    own = batch_rows(mesh, parts)

    def put(rows_bX: np.ndarray) -> Array:
        height = len(rows_bX) // len(own)
        long = rows_bX.ndim == 2 and rows_bX.dtype.kind != "f"

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            first = np.searchsorted(own, (index[0].start or 0) // height) * height
            return rows_bX[first:first + height, *index[1:]]

        return jax.make_array_from_callback((height * parts, *rows_bX.shape[1:]), NamedSharding(
            mesh, spec(("batch", "length") if long else ("batch",))), piece)

    return {name: put(rows_bX) for name, rows_bX in batch.items()}


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays (or shapes) of a tree, as if on one device."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def flat(tree: Any) -> dict[tuple[str, ...], Any]:
    """The leaves of nested dicts by path."""
    return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
