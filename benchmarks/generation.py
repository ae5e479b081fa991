"""Cached greedy generation of experiments/bench_mixtral_small.py: 8 prompts of 32 tokens continued by 64.

    python -m benchmarks.generation [--bits=8] [--bits=4]

The last line is a JSON object with `tokens_per_second` (new tokens of all rows together), as benchmarks/peers print it.
With `--bits`, the same model with its experts in so many bits generates in turn with the whole one: `bits` has the speed of
each, the median over the rounds of it over the whole model's in the same round, and the bytes of both models' parameters.
"""

import argparse
import json
import runpy
import statistics
import time

import jax
import numpy as np

from benchmarks.timing import machine
from moejax import allocator, config
from moejax.checkpoint.made import size
from moejax.generation.generate import generate
from moejax.models import transformer
from moejax.models.few_bits import in_few_bits

BATCH, PROMPT, NEW, ROUNDS = 8, 32, 64, 9


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=(8, 4), action="append", default=[])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    built = transformer.resolve(config.build(runpy.run_path("experiments/bench_mixtral_small.py")["get_config"]()))
    model = transformer.build(built)
    whole = {"params": jax.jit(lambda key: transformer.initial_params(model, key))(jax.random.key(0)),
             "router": transformer.initial_router_state(built.model, built.moe)}
    models = {0: (model, whole)} | {bits: in_few_bits(model, whole, bits) for bits in given.bits}
    prompts = np.random.default_rng(0).integers(0, built.model.vocab_size, (BATCH, PROMPT), dtype=np.int32)
    seconds: dict[int, list[float]] = {bits: [] for bits in models}
    for _ in range(given.rounds + 1):  # the first compiles
        for bits, (one, variables) in models.items():
            start = time.perf_counter()
            generate(one, variables, prompts, max_new_tokens=NEW)
            seconds[bits].append(time.perf_counter() - start)
    median = {bits: statistics.median(found[1:]) for bits, found in seconds.items()}
    told = {"tokens_per_second": BATCH * NEW / median[0], "seconds": median[0], "machine": machine()}
    if given.bits:
        told |= {"bytes": size(whole), "bits": {bits: {
            "tokens_per_second": BATCH * NEW / median[bits], "bytes": size(models[bits][1]),
            "over_whole": statistics.median(a / b for a, b in zip(seconds[0][1:], seconds[bits][1:]))}
            for bits in given.bits}}
    print(json.dumps(told))


if __name__ == "__main__":
    allocator.keep_memory()
    main()
