"""Whether the memory of the devices will do, before a run begins: from the shapes alone, then from the compiled step."""

import contextlib
import ctypes
from pathlib import Path
from typing import Any, Callable, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moejax import sharding
from moejax.config import UserError, check
from moejax.train.setup import Setup

SHOWN = 5
"""Arrays that a message names."""


class Held(NamedTuple):
    """An array of the training state on the device that holds most of it.

    Attributes:
      name: with the part of the state that it is of.
      shape, dtype: of the whole array.
      bytes: on one device.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{','.join(map(str, self.shape))}] {size(self.bytes)}"


def size(count: float) -> str:
    """A number of bytes for people."""
    return next((f"{count / unit:,.2f} {name}" for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
                 if count >= unit / 10), f"{count} bytes")


def held(setup: Setup) -> list[Held]:
    """Every array of the training state, largest first."""
    found = []
    for (path, leaf), where in zip(jax.tree_util.tree_leaves_with_path(setup.shapes), jax.tree.leaves(setup.shardings),
                                   strict=True):
        part = jax.ShapeDtypeStruct(where.shard_shape(leaf.shape), leaf.dtype)
        found.append(Held(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, np.dtype(leaf.dtype).name,
                          sharding.bytes_of(part)))
    return sorted(found, key=lambda one: -one.bytes)


def free(mesh: Mesh) -> int | None:
    """Bytes that the fullest device of this process can still take; None where nobody tells.

    Devices that are simulated on CPUs share what the machine has left.
    """
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if any(device.platform == "cpu" for device in devices):
        left = host_memory()
        return None if left is None else left // len(devices)
    stats = [device.memory_stats() or {} for device in devices]
    if not stats or not all(one.get("bytes_limit", 0) > 0 for one in stats):
        return None
    return min(one["bytes_limit"] - one.get("bytes_in_use", 0) for one in stats)


def host_memory(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that Linux can give without swapping, to the container if there is one; None elsewhere."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else what this process has freed, and would use again, counts as taken
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None
    with contextlib.suppress(OSError, ValueError, KeyError):  # no container, or one without a limit
        parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Of what a container uses, files that were read or written go when others need the room.
        used = int((group / "memory.current").read_text()) - int(parts["inactive_file"]) - int(parts["active_file"])
        return min(available, int((group / "memory.max").read_text()) - used)
    return available


def check_state(setup: Setup, left: int | None) -> None:
    """Raises `UserError` if parameters and optimizer state alone are more than the bytes that a device has left.

    None checks nothing.
    """
    state = sum(one.bytes for one in held(setup))
    check(left is None or state <= left, f"parameters and optimizer state take {size(state)} on each device, and there are "
          f"{size(left or 0)}; {remedy(setup)}")


def check_step(setup: Setup, compile_step: Callable[[], Any], free_bytes: Callable[[], int | None]) -> None:
    """Raises `UserError` if a train step needs more than a device can take, beside the state that is there.

    Args:
      setup: of the run.
      compile_step: gives the step (`jax.stages.Compiled`). Compilers for TPUs themselves refuse what does not fit.
      free_bytes: gives the bytes of a device beside the state, or None to check nothing; called when the step is compiled.
    """
    less = ("; fewer rows at a time (config.train.microbatches, config.data.batch_size), config.train.remat, or: "
            + remedy(setup))
    try:
        analysis = compile_step().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        told = str(error).splitlines()[0]
        raise UserError(f"a train step does not fit the memory of the devices: {told}{less}") from None
    left = free_bytes()
    if analysis is None or left is None:
        return
    more = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    check(more <= left, f"a train step needs {size(more)} on each device beside its state, for gradients and activations, "
          f"and there are {size(left)}{less}")


def remedy(setup: Setup) -> str:
    """What to do, and the largest arrays."""
    return (f"split them over more devices (config.mesh.data, .expert, .model; now {sharding.in_words(setup.mesh)}), or "
            "make the model smaller. --config.train.faults.predict_memory=False tries all the same. Largest: "
            + "; ".join(map(str, held(setup)[:SHOWN])))
