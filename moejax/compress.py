"""python -m moejax.compress prune|merge|quantise WORKDIR NEW: smaller models of one with experts."""

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from moejax.config import Config, check
from moejax.exit_status import exit_status
from moejax.mixture import Mixture

USAGE = """
  python -m moejax.compress prune WORKDIR NEW --experts=6      leaves out the experts that matter least (REAP, or frequency)
  python -m moejax.compress merge WORKDIR NEW --experts=4      makes groups of experts one (MC-SMoE)
  python -m moejax.compress quantise WORKDIR NEW --bits=8      stores experts in 8 or 4 bits, for inference

Each writes a workdir and says what the held-out loss was before and is after. Pruned and merged models can be trained on:
  python -m moejax.main --config=NEW/config.json --workdir=runs/recovered
"""


def compress(workdir: Path, new: Path, batches: int, source: str | None,
             make: Callable[[Any, Any, Callable[[], Iterator[Any]]], tuple[Any, Any]]) -> None:
    """Makes a workdir of another, or nothing.

    Args:
      workdir: of the model.
      new: folder to make.
      batches: of training text from which the experts' use is counted.
      source: of text, as config.data.source; None takes that of the run.
      make: (model, variables, training batches) -> (model, variables).

    Raises:
      UserError: as reading a run and preparing data do, and as `make` does.
    """
    import jax

    from moejax.checkpoint.made import built_beside, check_free, copy_data, save_model, size
    from moejax.checkpoint.workdir import read_config
    from moejax.data.mixing import open_loader
    from moejax.evaluation.load import load
    from moejax.models import transformer
    from moejax.train.held_out import evaluation_line, run_evaluation
    from moejax.train.setup import set_up
    check_free(new)
    stored = config = transformer.resolve(read_config(workdir))
    if source is not None:
        check(not isinstance(config.data.task, Mixture), f"{workdir}: was trained on several tasks, so one text is not "
              "its own; leave out --source")
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=source, eval_source=None))
    mesh = dataclasses.replace(config.mesh, replica=1, data=1, expert=1, model=1, context=1)
    config = dataclasses.replace(config, mesh=mesh, train=dataclasses.replace(config.train, finetune=None))
    model, variables = load(workdir)
    with built_beside(new) as part, prepared_text(config, workdir, fresh=source is not None) as prepared:

        def texts() -> Iterator[Any]:
            return islice(open_loader(prepared, transformer.resolve(config)), batches)

        def tell(name: str, config: Config, variables: Any) -> None:
            setup = set_up(config, jax.local_devices()[:1])
            with jax.set_mesh(setup.mesh):
                record = run_evaluation(setup, prepared, variables["params"], variables["router"], 0)
            line = evaluation_line(record).partition("  ")[2]
            print(f"{name + ':':<8}{size(variables):>13,} bytes  {line}", flush=True)

        smaller, made = make(model, variables, texts)
        tell("before", config, variables)
        tell("after", dataclasses.replace(config, model=smaller.model, moe=smaller.moe), made)
        copy_data(workdir, part)
        save_model(part, new, dataclasses.replace(stored, model=smaller.model, moe=smaller.moe), made)
    print(f"{new}: config.json, checkpoints/ (step 0)")


@contextlib.contextmanager
def prepared_text(config: Config, workdir: Path, fresh: bool) -> Iterator[Any]:
    """The text of a run: as it was prepared for it, or prepared for the moment."""
    from moejax.data.prepare import prepare
    from moejax.data.prepared import load_prepared
    if not fresh and (workdir / "data" / "summary.json").is_file():
        yield load_prepared(workdir / "data")
        return
    with tempfile.TemporaryDirectory() as folder:
        yield prepare(config, Path(folder) / "data")


def with_fewer(experts: int, by: str | None) -> Callable[..., tuple[Any, Any]]:
    """(model, variables, texts) -> those with the experts that matter most by a score, or merged if that is None."""
    from moejax.models.surgery import calibrate, check_surgery, merge, prune

    def make(model: Any, variables: Any, texts: Callable[[], Iterator[Any]]) -> tuple[Any, Any]:
        check_surgery(model, experts)
        uses = calibrate(model, variables, texts())
        if by is None:
            return merge(model, variables, uses, experts)
        return prune(model, variables, [use.score(by) for use in uses], experts)
    return make


def quantised(bits: int) -> Callable[..., tuple[Any, Any]]:
    """(model, variables, texts) -> those with experts in few bits; takes no text."""
    from moejax.models.few_bits import in_few_bits
    return lambda model, variables, texts: in_few_bits(model, variables, bits)


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status; see `exit_status`."""
    parser = argparse.ArgumentParser(prog="python -m moejax.compress", description="Smaller models of one with experts.",
                                     epilog=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (("prune", "leaves experts out"), ("merge", "makes groups of experts one"),
                       ("quantise", "stores experts in few bits")):
        command = commands.add_parser(name, help=help)
        command.add_argument("workdir", metavar="WORKDIR", type=Path)
        command.add_argument("new", metavar="NEW", type=Path)
        command.add_argument("--source", help="text to count and to evaluate on (default: that of the run)")
        if name == "quantise":
            command.add_argument("--bits", type=int, default=8, choices=(8, 4), help="of a weight (default: 8)")
            continue
        command.add_argument("--experts", type=int, required=True, help="that remain in a layer")
        command.add_argument("--batches", type=int, default=16, help="of training text to count the experts' use in "
                             "(default: 16)")
        if name == "prune":
            command.add_argument("--by", default="reap", choices=("reap", "frequency"), help="what experts matter by "
                                 "(default: reap)")
    given = parser.parse_args(arguments)

    def work() -> None:
        batches = getattr(given, "batches", 1)
        check(batches >= 1, f"--batches={batches} must be at least 1")
        make = (quantised(given.bits) if given.command == "quantise" else
                with_fewer(given.experts, given.by if given.command == "prune" else None))
        compress(given.workdir, given.new, batches, given.source, make)
    return exit_status(work, "nothing was written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
