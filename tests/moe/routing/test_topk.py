"""Laws of top-k, expert choice and hash routing: the papers' formulas, gradients, padding, bias."""

import dataclasses

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import B, D, E, K, L, T, config_of, context, eager_route, inputs, matrix, route

from moejax import config as configs
from moejax.config import UserError
from moejax.models import transformer
from moejax.moe.routing import ROUTERS, get_router

TOPK = [config_of(score=score, renormalize=renormalize, route_scale=2.5)
        for score in ("softmax", "sigmoid") for renormalize in (True, False)]
EXPERT_CHOICE = [config_of("expert_choice", score=score, routing_group=group, route_scale=1.5)
                 for score in ("softmax", "sigmoid") for group in ("sequence", "global")]
BIASED = config_of(score="sigmoid", bias_rate=0.01, balance_scope="sequence")
ONE_EACH = [config_of(), config_of("hash"), config_of("expert_choice"), BIASED,
            config_of("expert_choice", routing_group="global", score="sigmoid")]


def name(config):
    return "-".join(str(part) for part in (config.router, config.score, config.renormalize, config.routing_group,
                                           config.bias_rate))


every_router = pytest.mark.parametrize("config", ONE_EACH, ids=name)


def state_of(config, seed=5):
    state = reference.initial_state(config)
    return {key: jnp.asarray(0.2 * np.random.default_rng(seed).normal(size=value.shape), jnp.float32)
            for key, value in state.items()}


def groups_of(config):
    return B if config.routing_group == "sequence" else 1


def formula(config, logits_TE, mask_T, bias_E=0.0):
    """Counts and weights [T, E] of the routers that score tokens."""
    if config.router == "topk":
        return reference.topk_matrix(logits_TE, mask_T, config.experts_per_token, config.score, config.renormalize,
                                     config.route_scale, bias_E)
    return reference.expert_choice_matrix(logits_TE, mask_T, config.experts_per_token, config.score, groups_of(config),
                                          config.route_scale)


def test_an_unknown_router_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="config.moe.router='topc' must be one of .*did you mean topk"):
        get_router("topc")


@pytest.mark.parametrize("config", TOPK + EXPERT_CHOICE, ids=name)
def test_choices_weights_losses_and_entropy_equal_the_formulas(config):
    given = inputs(1)
    out, logits_TE, count_TE = reference.compare(config, given, formula, rtol=2e-6)
    np.testing.assert_allclose(out.losses["router_z"], reference.z_loss(logits_TE, given.mask_T), rtol=1e-6)
    probs_TE = reference.scores(logits_TE, config.score)
    probs_TE = probs_TE / probs_TE.sum(1, keepdims=True)
    np.testing.assert_allclose(out.entropy, -np.sum((probs_TE * np.log(probs_TE))[given.mask_T]), rtol=1e-5)
    if config.router == "topk":
        want = reference.balance_loss(logits_TE, count_TE, given.mask_T, config.score, 1)
        np.testing.assert_allclose(out.losses["balance"], want, rtol=1e-6)
        np.testing.assert_array_equal(out.statistics["assigned_E"], count_TE.sum(0))
    assert set(out.losses) == set(get_router(config.router).loss_weights(config))


@pytest.mark.parametrize("score, renormalize, golden", [
    ("softmax", True, (4 / 7, 3 / 7)), ("softmax", False, (0.4, 0.3)),
    ("sigmoid", True, (0.8 / 1.55, 0.75 / 1.55)), ("sigmoid", False, (0.8, 0.75))])
def test_golden_weights_of_the_four_conventions(score, renormalize, golden):
    x_TD = np.log([[3.0, 1.0, 4.0, 2.0]])
    out = route(config_of(num_experts=4, score=score, renormalize=renormalize), {"w_DE": np.eye(4, dtype=np.float32)},
                {}, x_TD.astype(np.float32), context([True], sequences=1))
    np.testing.assert_array_equal(out.assignments.expert_N, [2, 0])
    np.testing.assert_allclose(out.assignments.weight_N, golden, rtol=1e-6)


@pytest.mark.parametrize("shift", [0.0, -0.9, 3.0])
def test_bias_changes_the_choice_alone_and_only_its_differences_count(shift):
    given = inputs(2)
    bias_E = np.linspace(0.8, -0.8, E).astype(np.float32)
    out = route(BIASED, given.router, {"bias_E": bias_E + np.float32(shift)}, given.x_TD, context(given.mask_T))
    logits_TE = reference.logits(given.x_TD, given.router["w_DE"])
    count_TE, weight_TE = formula(BIASED, logits_TE, given.mask_T, bias_E)
    assert (count_TE != formula(BIASED, logits_TE, given.mask_T)[0]).any(), "the bias must matter for this test"
    np.testing.assert_array_equal(matrix(out.assignments)[0], count_TE)
    np.testing.assert_allclose(matrix(out.assignments)[1], weight_TE, rtol=2e-6)


