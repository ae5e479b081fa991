"""SparseMixer against the published rule, token by token with the same noise, the law of its draws, and its estimator.

Most tests run op by op on arrays of one shape: the few ops compile once for all configs.
"""

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import B, E, T, config_of, context, eager_route, inputs, matrix

from moejax.config import UserError
from moejax.moe.routing import ROUTERS
from moejax.moe.types import Totals

PHI, WIDE = config_of("sparse_mixer"), config_of("sparse_mixer", options={"jitter_eps": 0.3})
ALL = [PHI, WIDE, config_of("sparse_mixer", experts_per_token=3, route_scale=1.5, balance_scope="sequence",
                            options={"jitter_eps": 0.15}),
       config_of("sparse_mixer", experts_per_token=1, options={"jitter_eps": 1.0})]
every_config = pytest.mark.parametrize("config", ALL, ids=lambda config: (
    f"{config.experts_per_token}-{config.options.jitter_eps}"))
EYE, KEY, EVERYTHING = {"w_DE": np.eye(E, dtype=np.float32)}, jax.random.key(3), np.ones(T, bool)


def choose(config, router, x_TD, mask_T=EVERYTHING, train=True, key=KEY, **more):
    return eager_route(config, router, {}, x_TD, context(mask_T, train=train, key=key if train else None, **more))


def parts(config, out):
    """Expert and weight, [T, K] each."""
    a = out.assignments
    return (np.asarray(column).reshape(T, config.experts_per_token) for column in (a.expert_N, a.weight_N))


def many_near(seed):
    """Inputs whose logits lie within some percent of each other, so that also the published jitter leaves a choice."""
    given = inputs(seed)
    return given._replace(router={"w_DE": 1 + given.router["w_DE"] / 100})


def noise(config, key=KEY):
    """The Gumbel noise [K, T, E] and the uniform numbers [K, T] that the router draws."""
    keys = jax.random.split(jax.random.split(key)[1], (config.experts_per_token, 2))
    return (np.stack([jax.random.gumbel(k, (T, E)) for k in keys[:, 0]]).astype(np.float64),
            np.stack([jax.random.uniform(k, (T, 1))[:, 0] for k in keys[:, 1]]))


def shares(logits_E, gone, eps):
    """The softmax over the experts that are near the best of those that are not gone; 0 for all others."""
    left = [e for e in range(len(logits_E)) if e not in gone]
    top = max(logits_E[e] for e in left)
    p_E = np.zeros(len(logits_E))
    for e in left:
        size = max(abs(logits_E[e]), top)
        if logits_E[e] == top or (top - logits_E[e]) / size <= 2 * eps:
            p_E[e] = np.exp(logits_E[e] - top)
    return p_E / p_E.sum()


def formula(config, logits_TE, drawn=None):
    """Experts [T, K], weights [T, K] and what each weight's gradient by the logits should be [T, K, E]."""
    k, scale, eps = config.experts_per_token, config.route_scale, config.options.jitter_eps
    expert_TK, weight_TK, slope_TKE = np.zeros((T, k), int), np.zeros((T, k)), np.zeros((T, k, logits_TE.shape[1]))
    for t in range(T):
        gone = []
        for i in range(k):
            p_E, part = shares(logits_TE[t], gone, eps), 1
            e = best = int(np.argmax(p_E))
            if drawn is not None:
                with np.errstate(divide="ignore"):
                    e = int(np.argmax(np.log(p_E) + drawn[0][i, t]))
                part = 1 if e == best or drawn[1][i, t] < 0.25 else 1 / 3
            expert_TK[t, i], weight_TK[t, i] = e, scale * part * p_E[e]
            slope_TKE[t, i] = scale * p_E[e] * ((np.arange(len(p_E)) == e) - p_E)
            gone.append(e)
    return expert_TK, weight_TK, slope_TKE


