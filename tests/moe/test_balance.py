"""Laws of load-balancing losses, the router z-loss and the selection bias."""

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import B, D, E, K, T, assignments_of, config_of, context, eager_route, initial_state, inputs, route

from moejax.moe import balance
from moejax.moe.routing import ROUTERS

SHARDS = 2
SCOPES = {"sequence": B, "shard": SHARDS, "global": 1}
every_scope = pytest.mark.parametrize("scope", SCOPES)

balance_loss = jax.jit(balance.load_balancing_loss, static_argnums=3)


def chosen(rng, choices=K, mask_T=None):
    mask_T = np.ones(T, bool) if mask_T is None else mask_T
    expert_TK = np.argsort(rng.normal(size=(T, E)), axis=1)[:, :choices]
    return assignments_of(expert_TK, np.ones((T, choices)), np.repeat(mask_T[:, None], choices, 1))


def max_violation(count_E):
    """Largest load over the mean load, less 1."""
    return np.max(count_E) / np.mean(count_E) - 1


@every_scope
@pytest.mark.parametrize("empty_shard", [False, True])
def test_loss_equals_the_formula_over_the_groups_of_its_scope(scope, empty_shard):
    given = inputs(1)
    mask_T = given.mask_T & (np.arange(T) < T // SHARDS) if empty_shard else given.mask_T
    config = config_of(score="sigmoid", balance_scope=scope)
    out = route(config, given.router, {}, given.x_TD, context(mask_T, shards=SHARDS))
    logits_TE = reference.logits(given.x_TD, given.router["w_DE"])
    count_TE, _ = reference.topk_matrix(logits_TE, mask_T, K, "sigmoid", True)
    want = reference.balance_loss(logits_TE, count_TE, mask_T, "sigmoid", SCOPES[scope])
    np.testing.assert_allclose(out.losses["balance"], want, rtol=1e-6)


@every_scope
@pytest.mark.parametrize("choices", [1, 2, 3, E])
def test_loss_is_one_at_perfect_balance_for_every_k(scope, choices):
    """Both ways to be balanced: even counts with any probabilities, and even probabilities with any counts."""
    rng = np.random.default_rng(choices)
    tokens = B * E
    everything = context(np.ones(tokens, bool), shards=SHARDS)
    turns_TK = (np.arange(tokens)[:, None] + np.arange(choices)) % E
    even = assignments_of(turns_TK, np.ones((tokens, choices)), np.ones((tokens, choices), bool))
    random_TE = reference.softmax(rng.normal(size=(tokens, E))).astype(np.float32)
    np.testing.assert_allclose(balance_loss(random_TE, even, everything, scope), 1, rtol=1e-6)
    uniform_TE = np.full((T, E), 1 / E, np.float32)
    uneven = chosen(rng, choices)
    np.testing.assert_allclose(balance_loss(uniform_TE, uneven, context(np.ones(T, bool), shards=SHARDS), scope), 1,
                               rtol=1e-6)


@every_scope
def test_loss_is_the_number_of_experts_when_one_takes_all_and_never_more(scope):
    everything = context(np.ones(T, bool), shards=SHARDS)
    one = assignments_of(np.full((T, 1), 3), np.ones((T, 1)), np.ones((T, 1), bool))
    certain_TE = np.eye(E, dtype=np.float32)[np.full(T, 3)]
    np.testing.assert_allclose(balance_loss(certain_TE, one, everything, scope), E, rtol=1e-6)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        probs_TE = reference.softmax(4 * rng.normal(size=(T, E))).astype(np.float32)
        assert 0 < balance_loss(probs_TE, chosen(rng), everything, scope) <= E


def test_gradient_flows_through_the_probabilities_alone_and_is_e_f_over_tokens():
    given, rng = inputs(2), np.random.default_rng(0)
    assignments = chosen(rng, mask_T=given.mask_T)
    probs_TE = reference.softmax(rng.normal(size=(T, E))).astype(np.float32)
    gradient_TE = jax.grad(balance_loss)(probs_TE, assignments, context(given.mask_T), "global")
    f_E = reference.matrix(assignments)[0].sum(0) / (K * given.mask_T.sum())
    np.testing.assert_allclose(gradient_TE, given.mask_T[:, None] * E * f_E / given.mask_T.sum(), rtol=1e-6)


@pytest.mark.parametrize("start", ["collapsed", "zero"])
def test_collapse_costs_more_than_balance_and_the_gradient_lowers_the_overload(start):
    """A router that sends all to expert 0, and one that starts at zero so that every choice is a tie, recover."""
    rng = np.random.default_rng(0)
    x_TD = np.concatenate([np.ones((T * 8, 1)), rng.normal(size=(T * 8, D))], 1).astype(np.float32)
    w_DE = np.zeros((D + 1, E), np.float32)
    w_DE[0, 0] = 4.0 if start == "collapsed" else 0.0
    config = config_of(experts_per_token=1, renormalize=False)

    def loss(w_DE):
        out = eager_route(config, {"w_DE": w_DE}, {}, x_TD, context(np.ones(T * 8, bool)))
        return out.losses["balance"], out.statistics["assigned_E"]

    def step(w_DE, _):
        (value, count_E), gradient = jax.value_and_grad(loss, has_aux=True)(w_DE)
        return w_DE - gradient, (value, count_E, jnp.mean(jax.nn.softmax(x_TD @ w_DE)[:, 0]))

    _, (values, counts, probability) = jax.jit(lambda w: jax.lax.scan(step, w, length=200))(w_DE)
    assert counts[0, 0] == T * 8, "all tokens go to expert 0"
    assert values[0] > 6 if start == "collapsed" else values[0] == pytest.approx(1)
    assert probability[1] < probability[0], "a step takes from the overloaded expert"
    # Top-1 choices under plain descent swing around balance, so it is the mean over steps that is even.
    assert max_violation(np.mean(counts[100:], axis=0)) < 0.5
    assert np.mean(values[100:]) < 1.4


def test_z_loss_is_that_of_raw_logits_and_grows_with_a_shift_that_leaves_the_choice_alone():
    given = inputs(3)
    given = given._replace(x_TD=np.concatenate([given.x_TD, np.ones((T, 1), np.float32)], 1))
    chosen_before, weight_before = {}, {}
    for shift in (0.0, 2.0):
        w_DE = np.concatenate([given.router["w_DE"], np.full((1, E), shift, np.float32)])
        want = reference.z_loss(reference.logits(given.x_TD, w_DE), given.mask_T)
        for score in ("softmax", "sigmoid"):
            config = config_of(score=score, renormalize=False)
            out = route(config, {"w_DE": w_DE}, {}, given.x_TD, context(given.mask_T))
            np.testing.assert_allclose(out.losses["router_z"], want, rtol=1e-6)
            expert_N, weight_N = out.assignments.expert_N, out.assignments.weight_N
            np.testing.assert_array_equal(chosen_before.setdefault(score, expert_N), expert_N)
            if score == "softmax":
                np.testing.assert_allclose(weight_before.setdefault(score, weight_N), weight_N, rtol=1e-5)
    everything = context(np.ones(T, bool))
    np.testing.assert_allclose(balance.z_loss(jnp.zeros((T, E)), everything), np.log(E)**2, rtol=1e-6)


@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_the_shares_of_micro_batches_add_up_to_the_big_batch(scope):
    """Uneven parts: the last sequence is all padding. Losses, entropy and counts, and the gradient of the losses."""
    reference.assert_halves_add_up(config_of(balance_scope=scope), inputs(4))


def test_losses_of_64k_tokens_in_bfloat16_keep_their_precision():
    """Counts and sums of a long batch do not saturate as they would in bfloat16: even choices give 1 and (ln E)^2."""
    tokens, experts = 65536, 8
    x_TD = np.zeros((tokens, experts), np.float32)
    x_TD[np.arange(tokens), np.arange(tokens) % experts] = 1e-3
    out = route(config_of(num_experts=experts, experts_per_token=1, renormalize=False),
                {"w_DE": np.eye(experts, dtype=np.float32)}, {}, jnp.asarray(x_TD, jnp.bfloat16),
                context(np.ones(tokens, bool)))
    np.testing.assert_array_equal(out.statistics["assigned_E"], tokens // experts)
    np.testing.assert_allclose(out.losses["balance"], 1, rtol=1e-5)
    np.testing.assert_allclose(out.losses["router_z"], np.log(experts)**2, rtol=1e-3)
    np.testing.assert_allclose(out.entropy, tokens * np.log(experts), rtol=1e-5)


def test_counts_are_of_valid_pairs_by_group():
    rng = np.random.default_rng(6)
    assignments = chosen(rng, mask_T=rng.random(T) < 0.6)
    count_TE, _ = reference.matrix(assignments)
    for groups in SCOPES.values():
        np.testing.assert_array_equal(balance.count_per_expert(assignments, E, groups),
                                      count_TE.reshape(groups, -1, E).sum(1))


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_the_bias_moves_against_the_load_by_the_published_rule(rule):
    bias_E, count_E = np.linspace(-0.1, 0.2, E).astype(np.float32), np.array([9, 4, 0, 4, 1, 6, 4])
    error_E = count_E.mean() - count_E
    want_E = bias_E + 0.01 * (np.sign(error_E) if rule == "sign" else error_E / count_E.mean())
    config = config_of(bias_rate=0.01, bias_rule=rule)
    moved = ROUTERS["topk"].update(config, {"bias_E": bias_E}, {"assigned_E": jnp.asarray(count_E)})
    assert moved["bias_E"].dtype == jnp.float32
    np.testing.assert_allclose(moved["bias_E"], want_E, rtol=1e-5)
    still = ROUTERS["topk"].update(config, {"bias_E": bias_E}, {"assigned_E": jnp.full(E, 5)})
    np.testing.assert_array_equal(still["bias_E"], bias_E)
    none = ROUTERS["topk"].update(config, {"bias_E": bias_E}, {"assigned_E": jnp.zeros(E, jnp.int32)})
    np.testing.assert_array_equal(none["bias_E"], bias_E)


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_on_frozen_scores_the_bias_balances_the_load(rule):
    rng = np.random.default_rng(7)
    tokens = 64 * B
    w_DE = rng.normal(size=(D, E)).astype(np.float32)
    x_TD = (rng.normal(size=(tokens, D)) + 0.8).astype(np.float32)
    config = config_of(score="sigmoid", bias_rate=0.01, bias_rule=rule)

    def step(state, _):
        out = eager_route(config, {"w_DE": w_DE}, state, x_TD, context(np.ones(tokens, bool)))
        return ROUTERS["topk"].update(config, state, out.statistics), out.statistics["assigned_E"]

    state, counts = jax.jit(lambda s: jax.lax.scan(step, s, length=200))(initial_state(config))
    assert np.all(np.sum(counts, axis=1) == K * tokens)
    assert max_violation(counts[0]) > 0.8 and max_violation(counts[-1]) < 0.2
    assert np.abs(state["bias_E"]).max() > 0.05


def test_a_router_without_bias_has_no_state_and_the_update_invents_none():
    assert initial_state(config_of()) == {}
    assert ROUTERS["topk"].update(config_of(), {}, {"assigned_E": jnp.ones(E)}) == {}
    np.testing.assert_array_equal(initial_state(config_of(bias_rate=0.1))["bias_E"], np.zeros(E))


def test_each_loss_has_a_weight_from_the_config():
    config = config_of(balance_weight=0.25, z_weight=0.5)
    assert ROUTERS["topk"].loss_weights(config) == {"balance": 0.25, "router_z": 0.5}
    assert ROUTERS["expert_choice"].loss_weights(config_of("expert_choice", z_weight=0.5)) == {"router_z": 0.5}
    assert ROUTERS["hash"].loss_weights(config_of("hash")) == {}
