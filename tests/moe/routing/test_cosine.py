"""X-MoE's cosine router against the paper's formula, token by token, and its laws.

Most tests run op by op on arrays of one shape: the few ops compile once for all configs.
"""

import math

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import B, D, E, K, T, config_of, context, eager_route, inputs, matrix

from moejax.config import UserError
from moejax.moe.routing import ROUTERS
from moejax.moe.types import Totals

DIM = 3
ONE = config_of("x_moe", experts_per_token=1, options={"dim": DIM})
TWO = config_of("x_moe", options={"dim": DIM}, renormalize=True, route_scale=1.5, balance_scope="sequence")
each = pytest.mark.parametrize("config", [ONE, TWO], ids=["one", "two"])


def random_parameters(seed=0, temperature=0.4):
    rng = np.random.default_rng(seed)
    return {"w_DC": rng.normal(size=(D, DIM)).astype(np.float32),
            "expert_CE": rng.normal(size=(DIM, E)).astype(np.float32),
            "log_temperature": np.float32(math.log(temperature))}


def cosine_logits(x_TD, parameters):
    """(x W) . e_i / (|x W| |e_i| tau), one pair at a time."""
    w, experts = np.float64(parameters["w_DC"]), np.float64(parameters["expert_CE"])
    logits_TE = np.zeros((len(x_TD), experts.shape[1]))
    for t, x in enumerate(np.float64(x_TD)):
        for e in range(experts.shape[1]):
            cosine = x @ w @ experts[:, e] / (np.linalg.norm(x @ w) * np.linalg.norm(experts[:, e]))
            logits_TE[t, e] = cosine / math.exp(parameters["log_temperature"])
    return logits_TE


def formula(config, x_TD, parameters, mask_T):
    """Counts and weights [T, E], load-balancing loss and z-loss."""
    logits_TE = cosine_logits(x_TD, parameters)
    count_TE, weight_TE = reference.topk_matrix(logits_TE, mask_T, config.experts_per_token, "softmax", config.renormalize,
                                                config.route_scale)
    groups = B if config.balance_scope == "sequence" else 1
    return (count_TE, weight_TE, reference.balance_loss(logits_TE, count_TE, mask_T, "softmax", groups),
            reference.z_loss(logits_TE, mask_T))


@each
def test_choices_weights_losses_and_statistics_equal_the_formula(config):
    given, parameters = inputs(1), random_parameters(1)
    out = eager_route(config, parameters, {}, given.x_TD, context(given.mask_T))
    count_TE, weight_TE, balance, z_loss = formula(config, given.x_TD, parameters, given.mask_T)
    np.testing.assert_array_equal(matrix(out.assignments)[0], count_TE)
    np.testing.assert_allclose(matrix(out.assignments)[1], weight_TE, rtol=1e-5)
    np.testing.assert_allclose(out.losses["balance"], balance, rtol=1e-5)
    np.testing.assert_allclose(out.losses["router_z"], z_loss, rtol=1e-5)
    np.testing.assert_array_equal(out.statistics["assigned_E"], count_TE.sum(0))
    assert set(out.losses) == set(ROUTERS["x_moe"].loss_weights(config))


@each
def test_gradients_of_weights_and_losses_are_those_of_the_formula(config):
    """Of the projection, the experts' vectors, the temperature and the input, along random directions."""
    given, arrays = inputs(2), {"x_TD": inputs(2).x_TD, **random_parameters(2)}
    c_TE = np.random.default_rng(0).normal(size=(T, E))
    count_TE = formula(config, given.x_TD, arrays, given.mask_T)[0]

    def wanted(arrays):
        counts, weight_TE, balance, z_loss = formula(config, arrays["x_TD"], arrays, given.mask_T)
        assert (counts == count_TE).all(), "finite differences must not cross a choice"
        return np.sum(c_TE * weight_TE) + balance + z_loss

    def told(arrays):
        out = eager_route(config, {name: arrays[name] for name in arrays if name != "x_TD"}, {}, arrays["x_TD"],
                          context(given.mask_T))
        a = out.assignments
        weighed_N = jnp.where(a.valid_N, a.weight_N * jnp.float32(c_TE)[a.token_N, a.expert_N], 0)
        return jnp.sum(weighed_N) + sum(out.losses.values())

    gradient = jax.grad(told)(arrays)
    np.testing.assert_array_equal(gradient["x_TD"][~given.mask_T], 0)
    for leaf in arrays:
        for seed in range(4):
            along = np.random.default_rng(seed).normal(size=np.shape(arrays[leaf]))
            ahead, behind = (arrays | {leaf: np.float64(arrays[leaf]) + step * along} for step in (1e-6, -1e-6))
            summands = np.float64(gradient[leaf]) * along
            slope = (wanted(ahead) - wanted(behind)) / 2e-6
            assert abs(np.sum(summands) - slope) < 2e-4 * np.sqrt(np.sum(summands**2))


