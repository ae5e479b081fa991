"""Laws of capacity: how much room there is, who gets it, and what becomes of the others."""

from fractions import Fraction
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from hypothesis import strategies
from moe_reference import B, E, K, T, assignments_of, config_of, context, inputs, listed

from moejax.moe import capacity
from moejax.moe.layer import drop, mixture

POLICIES = ("choice_major", "token_major", "token_weight", "weight")
every_policy = pytest.mark.parametrize("policy", POLICIES)
seeds = hypothesis.given(strategies.integers(0, 2**32 - 1))
settings = hypothesis.settings(max_examples=15, deadline=None)


@partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def limit(assignments, mask_T, factor, policy, groups, experts, per_token):
    """Keeps what a capacity factor leaves room for."""
    places_G = capacity.places(mask_T, factor, groups, experts, per_token)
    return capacity.limit(assignments, places_G, policy, experts)


drop_some = jax.jit(drop, static_argnums=0)
sparse_layer = jax.jit(mixture, static_argnums=0)


def lists(seed, popularity=0.0):
    """A random token-major list and mask; the larger the popularity, the more tokens want the first experts."""
    rng = np.random.default_rng(seed)
    expert_TK = np.argsort(rng.normal(size=(T, E)) + popularity * np.arange(E), axis=1)[:, :K]
    # Weights in steps, so that some are equal and the order of the list has to decide.
    weight_TK = -np.sort(-rng.integers(1, 9, (T, K)), axis=1) / 8
    mask_T = rng.random(T) < 0.8
    return expert_TK, weight_TK, mask_T, assignments_of(expert_TK, weight_TK, np.repeat(mask_T[:, None], K, 1))


def kept_of(assignments):
    return np.asarray(assignments.valid_N).reshape(T, K)


@pytest.mark.parametrize("factor, choices, tokens, experts, room", [
    (1.0, 1, 12, 4, 3), (1.0, 2, 12, 4, 6), (1.25, 1, 12, 4, 4), (1.25, 2, 64, 8, 20), (2.0, 1, 10, 8, 3),
    (0.5, 1, 12, 4, 2), (0.25, 1, 4, 4, 1), (1.0, 1, 13, 4, 4), (1.1, 1, 10, 1, 10), (1.1, 1, 40, 4, 11),
    (1.2, 2, 25, 6, 10), (0.0, 2, 12, 4, 0), (100.0, 1, 12, 4, 12), (1.25, 2, 36, 6, 15), (1.0, 1, 180, 60, 3),
    (0.75, 8, 10, 60, 1), (1.2, 1, 100, 8, 15)])
def test_room_is_the_ceiling_of_factor_times_pairs_over_experts(factor, choices, tokens, experts, room):
    """All tokens want the same experts, so the table's number is what is kept of each."""
    expert_TK = np.tile(np.arange(choices), (tokens, 1))
    wanted = assignments_of(expert_TK, np.ones((tokens, choices)), np.ones((tokens, choices), bool))
    valid_N = limit(wanted, np.ones(tokens, bool), factor, "choice_major", 1, experts, choices).valid_N
    np.testing.assert_array_equal(np.asarray(valid_N).reshape(tokens, choices).sum(0), room)


@every_policy
@pytest.mark.parametrize("groups", [1, B])
@settings
@seeds
def test_who_is_kept_equals_filling_the_experts_one_pair_at_a_time(policy, groups, seed):
    expert_TK, weight_TK, mask_T, wanted = lists(seed, popularity=0.3)
    got = limit(wanted, mask_T, 0.75, policy, groups, E, K)
    want_TK = reference.keep(expert_TK, weight_TK, mask_T, 0.75, policy, groups, E)
    np.testing.assert_array_equal(kept_of(got), want_TK)
    for field in ("token_N", "expert_N", "weight_N"):
        np.testing.assert_array_equal(getattr(got, field), getattr(wanted, field))
    assert (got.choices, got.local) == (wanted.choices, wanted.local)


