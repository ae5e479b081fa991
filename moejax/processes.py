"""Several processes as one run: how they meet, and how they come to the same decision.

What one process alone finds out (a signal, a file that is missing) must be known to all before any of them acts on it,
or the others wait for ever in the next computation that they share.
"""

import atexit
import contextlib
import os
import re
import threading
import urllib.request
from typing import Any, Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.config import UserError, check

METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
THREADS = 32
"""Least number of threads for XLA:CPU in one of several processes: eight for each of four devices.

On few cores XLA takes one for each device. Two processes then stood still when one of them paused for a moment: the
devices of one waited in a collective, of the other some there and some for a place to run, with no thread left.
"""


def start(coordinator: str | None, count: int | None, index: int | None, seconds: int) -> None:
    """Joins this process with the others of its run, if it has some; call it before jax touches a device.

    Args:
      coordinator: HOST:PORT of process 0. Without it, Slurm or a TPU pod may say that there are other processes.
      count: of all processes; 1 keeps this one alone, whatever the cluster says.
      index: of this one, from 0.
      seconds: how long to wait for the others.

    Raises:
      UserError: only some of the three are given, they are wrong, or not all processes came.
    """
    given = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if in_cluster(os.environ, tpu_metadata):
            _join(seconds, "this job's coordinator", {})
        return
    check(not missing, f"{' and '.join(missing)} missing; give all three of {', '.join(given)}, or none")
    host, _, port = coordinator.rpartition(":")
    check(bool(host) and port.isdecimal() and 0 < int(port) < 1 << 16,
          f"--coordinator={coordinator} must have the form HOST:PORT, e.g. 10.0.0.2:8476")
    check(count >= 1, f"--num_processes={count} must be at least 1")
    check(0 <= index < count, f"--process_id={index} must be at least 0 and less than --num_processes={count}")
    if count > 1:
        _join(seconds, f"--coordinator={coordinator}", {
            "coordinator_address": coordinator, "num_processes": count, "process_id": index,
            "cluster_detection_method": "deactivate"})


def in_cluster(environ: Mapping[str, str], metadata: Callable[[str], str]) -> bool:
    """Whether Slurm (a step of srun) or a TPU pod started this process as one of several.

    Args:
      environ: environment variables.
      metadata: key -> what the metadata server of a TPU VM knows; empty where there is none.
    """
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return True
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    slices = environ.get("MEGASCALE_NUM_SLICES")
    if workers is None:
        workers = metadata("worker-network-endpoints")
    if slices is None:
        found = re.search(r"MEGASCALE_NUM_SLICES: *'?(\d+)", metadata("tpu-env"))
        slices = found[1] if found else 1
    return len(workers.split(",")) * int(slices) > 1


def tpu_metadata(key: str) -> str:
    """What the metadata server says of this TPU VM; empty on other machines."""
    if "TPU_SKIP_MDS_QUERY" in os.environ:  # jax sets it where no TPU is attached
        return ""
    request = urllib.request.Request(METADATA + key, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def _join(seconds: int, where: str, arguments: Mapping[str, Any]) -> None:
    """`jax.distributed.initialize` whose failure is a `UserError`; jax itself would abort with a stack trace."""
    os.environ.setdefault("PJRT_NPROC", str(max(THREADS, os.cpu_count() or 1)))
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
    failures = []

    def connect() -> None:
        try:
            jax.distributed.initialize(**arguments, initialization_timeout=2 * seconds + 60)
        except Exception as error:
            failures.append(f"cannot be joined ({str(error).splitlines()[0]}); choose a port that is free on the host of "
                            "process 0, and let no config file touch jax's devices")

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        atexit.register(os._exit, 2)  # when Python ends, jax would wait for the others once more
        failures.append(f"not all processes met there within {seconds} s; start all of them with the same coordinator and "
                        "number, each with its own id, and see that every host reaches that address")
    check(not failures, f"{where}: {', '.join(failures)}")


@contextlib.contextmanager
def same_fate() -> Iterator[None]:
    """All processes leave the block together, and if one raises a `UserError` inside, all of them do.

    Raises:
      UserError: what was raised, on the first process that raised it; on the others one without a message.
    """
    error = None
    try:
        yield
    except UserError as found:
        error = found
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.bool_(error is not None))
        if failed.any() and int(failed.argmax()) != jax.process_index():
            raise UserError()
    if error is not None:
        raise error


def agree_by_step() -> Callable[[bool], bool]:
    """A function that all processes call once a step, and that gives all the same: whether one called it with True.

    With several processes it tells this of the call before: the devices agree behind the step that they are busy with,
    so that none stands idle.
    """
    if jax.process_count() == 1:
        return lambda flag: flag
    mesh = Mesh(np.array(jax.devices()), ("device",))
    one_each = NamedSharding(mesh, PartitionSpec("device"))
    most = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    pending: list[jax.Array] = []

    def agree(flag: bool) -> bool:
        flags = jax.make_array_from_callback((mesh.size,), one_each, lambda index: np.full(1, flag, np.int32))
        pending.append(most(flags))
        return len(pending) > 1 and bool(pending.pop(0))

    return agree
