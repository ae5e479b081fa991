"""Batches whose loss is no finite number, or a spike: their steps must change nothing, and be told."""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp

from benchmarks.faults import scene
from moejax.train import setup

MODULUS = 5
"""A batch is spoilt if the sum of its tokens is a multiple of it: so whatever process sees it, it is the same batches."""


def spoil(factor: float, modulus: int) -> None:
    """From now on the loss of some batches is multiplied by a factor, in the step as in what it reports, as `spoilt` is."""
    scene.linger()
    make_functions = setup.make_functions

    def spoilt(*arguments):
        functions = make_functions(*arguments)

        def objective(params, x, batch):
            total, sums = functions.objective(params, x, batch)
            bad = jnp.sum(batch["tokens"]) % modulus == 0
            by = jnp.where(bad, factor, 1.0)
            told = bad * jnp.sum(batch["mask"], dtype=jnp.float32)  # is divided by that
            return total * by, sums | {"loss": sums["loss"] * by, "spoilt": told}

        return functions._replace(objective=objective)

    setup.make_functions = spoilt


def skip(straight: Path, fault: str, factor: float, *options: str) -> scene.Row:
    """A run some of whose batches are spoilt, and the same one killed in the middle: both skip the same steps.

    Args:
      straight: the workdir of a run that met no fault, in a scene.
      fault: its name.
      factor: of the losses.
      options: of the command.
    """
    folder, name = straight.parent, fault.replace(" ", "_")
    arguments = ("--config.train.checkpoint_every=1", *options)
    before = functools.partial(spoil, factor, MODULUS)
    whole, killed = folder / name, folder / f"{name}_killed"
    problems = ended(whole, arguments, before)
    with scene.running(folder, f"--workdir={killed.name}", *arguments, before=before) as process:
        if not scene.wait_for(lambda: len(scene.saved(killed)) > scene.STEPS // 2, [process]) or (
                not scene.killed(process)) or len(scene.saved(killed)) == scene.STEPS:
            problems.append(f"ended before it could be killed: {scene.words(folder)}")
    problems += ended(killed, arguments, before)
    if problems:
        return scene.row(fault, [problems], "")
    train = [record for record in scene.records(whole) if record["split"] == "train"]
    spoilt, skipped = ([record["step"] for record in train if record[key]] for key in ("spoilt", "skipped"))
    problems += [] if spoilt == skipped and spoilt and min(spoilt) > 1 else [f"spoilt were {spoilt}, skipped {skipped}"]
    problems += [f"killed in the middle: {one}" for one in scene.differences(killed, whole)]
    outcomes = [[f"step {step} was skipped, and {array} is another" for array in changed(whole, step)] for step in skipped]
    return scene.row(fault, [problems + one for one in outcomes] or [problems], f"the updates of steps {skipped}; nothing "
                     "else changed; killed in the middle it is the same run")


def ended(workdir: Path, arguments: Sequence[str], before: Callable[[], None]) -> list[str]:
    """Runs or goes on to the end. Returns what is wrong."""
    status = scene.end(scene.begin(workdir.parent, f"--workdir={workdir.name}", *arguments, before=before))
    return [f"exit status {status}: {scene.words(workdir.parent)}"] if status else []


def changed(workdir: Path, step: int) -> list[str]:
    """The arrays that a step that was skipped has changed."""
    ours, last = (scene.values(workdir, one) for one in (step, step - 1))
    return [array for array in ours if array not in ("training/step", "data") and ours[array] != last[array]]


def never_finite(straight: Path) -> scene.Row:
    """A run all of whose batches are spoilt ends soon, with status 1 and the reason, and the batch can be seen."""
    folder = straight.parent
    before = functools.partial(spoil, float("nan"), 1)
    status = scene.end(scene.begin(folder, "--workdir=hopeless", "--config.train.faults.max_skipped=4", before=before))
    said = scene.words(folder)
    found = re.search(r"step (\d+): 4 steps in a row were skipped, the last because .*--mode=replay --step=\1 ", said)
    problems = [] if status == 1 and found else [f"exit status {status}: {said}"]
    if found:
        status = scene.end(scene.begin(folder, "--workdir=hopeless", "--mode=replay", f"--step={found[1]}", before=before))
        shown = (folder / "run.out").read_text()
        seen = status == 0 and "the loss is not" in shown and "row " in shown
        problems += [] if seen else [f"replay: {scene.words(folder)}"]
    return scene.row("no batch is finite", [problems], "nothing: ends after 4 steps in a row and says why; replay shows "
                     "the batch")
