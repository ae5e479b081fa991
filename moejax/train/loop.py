"""The training run: continue or start, step, record, evaluate, save."""

import contextlib
import math
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moejax import processes
from moejax.checkpoint import Store, open_workdir, place
from moejax.checkpoint.origin import check_tokens, keep_origin
from moejax.config import Config, UserError, check
from moejax.data.mixing import open_loader
from moejax.data.prepare import prepare
from moejax.data.prepared import Prepared, load_prepared
from moejax.evaluation.load import load_sharded, model_of
from moejax.exit_status import INTERRUPTED, RunFailed
from moejax.finetune import Finetune
from moejax.metrics.record import Recorder, loss_summary, routing_summary, total_records
from moejax.metrics.tasks import training_summary
from moejax.mixture import Mixture
from moejax.models.adapters import ADAPTERS
from moejax.models.count import row_lengths, training_flops
from moejax.models.transformer import Transformer, in_head, in_order
from moejax.sharding import flat
from moejax.train import memory
from moejax.train.benchmark import matmul_ceiling
from moejax.train.best import Best
from moejax.train.diagnosis import SOUND, first_unsound
from moejax.train.health import LAG, Watch
from moejax.train.held_out import evaluation_line, run_evaluation
from moejax.train.progress import Progress
from moejax.train.setup import Setup, check_trainable, describe, set_up
from moejax.train.state import TrainState
from moejax.train.teacher import with_teacher


class Finished(NamedTuple):
    """How a run ended.

    Attributes:
      step: optimizer steps done.
      stopped: whether a signal ended it before its last step.
      evaluation: the last evaluation record, or None.
      best: the best evaluation of the run.
      prepared: its data.
      model: what was trained.
      mesh: where.
      variables: {"params", "router"} of the model, on the mesh.
    """

    step: int
    stopped: bool
    evaluation: dict[str, Any] | None
    best: Best
    prepared: Prepared
    model: Transformer
    mesh: Mesh
    variables: dict[str, Any]


def train(config: Config, workdir: Path) -> Finished:
    """Trains, or goes on from the newest checkpoint of the workdir.

    SIGINT and SIGTERM finish the step, save and return; a second one interrupts at once. With several processes it is
    enough that one of them gets the signal; all stop after the same step, which may be the next.

    Raises:
      UserError: the config, the data or the workdir do not allow it.
    """
    chief = jax.process_index() == 0
    with processes.same_fate():
        setup = set_up(config)
        check_trainable(setup.config)
        if setup.config.train.faults.predict_memory:
            memory.check_state(setup, memory.free(setup.mesh))
    prepared = prepare_on_chief(setup.config, workdir)
    if chief:
        print(describe(setup), flush=True)
    tuning = setup.config.train.finetune
    with processes.same_fate():
        store = Store(workdir, config.train.keep, metric=tuning.metric, lower=tuning.lower)
        if config.train.init_from is not None and not store.steps():
            check_tokens(workdir, Path(config.train.init_from))
        recorder = Recorder(workdir) if chief else None
    try:
        with jax.set_mesh(setup.mesh), stop_on_signal(setup.config.train.faults.save_on_preemption) as stop_requested:
            taught = with_teacher(setup.config, setup.mesh, workdir)
            finished = _run(setup, prepared, store, recorder, stop_requested, taught)
        store.close()
        with processes.same_fate():
            check(store.failure is None, f"{store.folder}: step {finished.step} is reached, but its checkpoint could not "
                  f"be written ({store.failure and store.failure.reason}); make room there, and the same command goes on "
                  "from the one before")
        return finished
    except RunFailed:
        store.close()
        with processes.same_fate():
            pass  # none ends the others while the checkpoint is being sealed
        raise
    finally:
        store.close()
        if recorder:
            recorder.close()


