"""Top-p routing, token by token from the paper, and its laws."""

import hypothesis
import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from hypothesis import strategies
from moe_reference import B, E, K, T, config_of, context, eager_route, inputs, matrix, route

from moejax.config import UserError
from moejax.moe.routing import ROUTERS

CONFIGS = {
    "plain": config_of("top_p"),
    "renormalized": config_of("top_p", renormalize=True, route_scale=2.5, options={"threshold": 0.7}),
    "at most 2": config_of("top_p", options={"threshold": 0.9, "most": 2}, balance_scope="sequence"),
    "sigmoid": config_of("top_p", score="sigmoid", options={"threshold": 0.5}),
    "all": config_of("top_p", options={"threshold": 1.0}),
    "one": config_of("top_p", options={"threshold": 0.0}),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def probabilities(config, logits_TE):
    score_TE = reference.scores(logits_TE, config.score)
    return score_TE / score_TE.sum(1, keepdims=True)


def formula(config, logits_TE, mask_T):
    """Takes the most probable expert that is left until the threshold is reached: counts and weights [T, E]."""
    options = config.options
    count_TE, weight_TE = np.zeros(logits_TE.shape, int), np.zeros(logits_TE.shape)
    for t, p_E in enumerate(probabilities(config, logits_TE)):
        chosen, reached = [], 0.0
        for e in np.argsort(-p_E, kind="stable")[:options.most or E]:
            if mask_T[t] and (not chosen or reached < options.threshold):
                chosen.append(e)
                reached += p_E[e]
        count_TE[t, chosen] = 1
        weight_TE[t, chosen] = config.route_scale * p_E[chosen] / (reached if config.renormalize else 1)
    return count_TE, weight_TE


def losses(config, logits_TE, count_TE, mask_T):
    p_TE = probabilities(config, logits_TE)[mask_T]
    groups = B if config.balance_scope == "sequence" else 1
    return {"balance": reference.balance_loss(logits_TE, count_TE, mask_T, config.score, groups),
            "entropy": np.mean(np.sum(-p_TE * np.log(np.where(p_TE > 0, p_TE, 1)), axis=1)),
            "router_z": reference.z_loss(logits_TE, mask_T)}


def route_logits(config, logits_TE, mask_T=None, ids_T=None):
    """Routes tokens that are unit vectors, so that the router's matrix holds their logits."""
    tokens = len(logits_TE)
    mask_T = np.ones(tokens, bool) if mask_T is None else mask_T
    return route(config, {"w_DE": np.asarray(logits_TE, np.float32)}, {}, np.eye(tokens, dtype=np.float32),
                 context(mask_T, ids_T, sequences=1))


@every_config
def test_choices_weights_and_losses_equal_the_formulas(config):
    given = inputs(1)
    out, logits_TE, count_TE = reference.compare(config, given, formula, rtol=1e-5)
    np.testing.assert_array_equal(out.statistics["assigned_E"], count_TE.sum(0))
    want = losses(config, logits_TE, count_TE, given.mask_T)
    assert set(want) == set(out.losses) == set(ROUTERS["top_p"].loss_weights(config))
    for name, value in want.items():
        np.testing.assert_allclose(out.losses[name], value, rtol=1e-5)
    np.testing.assert_allclose(out.entropy, want["entropy"] * given.mask_T.sum(), rtol=1e-5)


def test_the_paper_s_threshold_and_weights():
    weights = ROUTERS["top_p"].loss_weights(CONFIGS["plain"])
    assert weights == {"balance": 0.01, "entropy": 1e-4, "router_z": 0.0}
    assert CONFIGS["plain"].options.threshold == 0.4 and not CONFIGS["plain"].renormalize
    out = route_logits(config_of("top_p", num_experts=4), np.log([[3.0, 1.0, 4.0, 2.0], [1.0, 8.0, 1.0, 1.0],
                                                                  [2.0, 2.2, 2.4, 2.6]]))
    chosen = [pair[:2] for pair in reference.listed(out.assignments)]
    assert chosen == [(0, 2), (0, 0), (1, 1), (2, 3), (2, 2)], "0.4 of 1 is just missed or reached; best first"


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(strategies.integers(0, 2**31), strategies.floats(0.1, 8))
def test_sets_grow_with_p_reach_it_and_would_not_without_their_last_expert(seed, spread):
    logits_TE = (spread * np.random.default_rng(seed).normal(size=(T, E))).astype(np.float32)
    p_TE = reference.softmax(logits_TE.astype(np.float64))
    smaller_TE = np.zeros((T, E), int)
    for name in ("one", "plain", "all"):
        count_TE, weight_TE = matrix(route_logits(CONFIGS[name], logits_TE).assignments)
        p = CONFIGS[name].options.threshold
        reached_T = (count_TE * p_TE).sum(1)
        least_T = np.min(np.where(count_TE > 0, p_TE, 1), axis=1)
        assert (count_TE >= smaller_TE).all() and (count_TE.sum(1) >= 1).all()
        assert (reached_T >= p - 1e-6).all()
        assert ((reached_T - least_T < p + 1e-6) | (count_TE.sum(1) == 1)).all()
        np.testing.assert_allclose(weight_TE, count_TE * p_TE, rtol=1e-5, atol=1e-30)
        smaller_TE = count_TE


def test_equal_logits_take_as_many_experts_as_p_needs_and_the_ids_spread_them():
    tokens = 140
    ids_T = np.arange(tokens, dtype=np.int32)
    count_TE, weight_TE = matrix(route_logits(CONFIGS["plain"], np.zeros((tokens, E)), ids_T=ids_T).assignments, tokens)
    np.testing.assert_array_equal(count_TE.sum(1), 3)
    np.testing.assert_allclose(weight_TE, count_TE / E, rtol=1e-6)
    load_E = count_TE.sum(0)
    assert load_E.min() > 0.6 * load_E.mean() and load_E.max() < 1.5 * load_E.mean()


@pytest.mark.parametrize("changes", [{"options": {"threshold": 0.43}}, {"options": {"threshold": 0.7}, "renormalize": True},
                                     {"options": {"threshold": 0.9, "most": 2}}], ids=["plain", "renormalized", "most"])
def test_extreme_logits_follow_the_formula_and_have_finite_gradients(changes):
    """No threshold here is a fraction n/m of up to m = E equal experts, where rounding would decide."""
    config = config_of("top_p", **changes)
    sign_TE = np.sign(np.random.default_rng(2).normal(size=(T, E)))
    logits_TE = sign_TE * np.repeat([60.0, 1e4, 0.5, 20.0], T // 4)[:, None]
    logits_TE[-1] = 1e4 * np.eye(E)[2]
    mask_T = np.arange(T) != 3
    count_TE, weight_TE = formula(config, logits_TE, mask_T)
    # Which of equal experts a token takes is up to its id, but not how many and with what weight.
    got_count_TE, got_weight_TE = matrix(route_logits(config, logits_TE, mask_T).assignments)
    np.testing.assert_array_equal(got_count_TE.sum(1), count_TE.sum(1))
    np.testing.assert_allclose(np.sort(got_weight_TE), np.sort(weight_TE), rtol=1e-5, atol=1e-30)
    np.testing.assert_array_equal(got_count_TE[-1], np.eye(E)[2])

    def total(w_DE):
        out = eager_route(config, {"w_DE": w_DE}, {}, np.eye(T, dtype=np.float32), context(mask_T, sequences=1))
        weight_N = jnp.where(out.assignments.valid_N, out.assignments.weight_N, 0)
        return jnp.sum(weight_N**2) + out.losses["balance"] + out.losses["entropy"] + 1e-6 * out.losses["router_z"]

    gradient_TE = jax.jit(jax.grad(total))(logits_TE.astype(np.float32))
    assert np.isfinite(gradient_TE).all() and not np.any(gradient_TE[~mask_T])


@pytest.mark.parametrize("name", ["plain", "renormalized", "sigmoid"])
def test_gradients_equal_finite_differences(name):
    config, given, rng = CONFIGS[name], inputs(3), np.random.default_rng(3)
    c_TE, logits_TE = rng.normal(size=(T, E)), 1.5 * rng.normal(size=(T, E))
    count_TE, _ = formula(config, logits_TE, given.mask_T)

    def want(logits_TE):
        counts, weight_TE = formula(config, logits_TE, given.mask_T)
        assert (counts == count_TE).all()
        return np.sum(weight_TE * c_TE) + sum(losses(config, logits_TE, count_TE, given.mask_T).values())

    def got(w_DE):
        out = eager_route(config, {"w_DE": w_DE}, {}, np.eye(T, dtype=np.float32), context(given.mask_T, sequences=1))
        a = out.assignments
        return jnp.sum(a.weight_N * jnp.asarray(c_TE, jnp.float32)[a.token_N, a.expert_N]) + sum(out.losses.values())

    steps = 1e-5 * np.eye(T * E).reshape(-1, T, E)
    want_TE = np.array([want(logits_TE + step) - want(logits_TE - step) for step in steps]).reshape(T, E) / 2e-5
    reference.assert_close(jax.jit(jax.grad(got))(logits_TE.astype(np.float32)), want_TE, 2e-5)


@pytest.mark.parametrize("name", ["plain", "at most 2"])
def test_micro_batches_add_up(name):
    config, given = CONFIGS[name], inputs(4)
    assert ROUTERS["top_p"].needs_whole(config) == (config.balance_scope == "global")
    reference.assert_halves_add_up(config, given)


def test_what_cannot_work_is_refused():
    with pytest.raises(UserError, match="config.moe.options.most=8 is more than config.moe.num_experts=7"):
        config_of("top_p", options={"most": E + 1})
    with pytest.raises(UserError, match="config.moe.renormalize=True with config.moe.options.most=1"):
        config_of("top_p", options={"most": 1}, renormalize=True)


def test_the_expected_number_of_experts_does_not_change_the_rule():
    given = inputs(5)
    outs = [route(config_of("top_p", experts_per_token=k), given.router, {}, given.x_TD, context(given.mask_T))
            for k in (K, E)]
    jax.tree.map(np.testing.assert_array_equal, *outs)
