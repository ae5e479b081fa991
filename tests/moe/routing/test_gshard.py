"""GShard top-2 against the paper's algorithm, token by token, and its laws.

Most tests run op by op on arrays of one shape: the few ops compile once for all configs.
"""

import math

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import B, D, E, T, config_of, context, eager_route, inputs, matrix

from moejax.config import UserError
from moejax.moe.layer import drop
from moejax.moe.routing import ROUTERS, leak
from moejax.moe.types import Totals

SECOND = {second: config_of("gshard", options={"second": second})
          for second in ("proportional", "threshold", "sampled", "always")}
every_reading = pytest.mark.parametrize("config", SECOND.values(), ids=SECOND)
KEY = jax.random.key(3)


def choose(config, router, x_TD, mask_T, train=True, key=KEY, **more):
    return eager_route(config, router, {}, x_TD, context(mask_T, train=train, key=key if train else None, **more))


def parts(assignments):
    """Expert, weight and validity, [T, 2] each."""
    return (np.asarray(a).reshape(-1, 2) for a in (assignments.expert_N, assignments.weight_N, assignments.valid_N))


def gates(logits_E, second=None):
    """Best expert, second (the true one, or the one given), and their shares g1 and g2 of the two probabilities."""
    p = reference.softmax(logits_E)
    first = int(np.argmax(logits_E))
    if second is None:
        second = max((e for e in range(len(p)) if e != first), key=lambda e: logits_E[e])
    return first, second, p[first] / (p[first] + p[second]), p[second] / (p[first] + p[second])


@pytest.mark.parametrize("train", [True, False])
@every_reading
def test_choices_weights_and_statistics_equal_the_formula(config, train):
    """Only whether the second is kept, and the one that is sampled, is random: these have a test of their own."""
    given = inputs(1)
    x_TD = 2 * given.x_TD
    out = choose(config, given.router, x_TD, given.mask_T, train)
    expert_TK, weight_TK, valid_TK = parts(out.assignments)
    logits_TE, first_E, seconds = reference.logits(x_TD, given.router["w_DE"]), np.zeros(E, int), set()
    for t in range(T):
        drawn = config.options.second == "sampled" and train
        first, second, g1, g2 = gates(logits_TE[t], expert_TK[t, 1] if drawn else None)
        assert tuple(expert_TK[t]) == (first, second) and first != second
        assert valid_TK[t, 0] == given.mask_T[t]
        if given.mask_T[t]:
            first_E[first] += 1
            seconds.add(bool(valid_TK[t, 1]))
            np.testing.assert_allclose(weight_TK[t], [g1, g2 * valid_TK[t, 1]], rtol=1e-5)
        else:
            assert not valid_TK[t].any() and not weight_TK[t].any()
    may_leave_out = train and config.options.second in ("proportional", "threshold")
    assert seconds == ({True, False} if may_leave_out else {True})
    np.testing.assert_array_equal(out.statistics["first_E"], first_E)
    p_TE = reference.softmax(logits_TE)
    np.testing.assert_allclose(out.entropy, -np.sum((p_TE * np.log(p_TE))[given.mask_T]), rtol=1e-5)


@pytest.mark.parametrize("scope, groups", [("sequence", B), ("global", 1)])
def test_the_load_balancing_loss_counts_first_choices_alone(scope, groups):
    given, config = inputs(2), config_of("gshard", balance_scope=scope)
    out = choose(config, given.router, given.x_TD, given.mask_T)
    logits_TE = reference.logits(given.x_TD, given.router["w_DE"])
    first_TE = np.eye(E)[np.argmax(logits_TE, axis=1)] * given.mask_T[:, None]
    want = reference.balance_loss(logits_TE, first_TE, given.mask_T, "softmax", groups)
    np.testing.assert_allclose(out.losses["balance"], want, rtol=1e-5)
    np.testing.assert_allclose(out.losses["router_z"], reference.z_loss(logits_TE, given.mask_T), rtol=1e-5)
    assert set(out.losses) == set(ROUTERS["gshard"].loss_weights(config))


@pytest.mark.parametrize("config, certain", [
    (SECOND["proportional"], 0.5), (SECOND["threshold"], 0.2),
    (config_of("gshard", options={"second": "threshold", "threshold": 0.0}), 0.0), (SECOND["always"], 0.0)])
def test_the_second_is_kept_with_the_published_probability(config, certain):
    """P = min(1, g2 / certain), where certain is 1/2 for 2 g2 > U. Many keys, one batch."""
    given, keys = inputs(3), 4000
    logits_TE = reference.logits(given.x_TD, given.router["w_DE"])
    g2_T = np.array([gates(logits_E)[3] for logits_E in logits_TE])
    one = context(np.ones(T, bool), key=KEY)

    @jax.jit
    def frequency(keys):
        def kept(key):
            a = eager_route(config, given.router, {}, given.x_TD, one.replace(key=key)).assignments
            return a.valid_N.reshape(T, 2)
        return jnp.mean(jax.vmap(kept)(keys), axis=0)

    share_TK = frequency(jax.random.split(KEY, keys))
    want_T = np.minimum(1, g2_T / certain) if certain else np.ones(T)
    np.testing.assert_array_equal(share_TK[:, 0], 1)
    assert (np.abs(share_TK[:, 1] - want_T) <= 4.5 * np.sqrt(want_T * (1 - want_T) / keys) + 1e-6).all()
    assert certain == 0 or want_T.min() < 0.5