def prepare_on_chief(config: Config, workdir: Path) -> Prepared:
    """Opens the workdir and prepares the data on process 0; the other processes then read what it wrote."""
    chief = jax.process_index() == 0
    with processes.same_fate():
        if chief:
            open_workdir(workdir, config, print)
    with processes.same_fate():
        content = content_of_run(workdir)
    with processes.same_fate():
        if chief:
            prepared = prepare(config, workdir / "data", content=content)
            keep_origin(workdir)
    with processes.same_fate():
        if not chief:
            prepared = load_prepared(workdir / "data")
    return prepared


def content_of_run(workdir: Path) -> str | None:
    """The hash of the data that a workdir's newest checkpoint was trained on; None if there is none."""
    if not (workdir / "checkpoints").is_dir():
        return None
    store = Store(workdir, read_only=True, say=lambda line: None)  # who reads the arrays, too, says what is wrong
    try:
        if not store.steps():
            return None
        data = store.restore({}).data
        check("loader" in data, f"{workdir}: holds a model that was not trained here; give another --workdir, and "
              f"--config.train.init_from={workdir}")
        return data["content"]
    finally:
        store.close()


def _run(setup: Setup, prepared: Prepared, store: Store, recorder: Recorder | None,
         stop_requested: Callable[[], bool], taught: Callable[[Any], Any]) -> Finished:
    config, options = setup.config, setup.config.train
    tuning = options.finetune
    loader = open_loader(prepared, config, setup.rows(config.data.batch_size))
    agree = processes.agree_by_step()
    state, step, best, watch = start(setup, store, loader)
    latest: deque[Any] = deque(maxlen=LAG + 1)
    if recorder:
        recorder.go_on_after(step)
    progress = Progress(step, options.steps, quiet=recorder is None)
    ended = best.exhausted(tuning)
    if step:
        progress.say(f"continuing at step {step}" + ("; all steps are done" if step >= options.steps or ended else ""))
    if isinstance(config.data.task, Mixture):
        progress.say("tasks: " + ", ".join(f"{name} {rate:.1%}" for name, rate in zip(config.data.task.names, loader.rates))
                     + " of the rows")
    meter = Meter(setup)
    evaluation, stopped, failed, begun = None, False, False, step
    if step < options.steps and not ended:
        progress.say("compiling the train step ...")
    while step < options.steps and not (stopped or ended or failed):
        latest.append(setup.put(next(loader)))
        batch = taught(latest[-1])
        if step == begun and options.faults.predict_memory:
            predict_memory(setup, state, batch, watch.limit())
        state, means, records = setup.train_step(state, batch, *watch.limit())
        del batch  # a teacher's scores are large, and the next ones come before this name is taken again
        step += 1
        meter.add(means, records)
        watch.add(means)
        stopped = agree(stop_requested() or (options.faults.stop_unsaved and store.failure is not None))
        last = step == options.steps
        progress.step(step)
        if step % options.log_every == 0 or last or stopped:
            record = {"step": step, "split": "train"} | meter.take()
            if recorder:
                recorder.write(record)
            progress.record(record)
        failed = watch.exhausted()
        if step % options.eval_every == 0 or last:
            with meter.paused():
                evaluation = run_evaluation(setup, prepared, state.params, state.router_state, step)
            if recorder:
                recorder.write(evaluation)
            progress.say(evaluation_line(evaluation))
            best = best.after(tuning, evaluation)
            ended = best.exhausted(tuning)
        improved = best.step == step and tuning.patience is not None
        if step % options.checkpoint_every == 0 or last or stopped or ended or failed or improved:
            with meter.paused():
                # Where the best is always saved, one that is as good must not take its place.
                fresh = improved or (tuning.patience is None and evaluation is not None and evaluation["step"] == step)
                store.save(step, items(state), {"loader": loader.get_state(), "content": prepared.content,
                                                "best": best._asdict(), "watch": watch.saved()},
                           evaluation.get(tuning.metric) if fresh else None)
    if ended and not stopped:
        progress.say(f"{best.said(tuning)}, and none better in {best.since} evaluations after it: done")
    if tuning.patience is not None and best.step not in (None, step) and not stopped:
        progress.say(f"{best.said(tuning)}; --step={best.step} takes it")
    progress.close()
    if failed:
        back = watch.since_skipped()
        reason = "of what it was before this run was taken up" if back >= len(latest) else first_unsound(
            config, setup.examine(state, taught(latest[-1 - back]), np.int32(back + 1)))
        raise RunFailed(gave_up(step - back, watch.health.in_row, reason))
    if evaluation is None and not stopped:
        evaluation = run_evaluation(setup, prepared, state.params, state.router_state, step)
        progress.say(evaluation_line(evaluation))
    variables = {"params": setup.plain(state.params), "router": state.router_state}
    return Finished(step, stopped and step < options.steps and not ended, evaluation, best, prepared,
                    setup.model, setup.mesh, variables)


