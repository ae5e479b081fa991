"""Laws that hold for every entry of `ROUTERS`: a router that is added is tested here without a line of its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import B, D, L, T, context, inputs

from moejax import sharding
from moejax.config import MoEConfig, UserError
from moejax.moe import routing
from moejax.moe.layer import mixture
from moejax.moe.routing import ROUTERS, get_router
from moejax.moe.types import Assignments, Merger, RoutingContext, Slots, Totals

E, F = 8, 3
LAYERS = [name for name, router in ROUTERS.items() if router.level == "layer"]
FAMILIES = {ROUTERS[name].route: name for name in reversed(LAYERS)}
"""One router for each rule; the others differ from it by settings alone."""
FAST = ("topk", "base", "moe_pp", "remoe", "soft_moe")
"""Routers of different kinds. The compiling laws of others need `--slow` (`pytest tests/moe/test_routers.py --slow -k X`);
each family's own tests cover most of them again."""
every_router = pytest.mark.parametrize("name", LAYERS)
SETTINGS = {"lory": {"options": {"segment": 2}}, "token_rounding": {"options": {"tile": 4}},
            "soft_moe": {"options": {"slots": 2}}, "sparse_mixer": {"options": {"jitter_eps": 0.5}}}
"""Where the defaults are made for longer sequences than those here, or leave few of these tokens a choice to learn from."""
KEY = jax.random.key(3)


@pytest.fixture(scope="module", params=[
    pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in LAYERS])
def name(request):
    """A router. Of the scope of the module so that its tests follow each other and share what they compile."""
    return request.param


def config_of(name, **changes):
    """Dispatch is the oracle's, which is the quickest to compile."""
    settings = {"router": name, "num_experts": E, "dispatch": "dense"} | SETTINGS.get(name, {}) | changes
    return routing.resolve(MoEConfig(**settings))


