"""S-BASE: the plan of Sinkhorn's algorithm, by the formula in linear space, and what a token takes from it."""

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import B, D, E, L, T, config_of, context, eager_route, inputs, matrix, route

from moejax.moe.routing import ROUTERS
from moejax.moe.routing.sinkhorn import log_plan
from moejax.moe.types import Totals

ITERATIONS = 32
CONFIGS = [config_of("sinkhorn", experts_per_token=k, routing_group=group, route_scale=1.5)
           for k, group in ((1, "sequence"), (2, "sequence"), (2, "global"), (E, "global"))]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.experts_per_token}-{c.routing_group}")
plan = jax.jit(log_plan, static_argnums=2)
NONE_PADDED = np.ones(T, bool)


def sinkhorn(logits_TE, iterations=ITERATIONS):
    """exp(z) with its rows scaled to 1/T and its columns to 1/E, in turn."""
    plan_TE = np.exp(logits_TE - logits_TE.max())
    for _ in range(iterations):
        plan_TE = plan_TE / plan_TE.sum(1, keepdims=True) / len(plan_TE)
        plan_TE = plan_TE / plan_TE.sum(0) / plan_TE.shape[1]
    return plan_TE


def formula(config, logits_TE, mask_T):
    """Counts and weights [T, E]: the K largest entries of the plan of each group; weights of the raw logits."""
    count_TE = np.zeros(logits_TE.shape, int)
    for tokens in np.split(np.arange(len(mask_T)), B if config.routing_group == "sequence" else 1):
        real = tokens[mask_T[tokens]]
        if len(real):
            best_TK = np.argsort(-sinkhorn(logits_TE[real]), axis=1, kind="stable")[:, :config.experts_per_token]
            count_TE[real[:, None], best_TK] = 1
    score_TE = reference.scores(logits_TE, "sigmoid" if config.experts_per_token == 1 else "softmax")
    return count_TE, config.route_scale * score_TE * count_TE


@every_config
def test_choices_weights_and_losses_equal_the_formulas(config):
    given = inputs(1)
    out, logits_TE, count_TE = reference.compare(config, given, formula, rtol=2e-6)
    np.testing.assert_allclose(out.losses["router_z"], reference.z_loss(logits_TE, given.mask_T), rtol=1e-6)
    assert (set(out.losses), out.statistics) == ({"router_z"}, {})
    assert ROUTERS["sinkhorn"].loss_weights(config) == {"router_z": 0.0}