@pytest.mark.parametrize("train", [True, False])
@every_config
def test_choices_weights_losses_and_statistics_equal_the_formulas(config, train):
    given = inputs(1)
    out = choose(config, given.router, given.x_TD, given.mask_T, train)
    logits_TE = reference.logits(given.x_TD, given.router["w_DE"])
    expert_TK, weight_TK, _ = formula(config, logits_TE, noise(config) if train else None)
    got_expert_TK, got_weight_TK = parts(config, out)
    np.testing.assert_array_equal(got_expert_TK, expert_TK)
    np.testing.assert_allclose(got_weight_TK, weight_TK, rtol=2e-5)
    np.testing.assert_array_equal(np.asarray(out.assignments.valid_N).reshape(T, -1), np.tile(
        given.mask_T[:, None], config.experts_per_token))
    count_TE = (np.eye(E)[expert_TK].sum(1) * given.mask_T[:, None]).astype(int)
    np.testing.assert_array_equal(matrix(out.assignments)[0], count_TE)
    np.testing.assert_array_equal(out.statistics["assigned_E"], count_TE.sum(0))
    groups = B if config.balance_scope == "sequence" else 1
    np.testing.assert_allclose(out.losses["balance"], reference.balance_loss(
        logits_TE, count_TE, given.mask_T, "softmax", groups), rtol=1e-5)
    np.testing.assert_allclose(out.losses["router_z"], reference.z_loss(logits_TE, given.mask_T), rtol=1e-5)
    assert set(out.losses) == set(ROUTERS["sparse_mixer"].loss_weights(config))
    p_TE = reference.softmax(logits_TE)
    np.testing.assert_allclose(out.entropy, -np.sum((p_TE * np.log(p_TE))[given.mask_T]), rtol=1e-5)


def test_the_published_values():
    assert PHI.options.jitter_eps == 0.01 and PHI.experts_per_token == 2 and not PHI.renormalize
    assert ROUTERS["sparse_mixer"].loss_weights(PHI) == {"balance": 0.001, "router_z": 0.0}


@pytest.mark.parametrize("logits_E, near_first, near_second", [
    ([1, 0.985, 0.97, 0, 0, 0, 0], [0, 1], [1, 2]),  # 1.5 % and 3 % below the best; 1.52 % below the second
    ([1, 0.97, 0.9, 0, 0, 0, 0], [0], [1]),
    ([-1, -1.015, -1.05, -9, -9, -9, -9], [0, 1], [1]),
    ([-50, -51.01, -51.5, -90, -90, -90, -90], [0, 1], [1, 2]),  # 1.98 % of 51.01, though 2.02 % of the best
    ([0, -1e-6, -1, -1, -1, -1, -1], [0], [1]),  # no logit is near zero but zero
    ([0, 0, -1, -1, -1, -1, -1], [0, 1], [1]),  # 0 / 0 is near
    ([2, -2, -2, -2, -2, -2, -2], [0], [1, 2, 3, 4, 5, 6]),  # equal ones are near each other
])
def test_experts_within_two_percent_of_the_best_share_the_weight(logits_E, near_first, near_second):
    logits_E = np.float32(logits_E)
    out = choose(PHI, EYE, np.tile(logits_E, (T, 1)), train=False)
    expert_TK, weight_TK = parts(PHI, out)
    for near, e, weight in zip((near_first, near_second), expert_TK[0], weight_TK[0]):
        assert e in near
        np.testing.assert_allclose(weight, np.exp(logits_E[e]) / np.exp(logits_E[near]).sum(), rtol=1e-5)


def test_ties_go_by_the_tokens_id_in_evaluation_and_by_chance_in_training():
    ids_T = np.resize([3, 8, 5, 11, 6, 2], T)
    for train in (False, True):
        expert_TK, weight_TK = parts(PHI, choose(PHI, EYE, np.zeros((T, E), np.float32), train=train, ids_T=ids_T))
        assert (expert_TK[:, 0] != expert_TK[:, 1]).all() and len(set(expert_TK[:, 0])) > 2
        part_TK = weight_TK * [E, E - 1]
        if train:
            np.testing.assert_allclose(part_TK, np.where(part_TK > 0.5, 1, 1 / 3), rtol=1e-6)
            assert (expert_TK[:6] != expert_TK[6:12]).any()
        else:
            np.testing.assert_allclose(part_TK, 1, rtol=1e-6)
            np.testing.assert_array_equal(expert_TK[:6], expert_TK[6:12])


