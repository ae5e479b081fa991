"""The sparse layer against a dense SwiGLU layer with the same active operations, forward and backward, float32.

    python -m benchmarks.layer                          # the table and one JSON object on the last line
    python -m benchmarks.layer --tokens=32768 --width=2048 --hidden=1024 --experts=64 --choices=8 --dtype=bfloat16

Routing is uniform or Zipf-skewed (expert e is 1/e times as popular as the first). `ratio` is the dense layer's time over
the sparse one's: 1 means that sparsity is free. `rows` is what the experts multiply over what they must. `dispatch` is the
share of the layer that moving tokens there and back takes, forward and backward, with experts that do nothing.
"""

import json
import statistics
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.timing import alternate, machine, over, table
from moejax import allocator
from moejax.config import MoEConfig, fields
from moejax.moe import blocked
from moejax.moe.dispatch import DISPATCHERS, Sizes
from moejax.moe.experts import choose_compute
from moejax.moe.layer import mixture
from moejax.moe.routing import resolve
from moejax.moe.types import Assignments, RoutingContext, Totals

flags.DEFINE_integer("tokens", 4096, "T")
flags.DEFINE_integer("width", 256, "D")
flags.DEFINE_integer("hidden", 512, "F")
flags.DEFINE_multi_integer("experts", [8, 64], "E; may be given several times")
flags.DEFINE_integer("choices", 2, "K")
flags.DEFINE_enum("compute", "auto", fields()["moe.compute"].metadata["choices"], "the grouped matmul")
flags.DEFINE_string("dtype", "float32", "compute type of the experts")
flags.DEFINE_integer("rounds", 7, "timed rounds")


def context(tokens: int) -> RoutingContext:
    """One sequence without padding."""
    return RoutingContext(jnp.zeros(tokens, jnp.int32), jnp.ones(tokens, bool), Totals(jnp.float32(tokens), jnp.float32(1)),
                          whole=None, carry_TC=None, key=None, sequences=1, shards=1, train=True)


def sparse_layer(config: MoEConfig, x_TD: Any, dy_TD: Any, skew: float, rng: np.random.Generator) -> Any:
    """() -> value and gradients of the layer, router and losses included; and the load of its experts."""
    tokens, width = x_TD.shape
    count, hidden = config.num_experts, config.ffn
    # The first input is 1, so the first row of the router is a bias: the logarithm of the popularity.
    x_TD = x_TD.at[:, 0].set(1)
    router_DE = rng.normal(size=(width, count)).astype(np.float32) * width**-0.5
    router_DE[0] = -skew * np.log(np.arange(1, count + 1))
    w_in = jnp.asarray(rng.normal(size=(count, width, 2, hidden)) * width**-0.5, x_TD.dtype)
    w_out = jnp.asarray(rng.normal(size=(count, hidden, width)) * hidden**-0.5, x_TD.dtype)

    def loss(x_TD: Any, router: Any, w_in: Any, w_out: Any, where: RoutingContext) -> Any:
        y_TD, record, *_ = mixture(config, {"w_DE": router}, {}, w_in, w_out, x_TD, where, None)
        return jnp.sum((y_TD * dy_TD).astype(jnp.float32)) + 0.01 * record.losses["balance"], record.load

    differentiate = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    run = partial(differentiate, x_TD, jnp.asarray(router_DE), w_in, w_out, context(tokens))
    return run, np.asarray(run()[0][1].received_E)


def dense_layer(hidden: int, x_TD: Any, dy_TD: Any, rng: np.random.Generator) -> Any:
    """() -> value and gradients of a SwiGLU layer of that hidden width, its three matrices apart: the faster way on CPU.

    The value is asked for because gradients alone do not need the output, and the compiler would leave out its matmul.
    """
    width = x_TD.shape[1]
    w_gate, w_up = (jnp.asarray(rng.normal(size=(width, hidden)) * width**-0.5, x_TD.dtype) for _ in range(2))
    w_out = jnp.asarray(rng.normal(size=(hidden, width)) * hidden**-0.5, x_TD.dtype)

    def loss(x_TD: Any, w_gate: Any, w_up: Any, w_out: Any) -> Any:
        y_TD = (jax.nn.silu(x_TD @ w_gate) * (x_TD @ w_up)) @ w_out
        return jnp.sum((y_TD * dy_TD).astype(jnp.float32))

    return partial(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))), x_TD, w_gate, w_up, w_out)


