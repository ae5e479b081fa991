"""Soft MoE and merged experts against their papers' formulas in numpy."""

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import B, D, E, L, T, assert_close, config_of, context, inputs, route

from moejax.moe.layer import mixture

SLOTS, SEGMENT = 2, 3
dy_TD = np.random.default_rng(0).normal(size=(T, D)).astype(np.float32)


def swiglu(x, w_in, w_out):
    gate, up = x @ w_in[:, 0], x @ w_in[:, 1]
    return gate / (1 + np.exp(-gate)) * up @ w_out


def unit(x, axis):
    return x / np.linalg.norm(x, axis=axis, keepdims=True)


def soft_formula(leaves, mask_T):
    """Row by row and slot by slot: real tokens alone."""
    x_TD, phi, y_TD = leaves["x"], leaves["router"]["phi_DES"], np.zeros((T, D))
    for tokens in np.split(np.arange(T), B):
        real = tokens[mask_T[tokens]]
        if not len(real):
            continue
        logits = leaves["router"]["scale"] * np.einsum("td,des->tes", unit(x_TD[real], 1), unit(phi, 0))
        dispatch = np.exp(logits) / np.exp(logits).sum(0)
        combine = np.exp(logits) / np.exp(logits).sum((1, 2), keepdims=True)
        for e in range(E):
            for s in range(SLOTS):
                slot = swiglu(dispatch[:, e, s] @ x_TD[real], leaves["w_in"][e], leaves["w_out"][e])
                y_TD[real] += combine[:, e, s, None] * slot
    return y_TD


def merged_formula(leaves, mask_T, groups, weights):
    y_TD = np.zeros((T, D))
    for tokens, weight_E in zip(np.split(np.arange(T), groups), weights, strict=True):
        w_in, w_out = (np.einsum("e,e...->...", weight_E, leaves[name]) for name in ("w_in", "w_out"))
        y_TD[tokens] = swiglu(leaves["x"][tokens], w_in, w_out) * mask_T[tokens, None]
    return y_TD


def group_logits(leaves, mask_T, groups):
    rows = []
    for tokens in np.split(np.arange(T), groups):
        real = tokens[mask_T[tokens]]
        rows.append(leaves["x"][real].mean(0) @ leaves["router"]["w_DE"] if len(real) else np.zeros(E))
    return np.array(rows)


def smear_formula(leaves, mask_T):
    return merged_formula(leaves, mask_T, B, reference.softmax(group_logits(leaves, mask_T, B)))


def lory_formula(leaves, mask_T):
    logits = group_logits(leaves, mask_T, T // SEGMENT).reshape(B, -1, E)
    before = np.concatenate([np.zeros((B, 1, E)), logits[:, :-1]], axis=1)
    return merged_formula(leaves, mask_T, T // SEGMENT, reference.softmax(before.reshape(-1, E)))


CASES = {
    "soft_moe": (config_of("soft_moe", options={"slots": SLOTS}), soft_formula),
    "smear": (config_of("smear", options={"expert_dropout": 0.0}), smear_formula),
    "lory": (config_of("lory", options={"segment": SEGMENT}), lory_formula),
}


def leaves_of(name, given):
    rng = np.random.default_rng(1)
    router = ({"phi_DES": rng.normal(size=(D, E, SLOTS)).astype(np.float32), "scale": np.float32(1.7)}
              if name == "soft_moe" else given.router)
    return {"x": given.x_TD, "router": router, "w_in": given.w_in_ED2F, "w_out": given.w_out_EFD}


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_formula_and_its_finite_differences(name):
    (config, formula), given = CASES[name], inputs(1)
    leaves = leaves_of(name, given)

    def total(leaves):
        y_TD, record, *_ = mixture(config, leaves["router"], {}, leaves["w_in"], leaves["w_out"], leaves["x"],
                                   context(given.mask_T), None)
        return jnp.sum(y_TD * dy_TD), (y_TD, record)

    gradients, (y_TD, record) = jax.jit(jax.grad(total, has_aux=True))(jax.tree.map(jnp.asarray, leaves))
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), leaves)
    assert_close(y_TD, formula(exact, given.mask_T))
    np.testing.assert_array_equal(record.load.assigned_E, record.load.received_E)
    paths, structure = jax.tree.flatten(exact)
    for number, leaf in enumerate(paths):
        direction = np.random.default_rng(number).normal(size=leaf.shape)
        up, down = (jax.tree.unflatten(structure, [a + step * direction if i == number else a for i, a in enumerate(paths)])
                    for step in (1e-6, -1e-6))
        want = np.sum((formula(up, given.mask_T) - formula(down, given.mask_T)) * dy_TD) / 2e-6
        np.testing.assert_allclose(np.vdot(jax.tree.leaves(gradients)[number], direction), want, rtol=1e-4, atol=1e-4)


def test_shares_of_slots_and_of_tokens_each_add_up_to_one():
    given, (config, _) = inputs(2), CASES["soft_moe"]
    out = route(config, leaves_of("soft_moe", given)["router"], {}, given.x_TD, context(given.mask_T)).assignments
    real_B = given.mask_T.reshape(B, L).any(1)
    np.testing.assert_allclose(np.sum(out.dispatch_BLES, axis=1)[real_B], 1, rtol=1e-5)
    np.testing.assert_allclose(np.sum(out.combine_BLES, axis=(2, 3)).reshape(-1)[given.mask_T], 1, rtol=1e-5)
    assert not np.any(np.asarray(out.dispatch_BLES).reshape(T, -1)[~given.mask_T])


@pytest.mark.parametrize("name", ["smear", "lory"])
def test_equal_experts_are_one_dense_layer_and_a_sure_router_picks_one_expert(name):
    given, (config, _) = inputs(3), CASES[name]
    w_in, w_out = (np.broadcast_to(w[:1], w.shape) for w in (given.w_in_ED2F, given.w_out_EFD))
    y_TD = mixture(config, given.router, {}, w_in, w_out, given.x_TD, context(given.mask_T), None).y_TD
    want_TD = swiglu(np.asarray(given.x_TD, np.float64), w_in[0], w_out[0]) * given.mask_T[:, None]
    assert_close(y_TD, want_TD)
    x_TD, router = np.abs(given.x_TD), {"w_DE": 1e4 * np.eye(1, E, 3, dtype=np.float32).repeat(D, 0)}
    weight_GE = np.asarray(route(config, router, {}, x_TD, context(np.ones(T, bool))).assignments.weight_GE)
    sure = weight_GE if name == "smear" else weight_GE.reshape(B, -1, E)[:, 1:].reshape(-1, E)
    np.testing.assert_allclose(sure, np.eye(1, E, 3).repeat(len(sure), 0), atol=1e-6)


def test_smear_leaves_out_experts_in_training_but_never_all():
    given = inputs(4)
    config = config_of("smear", options={"expert_dropout": 0.9})
    weights = [np.asarray(route(config, given.router, {}, given.x_TD, context(
        given.mask_T, key=jax.random.key(seed))).assignments.weight_GE) for seed in range(20)]
    np.testing.assert_allclose(np.sum(weights, axis=2), 1, rtol=1e-5)
    left_out = np.mean(np.array(weights) < 1e-12)
    assert abs(left_out - 0.9 * (E - 1) / E) < 0.08
    assert (np.asarray(route(config, given.router, {}, given.x_TD, context(given.mask_T, train=False))
                       .assignments.weight_GE) > 0).all()
