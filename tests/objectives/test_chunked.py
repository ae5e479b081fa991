"""An objective in chunks is the objective: its value, its reports and both gradients, on one device and on meshes."""

from functools import partial

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import sharding
from moejax.config import MeshConfig
from moejax.objectives.chunked import chunks_of, over_chunks
from moejax.objectives.cross_entropy import cross_entropy

B, L, D, V = 8, 12, 5, 14
OBJECTIVE = partial(cross_entropy, label_smoothing=0.1, head_z_weight=0.01)
MESHES = [None, MeshConfig(data=8), MeshConfig(data=2, expert=2, model=2), MeshConfig(data=1, expert=4, context=2)]


def inputs():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(D, V)).astype(np.float32), rng.normal(size=(B, L, D)).astype(np.float32),
            rng.integers(0, V, (B, L), dtype=np.int32), rng.random((B, L)) < 0.8)


def differentiate(function):
    """((3 * sum, reports), gradients to head and x): a factor shows whether the cotangent is used."""
    def scaled(head_DV, x_BLD, *rest):
        total, reports = function(head_DV, x_BLD, *rest)
        return 3 * total, reports
    return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True))


def whole(head_DV, x_BLD, targets_BL, mask_BL):
    return OBJECTIVE(jnp.einsum("bld,dv->blv", x_BLD, head_DV), targets_BL, mask_BL)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("chunk_tokens", [None, 1, 20, 48])
def test_chunks_add_up_to_the_whole_in_value_and_gradients(mesh, chunk_tokens):
    given = inputs()
    want = differentiate(whole)(*given)
    chunked = partial(over_chunks, OBJECTIVE, chunk_tokens)
    if mesh is None:
        got, evaluated = differentiate(chunked)(*given), jax.jit(chunked)(*given)
    else:
        with jax.set_mesh(sharding.make_mesh(mesh)):
            got, evaluated = differentiate(chunked)(*given), jax.jit(chunked)(*given)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5), got, want)
    np.testing.assert_allclose(3 * evaluated[0], want[0][0], rtol=1e-6)


def equations(jaxpr, in_a_scan=False):
    """Every equation of a jaxpr and of those within it, and whether it is repeated by a scan."""
    for equation in jaxpr.eqns:
        yield equation, in_a_scan
        for inner in jex_core.jaxprs_in_params(equation.params):
            yield from equations(inner, in_a_scan or equation.primitive.name == "scan")


def test_the_gradient_of_the_head_is_summed_over_devices_once_after_all_chunks():
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=8))):
        jaxpr = jax.make_jaxpr(differentiate(partial(over_chunks, OBJECTIVE, 1)))(*inputs())
    found = list(equations(jaxpr.jaxpr))
    assert any(equation.primitive.name == "scan" for equation, _ in found)
    sums = [in_a_scan for equation, in_a_scan in found if equation.primitive.name.startswith("psum")
            and equation.outvars[0].aval.shape == (D, V)]
    assert sums == [False]


@pytest.mark.parametrize("batch, length, chunk_tokens, chunks", [
    (8, 12, None, 1), (8, 12, 96, 1), (8, 12, 95, 2), (8, 12, 24, 4), (8, 12, 1, 12), (2, 7, 2, 7)])
def test_chunks_are_the_fewest_equal_parts_that_are_small_enough(batch, length, chunk_tokens, chunks):
    assert chunks_of(batch, length, chunk_tokens) == chunks