def test_the_same_key_draws_the_same_and_evaluation_draws_nothing():
    given = inputs(2)
    one, again, other = (choose(WIDE, given.router, given.x_TD, key=key) for key in (KEY, KEY, jax.random.key(4)))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert (one.assignments.expert_N != other.assignments.expert_N).any()
    for key in (None, KEY):
        still = eager_route(WIDE, given.router, {}, given.x_TD, context(EVERYTHING, train=False, key=key))
        np.testing.assert_array_equal(next(parts(WIDE, still)), formula(WIDE, reference.logits(
            given.x_TD, given.router["w_DE"]))[0])
    assert ROUTERS["sparse_mixer"].noisy(WIDE)


def test_pairs_are_drawn_from_the_masked_softmax_and_two_thirds_of_a_weight_are_left_out_at_three_times_in_four():
    """Over many keys: first expert by its share, second by its share among those near the best of the rest."""
    given, keys = inputs(3), 4000
    one, logits_TE = context(EVERYTHING, key=KEY), reference.logits(given.x_TD, given.router["w_DE"])

    @jax.jit
    def draw(keys):
        def of(key):
            a = eager_route(WIDE, given.router, {}, given.x_TD, one.replace(key=key)).assignments
            return a.expert_N.reshape(T, 2), a.weight_N.reshape(T, 2)
        return jax.vmap(of)(keys)

    expert_STK, weight_STK = map(np.asarray, draw(jax.random.split(KEY, keys)))
    thirds, drawn_others = 0, 0
    for t in range(T):
        first_E, counts = shares(logits_TE[t], [], 0.3), np.zeros((E, E))
        np.add.at(counts, tuple(expert_STK[:, t].T), 1)
        for e in range(E):
            second_E = shares(logits_TE[t], [e], 0.3)
            want_E = first_E[e] * second_E
            assert not counts[e][want_E == 0].any()
            assert (np.abs(counts[e] / keys - want_E) <= 5 * np.sqrt(want_E * (1 - want_E) / keys) + 1 / keys).all()
            for i, p_E in ((0, first_E), (1, second_E)):
                drew_S = expert_STK[:, t, 0] == e
                drawn_S = expert_STK[drew_S, t, i]
                part_S = weight_STK[drew_S, t, i] / np.maximum(p_E[drawn_S], 1e-30)
                best_S = drawn_S == np.argmax(p_E)
                np.testing.assert_allclose(part_S, np.where(best_S | (part_S > 0.5), 1, 1 / 3), rtol=1e-4)
                thirds, drawn_others = thirds + np.sum(part_S < 0.5), drawn_others + np.sum(~best_S)
    assert drawn_others > 10_000 and abs(thirds / drawn_others - 0.75) < 5 * np.sqrt(0.75 * 0.25 / drawn_others)


def test_the_two_readings_together_are_the_change_of_a_cubic_loss_times_the_gradient_of_the_logarithm():
    """(L'(p) + 3 L'(p / 3)) / 4 = (L(p) - L(0)) / p exactly, so the mean of draws is the gradient of the expected loss."""
    config, given, slope_E = ALL[3], inputs(4), np.random.default_rng(0).normal(size=(4, E))
    x_TE = given.x_TD @ given.router["w_DE"]

    def loss(w, e):
        return sum(slope_E[n][e] * w**n for n in range(4))

    @jax.jit
    def measure(keys):
        def total(x_TE, key):
            a = choose(config, EYE, x_TE, key=key).assignments
            return jnp.sum(sum(jnp.float32(slope_E[n])[a.expert_N] * a.weight_N**n for n in range(4))), a
        gradient, a = jax.vmap(jax.grad(total, has_aux=True), (None, 0))(x_TE, keys)
        return gradient, a.expert_N, a.weight_N

    gradient_STE, expert_ST, weight_ST = map(np.asarray, measure(jax.random.split(KEY, 200)))
    seen = 0
    for t in range(T):
        p_E = shares(np.float64(x_TE[t]), [], 1.0)
        for e in set(range(E)) - {int(np.argmax(p_E))}:
            drew_S = expert_ST[:, t] == e
            whole_S = drew_S & (weight_ST[:, t] > p_E[e] / 2)
            third_S = drew_S & ~whole_S
            if whole_S.any() and third_S.any():
                seen += 1
                got_E = 0.25 * gradient_STE[whole_S, t][0] + 0.75 * gradient_STE[third_S, t][0]
                want_E = (loss(p_E[e], e) - loss(0, e)) * ((np.arange(E) == e) - p_E)
                reference.assert_close(got_E, want_E, 1e-4)
    assert seen > 20


