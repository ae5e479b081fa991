"""From a config to everything that a run computes with: mesh, model, optimizer, jitted steps."""

import dataclasses
import math
from functools import partial
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax import axes, compiler_options, sharding
from moejax.config import Config, check
from moejax.evaluation.perplexity import make_eval_step
from moejax.mixture import Mixture, parts
from moejax.models import adapters, count, transformer
from moejax.models.blocks import FINITE
from moejax.moe.routing import get_router
from moejax.objectives.by_row import faultless, sums_of_tasks, with_rows
from moejax.objectives.chunked import over_chunks
from moejax.objectives.classes import classification, multi_label, regression
from moejax.objectives.cross_entropy import cross_entropy
from moejax.objectives.distillation import distillation
from moejax.task import PAIRS
from moejax.train.diagnosis import Findings, examine
from moejax.train.moving import Moving, join, moving
from moejax.train.optimizer import make_optimizer
from moejax.train.state import TrainState, initialise, state_shardings
from moejax.train.step import Functions, train_step
from moejax.train.teacher import TEACHER


class Setup(NamedTuple):
    """What a run computes with.

    Attributes:
      config: with nothing left open.
      mesh, model, optimizer: as named.
      shapes: of the training state.
      shardings: of the training state.
      parameters: their number.
      moving: paths of those that move.
      placements: where they lie.
      initialise: () -> TrainState on the mesh.
      plain: parameters of a state -> those of the model, adapters added.
      train_step: (state, batch) -> (state, scalars, records); jitted, consumes the state.
      eval_step: (params, router_state, batch) -> (sums, records, scores); jitted. Scores of classes, or None.
      examine: (state, batch) -> what was not finite in a step from there; jitted.
      rows: size of a global batch -> the rows of it that this process feeds.
      put: these rows as numpy arrays -> the global batch on the mesh.
    """

    config: Config
    mesh: Mesh
    model: transformer.Transformer
    optimizer: optax.GradientTransformationExtraArgs
    shapes: TrainState
    shardings: TrainState
    parameters: count.ParameterCount
    moving: frozenset[tuple[str, ...]]
    placements: list[sharding.Placement]
    initialise: Callable[[], TrainState]
    plain: Callable[[Any], Any]
    train_step: Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array], Any]]
    eval_step: Callable[..., tuple[dict[str, Array], Any, Any]]
    examine: Callable[[TrainState, Mapping[str, Array]], Findings]
    rows: Callable[[int], np.ndarray]
    put: Callable[[Mapping[str, np.ndarray]], dict[str, Array]]


