"""The model of a workdir as the harness asks it: a decoder, and for one task."""

from pathlib import Path
from typing import Any, NamedTuple

from moejax.checkpoint.workdir import read_config
from moejax.config import Config, check
from moejax.evaluation.load import load
from moejax.generation.begin import check_decodable
from moejax.mixture import number, part
from moejax.models import transformer
from moejax.models.tasks import for_task
from moejax.models.transformer import Transformer


class Opened(NamedTuple):
    """A model, and of what task.

    Attributes:
      model, variables: as `moejax.load` gives them; those of one task, if routers know of tasks.
      config: resolved, of that task alone.
    """

    model: Transformer
    variables: dict[str, Any]
    config: Config


def open_decoder(workdir: str | Path, step: int | None = None, task: str | None = None) -> Opened:
    """The model of a workdir that the harness is to ask.

    Args:
      workdir: of a run, an import or a compressed model.
      step: of the checkpoint; None takes the newest.
      task: which one of a mixture; None if there is only one.

    Raises:
      UserError: as reading a run does, for a model that does not continue text token by token or was trained on nothing
        like a continuation, or as `mixture.part`.
    """
    model, variables = load(workdir, step)
    check(model.model.kind == "decoder", f"{workdir}: config.model.kind={model.model.kind}; the harness asks for "
          "continuations, which are what decoders are made for")
    check_decodable(model)
    whole = transformer.resolve(read_config(Path(workdir)))
    config = part(whole, task, "--model_args=...,task")
    check(config.data.task.objective != "span_corruption", f"{workdir}: config.data.task.objective=span_corruption tells "
          "what was cut out of a text, and the harness asks how it goes on; take a model of next_token, prefix_lm, ul2 or "
          "seq2seq")
    return Opened(*for_task(model, variables, number(whole, task)), config)
