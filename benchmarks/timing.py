"""Fair timing on a noisy machine: variants run in turn in one process, and medians and their ratios are what counts."""

import os
import platform
import statistics
import time
from typing import Any, Callable, Mapping

import jax


def alternate(variants: Mapping[Any, Callable[[], Any]], rounds: int, again: bool = False) -> dict[Any, list[float]]:
    """Seconds of each variant in `rounds` rounds, in each of which all run once; two more rounds before them warm up.

    With `again` each runs twice in a round, and the second run counts: of a variant that allocates gigabytes, the first
    would pay for what the operating system took back while the others ran.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 2):
        for name, run in variants.items():
            if again:
                jax.block_until_ready(run())
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: taken[2:] for name, taken in seconds.items()}


def over(first: list[float], second: list[float]) -> float:
    """The median over the rounds of how many times longer `first` took: a machine that drifts does so for both."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    device = jax.devices()[0]
    return {"date": time.strftime("%Y-%m-%d"), "platform": device.platform, "device": device.device_kind,
            "devices": jax.device_count(), "cores": os.cpu_count(), "cpu": _cpu(), "jax": jax.__version__,
            "python": platform.python_version()}


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def table(rows: list[tuple[Any, ...]], head: tuple[str, ...]) -> str:
    """A Markdown table."""
    def line(cells: tuple[Any, ...]) -> str:
        return "| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
    return "\n".join([line(head), line(("---",) * len(head)), *map(line, rows)])
