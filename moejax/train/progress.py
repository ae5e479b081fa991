"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm

from moejax.metrics.tasks import losses_line


class Progress:
    """Shows steps, loss, speed and time left; `say` prints a line above the bar.

    Args:
      first: steps done before.
      last: steps in all.
      quiet: show nothing, as on all but one process of a multi-host run.
    """

    def __init__(self, first: int, last: int, quiet: bool = False):
        self._quiet, self._last, self._start, self._first = quiet, last, time.monotonic(), first
        terminal = sys.stderr.isatty() and not quiet
        self._bar = tqdm(total=last, initial=first, unit="step", dynamic_ncols=True) if terminal else None

    def say(self, line: str) -> None:
        """Prints a line."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(line)
        else:
            try:
                print(line, flush=True)
            except BrokenPipeError:
                raise
            except OSError:  # stdout is a file on a full disk, which is no reason to end
                pass

    def step(self, step: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def record(self, record: dict[str, Any]) -> None:
        """Shows a training record: on the bar, or as a line with the time left."""
        speed = f"{record['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {record['loss']:.4f}, {speed}")
            return
        done = record["step"] - self._first
        left = (time.monotonic() - self._start) / max(done, 1) * (self._last - record["step"])
        tasks = losses_line(record)
        skipped = f"{record['skipped']} steps skipped  " if record.get("skipped") else ""
        self.say(f"step {record['step']}/{self._last}  loss {record['loss']:.4f}{tasks and f' ({tasks})'}  {skipped}"
                 f"{speed}  {100 * record['utilisation']:.0f}% of matmul speed  {duration(left)} left")

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 5 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
