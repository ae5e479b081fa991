"""Trains one small model with every router, at equal active operations, and writes a table and a plot of what came out.

    python -m experiments.routing.sweep --config=experiments/routing/base.py:quick --workdir=runs/routing \\
        --fast_compile --jobs=2

Each finished run is a line of rows.jsonl in the workdir; the same command goes on with those that are missing.
"""

import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import Array

from moejax import allocator
from moejax import config as config_lib
from moejax.config import Config, UserError
from moejax.data.loader import eval_batches, train_loader
from moejax.data.prepare import prepare
from moejax.data.prepared import Prepared, load_prepared
from moejax.data.rows import make_rows
from moejax.evaluation.causality import leak
from moejax.main import load_config_file
from moejax.models import transformer
from moejax.models.count import forward_flops
from moejax.moe.layer import DECISIONS
from moejax.moe.routing import ROUTERS
from moejax.moe.types import Assignments
from moejax.train.held_out import run_evaluation
from moejax.train.setup import Setup, set_up
from moejax.train.state import TrainState

flags.DEFINE_string("config", "experiments/routing/base.py", "FILE[:ARGUMENT] of the model that all routers share")
flags.DEFINE_string("workdir", None, "folder for data, rows and results", required=True)
flags.DEFINE_multi_string("router", [], "routers to train; all by default")
flags.DEFINE_integer("jobs", 1, "runs at a time, each on its own share of the cores", lower_bound=1)
flags.DEFINE_boolean("fast_compile", False, "leave out XLA's costly optimisations: compiling, which takes most of the time "
                     "of short runs, takes about half as long, and steps take longer")
flags.DEFINE_integer("seeds", 1, "runs of each router", lower_bound=1)

COLUMNS = ("loss", "max_vio", "entropy", "dropped", "dead", "flips", "leak", "leak_eval", "tokens_per_second")
"""Of a row: held-out loss (nats a token), largest load over the mean less 1, entropy of the router (nats), share of pairs
dropped, dead experts, all averaged over layers; share of tokens whose experts changed over the last tenth of training;
largest change of a loss when later tokens change, by the rules of training and of evaluation; and speed. A table has means
over the seeds, of the speed the best, as other work on a machine only takes from it."""

FORMATS = {"tokens_per_second": "{:,.0f}", "leak": "{:.1e}", "leak_eval": "{:.1e}", "dead": "{:.1f}", "loss": "{:.4f}"}


