"""Experts that are heads against every expert for every token in float64, by every transport and on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_reference import D, K, T, config_of, context, inputs

from moejax import sharding
from moejax.config import MeshConfig
from moejax.moe import heads

E, F = 4, 6
MESHES = {
    "data8": MeshConfig(data=8),
    "data2 expert2 model2": MeshConfig(data=2, expert=2, model=2),
    "expert4 context2": MeshConfig(data=1, expert=4, context=2),
}
GIVEN = inputs(experts=E)
RNG = np.random.default_rng(1)
WEIGHTS = GIVEN.x_TD, GIVEN.router["w_DE"], *(RNG.normal(size=shape).astype(np.float32) for shape in ((E, D, F), (E, F, D)))


def layer(config, x_TD, w_DE, w_q_EDF, w_o_EFD):
    """The layer, where heads bring back the tangent of their queries."""
    made = heads.queries(config, {"w_DE": w_DE}, {}, w_q_EDF, x_TD, context(GIVEN.mask_T))
    return heads.outputs(config, made.kept, w_o_EFD, jnp.tanh(made.q_TKF), 4), made


def every_expert(x_TD, w_DE, w_q_EDF, w_o_EFD):
    """The same from the formulas."""
    logits_TE = x_TD @ w_DE
    chosen_TE = (jnp.argsort(jnp.argsort(-logits_TE, axis=1), axis=1) < K) & GIVEN.mask_T[:, None]
    weight_TE = jnp.where(chosen_TE, jnp.exp(logits_TE), 0)
    weight_TE = weight_TE / jnp.where(GIVEN.mask_T, weight_TE.sum(axis=1), 1)[:, None]
    y_TED = jnp.einsum("tef,efd->ted", jnp.tanh(jnp.einsum("td,edf->tef", x_TD, w_q_EDF)), w_o_EFD)
    return jnp.einsum("te,ted->td", weight_TE, y_TED)


def differentiated(function):
    return jax.value_and_grad(lambda weights: jnp.sum(jnp.sin(function(*weights))))


@functools.cache
def wanted():
    with jax.enable_x64(True):
        value, slopes = jax.jit(differentiated(every_expert))(tuple(jnp.asarray(a, jnp.float64) for a in WEIGHTS))
        return np.asarray(value), [np.asarray(slope) for slope in slopes]


@pytest.mark.parametrize("mesh, dispatch, compute", [
    (None, "sort", "blocked"),
    ("data2 expert2 model2", "all_gather", "blocked"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (None, "dense", "blocked"), (None, "sort", "ragged_dot"), ("data8", "sort", "blocked"),
        ("data8", "dense", "blocked"),
        ("data2 expert2 model2", "all_to_all", "blocked"), ("data2 expert2 model2", "ragged", "ragged_dot"),
        ("expert4 context2", "all_gather", "blocked"), ("expert4 context2", "all_to_all", "blocked")))])
def test_outputs_and_every_gradient_are_those_of_every_expert_for_every_token(mesh, dispatch, compute):
    # On one device last blocks may reach into rows of the next expert; on meshes there are whole blocks, too.
    config = config_of(num_experts=E, dispatch=dispatch, compute=compute, block_rows=4 if mesh else 14)
    function = jax.jit(differentiated(lambda *weights: layer(config, *weights)[0]))
    if mesh:
        with jax.set_mesh(sharding.make_mesh(MESHES[mesh])):
            value, slopes = function(WEIGHTS)
    else:
        value, slopes = function(WEIGHTS)
    want, want_slopes = wanted()
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for slope, want_slope in zip(slopes, want_slopes, strict=True):
        np.testing.assert_allclose(slope, want_slope, atol=2e-5 * np.abs(want_slope).max())


def test_pairs_beyond_the_capacity_and_padding_reach_no_expert():
    config = config_of(num_experts=E, capacity_factor=0.5)
    y_TD, made = jax.jit(lambda *weights: layer(config, *weights))(*WEIGHTS)
    load, valid_TK = made.record.load, np.asarray(made.kept.valid_N).reshape(T, K)
    np.testing.assert_array_equal(load.assigned_E, load.dropped_E + load.received_E)
    assert load.dropped_E.sum() > 0 and load.received_E.sum() == valid_TK.sum() and load.assigned_E.sum() == 2 * load.tokens
    assert (np.abs(made.q_TKF).max(axis=2)[valid_TK] > 0).all() and (np.asarray(made.q_TKF)[~valid_TK] == 0).all()
    lone_T = valid_TK.any(axis=1)
    assert not lone_T[GIVEN.mask_T].all() and (np.abs(y_TD).max(axis=1) > 0).tolist() == lone_T.tolist()
