"""Where arrays lie: one table from logical axes to mesh axes, the mesh itself, and checks at start-up."""

import math
from typing import Any, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax import axes
from moejax.config import MeshConfig, UserError, check, nearest

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


def validate(shapes: Any, logical: Any, mesh: Mesh) -> None:
    """Checks that every array of a tree can be split as the rules say.

    Raises:
      UserError: a dimension that the mesh does not divide; the message names the parameter, dimension and mesh axes.
      ValueError: an unknown logical axis, or one mesh axis for two dimensions; the message names the parameter.
    """
    flat_logical = jax.tree.leaves(logical, is_leaf=is_axes)
    for (path, shape), names in zip(jax.tree_util.tree_leaves_with_path(shapes), flat_logical, strict=True):
        parameter = f"parameter {jax.tree_util.keystr(path, simple=True, separator='/')}"
        try:
            spec(names)
        except ValueError as error:
            raise ValueError(f"{parameter}: {error}") from None
        for length, name in zip(shape.shape, names, strict=True):
            split = RULES[name] if name else ()
            if length % size(mesh, split):
                raise UserError(f"{parameter}: dimension {name}={length} cannot be split over mesh axis {', '.join(split)} "
                                f"of size {size(mesh, split)}; change config.mesh or this size")


def current_mesh() -> Any:
    """The mesh set by `jax.set_mesh`, as seen while tracing, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def constrain(x: Array, *logical: str | None) -> Array:
    """Tells the compiler where an activation lies; no mesh, no effect. One name per dimension.

    Raises:
      ValueError: a dimension that its mesh axes do not divide (the compiler would replicate it in silence).
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    partition = spec(logical)
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


def divisible(count: int, mesh: Mesh, mesh_axes: Sequence[str], what: str) -> None:
    """Raises `UserError` unless `count` splits evenly over the mesh axes."""
    parts = size(mesh, mesh_axes)
    check(count % parts == 0, f"{what}={count} cannot be split over the mesh axes {', '.join(mesh_axes)} of {parts} "
          "devices together")


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays (or shapes) of a tree, as if on one device."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
