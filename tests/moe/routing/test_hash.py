"""The family of hash layers: two hash functions, learned weights, and the hash that frequencies balance."""

from functools import partial

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from hypothesis import given as given_that
from hypothesis import settings
from hypothesis import strategies as st
from moe_reference import D, E, T, config_of, context, eager_route, inputs, matrix, route

from moejax.config import UserError
from moejax.moe.routing import ROUTERS
from moejax.moe.routing.hash import greedy_table, log_softplus

VOCABULARY = 1000
EVERY_ID = np.arange(VOCABULARY, dtype=np.int32)


def counts(config, ids_T=EVERY_ID, state=None):
    """Which experts ids go to: [ids, E]."""
    out = route(config, {}, state or {}, np.zeros((len(ids_T), 1), np.float32),
                context(np.ones(len(ids_T), bool), ids_T, sequences=1))
    return matrix(out.assignments, len(ids_T))[0]


def test_multi_hash_is_two_hash_functions_each_with_half_the_weight():
    config = config_of("multi_hash", experts_per_token="auto", route_scale=1.5)
    given = inputs(1)
    out = route(config, {}, {}, given.x_TD, context(given.mask_T, given.ids_T))
    count_TE, weight_TE = matrix(out.assignments)
    np.testing.assert_array_equal(count_TE, counts(config_of("hash"), given.ids_T) * given.mask_T[:, None])
    np.testing.assert_array_equal(count_TE.sum(1), 2 * given.mask_T)
    np.testing.assert_allclose(weight_TE, 0.75 * count_TE, rtol=1e-6)


# Learned weights.

WEIGHTED = {renormalize: config_of("hash_weights", experts_per_token=3, renormalize=renormalize)
            for renormalize in (True, False)}


def learned(config, logits_TE, count_TE):
    """sqrt(softplus(z)) at the chosen experts, over their sum if renormalised, times 1.5: [T, E]."""
    score_TE = np.sqrt(np.log1p(np.exp(logits_TE))) * count_TE
    if config.renormalize:
        score_TE = score_TE / np.maximum(score_TE.sum(1, keepdims=True), 1e-300)
    return 1.5 * score_TE


@pytest.mark.parametrize("renormalize", WEIGHTED)
def test_weights_are_the_learned_scores_of_the_hashed_experts_with_their_gradient(renormalize):
    given, config = inputs(2), WEIGHTED[renormalize]
    c_TE = np.random.default_rng(3).normal(size=(T, E))
    count_TE = counts(config_of("hash", experts_per_token=3), given.ids_T) * given.mask_T[:, None]
    w_DE = given.router["w_DE"].astype(np.float64)

    def weighed(w_DE):
        out = eager_route(config, {"w_DE": w_DE}, {}, given.x_TD, context(given.mask_T, given.ids_T))
        a = out.assignments
        return jnp.sum(jnp.where(a.valid_N, a.weight_N * jnp.asarray(c_TE, jnp.float32)[a.token_N, a.expert_N], 0)), out

    (_, out), gradient = jax.jit(jax.value_and_grad(weighed, has_aux=True))(given.router["w_DE"])
    weight_TE = learned(config, reference.logits(given.x_TD, w_DE), count_TE)
    np.testing.assert_array_equal(matrix(out.assignments)[0], count_TE)
    np.testing.assert_allclose(matrix(out.assignments)[1], weight_TE, rtol=2e-6)
    share_TE = weight_TE[given.mask_T] / weight_TE[given.mask_T].sum(1, keepdims=True)
    entropy = -np.sum(share_TE[share_TE > 0] * np.log(share_TE[share_TE > 0]))
    np.testing.assert_allclose(out.entropy, entropy, rtol=1e-5)
    assert (out.losses, out.statistics) == ({}, {})

    def total(w_DE):
        return np.sum(c_TE * learned(config, reference.logits(given.x_TD, w_DE), count_TE))

    steps = 1e-6 * np.eye(w_DE.size).reshape(-1, *w_DE.shape)
    want = np.array([(total(w_DE + step) - total(w_DE - step)) / 2e-6 for step in steps]).reshape(w_DE.shape)
    reference.assert_close(gradient, want)


def test_the_logarithm_of_softplus_holds_at_any_logit():
    z = np.array([-1e4, -100, -20.1, -20, -19.9, -5, 0, 5, 60, 1e4], np.float32)
    want = [n if n < -30 else np.log(np.logaddexp(np.float64(n), 0)) for n in z]
    slope = [1 if n < -30 else 1 / (1 + np.exp(-np.float64(n))) / np.logaddexp(np.float64(n), 0) for n in z]
    np.testing.assert_allclose(log_softplus(z), want, rtol=2e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(log_softplus))(z), slope, rtol=2e-6)