def test_the_sampled_second_follows_the_softmax_over_the_others():
    """All readings keep it; torchscale draws it with Gumbel noise, which is a draw from the probabilities of the rest."""
    given, keys = inputs(4), 4000
    one, p_TE = context(np.ones(T, bool), key=KEY), reference.softmax(reference.logits(given.x_TD, given.router["w_DE"]))

    @jax.jit
    def frequency(keys):
        def second(key):
            a = eager_route(SECOND["sampled"], given.router, {}, given.x_TD, one.replace(key=key)).assignments
            return a.expert_N.reshape(T, 2)[:, 1:] == jnp.arange(E), jnp.all(a.valid_N)
        shares, valid = jax.vmap(second)(keys)
        return jnp.mean(shares, axis=0), jnp.all(valid)

    share_TE, all_kept = frequency(jax.random.split(KEY, keys))
    first_TE = np.eye(E, dtype=bool)[np.argmax(p_TE, axis=1)]
    rest_TE = np.where(first_TE, 0, p_TE)
    want_TE = rest_TE / rest_TE.sum(1, keepdims=True)
    assert all_kept and not share_TE[first_TE].any()
    assert (np.abs(share_TE - want_TE) <= 4.5 * np.sqrt(want_TE * (1 - want_TE) / keys) + 1 / keys).all()


def test_evaluation_takes_both_experts_whatever_the_reading():
    given = inputs(5)
    outs = [choose(config, given.router, given.x_TD, given.mask_T, train=False) for config in SECOND.values()]
    count_TE, weight_TE = matrix(outs[0].assignments)
    np.testing.assert_array_equal(count_TE.sum(1), 2 * given.mask_T)
    np.testing.assert_allclose(weight_TE.sum(1), given.mask_T, rtol=1e-6)
    for out in outs[1:]:
        jax.tree.map(np.testing.assert_array_equal, outs[0], out)
    assert [ROUTERS["gshard"].noisy(config) for config in SECOND.values()] == [True, True, True, False]


@pytest.mark.parametrize("second", ["proportional", "sampled"])
def test_gradient_of_weights_and_losses_is_that_of_the_formula_and_none_comes_through_what_is_left_out(second):
    given, config = inputs(6), SECOND[second]
    c_TK = np.random.default_rng(0).normal(size=(T, 2))
    expert_TK, _, valid_TK = parts(choose(config, given.router, given.x_TD, given.mask_T).assignments)
    real, first_TE = np.flatnonzero(given.mask_T), np.eye(E)[expert_TK[:, 0]] * given.mask_T[:, None]
    assert second != "proportional" or not valid_TK[real].all()

    def wanted(w_DE, x_TD):
        logits_TE = reference.logits(x_TD, w_DE)
        weighed = sum(c_TK[t] * valid_TK[t] @ gates(logits_TE[t], expert_TK[t, 1])[2:] for t in real)
        return (weighed + reference.balance_loss(logits_TE, first_TE, given.mask_T, "softmax", 1)
                + reference.z_loss(logits_TE, given.mask_T))

    def told(w_DE, x_TD):
        out = choose(config, {"w_DE": w_DE}, x_TD, given.mask_T)
        return jnp.sum(out.assignments.weight_N * jnp.float32(c_TK).reshape(-1)) + sum(out.losses.values())

    arrays = (given.router["w_DE"], given.x_TD)
    gradients = jax.grad(told, argnums=(0, 1))(*arrays)
    np.testing.assert_array_equal(gradients[1][~given.mask_T], 0)
    for seed in range(8):
        along = [np.random.default_rng(seed).normal(size=a.shape) for a in arrays]
        ahead, behind = ([a + step * v for a, v in zip(arrays, along)] for step in (1e-6, -1e-6))
        summands = [np.float64(g) * v for g, v in zip(gradients, along)]
        size = np.sqrt(sum(np.sum(s**2) for s in summands))
        assert abs(sum(map(np.sum, summands)) - (wanted(*ahead) - wanted(*behind)) / 2e-6) < 1e-4 * size


def test_the_shares_of_micro_batches_add_up_to_the_big_batch():
    """The parts hold the same tokens with masks that complement each other; their noise has no part in the losses."""
    given, late_T = inputs(7), np.arange(T) > T // 3
    totals = Totals(jnp.float32(given.mask_T.sum()), jnp.float32(3))

    def evaluate(mask_T, key, whole=None):
        def losses(w_DE):
            out = choose(SECOND["proportional"], {"w_DE": w_DE}, given.x_TD, mask_T, key=key, whole=whole, totals=totals)
            return sum(out.losses.values()), (out.losses, out.entropy, out.statistics)
        return jax.value_and_grad(losses, has_aux=True)(given.router["w_DE"])

    whole = evaluate(given.mask_T, KEY)
    halves = [evaluate(given.mask_T & half, jax.random.key(seed), whole[0][1][2])
              for seed, half in enumerate((late_T, ~late_T))]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(b + c, a, rtol=1e-5, atol=1e-7), whole, *halves)


