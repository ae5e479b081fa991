"""How the train step of experiments/bench_mixtral_small.py grows: with experts at equal operations, and with layers.

    python -m benchmarks.growth                              # 8, 64 and 256 experts; 4 and 16 layers
    python -m benchmarks.growth --sequences=8 --sequences=64 # with 2,048 and with 16,384 tokens in a batch

The last line is a JSON object. `over_first` is a variant's time over that of the first, from runs in turn in one process:
in each turn two steps, of which the second counts, as in training one step follows another.
More experts are more weights, which the optimizer passes over once a step whatever the batch, so they cost less of a step
with more tokens. 256 experts with AdamW hold 5 GB.
"""

import json
import runpy
import statistics
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks.timing import alternate, machine, over, table
from moejax import allocator, config
from moejax.train.benchmark import random_batch
from moejax.train.setup import set_up

flags.DEFINE_multi_integer("experts", [8, 64, 256], "numbers of experts; the first is what the others are compared to")
flags.DEFINE_multi_integer("sequences", [8], "batches, in sequences of 256 tokens; each makes a table")
flags.DEFINE_multi_integer("layers", [4, 16], "numbers of layers to compile")
flags.DEFINE_integer("rounds", 5, "timed rounds")


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


def show(rows: list[dict[str, Any]]) -> None:
    """Prints rows as a table."""
    print(table([tuple(row.values()) for row in rows], tuple(name.replace("_", " ") for name in rows[0])), flush=True)


def main(argv: list[str]) -> None:
    """Prints the tables and the JSON object."""
    del argv
    flag, growth = flags.FLAGS, []
    for sequences in flag.sequences:
        steps = {count: compiled_step({"moe.num_experts": count, "data.batch_size": sequences})[1]
                 for count in flag.experts}
        seconds = alternate(steps, flag.rounds, again=True)
        rows = [{"tokens": 256 * sequences, "experts": count, "step_ms": 1e3 * statistics.median(taken),
                 "over_first": over(taken, seconds[flag.experts[0]])} for count, taken in seconds.items()]
        show(rows)
        growth += rows
        del steps
    compiling = {count: compiled_step({"model.layers": count, "train.scan_layers": True})[0] for count in flag.layers}
    layers = [{"layers": count, "compile_seconds": taken, "over_first": taken / compiling[flag.layers[0]]}
              for count, taken in compiling.items()]
    show(layers)
    print(json.dumps({"benchmark": "growth", "experts": growth, "layers": layers, "machine": machine()}))


if __name__ == "__main__":
    allocator.keep_memory()
    app.run(main)
