"""Losses of whole rows against the formulas, and rows that do not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.objectives.classes import classification, multi_label, regression

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(5, 3)) * 2
MASK = np.array([True, True, False, True, True])
LABEL = np.array([0, 2, 1, 1, 2])
MANY = (RNG.random((5, 3)) < 0.5).astype(np.float32)
NUMBER = RNG.normal(size=5)


def test_classification():
    weight = np.array([0.5, 1.0, 3.0])
    log_probs = LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True))
    nll = -log_probs[np.arange(5), LABEL]
    got, sums = classification(jnp.float32(LOGITS), LABEL, MASK)
    assert float(got) == pytest.approx(nll[MASK].sum(), rel=1e-5) and float(sums["loss"]) == pytest.approx(float(got))
    assert float(sums["accuracy"]) == (LOGITS.argmax(1) == LABEL)[MASK].sum()
    smooth = 0.9 * nll - 0.1 * log_probs.mean(1)
    got, sums = classification(jnp.float32(LOGITS), LABEL, MASK, jnp.float32(weight), label_smoothing=0.1)
    assert float(got) == pytest.approx((smooth * weight[LABEL])[MASK].sum(), rel=1e-5)
    assert float(sums["loss"]) == pytest.approx(nll[MASK].sum(), rel=1e-5)


def test_multi_label():
    probs = 1 / (1 + np.exp(-LOGITS))
    nll = -(MANY * np.log(probs) + (1 - MANY) * np.log(1 - probs)).mean(1)
    got, sums = multi_label(jnp.float32(LOGITS), MANY, MASK)
    assert float(got) == pytest.approx(nll[MASK].sum(), rel=1e-5)
    assert float(sums["accuracy"]) == pytest.approx(((LOGITS > 0) == MANY).mean(1)[MASK].sum(), rel=1e-6)


def test_regression():
    got, _ = regression(jnp.float32(LOGITS[:, :1]), jnp.float32(NUMBER), MASK)
    assert float(got) == pytest.approx(((LOGITS[:, 0] - NUMBER)**2)[MASK].sum(), rel=1e-5)


@pytest.mark.parametrize("loss, targets", [(classification, LABEL), (multi_label, MANY), (regression, NUMBER)])
def test_rows_that_do_not_count_get_no_gradient(loss, targets):
    logits = jnp.float32(LOGITS if loss is not regression else LOGITS[:, :1])
    grads = np.asarray(jax.grad(lambda logits: loss(logits, jnp.asarray(targets), MASK)[0])(logits))
    assert (grads[~MASK] == 0).all() and (np.abs(grads[MASK]).max(1) > 0).all()
