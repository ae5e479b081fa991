"""What the prepare scripts of the experiments share: fetching a package's file, writing records, and how a command ends."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moejax.config import UserError, check
from moejax.exit_status import exit_status


@contextmanager
def fetched(requirement: str, *options: str) -> Iterator[Path]:
    """The file of a package, such as a wheel, which pip downloads into a folder that is gone afterwards.

    Args:
      requirement: as pip takes it, with a version, so that everybody gets the same file.
      options: further ones of `pip download`.

    Raises:
      UserError: pip could not fetch it.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps",
                               *options, "-d", folder, requirement], capture_output=True, text=True)
        check(done.returncode == 0, f"pip could not fetch {requirement} ({last_line(done.stderr)}); it needs the network "
              "or a package index that has it")
        path, = Path(folder).iterdir()
        yield path


def last_line(stderr: str) -> str:
    """What a program said last, for an error of one line."""
    return (stderr.strip() or "it says nothing").splitlines()[-1]


def write(path: Path, rows: Iterable[Mapping[str, Any]], ascii_only: bool = False) -> None:
    r"""Writes records as JSON lines, and makes the folder if need be.

    Args:
      path: of the file; what was there is replaced.
      rows: the records.
      ascii_only: whether other letters are written as \u and four digits.

    Raises:
      UserError: the file cannot be written.
    """
    lines = [json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another folder") from None


def command(prepare: Callable[[Path], None], name: str) -> int:
    """Runs the prepare script of the experiment `name` with the folder that the command line gives; the exit status."""
    def work() -> None:
        given = sys.argv[1:]
        check(len(given) == 1 and not given[0].startswith("-"),
              f"give the folder to write, as in: python -m experiments.{name}.prepare runs/{name}/data")
        folder = Path(given[0])
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        check(there.is_dir() and os.access(there, os.W_OK), f"{folder}: cannot be written; give another folder")
        prepare(folder)

    return exit_status(work, "the same command begins anew")
