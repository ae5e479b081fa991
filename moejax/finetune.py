"""How a run starts from a trained model: what moves, how fast, and when it ends. Every option of `config.train.finetune`.

`python -m moejax.finetune` prints them. Patterns are those of file names (`*`, `?`, `[ab]`) and match whole names of
parameters as `--mode=shardings` prints them, such as `stack_0/block_0/attention/w_q`.
"""

import dataclasses
from collections.abc import Collection
from fnmatch import fnmatchcase

from moejax.config import build_group, check, key, nearest, table

LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")
"""Metrics of an evaluation of which the lowest is the best."""


@dataclasses.dataclass(frozen=True)
class Finetune:
    """All options."""

    train: tuple[str, ...] | None = key(None, "patterns of the parameters that move; None: all, or with lora_rank none but "
                                        "the adapters and a new head")
    freeze: tuple[str, ...] = key((), "patterns of parameters that stay as they are, among those that would move")
    freeze_blocks: tuple[int, ...] = key((), "numbers of blocks that stay as they are, with their routers' state, from 0, "
                                         "an encoder's before its decoder's", low=0)
    layer_decay: float = key(1.0, "factor on the learning rate from each block to the one before it; 1 at the head, and "
                             "the embedding is before the first block", low=0, high=1)
    lora_rank: int = key(0, "rank of the adapters beside the chosen weight matrices (LoRA 2106.09685); 0 has none", low=0)
    lora_alpha: float = key(16.0, "adapters count this over lora_rank", low=1e-6)
    lora: tuple[str, ...] = key(("*attention/w_*",), "patterns of the weight matrices that get adapters, each expert's its "
                                "own")
    teacher: str | None = key(None, "workdir of a model of the same tokens and kind that the run learns from beside its "
                              "text, such as a large sparse one for a small dense one (1503.02531)")
    teacher_weight: float = key(0.5, "share of the teacher in the loss", low=0, high=1)
    teacher_temperature: float = key(1.0, "by which the scores of both are divided before they are compared", low=0.01)
    metric: str = key("loss", "what of an evaluation says which checkpoint is the best, as metrics.jsonl calls it",
                      free=True)
    patience: int | None = key(None, "evaluations in a row that are not better than the best, after which the run ends; "
                               "the best stays as --step=N; None goes on to the last step", low=1, free=True)

    @property
    def lower(self) -> bool:
        """Whether the lowest value of the metric is the best."""
        return self.metric.rpartition("/")[2] in LOWER_IS_BETTER

    def better(self, one: float, other: float | None) -> bool:
        """Whether one value of the metric is better than another, or the first; not a number never is."""
        if other is None:
            return one == one
        return one < other if self.lower else one > other


PLAIN = Finetune()


def resolve(given: "Finetune | dict | None", metrics: tuple[str, ...]) -> Finetune:
    """Typed options.

    Args:
      given: options by name.
      metrics: that an evaluation of the run has.

    Raises:
      UserError: an unknown option, or a metric that there is not.
    """
    if isinstance(given, Finetune):
        return given
    where = "config.train.finetune"
    options = build_group(Finetune, given or {}, where)
    for needed, names in (("lora_rank", ("lora", "lora_alpha")), ("teacher", ("teacher_weight", "teacher_temperature"))):
        idle = [name for name in names if getattr(options, name) != getattr(PLAIN, name)]
        check(bool(getattr(options, needed)) or not idle, f"{where}.{idle and idle[0]} has no effect without "
              f"{where}.{needed}; set that, or leave it out")
    check(options.metric in metrics, f"{where}.metric={options.metric} is not measured here; there are "
          f"{', '.join(metrics)}{nearest(options.metric, metrics)}")
    return options


def matching(patterns: tuple[str, ...], names: Collection[str], what: str) -> set[str]:
    """The names that match any pattern. Raises `UserError` if a pattern matches none of them."""
    found = {pattern: {name for name in names if fnmatchcase(name, pattern)} for pattern in patterns}
    for pattern, matched in found.items():
        check(bool(matched), f"config.train.finetune.{what}: {pattern!r} matches no parameter"
              f"{nearest(pattern, list(names))}; --mode=shardings lists them")
    return set().union(*found.values())


if __name__ == "__main__":
    print(table(Finetune, "config.train.finetune."))