def for_router(tree: Mapping[str, Any], name: str, seed: int) -> Config:
    """The shared config with another router, its experts as wide as makes the model's operations those of plain top-k."""
    shared = config_lib.build(tree)
    base = transformer.resolve(shared)
    length, count, choices = base.data.length, base.moe.num_experts, base.moe.experts_per_token
    # Soft MoE scores every token with every slot, so with as many slots as pairs its router would cost more than experts.
    options = {"soft_moe": {"slots": max(choices * length // count // 4, 1)}, "lory": {"segment": length // 4},
               "token_rounding": {"tile": 16}}
    moe = config_lib.build_group(config_lib.MoEConfig, {**tree["moe"], "router": name, "options": options.get(name)}, "moe")
    config = transformer.resolve(dataclasses.replace(shared, moe=moe, seed=seed))
    wanted = forward_flops(base.model, base.moe, length)

    def wide(hidden: int) -> Config:
        if ROUTERS[name].level == "block":
            return dataclasses.replace(config, model=dataclasses.replace(config.model, ffn=hidden))
        return dataclasses.replace(config, moe=dataclasses.replace(config.moe, ffn=hidden))

    one, two = (forward_flops(c.model, c.moe, length) for c in (wide(1), wide(2)))
    return wide(max(round(1 + (wanted - one) / (two - one)), 1))


def decide(model: transformer.Transformer, state: TrainState, batch: Mapping[str, Any]) -> list[Array]:
    """Which experts each token goes to, by sparse layer: bool [T, E]; nothing for routers that make no lists."""
    _, found = model.apply({"params": state.params}, batch["tokens"], batch["positions"], batch["segments"],
                           state.router_state, mutable=[DECISIONS])
    stacks = [a for a in jax.tree.leaves(found, is_leaf=lambda a: isinstance(a, Assignments)) if isinstance(a, Assignments)]
    empty = jnp.zeros((batch["tokens"].size, model.moe.num_experts), bool)
    return [empty.at[a.token_N[layer], a.expert_N[layer]].max(a.valid_N[layer])
            for a in stacks for layer in range(len(a.token_N))]


def flips(before: Sequence[Array], after: Sequence[Array], real_T: Array) -> float:
    """Share of the real tokens whose set of experts is another, over all layers; nan without lists."""
    if not before:
        return math.nan
    return float(np.mean([(a != b).any(axis=1)[real_T] for a, b in zip(before, after, strict=True)]))


def train(setup: Setup, prepared: Prepared) -> dict[str, float]:
    """One run: a row of the table."""
    config = setup.config
    eval_rows = make_rows(prepared.eval, prepared.tokenizer, config)
    loader = train_loader(make_rows(prepared.train, prepared.tokenizer, config, training=True), config)
    held_out = setup.put(next(eval_batches(eval_rows, config)))
    real_T = held_out["segments"].reshape(-1) > 0
    experts = jax.jit(partial(decide, setup.model))
    state, seconds, before = setup.initialise(), [], []
    for step in range(config.train.steps):
        if step == config.train.steps * 9 // 10:
            before = experts(state, held_out)
        begin = time.perf_counter()
        state, means, _ = setup.train_step(state, setup.put(next(loader)))
        jax.block_until_ready(means)
        seconds.append(time.perf_counter() - begin)
    record = run_evaluation(setup, prepared, state.params, state.router_state, config.train.steps)
    variables = {"params": state.params, "router": state.router_state}
    changes = [float(jnp.max(jnp.abs(leak(setup.model, variables, held_out, train)))) for train in (True, False)]
    mean = {name: float(np.mean(record[f"moe/{name}"])) for name in ("max_vio", "entropy", "dropped", "dead")}
    return {"loss": record["loss"], **mean, "flips": flips(before, experts(state, held_out), real_T),
            "leak": changes[0], "leak_eval": changes[1],
            "tokens_per_second": config.data.batch_size * config.data.length / statistics.median(seconds[1:])}


def rows(path: Path) -> list[dict[str, Any]]:
    """The runs that are done."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def missing(done: Sequence[Mapping[str, Any]], names: Sequence[str], seeds: int) -> Iterator[tuple[str, int]]:
    """The runs that are not, all routers once before any twice."""
    finished = {(row["router"], row["seed"]) for row in done}
    return ((name, seed) for seed in range(seeds) for name in names if (name, seed) not in finished)


def table(done: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with one line a router, best loss first: what `COLUMNS` says, and the loss's range."""
    by_router: dict[str, list[Mapping[str, Any]]] = {}
    for row in done:
        by_router.setdefault(row["router"], []).append(row)

    def over_seeds(name: str, column: str) -> float:
        summary = max if column == "tokens_per_second" else statistics.fmean
        return summary(row[column] for row in by_router[name])

    def cell(column: str, value: float) -> str:
        if math.isnan(value):
            return "-"
        return FORMATS.get(column, "{:.3f}").format(value)

    lines = ["| router | seeds | " + " | ".join(COLUMNS) + " | loss, least to most |",
             "| --- |" + " --- |" * (len(COLUMNS) + 2)]
    for name in sorted(by_router, key=lambda name: over_seeds(name, "loss")):
        losses = [row["loss"] for row in by_router[name]]
        lines.append(f"| `{name}` | {len(losses)} | " + " | ".join(cell(c, over_seeds(name, c)) for c in COLUMNS)
                     + f" | {min(losses):.4f} to {max(losses):.4f} |")
    return "\n".join(lines)


def plot(done: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out loss of every run, one line a router, those that look ahead in another colour."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    names = sorted({row["router"] for row in done},
                   key=lambda name: statistics.fmean(row["loss"] for row in done if row["router"] == name), reverse=True)
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.22 * len(names)), layout="constrained")
    for ahead, colour, label in ((False, "tab:blue", "causal in evaluation"),
                                 (True, "tab:red", "looks ahead in evaluation")):
        chosen = [row for row in done if (row["leak_eval"] > 1e-5) == ahead]
        axes.scatter([row["loss"] for row in chosen], [names.index(row["router"]) for row in chosen], s=18, color=colour,
                     label=label)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("held-out loss, nats a token")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def take_cores(number: Any, jobs: int) -> None:
    """Ties a worker to its own share of the cores, so that the speed of a run does not depend on those beside it."""
    with number.get_lock():
        mine, number.value = number.value, number.value + 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[mine % jobs::jobs] or cores)


def run_one(spec: str, workdir: Path, fast_compile: bool, name: str, seed: int) -> dict[str, Any]:
    """Trains one router with one seed, in this process: a row, with its seconds."""
    jax.config.update("jax_disable_most_optimizations", fast_compile)
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))  # other seeds compile the same
    begin = time.monotonic()
    setup = set_up(for_router(load_config_file(spec), name, seed))
    with jax.set_mesh(setup.mesh):
        row = {"router": name, "seed": seed} | train(setup, load_prepared(workdir / "data"))
    jax.clear_caches()
    return row | {"seconds": time.monotonic() - begin}


def sweep(spec: str, workdir: Path, names: Sequence[str], seeds: int, jobs: int, fast_compile: bool) -> str:
    """Trains what is missing, writes rows.jsonl, table.md and plot.png, and returns the table."""
    config = transformer.resolve(config_lib.build(load_config_file(spec)))
    workdir.mkdir(parents=True, exist_ok=True)
    prepare(config, workdir / "data")
    path = workdir / "rows.jsonl"
    todo = list(missing(rows(path), names, seeds))
    processes = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, processes, take_cores, (processes.Value("i", 0), jobs)) as pool:
        runs = [pool.submit(run_one, spec, workdir, fast_compile, *run) for run in todo]
        try:
            for number, done in enumerate(concurrent.futures.as_completed(runs), 1):
                row = done.result()
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"[{number}/{len(todo)}] {row['router']}, seed {row['seed']}: loss {row['loss']:.4f}, "
                      f"{row['seconds']:.0f} s", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    found = [row for row in rows(path) if row["router"] in names]
    (workdir / "table.md").write_text(table(found) + "\n")
    try:
        plot(found, workdir / "plot.png")
    except ImportError:
        print('no plot: pip install -e ".[plots]", and run the same command again')
    return table(found)


def main(argv: Sequence[str]) -> None:
    """Runs the sweep of the flags."""
    values = flags.FLAGS
    unknown = [name for name in values.router if name not in ROUTERS]
    try:
        if unknown:
            raise UserError(f"--router={unknown[0]} must be one of {', '.join(ROUTERS)}")
        print(sweep(values.config, Path(values.workdir), values.router or list(ROUTERS), values.seeds, values.jobs,
                    values.fast_compile))
    except UserError as error:
        print(f"moejax: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    allocator.keep_memory()
    app.run(main)
