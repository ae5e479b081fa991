"""SIGKILL at any moment of a run: while it starts, compiles, steps, evaluates, and while a checkpoint is being written."""

import functools
import importlib
import itertools
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.faults import scene

PAUSE = 2
"""Seconds that an aimed kill has."""


def kill_at_random(straight: Path, times: int, rng: np.random.Generator) -> scene.Row:
    """Kills runs, each time at a moment between its start and where it would end, and lets the same command go on.

    Args:
      straight: the workdir of a run that met no fault, in a scene.
      times: how many kills. A run that reaches its end is compared, and another is begun.
      rng: draws the moments.
    """
    folder, bar = straight.parent, tqdm(total=times, unit="kill", desc="kill -9", leave=False)
    begun = time.monotonic()
    problem = scene.finished(folder, "--workdir=timed")
    whole = time.monotonic() - begun
    outcomes, redone, at, run = [], [], [], 0
    while len(outcomes) < times and not problem:
        workdir, run = folder / f"killed{run}", run + 1
        own = []
        while len(outcomes) + len(own) < times and not problem:
            before = scene.saved(workdir)
            with scene.running(folder, f"--workdir={workdir.name}") as process:
                process.join(rng.uniform(0, whole))
                if not scene.killed(process):
                    problem = process.exitcode and f"exit status {process.exitcode}: {scene.words(folder)}"
                    break
            bar.update()
            kept = scene.saved(workdir)
            own.append([f"the checkpoint of step {step} was gone" for step in before if step not in kept])
            redone.append(scene.recorded(workdir) - max(kept, default=0))
            at.append(scene.recorded(workdir))
        wrong = [problem] if problem else ended(workdir, straight)
        if own:
            own[-1] += [f"after {len(own)} kills: {one}" for one in wrong]
        outcomes += own
    bar.close()
    lost = (f"at most {max(redone)} steps done again (median {statistics.median(redone):g}); struck from step {min(at)} to "
            f"{max(at)}, {sum(not one for one in at)} before the first") if redone else ""
    return scene.row("kill -9 at a random moment", outcomes or [[problem or "none"]], lost)


def ended(workdir: Path, straight: Path) -> list[str]:
    """What is wrong with a run that was killed, once the command has gone on to its end; nothing is left of a good one."""
    problem = scene.finished(workdir.parent, f"--workdir={workdir.name}")
    wrong = [problem] if problem else list(scene.differences(workdir, straight))
    if not wrong:
        shutil.rmtree(workdir)
    return wrong


def pause(module: str, name: str, number: int, marker: Path) -> None:
    """From now on the call of that number of a function waits, and a file tells that it does."""
    where = importlib.import_module(module)
    function, calls = getattr(where, name), itertools.count(1)

    @functools.wraps(function)
    def paused(*arguments: Any, **more: Any) -> Any:
        if next(calls) == number:
            marker.touch()
            time.sleep(PAUSE)
        return function(*arguments, **more)

    setattr(where, name, paused)


AIMS = {
    "during the first compile": ("moejax.train.memory", "check_step", 1, False),
    "while a checkpoint is written": ("moejax.checkpoint.manifest", "write", 3, True),
    "during an evaluation": ("moejax.train.loop", "run_evaluation", 2, True)}
"""Moment -> where a run pauses: module, function, number of the call; and whether it uses what was compiled before."""


def kill_during(straight: Path, moment: str, times: int, rng: np.random.Generator) -> scene.Row:
    """Kills runs at a certain moment, and lets the same command go on.

    Args:
      straight: the workdir of a run that met no fault, in a scene.
      moment: in `AIMS`. Compiling takes longer than the pause before it, so kills after it meet the compiler.
      times: how many.
      rng: draws what part of the pause, or more of the compiling, goes by.
    """
    folder, outcomes, steps = straight.parent, [], []
    module, function, number, keep_compiled = AIMS[moment]
    for index in range(times):
        workdir = folder / f"{function}{index}"
        marker = folder / f"{function}{index}.reached"
        aim: Callable[[], None] = functools.partial(pause, module, function, number, marker)
        wrong = []
        with scene.running(folder, f"--workdir={workdir.name}", before=aim, keep_compiled=keep_compiled) as process:
            if scene.wait_for(marker.exists, [process]):
                process.join(rng.uniform(0, 0.9 * PAUSE) if keep_compiled else PAUSE + rng.uniform(0, 1))
                wrong += [] if scene.killed(process) else [f"ended before the kill: {scene.words(folder)}"]
            else:
                wrong.append(f"did not come so far: {scene.words(folder)}")
        steps.append(scene.recorded(workdir))
        outcomes.append(wrong or ended(workdir, straight))
    return scene.row(f"kill -9 {moment}", outcomes, f"nothing that was saved; struck at step {min(steps)} to {max(steps)}")
