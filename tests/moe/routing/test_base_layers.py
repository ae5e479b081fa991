"""BASE layers: the assignment is complete, balanced and the best one; the reference optimum is scipy's."""

import dataclasses

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import B, D, E, T, config_of, context, eager_route, inputs, matrix, route
from scipy.optimize import linear_sum_assignment

from moejax.config import UserError
from moejax.moe.routing import ROUTERS
from moejax.moe.routing.base_layers import assign
from moejax.moe.types import Totals

TOKENS, EXPERTS, EPSILON = 45, 8, 1e-3
TRAIN = {group: config_of("base", experts_per_token=1, routing_group=group, route_scale=1.5,
                          options={"epsilon": 1e-5, "rounds": 2000}) for group in ("sequence", "global")}
every_group = pytest.mark.parametrize("group", TRAIN)
solve = jax.jit(assign)


def optimum(scores_TE, places):
    """The best assignment with so many places an expert: its sum of scores, and the expert of each token."""
    expert_P = np.repeat(np.arange(scores_TE.shape[1]), places)
    _, place_T = linear_sum_assignment(np.asarray(scores_TE, np.float64)[:, expert_P], maximize=True)
    expert_T = expert_P[place_T]
    return np.take_along_axis(np.asarray(scores_TE, np.float64), expert_T[:, None], 1).sum(), expert_T


def scores(kind, seed=0, tokens=TOKENS, experts=EXPERTS):
    rng = np.random.default_rng(seed)
    normal_TE = rng.normal(size=(tokens, experts))
    return {
        "normal": normal_TE,
        "one hot expert": normal_TE + 60 * (np.arange(experts) == 2),
        "one expert for all": np.where(np.arange(experts) == 2, 60.0, -60.0) * np.ones((tokens, 1)),
        "tied": rng.integers(0, 3, (tokens, experts)),
        "equal tokens": np.repeat(normal_TE[:1], tokens, 0),
        "all equal": np.ones((tokens, experts)),
        "60": rng.choice([-60.0, 60.0], (tokens, experts)),
        "1e4": rng.choice([-1e4, 0.0, 1e4], (tokens, experts)),
        "one token of 1e4": np.where(np.arange(tokens)[:, None] == 3, 1e4 * normal_TE, normal_TE),
    }[kind].astype(np.float32)


