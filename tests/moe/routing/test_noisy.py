"""Noisy top-k and V-MoE against the papers' formulas, token by token with the same noise, and their laws.

Most tests run op by op on arrays of one shape: the few ops compile once for all configs.
"""

import math

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import B, D, E, K, T, config_of, context, eager_route, inputs, matrix, route

from moejax.config import UserError
from moejax.moe.layer import drop
from moejax.moe.routing import ROUTERS
from moejax.moe.types import Totals

SHAZEER, V_MOE = config_of("noisy_topk"), config_of("v_moe")
CROSSED = [config_of("noisy_topk", renormalize=False, route_scale=1.5, balance_weight=0.1, balance_scope="sequence",
                     options={"load_threshold": "kth", "noise_floor": 0.3}),
           config_of("v_moe", renormalize=True, options={"load_threshold": "exclusive", "importance_of": "gates"})]
ALL = [SHAZEER, V_MOE, *CROSSED]
SIZES = [config_of("noisy_topk", experts_per_token=E), config_of("v_moe", experts_per_token=1)]
KEY = jax.random.key(3)


def name(config):
    options = config.options
    return f"{config.router}-{config.experts_per_token}-{options.importance_of}-{options.load_threshold}"


def random_parameters(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {name: own.shape for name, own in ROUTERS[config.router].parameters(config, D).items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def noise(key, tokens=T):
    return np.asarray(jax.random.normal(jax.random.split(key)[1], (tokens, E)), np.float64)


def normal_cdf(z):
    return 0.5 * math.erfc(-z / math.sqrt(2))


def formula(config, parameters, x_TD, mask_T, noise_TE=None):
    """Counts [T, E], weights [T, E], importance [E] and load [E] of one batch; without noise as in evaluation."""
    options, k, experts = config.options, config.experts_per_token, config.num_experts
    w = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    count_TE, weight_TE = np.zeros((len(x_TD), experts), int), np.zeros((len(x_TD), experts))
    importance_E, load_E = np.zeros(experts), np.zeros(experts)
    for t in np.flatnonzero(mask_T):
        x = np.asarray(x_TD[t], np.float64)
        clean = x @ w["w_DE"]
        if options.noise == "learned":
            deviation = np.logaddexp(0, x @ w["noise_DE"]) + options.noise_floor
        else:
            deviation = np.full(experts, 1 / experts)
        noisy = clean if noise_TE is None else clean + noise_TE[t] * deviation
        chosen = sorted(range(experts), key=lambda e: -noisy[e])[:k]
        count_TE[t, chosen] = 1
        if config.renormalize:
            kept = np.full(experts, -np.inf)
            kept[chosen] = noisy[chosen]
            gates = reference.softmax(kept)
        else:
            gates = reference.softmax(noisy) * count_TE[t]
        weight_TE[t] = config.route_scale * gates
        importance_E += gates if options.importance_of == "gates" else reference.softmax(clean)
        for e in range(experts):
            if noise_TE is None or k == experts:
                load_E[e] += count_TE[t, e]
            else:
                rivals = [noisy[j] for j in range(experts) if j != e or options.load_threshold == "kth"]
                load_E[e] += normal_cdf((clean[e] - sorted(rivals)[-k]) / deviation[e])
    return count_TE, weight_TE, importance_E, load_E


def squared_variation(sum_E):
    return np.var(sum_E) / np.mean(sum_E)**2


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("config", [*ALL, *SIZES], ids=name)
def test_choices_weights_losses_and_statistics_equal_the_formulas(config, train):
    given, parameters = inputs(1), random_parameters(config, 1)
    out = eager_route(config, parameters, {}, given.x_TD, context(given.mask_T, train=train, key=KEY if train else None))
    count_TE, weight_TE, importance_E, load_E = formula(config, parameters, given.x_TD, given.mask_T,
                                                        noise(KEY) if train else None)
    got_count_TE, got_weight_TE = matrix(out.assignments)
    np.testing.assert_array_equal(got_count_TE, count_TE)
    np.testing.assert_allclose(got_weight_TE, weight_TE, rtol=1e-5)
    np.testing.assert_allclose(out.losses["importance"], squared_variation(importance_E), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(out.losses["load"], squared_variation(load_E), rtol=1e-4, atol=1e-9)
    logits_TE = reference.logits(given.x_TD, parameters["w_DE"])
    np.testing.assert_allclose(out.losses["router_z"], reference.z_loss(logits_TE, given.mask_T), rtol=1e-6)
    np.testing.assert_array_equal(out.statistics["assigned_E"], count_TE.sum(0))
    np.testing.assert_allclose(out.statistics["importance_E"], importance_E, rtol=1e-5)
    np.testing.assert_allclose(out.statistics["load_E"], load_E, rtol=1e-5)
    assert set(out.losses) == set(ROUTERS[config.router].loss_weights(config))
    if not train:
        groups = B if config.balance_scope == "sequence" else 1
        want = reference.balance_loss(logits_TE, count_TE, given.mask_T, "softmax", groups)
        np.testing.assert_allclose(out.losses["balance"], want, rtol=1e-6)
    ranked_TK = np.asarray(out.assignments.weight_N).reshape(T, -1)
    assert (np.diff(ranked_TK, axis=1) <= 0).all(), "best first"


@pytest.mark.parametrize("config", ALL, ids=name)
def test_weights_and_losses_of_two_micro_batches_have_the_gradient_of_the_formula_over_the_whole_batch(config):
    """Each part draws its own noise. Finite differences of the formula along random directions, noise fixed."""
    given, parameters = inputs(2), random_parameters(config, 2)
    arrays, c_TE = {"x_TD": given.x_TD, **parameters}, np.random.default_rng(0).normal(size=(T, E))
    late_T, keys = np.arange(T) > T // 3, (jax.random.key(4), jax.random.key(5))
    masks = (given.mask_T & ~late_T, given.mask_T & late_T)
    noise_TE = np.where(late_T[:, None], noise(keys[1]), noise(keys[0]))
    totals = Totals(jnp.float32(given.mask_T.sum()), jnp.float32(3))

    def part(arrays, i, whole):
        parameters = {name: value for name, value in arrays.items() if name != "x_TD"}
        return eager_route(config, parameters, {}, arrays["x_TD"],
                           context(masks[i], key=keys[i], whole=whole, totals=totals))

    whole = jax.tree.map(jnp.add, *(part(arrays, i, None).statistics for i in range(2)))

    def terms(arrays):
        def of_part(i):
            out = part(arrays, i, whole)
            a = out.assignments
            weighed_N = jnp.where(a.valid_N, a.weight_N * jnp.float32(c_TE)[a.token_N, a.expert_N], 0)
            return jnp.stack([jnp.sum(weighed_N), out.losses["importance"], out.losses["load"]])
        return of_part(0) + of_part(1)

    def wanted(arrays):
        counts, weight_TE, importance_E, load_E = formula(config, arrays, arrays["x_TD"], given.mask_T, noise_TE)
        assert (counts == count_TE).all(), "finite differences must not cross a choice"
        return np.array([np.sum(c_TE * weight_TE), squared_variation(importance_E), squared_variation(load_E)])

    count_TE = formula(config, parameters, given.x_TD, given.mask_T, noise_TE)[0]
    values, pull_back = jax.vjp(terms, arrays)
    np.testing.assert_allclose(values, wanted(arrays), rtol=1e-4)
    gradients = [pull_back(row)[0] for row in jnp.eye(3)]
    for seed in range(8):
        rng = np.random.default_rng(seed)
        along = {name: rng.normal(size=value.shape) for name, value in arrays.items()}
        ahead, behind = ({name: arrays[name] + step * along[name] for name in arrays} for step in (1e-6, -1e-6))
        want = (wanted(ahead) - wanted(behind)) / 2e-6
        for gradient, slope in zip(gradients, want):
            summands = [np.float64(gradient[name]) * along[name] for name in arrays]
            size = np.sqrt(sum(np.sum(summand**2) for summand in summands))
            assert size > 0 and abs(sum(map(np.sum, summands)) - slope) < 1e-4 * size


def test_load_is_the_probability_of_being_chosen_when_an_experts_own_noise_is_drawn_again():
    """The published definition by simulation: for one token and each expert, all other noise stays as it was."""
    parameters, x_TD, rng = random_parameters(SHAZEER, 3), inputs(3).x_TD, np.random.default_rng(0)
    out = eager_route(SHAZEER, parameters, {}, x_TD, context(np.arange(T) == 0, key=KEY))
    clean_E = x_TD[0] @ parameters["w_DE"]
    deviation_E = np.logaddexp(0, x_TD[0] @ parameters["noise_DE"]) + 0.01
    noisy_E, draws = clean_E + noise(KEY)[0] * deviation_E, 40_000
    for e in range(E):
        trials = np.tile(noisy_E, (draws, 1))
        trials[:, e] = clean_E[e] + deviation_E[e] * rng.normal(size=draws)
        share = np.mean((trials[:, e:e + 1] < trials).sum(1) < K)
        assert abs(out.statistics["load_E"][e] - share) < 4.5 * math.sqrt(0.25 / draws)


def test_load_becomes_the_count_as_the_noise_vanishes():
    config = config_of("noisy_topk", options={"noise_floor": 1e-6})
    given, parameters = inputs(4), random_parameters(config, 4)
    given.x_TD[:, 0] = 1
    parameters["noise_DE"] = np.zeros((D, E), np.float32)
    parameters["noise_DE"][0] = -30
    out = eager_route(config, parameters, {}, given.x_TD, context(given.mask_T, key=KEY))
    np.testing.assert_allclose(out.statistics["load_E"], out.statistics["assigned_E"], atol=1e-5)


def test_both_losses_are_zero_at_perfect_balance_and_e_over_k_less_one_when_all_tokens_agree():
    """Turns of one vector of logits give every expert the same; equal weights of 1/K make the importance the count."""
    logits_E, mask_T = np.zeros(E, np.float32), np.arange(T) < T // E * E
    logits_E[:K] = 60
    parameters = {"w_DE": np.eye(E, dtype=np.float32), "noise_DE": np.zeros((E, E), np.float32)}
    turns_TE = np.stack([np.roll(logits_E, shift) for shift in range(T)])
    for x_TE, want in ((turns_TE, 0), (np.tile(logits_E, (T, 1)), E / K - 1)):
        for train in (True, False):
            losses = eager_route(SHAZEER, parameters, {}, x_TE,
                                 context(mask_T, train=train, key=KEY if train else None)).losses
            np.testing.assert_allclose(losses["load"], want, atol=1e-6)
            if not train:
                np.testing.assert_allclose(losses["importance"], want, atol=1e-6)


@pytest.mark.parametrize("config, train", [(SHAZEER, False), (V_MOE, False), (SIZES[0], True)])
def test_a_load_of_hard_counts_has_no_gradient(config, train):
    given, parameters = inputs(5), random_parameters(config, 5)

    def load(parameters, x_TD):
        return eager_route(config, parameters, {}, x_TD,
                           context(given.mask_T, train=train, key=KEY if train else None)).losses["load"]

    for leaf in jax.tree.leaves(jax.grad(load, argnums=(0, 1))(parameters, given.x_TD)):
        np.testing.assert_array_equal(leaf, 0)


def test_at_the_start_noise_decides_in_training_and_the_tokens_id_in_evaluation():
    """Shazeer's matrices start at zero, so without noise all logits are equal."""
    starts = ROUTERS["noisy_topk"].parameters(SHAZEER, D)
    assert all(own.stddev == own.mean == 0 for own in starts.values())
    zeros = {name: jnp.zeros(own.shape) for name, own in starts.items()}
    everything, same_T = np.ones(T, bool), np.full(T, 9)
    for train, ids_T in ((True, same_T), (False, np.arange(T))):
        out = eager_route(SHAZEER, zeros, {}, inputs().x_TD,
                          context(everything, ids_T, train=train, key=KEY if train else None))
        count_E = out.statistics["assigned_E"]
        assert count_E.sum() == K * T and count_E.min() > 0 and count_E.max() < 0.75 * T
    one = eager_route(SHAZEER, zeros, {}, inputs().x_TD, context(everything, same_T, train=False))
    assert sorted(one.statistics["assigned_E"])[-K:] == [T] * K, "the same id, the same experts"
    np.testing.assert_array_equal(one.assignments.weight_N, 1 / K)


def measured(config, train):
    """(parameters, x, mask) -> all that is told of real tokens, and the gradient of everything."""
    def total(parameters, x_TD, mask_T):
        out = eager_route(config, parameters, {}, x_TD, context(mask_T, train=train, key=KEY if train else None))
        a = out.assignments
        weight_N = jnp.where(a.valid_N, a.weight_N, 0)
        return jnp.sum(weight_N**2) + sum(out.losses.values()), (weight_N, out.losses, out.entropy, out.statistics)
    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)


@pytest.mark.parametrize("config", ALL, ids=name)
def test_padding_of_any_content_changes_nothing(config):
    given, parameters = inputs(6), random_parameters(config, 6)
    evaluate = measured(config, True)
    junk_TD = np.where(given.mask_T[:, None], given.x_TD, 1e15 * inputs(7).x_TD)
    one, other = (evaluate(parameters, x_TD, given.mask_T) for x_TD in (given.x_TD, junk_TD))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert not np.any(np.asarray(one[1][1])[~given.mask_T])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("config", ALL, ids=name)
def test_extreme_logits_and_a_batch_of_padding_give_finite_values_and_gradients(config, train):
    evaluate, w = measured(config, train), {n: np.zeros_like(v) for n, v in random_parameters(config).items()}
    for value in w.values():
        value[0] = np.resize([1, -1, 0], E)
    everything = np.ones(T, bool)
    for x, mask_T in ((np.resize([1e4, -1e4, 60, -60, 1], T), everything), (np.full(T, 1e4), everything),
                      (np.zeros(T), everything), (np.ones(T), ~everything)):
        x_TD = np.zeros((T, D), np.float32)
        x_TD[:, 0] = x
        out = evaluate(w, x_TD, mask_T)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
        if not mask_T.any():
            assert all(not np.any(leaf) for leaf in jax.tree.leaves(out))


def test_extreme_logits_are_chosen_and_weighed_as_the_formula_says():
    rng = np.random.default_rng(8)
    parameters = {"w_DE": np.eye(E, dtype=np.float32)}
    for size in (60, 1e4):
        x_TE = (size * rng.choice([-1, 1, 0.5, -0.25], size=(T, E)) + rng.normal(size=(T, E))).astype(np.float32)
        out = eager_route(V_MOE, parameters, {}, x_TE, context(np.ones(T, bool), train=False))
        count_TE, weight_TE, importance_E, _ = formula(V_MOE, parameters, x_TE, np.ones(T, bool))
        np.testing.assert_array_equal(matrix(out.assignments)[0], count_TE)
        np.testing.assert_allclose(matrix(out.assignments)[1], weight_TE, rtol=1e-4, atol=1e-30)
        np.testing.assert_allclose(out.statistics["importance_E"], importance_E, rtol=1e-4, atol=1e-30)


def test_batch_priority_drops_the_tokens_that_are_least_sure_and_nothing_without_a_capacity():
    given, parameters = inputs(9), random_parameters(V_MOE, 9)
    for config in (config_of("v_moe", capacity_factor=0.5), config_of("v_moe", capacity_factor=None)):
        whole = context(given.mask_T, key=KEY)
        chosen = eager_route(config, parameters, {}, given.x_TD, whole).assignments
        kept = np.asarray(jax.jit(drop, static_argnums=0)(config, chosen, whole).valid_N).reshape(T, K)[:, 0]
        if config.capacity_factor is None:
            np.testing.assert_array_equal(kept, given.mask_T)
            continue
        first, sure = np.asarray(chosen.expert_N).reshape(T, K)[:, 0], np.asarray(chosen.weight_N).reshape(T, K)[:, 0]
        pairs = [(s, t) for row in np.arange(T).reshape(B, -1) for s in row for t in row
                 if kept[s] and given.mask_T[t] and not kept[t] and first[s] == first[t]]
        assert pairs and all(sure[s] >= sure[t] for s, t in pairs)


def test_one_renormalised_choice_and_sigmoid_scores_are_refused():
    for changes, message in ((dict(experts_per_token=1), "renormalize=True with config.moe.experts_per_token=1"),
                             (dict(num_experts=1, experts_per_token=1), "renormalize=False"),
                             (dict(score="sigmoid"), "set config.moe.score=softmax")):
        with pytest.raises(UserError, match=message):
            config_of("noisy_topk", **changes)
    lone = config_of("v_moe", num_experts=1, experts_per_token=1)
    given = inputs(10, experts=1)
    out = route(lone, given.router, {}, given.x_TD, context(given.mask_T, key=KEY))
    np.testing.assert_array_equal(out.assignments.weight_N, 1)
    assert out.losses["load"] == out.losses["importance"] == 0
