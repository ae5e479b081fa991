"""What XLA must be told so that sparse layers run at full speed, by kind of device."""

from typing import Iterable

import jax


def for_devices(devices: Iterable[jax.Device], deterministic: bool = False) -> dict[str, str | bool]:
    """Options for `jax.jit(..., compiler_options=...)` of a program that runs on these devices.

    On GPUs sums that several threads add to in any order (scatter, some kernels of cuDNN) may differ between two runs; if
    `deterministic`, XLA takes slower operations that do not. On CPUs and TPUs none do.

    On TPU `jax.lax.ragged_dot` becomes either a grouped kernel or one masked matmul over all experts, E times the work.
    libtpu 0.0.48 to 0.0.51 take the kernel on every generation, 0.0.52 only on v5p; with the option all of them take it
    on v4, v5p, v5e, v6e and 7x. Other backends do not know the option and would refuse it.
    """
    platforms = {device.platform for device in devices}
    if platforms == {"tpu"}:
        return {"xla_tpu_enable_ragged_dot_kernel": "true"}
    if platforms == {"gpu"} and deterministic:
        return {"xla_gpu_deterministic_ops": True}
    return {}