@pytest.mark.parametrize("renormalize", WEIGHTED)
@pytest.mark.parametrize("size", [60.0, 1e4])
def test_extreme_logits_give_finite_weights_and_gradients(renormalize, size):
    given, config = inputs(4), WEIGHTED[renormalize]
    x_TD = size * np.random.default_rng(5).choice([-1.0, 0.0, 1.0], (T, E)).astype(np.float32)

    @jax.jit
    def total(w_DE, x_TD, mask_T):
        def of(w_DE, x_TD):
            out = eager_route(config, {"w_DE": w_DE}, {}, x_TD, context(mask_T, given.ids_T))
            return jnp.sum(jnp.where(out.assignments.valid_N, out.assignments.weight_N, 0)), out
        return jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(w_DE, x_TD)

    for mask_T in (np.ones(T, bool), np.zeros(T, bool)):
        (_, out), gradients = total(np.eye(E, dtype=np.float32), x_TD, mask_T)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradients)))
        if renormalize:
            np.testing.assert_allclose(matrix(out.assignments)[1].sum(1), 1.5 * mask_T, rtol=1e-5)
    assert not np.any(gradients[0])


def test_one_renormalised_choice_is_refused_because_nothing_would_be_learned():
    with pytest.raises(UserError, match="config.moe.renormalize=True with config.moe.experts_per_token=1"):
        config_of("hash_weights", experts_per_token=1)
    given, config = inputs(6), config_of("hash_weights", experts_per_token=1, renormalize=False)
    logits_TE = reference.logits(given.x_TD, given.router["w_DE"])
    count_TE, weight_TE = matrix(route(config, given.router, {}, given.x_TD, context(given.mask_T, given.ids_T))
                                 .assignments)
    np.testing.assert_allclose(weight_TE, learned(config, logits_TE, count_TE), rtol=2e-6)


# The balanced hash.

BALANCED = config_of("hash_balanced", experts_per_token=1, route_scale=1.5, options={"count_steps": 2})
update = jax.jit(partial(ROUTERS["hash_balanced"].update, BALANCED))
table = jax.jit(greedy_table, static_argnums=2)


def first_state(config=BALANCED):
    return ROUTERS["hash_balanced"].initial_state(config, VOCABULARY)


def greedy(count_V, table_V, experts):
    """Ids by falling frequency, each to the expert with the least load so far; those never seen keep theirs."""
    load, table_V = [0] * experts, np.array(table_V)
    for v in sorted(range(len(count_V)), key=lambda v: -count_V[v]):
        if count_V[v] > 0:
            table_V[v] = load.index(min(load))
            load[table_V[v]] += count_V[v]
    return table_V


def zipf(seed, tokens=600):
    """Ids of which some are very frequent and others never come."""
    return (np.random.default_rng(seed).zipf(1.3, tokens) % VOCABULARY).astype(np.int32)


def counted(ids_T, mask_T=None, state=None):
    mask_T = np.ones(len(ids_T), bool) if mask_T is None else mask_T
    out = route(BALANCED, {}, state or first_state(), np.zeros((len(ids_T), 1), np.float32),
                context(mask_T, ids_T, sequences=2))
    return out.statistics


def test_ids_go_by_the_hash_until_they_are_counted_and_then_by_the_greedy_table_for_good():
    state, count_V = first_state(), np.zeros(VOCABULARY, int)
    by_hash = counts(config_of("hash", experts_per_token=1))
    for step in range(2):
        np.testing.assert_array_equal(counts(BALANCED, state=state), by_hash)
        count_V += np.bincount(zipf(step), minlength=VOCABULARY)
        state = update(state, counted(zipf(step), state=state))
        np.testing.assert_array_equal(state["count_V"], count_V)
    want_V = greedy(count_V, first_state()["table_V"], E)
    np.testing.assert_array_equal(state["table_V"], want_V)
    np.testing.assert_array_equal(counts(BALANCED, state=state), np.eye(E)[want_V])
    assert (want_V != by_hash.argmax(1)).any()
    load = [count_V @ table_VE for table_VE in (by_hash, np.eye(E)[want_V])]
    assert max(load[1]) / np.mean(load[1]) < max(load[0]) / np.mean(load[0]), "it balances what the hash does not"
    for step in range(2, 6):
        state = update(state, counted(zipf(step), state=state))
        np.testing.assert_array_equal(state["table_V"], want_V)
        np.testing.assert_array_equal(state["count_V"], count_V)
    assert {name: value.dtype for name, value in state.items()} == {"step": jnp.int32, "count_V": jnp.int32,
                                                                   "table_V": jnp.int32}