def predict_memory(setup: Setup, state: TrainState, batch: Any, limit: tuple[np.float32, ...]) -> None:
    """Compiles the train step, which the first call of it then takes, and ends the run if the devices' memory will not do.

    Raises:
      RunFailed: so; the data that was prepared stays.
    """
    jax.block_until_ready((state, batch))  # what computes them takes memory, too
    try:
        with processes.same_fate():
            memory.check_step(setup, lambda: setup.train_step.lower(state, batch, *limit).compile(),
                              lambda: memory.free(setup.mesh))
    except UserError as error:
        raise RunFailed(str(error)) from None


def items(state: TrainState) -> dict[str, Any]:
    """A state as the two items of a checkpoint: what a model needs, and what only training needs."""
    return {"model": {"params": state.params, "router": state.router_state},
            "training": {"step": state.step, "opt_state": state.opt_state, "key": state.key}}


def gave_up(step: int, in_row: int, reason: str) -> str:
    """What to say of a run that ends because of steps that were skipped."""
    reason = "of its loss, above the limit of config.train.faults.spike" if reason == SOUND else reason
    return (f"step {step}: {in_row} steps in a row were skipped, the last because {reason}; --mode=replay --step={step} "
            "shows it with its batch. A lower config.optimizer.learning_rate or other data may help; with "
            "--config.train.faults.max_skipped=None the same command goes on")


def start(setup: Setup, store: Store, loader: Any, before: float = math.inf) -> tuple[TrainState, int, Best, Watch]:
    """What to go on from, with the loader moved to its place.

    Returns:
      State, step, best evaluation and health of the newest checkpoint before a step, or fresh ones if there is none.
    """
    faults = setup.config.train.faults
    if not store.steps(before):
        fresh, nothing = setup.initialise(), best_of({}, setup.config.train.finetune)
        if setup.config.train.init_from is None:
            return fresh, 0, nothing, Watch(faults)
        with processes.same_fate():
            given = initial_variables(setup, {"params": fresh.params, "router": fresh.router_state})
        return fresh.replace(params=given["params"], router_state=given["router"]), 0, nothing, Watch(faults)
    restored = store.restore(place(items(setup.shapes), items(setup.shardings)), before=before)
    loader.set_state(restored.data["loader"])
    model, training = restored.items["model"], restored.items["training"]
    return TrainState(training["step"], model["params"], training["opt_state"], model["router"],
                      training["key"]), restored.step, best_of(restored.data, setup.config.train.finetune), Watch(
                          faults, restored.data.get("watch"))


def best_of(data: dict[str, Any], options: Finetune) -> Best:
    """The best evaluation that a checkpoint knows of; none if it goes by another metric now."""
    best = Best(**data.get("best", {}))
    return best if best.metric == options.metric else Best(metric=options.metric)


