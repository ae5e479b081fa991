"""A fuzz of all that reads what users or others wrote: an input is taken, or refused in one line that helps.

    python -m benchmarks.faults.fuzz --inputs=2000 --seed=1 [--only=flags,archives]
"""

import argparse
import contextlib
import io
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from benchmarks.faults import fuzz_checkpoints, fuzz_configs, fuzz_data, fuzz_models
from benchmarks.faults.fuzz_inputs import Reader
from moejax.exit_status import INTERRUPTED, WRONG_INPUT, exit_status

READERS: dict[str, Reader] = {**fuzz_configs.READERS, **fuzz_data.READERS, **fuzz_checkpoints.READERS,
                              **fuzz_models.READERS}
SECONDS, KIB = 30.0, 1 << 20
"""What one input may take at most: time, and memory beyond the most that was needed before."""


class Result(NamedTuple):
    """What became of the inputs of a reader: how many there were, and in what each that broke the law did so."""

    kind: str
    inputs: int
    wrong: list[str]

    @property
    def failures(self) -> int:
        """How many broke the law."""
        return len(self.wrong)

    @property
    def first(self) -> str:
        """The first of these; empty if there is none."""
        return next(iter(self.wrong), "")


def run(inputs: int, seed: int, folder: Path, kinds: Sequence[str] = tuple(READERS)) -> Iterator[Result]:
    """Feeds every reader with its share of so many inputs, in a folder that is left empty."""
    for kind, count in shares(inputs, kinds).items():
        yield feed(kind, count, seed, folder)


def shares(inputs: int, kinds: Sequence[str] = tuple(READERS)) -> dict[str, int]:
    """How many of so many inputs each reader gets, at least one."""
    total = sum(READERS[kind].share for kind in kinds)
    return {kind: max(1, round(inputs * READERS[kind].share / total)) for kind in kinds}


def feed(kind: str, inputs: int, seed: int, folder: Path) -> Result:
    """Feeds one reader; fewer inputs if there are not so many."""
    reader, problems = READERS[kind], []

    @hypothesis.seed(seed)
    @settings(max_examples=inputs, database=None, deadline=None, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate])
    @given(reader.inputs)
    def one(value: Any) -> None:
        here = folder / f"{len(problems)}"
        here.mkdir()
        problem = broken(reader.plant(value, here), here, reader.statuses)
        problems.append(problem and f"{problem}; input {repr(value)[:1000]}")
        shutil.rmtree(here)
    one()
    return Result(kind, len(problems), [problem for problem in problems if problem])


def broken(work: Callable[[], Any], folder: Path, statuses: Sequence[int]) -> str:
    """Does the work and says in what it breaks the law; nothing if it does not.

    The law: it ends with a status that it may have, never with an exception, within limits of time and memory. Input that
    is refused leaves the folder as it was, and one line on stderr.
    """
    before, begin, peak = listing(folder), time.monotonic(), _peak()
    said, own = io.StringIO(), []
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = exit_status(lambda: own.append(work()), "") or (own[0] if isinstance(own[0], int) else 0)
    except SystemExit as error:  # of argparse
        status = error.code
    except BaseException as error:  # also what is raised for a panic in Rust
        where = [frame for frame in traceback.extract_tb(error.__traceback__) if "/moejax/" in frame.filename]
        return f"{type(error).__name__}: {str(error)[:200]} at {where[-1] if where else '?'}"
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    lines = [line for line in said.getvalue().splitlines() if line and "%|" not in line]  # without bars of progress
    if status not in statuses:
        return f"status {status}: {lines[:3]}"
    if status == WRONG_INPUT and not (len(lines) == 1 and lines[0].startswith("moejax: ") and len(lines[0]) > 20):
        return f"not one line that helps: {lines[:3]}"
    if status == WRONG_INPUT and listing(folder) != before:
        return f"what was refused has changed files: {set(listing(folder)) ^ set(before)}"
    if time.monotonic() - begin > SECONDS or _peak() - peak > KIB:
        return f"took {time.monotonic() - begin:.0f} s and {(_peak() - peak) >> 10} MiB"
    return ""


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything in a folder; folders count, but not when they changed."""
    return {str(path.relative_to(folder)): (0, 0) if path.is_dir() else (path.lstat().st_size, path.lstat().st_mtime_ns)
            for path in folder.rglob("*")}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(arguments: Sequence[str]) -> int:
    """Prints a line for each reader and each different way to break the law; returns 1 if there is one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=lambda names: names.split(","), default=list(READERS))
    options, failed = parser.parse_args(arguments), False
    with tempfile.TemporaryDirectory() as folder:
        for result in run(options.inputs, options.seed, Path(folder), options.only):
            print(f"{result.kind:>20}  {result.inputs:>6} inputs  {result.failures:>4} failures", flush=True)
            different = {problem.partition("; input")[0]: problem for problem in result.wrong}
            for problem in different.values():
                print(f"    {problem}", flush=True)
            failed = failed or bool(result.wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
