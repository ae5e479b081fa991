"""How the train step of experiments/bench_mixtral_small.py grows: with experts at equal operations, and with layers.

    python -m benchmarks.growth                       # 8, 64 and 256 experts; 4 and 16 layers

The last line is a JSON object. `over_first` is a variant's time over that of the first, from runs in turn in one process.
"""

import json
import runpy
import time
from typing import Any

import jax
import numpy as np

from benchmarks.timing import alternate, machine, table
from moejax import allocator, config
from moejax.train.benchmark import random_batch
from moejax.train.setup import set_up

EXPERTS, LAYERS, ROUNDS = (8, 64, 256), (4, 16), 5


def compiled_step(changes: dict[str, Any]) -> tuple[float, Any]:
    """Seconds to trace and compile the train step with some keys changed, and a function that takes one step."""
    tree = runpy.run_path("experiments/bench_mixtral_small.py")["get_config"]()
    for name, value in changes.items():
        group, key = name.split(".")
        tree[group][key] = value
    built = config.build(tree)
    setup = set_up(built)
    with jax.set_mesh(setup.mesh):
        batch = setup.put(random_batch(setup, np.random.default_rng(0)))
        held = [setup.initialise()]
        start = time.perf_counter()
        step = setup.train_step.lower(held[0], batch).compile()
        seconds = time.perf_counter() - start

    def run() -> Any:
        held[0], means, _ = step(held[0], batch)
        return held[0], means

    return seconds, run


def main() -> None:
    """Prints two tables and the JSON object."""
    steps = {f"{count} experts": compiled_step({"moe.num_experts": count})[1] for count in EXPERTS}
    seconds = alternate(steps, ROUNDS)
    first = seconds[f"{EXPERTS[0]} experts"]
    experts = [{"variant": name, "step_ms": 1e3 * taken, "over_first": taken / first} for name, taken in seconds.items()]
    print(table([tuple(row.values()) for row in experts], ("experts", "ms a step", "over first")))
    layers = [{"variant": f"{count} layers", "compile_seconds": compiled_step({"model.layers": count})[0]}
              for count in LAYERS]
    for row in layers:
        row["over_first"] = row["compile_seconds"] / layers[0]["compile_seconds"]
    print(table([tuple(row.values()) for row in layers], ("layers", "seconds to compile", "over first")))
    print(json.dumps({"benchmark": "growth", "experts": experts, "layers": layers, "machine": machine()}))


if __name__ == "__main__":
    allocator.keep_memory()
    main()
