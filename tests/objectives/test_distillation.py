"""A teacher's share: the formula in float64, its gradient, and chunks on meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from moejax import sharding
from moejax.config import MeshConfig
from moejax.objectives.chunked import over_chunks
from moejax.objectives.cross_entropy import cross_entropy
from moejax.objectives.distillation import distillation

B, L, D, V, WEIGHT, T = 8, 6, 5, 7, 0.3, 2.5
RNG = np.random.default_rng(0)
HEAD, X = RNG.normal(size=(D, V)).astype(np.float32), RNG.normal(size=(B, L, D)).astype(np.float32)
TARGETS, MASK = RNG.integers(0, V, (B, L), dtype=np.int32), RNG.random((B, L)) < 0.8
TEACHER = RNG.normal(size=(B, L, V)).astype(np.float32) * 3
BOTH = distillation(partial(cross_entropy), WEIGHT, T)


def test_it_is_the_formula_and_has_its_gradient():
    logits = np.einsum("bld,dv->blv", X.astype(np.float64), HEAD.astype(np.float64))
    own, t, z = log_softmax(logits, -1), log_softmax(TEACHER / T, -1), log_softmax(logits / T, -1)
    nll = -np.take_along_axis(own, TARGETS[..., None], -1)[..., 0]
    divergence = np.sum(np.exp(t) * (t - z), -1)
    (total, sums), gradient = jax.value_and_grad(BOTH, has_aux=True)(jnp.float32(logits), TARGETS, MASK, TEACHER)
    assert float(total) == pytest.approx(np.sum(MASK * ((1 - WEIGHT) * nll + WEIGHT * T**2 * divergence)), rel=1e-5)
    assert float(sums["aux/teacher"]) == pytest.approx(np.sum(MASK * divergence), rel=1e-5)
    assert float(sums["loss"]) == pytest.approx(np.sum(MASK * nll), rel=1e-5)
    wanted = (1 - WEIGHT) * (np.exp(own) - np.eye(V)[TARGETS]) + WEIGHT * T * (np.exp(z) - np.exp(t))
    np.testing.assert_allclose(gradient, MASK[..., None] * wanted, atol=1e-5)


def test_a_teacher_of_the_same_scores_teaches_nothing():
    logits = jnp.einsum("bld,dv->blv", X, HEAD)
    only = distillation(cross_entropy, 1.0, T)
    (total, _), gradient = jax.value_and_grad(only, has_aux=True)(logits, TARGETS, MASK, logits)
    assert abs(float(total)) < 1e-4 and float(jnp.abs(gradient).max()) < 1e-6


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, expert=2, context=2)], ids=str)
def test_in_chunks_it_is_the_same(mesh):
    def whole(head, x):
        return BOTH(jnp.einsum("bld,dv->blv", x, head), TARGETS, MASK, TEACHER)[0]

    def chunked(head, x):
        return over_chunks(BOTH, 12, head, x, TARGETS, MASK, TEACHER)[0]

    wanted = jax.jit(jax.value_and_grad(whole, argnums=(0, 1)))(HEAD, X)
    if mesh is None:
        found = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(HEAD, X)
    else:
        with jax.set_mesh(sharding.make_mesh(mesh)):
            found = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(HEAD, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)
