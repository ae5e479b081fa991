"""The command line: flags to a config, and a config to one verb."""

import ast
import inspect
import os
import re
import runpy
import sys
import traceback
import typing
from pathlib import Path
from typing import Any, Mapping, Sequence

from absl import flags
from ml_collections import ConfigDict

from moejax import allocator
from moejax import config as config_lib
from moejax.bounded import read_object
from moejax.config import Config, UserError, check, nearest
from moejax.exit_status import INTERRUPTED, exit_status

MODES = ("train", "eval", "generate", "replay", "benchmark", "shardings")
CONFIG_PREFIX = "config."
OPTIONS_PREFIXES = ("config.moe.options.", "config.model.architecture.", "config.data.task.", "config.train.finetune.",
                    "config.train.faults.")

HELP = """\
usage: python -m moejax.main --config=FILE[:ARGUMENT] --workdir=DIR [--mode=MODE] [--config.KEY=VALUE ...] [FLAG ...]

FILE is Python with a function get_config(), to which ARGUMENT is given. It is run, so only use files that you trust. Or it
is the config.json of a workdir.
--config.KEY=VALUE overrides a key of the config. All keys, with defaults and meaning: python -m moejax.config
--config.moe.router=NAME takes another router, --config.moe.options.NAME=VALUE sets one of its own options: python -m
moejax.moe.routing lists the routers, python -m moejax.moe.routing NAME what one of them sets
--config.data.task.objective=NAME takes another objective: python -m moejax.task lists them and their options, python -m
moejax.mixture those of several tasks at once
--config.train.init_from=DIR starts from another run: python -m moejax.finetune lists options of what moves then
--config.train.faults.NAME=VALUE says what a run does about faults (no finite loss, full disk, signals): python -m
moejax.faults lists them

modes
  train      (the default) train, or go on if DIR holds a run; Ctrl-C saves, and the same command goes on
  eval       evaluate a checkpoint on the held-out text; needs no --config
  generate   continue a --prompt; needs no --config
  replay     do one --step of a run over again and say what of it was no finite number; writes nothing, needs no --config
  benchmark  time the train step; prints one JSON object; needs no --workdir
  shardings  print how every parameter would lie on the mesh, with bytes on a device; needs no --workdir

examples
  python -m moejax.main --config=experiments/tiny.py --workdir=runs/tiny
  python -m moejax.main --config=experiments/tiny.py --workdir=runs/top1 --config.moe.experts_per_token=1 \\
      --config.moe.renormalize=False --config.moe.capacity_factor=1.25
  python -m moejax.main --workdir=runs/tiny --mode=eval
  python -m moejax.main --workdir=runs/tiny --mode=generate --prompt="My fellow citizens" --temperature=0.8
  python -m moejax.main --config=experiments/tiny.py --mode=benchmark

flags
"""


class BooleanOrAuto(flags.BooleanParser):
    """A switch that may be left to the router."""

    def parse(self, argument: Any) -> Any:
        """True, False or `auto`."""
        return argument if argument == config_lib.AUTO else super().parse(argument)


