"""The folder of a run and the config in it."""

import json
import os
import tempfile
from pathlib import Path
from typing import Callable

from moejax.config import Config, UserError, build, changed, check, flatten, to_dict


def read_config(workdir: Path) -> Config:
    """The config with which a workdir was trained.

    Raises:
      UserError: no such folder, no config in it, or a damaged one.
    """
    path = workdir / "config.json"
    check(workdir.is_dir(), f"--workdir={workdir}: no such folder; train first, or correct the path")
    check(path.is_file(), f"--workdir={workdir}: holds no config.json, so it is not the folder of a run")
    try:
        tree = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore it, or start anew in another --workdir") from None
    check(isinstance(tree, dict), f"{path}: not a config; restore it, or start anew in another --workdir")
    return build(tree)


def open_workdir(workdir: Path, config: Config, say: Callable[[str], None]) -> None:
    """Makes the folder of a run, or checks that the config continues the run in it, and writes config.json.

    Raises:
      UserError: the folder cannot be written, or keys have changed that would make it another run.
    """
    if (workdir / "config.json").exists():
        forbidden, free = changed(old := read_config(workdir), config)
        if forbidden:
            before, now = (flatten(to_dict(c)) for c in (old, config))
            listed = ", ".join(f"config.{name} ({before[name]!r} -> {now[name]!r})" for name in forbidden)
            raise UserError(f"--workdir={workdir} holds a run with another config: {listed}; restore these keys or take "
                            "another --workdir")
        if free:
            say(f"continuing with changed keys: {', '.join(f'config.{name}' for name in free)}")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=workdir, prefix=".config", delete=False) as file:
            json.dump(to_dict(config), file, indent=2)
        os.replace(file.name, workdir / "config.json")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror}); choose another folder") from None