def test_bias_gets_no_gradient():
    given = inputs(2)

    def total(bias_E):
        out = eager_route(BIASED, given.router, {"bias_E": bias_E}, given.x_TD, context(given.mask_T))
        return jnp.sum(out.assignments.weight_N**2) + sum(out.losses.values())

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(jnp.linspace(0.8, -0.8, E)), np.zeros(E))


@every_router
def test_experts_are_unique_weights_are_not_negative_and_rows_add_up(config):
    given = inputs(3)
    out = route(config, given.router, state_of(config), given.x_TD, context(given.mask_T, given.ids_T))
    count_TE, weight_TE = matrix(out.assignments)
    real = given.mask_T
    assert count_TE.max() == 1 and (weight_TE >= 0).all() and not count_TE[~real].any()
    if config.router == "expert_choice":
        groups = real.reshape(groups_of(config), -1)
        per_expert_GE = count_TE.reshape(*groups.shape, E).sum(1)
        np.testing.assert_array_equal(per_expert_GE, np.repeat(-(-K * groups.sum(1, keepdims=True) // E), E, 1))
    else:
        np.testing.assert_array_equal(count_TE[real].sum(1), K)
        np.testing.assert_allclose(weight_TE[real].sum(1), 1, rtol=1e-6)


def measured(config, state, mask_T, ids_T, sequences, shards=1):
    """(w, x_TD, c_TE) -> a scalar of weights and losses, and all that a router says about real tokens."""
    def total(w_DE, x_TD, c_TE):
        out = eager_route(config, {"w_DE": w_DE}, state, x_TD, context(mask_T, ids_T, sequences, shards=shards))
        a = out.assignments
        weight_N = jnp.where(a.valid_N, a.weight_N, 0)
        weight_TE = jnp.zeros(c_TE.shape).at[a.token_N, a.expert_N].add(weight_N)
        told = (weight_TE[mask_T], out.losses, out.entropy, out.statistics)
        return jnp.sum(weight_TE * c_TE) + sum(out.losses.values()), told
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("config", [config_of(balance_scope="shard"), *ONE_EACH[1:]], ids=name)
def test_padding_of_any_content_changes_nothing_for_real_tokens(config):
    """Each row gets as much padding again, and each of the two shards of the batch a row of nothing else."""
    given, junk = inputs(6), inputs(7)

    def padded(a_T, b_T):
        a, b = (v.reshape(B, L, *v.shape[1:]) for v in (a_T, b_T))
        longer = np.concatenate([a, b], 1)
        more = np.concatenate([b, b], 1)
        return np.concatenate([longer[:2], more[:1], longer[2:], more[:1]]).reshape(-1, *a_T.shape[1:])

    mask_T, state = padded(given.mask_T, np.zeros(T, bool)), state_of(config)
    c_TE = np.random.default_rng(0).normal(size=(T, E)).astype(np.float32)
    (total, told), (dw, dx) = measured(config, state, given.mask_T, given.ids_T, B, shards=2)(
        given.router["w_DE"], given.x_TD, c_TE)
    (total2, told2), (dw2, dx2) = measured(config, state, mask_T, padded(given.ids_T, junk.ids_T), B + 2, shards=2)(
        given.router["w_DE"], padded(given.x_TD, junk.x_TD), padded(c_TE, c_TE))
    for a, b in zip(jax.tree.leaves((total, told, dw, dx[given.mask_T])),
                    jax.tree.leaves((total2, told2, dw2, dx2[mask_T])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert not np.any(np.asarray(dx2)[~mask_T])


@pytest.mark.parametrize("config", [config for config in ONE_EACH if ROUTERS[config.router].causal], ids=name)
def test_token_choice_follows_a_permutation_of_the_tokens(config):
    given = inputs(8)
    order = np.random.default_rng(1).permutation(T)
    state, config = state_of(config), dataclasses.replace(config, balance_scope="global")
    one = route(config, given.router, state, given.x_TD, context(given.mask_T, given.ids_T))
    other = route(config, given.router, state, given.x_TD[order], context(given.mask_T[order], given.ids_T[order]))
    np.testing.assert_allclose(matrix(other.assignments)[1], matrix(one.assignments)[1][order], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), (one.losses, one.entropy, one.statistics),
                 (other.losses, other.entropy, other.statistics))


@pytest.mark.parametrize("config", TOPK + EXPERT_CHOICE[1:3], ids=name)
def test_gradient_of_the_weights_equals_finite_differences(config):
    """Combine weights are not detached, and neither a top-1 nor a renormalised rule loses the router's gradient."""
    given = inputs(12)
    c_TE = np.random.default_rng(3).normal(size=(T, E))
    w_DE = given.router["w_DE"].astype(np.float64)
    count_TE, _ = formula(config, reference.logits(given.x_TD, w_DE), given.mask_T)

    def total(w_DE):
        counts, weight_TE = formula(config, reference.logits(given.x_TD, w_DE), given.mask_T)
        assert (counts == count_TE).all()
        return np.sum(weight_TE * c_TE)

    steps = 1e-6 * np.eye(w_DE.size).reshape(-1, *w_DE.shape)
    want = np.array([(total(w_DE + step) - total(w_DE - step)) / 2e-6 for step in steps]).reshape(w_DE.shape)

    def weighed(w_DE):
        a = eager_route(config, {"w_DE": w_DE}, {}, given.x_TD, context(given.mask_T)).assignments
        return jnp.sum(jnp.where(a.valid_N, a.weight_N * jnp.asarray(c_TE, jnp.float32)[a.token_N, a.expert_N], 0))

    reference.assert_close(jax.jit(jax.grad(weighed))(given.router["w_DE"]), want)


def test_one_renormalised_choice_is_refused_because_its_router_would_never_learn():
    tree = configs.default()
    tree.moe.experts_per_token = 1
    with pytest.raises(UserError, match="config.moe.renormalize=True with config.moe.experts_per_token=1"):
        transformer.resolve(configs.build(tree))


@pytest.mark.parametrize("bias_rate", [0.0, 0.01])
def test_tiny_sigmoid_scores_are_normalised_like_large_ones(bias_rate):
    """No epsilon in a denominator lets the losses sink when all logits do: -60 everywhere is 0 everywhere."""
    config = config_of(score="sigmoid", bias_rate=bias_rate)
    rows = {}
    for level in (0.0, -60.0):
        out = route(config, {"w_DE": np.full((1, E), level, np.float32)}, reference.initial_state(config),
                    np.ones((T, 1), np.float32), context(np.ones(T, bool)))
        rows[level] = (out.assignments, out.losses["balance"], out.entropy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), rows[0.0], rows[-60.0])


@pytest.mark.parametrize("config", [*ONE_EACH, config_of(score="sigmoid", renormalize=False)], ids=name)
def test_extreme_logits_give_finite_results_and_gradients(config):
    given = inputs(13)
    x_TD = np.zeros((T, D), np.float32)
    x_TD[:, 0] = np.resize([1e4, -1e4, 1.0], T)
    w_DE = np.zeros((D, E), np.float32)
    w_DE[0] = np.resize([1, -1, 0], E)
    out = measured(config, state_of(config), np.ones(T, bool), given.ids_T, B)(w_DE, x_TD, np.ones((T, E), np.float32))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


def test_hash_depends_on_the_id_alone_and_spreads_ids_evenly():
    config, ids_T = config_of("hash"), np.arange(4000, dtype=np.int32)
    assert ROUTERS["hash"].parameters(config, D) == {} and ROUTERS["hash"].needs_token_ids

    def chosen(ids_T, x_TD):
        out = route(config, {}, {}, x_TD, context(np.ones(len(ids_T), bool), ids_T, sequences=1))
        return matrix(out.assignments, len(ids_T))[0]

    rng = np.random.default_rng(0)
    count_TE = chosen(ids_T, np.zeros((4000, 1), np.float32))
    order = rng.permutation(4000).astype(np.int32)
    np.testing.assert_array_equal(chosen(order, rng.normal(size=(4000, 1)).astype(np.float32)), count_TE[order])
    share_E = count_TE.mean(0)
    deviation = np.sqrt(K / E * (1 - K / E) / 4000)
    assert np.abs(share_E - K / E).max() < 4 * deviation
    together_EE = count_TE.T @ count_TE / 4000
    pair = K * (K - 1) / (E * (E - 1))
    off_diagonal = ~np.eye(E, dtype=bool)
    assert np.abs(together_EE - pair)[off_diagonal].max() < 4.5 * np.sqrt(pair / 4000), "experts are independent"
