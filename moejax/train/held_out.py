"""The evaluation of a run on its held-out data: one record, with numbers of each task if there are several."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.config import Config
from moejax.data.loader import eval_batches, eval_size
from moejax.data.mixing import rows_of_tasks
from moejax.data.prepared import Prepared
from moejax.evaluation.labels import label_metrics
from moejax.evaluation.perplexity import Evaluation, bits_per_byte, evaluate
from moejax.metrics.record import loss_summary, routing_summary, total_records
from moejax.metrics.tasks import losses_line, routing_of_tasks
from moejax.mixture import Mixture, parts
from moejax.train.progress import duration
from moejax.train.setup import Setup


def run_evaluation(setup: Setup, prepared: Prepared, params: Any, router_state: Any, step: int) -> dict[str, Any]:
    """Evaluates on the held-out split and returns the record; call it under the setup's mesh.

    Of a mixture each task is evaluated alone, on config.train.eval_batches batches or all. Then `loss`, `perplexity` and
    `accuracy` are over the targets of all tasks together, `tasks/loss` and `tasks/accuracy` means over the tasks, and
    `task/NAME/...` what each task has if it is trained alone.
    """
    begin = time.monotonic()
    config, found = setup.config, {}
    for name, rows in rows_of_tasks(prepared, config, "eval").items():
        batches = eval_batches(rows, config, setup.rows(eval_size(config)))
        found[name] = evaluate(setup.eval_step, params, router_state, map(setup.put, batches))
    seconds = time.monotonic() - begin
    own = parts(config)
    if isinstance(config.data.task, Mixture):
        record = pooled(found) | {f"task/{name}/{metric}": value for name, result in found.items()
                                  for metric, value in numbers(own[name], prepared.tasks[name], result).items()}
        record |= routing_of_tasks({name: result.records for name, result in found.items()})
    else:
        record = numbers(config, prepared, found[""])
    targets = sum(result.targets for result in found.values())
    records = total_records([result.records for result in found.values()])
    return {"step": step, "split": "eval", **record, "targets": targets, "tokens_per_second": targets / seconds,
            "seconds": seconds, **loss_summary(records), **routing_summary(records)}


def numbers(config: Config, prepared: Prepared, result: Evaluation) -> dict[str, Any]:
    """What is reported of one task."""
    task, record = config.data.task, dict(result.means)
    if task.head == "tokens":
        record["perplexity"] = perplexity(record["loss"])
    else:
        record |= label_metrics(task.objective, result.scores, result.labels)
        record |= {"labels": list(prepared.labels)} if prepared.labels else {}
    if "sequence_accuracy" not in task.metrics:
        record.pop("sequence_accuracy", None)
    if task.objective == "next_token":
        record["bits_per_byte"] = bits_per_byte(record["loss"], len(prepared.eval.tokens) - 1, prepared.eval.bytes)
    return record


def pooled(results: Mapping[str, Evaluation]) -> dict[str, float]:
    """Loss, perplexity and accuracy over the targets of all tasks, and the means over tasks of loss and accuracy."""
    targets = sum(result.targets for result in results.values())
    names = [name for name in next(iter(results.values())).means if name != "sequence_accuracy"]
    whole = {name: sum(result.means[name] * (result.targets / targets) for result in results.values()) for name in names}
    means = {f"tasks/{name}": float(np.mean([result.means[name] for result in results.values()]))
             for name in ("loss", "accuracy")}
    return whole | {"perplexity": perplexity(whole["loss"])} | means


def perplexity(loss: float) -> float:
    """Of a mean loss in nats; no larger than a float can be."""
    return float(np.exp(min(loss, 700.0)))


def evaluation_line(record: Mapping[str, Any]) -> str:
    """One line for people."""
    shown = {"bits_per_byte": ".4f", "perplexity": ".2f", "accuracy": ".4f", "sequence_accuracy": ".4f", "f1_macro": ".4f",
             "f1_micro": ".4f", "matthews": ".4f", "spearman": ".4f"}
    parts = [f"{name.replace('_', ' ')} {record[name]:{form}}" for name, form in shown.items() if name in record]
    if "tasks/loss" in record:
        parts.append(f"mean over tasks {record['tasks/loss']:.4f} ({losses_line(record)})")
    unit = "tokens" if "perplexity" in record else "rows"
    return "  ".join([f"step {record['step']}", f"held-out loss {record['loss']:.4f}", *parts,
                      f"({record['targets']:,} {unit} in {duration(record['seconds'])})"])