@each
@pytest.mark.parametrize("power", [-100, -3, 100])
def test_lengths_of_tokens_projection_and_experts_do_not_matter(config, power):
    """Powers of two, so that the floats are exact; squares of such lengths would overflow or vanish."""
    given, parameters, rng = inputs(3), random_parameters(3), np.random.default_rng(0)
    before = eager_route(config, parameters, {}, given.x_TD, context(given.mask_T))
    scale_T1, scale_E = (np.float32(2.0)**(power + rng.integers(0, 9, shape)) for shape in ((T, 1), E))
    for x_TD, changes in ((given.x_TD * scale_T1, {}), (given.x_TD, {"expert_CE": parameters["expert_CE"] * scale_E}),
                          (given.x_TD, {"w_DC": parameters["w_DC"] * np.float32(2.0)**power})):
        after = eager_route(config, parameters | changes, {}, x_TD, context(given.mask_T))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), before, after)


def test_the_gradient_is_across_the_vectors_and_shrinks_with_their_length():
    """Of a function that does not depend on length: g . v = 0, and g(s v) = g(v) / s."""
    given, parameters = inputs(4), random_parameters(4)

    def gradients(scale):
        def total(x_TD, expert_CE):
            out = eager_route(TWO, parameters | {"expert_CE": expert_CE}, {}, x_TD, context(given.mask_T))
            return jnp.sum(jnp.where(out.assignments.valid_N, out.assignments.weight_N, 0)**2) + out.losses["balance"]
        return jax.grad(total, argnums=(0, 1))(scale * given.x_TD, scale * parameters["expert_CE"])

    (dx_TD, de_CE), far = gradients(np.float32(1)), gradients(np.float32(8))
    for gradient, vectors in ((dx_TD, given.x_TD), (de_CE.T, parameters["expert_CE"].T)):
        sizes = np.linalg.norm(gradient, axis=1) * np.linalg.norm(vectors, axis=1)
        assert sizes.max() > 0 and (np.abs(np.sum(gradient * vectors, axis=1)) <= 1e-5 * sizes.max()).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(8 * b, a, rtol=1e-4, atol=1e-6), (dx_TD, de_CE), far)


@pytest.mark.parametrize("bias_rate", [0.0, 0.01])
def test_given_the_logits_it_is_the_top_k_rule(bias_rate):
    """Same outputs, state and update as the router `topk` that sees the cosines over the temperature as its logits."""
    given, parameters = inputs(5), random_parameters(5)
    settings = dict(bias_rate=bias_rate, renormalize=True, balance_weight=0.01, z_weight=0.002)
    config, plain = config_of("x_moe", options={"dim": DIM}, **settings), config_of("topk", **settings)
    state = {"bias_E": jnp.linspace(0.3, -0.3, E)} if bias_rate else {}
    logits_TE = cosine_logits(given.x_TD, parameters).astype(np.float32)
    ours = eager_route(config, parameters, state, given.x_TD, context(given.mask_T))
    theirs = eager_route(plain, {"w_DE": np.eye(E, dtype=np.float32)}, state, logits_TE, context(given.mask_T))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)
    assert reference.initial_state(config).keys() == state.keys()
    jax.tree.map(np.testing.assert_array_equal, ROUTERS["x_moe"].update(config, state, ours.statistics),
                 ROUTERS["topk"].update(plain, state, theirs.statistics))
    for name in ("loss_weights", "needs_whole", "noisy"):
        assert getattr(ROUTERS["x_moe"], name)(config) == getattr(ROUTERS["topk"], name)(plain)