@every_config
def test_in_training_weights_have_the_whole_gradient_of_the_softmax_whatever_part_of_them_enters(config):
    given = many_near(5)
    c_TK = np.random.default_rng(0).normal(size=(T, config.experts_per_token)) * given.mask_T[:, None]

    def told(w_DE, x_TD):
        return jnp.sum(choose(config, {"w_DE": w_DE}, x_TD, given.mask_T).assignments.weight_N * jnp.float32(c_TK).ravel())

    w_DE, x_TD = given.router["w_DE"], given.x_TD
    _, weight_TK, slope_TKE = formula(config, reference.logits(x_TD, w_DE), noise(config))
    assert np.any(np.abs(slope_TKE[given.mask_T]).max(2) > 0.1, axis=0).all(), "each choice has something to learn"
    slope_TE = np.einsum("tk,tke->te", c_TK, slope_TKE)
    for got, want in zip(jax.grad(told, argnums=(0, 1))(w_DE, x_TD), (
            x_TD.astype(np.float64).T @ slope_TE, slope_TE @ w_DE.astype(np.float64).T)):
        reference.assert_close(got, want, 3e-5)


@every_config
def test_gradients_in_evaluation_and_those_of_the_losses_are_finite_differences_of_the_formula(config):
    given = many_near(6)
    c_TK = np.random.default_rng(0).normal(size=(T, config.experts_per_token)) * given.mask_T[:, None]
    groups = B if config.balance_scope == "sequence" else 1
    expert_TK, *_ = formula(config, reference.logits(given.x_TD, given.router["w_DE"]))
    count_TE = np.eye(E)[expert_TK].sum(1) * given.mask_T[:, None]

    def wanted(tree):
        logits_TE = reference.logits(tree["x"], tree["w"])
        got_TK, weight_TK, _ = formula(config, logits_TE)
        assert (got_TK == expert_TK).all(), "finite differences must not cross a choice"
        return (np.sum(c_TK * weight_TK) + reference.balance_loss(logits_TE, count_TE, given.mask_T, "softmax", groups)
                + reference.z_loss(logits_TE, given.mask_T))

    def told(tree):
        out = choose(config, {"w_DE": tree["w"]}, tree["x"], given.mask_T, train=False)
        return jnp.sum(out.assignments.weight_N * jnp.float32(c_TK).ravel()) + sum(out.losses.values())

    tree = {"w": given.router["w_DE"], "x": given.x_TD}
    gradients = jax.grad(told)(tree)
    np.testing.assert_array_equal(gradients["x"][~given.mask_T], 0)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        along = {name: rng.normal(size=value.shape) for name, value in tree.items()}
        ahead, behind = (wanted({name: tree[name] + step * along[name] for name in tree}) for step in (1e-6, -1e-6))
        summands = [np.float64(gradients[name]) * along[name] for name in tree]
        size = np.sqrt(sum(np.sum(summand**2) for summand in summands))
        assert size > 0 and abs(sum(map(np.sum, summands)) - (ahead - behind) / 2e-6) < 1e-4 * size


def measured(config, train):
    """(w, x, mask) -> all that is told of real tokens, and the gradient of everything."""
    def total(w_DE, x_TD, mask_T):
        out = choose(config, {"w_DE": w_DE}, x_TD, mask_T, train)
        weight_N = jnp.where(out.assignments.valid_N, out.assignments.weight_N, 0)
        return jnp.sum(weight_N**2) + sum(out.losses.values()), (weight_N, out.losses, out.entropy, out.statistics)
    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)


@pytest.mark.parametrize("train", [True, False])
@every_config
def test_padding_of_any_content_changes_nothing(config, train):
    given, evaluate = inputs(7), measured(config, train)
    junk_TD = np.where(given.mask_T[:, None], given.x_TD, 1e15 * inputs(8).x_TD)
    one, other = (evaluate(given.router["w_DE"], x_TD, given.mask_T) for x_TD in (given.x_TD, junk_TD))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert not np.any(np.asarray(one[1][1])[~given.mask_T])