@every_policy
@settings
@seeds
def test_no_group_overfills_an_expert_and_none_drops_a_pair_while_there_is_room(policy, seed):
    expert_TK, _, mask_T, wanted = lists(seed, popularity=1.0)
    kept_TK = kept_of(limit(wanted, mask_T, 0.75, policy, B, E, K))
    assert not (kept_TK & ~mask_T[:, None]).any()
    for tokens in np.split(np.arange(T), B):
        room = reference.capacity(0.75, K, mask_T[tokens].sum(), E)
        for e in range(E):
            asked = (expert_TK[tokens] == e) & mask_T[tokens][:, None]
            assert (asked & kept_TK[tokens]).sum() == min(asked.sum(), room)


@settings
@seeds
def test_each_policy_keeps_its_promise(seed):
    expert_TK, weight_TK, mask_T, wanted = lists(seed, popularity=1.0)
    kept = {policy: kept_of(limit(wanted, mask_T, 0.75, policy, 1, E, K)) for policy in POLICIES}
    order_TK = np.arange(T * K).reshape(T, K)
    for e in range(E):
        asked = (expert_TK == e) & mask_T[:, None]
        first, second = (asked & (np.arange(K) == k) for k in (0, 1))
        rule = kept["choice_major"]
        assert (first <= rule).all() or not (second & rule).any(), "no second choice while a first choice is dropped"
        last_kept, dropped = order_TK[asked & kept["token_major"]], order_TK[asked & ~kept["token_major"]]
        assert not dropped.size or last_kept.max(initial=-1) < dropped.min(), "the earlier token comes first"
        rule = kept["weight"]
        assert weight_TK[asked & rule].min(initial=np.inf) >= weight_TK[asked & ~rule].max(initial=-np.inf)


def test_in_token_major_order_later_tokens_take_no_room_from_earlier_ones():
    expert_TK, _, _, _ = lists(1, popularity=1.0)
    everyone, half = np.ones(T, bool), T // 2
    other_TK = np.concatenate([expert_TK[:half], np.zeros((T - half, K), int)])
    kept = [kept_of(limit(assignments_of(e_TK, np.ones((T, K)), np.ones((T, K), bool)), everyone, 0.75, "token_major",
                          1, E, K)) for e_TK in (expert_TK, other_TK)]
    np.testing.assert_array_equal(kept[0][:half], kept[1][:half])


@every_policy
def test_padding_takes_no_room(policy):
    expert_TK, weight_TK, mask_T, wanted = lists(2, popularity=1.0)
    kept_TK = kept_of(limit(wanted, mask_T, 0.75, policy, 1, E, K))
    short = [a[mask_T] for a in (expert_TK, weight_TK, np.repeat(mask_T[:, None], K, 1))]
    alone = limit(assignments_of(*short), np.ones(mask_T.sum(), bool), 0.75, policy, 1, E, K)
    np.testing.assert_array_equal(kept_TK[mask_T], np.asarray(alone.valid_N).reshape(-1, K))
    assert 0 < kept_TK.sum() < K * mask_T.sum()


def test_weights_keep_their_gradient_through_a_limit():
    _, weight_TK, mask_T, wanted = lists(3)

    def total(weight_N):
        return jnp.sum(limit(wanted.replace(weight_N=weight_N), mask_T, 0.5, "weight", 1, E, K).weight_N**2)

    weight_N = weight_TK.reshape(-1).astype(np.float32)
    np.testing.assert_allclose(jax.grad(total)(weight_N), 2 * weight_N)


@pytest.mark.parametrize("train, key, other", [(True, "capacity_factor", "eval_capacity_factor"),
                                               (False, "eval_capacity_factor", "capacity_factor")])
