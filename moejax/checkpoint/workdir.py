"""The folder of a run and the config in it."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Iterator

from moejax.bounded import read_object
from moejax.config import AUTO, ROUTED, Config, UserError, build, check, fields, flatten, to_dict

TASKS = "data.task.tasks."
"""Keys of the tasks of a mixture, of which there may be fewer in another config."""


def read_config(workdir: Path) -> Config:
    """The config with which a workdir was trained.

    Raises:
      UserError: no such folder, no config in it, or a damaged one.
    """
    path = workdir / "config.json"
    check(os.path.isdir(workdir), f"--workdir={workdir}: no such folder; train first, or correct the path")
    check(os.path.isfile(path), f"--workdir={workdir}: holds no config.json, so it is not the folder of a run; train "
          "first, or correct the path")
    advice = "restore the file, or start anew in another --workdir"
    tree = read_object(path, "check its permissions", advice)
    try:
        return build(tree)
    except UserError as error:
        raise UserError(f"{path}: {error}; {advice}") from None


def holds_run(workdir: Path) -> bool:
    """Whether there is something that another config would spoil: a checkpoint or a record."""
    checkpoints, metrics = workdir / "checkpoints", workdir / "metrics.jsonl"
    return (os.path.isdir(checkpoints) and any(name.isdigit() for name in os.listdir(checkpoints))
            or os.path.isfile(metrics) and metrics.stat().st_size > 0)


def changed(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """Keys that differ between two resolved configs: (those that forbid continuing a run, those free to change).

    What an older version did not know was as it is by default now; options of a router, as the router sets them.
    """
    old_flat, new_flat = flatten(to_dict(old)), flatten(to_dict(new))
    known = fields(new)
    unknown = [f"moe.{name}" for name in ROUTED if old_flat[f"moe.{name}"] == AUTO]

    def before(name: str) -> Any:
        default = known[name].default if name in known and not name.startswith("moe.") else new_flat[name]
        return old_flat.get(name, list(default) if isinstance(default, tuple) else default)
    differing = [name for name in new_flat if name not in unknown and before(name) != new_flat[name]]
    differing += [name for name in old_flat if name.startswith(TASKS) and name not in new_flat]
    free = [name for name in differing if name in known and known[name].metadata["free"]]
    return [name for name in differing if name not in free], free


def check_continues(workdir: Path, config: Config) -> list[str]:
    """Checks that a config does not make another run of the one in a workdir.

    Returns:
      The keys that differ; all of them are free to.

    Raises:
      UserError: a key differs that is not free, or config.json cannot be read.
    """
    forbidden, free = changed(stored := read_config(workdir), config)
    if forbidden:
        before, now = (flatten(to_dict(c)) for c in (stored, config))
        listed = ", ".join(f"config.{name} ({before.get(name)!r} -> {now.get(name)!r})" for name in forbidden)
        raise UserError(f"--workdir={workdir} holds a run with another config: {listed}; restore these keys or take "
                        "another --workdir")
    return free


def open_workdir(workdir: Path, config: Config, say: Callable[[str], None]) -> None:
    """Makes the folder of a run, or checks that the config continues the run in it, and writes config.json.

    Raises:
      UserError: the folder cannot be written, or keys have changed that would make it another run.
    """
    if holds_run(workdir):
        if free := check_continues(workdir, config):
            say(f"continuing with changed keys: {', '.join(f'config.{name}' for name in free)}")
    check(os.path.isdir(workdir) or not os.path.lexists(workdir),
          f"--workdir={workdir} is a file; choose a folder, or a name that is free")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _write(workdir / "config.json", json.dumps(to_dict(config), indent=2).encode())
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror}); choose another folder") from None


@contextlib.contextmanager
def unchanged_on_user_error(workdir: Path) -> Iterator[None]:
    """Takes back what was written inside to prepare a run, if it ends because the user's input is wrong.

    config.json gets its old content again. Unless the workdir then holds a run, what is new in it is removed, and so is
    the workdir itself if it was not there before.
    """
    config = workdir / "config.json"
    content = config.read_bytes() if os.path.isfile(config) else None
    present = set(os.listdir(workdir)) if os.path.isdir(workdir) else set()
    missing = [folder for folder in (workdir, *workdir.parents) if not os.path.lexists(folder)]
    try:
        yield
    except UserError:
        if os.path.isdir(workdir):
            if content is not None and config.read_bytes() != content:
                _write(config, content)
            if not holds_run(workdir):
                for name in set(os.listdir(workdir)) - present:
                    _remove(workdir / name)
                with contextlib.suppress(OSError):  # something else was put there meanwhile
                    for folder in missing:
                        folder.rmdir()
        raise


def _write(path: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