def assert_balanced(expert_T, mask_T, experts):
    """Every real token has an expert, and none has more than ceil(tokens / E)."""
    real_T = np.asarray(expert_T)[mask_T]
    assert ((real_T >= 0) & (real_T < experts)).all()
    assert np.bincount(real_T, minlength=experts).max(initial=0) <= -(-mask_T.sum() // experts)


@pytest.mark.parametrize("kind", ["normal", "one hot expert", "one expert for all", "tied", "equal tokens", "all equal",
                                  "60", "1e4", "one token of 1e4"])
def test_the_assignment_is_balanced_and_within_epsilon_a_token_of_the_best(kind):
    for seed in range(5):
        scores_TE = scores(kind, seed)
        mask_T = np.random.default_rng(seed).random(TOKENS) < (0.7 if seed else 1.1)
        expert_T, rounds = solve(scores_TE, mask_T, EPSILON, 2000)
        assert_balanced(expert_T, mask_T, EXPERTS)
        real_TE = scores_TE[mask_T].astype(np.float64)
        got = np.take_along_axis(real_TE, np.asarray(expert_T)[mask_T][:, None], 1).sum()
        want, _ = optimum(real_TE, -(-len(real_TE) // EXPERTS))
        spread = np.max(real_TE.max(1) - real_TE.min(1))
        assert got >= want - len(real_TE) * (EPSILON * spread + 1e-6 * np.abs(real_TE).max())
        assert rounds < 2000


@every_group
def test_choices_weights_and_losses_equal_the_formulas(group):
    given, config = inputs(1), TRAIN[group]
    out = route(config, given.router, {}, given.x_TD, context(given.mask_T))
    scores_TE = reference.logits(given.x_TD, given.router["w_DE"])
    want_TE = np.zeros((T, E))
    for tokens in np.split(np.arange(T), B if group == "sequence" else 1):
        real = tokens[given.mask_T[tokens]]
        if len(real):
            want_TE[real, optimum(scores_TE[real], -(-len(real) // E))[1]] = 1
    count_TE, weight_TE = matrix(out.assignments)
    np.testing.assert_array_equal(count_TE, want_TE)
    np.testing.assert_allclose(weight_TE, 1.5 * want_TE / (1 + np.exp(-scores_TE)), rtol=2e-6)
    np.testing.assert_allclose(out.losses["router_z"], reference.z_loss(scores_TE, given.mask_T), rtol=1e-6)
    assert (set(out.losses), out.statistics, out.assignments.choices) == ({"router_z"}, {}, 1)
    assert ROUTERS["base"].loss_weights(config) == {"router_z": 0.0}


@pytest.mark.parametrize("kind", ["normal", "tied", "all equal", "one expert for all"])
def test_the_assignment_is_complete_and_balanced_after_any_number_of_rounds(kind):
    scores_TE, mask_T = scores(kind, 3), np.random.default_rng(4).random(TOKENS) < 0.8
    sums = []
    for rounds in range(1, 40):
        expert_T, used = solve(scores_TE, mask_T, EPSILON, rounds)
        assert used <= rounds
        assert_balanced(expert_T, mask_T, EXPERTS)
        sums.append(np.sum(scores_TE[mask_T, np.asarray(expert_T)[mask_T]]))
    best = optimum(scores_TE[mask_T], -(-mask_T.sum() // EXPERTS))[0]
    spread = np.ptp(scores_TE) * mask_T.sum()
    assert max(sums) - sums[-1] <= EPSILON * spread, "the last auction is the best"
    assert best - min(sums) <= 0.2 * spread, "what was bid for so far counts"


@pytest.mark.parametrize("tokens, experts", [(1, 5), (3, 5), (10, 4), (9, 1)])
def test_any_number_of_tokens_works_even_none(tokens, experts):
    scores_TE = scores("normal", 5, tokens, experts)
    for real in range(tokens + 1):
        mask_T = np.random.default_rng(real).permutation(tokens) < real
        expert_T, _ = solve(scores_TE, mask_T, 1e-5, 5000)
        assert_balanced(expert_T, mask_T, experts)
        if real:
            np.testing.assert_array_equal(np.asarray(expert_T)[mask_T], optimum(scores_TE[mask_T], -(-real // experts))[1])


def test_experts_are_equally_full_where_tokens_divide_evenly():
    for kind in ("normal", "tied", "one expert for all"):
        expert_T, _ = solve(scores(kind, 6), np.arange(TOKENS) < 5 * EXPERTS, EPSILON, 2000)
        np.testing.assert_array_equal(np.bincount(expert_T[:5 * EXPERTS]), 5)


@pytest.mark.parametrize("kind", ["normal", "tied", "all equal"])
def test_padding_of_any_content_and_in_any_place_changes_no_choice(kind):
    scores_TE, rng = scores(kind, 7), np.random.default_rng(8)
    place_T = np.sort(rng.permutation(2 * TOKENS)[:TOKENS])
    padded_TE = (1e4 * rng.normal(size=(2 * TOKENS, EXPERTS))).astype(np.float32)
    padded_TE[place_T] = scores_TE
    mask_T = np.isin(np.arange(2 * TOKENS), place_T)
    short_T, rounds = solve(scores_TE, np.ones(TOKENS, bool), EPSILON, 2000)
    long_T, rounds_padded = solve(padded_TE, mask_T, EPSILON, 2000)
    np.testing.assert_array_equal(long_T[mask_T], short_T)
    assert rounds == rounds_padded


def test_a_constant_added_to_the_scores_of_a_token_changes_no_choice():
    scores_TE = np.random.default_rng(9).integers(-8, 9, (TOKENS, EXPERTS)).astype(np.float32) / 4
    shift_T1 = np.random.default_rng(10).integers(-1000, 1000, (TOKENS, 1)).astype(np.float32)
    mask_T = np.ones(TOKENS, bool)
    np.testing.assert_array_equal(solve(scores_TE + shift_T1, mask_T, EPSILON, 2000)[0],
                                  solve(scores_TE, mask_T, EPSILON, 2000)[0])


@pytest.mark.parametrize("kind", ["normal", "tied", "1e4"])
def test_rounding_of_the_scores_decides_nothing(kind):
    """Bids make margins equal, which of them is taken must not hang on the last bit, or devices would disagree."""
    scores_TE, mask_T, rng = scores(kind, 11), np.ones(TOKENS, bool), np.random.default_rng(12)
    want_T, _ = solve(scores_TE, mask_T, 0.05, 2000)
    for _ in range(10):
        noise_TE = 1 + 1e-7 * rng.choice([-1, 0, 1], scores_TE.shape)
        got_T, _ = solve((scores_TE * noise_TE).astype(np.float32), mask_T, 0.05, 2000)
        np.testing.assert_array_equal(got_T, want_T)


@pytest.mark.parametrize("kind, most", [("normal", 60), ("one hot expert", 80), ("1e4", 110), ("all equal", 150)])
def test_the_auction_needs_few_rounds(kind, most):
    """Experts that did not defend what they hold would bid against themselves for hundreds of rounds."""
    assert solve(scores(kind, 11, 256, 8), np.ones(256, bool), EPSILON, 2000)[1] <= most


def test_in_evaluation_each_token_goes_to_its_best_expert_whatever_the_others_do():
    given, config = inputs(2), TRAIN["sequence"]
    evaluated = context(given.mask_T, given.ids_T, train=False)
    scores_TE = reference.logits(given.x_TD, given.router["w_DE"])
    count_TE, weight_TE = matrix(route(config, given.router, {}, given.x_TD, evaluated).assignments)
    want_TE = np.eye(E)[scores_TE.argmax(1)] * given.mask_T[:, None]
    np.testing.assert_array_equal(count_TE, want_TE)
    np.testing.assert_allclose(weight_TE, 1.5 * want_TE / (1 + np.exp(-scores_TE)), rtol=2e-6)
    tied_TE = matrix(route(config, {"w_DE": np.zeros((D, E), np.float32)}, {}, given.x_TD, evaluated).assignments)[0]
    assert (tied_TE.sum(0) > 0).sum() > 1, "equal scores go by the token's id"


def test_training_looks_at_later_tokens_of_the_sequence_and_at_no_other_sequence():
    given, other, config = inputs(3), inputs(4), TRAIN["sequence"]
    mask_T = np.ones(T, bool)

    def chosen(x_TD):
        return np.asarray(route(config, given.router, {}, x_TD, context(mask_T)).assignments.expert_N).reshape(B, -1)

    x_BLD, other_BLD = given.x_TD.reshape(B, -1, D), other.x_TD.reshape(B, -1, D)
    first = chosen(given.x_TD)
    late = chosen(np.concatenate([x_BLD[:, :3], other_BLD[:, 3:]], 1).reshape(T, D))
    assert (late[:, :3] != first[:, :3]).any() and not ROUTERS["base"].causal
    next_row = chosen(np.concatenate([x_BLD[:1], other_BLD[1:]]).reshape(T, D))
    np.testing.assert_array_equal(next_row[0], first[0])


def test_gradient_of_the_weights_equals_finite_differences_and_the_choice_has_none():
    given, config = inputs(5), TRAIN["sequence"]
    c_T = np.random.default_rng(6).normal(size=T).astype(np.float32)
    expert_T = np.asarray(route(config, given.router, {}, given.x_TD, context(given.mask_T)).assignments.expert_N)

    def weighed(w_DE, x_TD):
        a = eager_route(config, {"w_DE": w_DE}, {}, x_TD, context(given.mask_T)).assignments
        return jnp.sum(jnp.where(a.valid_N, a.weight_N * c_T, 0))

    def formula(w_DE):
        chosen_T = reference.logits(given.x_TD, w_DE)[np.arange(T), expert_T]
        return np.sum((1.5 * c_T / (1 + np.exp(-chosen_T)))[given.mask_T])

    w_DE = given.router["w_DE"].astype(np.float64)
    steps = 1e-6 * np.eye(w_DE.size).reshape(-1, *w_DE.shape)
    want = np.array([(formula(w_DE + step) - formula(w_DE - step)) / 2e-6 for step in steps]).reshape(w_DE.shape)
    dw, dx = jax.jit(jax.grad(weighed, argnums=(0, 1)))(given.router["w_DE"], given.x_TD)
    reference.assert_close(dw, want)
    assert not np.any(dx[~given.mask_T])


def test_extreme_scores_give_finite_results_and_gradients_also_for_nothing_but_padding():
    x_TD = np.zeros((T, D), np.float32)
    x_TD[:, 0] = np.resize([1e4, -1e4, 60.0, -60.0, 1.0], T)
    w_DE = np.zeros((D, E), np.float32)
    w_DE[0] = np.resize([1, -1, 0], E)

    @jax.jit
    def total(w_DE, x_TD, mask_T):
        def of(w_DE, x_TD):
            out = eager_route(TRAIN["sequence"], {"w_DE": w_DE}, {}, x_TD, context(mask_T, totals=Totals(9.0, 2.0)))
            weight_N = jnp.where(out.assignments.valid_N, out.assignments.weight_N, 0)
            return jnp.sum(weight_N) + out.losses["router_z"], out
        return jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(w_DE, x_TD)

    for mask_T in (np.ones(T, bool), np.zeros(T, bool)):
        (_, out), gradients = total(w_DE, x_TD, mask_T)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradients)))
    assert out.losses["router_z"] == 0 and not np.any(gradients[0])


def test_sequences_are_assigned_and_losses_shared_alike_in_two_micro_batches():
    reference.assert_halves_route_alike(TRAIN["sequence"], inputs(6))


def test_a_bfloat16_model_routes_in_float32():
    given, config = inputs(7), TRAIN["sequence"]
    low_TD = jnp.asarray(given.x_TD, jnp.bfloat16)
    low, high = (route(config, given.router, {}, x_TD, context(given.mask_T))
                 for x_TD in (low_TD, low_TD.astype(jnp.float32)))
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_more_than_one_expert_a_token_is_refused():
    assert config_of("base", experts_per_token="auto").experts_per_token == 1
    with pytest.raises(UserError, match="config.moe.experts_per_token=2: .* set config.moe.experts_per_token=1"):
        config_of("base", experts_per_token=2)
    assert dataclasses.asdict(config_of("base", experts_per_token=1).options) == {"epsilon": 1e-3, "rounds": 500}