def movement(config: MoEConfig, x_TD: Any, dy_TD: Any, rng: np.random.Generator) -> Any:
    """() -> gradients of dispatch and combine alone, planning included."""
    tokens, choices = x_TD.shape[0], config.experts_per_token
    expert_TK = np.argsort(rng.random((tokens, config.num_experts)), axis=1)[:, :choices].astype(np.int32)
    assignments = Assignments(jnp.repeat(jnp.arange(tokens, dtype=jnp.int32), choices), jnp.asarray(expert_TK.reshape(-1)),
                              jnp.full(tokens * choices, 1 / choices), jnp.ones(tokens * choices, bool), choices)
    way = DISPATCHERS["sort"]

    def loss(x_TD: Any, weight_N: Any, assignments: Assignments) -> Any:
        plan = way.plan(assignments.replace(weight_N=weight_N), Sizes(tokens, config.num_experts, spare=32))
        return jnp.sum((way.combine(way.dispatch(x_TD, plan), plan) * dy_TD).astype(jnp.float32))

    return partial(jax.jit(jax.grad(loss, argnums=(0, 1))), x_TD, assignments.weight_N, assignments)


def rows_ratio(config: MoEConfig, x_TD: Any, load_E: np.ndarray) -> float:
    """Rows that are multiplied over rows that hold a token."""
    w_EDF = jax.ShapeDtypeStruct((config.num_experts, x_TD.shape[1], config.ffn), x_TD.dtype)
    if choose_compute(config.compute, [w_EDF], int(load_E.sum())) != "blocked":
        return 1.0
    block = blocked.fit_block(config.block_rows, int(load_E.sum()), config.num_experts)
    return sum(blocked.rows_computed(int(size), block) for size in load_E) / load_E.sum()


def main(argv: list[str]) -> None:
    """Prints the table and the JSON object."""
    del argv
    flag, rng = flags.FLAGS, np.random.default_rng(0)
    dtype = jnp.dtype(flag.dtype)
    x_TD, dy_TD = (jnp.asarray(rng.normal(size=(flag.tokens, flag.width)), dtype) for _ in range(2))
    variants, loads, configs = {"dense": dense_layer(flag.choices * flag.hidden, x_TD, dy_TD, rng)}, {}, {}
    for count in flag.experts:
        for name, skew in (("uniform", 0.0), ("zipf", 1.0)):
            config = resolve(MoEConfig(num_experts=count, experts_per_token=flag.choices, ffn=flag.hidden,
                                       compute=flag.compute))
            key = f"{count} experts, {name}"
            configs[key] = config
            variants[key], loads[key] = sparse_layer(config, x_TD, dy_TD, skew, rng)
        variants[f"{count} experts, movement"] = movement(config, x_TD, dy_TD, rng)
    seconds = alternate(variants, flag.rounds)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}

    flops = 18 * flag.tokens * flag.choices * flag.width * flag.hidden
    rows, results = [("dense", 1e3 * median["dense"], 1.0, flops / median["dense"] / 1e9, "", "")], []
    for key, config in configs.items():
        moved = over(seconds[f"{config.num_experts} experts, movement"], seconds[key])
        result = {"variant": key, "ms": 1e3 * median[key], "ratio": over(seconds["dense"], seconds[key]),
                  "gflops": flops / median[key] / 1e9, "rows": rows_ratio(config, x_TD, loads[key]), "dispatch": moved,
                  "busiest_expert": float(loads[key].max() / loads[key].mean())}
        results.append(result)
        rows.append((key, *(result[name] for name in ("ms", "ratio", "gflops", "rows", "dispatch"))))
    print(table(rows, ("layer", "ms", "ratio", "GFLOP/s", "rows", "dispatch")))
    shape = {name: getattr(flag, name) for name in ("tokens", "width", "hidden", "choices", "dtype")}
    print(json.dumps({"benchmark": "layer", **shape, "dense_ms": 1e3 * median["dense"], "results": results,
                      "machine": machine()}))


if __name__ == "__main__":
    allocator.keep_memory()
    app.run(main)
