"""What hashing and saving a checkpoint costs the train step.

    python -m benchmarks.saving
    python -m benchmarks.saving --experts=8

A block is some steps; of three kinds of blocks in turn one only trains, one hashes the state on the devices before its
first step, one saves before its first step, hashes included, and waits at its end until all is on disk. `seconds` is the
median over the rounds of what a block takes longer than the one that only trains, `share` that of the time between two
saves: by the clock, and of the process's time on all cores (`cpu`), in which threads behind the step count in full, and
which says more than the clock where others use the machine. The last line is a JSON object.
"""

import json
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks.timing import machine, table
from moejax import allocator, config
from moejax.checkpoint import Store, digest
from moejax.checkpoint.made import size
from moejax.train.benchmark import random_batch
from moejax.train.loop import items
from moejax.train.setup import set_up

flags.DEFINE_integer("experts", 4, "in each of the four layers of experiments/bench_mixtral_small.py")
flags.DEFINE_integer("steps", 6, "of a block; enough that a checkpoint is on disk before they are done")
flags.DEFINE_integer("rounds", 7, "timed rounds; one more before them warms up")
flags.DEFINE_multi_integer("every", [50, 200], "steps between two saves; config.train.checkpoint_every is 200 by default")


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds by the clock, and of the process on all cores."""
    before = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return {"clock": time.perf_counter() - before[0], "cpu": time.process_time() - before[1]}


def main(argv: list[str]) -> None:
    """Prints the table and the JSON object."""
    del argv
    flag = flags.FLAGS
    logging.set_verbosity(logging.WARNING)  # Orbax tells all that it does
    tree = runpy.run_path("experiments/bench_mixtral_small.py")["get_config"]()
    tree.moe.num_experts = flag.experts
    setup = set_up(config.build(tree))
    with jax.set_mesh(setup.mesh), tempfile.TemporaryDirectory() as folder:
        batch = setup.put(random_batch(setup, np.random.default_rng(0)))
        held, saved = [setup.initialise()], [0]
        sizes = {"model_megabytes": size(held[0].params) / 1e6, "state_megabytes": size(held[0]) / 1e6}
        store = Store(Path(folder))

        def block() -> Any:
            for _ in range(flag.steps):
                held[0], means, _ = setup.train_step(held[0], batch)
            return jax.block_until_ready(means)

        def hash_and_block() -> Any:
            hashes = [digest.on_devices(leaf) for leaf in jax.tree.leaves(held[0])]
            return block(), hashes

        def save_and_block() -> Any:
            saved[0] += 1
            store.save(saved[0], items(held[0]), {}, None)
            means = block()
            store.wait()
            return means

        variants = {"train": block, "hash": hash_and_block, "save": save_and_block}
        rounds = [{name: timed(run) for name, run in variants.items()} for _ in range(flag.rounds + 1)][1:]
        store.close()
        assert store.failure is None
    rows = []
    for kind in ("hash", "save"):
        for by in ("clock", "cpu"):
            step = statistics.median(one["train"][by] for one in rounds) / flag.steps
            extra = statistics.median(one[kind][by] - one["train"][by] for one in rounds)
            rows.append({"kind": kind, "by": by, "step_seconds": step, "seconds": extra}
                        | {f"share_every_{every}": extra / (extra + every * step) for every in flag.every})
    print(table([tuple(row.values()) for row in rows], tuple(name.replace("_", " ") for name in rows[0])))
    print(json.dumps({"benchmark": "saving", **sizes, "rows": rows, "rounds": rounds, "machine": machine()}))


if __name__ == "__main__":
    allocator.keep_memory()
    app.run(main)
