"""Metrics of classifiers over a whole set of rows, by scikit-learn and SciPy."""

from typing import Any

import numpy as np


def label_metrics(objective: str, scores_NC: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What is reported beside loss and accuracy.

    Args:
      objective: classification, multi_label or regression.
      scores_NC: the model's scores of all rows.
      labels: int [N], float 0 and 1 [N, C], or float [N].

    Returns:
      classification: `f1_macro`, `f1_micro`, `precision`, `recall` and `f1` by class, `matthews`, and `confusion` (rows are
      the labels). multi_label: the F1 and their like of labels with positive scores. regression: `spearman`, `pearson`,
      where both are defined: of two rows or more, neither constant.
    """
    if objective == "regression":
        from scipy import stats
        predicted_N = scores_NC[:, 0]
        if len(labels) < 2 or np.ptp(predicted_N) == 0 or np.ptp(labels) == 0:
            return {}
        return {"spearman": float(stats.spearmanr(predicted_N, labels).statistic),
                "pearson": float(stats.pearsonr(predicted_N, labels).statistic)}
    from sklearn import metrics
    several = objective == "multi_label"
    classes = np.arange(scores_NC.shape[1])
    predicted = (scores_NC > 0).astype(int) if several else np.argmax(scores_NC, axis=1)
    labels = labels.astype(int)
    if several and len(classes) == 1:  # which scikit-learn takes for two classes, absent and present
        predicted, labels, classes = predicted[:, 0], labels[:, 0], np.ones(1, int)
    found = {f"f1_{kind}": float(metrics.f1_score(labels, predicted, labels=classes, average=kind, zero_division=0))
             for kind in ("macro", "micro")}
    each = metrics.precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=0)
    found |= {name: values.tolist() for name, values in zip(("precision", "recall", "f1"), each)}
    if not several:
        found |= {"matthews": float(metrics.matthews_corrcoef(labels, predicted)),
                  "confusion": metrics.confusion_matrix(labels, predicted, labels=classes).tolist()}
    return found
