"""Evaluation: means over targets, whatever the batches."""

import math

import jax
import numpy as np
import pytest
from tiny import tiny_batch, tiny_config, tiny_functions, tiny_model

from moejax.evaluation.perplexity import bits_per_byte, evaluate, make_eval_step
from moejax.models import transformer


def test_padding_and_batching_change_nothing():
    config = tiny_config(moe__capacity_factor=0.5)
    model, params, state = tiny_model(config)
    functions, _ = tiny_functions(config, model)
    step = make_eval_step(functions.forward, functions.objective)
    batch = tiny_batch(config)
    empty = {name: np.zeros_like(a[:1]) for name, a in batch.items()}
    parts = [{name: np.concatenate([a[i:i + 3], *[empty[name]] * (3 - len(a[i:i + 3]))]) for name, a in batch.items()}
             for i in range(0, 8, 3)]
    whole, split = evaluate(step, params, state, [batch]), evaluate(step, params, state, parts)
    assert whole.targets == split.targets == batch["mask"].sum()
    assert split.means == pytest.approx(whole.means, rel=1e-6)
    for a, b in zip(whole.records, split.records, strict=True):
        np.testing.assert_array_equal(a.load.assigned_E, b.load.assigned_E)
        np.testing.assert_array_equal(a.load.received_E, a.load.assigned_E)  # dropless, whatever training uses

    x_BLD, _ = jax.jit(functions.forward)(params, state, batch)
    logits = np.asarray(x_BLD, np.float64) @ np.asarray(transformer.head(model, params), np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    assert whole.means["loss"] == pytest.approx(nll[batch["mask"]].mean(), rel=1e-5)
    assert whole.means["accuracy"] == pytest.approx((logits.argmax(-1) == batch["targets"])[batch["mask"]].mean())


def test_bits_per_byte_of_a_uniform_byte_model_is_eight():
    assert bits_per_byte(math.log(256), tokens=1000, size=1000) == pytest.approx(8)
    assert bits_per_byte(math.log(256), tokens=250, size=1000) == pytest.approx(2)
