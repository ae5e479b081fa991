"""Sums for each row against plain numpy, in chunks and on every mesh."""

from functools import partial

import jax
import numpy as np
import pytest

from moejax import sharding
from moejax.config import MeshConfig
from moejax.objectives.by_row import faultless, sums_of_tasks, with_rows
from moejax.objectives.chunked import over_chunks
from moejax.objectives.cross_entropy import cross_entropy

B, L, D, V = 8, 6, 5, 11
RNG = np.random.default_rng(0)
X, HEAD = RNG.normal(size=(B, L, D)).astype(np.float32), RNG.normal(size=(D, V)).astype(np.float32)
TARGETS, MASK = RNG.integers(0, V, (B, L)).astype(np.int32), RNG.random((B, L)) < 0.6
MASK[3] = False
ROWS = np.broadcast_to(np.arange(B, dtype=np.int32)[:, None], (B, L))
TASK = np.array([0, 2, 1, 1, 0, 2, 2, 0], np.int32)


def differentiate(function, *arguments):
    return jax.value_and_grad(function, argnums=(0, 1), has_aux=True)(*arguments)


def wanted():
    """Loss and errors of each row, float64."""
    logits = X.astype(np.float64) @ HEAD
    chosen = np.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]
    nll = np.log(np.exp(logits).sum(-1)) - chosen
    return np.where(MASK, nll, 0).sum(1), np.where(MASK, chosen < logits.max(-1), 0).sum(1)


@pytest.mark.parametrize("chunk, mesh", [(5, None), (5, {"data": 2, "expert": 2, "context": 2}), pytest.param(
    None, None, marks=pytest.mark.slow), pytest.param(None, {"data": 8}, marks=pytest.mark.slow)], ids=str)
def test_sums_of_rows_are_the_rows_own_whatever_chunk_and_mesh(chunk, mesh):
    function = jax.jit(partial(over_chunks, with_rows(cross_entropy, B), chunk))
    plain = jax.jit(partial(over_chunks, cross_entropy, chunk))
    rows = (TARGETS, MASK)
    if mesh is None:
        (total, sums), grads = differentiate(function, HEAD, X, *rows, ROWS)
        (alone, _), own = differentiate(plain, HEAD, X, *rows)
    else:
        with jax.set_mesh(sharding.make_mesh(MeshConfig(**mesh))):
            (total, sums), grads = jax.device_get(differentiate(function, HEAD, X, *rows, ROWS))
            (alone, _), own = jax.device_get(differentiate(plain, HEAD, X, *rows))
    loss_B, errors_B = wanted()
    np.testing.assert_allclose(sums["row_loss"], loss_B, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(sums["row_errors"], errors_B)
    assert float(total) == float(alone) == pytest.approx(loss_B.sum(), rel=1e-5)
    jax.tree.map(np.testing.assert_array_equal, grads, own)  # the reports change nothing


def test_sums_of_tasks_add_up_and_rows_without_targets_are_no_rows():
    loss_B, errors_B = wanted()
    found = sums_of_tasks(np.float32(loss_B), MASK, TASK, 4)
    for task in range(4):
        assert float(found["task_loss"][task]) == pytest.approx(loss_B[TASK == task].sum(), rel=1e-6)
        assert float(found["task_targets"][task]) == MASK[TASK == task].sum()
    assert float(found["task_loss"].sum()) == pytest.approx(loss_B.sum(), rel=1e-6)
    errors_B[5] = 0
    told = faultless(np.float32(errors_B), MASK)
    assert int(told["rows"]) == B - 1 and int(told["faultless"]) == sum((errors_B == 0) & MASK.any(1))
