"""ReLU routing, token by token from the paper, and its sparsity control."""

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import B, E, K, T, config_of, context, eager_route, inputs, matrix, route

from moejax.moe.routing import ROUTERS
from moejax.moe.types import Totals

REMOE = ROUTERS["remoe"]
CONFIG = config_of("remoe")
STATE = {"strength": jnp.float32(0.3)}


def formula(config, logits_TE, mask_T):
    """An expert is on where its logit is above zero, which is its weight: counts and weights [T, E]."""
    on_TE = (logits_TE > 0) & mask_T[:, None]
    return on_TE.astype(int), np.where(on_TE, config.route_scale * logits_TE, 0)


def l1(config, logits_TE, mask_T, count_E):
    """sum_e f_e mean_t ReLU(z_te) with f_e = E / (K T) * count_e."""
    tokens, total = mask_T.sum(), 0.0
    for e in range(logits_TE.shape[1]):
        f = logits_TE.shape[1] / (config.experts_per_token * tokens) * count_E[e]
        total += f * sum(max(z, 0) for z in logits_TE[mask_T, e]) / tokens
    return total


def route_logits(config, logits_TE, mask_T=None, ids_T=None, state=STATE):
    """Routes tokens that are unit vectors, so that the router's matrix holds their logits."""
    tokens = len(logits_TE)
    mask_T = np.ones(tokens, bool) if mask_T is None else mask_T
    return route(config, {"w_DE": np.asarray(logits_TE, np.float32)}, state, np.eye(tokens, dtype=np.float32),
                 context(mask_T, ids_T, sequences=1))


@pytest.mark.parametrize("config", [CONFIG, config_of("remoe", experts_per_token=3, route_scale=2.5)], ids=["K2", "K3"])
def test_choices_weights_loss_and_statistics_equal_the_formulas(config):
    given = inputs(1)
    out = route(config, given.router, STATE, given.x_TD, context(given.mask_T))
    logits_TE = reference.logits(given.x_TD, given.router["w_DE"])
    count_TE, weight_TE = formula(config, logits_TE, given.mask_T)
    np.testing.assert_array_equal(matrix(out.assignments)[0], count_TE)
    np.testing.assert_allclose(matrix(out.assignments)[1], weight_TE, rtol=1e-5, atol=1e-6)
    assert set(out.losses) == set(REMOE.loss_weights(config)) == {"l1"} and REMOE.loss_weights(config)["l1"] == 1
    np.testing.assert_allclose(out.losses["l1"], 0.3 * l1(config, logits_TE, given.mask_T, count_TE.sum(0)), rtol=1e-5)
    np.testing.assert_array_equal(out.statistics["assigned_E"], count_TE.sum(0))
    assert out.statistics["tokens"] == given.mask_T.sum()
    share_TE = weight_TE[given.mask_T] / weight_TE[given.mask_T].sum(1, keepdims=True)
    np.testing.assert_allclose(out.entropy, -np.sum(share_TE * np.log(np.where(share_TE > 0, share_TE, 1))), rtol=1e-5)


def test_lists_hold_the_best_first_and_nothing_is_on_at_or_below_zero():
    logits_TE = np.array([[0.0, -1, -2, -0.0, -3, -1, -9], [1, 3, -1, 2, 0, 9, -2], [5] * 7, [-60] * 7, [-1e4] * 7])
    out = route_logits(CONFIG, logits_TE, ids_T=np.arange(5, dtype=np.int32))
    listed = reference.listed(out.assignments)
    assert [pair for pair in listed if pair[0] < 2] == [(1, 5, 9.0), (1, 1, 3.0), (1, 3, 2.0), (1, 0, 1.0)]
    assert sorted(e for t, e, _ in listed if t == 2) == list(range(E))
    assert all(t in (1, 2) for t, _, _ in listed) and np.isfinite(out.entropy)


def test_the_output_is_continuous_where_an_expert_turns_on():
    """A step over the boundary changes no weight by more than the step, unlike under any top-k."""
    rng = np.random.default_rng(2)
    logits_TE = rng.normal(size=(T, E))
    logits_TE[:, 0] = 0
    before, after = (matrix(route_logits(CONFIG, logits_TE + step).assignments) for step in (-1e-4, 1e-4))
    assert not before[0][:, 0].any() and after[0][:, 0].all()
    assert np.abs(after[1] - before[1]).max() < 2.1e-4


@pytest.mark.parametrize("size", [60.0, 1e4, 0.0])
def test_extreme_logits_follow_the_formula_and_have_finite_gradients(size):
    logits_TE = size * np.sign(np.random.default_rng(3).normal(size=(T, E)))
    logits_TE[-1] = size * np.eye(E)[2]
    mask_T = np.arange(T) != 3
    out = route_logits(CONFIG, logits_TE, mask_T)
    count_TE, weight_TE = formula(CONFIG, logits_TE, mask_T)
    np.testing.assert_array_equal(matrix(out.assignments)[0], count_TE)
    np.testing.assert_array_equal(matrix(out.assignments)[1], weight_TE)

    def total(w_DE):
        out = eager_route(CONFIG, {"w_DE": w_DE}, STATE, np.eye(T, dtype=np.float32), context(mask_T, sequences=1))
        return jnp.sum(jnp.where(out.assignments.valid_N, out.assignments.weight_N, 0)**2) + out.losses["l1"]

    gradient_TE = jax.jit(jax.grad(total))(logits_TE.astype(np.float32))
    assert np.isfinite(gradient_TE).all() and not np.any(gradient_TE[~mask_T])