def test_the_temperature_starts_where_the_option_says_and_bounds_the_logits():
    config = config_of("x_moe", options={"temperature": 0.07})
    shapes = ROUTERS["x_moe"].parameters(config, D)
    assert {name: own.shape for name, own in shapes.items()} == {"w_DC": (D, 16), "expert_CE": (16, E),
                                                                "log_temperature": ()}
    assert shapes["log_temperature"].stddev == 0
    np.testing.assert_allclose(math.exp(shapes["log_temperature"].mean), 0.07)
    given, parameters = inputs(6), random_parameters(6, temperature=0.07)
    aligned = parameters | {"w_DC": np.eye(D, DIM, dtype=np.float32)}
    aligned["expert_CE"][:, 2] = 5 * given.x_TD[0, :DIM]
    out = eager_route(ONE, aligned, {}, given.x_TD, context(np.arange(T) == 0))
    assert out.assignments.expert_N[0] == 2, "no other direction is nearer"
    p = reference.softmax(cosine_logits(given.x_TD[:1], aligned))[0]
    np.testing.assert_allclose(out.assignments.weight_N[0], p[2], rtol=1e-5)
    assert out.losses["router_z"] <= (math.log(E) + 1 / 0.07)**2


@each
def test_zero_vectors_extreme_ones_and_padding_of_any_content_are_harmless(config):
    """A token of zeros is at a right angle to every expert, so its choice goes by its id, with probabilities 1/E."""
    def told(arrays, x_TD, mask_T, ids_T):
        out = eager_route(config, arrays, {}, x_TD, context(mask_T, ids_T))
        weight_N = jnp.where(out.assignments.valid_N, out.assignments.weight_N, 0)
        return (jnp.sum(weight_N**2) + sum(out.losses.values()),
                (weight_N, out.assignments.expert_N, out.losses, out.entropy, out.statistics))

    evaluate, given, parameters = jax.value_and_grad(told, argnums=(0, 1), has_aux=True), inputs(7), random_parameters(7)
    everything, ids_T = np.ones(T, bool), np.arange(T)
    lost = parameters | {"expert_CE": parameters["expert_CE"] * (np.arange(E) > 0).astype(np.float32)}
    sharp = parameters | {"log_temperature": np.float32(math.log(1e-4))}
    for x_TD, mask_T, w in ((0 * given.x_TD, everything, parameters), (1e15 * given.x_TD, everything, parameters),
                            (1e-25 * given.x_TD, everything, parameters), (given.x_TD, everything, sharp),
                            (given.x_TD, everything, lost), (given.x_TD, ~everything, parameters)):
        (_, out), gradient = evaluate(w, x_TD.astype(np.float32), mask_T, ids_T)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradient)))
        if not mask_T.any():
            assert all(not np.any(leaf) for leaf in jax.tree.leaves((gradient, out[0], out[2:])))
        if not x_TD.any():
            np.testing.assert_allclose(out[0], 1.5 / K if config.renormalize else 1 / E, rtol=1e-6)
            assert len(np.unique(out[1])) > E // 2
    junk_TD = np.where(given.mask_T[:, None], given.x_TD, 1e15 * inputs(8).x_TD)
    one, other = (evaluate(parameters, x_TD, given.mask_T, ids_T) for x_TD in (given.x_TD, junk_TD))
    real_N = np.repeat(given.mask_T, config.experts_per_token)
    np.testing.assert_array_equal(one[0][1][1][real_N], other[0][1][1][real_N])
    jax.tree.map(np.testing.assert_array_equal, (one[0][1][::2], one[1]), (other[0][1][::2], other[1]))


@each
def test_the_shares_of_micro_batches_add_up_to_the_big_batch(config):
    """The parts are rows of the batch; one of them has nothing but padding."""
    given, parameters, late_T = inputs(9), random_parameters(9), np.arange(T) >= T // 2
    totals = Totals(jnp.float32(given.mask_T.sum()), jnp.float32(3))

    def evaluate(mask_T, whole=None):
        def losses(parameters):
            out = eager_route(config, parameters, {}, given.x_TD, context(mask_T, whole=whole, totals=totals))
            return sum(out.losses.values()), (out.losses, out.entropy, out.statistics)
        return jax.value_and_grad(losses, has_aux=True)(parameters)

    whole = evaluate(given.mask_T)
    halves = [evaluate(given.mask_T & half, whole[0][1][2]) for half in (late_T, ~late_T)]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(b + c, a, rtol=1e-5, atol=1e-6), whole, *halves)


def test_routers_that_could_not_learn_are_refused():
    for changes, message in ((dict(experts_per_token=1, renormalize=True), "set config.moe.renormalize=False"),
                             (dict(router_init=0.0), "set config.moe.router_init above 0")):
        with pytest.raises(UserError, match=message):
            config_of("x_moe", **changes)
    assert (ONE.renormalize, ONE.capacity_factor, config_of("x_moe", experts_per_token="auto").experts_per_token) == (
        False, None, 1)
