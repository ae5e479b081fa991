"""The fault suite: does to small runs what happens to large ones, and prints what came of it.

    python -m benchmarks.faults.suite [--long] [--only=WORD] [--seed=0] [--folder=DIR] [--json=FILE]

Survived means: the command that began the run goes on with it, and what comes out is bit for bit the run that met no fault
(on another mesh: the same batches, losses within 1e-5); damage is found or lies in nothing that is read; what ends the run
says why. Exit status 1 if anything else happened. The short form takes minutes, --long is that of the table in
docs/checkpoints.md. It needs what `pip install -e ".[test]"` installs, and Linux.
"""

import argparse
import dataclasses
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.faults import checkpoints, full_disk, fuzz, kills, numbers, scene, several, signals

TOPOLOGIES = (
    ((1, 8, "data=8"), (1, 4, "data=4"), (1, 1, "data=1")),
    ((1, 4, "data=1 expert=4"), (1, 2, "data=1 expert=2"), (1, 1, "data=1 expert=1")),
    ((4, 1, "data=4"), (2, 1, "data=2"), (1, 1, "data=1")))
"""Processes, devices of each, mesh: three runs that change twice each."""
BOTH = ((2, 2, "data=1 expert=4"), (1, 2, "data=1 expert=2"), (1, 1, "data=1"))
"""A run that changes processes and devices."""


@dataclasses.dataclass(frozen=True)
class Times:
    """How often each fault is injected."""

    kills: int
    aimed: int
    flips: int
    truncations: int
    deletions: int
    manifests: int
    writers: int
    topologies: tuple
    processes: int
    inputs: int


SHORT = Times(kills=4, aimed=1, flips=10, truncations=4, deletions=4, manifests=4, writers=1, topologies=(BOTH,),
              processes=2, inputs=522)
LONG = Times(kills=50, aimed=3, flips=40, truncations=10, deletions=8, manifests=10, writers=2, topologies=TOPOLOGIES,
             processes=4, inputs=2000)


def faults(straight: Path, times: Times, seed: int) -> dict[str, Callable[[], scene.Row]]:
    """Every fault by name, in the order of the table, each with draws of its own."""
    rng = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(16))
    last, keep_nothing = times.processes - 1, "--config.train.faults.save_on_preemption=False"
    found = {"kills at random": partial(kills.kill_at_random, straight, times.kills, next(rng))}
    for moment in kills.AIMS:
        found[f"kills {moment}"] = partial(kills.kill_during, straight, moment, times.aimed, next(rng))
    for kind in (signal.SIGTERM, signal.SIGINT):
        found[f"signals: {kind.name}"] = partial(signals.send, straight, next(rng), kind)
    found["signals: twice"] = partial(signals.send, straight, next(rng), signal.SIGTERM, again=True)
    found["signals: nothing saved"] = partial(signals.send, straight, next(rng), signal.SIGTERM, keep_nothing)
    for kind, count in (("bit flip", times.flips), ("truncation", times.truncations), ("deletion", times.deletions),
                        ("torn manifest", times.manifests)):
        found[f"damage: {kind}"] = partial(checkpoints.damage_newest, straight, kind, count, next(rng))
    for kind, gone in ((signal.SIGTERM, last), (signal.SIGKILL, last), (signal.SIGKILL, 0), (signal.SIGSTOP, last)):
        found[f"processes: {kind.name} {gone}"] = partial(several.strike, straight, times.processes, kind, next(rng), gone)
    found["disk"] = partial(full_disk.fill, straight)
    found["numbers: not finite"] = partial(numbers.skip, straight, "loss that is not finite", float("nan"))
    found["numbers: spike"] = partial(numbers.skip, straight, "loss that is a spike", 1e3, "--config.train.faults.spike=50",
                                      "--config.train.faults.spike_window=2")
    found["numbers: never finite"] = partial(numbers.never_finite, straight)
    for number, topologies in enumerate(times.topologies):
        found[f"topology {number}"] = partial(several.change_topology, straight, topologies, f"topology{number}")
    found["writers"] = partial(several.two_writers, straight, times.writers)
    for kind, count in fuzz.shares(times.inputs).items():
        found[f"fuzz: {kind}"] = partial(fuzzed, straight, kind, count, seed)
    return found


def fuzzed(straight: Path, kind: str, inputs: int, seed: int) -> scene.Row:
    """Input of a kind that was made to be wrong; see `fuzz`."""
    folder = straight.with_name(f"fuzz_{kind.replace(' ', '_')}")
    folder.mkdir()
    result = fuzz.feed(kind, inputs, seed, folder)
    return scene.Row(f"input: {kind}", result.inputs, result.inputs - result.failures,
                     "nothing: taken, or refused in one line", tuple(result.wrong[:3]))


def run(folder: Path, times: Times, seed: int = 0, only: str = "") -> Iterator[scene.Row]:
    """Injects all faults whose name has `only` in it, and tells of each as soon as it is known."""
    straight = scene.set_scene(folder / "scene") / "straight"
    if problem := scene.finished(straight.parent, "--workdir=straight"):
        yield scene.Row("none", 1, 0, "", (problem,))
        return
    for name, inject in faults(straight, times, seed).items():
        if only in name:
            try:
                yield inject()
            except Exception as error:  # the others are still of interest
                yield scene.row(name, [[f"{type(error).__name__}: {error}"]], "")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="many faults of each kind, on four processes")
    parser.add_argument("--only", default="", metavar="WORD", help="faults whose name has it: kills, signals, damage, "
                        "processes, disk, numbers, topology, writers, fuzz")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places")
    parser.add_argument("--folder", type=Path, help="a new one, which stays; else one that goes")
    parser.add_argument("--json", type=Path, help="a file for the table")
    options = parser.parse_args(argv)
    if options.folder is not None and options.folder.exists():
        parser.error(f"--folder={options.folder} is there already; give a new one")
    rows, begun = [], time.monotonic()
    print(scene.ROW.format("fault", "injected", "survived", "lost"))
    with tempfile.TemporaryDirectory() as temporary:
        for row in run((options.folder or Path(temporary)).absolute(), LONG if options.long else SHORT, options.seed,
                       options.only):
            rows.append(row)
            print(row, *(f"    PROBLEM {problem}" for problem in row.problems), sep="\n", flush=True)
    print(f"{sum(row.injected for row in rows)} faults, {sum(row.survived for row in rows)} survived, "
          f"{time.monotonic() - begun:.0f} s")
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    return int(not rows or any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
