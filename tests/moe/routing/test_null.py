"""Zero, copy and constant experts, token by token from the papers, and the laws of AdaMoE, MoE++ and LongCat-Flash."""

import dataclasses

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import B, D, E, K, T, config_of, context, eager_route, inputs, matrix, route

from moejax.config import UserError
from moejax.moe.routing import ROUTERS, null
from moejax.moe.types import Totals

MIXED = {"zero": 2, "copy": 2, "constant": 2, "tau": 0.5, "gating_residual": True}
CONFIGS = {
    "adamoe": config_of("adamoe", experts_per_token=4),
    "moe_pp": config_of("moe_pp"),
    "moe_pp code": config_of("moe_pp", renormalize=True, experts_per_token=3, options={"zero": 2}),
    "longcat": config_of("longcat", experts_per_token=4),
    "mixed": config_of("longcat", experts_per_token=4, renormalize=True, score="sigmoid", route_scale=2.5, options=MIXED,
                       balance_scope="sequence", balance_weight=0.1),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def drawn(config, seed=0):
    """Random parameters, state, and logits of the layer before, [T, E + Z]."""
    rng, router = np.random.default_rng(seed), ROUTERS[config.router]
    parameters = {name: (own.mean + 2 * own.stddev * rng.normal(size=own.shape)).astype(np.float32)
                  for name, own in router.parameters(config, D).items()}
    state = {name: jnp.asarray(0.1 * rng.normal(size=value.shape), jnp.float32)
             for name, value in reference.initial_state(config).items()}
    carry_TC = rng.normal(size=(T, router.carry(config))).astype(np.float32) if router.carry(config) else None
    return parameters, state, carry_TC


def formula(config, parameters, bias_E, carry_TC, x_TD, mask_T):
    """Counts and weights [T, E + Z], what special experts add [T, D], the logits, and the load-balancing loss."""
    o, choices = config.options, config.experts_per_token
    kinds = ["real"] * config.num_experts + ["zero"] * o.zero + ["copy"] * o.copy + ["constant"] * o.constant
    first = len(kinds) - o.constant
    logits_TE = x_TD @ parameters["w_DE"]
    if o.gating_residual and carry_TC is not None:
        logits_TE = logits_TE + carry_TC @ parameters["residual_EE"]
    score_TE = reference.scores(logits_TE, config.score)
    count_TE, weight_TE, added_TD = np.zeros(score_TE.shape, int), np.zeros(score_TE.shape), np.zeros(x_TD.shape)
    for t in np.flatnonzero(mask_T):
        chosen = np.argsort(-(score_TE[t] + bias_E), kind="stable")[:choices]
        count_TE[t, chosen] = 1
        total = sum(score_TE[t, e] for e in chosen if kinds[e] != "zero") if config.renormalize else 1
        for e in chosen:
            if kinds[e] == "zero":
                continue
            weight_TE[t, e] = config.route_scale * score_TE[t, e] / total
            if kinds[e] == "copy":
                added_TD[t] += weight_TE[t, e] * x_TD[t]
            if kinds[e] == "constant":
                a = reference.softmax(x_TD[t] @ parameters["mix_CD2"][e - first])
                added_TD[t] += weight_TE[t, e] * (a[0] * x_TD[t] + a[1] * parameters["constant_CD"][e - first])

    probs_TE, parts = score_TE / score_TE.sum(1, keepdims=True), []
    eta_E = np.array([1.0 if kind == "real" else o.tau for kind in kinds])
    for tokens in np.split(np.arange(len(mask_T)), B if config.balance_scope == "sequence" else 1):
        tokens = tokens[mask_T[tokens]]
        if len(tokens):
            f_E = count_TE[tokens].sum(0) / (choices * len(tokens))
            for kind in ("zero", "copy"):
                alike = [e for e in range(len(kinds)) if kinds[e] == kind]
                f_E[alike] = f_E[alike].sum() / max(len(alike), 1)
            parts.append(np.sum(1 / eta_E) * np.sum(eta_E * f_E * probs_TE[tokens].mean(0)))
    return count_TE, weight_TE, added_TD, logits_TE, np.mean(parts)


def float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def bias_of(state):
    return np.asarray(state.get("bias_E", 0.0), np.float64)


@every_config
def test_everything_equals_the_formulas(config):
    given, (parameters, state, carry_TC) = inputs(1), drawn(config)
    out = route(config, parameters, state, given.x_TD, context(given.mask_T, carry_TC=carry_TC))
    count_TE, weight_TE, added_TD, logits_TE, loss = formula(
        config, float64(parameters), bias_of(state), carry_TC, given.x_TD.astype(np.float64), given.mask_T)
    got_count_TE, got_weight_TE = matrix(out.assignments)
    np.testing.assert_array_equal(got_count_TE, count_TE[:, :E])
    np.testing.assert_allclose(got_weight_TE, weight_TE[:, :E], rtol=1e-5)
    assert out.assignments.choices == config.experts_per_token and np.max(out.assignments.expert_N) < E
    np.testing.assert_array_equal(out.statistics["assigned_E"], count_TE.sum(0))
    assert count_TE[:, E:].any() and count_TE[:, :E].any(), "both kinds must be chosen for this test"
    if config.options.copy + config.options.constant:
        reference.assert_close(out.added_TD, added_TD)
        assert out.added_TD.dtype == jnp.float32
    else:
        assert out.added_TD is None
    assert set(out.losses) == set(ROUTERS[config.router].loss_weights(config)) == {"balance", "router_z"}
    np.testing.assert_allclose(out.losses["balance"], loss, rtol=1e-5)
    np.testing.assert_allclose(out.losses["router_z"], reference.z_loss(logits_TE, given.mask_T), rtol=1e-5)
    if config.options.gating_residual:
        np.testing.assert_allclose(out.carry_TC, logits_TE, rtol=1e-4, atol=1e-5)
        assert ROUTERS[config.router].carry(config) == logits_TE.shape[1] == out.carry_TC.shape[1]
    else:
        assert out.carry_TC is None and ROUTERS[config.router].carry(config) == 0


@pytest.mark.parametrize("name", ["moe_pp", "longcat", "mixed"])
def test_gradients_equal_finite_differences(name):
    """Of weights, losses, what special experts add and what is handed on, for all parameters."""
    config, given, rng = CONFIGS[name], inputs(2), np.random.default_rng(2)
    parameters, state, carry_TC = drawn(config, 2)
    x_TD, bias_E, total = given.x_TD.astype(np.float64), bias_of(state), null.count(config)
    c_TE, d_TD, g_TC = rng.normal(size=(T, E)), rng.normal(size=(T, D)), rng.normal(size=(T, total))
    count_TE = formula(config, float64(parameters), bias_E, carry_TC, x_TD, given.mask_T)[0]
    residual = config.options.gating_residual

    def want(parameters):
        counts, weight_TE, added_TD, logits_TE, loss = formula(config, parameters, bias_E, carry_TC, x_TD, given.mask_T)
        assert (counts == count_TE).all()
        return (np.sum(weight_TE[:, :E] * c_TE) + np.sum(added_TD * d_TD) + residual * np.sum(logits_TE * g_TC) + loss
                + reference.z_loss(logits_TE, given.mask_T))

    def got(parameters):
        out = eager_route(config, parameters, state, given.x_TD, context(given.mask_T, carry_TC=carry_TC))
        a = out.assignments
        value = jnp.sum(a.weight_N * jnp.asarray(c_TE, jnp.float32)[a.token_N, a.expert_N]) + sum(out.losses.values())
        value += 0 if out.added_TD is None else jnp.sum(out.added_TD * d_TD)
        return value + (jnp.sum(out.carry_TC * g_TC) if residual else 0)

    gradients = jax.jit(jax.grad(got))(parameters)
    reference.assert_slopes(gradients, want, float64(parameters), 1e-6, 1e-4)


def test_special_experts_alone_give_nothing_the_input_itself_or_a_mixture():
    """Each token has one certain choice: zero, copy and the two constants of MoE++ in turn."""
    config, rng = config_of("moe_pp", experts_per_token=1), np.random.default_rng(3)
    parameters = drawn(config)[0]
    x_TD = rng.normal(size=(4, D)).astype(np.float32)
    parameters["w_DE"] = np.zeros((D, E + 4), np.float32)
    parameters["residual_EE"] = np.eye(E + 4, dtype=np.float32)
    certain_TC = 1e4 * np.eye(E + 4, dtype=np.float32)[E:]
    out = route(config, parameters, {}, x_TD, context(np.ones(4, bool), sequences=1, carry_TC=certain_TC))
    assert reference.listed(out.assignments) == []
    np.testing.assert_array_equal(out.added_TD[0], 0)
    np.testing.assert_array_equal(out.added_TD[1], x_TD[1])
    for j in (0, 1):
        a = reference.softmax(x_TD[2 + j] @ parameters["mix_CD2"][j])
        want_D = a[0] * x_TD[2 + j] + a[1] * parameters["constant_CD"][j]
        np.testing.assert_allclose(out.added_TD[2 + j], want_D, rtol=1e-5, atol=1e-6)


def test_a_token_with_nothing_but_null_experts_gets_nothing_and_no_nan():
    config, given = CONFIGS["adamoe"], inputs(4)
    logits_TE = np.random.default_rng(4).normal(size=(T, E + 4))
    logits_TE[:, E:] += np.where(np.arange(T) % 2 == 0, 1e4, -1e4)[:, None]
    x_TD = np.eye(T, dtype=np.float32)

    def told(w_DE):
        out = eager_route(config, {"w_DE": w_DE}, {}, x_TD, context(given.mask_T))
        weight_N = jnp.where(out.assignments.valid_N, out.assignments.weight_N, 0)
        return jnp.sum(weight_N * jnp.arange(len(weight_N))), out.assignments

    (_, assignments), gradient_TE = jax.jit(jax.value_and_grad(told, has_aux=True))(logits_TE.astype(np.float32))
    count_TE, weight_TE = matrix(assignments)
    null_only_T = np.arange(T) % 2 == 0
    np.testing.assert_array_equal(count_TE.sum(1), np.where(null_only_T | ~given.mask_T, 0, 4))
    np.testing.assert_allclose(weight_TE.sum(1), np.where(null_only_T | ~given.mask_T, 0, 1), rtol=1e-6)
    assert np.isfinite(gradient_TE).all() and not np.any(gradient_TE[null_only_T | ~given.mask_T])
    assert np.any(gradient_TE[~null_only_T & given.mask_T])


def test_weights_of_true_experts_sum_to_one_at_any_level_of_their_logits():
    """A token that takes true experts after nulls, whose probabilities underflow: no epsilon swallows the weights."""
    config = CONFIGS["adamoe"]
    logits_TE = np.full((3, E + 4), -2e4)
    logits_TE[:, E:E + 2] = 0
    logits_TE[:, :2] = np.log([[3.0, 1.0]]) + np.array([[-3.0], [-60.0], [-1e4]])
    out = route(config, {"w_DE": logits_TE.astype(np.float32)}, {}, np.eye(3, dtype=np.float32),
                context(np.ones(3, bool), sequences=1))
    _, weight_TE = matrix(out.assignments, 3)
    np.testing.assert_allclose(weight_TE[:, :2], np.tile([0.75, 0.25], (3, 1)), rtol=1e-3)
    np.testing.assert_array_equal(weight_TE[:, 2:], 0)


@pytest.mark.parametrize("name, size", [("adamoe", 1e4), ("moe_pp", 1e4), ("mixed", 60.0)])
def test_extreme_logits_follow_the_formula_and_have_finite_gradients(name, size):
    config = CONFIGS[name]
    total, rng = null.count(config), np.random.default_rng(5)
    parameters, state, _ = drawn(config, 5)
    logits_TE = size * np.sign(rng.normal(size=(T, total))) + rng.normal(size=(T, total))
    logits_TE[-1] = size * np.eye(total)[2]
    mask_T, x_TD = np.arange(T) != 3, np.eye(T, dtype=np.float32)
    parameters |= {"w_DE": logits_TE.astype(np.float32)}
    if config.options.constant:
        parameters |= {"mix_CD2": size * rng.normal(size=(config.options.constant, T, 2)).astype(np.float32),
                       "constant_CD": rng.normal(size=(config.options.constant, T)).astype(np.float32)}
    ctx = context(mask_T, sequences=1)

    def told(parameters):
        out = eager_route(config, parameters, state, x_TD, ctx)
        value = jnp.sum(jnp.where(out.assignments.valid_N, out.assignments.weight_N, 0)**2) + out.losses["balance"]
        value += 0 if out.added_TD is None else jnp.sum(out.added_TD**2)
        return value, (out.assignments, out.added_TD)

    (_, (assignments, added_TD)), gradients = jax.jit(jax.value_and_grad(told, has_aux=True))(parameters)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradients, added_TD, assignments.weight_N)))
    assert not np.any(gradients["w_DE"][~mask_T])
    if name == "adamoe":
        _, weight_TE, *_ = formula(config, float64(parameters), 0.0, None, x_TD.astype(np.float64), mask_T)
        # The float32 logits of size 1e4 are exact to 1e-3.
        np.testing.assert_allclose(matrix(assignments)[1][:-1], weight_TE[:-1, :E], rtol=1e-2, atol=1e-30)


