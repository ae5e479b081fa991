"""The grouped matmul on a GPU in its three directions: XLA's `ragged_dot`, moejax's, and tokamax's if it is installed.

    python -m benchmarks.grouped                        # OLMoE's layer: T 32768, D 2048, F 1024, E 64, K 8, bfloat16
    python -m benchmarks.grouped --search               # and the kernels with other tiles

`in` is the projection to gate and up, [T*K, D] x [E, D, 2F]; `out` the one back, [T*K, F] x [E, F, D]. `y`, `dx`, `dw` are
the product and its gradients. Group sizes are drawn evenly, or Zipf-skewed with --skew=1.
"""

import functools
import json
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.timing import alternate, machine, table
from moejax.moe import grouped, grouped_hopper, grouped_triton

flags.DEFINE_integer("tokens", 32768, "T")
flags.DEFINE_integer("width", 2048, "D")
flags.DEFINE_integer("hidden", 1024, "F")
flags.DEFINE_integer("experts", 64, "E")
flags.DEFINE_integer("choices", 8, "K")
flags.DEFINE_float("skew", 0, "group e is 1/e**skew times as large as the first")
flags.DEFINE_integer("rounds", 7, "timed rounds")
flags.DEFINE_bool("search", False, "try other tiles")
flags.DEFINE_bool("xla", True, "try XLA's, which may take fifty times as long")
flags.DEFINE_multi_enum("only", [], ["y", "dx", "dw"], "directions; all by default")

TILES = {
    grouped_hopper: [grouped_hopper.Tile(), grouped_hopper.Tile(stages=4), grouped_hopper.Tile(across=8),
                     grouped_hopper.Tile(depth=128, stages=2), grouped_hopper.Tile(columns=128, stages=5)],
    grouped_triton: [grouped_triton.Tile(128, 256, 64, 8, 3), grouped_triton.Tile(128, 256, 64, 8, 4),
                     grouped_triton.Tile(128, 128, 64, 4, 3)],
}


def implementations(direction: str) -> dict[str, Any]:
    """Functions of (x_RD, w_EDF, dy_RF, sizes_E)."""
    def differentiate(matmul: Any, x: Any, w: Any, dy: Any, sizes: Any) -> Any:
        if direction == "y":
            return matmul(x, w, sizes)
        if direction == "dx":
            return jax.vjp(lambda x: matmul(x, w, sizes), x)[1](dy)[0]
        return jax.vjp(lambda w: matmul(x, w, sizes), w)[1](dy)[0]

    def kernel(module: Any, tile: Any, x: Any, w: Any, dy: Any, sizes: Any) -> Any:
        if direction == "dw":
            return module.weights_of(x, dy, sizes, tile=tile)
        return module.rows_times(x if direction == "y" else dy, w, sizes, transposed=direction == "dx", tile=tile)

    found = {"ragged_dot": functools.partial(differentiate, jax.lax.ragged_dot)} if flags.FLAGS.xla else {}
    for name in grouped.GPU_KERNELS:
        found[name] = functools.partial(differentiate, functools.partial(grouped.matmul, kernels=name))
    for module, tiles in TILES.items() if flags.FLAGS.search else ():
        name = module.__name__.rpartition("_")[2]
        found |= {f"{name} {'x'.join(map(str, tile))}": functools.partial(kernel, module, tile) for tile in tiles}
    try:
        import tokamax
    except ImportError:
        return found
    found["tokamax"] = functools.partial(
        differentiate, lambda x, w, sizes: tokamax.ragged_dot(x, w, sizes, implementation="mosaic"))
    return found


def difference(direction: str, arrays: list[Any], sizes_E: np.ndarray, found: Any) -> float:
    """Relative to a plain float32 product, for the group in the middle."""
    (x_RD, w_EDF, dy_RF), group = arrays, len(sizes_E) // 2
    at = slice(int(sizes_E[:group].sum()), int(sizes_E[:group + 1].sum()))
    multiply = functools.partial(jnp.dot, precision="highest", preferred_element_type=jnp.float32)
    wanted = (multiply(x_RD[at].T, dy_RF[at]) if direction == "dw" else multiply(x_RD[at], w_EDF[group])
              if direction == "y" else multiply(dy_RF[at], w_EDF[group].T))
    part = found[group if direction == "dw" else at].astype(jnp.float32)
    return float(jnp.linalg.norm(part - wanted) / jnp.linalg.norm(wanted))


def main(argv: list[str]) -> None:
    """Prints the table and the JSON object."""
    del argv
    flag, rng, results = flags.FLAGS, np.random.default_rng(0), []
    rows = flag.tokens * flag.choices
    share = np.arange(1, flag.experts + 1.0) ** -flag.skew
    sizes_E = jnp.asarray(rng.multinomial(rows, share / share.sum()), jnp.int32)
    for name, width, columns in (("in", flag.width, 2 * flag.hidden), ("out", flag.hidden, flag.width)):
        keys = jax.random.split(jax.random.key(0), 3)
        arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(
            keys, ((rows, width), (flag.experts, width, columns), (rows, columns)), strict=True)]
        for direction in flag.only or ("y", "dx", "dw"):
            variants, differences, refused = {}, {}, {}
            for variant, function in implementations(direction).items():
                run = functools.partial(jax.jit(function), *arrays, sizes_E)
                try:
                    found = run()
                except Exception as error:  # whatever a library or the compiler refuses is a result here
                    refused[variant] = f"{type(error).__name__}: {error}"[:300]
                    continue
                variants[variant], differences[variant] = run, difference(direction, arrays, np.asarray(sizes_E), found)
            for variant, seconds in alternate(variants, flag.rounds).items():
                median = statistics.median(seconds)
                results.append({"product": f"{name} {direction}", "variant": variant, "ms": 1e3 * median,
                                "tflops": 2 * rows * width * columns / median / 1e12, "difference": differences[variant]})
            results += [{"product": f"{name} {direction}", "variant": variant, "error": error}
                        for variant, error in refused.items()]
            print(table([tuple(r.get(k, "") for k in ("product", "variant", "ms", "tflops", "difference", "error"))
                         for r in results if r["product"] == f"{name} {direction}"],
                        ("product", "variant", "ms", "TFLOP/s", "difference", "error")), flush=True)
    print(json.dumps({"benchmark": "grouped", "results": results, "machine": machine(),
                      **{k: getattr(flag, k) for k in ("tokens", "width", "hidden", "experts", "choices", "skew")}}))


if __name__ == "__main__":
    app.run(main)
