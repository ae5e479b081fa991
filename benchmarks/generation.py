"""Cached greedy generation of experiments/bench_mixtral_small.py: 8 prompts of 32 tokens continued by 64.

    python -m benchmarks.generation

The last line is a JSON object with `tokens_per_second` (new tokens of all rows together), as benchmarks/peers print it.
"""

import json
import runpy
import statistics
import time

import jax
import numpy as np

from benchmarks.timing import machine
from moejax import allocator, config
from moejax.generation.generate import generate
from moejax.models import transformer

BATCH, PROMPT, NEW, ROUNDS = 8, 32, 64, 9


def main() -> None:
    """Prints one JSON object."""
    built = config.build(runpy.run_path("experiments/bench_mixtral_small.py")["get_config"]())
    model = transformer.build(built)
    params = {"params": jax.jit(lambda key: transformer.initial_params(model, key))(jax.random.key(0)),
              "router": transformer.initial_router_state(built.model, built.moe)}
    prompts = np.random.default_rng(0).integers(0, built.model.vocab_size, (BATCH, PROMPT), dtype=np.int32)
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        generate(model, params, prompts, max_new_tokens=NEW)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    print(json.dumps({"tokens_per_second": BATCH * NEW / median, "seconds": median, "machine": machine()}))


if __name__ == "__main__":
    allocator.keep_memory()
    main()