@given_that(st.lists(st.integers(0, 30), min_size=20, max_size=20))
@settings(max_examples=60, deadline=None)
def test_the_table_is_the_greedy_one_and_loads_differ_by_at_most_one_id(counts_V):
    count_V, before_V = np.array(counts_V, np.int32), np.arange(20, dtype=np.int32) % 4
    table_V = np.asarray(table(count_V, before_V, 4))
    np.testing.assert_array_equal(table_V, greedy(count_V, before_V, 4))
    load_E = np.bincount(table_V, weights=count_V, minlength=4)
    if count_V.any():
        rarest_of_fullest = count_V[(table_V == load_E.argmax()) & (count_V > 0)].min()
        assert load_E.max() - load_E.min() <= rarest_of_fullest
    np.testing.assert_array_equal(table_V[count_V == 0], before_V[count_V == 0])


def test_counts_are_of_real_tokens_and_add_up_over_micro_batches():
    ids_T, mask_T = zipf(7, 40), np.random.default_rng(8).random(40) < 0.6
    padded_T = np.where(mask_T, ids_T, np.resize([-1, VOCABULARY, 2**31 - 1, 3], 40)).astype(np.int32)
    whole_V = counted(padded_T, mask_T)["count_V"]
    np.testing.assert_array_equal(whole_V, np.bincount(ids_T[mask_T], minlength=VOCABULARY))
    halves = [counted(padded_T[part], mask_T[part])["count_V"] for part in (slice(20), slice(20, 40))]
    np.testing.assert_array_equal(halves[0] + halves[1], whole_V)
    out = route(BALANCED, {}, first_state(), np.zeros((40, 1), np.float32), context(mask_T, padded_T, sequences=2))
    count_TE, weight_TE = matrix(out.assignments, 40)
    assert ((out.assignments.expert_N >= 0) & (out.assignments.expert_N < E)).all(), "padding names experts, too"
    want_TE = counts(config_of("hash", experts_per_token=1), ids_T) * mask_T[:, None]
    np.testing.assert_array_equal(count_TE, want_TE)
    np.testing.assert_allclose(weight_TE, 1.5 * want_TE, rtol=1e-6)
    assert (out.losses, float(out.entropy)) == ({}, 0)


def test_layers_together_are_updated_like_each_alone_and_tables_are_built_in_one_step_only():
    states = [dict(first_state(), step=jnp.int32(step)) for step in (0, 1, 2)]
    seen = [counted(zipf(seed)) for seed in (9, 10, 11)]
    stack = partial(jax.tree.map, lambda *layers: jnp.stack(layers))
    together = jax.vmap(partial(ROUTERS["hash_balanced"].update, BALANCED))
    after = jax.jit(together)(stack(*states), stack(*seen))
    alone = stack(*(update(state, own) for state, own in zip(states, seen, strict=True)))
    jax.tree.map(np.testing.assert_array_equal, after, alone)
    changed = np.any(after["table_V"] != stack(*states)["table_V"], axis=1)
    np.testing.assert_array_equal(changed, [False, True, False])
    steps = {step.params.get("name", step.primitive.name)
             for step in jax.make_jaxpr(together)(stack(*states), stack(*seen)).eqns}
    assert "while" in steps and not steps & {"argsort", "sort", "scan"}, "the table is built within the branch alone"


def test_the_balanced_hash_gives_an_id_one_expert_and_needs_no_more_than_one():
    with pytest.raises(UserError, match="config.moe.experts_per_token=2: .* or config.moe.router=multi_hash"):
        config_of("hash_balanced", experts_per_token=2)
    config = config_of("hash_balanced", experts_per_token="auto", num_experts=1)
    state = ROUTERS["hash_balanced"].update(config, first_state(config), {"count_V": np.ones(VOCABULARY, np.int32)})
    assert (config.experts_per_token, config.options.count_steps, np.max(state["table_V"])) == (1, 20, 0)


@pytest.mark.parametrize("router", ["multi_hash", "hash_weights", "hash_balanced"])
def test_routing_reads_the_id_alone_and_only_weights_may_read_the_token(router):
    given, other = inputs(12), inputs(13)
    config = config_of(router, experts_per_token="auto")
    state = ROUTERS[router].initial_state(config, VOCABULARY)
    order = np.random.default_rng(14).permutation(T)
    one = route(config, given.router, state, given.x_TD, context(given.mask_T, given.ids_T))
    two = route(config, other.router, state, other.x_TD[order], context(given.mask_T[order], given.ids_T[order]))
    np.testing.assert_array_equal(matrix(two.assignments)[0], matrix(one.assignments)[0][order])
    assert ROUTERS[router].needs_token_ids and ROUTERS[router].causal
    assert set(ROUTERS[router].parameters(config, D)) == ({"w_DE"} if router == "hash_weights" else set())
