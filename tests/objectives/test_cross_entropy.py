"""Cross-entropy against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.objectives.cross_entropy import cross_entropy


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 5, 7)) * 3, rng.integers(0, 7, (3, 5)), rng.random((3, 5)) < 0.6


def test_sums_are_the_formula(case):
    logits, targets, mask = case
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    smooth = 0.9 * nll + 0.1 * (log_z[..., None] - logits).mean(-1)
    objective, sums = cross_entropy(jnp.float32(logits), targets, mask, label_smoothing=0.1, head_z_weight=0.01)
    assert float(objective) == pytest.approx((smooth + 0.01 * log_z**2)[mask].sum(), rel=1e-5)
    assert float(sums["loss"]) == pytest.approx(nll[mask].sum(), rel=1e-5)
    assert float(sums["aux/head_z"]) == pytest.approx((log_z**2)[mask].sum(), rel=1e-5)
    assert float(sums["accuracy"]) == (logits.argmax(-1) == targets)[mask].sum()


def test_masked_targets_get_no_gradient(case):
    logits, targets, mask = case
    grads = jax.grad(lambda z: cross_entropy(z, targets, mask, label_smoothing=0.1, head_z_weight=0.1)[0])(
        jnp.float32(logits))
    assert np.all(np.asarray(grads)[~mask] == 0) and np.all(np.abs(grads[mask]).max(-1) > 0)


def test_a_target_out_of_reach_stays_finite():
    logits = jnp.array([[[1e4, -1e4]]], jnp.float32)
    value, grads = jax.value_and_grad(lambda z: cross_entropy(z, jnp.array([[1]]), jnp.array([[True]]))[0])(logits)
    assert float(value) == 2e4 and np.isfinite(grads).all()
