"""What an imported checkpoint leaves for runs that come of it: its config.json, its tokenizer, and how its texts end."""

import json
import shutil
from pathlib import Path
from typing import Any

from moejax.bounded import read_object
from moejax.checkpoint.made import ORIGINAL, TOKENIZER_FILES, built_beside, copy_present, find_tokenizer
from moejax.checkpoint.workdir import read_config
from moejax.config import UserError, check


def origin_of(workdir: Path) -> Path | None:
    """The folder that keeps the files of the checkpoint from which a model came.

    It lies in the workdir, or in that from which the run started, and so on; None if there is none, or none any more.
    """
    seen: set[Path] = set()
    while workdir not in seen:
        seen.add(workdir)
        if (workdir / ORIGINAL).is_dir():
            return workdir / ORIGINAL
        try:
            start = read_config(workdir).train.init_from
        except UserError:
            return None
        workdir = Path(start) if start else workdir
    return None


def shares_tokenizer(workdir: Path, origin: Path) -> bool:
    """Whether a run's texts are cut as those of the checkpoint: the run is the import itself, or has its tokenizer."""
    if origin.parent == workdir:
        return True
    ours, theirs = map(read_tokenizer, (workdir, origin.parent))
    return ours is not None and ours == theirs


def read_tokenizer(workdir: Path) -> bytes | None:
    """The file of a run's tokenizer; None if that has no file."""
    found = find_tokenizer(workdir / "data")
    return found and found.read_bytes()


def check_tokens(workdir: Path, start: Path) -> None:
    """Raises `UserError` if a run cuts its texts otherwise than the model that it starts from, whose ids would then mean
    other pieces. A model without a tokenizer is taken as it is."""
    if (start / "data" / "tokenizer_config.json").is_file():
        check(read_tokenizer(workdir) == read_tokenizer(start), f"config.train.init_from={start} was not trained with the "
              f"tokenizer of this run; set config.data.tokenizer={find_tokenizer(start / 'data') or 'bytes'}")


def keep_origin(workdir: Path) -> None:
    """Copies what an imported checkpoint has left into a run that reads texts as it does, so that neither the run nor what
    is made of it needs the import any more."""
    origin, kept = origin_of(workdir), workdir / ORIGINAL
    if origin is not None and not kept.exists() and shares_tokenizer(workdir, origin):
        with built_beside(kept) as part:
            shutil.copytree(origin, part, dirs_exist_ok=True)


def copy_tokenizer(workdir: Path, folder: Path) -> None:
    """Copies the files of a model's tokenizer: all that the imported checkpoint had, or the one file that a run has."""
    origin = origin_of(workdir)
    if origin is not None and shares_tokenizer(workdir, origin):
        copy_present(origin, folder, TOKENIZER_FILES)
    elif (own := find_tokenizer(workdir / "data")) is not None:
        copy_present(own.parent, folder, (own.name,))
        marker = read_object(own.parent / "tokenizer_config.json", "check its permissions", "restore it")
        if own.suffix == ".json":  # which alone does not say what reads it, or what separates documents
            written = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": marker.get("bos_token")}
            (folder / "tokenizer_config.json").write_text(json.dumps(written, indent=2) + "\n")


def end_tokens(workdir: Path, vocab_size: int) -> tuple[int, ...]:
    """Ids with which the imported model ends a text, as its generation_config.json has them, or else its config.json."""
    origin = origin_of(workdir)
    if origin is None or not shares_tokenizer(workdir, origin):
        return ()
    for name in ("generation_config.json", "config.json"):
        if (origin / name).is_file():
            found: Any = read_object(origin / name, "check its permissions", "restore it, or delete it").get("eos_token_id")
            ids = found if isinstance(found, list) else [found]
            if any(isinstance(token, int) for token in ids):
                return tuple(token for token in ids if isinstance(token, int) and 0 <= token < vocab_size)
    return ()
