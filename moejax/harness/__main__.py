"""python -m moejax.harness --model_args=workdir=RUN --tasks=NAMES: lm-evaluation-harness on a model of moejax."""

import sys
from collections.abc import Sequence

from moejax.config import UserError
from moejax.exit_status import exit_status

USAGE = """python -m moejax.harness --model_args=workdir=RUN --tasks=NAMES [options of lm_eval]

Evaluates a decoder with EleutherAI's lm-evaluation-harness, which has the tasks and their metrics.

  --model_args=workdir=RUN,step=N,max_length=N   the run, an import or a compressed model; its checkpoint; tokens of a row
  --model_args=workdir=RUN,task=NAME             of a mixture, the task that the model answers as
  --tasks=a,b --include_path=FOLDER              the harness's tasks, and your own from a folder of YAML files
  --batch_size=N                                 rows at once (8)

All other options are the harness's: python -m lm_eval run --help
"""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status; see `exit_status`."""
    if not arguments or set(arguments) & {"-h", "--help"}:
        print(USAGE, end="")
        return 0

    def work() -> None:
        try:
            from lm_eval.__main__ import cli_evaluate

            from moejax.harness.adapter import ROWS  # which registers the model
        except ImportError as error:
            raise UserError(f'{error.name} is missing; pip install -e ".[lm-eval]"') from None
        rows = () if any(word.startswith(("--batch_size", "-b")) for word in arguments) else ("--batch_size", str(ROWS))
        sys.argv = ["lm_eval", "run", "--model", "moejax", *rows, *arguments]
        cli_evaluate()
    return exit_status(work, "nothing was written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