@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0])
def test_the_plan_is_that_of_the_iteration_in_linear_space(spread):
    logits_TE = spread * np.random.default_rng(0).normal(size=(T, E)).astype(np.float32)
    np.testing.assert_allclose(np.exp(plan(logits_TE, NONE_PADDED, ITERATIONS)),
                               sinkhorn(logits_TE.astype(np.float64)), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("experts, spread", [(8, 1.0), (8, 3.0), (64, 1.0), (64, 3.0)])
def test_in_32_iterations_each_token_and_each_expert_has_its_share(experts, spread):
    rng = np.random.default_rng(1)
    logits_TE = (spread * rng.normal(size=(4 * T, experts)) + 9 * (np.arange(experts) == 1)).astype(np.float32)
    mask_T = rng.random(4 * T) < 0.8
    plan_TE = np.exp(np.asarray(plan(logits_TE, mask_T, ITERATIONS), np.float64))[mask_T]
    np.testing.assert_allclose(plan_TE.sum(0), 1 / experts, rtol=1e-5)
    np.testing.assert_allclose(plan_TE.sum(1), 1 / mask_T.sum(), rtol=1e-4)


def test_nothing_that_all_experts_or_all_tokens_share_changes_the_plan():
    """So one hot expert gets no more than others, while the raw logits give it all."""
    rng = np.random.default_rng(2)
    logits_TE = rng.normal(size=(T, E)).astype(np.float32)
    want = plan(logits_TE, NONE_PADDED, ITERATIONS)
    row_T1 = rng.integers(-50, 50, (T, 1)).astype(np.float32)
    hot_E = np.where(np.arange(E) == 3, 60, rng.integers(-50, 50, E)).astype(np.float32)
    for shifted_TE in (logits_TE + row_T1, logits_TE + hot_E, logits_TE + row_T1 + hot_E):
        np.testing.assert_allclose(plan(shifted_TE, NONE_PADDED, ITERATIONS), want, atol=1e-3)
    w_DE, x_TD = np.eye(E, dtype=np.float32), logits_TE + hot_E
    trained, evaluated = (matrix(route(CONFIGS[0], {"w_DE": w_DE}, {}, x_TD, context(NONE_PADDED, train=train))
                                 .assignments)[0].sum(0) for train in (True, False))
    assert evaluated[3] == T and trained.max() < T / 2


def test_equal_logits_go_by_the_token_so_that_no_expert_gets_all():
    given = inputs(3)
    np.testing.assert_allclose(np.exp(plan(np.ones((T, E)), NONE_PADDED, ITERATIONS)), 1 / (T * E), rtol=1e-5)
    for train in (True, False):
        out = route(CONFIGS[0], {"w_DE": np.zeros((D, E), np.float32)}, {}, given.x_TD,
                    context(NONE_PADDED, given.ids_T, train=train))
        assert (matrix(out.assignments)[0].sum(0) > 0).sum() > E // 2


def test_in_evaluation_a_token_takes_its_largest_raw_logits():
    given, config = inputs(4), CONFIGS[1]
    out = route(config, given.router, {}, given.x_TD, context(given.mask_T, train=False))
    count_TE, weight_TE = reference.topk_matrix(reference.logits(given.x_TD, given.router["w_DE"]), given.mask_T, 2,
                                                "softmax", False, 1.5)
    np.testing.assert_array_equal(matrix(out.assignments)[0], count_TE)
    np.testing.assert_allclose(matrix(out.assignments)[1], weight_TE, rtol=2e-6)


def test_training_looks_at_later_tokens_of_the_sequence_and_at_no_other_sequence():
    given, other, config = inputs(5), inputs(6), CONFIGS[0]

    def chosen(x_TD):
        a = route(config, given.router, {}, x_TD, context(NONE_PADDED)).assignments
        return np.asarray(a.expert_N).reshape(B, L)

    x_BLD, other_BLD = given.x_TD.reshape(B, L, D), other.x_TD.reshape(B, L, D)
    first = chosen(given.x_TD)
    late = chosen(np.concatenate([x_BLD[:, :3], other_BLD[:, 3:]], 1).reshape(T, D))
    assert (late[:, :3] != first[:, :3]).any() and not ROUTERS["sinkhorn"].causal
    next_row = chosen(np.concatenate([x_BLD[:1], other_BLD[1:]]).reshape(T, D))
    np.testing.assert_array_equal(next_row[0], first[0])


def test_padding_of_any_content_and_in_any_place_changes_no_share():
    rng = np.random.default_rng(7)
    logits_TE = rng.normal(size=(T, E)).astype(np.float32)
    place_T = np.sort(rng.permutation(2 * T)[:T])
    padded_TE = (1e4 * rng.normal(size=(2 * T, E))).astype(np.float32)
    padded_TE[place_T] = logits_TE
    padded = plan(padded_TE, np.isin(np.arange(2 * T), place_T), ITERATIONS)
    np.testing.assert_allclose(np.asarray(padded)[place_T], plan(logits_TE, NONE_PADDED, ITERATIONS), atol=1e-4)


@every_config
def test_gradient_of_the_weights_equals_finite_differences_and_the_choice_has_none(config):
    given = inputs(8)
    c_TE = np.random.default_rng(9).normal(size=(T, E))
    w_DE = given.router["w_DE"].astype(np.float64)
    count_TE, _ = formula(config, reference.logits(given.x_TD, w_DE), given.mask_T)
    kind = "sigmoid" if config.experts_per_token == 1 else "softmax"

    def total(w_DE):
        return np.sum(1.5 * c_TE * count_TE * reference.scores(reference.logits(given.x_TD, w_DE), kind))

    def weighed(w_DE):
        a = eager_route(config, {"w_DE": w_DE}, {}, given.x_TD, context(given.mask_T)).assignments
        return jnp.sum(jnp.where(a.valid_N, a.weight_N * jnp.asarray(c_TE, jnp.float32)[a.token_N, a.expert_N], 0))

    steps = 1e-6 * np.eye(w_DE.size).reshape(-1, *w_DE.shape)
    want = np.array([(total(w_DE + step) - total(w_DE - step)) / 2e-6 for step in steps]).reshape(w_DE.shape)
    reference.assert_close(jax.jit(jax.grad(weighed))(given.router["w_DE"]), want)


@pytest.mark.parametrize("config", CONFIGS[:2], ids=["1", "2"])
@pytest.mark.parametrize("size", [60.0, 1e4])
def test_extreme_logits_give_finite_results_and_gradients_also_for_nothing_but_padding(config, size):
    x_TD = size * np.random.default_rng(10).choice([-1.0, 0.0, 1.0], (T, E)).astype(np.float32)

    def total(w_DE, x_TD, mask_T):
        out = eager_route(config, {"w_DE": w_DE}, {}, x_TD, context(mask_T, totals=Totals(9.0, 2.0)))
        weight_N = jnp.where(out.assignments.valid_N, out.assignments.weight_N, 0)
        return jnp.sum(weight_N) + out.losses["router_z"], out

    differentiate = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    for mask_T in (NONE_PADDED, ~NONE_PADDED):
        (_, out), gradients = differentiate(np.eye(E, dtype=np.float32), x_TD, mask_T)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradients)))
        assert np.isfinite(plan(x_TD, mask_T, ITERATIONS)).all()
    assert out.losses["router_z"] == 0 and not np.any(gradients[0])


def test_sequences_are_routed_and_losses_shared_alike_in_two_micro_batches():
    reference.assert_halves_route_alike(CONFIGS[1], inputs(11))


def test_one_expert_takes_all_and_a_bfloat16_model_routes_in_float32():
    given, config = inputs(12, 1), config_of("sinkhorn", num_experts=1, experts_per_token="auto")
    low_TD = jnp.asarray(given.x_TD, jnp.bfloat16)
    low, high = (route(config, given.router, {}, x_TD, context(given.mask_T))
                 for x_TD in (low_TD, low_TD.astype(jnp.float32)))
    jax.tree.map(np.testing.assert_array_equal, low, high)
    np.testing.assert_array_equal(matrix(low.assignments, experts=1)[0][:, 0], given.mask_T)
