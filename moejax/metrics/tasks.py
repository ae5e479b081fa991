"""Records of several tasks: numbers of each, and which experts serve which task."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moejax.moe.types import LayerRecord


def js_divergence(p_E: np.ndarray, q_E: np.ndarray) -> float:
    """Jensen-Shannon divergence of two distributions, given up to a factor, in bits: 0 if equal, 1 if disjoint.

    Lin 1991. One that is all zeros is taken for the other, as nothing tells them apart.
    """
    p_E, q_E = np.asarray(p_E, np.float64), np.asarray(q_E, np.float64)
    if p_E.sum() == 0 or q_E.sum() == 0:
        return 0.0
    p_E, q_E = p_E / p_E.sum(), q_E / q_E.sum()
    middle_E = (p_E + q_E) / 2

    def bits_apart(r_E: np.ndarray) -> float:
        there = r_E > 0
        return float(r_E[there] @ np.log2(r_E[there] / middle_E[there]))
    return min(max((bits_apart(p_E) + bits_apart(q_E)) / 2, 0.0), 1.0)  # which rounding may pass


def routing_of_tasks(records: Mapping[str, Sequence[LayerRecord]]) -> dict[str, Any]:
    """Which experts serve which task.

    Args:
      records: of the sparse layers in order, by task, summed over the evaluation set.

    Returns:
      Lists with one entry a sparse layer: `tasks/load`, of each task the share of its pairs that each expert got, before
      dropping; `tasks/js`, the Jensen-Shannon divergence between each two tasks; `tasks/js_mean`, its mean over pairs of
      tasks, where there are any. The order of the tasks is in `tasks/names`. Nothing without sparse layers.
    """
    names, found = list(records), {"tasks/load": [], "tasks/js": [], "tasks/js_mean": []}
    for layers in zip(*records.values()):
        loads = [np.asarray(layer.load.assigned_E, np.float64) for layer in layers]
        divergence_NN = np.array([[js_divergence(one, other) for other in loads] for one in loads])
        found["tasks/load"].append([np.round(load / max(load.sum(), 1), 6).tolist() for load in loads])
        found["tasks/js"].append(np.round(divergence_NN, 6).tolist())
        if len(names) > 1:
            found["tasks/js_mean"].append(float(divergence_NN[np.triu_indices(len(names), 1)].mean()))
    told = {name: values for name, values in found.items() if values}
    return {"tasks/names": names} | told if told else {}


def training_summary(names: Sequence[str], loss_N: np.ndarray, share_N: np.ndarray) -> dict[str, float]:
    """`task/NAME/loss`, nats a target, and `task/NAME/share` of the targets, of the tasks that had any.

    Args:
      names: of the tasks.
      loss_N: their shares of the loss.
      share_N: their shares of the targets.
    """
    found = {}
    for name, loss, share in zip(names, loss_N, share_N, strict=True):
        if share > 0:
            found |= {f"task/{name}/loss": float(loss / share), f"task/{name}/share": float(share)}
    return found


def losses_line(record: Mapping[str, Any]) -> str:
    """The loss of each task in a record, for people; empty if there is one only."""
    return ", ".join(f"{name.split('/')[1]} {value:.4f}" for name, value in record.items()
                     if name.startswith("task/") and name.endswith("/loss"))
