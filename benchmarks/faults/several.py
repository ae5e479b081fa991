"""Faults of a job of several processes, runs that go on with other devices, and two that want one workdir."""

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from benchmarks.faults import scene
from moejax.checkpoint.verify import verify

CLOSE = 1e-5
"""How far losses may differ between meshes, whose sums have another order."""
DEADLINE = 60
"""Seconds in which the other processes must have ended when one is gone."""


@contextlib.contextmanager
def job(folder: Path, name: str, processes: int, *arguments: str, devices: int = 1, linger: bool = False
        ) -> Iterator[list[BaseProcess]]:
    """A job of one process or several with a workdir of that name; all have ended when the block is left."""
    coordinator = scene.address()
    flags = [(f"--coordinator={coordinator}", f"--num_processes={processes}", f"--process_id={index}")
             if processes > 1 else () for index in range(processes)]
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(scene.running(
            folder, f"--workdir={name}", *arguments, *more, name=f"{name}{index}", devices=devices,
            before=scene.linger if linger and not index else None)) for index, more in enumerate(flags)]


def ended(folder: Path, name: str, processes: int, *arguments: str, devices: int = 1) -> list[str]:
    """Runs a job to its end. Returns what is wrong."""
    with job(folder, name, processes, *arguments, devices=devices) as started:
        found = [scene.end(one) for one in started]
    return [f"exit status {found}: {scene.words(folder, f'{name}0')}"] if any(found) else []


def strike(straight: Path, processes: int, number: signal.Signals, rng: np.random.Generator, gone: int) -> scene.Row:
    """Sends a signal to one process of a job in the middle of its run; then the same command goes on.

    After SIGTERM all must have saved the same step and end with status 0. After SIGKILL or SIGSTOP the others must end by
    themselves within a minute, and say which one is gone. In the end the run is bit for bit that of a job that met nothing,
    whose losses are those of one process.

    Args:
      straight: the workdir of a run that met no fault, in a scene.
      processes: of the job.
      number: the signal.
      rng: draws the step after which it is sent.
      gone: which process gets it.
    """
    folder, name, mesh = straight.parent, f"{number.name}{gone}of{processes}", f"--config.mesh.data={processes}"
    workdir, alone, at = folder / name, folder / f"alone{processes}", int(rng.integers(3, scene.STEPS - 4))
    problems = [] if alone.exists() else ended(folder, alone.name, processes, mesh) + far(alone, straight)
    seconds, reached, kept = 0.0, 0, 0
    with job(folder, name, processes, mesh, linger=True) as started:
        if scene.wait_for(lambda: scene.recorded(workdir) >= at, started):
            scene.send(started[gone], number)
            begun = time.monotonic()
            others = [one for index, one in enumerate(started) if number == signal.SIGTERM or index != gone]
            status = [scene.end(one, max(1.0, begun + 2 * DEADLINE - time.monotonic())) for one in others]
            seconds = time.monotonic() - begun
            reached, kept = scene.recorded(workdir), max(scene.saved(workdir), default=0)
            problems += untold(folder, name, number, gone, status, seconds, processes)
            problems += [f"of {reached} steps {kept} are saved"] if number == signal.SIGTERM and reached != kept else []
            problems += [] if reached < scene.STEPS else ["was done before the signal came"]
        else:
            problems.append(f"ended before step {at}: {scene.words(folder, f'{name}0')}")
    problems += ended(folder, name, processes, mesh) + list(scene.differences(workdir, alone))
    lost = f"{reached - kept} steps done again; " + (
        "all saved the same step and ended with status 0" if number == signal.SIGTERM else
        f"the others named process {gone} and ended within {seconds:.0f} s")
    return scene.row(f"{number.name} to process {gone} of {processes}", [problems], lost)


