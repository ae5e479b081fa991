"""Workdirs that no run has made: a model of another origin, with the config and the tokenizer to go on from it."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any, Iterator, Sequence

import jax

from moejax.checkpoint.store import Store
from moejax.config import Config, UserError, check, to_dict

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
                   "merges.txt", "vocab.txt", "spiece.model", "generation_config.json", "chat_template.jinja",
                   "added_tokens.json")
ORIGINAL = "hf"
"""Folder of a workdir that keeps config.json and the tokenizer of the imported checkpoint, for the export."""


def check_free(folder: Path) -> None:
    """Raises `UserError` if there is something at that path other than an empty folder."""
    check(not folder.exists() or folder.is_dir() and not any(folder.iterdir()),
          f"{folder}: is not an empty folder; choose another name, nothing is overwritten")


def size(variables: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(variables))


def count(variables: Any) -> int:
    """Numbers in all arrays of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file of a checkpoint that moejax can read; None if there is none."""
    names = ("tokenizer.json", "tokenizer.model", "spiece.model")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def copy_present(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Copies those of the files that there are."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def copy_data(workdir: Path, folder: Path) -> None:
    """Copies what a model needs to read text, and to be exported: prepared data, and the checkpoint that it was."""
    for name in ("data", ORIGINAL):
        if (workdir / name).is_dir():
            shutil.copytree(workdir / name, folder / name)


def save_model(part: Path, workdir: Path, config: Config, variables: Any) -> None:
    """Writes a checkpoint of step 0 and a config.json, with which a run starts from it and tokenises as it does.

    Args:
      part: the folder to write, which becomes `workdir`; holds the original checkpoint's tokenizer, if there is one.
      workdir: the name that the folder will have.
      config: of the model.
      variables: {"params": ..., "router": ...}.
    """
    store = Store(part)
    store.save(0, {"model": variables}, {"content": None}, None)
    store.close()
    check(store.failure is None, f"{workdir}: cannot be written ({store.failure and store.failure.reason}); make room "
          "there, or choose another folder")
    tree, workdir = to_dict(config), workdir.absolute()  # so that it is found from any folder
    tree["train"] |= {"init_from": str(workdir), "finetune": None}  # adapters are part of the matrices now
    if tokenizer := find_tokenizer(part / ORIGINAL):
        tree["data"]["tokenizer"] = str(workdir / ORIGINAL / tokenizer.name)
    elif tokenizer := find_tokenizer(part / "data"):
        tree["data"]["tokenizer"] = str(workdir / "data" / tokenizer.name)
    (part / "config.json").write_text(json.dumps(tree, indent=2))


@contextlib.contextmanager
def built_beside(folder: Path) -> Iterator[Path]:
    """A folder beside the wanted one, which takes its name at the end, or is removed if there is an error."""
    folder = folder.absolute()
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        part.mkdir(parents=True)
        yield part
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if not folder.exists():
            with contextlib.suppress(OSError):
                for parent in missing:
                    parent.rmdir()
