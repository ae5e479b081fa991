"""python -m moejax.main --config=FILE --workdir=DIR [--mode=train|eval|generate|benchmark] [--config.group.key=value ...]

A config file is Python and runs as such: only run configs that you trust.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Sequence

from absl import flags
from ml_collections import config_flags

from moejax import config as config_lib
from moejax.config import Config, UserError, check

MODES = ("train", "eval", "generate", "benchmark")

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config(), e.g. experiments/tiny.py; "
                                         "--config.group.key=value overrides a key (python -m moejax.config lists them)")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: config, data, metrics, checkpoints")
MODE = flags.DEFINE_enum("mode", "train", MODES, "what to do")
STEP = flags.DEFINE_integer("step", None, "eval, generate: which checkpoint; default is the newest")
PROMPT = flags.DEFINE_multi_string("prompt", [], "generate: a prompt; may be given several times")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "generate: new tokens at most")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "generate: 0 takes the likeliest token")
TOP_K = flags.DEFINE_integer("top_k", 0, "generate: sample from the k likeliest tokens; 0 from all")
TOP_P = flags.DEFINE_float("top_p", 1.0, "generate: sample from the likeliest tokens that together have this probability")
REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "generate: above 1 makes repeats less likely")
SEED = flags.DEFINE_integer("seed", 0, "generate: seed of the samples")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser, with every mistake turned into a `UserError`."""
    known = config_lib.fields()
    groups = {name.split(".")[0] for name in known if "." in name}
    for argument in argv[1:]:
        name = argument.lstrip("-").split("=")[0]
        if argument.startswith("--") and name.startswith("config."):
            key = name.removeprefix("config.")
            check(key in known, f"unknown flag --{name}: " + (
                f"config.{key} is a group of keys" if key in groups
                else f"no such config key{config_lib.nearest(key, list(known))}"))
    try:
        return FLAGS(argv)
    except flags.Error as error:
        raise UserError(f"{error} (python -m moejax.main --help lists the flags)".replace("\n", " ")) from None
    except Exception as error:  # whatever a user's config file raises
        raise UserError(f"--config: {_cause(error)}") from None


def _cause(error: Exception) -> str:
    """The last line of an error in a config file, with the place in that file if it is known."""
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    message = str(error).strip()
    if "No such file" in message:
        paths = [word for argument in sys.argv if argument.startswith("--config=") for word in [argument[9:].split(":")[0]]]
        return f"no such file: {', '.join(paths)}"
    where = f"{Path(places[-1].filename).name}, line {places[-1].lineno}: " if places else ""
    return where + " ".join(message.splitlines()[-1:] if "Did you mean" in message else message.splitlines()[:1])


def run(config: Config | None) -> None:
    """Carries out --mode."""
    mode = MODE.value
    if mode == "benchmark":
        check(config is not None, "--mode=benchmark needs --config=FILE")
        from moejax.train.benchmark import benchmark
        print(json.dumps(benchmark(config)))
        return
    check(bool(WORKDIR.value), f"--mode={mode} needs --workdir=DIR")
    workdir = Path(WORKDIR.value)
    if mode == "train":
        check(config is not None, "--mode=train needs --config=FILE, e.g. --config=experiments/tiny.py")
        from moejax.commands import train
        train(config, workdir)
    elif mode == "eval":
        from moejax.commands import evaluate
        evaluate(config, workdir, STEP.value)
    else:
        check(bool(PROMPT.value), '--mode=generate needs --prompt="..."')
        from moejax.commands import generate
        generate(workdir, STEP.value, PROMPT.value, max_new_tokens=MAX_NEW_TOKENS.value, temperature=TEMPERATURE.value,
                 top_k=TOP_K.value, top_p=TOP_P.value, repetition_penalty=REPETITION_PENALTY.value, seed=SEED.value)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 wrong input (one line on stderr); our own mistakes raise."""
    try:
        rest = parse_flags(list(sys.argv if argv is None else argv))
        check(len(rest) == 1, f"unexpected argument {rest[-1]!r}; flags look like --name=value")
        run(None if CONFIG.value is None else config_lib.build(CONFIG.value))
    except UserError as error:
        print(f"moejax: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