def define_flags(options: Sequence[str] = ()) -> flags.FlagValues:
    """A fresh set of all flags: those below, one for each key of the config, and the options of these names.

    Which options there are the router and the architecture know; they are checked when the config is resolved.
    """
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "print this and exit", short_name="h", flag_values=values)
    flags.DEFINE_string("config", None, "FILE[:ARGUMENT], e.g. experiments/tiny.py", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the run: config, data, metrics, checkpoints", flag_values=values)
    flags.DEFINE_enum("mode", "train", MODES, "what to do", flag_values=values)
    flags.DEFINE_integer("step", None, "eval, generate: which checkpoint; the newest by default. replay: "
                         "which step", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "generate: a prompt; may be given several times. A model of pairs takes a "
                              "whole input, as its template has it", flag_values=values)
    flags.DEFINE_string("task", None, "generate: the task that the prompts are of, if the model was trained on several",
                        flag_values=values)
    flags.DEFINE_integer("answers", None, "eval of a model of pairs: held-out inputs that it answers and is scored "
                         "by; all by default", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 64, "generate, eval of pairs: new tokens at most", flag_values=values)
    flags.DEFINE_float("temperature", 1.0, "generate: 0 takes the likeliest token", flag_values=values)
    flags.DEFINE_integer("top_k", 0, "generate: sample from the k likeliest tokens; 0 from all", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "generate: sample from the likeliest tokens that together have this probability",
                       flag_values=values)
    flags.DEFINE_float("repetition_penalty", 1.0, "generate: above 1 makes repeats less likely", flag_values=values)
    flags.DEFINE_integer("seed", 0, "generate: seed of the samples", flag_values=values)
    flags.DEFINE_integer("beams", None, "generate, eval of pairs: search the best text with so many at once",
                         flag_values=values)
    flags.DEFINE_float("length_penalty", 1.0, "generate: with --beams, texts of n tokens count their log-probability over "
                       "n to this power", flag_values=values)
    flags.DEFINE_string("coordinator", None, "several processes: HOST:PORT of process 0; not needed under Slurm and on TPU "
                        "pods", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "several processes: how many", flag_values=values)
    flags.DEFINE_integer("process_id", None, "several processes: number of this one, from 0", flag_values=values)
    flags.DEFINE_integer("coordinator_timeout", 300, "several processes: seconds to wait for all of them",
                         lower_bound=1, flag_values=values)
    for name, field in config_lib.fields().items():
        define = flags.DEFINE_boolean if field.type is bool else flags.DEFINE_string
        define(CONFIG_PREFIX + name, None, field.metadata["help"], flag_values=values)
        if field.type is bool and field.default == config_lib.AUTO:
            values[CONFIG_PREFIX + name].parser = BooleanOrAuto()
    for name in options:
        flags.DEFINE_string(name, None, "an option of the router, the architecture or the task", flag_values=values)
    return values


def parse_flags(argv: Sequence[str]) -> flags.FlagValues:
    """absl's parser, with every mistake turned into a `UserError`."""
    given = (argument.lstrip("-").partition("=")[0] for argument in argv)
    values = define_flags(sorted({name for name in given if name.startswith(OPTIONS_PREFIXES)}))
    try:
        rest = values(list(argv))
    except flags.UnrecognizedFlagError as error:
        raise UserError(unknown_flag(error.flagname, values)) from None
    except flags.IllegalFlagValueError as error:
        given, _, reason = str(error).partition(": ")
        flag = values[given.removeprefix("flag --").partition("=")[0]]
        wanted = "true or false" if flag.boolean else flag.parser.syntactic_help
        raise UserError(f"{given}: {f'must be {wanted}' if wanted else reason}") from None
    except flags.Error as error:
        raise UserError(f"{error}; python -m moejax.main --help lists the flags") from None
    if rest[1:]:
        raise UserError(f"unexpected argument {rest[1]!r}; every argument has the form --name=value")
    return values


def help_text(values: flags.FlagValues) -> str:
    """What --help prints; of the keys of the config it only says where they are listed."""
    own = [flag for module in values.flags_by_module_dict().values() for flag in module
           if not flag.name.startswith(CONFIG_PREFIX)]
    return HELP + "\n".join(f"  --{flag.name}: {' '.join(flag.help.split())}"
                            + (f" (default: {flag.default})" if flag.default else "") for flag in own)


def unknown_flag(name: str, values: flags.FlagValues) -> str:
    """What is wrong with a flag of that name."""
    key = name.removeprefix(CONFIG_PREFIX)
    keys = list(config_lib.fields())
    if key == name:
        flag = nearest(name, [known for known in values if not known.startswith(CONFIG_PREFIX)])
        return f"unknown flag --{name}{flag}; python -m moejax.main --help lists the flags"
    group = next((known for known in keys if known.startswith(f"{key}.")), None)
    if group:
        return f"--{name} is a group of keys; set them one by one, e.g. --{CONFIG_PREFIX}{group}=..."
    return f"unknown config key --{name}{nearest(key, keys)}; python -m moejax.config lists the keys"


def overrides(values: flags.FlagValues) -> dict[str, Any]:
    """The keys of the config that the command line sets, with their values as Python literals where they are some."""
    fields = config_lib.fields()
    given = {name.removeprefix(CONFIG_PREFIX): values[name] for name in values if name.startswith(CONFIG_PREFIX)}
    return {name: _literal(fields[name].type if name in fields else Any, flag.value)
            for name, flag in given.items() if flag.present}


def _literal(kind: Any, value: Any) -> Any:
    types = typing.get_args(kind) or (kind,)
    if str in types:
        return None if value == "None" and type(None) in types else value
    try:
        found = ast.literal_eval(str(value))
        repr(found)  # which a message may need, and not every number has
        return found
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value  # `config.build` says what is wrong with it


def load_config_file(spec: str) -> dict[str, Any]:
    """Runs FILE[:ARGUMENT] and returns what its get_config() gives, as nested dicts; of a .json file, what it holds.

    Raises:
      UserError: no such file, or whatever goes wrong in it, with file and line.
    """
    name, colon, argument = os.path.expanduser(spec).partition(":")
    check(os.path.isfile(name), f"--config={spec}: there is no file {name!r}; give the path of a Python file, e.g. "
          "experiments/tiny.py")
    if name.endswith(".json"):
        check(not colon, f"--config={spec}: a .json file takes no argument")
        return read_object(Path(name), "check its permissions", "give the config.json of a workdir")
    arguments = [argument] if colon else []
    try:
        get_config = runpy.run_path(name, run_name="moejax_config").get("get_config")
        check(callable(get_config), f"{name}: defines no function get_config(); see experiments/tiny.py for one")
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError as error:
            raise UserError(f"--config={spec}: {error} for get_config(); write --config=FILE:ARGUMENT if it takes an "
                            "argument, else --config=FILE") from None
        tree = get_config(*arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{_place(error, name)}: {_reason(error)}") from None
    check(isinstance(tree, ConfigDict), f"{name}: get_config() must return moejax.config.default() with your changes, "
          f"not an object of type {type(tree).__name__}")
    return tree.to_dict()


def _place(error: Exception, name: str) -> str:
    """The line of a config file from which an error came."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
    if isinstance(error, SyntaxError) and error.filename == name:
        lines.append(error.lineno)
    return f"{name}, line {lines[-1]}" if lines else name


def _reason(error: Exception) -> str:
    """An error in a config file in one line. Those of ConfigDict list all keys in many lines."""
    message = str(error)
    if unknown := re.search(r'Key "(\w+)" does not exist|Did you mean "\w+" instead of "(\w+)"', message):
        key = unknown[1] or unknown[2]
        names = {part: None for name in config_lib.fields() for part in name.split(".")}
        return f"unknown config key {key!r}{nearest(key, list(names))}; python -m moejax.config lists the keys"
    if isinstance(error, SyntaxError):
        message = error.msg
    return f"{type(error).__name__}: {message}".rstrip(": ")


def override(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts with some keys, given by their dotted names, set to other values."""
    tree = dict(tree)
    for name, value in changes.items():
        node, (*groups, key) = tree, name.split(".")
        for group in groups:
            inner = node.get(group)
            if not (inner is None or isinstance(inner, Mapping)):
                break  # `config.build` says that this is a group of keys
            node[group] = node = dict(inner or {})
        else:
            node[key] = value
    return tree


def make_config(values: flags.FlagValues, workdir: Path | None) -> Config | None:
    """The config that the flags ask for; None if they leave it all to the workdir.

    Without --config, keys of the config stored in the workdir are overridden.
    """
    changes = overrides(values)
    if values.config is not None:
        return config_lib.build(override(load_config_file(values.config), changes))
    if not changes:
        return None
    from moejax.commands import stored_config
    stored = stored_config(workdir)
    if "moe.router" in changes:  # another router has other options
        stored = override(stored, {"moe.options": None})
    return config_lib.build(override(stored, changes))


def run(values: flags.FlagValues) -> None:
    """Carries out --mode. What imports jax takes seconds, so it is imported when the flags are known to be good."""
    mode = values.mode
    check(values.config is not None or mode in ("eval", "generate", "replay"),
          f"--mode={mode} needs --config=FILE, e.g. --config=experiments/tiny.py")
    check(bool(values.workdir) or mode in ("benchmark", "shardings"), f"--mode={mode} needs --workdir=DIR")
    check(bool(values.prompt) or mode != "generate", '--mode=generate needs --prompt="..."')
    workdir = Path(os.path.expanduser(values.workdir)) if values.workdir else None
    config = make_config(values, workdir)
    from moejax import peers, processes
    processes.start(values.coordinator, values.num_processes, values.process_id, values.coordinator_timeout)
    where = peers.place()
    peers.check_alike(settings_of(values, config), *where)
    with peers.watched(*where):
        carry_out(values, config, workdir)


def settings_of(values: flags.FlagValues, config: Config | None) -> dict[str, Any]:
    """What all processes of a run must have in common: flags but that for their number, and the resolved keys."""
    names = ("mode", "workdir", "step", "prompt", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "beams",
             "answers", "task", "repetition_penalty", "length_penalty")
    given = {f"--{name}": values[name].value for name in names}
    keys = {} if config is None else config_lib.flatten(config_lib.to_dict(config), "config.")
    return given | keys


def carry_out(values: flags.FlagValues, config: Config | None, workdir: Path | None) -> None:
    """One mode."""
    mode = values.mode
    if mode == "train":
        from moejax.commands import train
        train(config, workdir)
    elif mode == "eval":
        from moejax.commands import evaluate
        how = {"temperature": 0.0} if values.beams is None else {"beams": values.beams,
                                                                 "length_penalty": values.length_penalty}
        check(values.answers is None or values.answers >= 0, f"--answers={values.answers} must not be negative")
        evaluate(config, workdir, values.step, values.answers, max_new_tokens=values.max_new_tokens, **how)
    elif mode == "replay":
        check(values.step is not None, "--mode=replay needs --step=N, the step to do over again")
        from moejax.commands import replay
        replay(config, workdir, values.step)
    elif mode == "generate":
        from moejax.commands import generate
        how = {name: values[name].value for name in ("temperature", "top_k", "top_p", "repetition_penalty", "seed")}
        if values.beams is not None:
            given = [name for name in how if values[name].present]
            check(not given, f"--{given and given[0]} is for samples; --beams takes the best text that it finds")
            how = {"beams": values.beams, "length_penalty": values.length_penalty}
        generate(config, workdir, values.step, values.prompt, values.task, max_new_tokens=values.max_new_tokens, **how)
    elif mode == "shardings":
        from moejax.commands import shardings
        shardings(config)
    else:
        from moejax.commands import benchmark
        benchmark(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; see `exit_status`."""
    def work() -> None:
        values = parse_flags(sys.argv if argv is None else argv)
        if values.help:
            print(help_text(values))
        else:
            run(values)
    return exit_status(work, "nothing that was saved is lost, and the same command goes on")


if __name__ == "__main__":
    allocator.keep_memory()
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    # A step may still be running, and jax crashes when Python is taken down around it; and with several processes it
    # would wait for the others, which may wait for this one.
    if status in (1, INTERRUPTED):
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
