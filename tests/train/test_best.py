"""The best evaluation: counted by hand."""

import math

from moejax.finetune import Finetune
from moejax.train.best import Best


def after(options, values):
    best = Best()
    for i, value in enumerate(values):
        best = best.after(options, {"step": 10 * (i + 1)} | ({} if value is None else {options.metric: value}))
    return best


def test_patience_counts_evaluations_that_are_not_better():
    options = Finetune(patience=2)
    assert after(options, [3.0, 2.0, 2.5]) == Best(20, 2.0, 1, "loss")
    assert not after(options, [3.0, 2.0, 2.5]).exhausted(options)
    assert after(options, [3.0, 2.0, 2.5, 2.0]).exhausted(options)  # as good is not better
    assert not after(Finetune(), [1.0] * 9).exhausted(Finetune())


def test_more_accuracy_is_better_and_what_is_no_number_never_is():
    options = Finetune(metric="accuracy", patience=3)
    assert after(options, [0.5, 0.7, 0.6]) == Best(20, 0.7, 1, "accuracy")
    assert after(options, [math.nan, 0.1, math.nan, None]) == Best(20, 0.1, 2, "accuracy")
    assert after(options, [math.nan]) == Best(None, None, 1)
    assert "never a number" in after(options, [math.nan]).said(options)
