"""Evaluation: means over targets, whatever the batches."""

import math

import jax
import numpy as np
import pytest
from tiny import tiny_batch, tiny_config, tiny_functions, tiny_model

import moejax
from moejax.data.rows import Layout, pair
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


@pytest.mark.slow
def test_a_row_without_error_is_what_greedy_decoding_writes():
    """Targets are the model's own texts, but for two rows with another last token."""
    config = tiny_config(model__layers=1, moe__first_dense=0, data__task={"objective": "seq2seq"})
    model, params, state = tiny_model(config)
    rng = np.random.default_rng(2)
    inputs = [rng.integers(0, 37, 3 + n % 3).tolist() for n in range(8)]
    variables = {"params": params, "router": state}
    texts = np.array(moejax.generate(model, variables, inputs, max_new_tokens=4, prefix=True).tokens)
    texts[[2, 5], -1] = (texts[[2, 5], -1] + 1) % 37
    rows = [pair(np.array(source), text, Layout(False, 14, 14, 0)) for source, text in zip(inputs, texts)]
    functions, _ = tiny_functions(config, model)
    rows += [{name: np.zeros_like(array) for name, array in rows[0].items()}] * 2
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    result = evaluate(make_eval_step(functions.forward, functions.measure), params, state, [batch])
    assert result.means["sequence_accuracy"] == 6 / 8 and result.targets == 32
    assert result.means["accuracy"] == pytest.approx(30 / 32)


def test_bits_per_byte_of_a_uniform_byte_model_is_eight():
    assert bits_per_byte(math.log(256), tokens=1000, size=1000) == pytest.approx(8)
    assert bits_per_byte(math.log(256), tokens=250, size=1000) == pytest.approx(2)