def initial_variables(setup: Setup, fresh: Any) -> Any:
    """Parameters and router state of the run in config.train.init_from, and fresh ones for another head and adapters.

    Raises:
      UserError: the bodies are not of one model.
    """
    workdir = Path(setup.config.train.init_from)
    theirs, _ = model_of(workdir)
    check(not theirs.model.architecture.expert_bits, f"config.train.init_from={workdir}: experts in few bits cannot be "
          "trained; take the model that they were made of")
    found = flat(load_sharded(workdir, setup.mesh).items["model"])
    mine, model = flat(fresh), setup.config.model

    def new(path: tuple[str, ...]) -> bool:
        return path[:2] == ("params", ADAPTERS) or (other_head and in_head(path))

    other_head = (theirs.model.head, theirs.model.classes) != (model.head, model.classes)
    for path in sorted(found.keys() | mine.keys()):
        if new(path):
            check(path[1] == ADAPTERS or path not in mine or path[1:] in setup.moving, f"config.train.init_from={workdir} "
                  f"has another head, so {'/'.join(path[1:])} is new and must move; add it to config.train.finetune.train")
            continue
        one, other = (tree[path].shape if path in tree else None for tree in (found, mine))
        check(one == other, f"config.train.init_from={workdir} is another model: {'/'.join(path)} has shape {one} there "
              f"and {other} here; take its config.json as --config")
    taken = [leaf if new(path) else found[path] for path, leaf in mine.items()]
    return jax.tree.unflatten(jax.tree.structure(fresh), taken)


class Meter:
    """Collects what steps report and turns it into one record; does not wait for the device in between."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._ceiling = matmul_ceiling(setup.mesh, setup.config.train.dtype)
        self._collected: list[tuple[dict[str, jax.Array], Any]] = []
        self._timed = 0
        self._since: float | None = None

    def add(self, means: dict[str, jax.Array], records: Any) -> None:
        """Takes the reports of one step. The first step compiles, so the clock starts when it is done."""
        self._collected.append((means, records))
        if self._since is None:
            jax.block_until_ready(means)
            self._since = time.monotonic()
        else:
            self._timed += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not training time."""
        if self._collected:
            jax.block_until_ready(self._collected[-1])
        begin = time.monotonic()
        yield
        self._since += time.monotonic() - begin

    def take(self) -> dict[str, Any]:
        """Means over the steps since the last call, how many of them were skipped, and speed; waits for the device."""
        collected = jax.device_get([(means, in_order(records)) for means, records in self._collected])
        now = time.monotonic()
        config = self._setup.config
        rate = self._timed * config.data.batch_size * sum(row_lengths(config)) / (now - self._since)
        self._collected, self._timed, self._since = [], 0, now
        # Skipped steps may hold what is no number, so they count only if there are no others.
        counted = [one for one in collected if not one[0]["skipped"]] or collected
        layers = total_records([records for _, records in counted])
        means = {name: np.mean([means[name] for means, _ in counted], axis=0) for name in counted[0][0]}
        task = config.data.task
        tasks = training_summary(task.names, means.pop("task_loss"), means.pop("task_targets")
                                 ) if isinstance(task, Mixture) else {}
        numbers = {name: float(mean) for name, mean in means.items()}
        numbers["skipped"] = sum(int(means["skipped"]) for means, _ in collected)
        return numbers | tasks | loss_summary(layers) | routing_summary(layers) | {
            "tokens_per_second": rate, "utilisation": rate * training_flops(config) / self._ceiling}


@contextlib.contextmanager
def stop_on_signal(saves: bool = True) -> Iterator[Callable[[], bool]]:
    """Inside, a first SIGINT or SIGTERM only sets a flag, which the function given tells; a second one ends the process.

    So does the first one if there is nothing to save.
    """
    seen: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if seen or not saves:
            os.write(sys.stderr.fileno(), b"moejax: ended at once; the same command goes on from the last checkpoint\n")
            os._exit(INTERRUPTED)  # an exception would wait for the device, and for what is being saved
        seen.append(number)
        os.write(sys.stderr.fileno(), b"moejax: stopping after this step and saving; once more stops at once\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
