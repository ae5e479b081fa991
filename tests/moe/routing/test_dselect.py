"""DSelect-k, token by token from the paper, and its laws."""

import hypothesis
import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from hypothesis import strategies
from moe_reference import B, D, K, T, config_of, context, eager_route, inputs, matrix, route

from moejax.config import UserError
from moejax.moe.routing import ROUTERS, dselect
from moejax.moe.types import Totals

E, M = 8, 3
CONFIG = config_of("dselect", num_experts=E)
WIDE = config_of("dselect", num_experts=E, experts_per_token=3, route_scale=2.5, options={"gamma": 2.5})


def drawn(config, seed=0, spread=0.4):
    """Random parameters whose bits are decided for some tokens and not for others."""
    rng = np.random.default_rng(seed)
    shapes = {name: own.shape for name, own in ROUTERS["dselect"].parameters(config, D).items()}
    scale = {"w_DK": D**-0.5, "bits_DKM": spread * config.options.gamma * D**-0.5}
    return {name: (scale[name] * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def step_of(z, gamma):
    if z <= -gamma / 2:
        return 0.0
    if z >= gamma / 2:
        return 1.0
    return -2 / gamma**3 * z**3 + 3 / (2 * gamma) * z + 1 / 2


def formula(config, parameters, x_TD, mask_T):
    """Weights [T, E], the mean entropy of selectors over tokens, and the entropy of the mixtures summed over tokens."""
    gamma, choices, experts = config.options.gamma, config.experts_per_token, config.num_experts
    bits = int(np.log2(experts))
    weight_TE, entropies = np.zeros((len(x_TD), experts)), []
    for t in np.flatnonzero(mask_T):
        alpha_K = reference.softmax(x_TD[t] @ parameters["w_DK"])
        for k in range(choices):
            q_E = np.ones(experts)
            for e in range(experts):
                for m, bit in enumerate(np.binary_repr(e, bits)[:bits]):
                    step = step_of(x_TD[t] @ parameters["bits_DKM"][:, k, m], gamma)
                    q_E[e] *= step if bit == "1" else 1 - step
            weight_TE[t] += alpha_K[k] * q_E
            entropies.append(-sum(q * np.log(q) for q in q_E if q > 0))
    spread = -np.sum(weight_TE * np.log(np.where(weight_TE > 0, weight_TE, 1)))
    return config.route_scale * weight_TE, np.mean(entropies), spread


def float64(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["K2", "K3"])
def test_weights_losses_and_entropy_equal_the_formulas(config):
    given, parameters = inputs(1), drawn(config)
    out = route(config, parameters, {}, given.x_TD, context(given.mask_T))
    weight_TE, entropy, spread = formula(config, float64(parameters), given.x_TD.astype(np.float64), given.mask_T)
    got_count_TE, got_weight_TE = matrix(out.assignments, T, E)
    np.testing.assert_allclose(got_weight_TE, weight_TE, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(got_count_TE, got_weight_TE > 0)
    assert (got_count_TE == (weight_TE > 0)).mean() > 0.99, "rounding alone may tell a weight from zero"
    assert 1 < got_count_TE[given.mask_T].sum(1).mean() < E, "some bits are decided and some are not in this test"
    assert set(out.losses) == set(ROUTERS["dselect"].loss_weights(config)) == {"dselect_entropy"}
    np.testing.assert_allclose(out.losses["dselect_entropy"], entropy, rtol=1e-4)
    scale = config.route_scale
    w_TE = weight_TE / scale
    np.testing.assert_allclose(out.entropy, -np.sum(w_TE * np.log(np.where(w_TE > 0, w_TE, 1))), rtol=1e-4)
    np.testing.assert_allclose(spread, -np.sum(w_TE * np.log(np.where(w_TE > 0, w_TE, 1))), rtol=1e-9)


def test_lists_hold_the_best_first():
    given = inputs(2)
    out = route(CONFIG, drawn(CONFIG, 2), {}, given.x_TD, context(given.mask_T))
    weight_TE = np.where(out.assignments.valid_N, out.assignments.weight_N, 0).reshape(T, E)
    assert out.assignments.choices == E and (np.diff(weight_TE, axis=1) <= 0).all()


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(strategies.integers(0, 2**31), strategies.floats(0.01, 100))
def test_weights_sum_to_one_and_decided_selectors_hold_one_expert_each(seed, spread):
    given, parameters = inputs(seed % 1000), drawn(CONFIG, seed, spread)
    out = route(CONFIG, parameters, {}, given.x_TD, context(given.mask_T))
    count_TE, weight_TE = matrix(out.assignments, T, E)
    np.testing.assert_allclose(weight_TE.sum(1), given.mask_T, rtol=1e-5)
    z_TKM = np.einsum("td,dkm->tkm", given.x_TD.astype(np.float64), parameters["bits_DKM"].astype(np.float64))
    decided_T = given.mask_T & (np.abs(z_TKM) > 0.5 + 1e-5).all((1, 2))
    assert (count_TE[decided_T].sum(1) <= K).all() and (count_TE[given.mask_T].sum(1) >= 1).all()
    for t in np.flatnonzero(decided_T):
        experts = {int("".join("1" if z > 0 else "0" for z in z_M), 2) for z_M in z_TKM[t]}
        assert set(np.flatnonzero(count_TE[t])) == experts


def test_selectors_start_undecided_so_all_experts_are_on():
    given, rng = inputs(3), np.random.default_rng(3)
    own = ROUTERS["dselect"].parameters(CONFIG, D)
    assert own["bits_DKM"].shape == (D, K, M)
    np.testing.assert_allclose(own["bits_DKM"].stddev, 0.01 * D**-0.5)
    parameters = {name: (p.stddev * rng.normal(size=p.shape)).astype(np.float32) for name, p in own.items()}
    out = route(CONFIG, parameters, {}, given.x_TD, context(given.mask_T))
    count_TE, weight_TE = matrix(out.assignments, T, E)
    np.testing.assert_array_equal(count_TE.sum(1), np.where(given.mask_T, E, 0))
    np.testing.assert_allclose(weight_TE[given.mask_T], 1 / E, atol=0.05)
    np.testing.assert_allclose(out.losses["dselect_entropy"], np.log(E), rtol=1e-2)


@pytest.mark.parametrize("gamma", [1.0, 0.3, 7.0])
def test_the_smooth_step_is_exact_at_its_ends_and_joins_them_smoothly(gamma):
    z = np.linspace(-1, 1, 401, dtype=np.float32) * np.float32(gamma)
    step, slope = jax.vmap(jax.value_and_grad(lambda z: dselect.smooth_step(z, gamma)))(z)
    np.testing.assert_allclose(step, [step_of(float(value), gamma) for value in z], atol=1e-6)
    outside = np.abs(z) >= 0.5001 * gamma
    np.testing.assert_array_equal(np.asarray(step)[outside], (z > 0)[outside])
    np.testing.assert_array_equal(np.asarray(slope)[outside], 0)
    assert (np.asarray(slope)[np.abs(z) < 0.49 * gamma] > 0).all()
    assert np.abs(np.asarray(slope)[np.abs(np.abs(z) - 0.5 * gamma) < 1e-3 * gamma]).max() < 0.02 / gamma


@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["K2", "K3"])
def test_gradients_equal_finite_differences(config):
    given, rng, parameters = inputs(4), np.random.default_rng(4), drawn(config, 4, 0.25)
    c_TE, x_TD = rng.normal(size=(T, E)), given.x_TD.astype(np.float64)

    def want(parameters):
        weight_TE, entropy, _ = formula(config, parameters, x_TD, given.mask_T)
        return np.sum(weight_TE * c_TE) + entropy

    def got(parameters):
        out = eager_route(config, parameters, {}, given.x_TD, context(given.mask_T))
        a = out.assignments
        weighed = jnp.sum(a.weight_N * jnp.asarray(c_TE, jnp.float32)[a.token_N, a.expert_N])
        return weighed + out.losses["dselect_entropy"]

    gradients = jax.jit(jax.grad(got))(parameters)
    reference.assert_slopes(gradients, want, float64(parameters), 1e-5, 1e-3)


@pytest.mark.parametrize("size", [0.0, 0.5, 60.0, 1e4])
def test_extreme_scores_have_finite_results_and_gradients(size):
    """Also at exactly half of gamma, where a bit is just decided, and with all scores equal."""
    sign_TKM = np.sign(np.random.default_rng(5).normal(size=(T, K, M)))
    parameters = {"w_DK": size * sign_TKM[:, :, 0].astype(np.float32), "bits_DKM": size * sign_TKM.astype(np.float32)}
    mask_T, x_TD = np.arange(T) != 3, np.eye(T, dtype=np.float32)
    weight_TE, entropy, _ = formula(CONFIG, float64(parameters), x_TD.astype(np.float64), mask_T)

    def told(parameters):
        out = eager_route(CONFIG, parameters, {}, x_TD, context(mask_T, sequences=1))
        weight_N = jnp.where(out.assignments.valid_N, out.assignments.weight_N, 0)
        return jnp.sum(weight_N**2) + sum(out.losses.values()), out

    (_, out), gradients = jax.jit(jax.value_and_grad(told, has_aux=True))(parameters)
    np.testing.assert_allclose(matrix(out.assignments, T, E)[1], weight_TE, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(out.losses["dselect_entropy"], entropy, rtol=1e-5, atol=1e-12)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradients, out)))
    assert not any(np.any(gradient[~mask_T]) for gradient in gradients.values())
    if size >= 0.5:
        assert not np.any(gradients["bits_DKM"]), "decided bits have no gradient"