def test_gradients_equal_finite_differences():
    given, rng = inputs(4), np.random.default_rng(4)
    c_TE, logits_TE = rng.normal(size=(T, E)), rng.normal(size=(T, E))
    count_E = formula(CONFIG, logits_TE, given.mask_T)[0].sum(0)

    def want(logits_TE):
        return (np.sum(formula(CONFIG, logits_TE, given.mask_T)[1] * c_TE)
                + 0.3 * l1(CONFIG, logits_TE, given.mask_T, count_E))

    def got(w_DE):
        out = eager_route(CONFIG, {"w_DE": w_DE}, STATE, np.eye(T, dtype=np.float32), context(given.mask_T, sequences=1))
        a = out.assignments
        return jnp.sum(a.weight_N * jnp.asarray(c_TE, jnp.float32)[a.token_N, a.expert_N]) + out.losses["l1"]

    steps = 1e-6 * np.eye(T * E).reshape(-1, T, E)
    want_TE = np.array([want(logits_TE + step) - want(logits_TE - step) for step in steps]).reshape(T, E) / 2e-6
    reference.assert_close(jax.jit(jax.grad(got))(logits_TE.astype(np.float32)), want_TE)


def test_micro_batches_add_up():
    given = inputs(5)
    assert REMOE.needs_whole(CONFIG)
    totals = Totals(jnp.float32(given.mask_T.sum()), jnp.float32(given.mask_T.reshape(B, -1).any(1).sum()))

    def told(w_DE, x_TD, mask_T, sequences, whole):
        out = eager_route(CONFIG, {"w_DE": w_DE}, STATE, x_TD, context(mask_T, sequences=sequences, totals=totals,
                                                                      whole=whole))
        return out.losses["l1"], (out.losses, out.entropy, out.statistics)

    evaluate = jax.jit(jax.value_and_grad(told, has_aux=True), static_argnums=3)
    big = evaluate(given.router["w_DE"], given.x_TD, given.mask_T, B, None)
    halves = [evaluate(given.router["w_DE"], given.x_TD[part], given.mask_T[part], B // 2, big[0][1][2])
              for part in (slice(T // 2), slice(T // 2, T))]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(b + c, a, rtol=1e-5, atol=1e-7), big, *halves)


@pytest.mark.parametrize("pairs, sign", [(K * T + 1, 1), (K * T, 0), (K * T - 1, -1)])
def test_the_strength_follows_the_sign_of_the_missing_sparsity(pairs, sign):
    """1.2^sign(target - sparsity) with the sparsity over all layers, for each layer's copy alike."""
    layers, assigned_E = 3, np.zeros(E, np.int32)
    assigned_E[[0, 4]] = pairs - 5, 5
    target, sparsity = 1 - K / E, 1 - pairs / (E * T)
    assert np.sign(round(target - sparsity, 9)) == sign
    statistics = {"assigned_E": np.tile(assigned_E, (layers, 1)), "tokens": np.full(layers, T, np.int32)}
    state = {"strength": np.full(layers, 0.5, np.float32)}
    got = jax.vmap(lambda old, seen: REMOE.update(CONFIG, old, seen))(state, statistics)
    np.testing.assert_allclose(got["strength"], np.full(layers, 0.5 * 1.2**sign), rtol=1e-6)
    assert REMOE.pools_layers and got["strength"].dtype == jnp.float32


def test_the_strength_starts_at_1e_8_stays_positive_and_ignores_an_empty_batch():
    state = reference.initial_state(CONFIG)
    np.testing.assert_allclose(state["strength"], 1e-8)
    nothing = {"assigned_E": jnp.zeros(E, jnp.int32), "tokens": jnp.int32(0)}
    assert REMOE.update(CONFIG, state, nothing)["strength"] == state["strength"]

    def after_many(assigned):
        seen = {"assigned_E": jnp.full(E, assigned), "tokens": jnp.int32(T)}
        return jax.lax.scan(lambda s, _: (REMOE.update(CONFIG, s, seen), None), state, length=1000)[0]["strength"]

    low, high = jax.jit(after_many)(0), jax.jit(after_many)(T)
    assert 0 < low < 1e-18 and 1e18 < high < np.inf and low / 1.2 > 0 and np.isfinite(high * 1e6)


@pytest.mark.parametrize("choices", [1, K])
def test_the_controller_settles_at_the_target_sparsity(choices):
    """Free logits under gradient descent on a task that wants half of the experts on: they are at first, K/E in the end."""
    config = config_of("remoe", experts_per_token=choices)
    rng, tokens = np.random.default_rng(6), 96
    wanted_TE = jnp.asarray(rng.normal(size=(tokens, E)), jnp.float32)
    everything, x_TD = context(np.ones(tokens, bool), sequences=1), np.eye(tokens, dtype=np.float32)

    def loss(w_DE, state):
        out = eager_route(config, {"w_DE": w_DE}, state, x_TD, everything)
        task = 0.5 * jnp.mean(jnp.sum((w_DE - wanted_TE)**2, axis=1))
        return task + out.losses["l1"], out.statistics

    def step(carry, _):
        w_DE, state = carry
        gradient, seen = jax.grad(loss, has_aux=True)(w_DE, state)
        state = REMOE.update(config, state, seen)
        on = jnp.sum(seen["assigned_E"]) / (E * tokens)
        return (w_DE - 0.05 * tokens * gradient, state), (1 - on, state["strength"])

    start = wanted_TE, reference.initial_state(config)
    _, (sparsity, strength) = jax.jit(lambda s: jax.lax.scan(step, s, length=400))(start)
    assert abs(sparsity[0] - 0.5) < 0.06
    assert np.abs(np.mean(sparsity[-200:]) - (1 - choices / E)) < 0.02
    assert np.abs(sparsity[-200:] - (1 - choices / E)).max() < 0.1, "it hovers, and does not swing"
    assert (strength > 0).all() and 0.1 < np.median(strength[-200:]) < 10