def set_up(config: Config, devices: Sequence[jax.Device] | None = None) -> Setup:
    """Builds and checks everything; allocates nothing. Devices are those of the mesh; None takes all.

    Raises:
      UserError: the config does not fit the devices, or asks for what does not exist.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    check_batches(config, mesh)
    config = transformer.resolve(config)
    check(config.model.head != "none", "config.model.head=none leaves nothing to train; set it to tokens or classes")
    model = transformer.build(without_cudnn(config) if config.train.faults.deterministic else config)
    options = config.train.finetune
    own_shapes, own_logical = transformer.abstract_params(model)
    param_shapes, logical = adapters.abstract(own_shapes, own_logical, options)
    placed = sharding.placements(param_shapes, logical, mesh)
    sharding.validate(placed, mesh, config.mesh.replicated_mib)
    chosen = moving(options, config.model, config.moe, logical)
    optimizer = chosen.scaled(make_optimizer(config.optimizer, config.train.steps, chosen.split(logical)[0]))

    def initial_params(key: Array) -> Any:
        params = transformer.initial_params(model, key)
        if adapters.ADAPTERS not in param_shapes:
            return params
        return params | {adapters.ADAPTERS: adapters.initial(
            param_shapes[adapters.ADAPTERS], logical[adapters.ADAPTERS], jax.random.fold_in(key, 1))}

    start = partial(initialise, initial_params, lambda params: optimizer.init(chosen.split(params)[0]),
                    transformer.initial_router_state(config.model, config.moe))
    shapes = jax.eval_shape(start, jax.random.PRNGKey(0))
    moving_shapes = chosen.split(param_shapes)[0]
    shardings = state_shardings(shapes, moving_shapes, logical, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())  # so that every process can read what steps report

    functions = make_functions(config, model, chosen, own_logical)
    compiling = compiler_options.for_devices(mesh.devices.flat, config.train.faults.deterministic)
    step = jax.jit(partial(train_step, functions, optimizer, config.train.microbatches), donate_argnums=0,
                   out_shardings=(shardings, everywhere, everywhere), compiler_options=compiling)
    return Setup(
        config, mesh, model, optimizer, shapes, shardings, count.count_parameters(param_shapes, logical, config.moe),
        chosen.paths, placed,
        initialise=lambda: jax.jit(start, out_shardings=shardings)(jax.random.PRNGKey(config.seed)),
        plain=jax.jit(partial(adapters.merge, own_logical, options)),
        train_step=step,
        eval_step=make_eval_step(functions.forward, functions.measure, everywhere, compiling,
                                 with_scores=config.data.task.head == "classes"),
        examine=jax.jit(partial(examine, functions, make_outputs(config, own_logical), config.train.microbatches),
                        out_shardings=everywhere, compiler_options=compiling),
        rows=partial(sharding.batch_rows, mesh),
        put=partial(sharding.put_batch, mesh))


def make_functions(config: Config, model: transformer.Transformer, chosen: Moving, logical: Any) -> Functions:
    """The model, objective and router update of a config as the plain functions that a step takes.

    Args:
      config: resolved.
      model: its model.
      chosen: the parameters that move.
      logical: axes of the model's own parameters.
    """
    task = config.data.task
    by_token = task.head == "tokens"

    def forward(params: Any, router_state: Any, batch: Mapping[str, Array], train: bool = False,
                key: Array | None = None, totals: Any = None, wholes: Any = None) -> tuple[Array, Any]:
        params = adapters.merge(logical, config.train.finetune, params)
        output = transformer.apply_batch(model, params, router_state, batch, train=train, totals=totals, wholes=wholes,
                                         rngs=None if key is None else {"dropout": key})
        return (output.x_BLD if by_token else output.logits_BC), output.records

    per_token = partial(cross_entropy, label_smoothing=task.label_smoothing,
                        head_z_weight=task.head_z_weight)

    tuning = config.train.finetune
    taught = distillation(per_token, tuning.teacher_weight, tuning.teacher_temperature)
    tasks = len(task.names) if isinstance(task, Mixture) else 0
    writes = any(own.data.task.data == PAIRS for own in parts(config).values())

    def of_rows(x: Array, batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        weight_C = None if task.class_weights is None else jnp.asarray(task.class_weights)
        by_row = {"classification": partial(classification, weight_C=weight_C, label_smoothing=task.label_smoothing),
                  "multi_label": multi_label, "regression": regression}
        return by_row[task.objective](x, batch["targets"], batch["mask"])

    def of_tokens(params: Any, x: Array, batch: Mapping[str, Array], by_row: bool) -> tuple[Array, dict[str, Array]]:
        head_DV, chunk = transformer.head(model, params), config.train.loss_chunk
        rows, chosen = [batch["targets"], batch["mask"]], per_token
        if TEACHER in batch:
            rows, chosen = [*rows, batch[TEACHER]], taught
        if by_row:
            count = len(batch["mask"])
            rows.append(jnp.broadcast_to(jnp.arange(count)[:, None], batch["mask"].shape))
            chosen = with_rows(chosen, count)
        return over_chunks(chosen, chunk, head_DV, x, *rows)

    def objective(params: Any, x: Array, batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        if not by_token:
            return of_rows(x, batch)
        total, sums = of_tokens(params, x, batch, by_row=tasks > 0)
        if tasks:
            sums.pop("row_errors")
            sums |= sums_of_tasks(sums.pop("row_loss"), batch["mask"], batch["task"], tasks)
        return total, sums

    def measure(params: Any, x: Array, batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        if not by_token:
            return of_rows(x, batch)
        total, sums = of_tokens(params, x, batch, by_row=writes)
        if writes:
            sums.pop("row_loss")
            sums |= faultless(sums.pop("row_errors"), batch["mask"])
        return total, sums

    router = get_router(config.moe.router)
    sparse = config.moe.every > 0
    return Functions(
        split=chosen.split,
        join=join,
        counted=chosen.counted,
        totals=lambda batch: transformer.count_totals(batch["segments"], batch.get("source_segments")),
        forward=forward,
        objective=objective,
        measure=measure,
        wholes=transformer.statistics_of if sparse and router.needs_whole(config.moe) else None,
        update_router=lambda state, records: chosen.following(
            state, transformer.update_router_state(config.moe, state, records)),
        loss_weights=router.loss_weights(config.moe) if sparse else {})


def make_outputs(config: Config, logical: Any) -> Callable[..., Any]:
    """The function that tells which blocks give finite numbers, see `examine`; arguments are those of `make_functions`."""
    def outputs(params: Any, router_state: Any, batch: Mapping[str, Array], key: Array, totals: Any) -> Any:
        # Only a scan keeps what its blocks tell.
        model = transformer.build(dataclasses.replace(config, train=dataclasses.replace(config.train, scan_layers=True)))
        params = adapters.merge(logical, config.train.finetune, params)
        return transformer.apply_batch(model, params, router_state, batch, train=True, totals=totals,
                                       rngs={"dropout": key}, mutable=[FINITE])[1][FINITE]
    return outputs


def without_cudnn(config: Config) -> Config:
    """A config whose attention is not that of cuDNN, which adds up gradients in any order.

    Raises:
      UserError: it asks for that.
    """
    check(config.model.attention != "cudnn", "config.model.attention=cudnn gives other bits each time, which "
          "config.train.faults.deterministic does not allow; leave one of them out")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="plain"))


def check_trainable(config: Config) -> None:
    """Raises `UserError` if a resolved config is of a model that is for inference only."""
    check(not config.model.architecture.expert_bits, "config.model.architecture.expert_bits: experts in few bits cannot be "
          "trained; train the model that they were made of, and make them again")


def check_batches(config: Config, mesh: Mesh) -> None:
    """Raises `UserError` unless batches and sequences split evenly over the mesh."""
    data, parts = config.data, config.train.microbatches
    sharding.divisible(data.batch_size // parts, mesh, axes.BATCH_AXES,
                       "config.data.batch_size" + (f"/config.train.microbatches={data.batch_size}/{parts}"
                                                   if parts > 1 else ""))
    sharding.divisible(data.eval_batch_size or data.batch_size, mesh, axes.BATCH_AXES, "config.data.eval_batch_size")
    sharding.divisible(data.length, mesh, (axes.CONTEXT,), "config.data.length")
    sharding.divisible(data.encoder_length, mesh, (axes.CONTEXT,), "config.data.source_length")


def describe(setup: Setup) -> str:
    """Parameters, operations and mesh in two lines."""
    config, counted = setup.config, setup.parameters
    flops = count.training_flops(config)
    devices = setup.mesh.devices.flat[0]
    moved = sum(math.prod(leaf.shape) for path, leaf in sharding.flat(setup.shapes.params).items() if path in setup.moving)
    still = "" if moved == counted.total else f"; {moved:,} of them move"
    return (f"model: {counted.total:,} parameters, {counted.active:,} active for a token (of these {counted.embedding:,} "
            f"in embedding and head){still}; {flops / 1e6:.1f} MFLOP a token in training\n"
            f"devices: {setup.mesh.size} {devices.platform} ({sharding.in_words(setup.mesh)}); compute type "
            f"{config.train.dtype}")