@every_reading
def test_extreme_logits_and_padding_of_any_content_are_harmless(config):
    """Sixty, ten thousand, all equal, one hot expert, and a batch of nothing but padding."""
    def told(w_DE, x_TD, mask_T):
        out = choose(config, {"w_DE": w_DE}, x_TD, mask_T)
        return (jnp.sum(out.assignments.weight_N**2) + sum(out.losses.values()),
                (out.assignments.weight_N, out.losses, out.entropy, out.statistics))

    evaluate, w_DE = jax.value_and_grad(told, argnums=(0, 1), has_aux=True), np.zeros((D, E), np.float32)
    w_DE[0] = np.resize([1, -1, 0], E)
    everything, x_TD = np.ones(T, bool), np.zeros((T, D), np.float32)
    for x, mask_T in ((np.resize([1e4, -1e4, 60, -60, 1], T), everything), (np.full(T, 1e4), everything),
                      (np.zeros(T), everything), (np.ones(T), ~everything)):
        x_TD[:, 0] = x
        out = evaluate(w_DE, x_TD, mask_T)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
        assert mask_T.any() or all(not np.any(leaf) for leaf in jax.tree.leaves(out))
    given = inputs(8)
    junk_TD = np.where(given.mask_T[:, None], given.x_TD, 1e15 * inputs(9).x_TD)
    one, other = (evaluate(given.router["w_DE"], x_TD, given.mask_T) for x_TD in (given.x_TD, junk_TD))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_extreme_logits_are_chosen_and_weighed_as_the_formula_says_and_ties_go_by_the_tokens_id():
    rng, eye = np.random.default_rng(8), {"w_DE": np.eye(E, dtype=np.float32)}
    for size in (60, 1e4):
        x_TE = (size * rng.choice([-1, 1, 0.5, -0.25], size=(T, E)) + rng.normal(size=(T, E))).astype(np.float32)
        expert_TK, weight_TK, _ = parts(choose(SECOND["always"], eye, x_TE, np.ones(T, bool)).assignments)
        for t in range(T):
            first, second, g1, g2 = gates(np.float64(x_TE[t]))
            assert tuple(expert_TK[t]) == (first, second)
            np.testing.assert_allclose(weight_TK[t], (g1, g2), rtol=1e-3, atol=1e-30)
    ids_T = np.resize([3, 8, 5, 11, 6, 2], T)
    out = choose(SECOND["proportional"], eye, np.zeros((T, E), np.float32), np.ones(T, bool), ids_T=ids_T)
    expert_TK, weight_TK, valid_TK = parts(out.assignments)
    assert valid_TK.all() and (weight_TK == 0.5).all(), "2 g2 = 1, so the second is certain"
    np.testing.assert_array_equal(expert_TK[:6], expert_TK[6:12])
    assert len(set(expert_TK[:, 0])) > 2


def test_no_expert_gives_a_place_to_a_second_choice_that_a_first_one_lacks():
    given, config = inputs(10), config_of("gshard", capacity_factor=0.6)
    whole = context(given.mask_T, key=KEY)
    chosen = eager_route(config, given.router, {}, given.x_TD, whole).assignments
    kept_TK = np.asarray(jax.jit(drop, static_argnums=0)(config, chosen, whole).valid_N).reshape(B, -1, 2)
    expert_TK, _, valid_TK = (a.reshape(B, -1, 2) for a in parts(chosen))
    lost, seconds = 0, 0
    for b in range(B):
        for e in range(E):
            dropped_first = np.sum((expert_TK[b, :, 0] == e) & valid_TK[b, :, 0] & ~kept_TK[b, :, 0])
            kept_second = np.sum((expert_TK[b, :, 1] == e) & kept_TK[b, :, 1])
            assert not (dropped_first and kept_second)
            lost, seconds = lost + dropped_first, seconds + kept_second
            room = math.ceil(0.6 * 2 * given.mask_T.reshape(B, -1)[b].sum() / E)
            assert np.sum((expert_TK[b] == e) & kept_TK[b]) <= room
    assert lost and seconds
    assert "drop_policy=choice_major" in leak(config)


def test_other_numbers_of_experts_per_token_are_refused():
    for experts, choices in ((E, 1), (E, 3), (1, 1)):
        with pytest.raises(UserError, match="set experts_per_token=2, or take router=topk"):
            config_of("gshard", num_experts=experts, experts_per_token=choices)
    two = config_of("gshard", num_experts=2, options={"second": "sampled"})
    given = inputs(11, experts=2)
    expert_TK, _, _ = parts(choose(two, given.router, given.x_TD, given.mask_T).assignments)
    np.testing.assert_array_equal(np.sort(expert_TK, axis=1), [[0, 1]] * T)
