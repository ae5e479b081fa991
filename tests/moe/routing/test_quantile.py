"""Laws of quantile balancing: the published rule token by token, its fixed point, and what its state may not do."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import D, E, K, T, config_of, context, eager_route, initial_state, inputs, matrix, route

from moejax.config import UserError
from moejax.moe.routing import ROUTERS, quantile

CONFIG = config_of("quantile")
BIN = 2 * quantile.REACH / CONFIG.options.bins
ROUTER = ROUTERS["quantile"]
update = jax.jit(ROUTER.update, static_argnums=0)
quantile_of = jax.jit(quantile.upper_quantile, static_argnums=(2, 3))


def beta_of(seed, experts=E):
    beta_E = np.random.default_rng(seed).normal(size=experts) * 0.2
    return (beta_E - beta_E.mean()).astype(np.float32)


def chosen(score_TE, beta_E, k):
    """The K experts with the largest s - beta of each token, as a matrix [T, E]."""
    count_TE = np.zeros(score_TE.shape, int)
    for t, score_E in enumerate(score_TE):
        count_TE[t, sorted(range(len(beta_E)), key=lambda e: -(score_E[e] - beta_E[e]))[:k]] = 1
    return count_TE


def sweep(score_TE, beta_E, k):
    """alpha_t: (k+1)-th largest of s - beta. beta_e: (kT/E + 1)-th largest of s - alpha, kT/E rounded down; centred."""
    tokens, experts = score_TE.shape
    alpha_T = np.array([sorted(score_E - beta_E)[-(k + 1)] for score_E in score_TE])
    new_E = np.array([sorted(score_TE[:, e] - alpha_T)[-(k * tokens // experts + 1)] for e in range(experts)])
    return new_E - new_E.mean()


def max_violation(assignments, experts):
    count_E = np.bincount(np.asarray(assignments.expert_N)[np.asarray(assignments.valid_N)], minlength=experts)
    return count_E.max() / count_E.mean() - 1


@pytest.mark.parametrize("score, renormalize", [("sigmoid", True), ("softmax", False)])
def test_choices_weights_and_losses_equal_the_formula(score, renormalize):
    config = config_of("quantile", score=score, renormalize=renormalize, route_scale=2.5)
    given, beta_E = inputs(1), beta_of(2)
    out = route(config, given.router, {"beta_E": beta_E}, given.x_TD, context(given.mask_T))
    logits_TE = reference.logits(given.x_TD, given.router["w_DE"])
    score_TE = reference.scores(logits_TE, score)
    count_TE = chosen(score_TE, beta_E, K)
    assert (count_TE != chosen(score_TE, 0 * beta_E, K)).any(), "the bias must matter for this test"
    weight_TE = 2.5 * count_TE * score_TE
    if renormalize:
        weight_TE /= (count_TE * score_TE).sum(1, keepdims=True)
    np.testing.assert_array_equal(matrix(out.assignments)[0], count_TE * given.mask_T[:, None])
    np.testing.assert_allclose(matrix(out.assignments)[1], weight_TE * given.mask_T[:, None], rtol=2e-6)
    np.testing.assert_allclose(out.losses["router_z"], reference.z_loss(logits_TE, given.mask_T), rtol=1e-6)
    assert ROUTER.loss_weights(config) == {"router_z": 0.0}
    best_first_TK = (score_TE - beta_E)[np.arange(T)[:, None], np.asarray(out.assignments.expert_N).reshape(T, K)]
    assert (np.diff(best_first_TK) <= 0).all()


@pytest.mark.parametrize("k, rate", [(1, 1.0), (2, 0.3), (E - 1, 1.0)])
def test_an_update_is_one_sweep_over_the_real_tokens(k, rate):
    config = config_of("quantile", experts_per_token=k, renormalize=False, options={"rate": rate})
    given, beta_E = inputs(3), beta_of(4)
    junk_TD = np.where(given.mask_T[:, None], given.x_TD, 100 * inputs(5).x_TD)
    out = route(config, given.router, {"beta_E": beta_E}, junk_TD, context(given.mask_T))
    score_TE = reference.scores(reference.logits(given.x_TD, given.router["w_DE"]), "sigmoid")
    want_E = beta_E + rate * (sweep(score_TE[given.mask_T], beta_E, k) - beta_E)
    got_E = update(config, {"beta_E": beta_E}, out.statistics)["beta_E"]
    np.testing.assert_allclose(got_E, want_E, atol=2 * rate * BIN)
    np.testing.assert_allclose(np.mean(got_E), 0, atol=1e-7)
    np.testing.assert_array_equal(np.sum(out.statistics["margin_EM"], axis=1), given.mask_T.sum())


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(counts=st.lists(st.integers(0, 9), min_size=6, max_size=6), share=st.floats(0.01, 0.99))
def test_the_quantile_of_a_histogram_has_the_given_number_of_values_above_it(counts, share):
    """With the values of a bin spread evenly over it; where no bin lies between two values, the lower one."""
    counts[2] += 1
    above = np.float32(share * sum(counts))
    value = float(quantile_of(np.array([counts]), above, -1.0, 2.0)[0])
    edges_M = np.linspace(-1, 2, 7)
    got = sum(count * np.clip((high - value) / 0.5, 0, 1) for count, high in zip(counts, edges_M[1:], strict=True))
    np.testing.assert_allclose(got, above, atol=1e-4)


@pytest.mark.parametrize("tokens, experts, k, skew", [(4096, 32, 4, 2.0), (3001, 11, 3, 1.0)])
def test_five_sweeps_balance_frozen_skewed_scores(tokens, experts, k, skew):
    """Published and catalogued: the largest load falls from several times the mean to within 10 % of it."""
    rng = np.random.default_rng(tokens)
    logits_TE = (rng.normal(size=(tokens, experts)) + skew * np.linspace(-1, 1, experts)).astype(np.float32)
    config = config_of("quantile", num_experts=experts, experts_per_token=k)
    where = context(np.ones(tokens, bool), sequences=1)
    parameters, state, violations = {"w_DE": np.eye(experts, dtype=np.float32)}, initial_state(config), []
    for _ in range(6):
        out = route(config, parameters, state, logits_TE, where)
        violations.append(max_violation(out.assignments, experts))
        state = update(config, state, out.statistics)
    assert violations[0] > 1 and violations[5] <= 0.1, violations


@pytest.mark.parametrize("shift", [-0.7, 0.4])
def test_only_differences_of_the_bias_count(shift):
    given, beta_E = inputs(6), beta_of(7)
    outs = [route(CONFIG, given.router, {"beta_E": beta_E + np.float32(c)}, given.x_TD, context(given.mask_T))
            for c in (0, shift)]
    jax.tree.map(np.testing.assert_array_equal, outs[0].assignments, outs[1].assignments)
    one_E, other_E = (update(CONFIG, {"beta_E": beta_E}, out.statistics)["beta_E"] for out in outs)
    np.testing.assert_allclose(one_E, other_E, atol=2 * BIN)


def test_the_gradient_is_that_of_the_chosen_scores_and_none_reaches_the_bias():
    given, beta_E, c_TE = inputs(8), beta_of(9), np.random.default_rng(0).normal(size=(T, E))
    exact_DE = given.router["w_DE"].astype(np.float64)
    count_TE = chosen(reference.scores(reference.logits(given.x_TD, exact_DE), "sigmoid"), beta_E, K)

    def formula(w_DE):
        logits_TE = reference.logits(given.x_TD, w_DE)
        score_TE = count_TE * reference.scores(logits_TE, "sigmoid")
        weighed = np.sum((score_TE / score_TE.sum(1, keepdims=True) * c_TE)[given.mask_T])
        return weighed + reference.z_loss(logits_TE, given.mask_T)

    def total(w_DE, beta_E):
        out = eager_route(CONFIG, {"w_DE": w_DE}, {"beta_E": beta_E}, given.x_TD, context(given.mask_T))
        a = out.assignments
        c_N = jnp.asarray(c_TE, jnp.float32)[a.token_N, a.expert_N]
        return jnp.sum(jnp.where(a.valid_N, a.weight_N * c_N, 0)) + out.losses["router_z"]

    gradient_DE, gradient_E = jax.jit(jax.grad(total, argnums=(0, 1)))(given.router["w_DE"], beta_E)
    steps = 1e-6 * np.eye(D * E).reshape(-1, D, E)
    want = [(formula(exact_DE + step) - formula(exact_DE - step)) / 2e-6 for step in steps]
    reference.assert_close(gradient_DE, np.reshape(want, (D, E)))
    np.testing.assert_array_equal(gradient_E, 0)


def test_all_experts_for_all_tokens_and_a_batch_of_padding_leave_the_state_alone():
    given, beta_E = inputs(10), beta_of(11)
    every = config_of("quantile", experts_per_token=E)
    for config, mask_T in ((every, given.mask_T), (CONFIG, np.zeros(T, bool))):
        out = route(config, given.router, {"beta_E": beta_E}, given.x_TD, context(mask_T))
        np.testing.assert_array_equal(update(config, {"beta_E": beta_E}, out.statistics)["beta_E"], beta_E)
        np.testing.assert_array_equal(matrix(out.assignments)[0].sum(1), config.experts_per_token * mask_T)


def test_micro_batches_add_up_and_stacked_layers_move_one_by_one():
    given, state = inputs(12), {"beta_E": beta_of(13)}
    whole, halves = reference.whole_and_halves(CONFIG, given, state)
    losses, statistics = jax.tree.map(jnp.add, *[(half.losses, half.statistics) for half in halves])
    np.testing.assert_allclose(losses["router_z"], whole.losses["router_z"], rtol=1e-6)
    np.testing.assert_array_equal(statistics["margin_EM"], whole.statistics["margin_EM"])

    seen = (whole.statistics, halves[0].statistics)
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *seen)
    moved = jax.jit(jax.vmap(lambda statistics: ROUTER.update(CONFIG, state, statistics)))(stacked)
    for layer, own in enumerate(seen):
        np.testing.assert_allclose(moved["beta_E"][layer], update(CONFIG, state, own)["beta_E"], atol=1e-7)


def test_extreme_logits_stay_finite_and_ties_spread_over_the_experts():
    tokens = 70 * E
    where = context(np.ones(tokens, bool), np.arange(tokens, dtype=np.int32), sequences=1)

    @jax.jit
    def run(w_DE, state):
        def total(w_DE):
            out = eager_route(CONFIG, {"w_DE": w_DE}, state, jnp.ones((tokens, 1)), where)
            return jnp.sum(out.assignments.weight_N**2) + out.losses["router_z"] + out.entropy, out
        (value, out), gradient = jax.value_and_grad(total, has_aux=True)(w_DE)
        return ROUTER.update(CONFIG, state, out.statistics), out, value, gradient

    hot_E = np.where(np.arange(E) == 2, 1e4, -60)
    for logit_E in (np.zeros(E), np.resize([60, -60], E), np.resize([1e4, -1e4, 0], E), hot_E):
        state = initial_state(CONFIG)
        for _ in range(3):
            state, out, *rest = run(np.float32([logit_E]), state)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, out, rest)))
            expert_TK = np.asarray(out.assignments.expert_N).reshape(tokens, K)
            assert (expert_TK[:, 0] != expert_TK[:, 1]).all()
            if not np.any(logit_E):
                np.testing.assert_allclose(state["beta_E"], 0, atol=1e-7)
                assert max_violation(out.assignments, E) < 0.3


def test_one_renormalised_choice_is_refused():
    with pytest.raises(UserError, match="config.moe.renormalize=True with config.moe.experts_per_token=1"):
        config_of("quantile", experts_per_token=1)
