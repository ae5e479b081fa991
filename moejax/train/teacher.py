"""The model that a run learns from beside its text; see `config.train.finetune.teacher`."""

from pathlib import Path
from typing import Any, Callable, Mapping

import jax
from jax import Array
from jax.sharding import Mesh

from moejax import processes
from moejax.config import Config, check
from moejax.evaluation.load import load_sharded, model_of
from moejax.models import transformer
from moejax.models.count import row_lengths

TEACHER = "teacher"
"""Where a batch holds the teacher's scores."""


def with_teacher(config: Config, mesh: Mesh, workdir: Path) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """A function that puts a teacher's scores, float [B, L, V] as it computes them, beside the arrays of a batch.

    Args:
      config: resolved; without a teacher batches stay as they are.
      mesh: on which batches lie, and the teacher will.
      workdir: of the run, whose data is prepared.

    Raises:
      UserError: a teacher that is no run, is of another kind or reads other tokens.
    """
    name = config.train.finetune.teacher
    if name is None:
        return dict
    where = f"config.train.finetune.teacher={name}"
    with processes.same_fate():
        model, _ = model_of(Path(name))
        own, theirs = (tokenizer_of(folder / "data") for folder in (workdir, Path(name)))
        check(own == theirs, f"{where} was not trained with the tokenizer "
              f"of this run; set config.data.tokenizer to the file in {Path(name) / 'data'}")
        check((model.model.kind, model.model.head, model.model.vocab_size) == (
            config.model.kind, config.model.head, config.model.vocab_size), f"{where} is a model of another kind, head or "
            "vocabulary; config.model.kind, head and vocab_size must be its own")
        check(config.model.head == "tokens", f"{where}: only models that score tokens can be taught")
        longest = max(row_lengths(config))
        check(longest <= model.model.max_length, f"{where} reads {model.model.max_length} tokens, fewer than the {longest} "
              "of config.data.length or source_length")
        variables = load_sharded(Path(name), mesh).items["model"]

    @jax.jit
    def scores(variables: Any, batch: Mapping[str, Array]) -> Array:
        return transformer.apply_batch(model, variables["params"], variables["router"], batch).logits_BLV

    return lambda batch: {**batch, TEACHER: scores(variables, batch)}


def tokenizer_of(folder: Path) -> dict[str, bytes]:
    """The files of the tokenizer in a prepared folder."""
    names = ("tokenizer_config.json", "tokenizer.model", "tokenizer.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