@functools.cache
def parameters_of(config, seed=0):
    """Random parameters of the size that initialisation gives, but none of them zero."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(own.mean + 0.7 * rng.normal(size=own.shape), jnp.float32)
            for name, own in get_router(config.router).parameters(config, D).items()}


def state_of(config):
    return reference.initial_state(config)


def carry_of(config, seed=0, tokens=T):
    size = get_router(config.router).carry(config)
    return jnp.asarray(np.random.default_rng(seed).normal(size=(tokens, size)), jnp.float32) if size else None


def where(config, mask_T, ids_T, sequences=B, train=True, **others):
    return context(mask_T, ids_T, sequences=sequences, train=train, key=KEY if train else None,
                   **({"carry_TC": carry_of(config, tokens=len(mask_T))} | others))


@functools.partial(jax.jit, static_argnums=0)
def route(config, parameters, state, x_TD, context):
    return get_router(config.router).route(config, parameters, state, x_TD, context)


def pairs(assignments, tokens=T, experts=E):
    """What a decision gives to each token and expert: counts and weights [T, E] for lists, shares for the others."""
    if isinstance(assignments, Slots):
        share_TE = jnp.einsum("bles,bmes->ble", assignments.dispatch_BLES, assignments.combine_BLES)
        return np.zeros((tokens, experts), int), np.asarray(share_TE.reshape(tokens, experts))
    if isinstance(assignments, Merger):
        weight_GE = np.asarray(assignments.weight_GE)
        return np.zeros((tokens, experts), int), np.repeat(weight_GE, tokens // len(weight_GE), axis=0)
    return reference.matrix(assignments, tokens, experts)


@functools.partial(jax.jit, static_argnums=0)
def layer(config, leaves, state, context, weight_of_losses=1.0):
    """Output, record, and all gradients of a scalar of the two."""
    def total(leaves):
        y_TD, record, carry_TC, _ = mixture(config, leaves["router"], state, leaves["w_in"], leaves["w_out"], leaves["x"],
                                         context, None)
        weights = get_router(config.router).loss_weights(config)
        assert set(weights) == set(record.losses)
        losses = sum(record.losses.values(), jnp.zeros(()))
        output = jnp.sum(jnp.where(context.mask_T[:, None], jnp.sin(y_TD), 0))
        return output + weight_of_losses * losses, (y_TD, record, carry_TC)
    gradients, told = jax.grad(total, has_aux=True)(leaves)
    return told, gradients


def leaves_of(config, given, seed=0):
    rng = np.random.default_rng(seed)
    return {"x": jnp.asarray(given.x_TD), "router": parameters_of(config),
            "w_in": jnp.asarray(rng.normal(size=(E, D, 2, F)) * 0.5, jnp.float32),
            "w_out": jnp.asarray(rng.normal(size=(E, F, D)) * 0.5, jnp.float32)}


@every_router
def test_metadata_is_complete_and_resolving_twice_changes_nothing(name):
    router, config = ROUTERS[name], config_of(name)
    assert router.paper and router.rule and len(router.rule) < 100
    assert routing.resolve(config) == config and hash(config) is not None
    assert set(router.defaults) <= set(routing.ROUTED)
    assert bool(router.evaluation) or router.causal, "what is not causal in training says what it does in evaluation"
    assert not (router.generates and not router.causal and not router.evaluation)
    for own in router.parameters(config, D).values():
        assert len(own.shape) == len(own.axes) and sharding.spec(own.axes) is not None
    assert (routing.leak(config) is None) or not router.causal or config.capacity_factor or config.eval_capacity_factor


@every_router
def test_everything_is_finite_and_float32_and_padding_has_no_pair(name):
    given, config = inputs(1, E), config_of(name)
    for train in (True, False):
        out = route(config, parameters_of(config), state_of(config), jnp.asarray(given.x_TD, jnp.bfloat16),
                    where(config, given.mask_T, given.ids_T, train=train))
        for leaf in jax.tree.leaves(out):
            assert leaf.dtype in (jnp.float32, jnp.int32, jnp.bool_) and np.isfinite(leaf).all()
        if isinstance(out.assignments, Assignments):
            count_TE, weight_TE = pairs(out.assignments)
            assert count_TE.max() == 1 and (weight_TE >= 0).all() and not count_TE[~given.mask_T].any()
            if not ROUTERS[name].variable and out.added_TD is None:
                np.testing.assert_array_equal(count_TE[given.mask_T].sum(1), config.experts_per_token)
        if isinstance(out.assignments, Merger):
            np.testing.assert_allclose(out.assignments.weight_GE.sum(1), 1, rtol=1e-5)


def test_a_bfloat16_model_routes_in_float32(name):
    given, config = inputs(5, E), config_of(name)
    low, high = (route(config, parameters_of(config), state_of(config), x, where(config, given.mask_T, given.ids_T))
                 for x in (jnp.asarray(given.x_TD, jnp.bfloat16),
                           jnp.asarray(given.x_TD, jnp.bfloat16).astype(jnp.float32)))
    jax.tree.map(np.testing.assert_array_equal, low, high)


@pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_padding_of_any_content_changes_nothing_for_real_tokens(name, train):
    """Each row gets as much padding again, and there are rows of nothing else. The layer, its losses and all gradients.

    Random numbers are drawn by place, so a router that draws some is only held to this in evaluation.
    """
    config = config_of(name)
    if train and get_router(name).noisy(config):
        config = config_of(name, jitter=0.0)
        if get_router(name).noisy(config):
            pytest.skip("draws random numbers")
    given, junk = inputs(3, E), inputs(4, E)

    def padded(a_T, b_T):
        a, b = (np.asarray(v).reshape(B, L, *v.shape[1:]) for v in (a_T, b_T))
        return np.concatenate([np.concatenate([a, b], 1), np.concatenate([b, b], 1)]).reshape(-1, *a_T.shape[1:])

    carry, other = (carry_of(config, seed) for seed in (0, 1))
    wide = None if carry is None else padded(carry, other)
    mask_T = padded(given.mask_T, np.zeros(T, bool))
    leaves = leaves_of(config, given)
    (y_TD, record, _), gradients = layer(config, leaves, state_of(config),
                                         where(config, given.mask_T, given.ids_T, train=train, carry_TC=carry))
    (y2_TD, record2, _), gradients2 = layer(
        config, {**leaves, "x": padded(given.x_TD, 100 * junk.x_TD)}, state_of(config),
        where(config, mask_T, padded(given.ids_T, junk.ids_T), 2 * B, train=train, carry_TC=wide))
    assert not np.any(np.asarray(y2_TD)[~mask_T]) and not np.any(np.asarray(gradients2["x"])[~mask_T])
    compare = (y_TD[given.mask_T], {**gradients, "x": gradients["x"][given.mask_T]}, record.losses, record.statistics)
    with_padding = (y2_TD[mask_T], {**gradients2, "x": gradients2["x"][mask_T]}, record2.losses, record2.statistics)
    for a, b in zip(jax.tree.leaves(compare), jax.tree.leaves(with_padding), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * max(1, np.abs(a).max(initial=0)))
    if name != "soft_moe":  # whose empty sequences have slots, too
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), record.load, record2.load)


def test_the_losses_and_sums_of_micro_batches_add_up_to_those_of_the_big_batch(name):
    given = inputs(6, E)
    config = config_of(name, **({} if ROUTERS[name].defaults.get("balance_scope") == "sequence" else
                                {"balance_scope": "global"}), routing_group="sequence", jitter=0.0)
    router = get_router(name)
    train = not router.noisy(config)
    real_BL = given.mask_T.reshape(B, L)
    totals = Totals(jnp.float32(real_BL.sum()), jnp.float32(real_BL.any(1).sum()))

    @functools.partial(jax.jit, static_argnums=3)
    def evaluate(parameters, x_TD, rest, sequences):
        """Losses, entropy and statistics, and the gradient of the losses."""
        def total(parameters):
            mask_T, ids_T, carry_TC, whole = rest
            out = router.route(config, parameters, state_of(config), x_TD, RoutingContext(
                ids_T, mask_T, totals, whole, carry_TC, KEY if train else None, sequences, 1, train))
            return sum(out.losses.values(), jnp.zeros(())), (out.losses, out.entropy, out.statistics)
        return jax.grad(total, has_aux=True)(parameters)

    parameters, carry = parameters_of(config), carry_of(config)
    want, told = evaluate(parameters, given.x_TD, (given.mask_T, given.ids_T, carry, None), B)
    halves = [evaluate(parameters, given.x_TD[part], (given.mask_T[part], given.ids_T[part],
                                                      None if carry is None else carry[part], told[2]), B // 2)
              for part in (slice(T // 2), slice(T // 2, T))]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(b + c, a, rtol=2e-5, atol=1e-6), told,
                 *[half[1] for half in halves])
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(b + c, a, rtol=1e-4, atol=1e-6), want,
                 *[half[0] for half in halves])


def test_a_router_is_causal_exactly_if_it_says_so(name):
    """Later tokens of a row are replaced; in training, with the same random numbers."""
    config = config_of(name, capacity_factor=None, eval_capacity_factor=None)
    given, other = inputs(9, E), inputs(10, E)
    mask_T, early = np.ones(T, bool), np.tile(np.arange(L) < L // 2, B)
    x_TD, ids_T = np.where(early[:, None], given.x_TD, other.x_TD), np.where(early, given.ids_T, other.ids_T)
    leaves = leaves_of(config, given)
    (one_TD, *_), _ = layer(config, leaves, state_of(config), where(config, mask_T, given.ids_T))
    (two_TD, *_), _ = layer(config, {**leaves, "x": x_TD}, state_of(config), where(config, mask_T, ids_T))
    change = np.abs(np.asarray(one_TD - two_TD))[early].max()
    assert change < 1e-6 if ROUTERS[name].causal else change > 1e-3
    (one_TD, *_), _ = layer(config, leaves, state_of(config), where(config, mask_T, given.ids_T, train=False))
    (two_TD, *_), _ = layer(config, {**leaves, "x": x_TD}, state_of(config), where(config, mask_T, ids_T, train=False))
    change = np.abs(np.asarray(one_TD - two_TD))[early].max()
    assert change < 1e-6 if ROUTERS[name].causal or ROUTERS[name].generates else change > 1e-3


@pytest.mark.parametrize("name", [name for name in FAMILIES.values() if ROUTERS[name].causal and name != "lory"])
def test_token_choice_follows_a_permutation_of_the_tokens(name):
    given, config = inputs(8, E), config_of(name, balance_scope="global")
    order = np.random.default_rng(1).permutation(T)
    carry, router = carry_of(config), get_router(name)
    options = dict(train=False) if router.noisy(config) else {}
    one = route(config, parameters_of(config), state_of(config), given.x_TD, where(
        config, given.mask_T, given.ids_T, **options))
    other = route(config, parameters_of(config), state_of(config), given.x_TD[order], where(
        config, given.mask_T[order], given.ids_T[order], **options,
        carry_TC=None if carry is None else carry[order]))
    np.testing.assert_allclose(pairs(other.assignments)[1], pairs(one.assignments)[1][order], rtol=1e-5, atol=1e-7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                 (one.losses, one.entropy, one.statistics), (other.losses, other.entropy, other.statistics))


@pytest.mark.parametrize("experts, choices", [(E, E), (1, 1), (E, 1)])
def test_as_many_choices_as_experts_one_expert_and_one_choice_work_or_are_refused(name, experts, choices):
    given = inputs(11, experts)
    try:
        config = config_of(name, num_experts=experts, experts_per_token=choices)
    except UserError as error:
        assert "config.moe." in str(error) and "\n" not in str(error)
        return
    out = route(config, parameters_of(config), state_of(config), given.x_TD, where(config, given.mask_T, given.ids_T))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    new = get_router(name).update(config, state_of(config), out.statistics)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))


def test_extreme_logits_give_finite_results_and_gradients(name):
    """All logits equal, or far apart, or one expert far ahead of the others; and a batch of nothing but padding."""
    given, config = inputs(13, E), config_of(name)
    for size in (0.0, 60.0, 1e4):
        x_TD = np.zeros((T, D), np.float32)
        x_TD[:, 0] = np.resize([size, -size, 1.0], T)
        leaves = {**leaves_of(config, given), "x": jnp.asarray(x_TD)}
        leaves["router"] = {key: jnp.zeros_like(value).at[..., 0].set(1).at[:1].set(
            jnp.resize(jnp.asarray([1.0, -1, 0]), value[:1].shape)) if value.ndim > 1 else value
            for key, value in leaves["router"].items()}
        for mask_T in (np.ones(T, bool), np.zeros(T, bool)):
            for train in (True, False):
                out = layer(config, leaves, state_of(config), where(config, mask_T, given.ids_T, train=train))
                assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out)), (size, train)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ("topk", "base", "moe_pp") else pytest.mark.slow) for name in LAYERS])
def test_jit_equals_eager(name):
    given, config = inputs(4, E), config_of(name)
    arguments = (config, parameters_of(config), state_of(config), given.x_TD, where(config, given.mask_T, given.ids_T))
    slow, fast = get_router(name).route(*arguments), route(*arguments)
    for a, b in zip(jax.tree.leaves(slow), jax.tree.leaves(fast), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_state_has_no_gradient_and_its_update_keeps_shapes_and_types(name):
    given, config = inputs(14, E), config_of(name)
    state = state_of(config)
    out = route(config, parameters_of(config), state, given.x_TD, where(config, given.mask_T, given.ids_T))
    new = get_router(name).update(config, state, out.statistics)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(lambda a: (a.shape, a.dtype), dict(state))
    smooth = {key: value for key, value in state.items() if jnp.issubdtype(value.dtype, jnp.floating)}

    def total(smooth):
        out = get_router(name).route(config, parameters_of(config), {**state, **smooth}, given.x_TD,
                                     where(config, given.mask_T, given.ids_T))
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(dataclasses.replace(out, losses={}, statistics={}).assignments)
                   if jnp.issubdtype(leaf.dtype, jnp.floating))

    for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(smooth) if smooth else {}):
        np.testing.assert_array_equal(leaf, 0)


def test_a_router_with_weights_learns_from_the_output_alone(name):
    """The combine weights are not detached: some router parameter gets a gradient without any loss of its own."""
    given, config = inputs(15, E), config_of(name)
    _, gradients = layer(config, leaves_of(config, given), state_of(config), where(config, given.mask_T, given.ids_T), 0.0)
    gradients = jax.tree.leaves(gradients["router"])
    assert not gradients or max(float(jnp.abs(g).max()) for g in gradients) > 1e-3
