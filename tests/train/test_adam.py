import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.train.adam import scale_by_adam, where_sound

SETTINGS = dict(b1=0.9, b2=0.95, eps=1e-6)
OURS, THEIRS = scale_by_adam(*SETTINGS.values()), optax.scale_by_adam(**SETTINGS)


def gradients(seed):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(3, 5, 7)), jnp.float32),
            "norm": {"scale": jnp.asarray(rng.normal(size=(5,)), jnp.float32)}}


@pytest.mark.parametrize("jit", [True, False])
def test_equals_optax(jit):
    """Updates, moments and names of what is kept."""
    ours, theirs = (jax.jit(rule.update) if jit else rule.update for rule in (OURS, THEIRS))
    our_state, their_state = (rule.init(gradients(0)) for rule in (OURS, THEIRS))
    assert our_state._fields == their_state._fields
    for step in range(5):
        grads = gradients(step)
        our_updates, our_state = ours(grads, our_state, sound=True)
        their_updates, their_state = theirs(grads, their_state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), (our_updates, tuple(our_state)),
                     (their_updates, tuple(their_state)))
    assert our_state.count == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1.0])
def test_a_step_that_is_not_sound_leaves_the_moments_bit_for_bit(bad):
    update = jax.jit(OURS.update)
    for before in (OURS.init(gradients(0)), update(gradients(1), OURS.init(gradients(0)), sound=True)[1]):
        grads = jax.tree.map(lambda g: g * bad, gradients(2))
        _, after = update(grads, before, sound=False)
        jax.tree.map(np.testing.assert_array_equal, after, before)


def test_whether_a_step_counts_has_to_be_said():
    with pytest.raises(TypeError, match="sound"):
        OURS.update(gradients(0), OURS.init(gradients(0)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the CPU's compiler")
def test_a_cpu_needs_no_memory_beside_parameters_moments_and_gradients():
    """optax's copies both moments, as the same program with it shows."""
    def step(rule, params, state, grads, sound):
        updates, new = rule.update(grads, state, params, **({"sound": sound} if rule is OURS else {}))
        return where_sound(sound, (optax.apply_updates(params, updates), new), (params, state))

    params = {"w": jnp.ones((4, 300, 700))}
    beside = {}
    for name, rule in (("ours", OURS), ("theirs", THEIRS)):
        compiled = jax.jit(step, static_argnums=0, donate_argnums=(1, 2)).lower(
            rule, params, rule.init(params), params, True).compile()
        beside[name] = compiled.memory_analysis().temp_size_in_bytes / params["w"].nbytes
    assert beside["ours"] < 0.1 and beside["theirs"] > 1.9, beside
