"""Several tasks at once: `config.data.task` with `tasks`, each by its name with a source and options of its own.

`python -m moejax.mixture` prints the options of a mixture; those of its tasks are what `python -m moejax.task` prints.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.config import Config, ModelConfig, build_group, check, key, nearest, table
from moejax.task import OBJECTIVES, OF_MIXTURES, Task
from moejax.task import resolve as resolve_task

SHARED = ("label_smoothing", "head_z_weight")
"""Options of the loss, which is one for all tasks."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """All options. Resolved, `tasks` are typed and in the order of their names, by which they are numbered."""

    rates: str = key("proportional", "how often rows of a task come: by their number, by that to the power of 1 over "
                     "temperature (multilingual BERT, T5 1910.10683), or as each task's rate says",
                     choices=("proportional", "temperature", "fixed"))
    temperature: float = key(1.0, "rates=temperature: 1 is proportional; the larger, the more alike are rates", low=1)
    tasks: Any = key(None, "the tasks by name, each a dict of a source and options of a task")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks, by number."""
        return tuple(self.tasks)

    @property
    def head(self) -> str:
        """The `config.model.head` that all tasks train."""
        return "tokens"

    @property
    def label_smoothing(self) -> float:
        """Of all tasks."""
        return next(iter(self.tasks.values())).label_smoothing

    @property
    def head_z_weight(self) -> float:
        """Of all tasks."""
        return next(iter(self.tasks.values())).head_z_weight

    @property
    def metrics(self) -> tuple[str, ...]:
        """What an evaluation measures in one number: over all targets, as the mean over the tasks, and of each task."""
        of_all = ("loss", "perplexity", "accuracy")
        return (*of_all, *(f"tasks/{name}" for name in ("loss", "accuracy")),
                *(f"task/{name}/{metric}" for name, task in self.tasks.items() for metric in task.metrics))


def resolve(given: "Task | Mixture | Mapping[str, Any] | None", model: ModelConfig) -> Task | Mixture:
    """Typed options of one task or of a mixture. Raises `UserError` on impossible ones, and on tasks that share no head."""
    where = "config.data.task"
    if isinstance(given, Mixture):
        return given
    if not (isinstance(given, Mapping) and ({"tasks", "rates", "temperature"} & set(given))):
        task = resolve_task(given, model)
        alone = [name for name in OF_MIXTURES if getattr(task, name) is not None]
        check(not alone, f"{where}.{alone and alone[0]} is for tasks of a mixture ({where}.tasks); set config.data instead")
        return task
    mixture = build_group(Mixture, given, where)
    check(isinstance(mixture.tasks, Mapping) and len(mixture.tasks) > 0, f"{where}.tasks={mixture.tasks!r} must be a dict "
          "of tasks by name, at least one")
    tasks = {name: _task(name, mixture.tasks[name], model, f"{where}.tasks.{name}")
             for name in sorted(mixture.tasks, key=str)}
    mixture = dataclasses.replace(mixture, tasks=tasks)
    check(mixture.rates == "temperature" or mixture.temperature == 1, f"{where}.temperature has no effect with "
          f"{where}.rates={mixture.rates}; leave it out")
    for name, task in tasks.items():
        check((task.rate is not None) == (mixture.rates == "fixed"), f"{where}.tasks.{name}.rate={task.rate}: with {where}."
              f"rates={mixture.rates} " + ("every task needs one" if mixture.rates == "fixed" else "it has no effect"))
        check(task.rate is None or task.rate > 0, f"{where}.tasks.{name}.rate=0 never draws it; leave the task out")
        for option in SHARED:
            own, first = getattr(task, option), getattr(mixture, option)
            check(own == first, f"{where}.tasks.{name}.{option}={own}, but another task has {first}; one loss is for all, "
                  "so give all the same")
    objectives = {task.objective for task in tasks.values()}
    check(not {"ul2", "span_corruption"} <= objectives, f"{where}: ul2 cuts out spans as span_corruption does, but says so "
          "first, so both in one mixture would use the same tokens in two ways; leave one out")
    return mixture


def task_name(name: Any) -> str:
    """A task's name, after which a folder is named. Raises `UserError` on others."""
    check(isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,99}", name) is not None, f"config.data.task.tasks: the "
          f"name of a task has letters, digits, _ and - only, as a folder is named after it, and not {name!r}")
    return name


def _task(name: str, given: Any, model: ModelConfig, where: str) -> Task:
    """The typed options of one task. Raises `UserError` on impossible ones."""
    if isinstance(given, Task):
        return given
    task_name(name)
    check(isinstance(given, Mapping), f"{where}={given!r} must be a dict of a source and options of a task")
    task = resolve_task(given, model, where)
    check(bool(task.source), f"{where}.source: name the task's text, as config.data.source would")
    needs = OBJECTIVES[task.objective]
    check(needs.head == "tokens" and model.head == "tokens", f"{where}.objective={task.objective}: the tasks of a mixture "
          "share config.model.head=tokens; for labels take seq2seq, with the label as target, as in 'target': '{label}'")
    check(model.kind in needs.kinds, f"{where}.objective={task.objective} needs config.model.kind="
          f"{' or '.join(needs.kinds)}, not {model.kind}")
    return task


def parts(config: Config) -> dict[str, Config]:
    """A config for each task by its name, as if it were trained alone; of a single task the config itself, named "".

    Args:
      config: whose task is resolved.
    """
    mixture = config.data.task
    if not isinstance(mixture, Mixture):
        return {"": config}

    def alone(task: Task) -> Config:
        plain = dataclasses.replace(task, **dict.fromkeys(OF_MIXTURES))
        return dataclasses.replace(config, data=dataclasses.replace(
            config.data, task=plain, source=task.source, eval_source=task.eval_source,
            text_key=task.text_key or config.data.text_key))
    return {name: alone(task) for name, task in mixture.tasks.items()}


def part(config: Config, name: str | None, option: str = "--task") -> Config:
    """The config of one task. Raises `UserError` if a mixture has no task of that name, or a name is given without one.

    Args:
      config: whose task is resolved.
      name: of the task.
      option: of the command line with which the name is given.
    """
    mixture = config.data.task
    if not isinstance(mixture, Mixture):
        check(name is None, f"{option}={name}: there is one task only; leave it out")
        return config
    listed = ", ".join(mixture.names)
    check(name is not None, f"this model has several tasks; name one with {option} ({listed})")
    check(name in mixture.tasks, f"{option}={name} is none of {listed}{nearest(name, mixture.names)}")
    return parts(config)[name]


def number(config: Config, name: str | None) -> int:
    """The number of a task of that name; 0 of the only one."""
    mixture = config.data.task
    return mixture.names.index(name) if isinstance(mixture, Mixture) else 0


def rates(mixture: Mixture, rows: Sequence[int]) -> tuple[float, ...]:
    """The share of each task in the rows that are drawn, given how many rows it has; they sum to 1.

    What `samplings` makes of one example counts as one.
    """
    if mixture.rates == "fixed":
        weights = [task.rate for task in mixture.tasks.values()]
    else:
        counts = [count / task.samplings for count, task in zip(rows, mixture.tasks.values(), strict=True)]
        most = max(counts)
        weights = [(count / most)**(1 / mixture.temperature) for count in counts]
    return tuple(weight / sum(weights) for weight in weights)


if __name__ == "__main__":
    print(table(Mixture, "config.data.task."))
