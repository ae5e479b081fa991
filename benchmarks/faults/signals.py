"""SIGTERM and SIGINT to a run: once, twice, and where nothing is to be saved."""

import signal
import time
from pathlib import Path

import numpy as np

from benchmarks.faults import scene
from moejax.exit_status import INTERRUPTED

AT_ONCE = 5
"""Seconds in which a process must have ended that is to end at once; it needs none of them for work."""


def send(straight: Path, rng: np.random.Generator, number: signal.Signals, *options: str, again: bool = False) -> scene.Row:
    """Sends a signal to a run in the middle of its steps, and lets the same command go on.

    The first one finishes the step, saves and ends with status 0, unless the options say that nothing is to be saved: then
    it ends the run at once with status 130, as a second one does.

    Args:
      straight: the workdir of a run that met no fault, in a scene.
      rng: draws the step after which it comes.
      number: the signal.
      options: of the command.
      again: whether to send it a second time before the step is done.
    """
    folder, at = straight.parent, int(rng.integers(3, scene.STEPS - 4))
    name = f"{number.name}{'_again' * again}{len(options)}"
    workdir, at_once = folder / name, again or bool(options)
    problems, seconds, wanted = [], 0.0, INTERRUPTED if at_once else 0
    with scene.running(folder, f"--workdir={name}", *options, name=name, before=scene.linger) as process:
        if scene.wait_for(lambda: scene.recorded(workdir) >= at, [process]):
            scene.send(process, number)
            if again:
                scene.wait_for(lambda: "once more stops at once" in (folder / f"{name}.err").read_text(), [process])
                scene.send(process, number)
            begun = time.monotonic()
            status = scene.end(process)
            seconds = time.monotonic() - begun
            said = (folder / f"{name}.out").read_text() + scene.words(folder, name)
            told = "the same command goes on from the last checkpoint" if at_once else "all saved; the same command goes on"
            problems += [] if status == wanted and told in said else [f"exit status {status}: {scene.words(folder, name)}"]
            problems += [f"ended only after {seconds:.1f} s"] if at_once and seconds > AT_ONCE else []
        else:
            problems.append(f"ended before step {at}: {scene.words(folder, name)}")
    reached, kept = scene.recorded(workdir), max(scene.saved(workdir), default=0)
    problems += [f"{reached - kept} steps were not saved"] if not at_once and reached != kept else []
    problem = scene.finished(folder, f"--workdir={name}")
    problems += [problem] if problem else list(scene.differences(workdir, straight))
    how = f"{number.name} twice" if again else f"{number.name}, nothing to be saved" if options else number.name
    lost = f"{reached - kept} steps done again; " + (
        f"ended with status 130 after {seconds:.1f} s" if at_once else "all saved, ended with status 0")
    return scene.row(how, [problems], lost)