def test_equal_logits_spread_tokens_over_real_and_special_experts_by_their_ids():
    config, tokens = CONFIGS["longcat"], 660
    out = route(config, {"w_DE": np.zeros((D, E + 4), np.float32)}, {}, np.ones((tokens, D), np.float32),
                context(np.ones(tokens, bool), np.arange(tokens, dtype=np.int32), sequences=1))
    load_E = np.asarray(out.statistics["assigned_E"])
    assert load_E.min() > 0.8 * load_E.mean() and load_E.max() < 1.2 * load_E.mean()
    np.testing.assert_allclose(out.losses["balance"], 1, rtol=1e-5)


@pytest.mark.parametrize("name", ["moe_pp", "mixed"])
def test_the_balance_loss_is_one_at_perfect_balance_whatever_is_chosen(name):
    """Perfect are probabilities in proportion to 1 / eta: 1 for real experts and 1 / tau for special ones."""
    config, given = CONFIGS[name], inputs(6)
    parameters, state, carry_TC = drawn(config, 6)
    special = np.arange(null.count(config)) >= E
    odds_E = np.where(special, 1 / config.options.tau, 1.0)
    if config.score == "sigmoid":
        odds_E = odds_E / 4
        odds_E = odds_E / (1 - odds_E)
    parameters["w_DE"] = np.zeros((D, null.count(config)), np.float32)
    parameters["w_DE"][0] = np.log(odds_E)
    x_TD = np.ones((T, D), np.float32)
    out = route(config, parameters, {}, x_TD, context(given.mask_T, given.ids_T))
    np.testing.assert_allclose(out.losses["balance"], 1, rtol=1e-5)


