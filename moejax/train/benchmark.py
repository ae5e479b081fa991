"""How fast the train step is, measured against what matmuls reach on the same devices in the same process."""

import resource
import statistics
import time
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.config import Config
from moejax.mixture import Mixture
from moejax.models.count import row_lengths, training_flops
from moejax.train.setup import Setup, check_trainable, set_up


def matmul_ceiling(mesh: Mesh, dtype: Any, repeats: int = 5) -> float:
    """Floating-point operations per second of a large dense matmul on all devices together: the best of `repeats`."""
    size = 1024 if mesh.devices.flat[0].platform == "cpu" else 8192
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    # Random numbers: on constants an accelerator draws less power and runs faster.
    def draw(seed: int, length: int, placement: NamedSharding) -> jax.Array:
        normal = partial(jax.random.normal, shape=(length, size), dtype=dtype)
        return jax.jit(normal, out_shardings=placement)(jax.random.key(seed))

    a, b = draw(0, size * mesh.size, rows), draw(1, size, NamedSharding(mesh, PartitionSpec()))
    multiply = jax.jit(lambda a, b: (a @ b) / size, out_shardings=rows)
    multiply(a, b).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(a, b).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * mesh.size * size**3 / min(seconds)


def random_batch(setup: Setup, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The rows that this process holds of a batch of random tokens without padding, all of which are to be told."""
    config, rows = setup.config, len(setup.rows(setup.config.data.batch_size))
    length, source_length = row_lengths(config)

    def draw(length: int, prefix: str = "") -> dict[str, np.ndarray]:
        return {f"{prefix}tokens": rng.integers(0, config.model.vocab_size, (rows, length), dtype=np.int32),
                f"{prefix}segments": np.ones((rows, length), np.int32),
                f"{prefix}positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy()}

    batch = draw(length) | (draw(source_length, "source_") if source_length else {})
    task, classes = config.data.task, config.model.classes
    if isinstance(task, Mixture):
        batch["task"] = rng.integers(0, len(task.names), rows, dtype=np.int32)
    told = {"classification": lambda: rng.integers(0, classes, rows, dtype=np.int32),
            "multi_label": lambda: rng.integers(0, 2, (rows, classes)).astype(np.float32),
            "regression": lambda: rng.normal(size=rows).astype(np.float32)}
    if task.head == "classes":
        return batch | {"targets": told[task.objective](), "mask": np.ones(rows, bool)}
    return batch | {"targets": np.roll(batch["tokens"], -1, axis=1), "mask": np.ones((rows, length), bool)}


def peak_memory() -> int:
    """Peak bytes on the busiest local device, or of the process where devices do not tell (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def benchmark(config: Config, steps: int = 10) -> dict[str, Any]:
    """Times the train step on random tokens: compiles, warms up twice, then takes the median of `steps` steps.

    Returns:
      tokens_per_second, step_seconds (median), compile_seconds (trace and compile), flops_per_token (of training, from
      the config), matmul_ceiling_flops (per second, all devices), utilisation (the share of that ceiling that
      flops_per_token * tokens_per_second makes), peak_memory_bytes, and the devices.
    """
    setup = set_up(config)
    config = setup.config
    check_trainable(config)
    with jax.set_mesh(setup.mesh):
        ceiling = matmul_ceiling(setup.mesh, config.train.dtype)
        state = setup.initialise()
        rng = np.random.default_rng(config.seed)
        batches = [setup.put(random_batch(setup, rng)) for _ in range(2)]
        compile_seconds, step = _compile(setup, state, batches[0])
        seconds = []
        for i in range(steps + 2):
            start = time.perf_counter()
            state, means, records = step(state, batches[i % 2])
            jax.block_until_ready((state, means, records))
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    rate = config.data.batch_size * sum(row_lengths(config)) / median
    flops = training_flops(config)
    return {"tokens_per_second": rate, "step_seconds": median, "compile_seconds": compile_seconds,
            "flops_per_token": flops, "matmul_ceiling_flops": ceiling, "utilisation": rate * flops / ceiling,
            "peak_memory_bytes": peak_memory(), "devices": jax.device_count(),
            "platform": jax.devices()[0].platform}


def _compile(setup: Setup, state: Any, batch: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    compiled = setup.train_step.lower(state, batch).compile()
    return time.perf_counter() - start, compiled
