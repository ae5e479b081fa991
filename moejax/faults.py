"""What a run does when something goes wrong, and so that it can be repeated. Every option of `config.train.faults`.

`python -m moejax.faults` prints them.
"""

import dataclasses

from moejax.config import build_group, check, key, table


@dataclasses.dataclass(frozen=True)
class Faults:
    """All options."""

    save_on_preemption: bool = key(True, "SIGTERM and SIGINT finish the step and save; else they end the run at once, and "
                                   "it goes on from its last checkpoint", free=True)
    max_skipped: int | None = key(10, "steps in a row that were skipped because the loss or a gradient was no finite "
                                  "number, or the loss a spike, after which the run ends and says what was wrong; None "
                                  "goes on", low=1, free=True)
    spike: float | None = key(None, "a step is skipped if its loss is more than so many deviations (1.4826 times the "
                              "median absolute one) above the median of the last spike_window steps; None "
                              "skips none", low=0)
    spike_window: int = key(100, "steps that a spike is compared with; before there are so many, none is skipped", low=2)
    stop_unsaved: bool = key(False, "a checkpoint that cannot be written, for the disk is full, ends the run; else it goes "
                             "on with a warning, and tries again when the next one is due", free=True)
    predict_memory: bool = key(True, "a run that the memory of the devices will not do for ends before its first step, and "
                               "names the largest arrays; else it is tried", free=True)
    deterministic: bool = key(False, "on GPUs, train steps of operations that give the same bits each time, which are "
                              "slower; elsewhere it changes nothing", free=True)


def resolve(given: "Faults | dict | None") -> Faults:
    """Typed options. Raises `UserError` on an unknown one, or one without effect."""
    if isinstance(given, Faults):
        return given
    options = build_group(Faults, given or {}, "config.train.faults")
    check(options.spike is not None or options.spike_window == Faults().spike_window, "config.train.faults.spike_window "
          "has no effect without config.train.faults.spike; set that, or leave it out")
    return options


if __name__ == "__main__":
    print(table(Faults, "config.train.faults."))
