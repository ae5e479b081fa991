"""Laws of expert threshold routing: the published rule token by token, and its cutoffs over steps."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import D, E, K, T, config_of, context, eager_route, initial_state, inputs, matrix, route

from moejax.config import UserError
from moejax.moe.routing import ROUTERS

CONFIG = config_of("expert_threshold", route_scale=2.5)
BIN = 1 / CONFIG.options.bins
ROUTER = ROUTERS["expert_threshold"]
update = jax.jit(ROUTER.update, static_argnums=0)


def state_of(seed, steps=0.0):
    return {"cutoff_E": np.random.default_rng(seed).uniform(0.4, 0.95, E).astype(np.float32), "steps": np.float32(steps)}


def sigmoids(given):
    return reference.scores(reference.logits(given.x_TD, given.router["w_DE"]), "sigmoid")


def quantile(score_TE, k):
    """The score of each expert that kT/E of the tokens exceed, kT/E rounded down: the (kT/E + 1)-th largest."""
    tokens, experts = score_TE.shape
    return np.array([sorted(score_TE[:, e])[-(k * tokens // experts + 1)] for e in range(experts)])


def test_choices_weights_and_losses_equal_the_formula():
    given, state = inputs(1), state_of(2)
    out = route(CONFIG, given.router, state, given.x_TD, context(given.mask_T))
    logits_TE, score_TE = reference.logits(given.x_TD, given.router["w_DE"]), sigmoids(given)
    count_TE, weight_TE = np.zeros((T, E), int), np.zeros((T, E))
    for t in range(T):
        for e in range(E):
            if given.mask_T[t] and score_TE[t, e] > state["cutoff_E"][e]:
                count_TE[t, e], weight_TE[t, e] = 1, 2.5 * score_TE[t, e]
    assert {0, 3} <= set(count_TE[given.mask_T].sum(1)), "a token without an expert must be there for this test"
    np.testing.assert_array_equal(matrix(out.assignments)[0], count_TE)
    np.testing.assert_allclose(matrix(out.assignments)[1], weight_TE, rtol=2e-6)
    np.testing.assert_allclose(out.losses["router_z"], reference.z_loss(logits_TE, given.mask_T), rtol=1e-6)
    probs_TE = score_TE / score_TE.sum(1, keepdims=True)
    np.testing.assert_allclose(out.entropy, -np.sum((probs_TE * np.log(probs_TE))[given.mask_T]), rtol=1e-5)
    assert ROUTER.loss_weights(CONFIG) == {"router_z": 0.0} and ROUTER.causal and ROUTER.variable


def test_the_list_holds_the_experts_of_a_token_best_first_and_nothing_behind_them():
    given = inputs(1)
    a = route(CONFIG, given.router, state_of(2), given.x_TD, context(given.mask_T)).assignments
    expert_TE, weight_TE, valid_TE = (np.asarray(v).reshape(T, E) for v in (a.expert_N, a.weight_N, a.valid_N))
    assert a.choices == E
    np.testing.assert_array_equal(np.asarray(a.token_N).reshape(T, E), np.arange(T)[:, None].repeat(E, 1))
    np.testing.assert_array_equal(np.sort(expert_TE, axis=1), np.arange(E)[None].repeat(T, 0))
    assert (valid_TE[:, :-1] >= valid_TE[:, 1:]).all() and (np.diff(weight_TE) <= 0).all()
    assert not weight_TE[~valid_TE].any()


def test_a_token_is_routed_as_if_it_were_alone():
    given, state = inputs(3), state_of(4)
    together, _ = matrix(route(CONFIG, given.router, state, given.x_TD, context(np.ones(T, bool))).assignments)
    for t in range(T):
        alone = route(CONFIG, given.router, state, given.x_TD[t:t + 1], context([True], sequences=1))
        np.testing.assert_array_equal(matrix(alone.assignments, tokens=1)[0][0], together[t])


@pytest.mark.parametrize("k, decay", [(1, 0.99), (3, 0.5), (E - 1, 0.0)])
def test_cutoffs_are_the_debiased_average_of_the_quantiles_of_real_tokens(k, decay):
    """After n steps the weighted mean of the n quantiles with weights decay^age; the start has no weight left."""
    config = config_of("expert_threshold", experts_per_token=k, options={"decay": decay})
    state, quantiles = initial_state(config), []
    for step in range(4):
        given = inputs(10 + step)
        junk_TD = np.where(given.mask_T[:, None], given.x_TD, 100 * inputs(5).x_TD)
        out = route(config, given.router, state, junk_TD, context(given.mask_T))
        state = update(config, state, out.statistics)
        quantiles.append(quantile(sigmoids(given)[given.mask_T], k))
        want_E = np.average(quantiles, axis=0, weights=[decay**age for age in reversed(range(step + 1))])
        np.testing.assert_allclose(state["cutoff_E"], want_E, atol=1.1 * BIN)
        np.testing.assert_array_equal(np.sum(out.statistics["score_EM"], axis=1), given.mask_T.sum())


@pytest.mark.parametrize("router_init", [0.3, 1.0])
def test_the_initial_cutoffs_give_initial_logits_their_k_experts(router_init):
    tokens, config = 20000, config_of("expert_threshold", router_init=router_init)
    state = initial_state(config)
    logit = NormalDist(0, router_init).inv_cdf(1 - K / E)
    np.testing.assert_allclose(state["cutoff_E"], np.full(E, 1 / (1 + np.exp(-logit))), rtol=1e-6)
    logits_TE = (router_init * np.random.default_rng(0).normal(size=(tokens, E))).astype(np.float32)
    out = route(config, {"w_DE": np.eye(E, dtype=np.float32)}, state, logits_TE, context(np.ones(tokens, bool)))
    share_E = np.bincount(np.asarray(out.assignments.expert_N)[np.asarray(out.assignments.valid_N)]) / tokens
    np.testing.assert_allclose(share_E, K / E, atol=4 * np.sqrt(K / E / tokens))


def test_skewed_experts_come_to_equal_shares_and_tokens_to_k_experts_on_average():
    """Fresh tokens in every step: the cutoffs hold for a population, not for the batch that they were taken from."""
    tokens, state, rng = 4000, initial_state(CONFIG), np.random.default_rng(1)
    for step in range(6):
        logits_TE = (rng.normal(size=(tokens, E)) + np.linspace(-2, 2, E)).astype(np.float32)
        out = route(CONFIG, {"w_DE": np.eye(E, dtype=np.float32)}, state, logits_TE, context(np.ones(tokens, bool)))
        state = update(CONFIG, state, out.statistics)
        share_E = np.bincount(np.asarray(out.assignments.expert_N)[np.asarray(out.assignments.valid_N)]) / tokens
        assert step > 0 or np.ptp(share_E) > 0.8
    np.testing.assert_allclose(share_E, K / E, atol=5 * np.sqrt(K / E / tokens))


def test_every_expert_takes_every_token_if_k_says_so():
    """Even one whose score underflows; and the cutoffs are and stay 0."""
    config, given = config_of("expert_threshold", experts_per_token=E), inputs(6)
    state = initial_state(config)
    for x_TD in (given.x_TD, 1e4 * given.x_TD):
        out = route(config, given.router, state, x_TD, context(given.mask_T))
        np.testing.assert_array_equal(matrix(out.assignments)[0], given.mask_T[:, None].repeat(E, 1))
        state = update(config, state, out.statistics)
        np.testing.assert_array_equal(state["cutoff_E"], 0)


def test_the_gradient_is_that_of_the_scores_that_are_on():
    given, state, c_TE = inputs(8), state_of(9), np.random.default_rng(0).normal(size=(T, E))
    on_TE = (sigmoids(given) > state["cutoff_E"]) & given.mask_T[:, None]

    def formula(w_DE):
        logits_TE = reference.logits(given.x_TD, w_DE)
        weight_TE = 2.5 * reference.scores(logits_TE, "sigmoid")
        return np.sum((weight_TE * c_TE)[on_TE]) + reference.z_loss(logits_TE, given.mask_T)

    def total(w_DE, cutoff_E):
        out = eager_route(CONFIG, {"w_DE": w_DE}, state | {"cutoff_E": cutoff_E}, given.x_TD, context(given.mask_T))
        # Pairs that are not valid are left in: they must not produce gradients.
        a = out.assignments
        return jnp.sum(a.weight_N * jnp.asarray(c_TE, jnp.float32)[a.token_N, a.expert_N]) + out.losses["router_z"]

    gradient_DE, gradient_E = jax.jit(jax.grad(total, argnums=(0, 1)))(given.router["w_DE"], state["cutoff_E"])
    exact_DE, steps = given.router["w_DE"].astype(np.float64), 1e-6 * np.eye(D * E).reshape(-1, D, E)
    want = [(formula(exact_DE + step) - formula(exact_DE - step)) / 2e-6 for step in steps]
    reference.assert_close(gradient_DE, np.reshape(want, (D, E)))
    np.testing.assert_array_equal(gradient_E, 0)


def test_micro_batches_add_up_and_a_batch_of_padding_is_no_step():
    given, state = inputs(12), state_of(13, steps=3.0)
    whole, halves = reference.whole_and_halves(CONFIG, given, state)
    losses, statistics = jax.tree.map(jnp.add, *[(half.losses, half.statistics) for half in halves])
    np.testing.assert_allclose(losses["router_z"], whole.losses["router_z"], rtol=1e-6)
    np.testing.assert_array_equal(statistics["score_EM"], whole.statistics["score_EM"])

    nothing = route(CONFIG, given.router, state, given.x_TD, context(np.zeros(T, bool)))
    jax.tree.map(np.testing.assert_array_equal, update(CONFIG, state, nothing.statistics), state)
    seen = (whole.statistics, nothing.statistics)
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *seen)
    moved = jax.jit(jax.vmap(lambda statistics: ROUTER.update(CONFIG, state, statistics)))(stacked)
    for layer, own in enumerate(seen):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a, layer=layer: a[layer], moved),
                     update(CONFIG, state, own))


def test_extreme_logits_stay_finite():
    where = context(np.ones(T, bool))

    @jax.jit
    def run(w_DE, state):
        def total(w_DE):
            out = eager_route(CONFIG, {"w_DE": w_DE}, state, jnp.ones((T, 1)), where)
            return jnp.sum(out.assignments.weight_N) + out.losses["router_z"] + out.entropy, out
        (value, out), gradient = jax.value_and_grad(total, has_aux=True)(w_DE)
        return ROUTER.update(CONFIG, state, out.statistics), out, value, gradient

    hot_E = np.where(np.arange(E) == 2, 1e4, -60)
    for logit_E in (np.zeros(E), np.resize([60, -60], E), np.resize([1e4, -1e4, 0], E), hot_E):
        state = initial_state(CONFIG)
        for _ in range(3):
            state, *rest = run(np.float32([logit_E]), state)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, rest)))
            assert (state["cutoff_E"] > 0).all() and (state["cutoff_E"] <= 1).all()


@pytest.mark.parametrize("changes", [{"score": "softmax"}, {"renormalize": True}])
def test_weights_that_compare_experts_are_refused(changes):
    with pytest.raises(UserError, match="expert_threshold weighs each expert by its own sigmoid"):
        config_of("expert_threshold", **changes)