def test_padding_of_any_content_reaches_nothing():
    given, junk, parameters = inputs(6), inputs(7), drawn(CONFIG, 6)

    def told(parameters, x_TD):
        out = eager_route(CONFIG, parameters, {}, x_TD, context(given.mask_T, given.ids_T))
        return jnp.sum(out.assignments.weight_N**2) + sum(out.losses.values()), (
            out.assignments.weight_N, out.assignments.valid_N, out.losses, out.entropy)

    evaluate = jax.jit(jax.value_and_grad(told, argnums=(0, 1), has_aux=True))
    padding_T1 = ~given.mask_T[:, None]
    one = evaluate(parameters, given.x_TD)
    two = evaluate(parameters, np.where(padding_T1, 1e3 * junk.x_TD, given.x_TD))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert not np.any(np.where(padding_T1, two[1][1], 0))


def test_micro_batches_add_up():
    given, parameters = inputs(8), drawn(CONFIG, 8)
    totals = Totals(jnp.float32(given.mask_T.sum()), jnp.float32(given.mask_T.reshape(B, -1).any(1).sum()))

    def told(parameters, x_TD, mask_T, sequences):
        out = eager_route(CONFIG, parameters, {}, x_TD, context(mask_T, sequences=sequences, totals=totals))
        return sum(out.losses.values()), (out.losses, out.entropy, out.statistics)

    evaluate = jax.jit(jax.value_and_grad(told, has_aux=True), static_argnums=3)
    big = evaluate(parameters, given.x_TD, given.mask_T, B)
    halves = [evaluate(parameters, given.x_TD[part], given.mask_T[part], B // 2)
              for part in (slice(T // 2), slice(T // 2, T))]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(b + c, a, rtol=1e-4, atol=1e-6), big, *halves)


def test_the_entropy_loss_decides_the_selectors():
    """Gradient descent on it alone takes bits that start near a half to 0 or 1, so K experts a token are left."""
    given = inputs(9)
    ctx = context(given.mask_T)

    def loss(parameters):
        return eager_route(CONFIG, parameters, {}, given.x_TD, ctx).losses["dselect_entropy"]

    def step(parameters, _):
        value, gradients = jax.value_and_grad(loss)(parameters)
        return jax.tree.map(lambda p, g: p - 0.05 * g, parameters, gradients), value

    parameters, values = jax.jit(lambda p: jax.lax.scan(step, p, length=200))(drawn(CONFIG, 9, 0.1))
    assert values[0] > 0.5 * np.log(E) and values[-1] < 0.3 * values[0]
    counts = [matrix(route(CONFIG, p, {}, given.x_TD, ctx).assignments, T, E)[0][given.mask_T].sum(1).mean()
              for p in (drawn(CONFIG, 9, 0.1), parameters)]
    assert counts[0] > E - 1 and counts[1] < 2 * K


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_every_power_of_two_works(experts):
    given = inputs(10)
    config = config_of("dselect", num_experts=experts, experts_per_token=1)
    parameters = drawn(config, 10)
    assert ("bits_DKM" in parameters) == (experts > 1)
    out = route(config, parameters, {}, given.x_TD, context(given.mask_T))
    weight_TE, *_ = formula(config, float64(parameters) | ({} if experts > 1 else {"bits_DKM": np.zeros((D, 1, 0))}),
                            given.x_TD.astype(np.float64), given.mask_T)
    np.testing.assert_allclose(matrix(out.assignments, T, experts)[1], weight_TE, rtol=1e-4, atol=1e-6)


def test_what_cannot_work_is_refused():
    with pytest.raises(UserError, match="config.moe.num_experts=6 is not a power of two"):
        config_of("dselect", num_experts=6)
    assert ROUTERS["dselect"].loss_weights(CONFIG) == {"dselect_entropy": 1e-6}