@pytest.mark.parametrize("train", [True, False])
@every_config
def test_extreme_logits_and_a_batch_of_padding_give_finite_values_and_gradients(config, train):
    evaluate = measured(config, train)
    w_DE = np.zeros((5, E), np.float32)
    w_DE[0] = np.resize([1, -1, 0], E)
    for x, mask_T in ((np.resize([1e4, -1e4, 60, -60, 1], T), EVERYTHING), (np.full(T, 1e4), EVERYTHING),
                      (np.zeros(T), EVERYTHING), (np.ones(T), ~EVERYTHING)):
        x_TD = np.zeros((T, 5), np.float32)
        x_TD[:, 0] = x
        out = evaluate(w_DE, x_TD, mask_T)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
        assert mask_T.any() or all(not np.any(leaf) for leaf in jax.tree.leaves(out))


@pytest.mark.parametrize("train", [True, False])
@every_config
def test_extreme_logits_are_chosen_and_weighed_as_the_formula_says(config, train):
    rng = np.random.default_rng(9)
    for size in (60, 1e4):
        x_TE = (size * rng.choice([-1, 1, 0.99, 0.5, -0.25], size=(T, E)) + rng.normal(size=(T, E))).astype(np.float32)
        expert_TK, weight_TK, _ = formula(config, np.float64(x_TE), noise(config) if train else None)
        got_expert_TK, got_weight_TK = parts(config, choose(config, EYE, x_TE, train=train))
        np.testing.assert_array_equal(got_expert_TK, expert_TK)
        np.testing.assert_allclose(got_weight_TK, weight_TK, rtol=1e-4, atol=1e-30)


def test_the_shares_of_micro_batches_add_up_to_the_big_batch():
    """The parts hold the same tokens with masks that complement each other, so their noise is the same."""
    given, late_T = inputs(10), np.arange(T) > T // 3
    totals = Totals(jnp.float32(given.mask_T.sum()), jnp.float32(3))

    def evaluate(mask_T, whole=None):
        def losses(w_DE):
            out = choose(WIDE, {"w_DE": w_DE}, given.x_TD, mask_T, whole=whole, totals=totals)
            return sum(out.losses.values()), (out.losses, out.entropy, out.statistics)
        return jax.value_and_grad(losses, has_aux=True)(given.router["w_DE"])

    whole = evaluate(given.mask_T)
    halves = [evaluate(given.mask_T & half, whole[0][1][2]) for half in (late_T, ~late_T)]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(b + c, a, rtol=1e-5, atol=1e-7), whole, *halves)


def test_input_noise_is_drawn_apart_and_only_in_training():
    given, noisy = inputs(11), config_of("sparse_mixer", jitter=0.3)
    quiet, same = (choose(config, given.router, given.x_TD, train=False) for config in (PHI, noisy))
    jax.tree.map(np.testing.assert_array_equal, quiet, same)
    factor_TD = jax.random.uniform(jax.random.split(KEY)[0], given.x_TD.shape, minval=0.7, maxval=1.3)
    jax.tree.map(np.testing.assert_array_equal, choose(noisy, given.router, given.x_TD),
                 choose(PHI, given.router, given.x_TD * factor_TD))


def test_every_expert_once_where_all_are_taken_and_a_single_expert_with_weight_one():
    given, all_of_them = inputs(12), config_of("sparse_mixer", experts_per_token=E)
    expert_TK, weight_TK = parts(all_of_them, choose(all_of_them, given.router, given.x_TD))
    np.testing.assert_array_equal(np.sort(expert_TK, axis=1), np.tile(np.arange(E), (T, 1)))
    np.testing.assert_array_equal(weight_TK[:, -1], 1)
    lone = config_of("sparse_mixer", num_experts=1, experts_per_token=1)
    np.testing.assert_array_equal(choose(lone, inputs(12, experts=1).router, given.x_TD).assignments.weight_N, 1)


def test_renormalised_weights_and_sigmoid_scores_are_refused():
    for changes, message in ((dict(renormalize=True), "set config.moe.renormalize=False"),
                             (dict(score="sigmoid"), "set config.moe.score=softmax"),
                             (dict(options={"jitter_eps": -0.1}), "jitter_eps")):
        with pytest.raises(UserError, match=message):
            config_of("sparse_mixer", **changes)