def test_nulls_share_one_load_so_that_their_balance_among_each_other_costs_nothing():
    """Moving tokens from one null to another changes no loss; moving them between true experts does."""
    config, tokens = config_of("adamoe", experts_per_token=1, renormalize=False), 8

    def loss(expert_T):
        logits_TE = 3 * np.eye(E + 4, dtype=np.float32)[np.asarray(expert_T)]
        return route(config, {"w_DE": logits_TE}, {}, np.eye(tokens, dtype=np.float32),
                     context(np.ones(tokens, bool), sequences=1)).losses["balance"]

    spread, one_null = loss([0, 1, 2, 3, E, E + 1, E + 2, E + 3]), loss([0, 1, 2, 3, E, E, E, E])
    np.testing.assert_allclose(one_null, spread, rtol=1e-6)
    assert loss([0, 0, 0, 0, E, E, E, E]) > spread + 0.1


@pytest.mark.parametrize("router", ["adamoe", "longcat"])
def test_without_special_experts_the_rule_is_top_k(router):
    given = inputs(7)
    options = {"zero": 0} if router == "adamoe" else {"copy": 0}
    shared = {"route_scale": 2.5, "renormalize": router == "adamoe", "bias_rate": 0.0 if router == "adamoe" else 0.01,
              "balance_weight": 0.1, "z_weight": 0.1, "bias_rule": "proportional"}
    config, topk = config_of(router, options=options, **shared), config_of("topk", **shared)
    state = {} if router == "adamoe" else {"bias_E": jnp.linspace(-0.2, 0.2, E)}
    one, two = (route(c, given.router, state, given.x_TD, context(given.mask_T, given.ids_T)) for c in (config, topk))
    assert one.added_TD is None and one.carry_TC is None
    masked = (out.replace(assignments=matrix(out.assignments)) for out in (one, two))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *masked)
    if state:
        steps = [ROUTERS[c.router].update(c, state, one.statistics)["bias_E"] - state["bias_E"] for c in (config, topk)]
        np.testing.assert_allclose(steps[0] * E, steps[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("expected", [0.0, 3.0])
def test_the_bias_moves_by_the_published_rule_and_that_of_special_experts_never(expected):
    config = config_of("longcat", experts_per_token=4, options={"expected": expected})
    assigned_E = np.array([9, 4, 0, 4, 1, 6, 4, 3, 20, 5, 4])
    state, tokens = {"bias_E": np.linspace(-0.1, 0.2, E + 4).astype(np.float32)}, assigned_E.sum() / 4
    k_e = expected or 4 * E / (E + 4)
    want_E = [b + (0.01 * (k_e / 4 / E - n / (4 * tokens)) if i < E else 0)
              for i, (b, n) in enumerate(zip(state["bias_E"], assigned_E, strict=True))]
    moved = ROUTERS["longcat"].update(config, state, {"assigned_E": jnp.asarray(assigned_E)})
    np.testing.assert_allclose(moved["bias_E"], want_E, rtol=1e-5)
    np.testing.assert_array_equal(moved["bias_E"][E:], state["bias_E"][E:])
    none = ROUTERS["longcat"].update(config, state, {"assigned_E": jnp.zeros(E + 4, jnp.int32)})
    np.testing.assert_array_equal(none["bias_E"], state["bias_E"])
    by_sign = dataclasses.replace(config, bias_rule="sign")
    signed = ROUTERS["longcat"].update(by_sign, state, {"assigned_E": jnp.asarray(assigned_E)})
    step_E = 0.01 * np.sign(np.asarray(want_E) - state["bias_E"])
    np.testing.assert_allclose(signed["bias_E"], state["bias_E"] + step_E, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("expected", [0.0, 3.5])
def test_on_frozen_scores_the_mean_of_real_experts_goes_to_the_expected_one_and_they_balance(expected):
    config = config_of("longcat", experts_per_token=4, bias_rate=0.05, options={"expected": expected})
    rng, tokens = np.random.default_rng(8), 512
    w_DE = rng.normal(size=(D, E + 4)).astype(np.float32) * D**-0.5
    x_TD = (rng.normal(size=(tokens, D)) + 0.4).astype(np.float32)

    def step(state, _):
        out = eager_route(config, {"w_DE": w_DE}, state, x_TD, context(np.ones(tokens, bool), sequences=1))
        return ROUTERS["longcat"].update(config, state, out.statistics), out.statistics["assigned_E"]

    state, counts = jax.jit(lambda s: jax.lax.scan(step, s, length=600))(reference.initial_state(config))
    k_e, real = expected or 4 * E / (E + 4), np.asarray(counts)[:, :E]
    assert abs(real[-1].sum() / tokens - k_e) < 0.05
    assert np.max(real[0]) / np.mean(real[0]) > 1.3 and np.max(real[-1]) / np.mean(real[-1]) < 1.1
    np.testing.assert_array_equal(state["bias_E"][E:], 0)


def test_bias_gets_no_gradient_and_weights_none_of_it():
    config, given = CONFIGS["longcat"], inputs(9)
    parameters = drawn(config, 9)[0]

    def total(bias_E):
        out = eager_route(config, parameters, {"bias_E": bias_E}, given.x_TD, context(given.mask_T))
        return jnp.sum(out.assignments.weight_N**2) + jnp.sum(out.added_TD**2) + sum(out.losses.values())

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(jnp.linspace(0.3, -0.3, E + 4)), np.zeros(E + 4))


def test_the_residual_starts_from_nothing():
    """In the first layer the router before has said nothing, so zeros and no carry at all are the same."""
    config, given = CONFIGS["moe_pp"], inputs(10)
    parameters, state, carry_TC = drawn(config, 10)
    none, zeros, some = (route(config, parameters, state, given.x_TD, context(given.mask_T, carry_TC=carry))
                         for carry in (None, 0 * carry_TC, carry_TC))
    jax.tree.map(np.testing.assert_array_equal, none, zeros)
    assert np.any(some.carry_TC != none.carry_TC)
    off = config_of("moe_pp", options={"gating_residual": False})
    assert "residual_EE" not in ROUTERS["moe_pp"].parameters(off, D)
    other = route(off, parameters, state, given.x_TD, context(given.mask_T))
    jax.tree.map(np.testing.assert_array_equal, other.assignments, none.assignments)


def test_padding_of_any_content_reaches_nothing():
    config, given, junk = CONFIGS["mixed"], inputs(11), inputs(12)
    parameters, state, carry_TC = drawn(config, 11)

    def told(parameters, x_TD, carry_TC):
        out = eager_route(config, parameters, state, x_TD, context(given.mask_T, given.ids_T, carry_TC=carry_TC))
        weight_N = jnp.where(out.assignments.valid_N, out.assignments.weight_N, 0)
        total = jnp.sum(weight_N**2) + jnp.sum(out.added_TD**2) + sum(out.losses.values())
        return total, (weight_N, out.assignments.valid_N, out.added_TD, out.losses, out.entropy, out.statistics)

    evaluate = jax.jit(jax.value_and_grad(told, argnums=(0, 1, 2), has_aux=True))
    padding_T1 = ~given.mask_T[:, None]
    one = evaluate(parameters, given.x_TD, carry_TC)
    two = evaluate(parameters, np.where(padding_T1, 1e3 * junk.x_TD, given.x_TD), np.where(padding_T1, 1e4, carry_TC))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    _, dx_TD, dcarry_TC = two[1]
    assert not np.any(np.where(padding_T1, dx_TD, 0)) and not np.any(np.where(padding_T1, dcarry_TC, 0))
    assert not np.any(np.where(padding_T1, one[0][1][2], 0))


@pytest.mark.parametrize("name", ["adamoe", "mixed"])
def test_micro_batches_add_up(name):
    config, given = CONFIGS[name], inputs(13)
    parameters, state, carry_TC = drawn(config, 13)
    assert ROUTERS[config.router].needs_whole(config) == (config.balance_scope == "global")
    totals = Totals(jnp.float32(given.mask_T.sum()), jnp.float32(given.mask_T.reshape(B, -1).any(1).sum()))

    def told(parameters, x_TD, mask_T, carry_TC, sequences, whole):
        out = eager_route(config, parameters, state, x_TD, context(mask_T, sequences=sequences, totals=totals, whole=whole,
                                                                  carry_TC=carry_TC))
        return sum(out.losses.values()), (out.losses, out.entropy, out.statistics)

    evaluate = jax.jit(jax.value_and_grad(told, has_aux=True), static_argnums=4)
    big = evaluate(parameters, given.x_TD, given.mask_T, carry_TC, B, None)
    halves = [evaluate(parameters, given.x_TD[part], given.mask_T[part], None if carry_TC is None else carry_TC[part],
                       B // 2, big[0][1][2]) for part in (slice(T // 2), slice(T // 2, T))]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(b + c, a, rtol=1e-5, atol=1e-6), big, *halves)


def test_the_papers_settings():
    adamoe, moe_pp, longcat = (config_of(name, experts_per_token="auto") for name in ("adamoe", "moe_pp", "longcat"))
    assert (adamoe.experts_per_token, adamoe.renormalize, adamoe.options.zero) == (4, True, 4)
    assert (moe_pp.experts_per_token, moe_pp.renormalize, moe_pp.options.tau) == (2, False, 0.75)
    assert (moe_pp.options.zero, moe_pp.options.copy, moe_pp.options.constant) == (1, 1, 2)
    assert (longcat.experts_per_token, longcat.renormalize, longcat.options.copy) == (4, False, 4)
    assert reference.initial_state(adamoe) == reference.initial_state(moe_pp) == {}
    assert K <= moe_pp.experts_per_token and ROUTERS["moe_pp"].carry(moe_pp) == E + 4


def test_what_cannot_work_is_refused():
    with pytest.raises(UserError, match="config.moe.renormalize=True with config.moe.experts_per_token=1"):
        config_of("adamoe", experts_per_token=1)
    with pytest.raises(UserError, match="config.moe.options.expected=2.5 is more than config.moe.experts_per_token=2"):
        config_of("longcat", options={"expected": 2.5})