def test_training_and_evaluation_have_each_their_own_capacity_and_none_is_infinite(train, key, other):
    _, _, mask_T, wanted = lists(4, popularity=1.0)
    for value, drops in ((0.5, True), (1000.0, False), (None, False)):
        got = drop_some(config_of(**{key: value, other: None if drops else 0.25}), wanted, context(mask_T, train=train))
        assert (np.asarray(got.valid_N) != wanted.valid_N).any() == drops
    free = wanted.replace(choices=0)
    assert drop(config_of(capacity_factor=0.5, eval_capacity_factor=0.5), free, context(mask_T, train=train)) is free


def test_with_sequences_as_groups_a_sequence_does_not_depend_on_its_neighbours():
    expert_TK, weight_TK, _, _ = lists(5, popularity=1.0)
    valid_TK, everyone = np.ones((T, K), bool), np.ones(T, bool)
    crowded_TK = expert_TK.copy()
    crowded_TK[T // B:] = np.arange(K)
    kept = {}
    for group in ("sequence", "global"):
        config = config_of(capacity_factor=0.75, routing_group=group, drop_policy="choice_major")
        kept[group] = [kept_of(drop_some(config, assignments_of(e_TK, weight_TK, valid_TK), context(everyone)))[:T // B]
                       for e_TK in (expert_TK, crowded_TK)]
    np.testing.assert_array_equal(*kept["sequence"])
    assert (kept["global"][0] != kept["global"][1]).any(), "in a global group they compete"


@pytest.mark.parametrize("policy, dispatch", [("choice_major", "dense"), ("token_major", "sort"), ("weight", "sort")])
def test_a_dropped_pair_adds_nothing_and_kept_and_dropped_make_all_pairs(policy, dispatch):
    """Losses and statistics are of the router's choices, before any dropping."""
    given = inputs(6)
    skewed = {"w_DE": given.router["w_DE"] + 3 * np.eye(1, E, dtype=np.float32)}
    x_TD = np.abs(given.x_TD)
    layer = (skewed, {}, given.w_in_ED2F, given.w_out_EFD, x_TD, context(given.mask_T), None)
    y_TD, record, *_ = sparse_layer(config_of(dispatch=dispatch, capacity_factor=0.5, drop_policy=policy), *layer)
    _, all_record, *_ = sparse_layer(config_of(), *layer)

    expert_TK, weight_TK = reference.topk(reference.logits(x_TD, skewed["w_DE"]), K, "softmax", True)
    kept_TK = reference.keep(expert_TK, weight_TK, given.mask_T, 0.5, policy, B, E)
    pairs = listed(assignments_of(expert_TK, weight_TK, kept_TK))
    want_TD, _ = reference.experts(x_TD, pairs, given.w_in_ED2F, given.w_out_EFD)
    reference.assert_close(y_TD, want_TD)
    lost = ~kept_TK.any(1)
    assert (lost & given.mask_T).any() and not np.any(np.asarray(y_TD)[lost])

    np.testing.assert_array_equal(record.load.received_E, np.bincount(expert_TK[kept_TK], minlength=E))
    np.testing.assert_array_equal(record.load.assigned_E, np.bincount(expert_TK[given.mask_T].ravel(), minlength=E))
    assert record.load.tokens == given.mask_T.sum() and record.load.assigned_E.sum() == K * given.mask_T.sum()
    np.testing.assert_array_equal(all_record.load.received_E, all_record.load.assigned_E)
    for part in ("losses", "statistics"):
        jax.tree.map(np.testing.assert_array_equal, getattr(record, part), getattr(all_record, part))


@pytest.mark.parametrize("factor", (0.0, 1e-320, 1e-9, 0.7, 1.25, 1.23456789, 3.00000001, 2.0**31, 1e30, 1e308))
@pytest.mark.parametrize("tokens", (1, 7, 70_000))
def test_places_of_any_factor_are_as_many_as_whole_numbers_say_or_all(factor, tokens):
    found = int(capacity.places(jnp.ones(tokens, bool), factor, 1, 8, 2)[0])
    exact = -(-tokens * Fraction(str(factor)) * 2 // 8)
    assert min(found, 2 * tokens) == pytest.approx(min(exact, 2 * tokens), abs=1 if tokens > 7 else 0)
