"""Which experts serve which task: a picture and a table of the last evaluation of runs on several tasks.

    python -m experiments.multitask.plot runs/multitask/sparse runs/multitask/dense

Prints the held-out loss of each task, and writes tasks.png into each workdir with experts: above, the share of each task's
pairs that each expert got, layer by layer; below, the Jensen-Shannon divergence between the tasks, from 0 (the same experts
in the same shares) to 1 (no expert in common).
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.config import UserError, check
from moejax.exit_status import exit_status
from moejax.metrics.record import read


def last(workdir: Path) -> dict[str, Any]:
    """The last evaluation of a run. Raises `UserError` if it has none on several tasks."""
    try:
        found = [record for record in read(workdir) if record["split"] == "eval" and "tasks/loss" in record]
    except OSError as error:
        raise UserError(f"{workdir}: cannot be read ({error.strerror}); give the workdir of a run") from None
    check(bool(found), f"{workdir}: holds no evaluation on several tasks; train one with config.data.task.tasks first")
    return found[-1]


def table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Held-out losses in Markdown, one line a run: each task's, and their mean."""
    names = [name.split("/")[1] for name in next(iter(records.values()))
             if name.startswith("task/") and name.endswith("/loss")]
    lines = ["| run | step | " + " | ".join(names) + " | mean |", "| --- |" + " --- |" * (len(names) + 2)]
    for run, record in records.items():
        losses = [record.get(name) for name in (*(f"task/{name}/loss" for name in names), "tasks/loss")]
        losses = [float("nan") if loss is None else loss for loss in losses]  # a run that diverged has none
        lines.append(f"| {run} | {record['step']} | " + " | ".join(f"{loss:.4f}" for loss in losses) + " |")
    return "\n".join(lines)


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Heat maps of a record's `tasks/load` and `tasks/js`, one column a sparse layer."""
    import matplotlib
    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot
    names, maps = record["tasks/names"], [np.array(record[key]) for key in ("tasks/load", "tasks/js")]
    layers = len(maps[0])
    figure, axes = pyplot.subplots(2, layers, figsize=(1.6 + 2.6 * layers, 1.6 + 0.8 * len(names)), layout="constrained",
                                   squeeze=False)
    titles = ("share of a task's pairs", "divergence of tasks, bits")
    for row, values in enumerate(maps):
        most = max(float(values.max()), 1e-3)
        for layer in range(layers):
            own = axes[row, layer]
            image = own.imshow(values[layer], vmin=0, vmax=most, cmap="viridis", aspect="auto")
            own.set_yticks(range(len(names)), names if layer == 0 else [""] * len(names), fontsize=8)
            if row == 0:
                own.set_title(f"sparse layer {layer}", fontsize=9)
                own.set_xlabel("expert", fontsize=8)
                own.set_xticks(range(values.shape[2]))
            else:
                own.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
            own.tick_params(axis="x", labelsize=8)
            for (i, j), value in np.ndenumerate(values[layer]):
                own.text(j, i, f"{value:.2f}".lstrip("0") or "0", ha="center", va="center", fontsize=6,
                         color="white" if value < 0.6 * most else "black")
        bar = figure.colorbar(image, ax=axes[row].tolist(), shrink=0.9)
        bar.set_label(titles[row], fontsize=8)
        bar.ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(workdirs: Sequence[str]) -> None:
    """Prints the table and writes the pictures."""
    check(bool(workdirs), "give workdirs, as in: python -m experiments.multitask.plot runs/multitask/sparse")
    records = {workdir: last(Path(workdir)) for workdir in workdirs}
    print(table(records))
    for workdir, record in records.items():
        if "tasks/load" in record:
            try:
                plot(record, Path(workdir) / "tasks.png")
            except ImportError:
                raise UserError('no picture: pip install -e ".[plots]", and give the same command again') from None
            print(f"{workdir}/tasks.png")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:]), "nothing is lost"))