def untold(folder: Path, name: str, number: signal.Signals, gone: int, status: Sequence[int], seconds: float,
           processes: int) -> Iterator[str]:
    """What is wrong with how the processes of a job ended."""
    if number == signal.SIGTERM:
        if any(status):
            yield f"exit status {status}: {scene.words(folder, f'{name}0')}"
        elif "all saved; the same command goes on" not in (folder / f"{name}0.out").read_text():
            yield "process 0 does not say that all is saved"
        return
    if 0 in status or -signal.SIGKILL in status or seconds > DEADLINE:
        yield f"the others ended with {status} after {seconds:.0f} s"
    for index in range(processes):
        said = (folder / f"{name}{index}.err").read_text(errors="replace")
        # Whoever finds the connection closed that process 0 keeps is ended by jax, which calls it the leader.
        names = (f"process {gone} (", "process 0, which", "leader") if gone == 0 else (f"process {gone} (",)
        if index != gone and not any(one in said for one in names):
            yield f"process {index} does not name process {gone}: {scene.words(folder, f'{name}{index}')}"


def far(workdir: Path, straight: Path) -> list[str]:
    """Where the losses of a run are not those of the straight one, or a checkpoint is not good."""
    ours, theirs = scene.losses(workdir), scene.losses(straight)
    if ours.keys() != theirs.keys():
        return ["metrics.jsonl tells of other steps"]
    wrong = [f"the loss of step {step} is {ours[step, split]}, not {theirs[step, split]}" for step, split in theirs
             if not math.isclose(ours[step, split], theirs[step, split], rel_tol=CLOSE)]
    return wrong + [f"step {step}: {one}" for step in scene.saved(workdir)
                    for one in verify(workdir / "checkpoints" / str(step)).wrong]


def change_topology(straight: Path, topologies: Sequence[tuple[int, int, str]], name: str) -> scene.Row:
    """A run that goes on with other processes, devices and meshes each time it is stopped.

    Args:
      straight: the workdir of a run that met no fault, in a scene.
      topologies: processes, devices of each, and sizes of the mesh as `AXIS=SIZE ...`.
      name: of its workdir.
    """
    folder, workdir, outcomes, stopped = straight.parent, straight.parent / name, [], []
    for number, (processes, devices, mesh) in enumerate(topologies, 1):
        sizes = [f"--config.mesh.{size}" for size in mesh.split()]
        if number == len(topologies):
            outcomes[-1] += ended(folder, name, processes, *sizes, devices=devices) + far(workdir, straight)
            continue
        at, wrong = scene.STEPS * number // len(topologies), []
        with job(folder, name, processes, *sizes, devices=devices, linger=True) as started:
            if scene.wait_for(lambda at=at: scene.recorded(workdir) >= at, started):
                scene.send(started[0], signal.SIGTERM)
            status = [scene.end(one) for one in started]
            wrong += [f"{mesh}: exit status {status}: {scene.words(folder, f'{name}0')}"] if any(status) else []
        stopped.append(scene.recorded(workdir))
        outcomes.append(wrong)
    names = " -> ".join(mesh + (f" ({processes} processes)" if processes > 1 else "") for processes, _, mesh in topologies)
    return scene.row("another topology", outcomes, f"nothing; losses within {CLOSE:g}; {names}; after steps {stopped}")


def two_writers(straight: Path, times: int) -> scene.Row:
    """A second run wants the workdir of one that is going on: it must be refused by name, and the first end undisturbed."""
    folder, outcomes = straight.parent, []
    for number in range(times):
        workdir, wrong = folder / f"shared{number}", []
        with scene.running(folder, f"--workdir={workdir.name}", name="first", before=scene.linger) as first:
            if scene.wait_for((workdir / "config.json").exists, [first]):
                status = scene.end(scene.begin(folder, f"--workdir={workdir.name}", name="second"))
                said = scene.words(folder, "second")
                wrong += [] if first.exitcode is None else ["the first run had ended"]
                wrong += [] if status == 2 and f"in use by process {first.pid}" in said else [
                    f"the second run ended with status {status}: {said}"]
            wrong += [f"the first run failed: {scene.words(folder, 'first')}"] if scene.end(first) else (
                scene.differences(workdir, straight))
        outcomes.append(wrong)
        if not wrong:
            shutil.rmtree(workdir)
    return scene.row("two runs in one workdir", outcomes, "nothing; the second is refused and names the first")
