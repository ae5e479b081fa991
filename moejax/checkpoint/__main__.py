"""python -m moejax.checkpoint list WORKDIR | verify WORKDIR"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from moejax.config import UserError, check
from moejax.exit_status import exit_status

USAGE = """
  python -m moejax.checkpoint list WORKDIR      every checkpoint: step, size, age, metric, good or bad by its manifest and
                                                the sizes of its files; does not read the arrays
  python -m moejax.checkpoint verify WORKDIR    reads everything and compares it with the hashes; names what is damaged

Exit status: 0 if all checkpoints are good, 1 if one is not, 2 if there is none. Nothing is written.
"""


def listed(workdir: Path) -> Iterator[tuple[list[str], bool]]:
    """A row for each checkpoint, and whether it is good as far as its manifest and the sizes of its files tell."""
    from moejax.checkpoint.manifest import Damaged
    from moejax.checkpoint.store import step_folders, summary
    for folder in step_folders(workdir / "checkpoints"):
        size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
        age, metric, state = "", "", "good"
        try:
            found = summary(folder)
            if found.manifest is None:
                state = "no manifest (of an older version): cannot be verified"
            else:
                age = ago(time.time() - found.manifest.saved)
            if found.value is not None:
                metric = f"{found.metric} {found.value:.4g}"
        except Damaged as error:
            state = f"BAD: {error}"
        yield [folder.name, f"{size:,}", age or ago(time.time() - folder.lstat().st_mtime), metric, state], state == "good"


def verified(workdir: Path) -> Iterator[tuple[list[str], bool]]:
    """A row for each checkpoint, and whether everything in it is what was saved."""
    from moejax.checkpoint.store import step_folders
    from moejax.checkpoint.verify import verify
    for folder in step_folders(workdir / "checkpoints"):
        result = verify(folder)
        state = f"BAD: {'; '.join(result.wrong[:5])}" + (f" and {len(result.wrong) - 5} more" if result.wrong[5:] else "")
        yield [folder.name, f"{result.arrays:,}", f"{result.files:,}", f"{result.size:,}",
               state if result.wrong else "good"], not result.wrong


def ago(seconds: float) -> str:
    """A time span for people."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status; see `USAGE`."""
    parser = argparse.ArgumentParser(prog="python -m moejax.checkpoint", description="Looks at the checkpoints of a run.",
                                     epilog=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (("list", "what there is"), ("verify", "whether it is what was saved")):
        commands.add_parser(name, help=help).add_argument("workdir", metavar="WORKDIR", type=Path)
    given = parser.parse_args(arguments)
    bad = []

    def work() -> None:
        check(os.path.isdir(given.workdir), f"{given.workdir}: no such folder; correct the path")
        rows, head = (listed, ("step", "bytes", "age", "metric", "state")) if given.command == "list" else (
            verified, ("step", "arrays", "files", "bytes", "state"))
        count = 0
        try:
            for row, good in rows(given.workdir):
                if not count:
                    print(line(head))
                print(line(row), flush=True)
                count, bad[:] = count + 1, bad + [row[0]] * (not good)
        except OSError as error:
            raise UserError(f"{given.workdir}/checkpoints: cannot be read ({error.strerror})") from None
        check(count > 0, f"{given.workdir}: holds no checkpoint; give the --workdir of a run")
    return exit_status(work, "nothing was changed") or (1 if bad else 0)


def line(cells: Sequence[str]) -> str:
    """A row of a table with five columns, the last as wide as it is."""
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells[:-1], (9, 15, 8, 16))) + f"  {cells[-1]}"


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # a run may be using the accelerator, and nothing here needs it
    sys.exit(main(sys.argv[1:]))
