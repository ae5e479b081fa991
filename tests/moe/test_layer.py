"""Laws of the whole layer: route, drop, dispatch, compute and combine, as one function and as a module."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import B, D, E, F, K, L, T, assert_close, config_of, context, eager_route, inputs

from moejax import config as configs
from moejax import sharding
from moejax.config import UserError
from moejax.metrics.record import routing_summary, total_records
from moejax.models import transformer
from moejax.moe.dispatch import DISPATCHERS
from moejax.moe.layer import MixtureOfExperts, choose_dispatcher, mixture

sparse_layer = jax.jit(mixture, static_argnums=0)
STEP = 1e-6


def leaves_of(given):
    return {"x": given.x_TD, "router": given.router, "w_in": given.w_in_ED2F, "w_out": given.w_out_EFD}


def parameters_of(given):
    return {"params": {"router_w_DE": given.router["w_DE"], "w_in": given.w_in_ED2F, "w_out": given.w_out_EFD}}


def run(config, leaves, where, state=None, key=None):
    return sparse_layer(config, leaves["router"], state or {}, leaves["w_in"], leaves["w_out"], leaves["x"], where, key)[:2]


def gradient_of(config, where, dy_TD, aux=0.0):
    """leaves -> gradients of sum(y * dy) + aux * losses, and (y, record)."""
    def total(leaves):
        y_TD, record = run(config, leaves, where)
        return jnp.sum(y_TD * dy_TD) + aux * sum(record.losses.values()), (y_TD, record)
    return jax.jit(jax.grad(total, has_aux=True))


@pytest.mark.parametrize("dispatch", ["dense", "sort"])
def test_a_transport_that_loses_a_row_is_caught_by_the_record(dispatch, monkeypatch):
    """Sent = received + dropped; the tokens received are counted where the experts compute, not copied from the router."""
    way = DISPATCHERS[dispatch]

    def lossy(assignments, sizes):
        first = jnp.argmax(assignments.valid_N)
        kept_N = assignments.valid_N & (jnp.arange(assignments.valid_N.shape[0]) != first)
        return way.plan(assignments.replace(valid_N=kept_N), sizes)

    given, where = inputs(1), context(inputs(1).mask_T)
    config = config_of(dispatch=dispatch, capacity_factor=0.75)

    def record():
        fresh = jax.jit(functools.partial(mixture, config))
        return total_records([[fresh(given.router, {}, given.w_in_ED2F, given.w_out_EFD, given.x_TD, where, None)[1]]])

    assert record()[0].load.dropped_E.sum() > 0 and routing_summary(record())["moe/dropped"][0] > 0
    monkeypatch.setitem(DISPATCHERS, dispatch, way._replace(plan=lossy))
    with pytest.raises(RuntimeError, match="sparse layer 0, expert .*: .* pairs were sent"):
        routing_summary(record())


@pytest.mark.parametrize("config", [
    config_of(score="softmax"), config_of(score="sigmoid", renormalize=False, capacity_factor=0.75, route_scale=2.0,
              drop_policy="choice_major"),
    config_of("expert_choice", score="sigmoid"), config_of(experts_per_token=1, renormalize=False)],
    ids=["topk", "capacity", "expert_choice", "switch"])
def test_output_and_gradients_equal_the_formulas_and_their_finite_differences(config):
    """Of the language-model loss alone; the router learns from it through the combine weights."""
    given, k = inputs(1), config.experts_per_token
    dy_TD = np.random.default_rng(2).normal(size=(T, D)).astype(np.float32)

    def formula(leaves):
        logits_TE = reference.logits(leaves["x"], leaves["router"]["w_DE"])
        if config.router == "expert_choice":
            count_TE, weight_TE = reference.expert_choice_matrix(logits_TE, given.mask_T, k, config.score, B)
            pairs = [(t, e, weight_TE[t, e]) for t, e in zip(*np.nonzero(count_TE), strict=True)]
        else:
            expert_TK, weight_TK = reference.topk(logits_TE, k, config.score, config.renormalize, config.route_scale)
            kept_TK = np.repeat(given.mask_T[:, None], k, 1)
            if config.capacity_factor is not None:
                kept_TK = reference.keep(expert_TK, weight_TK, given.mask_T, 0.75, "choice_major", B, E)
            pairs = [(t, expert_TK[t, c], weight_TK[t, c]) for t, c in zip(*np.nonzero(kept_TK), strict=True)]
        return reference.experts(leaves["x"], pairs, leaves["w_in"], leaves["w_out"])[0]

    leaves = leaves_of(given)
    gradients, (y_TD, _) = gradient_of(config, context(given.mask_T), dy_TD)(leaves)
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), leaves)
    assert_close(y_TD, formula(exact))
    assert np.abs(gradients["router"]["w_DE"]).max() > 0.01
    for name in leaves:
        for seed in range(3):
            direction = jax.tree.map(lambda a, seed=seed: np.random.default_rng(seed).normal(size=a.shape), exact[name])
            up, down = ({**exact, name: jax.tree.map(lambda a, d, step=step: a + step * d, exact[name], direction)}
                        for step in (STEP, -STEP))
            want = np.sum((formula(up) - formula(down)) * dy_TD) / (2 * STEP)
            got = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradients[name], direction)))
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("config", [
    config_of(capacity_factor=0.75), config_of("expert_choice", routing_group="global")], ids=["topk", "expert_choice"])
def test_padding_of_any_content_changes_nothing_for_real_tokens(config):
    given, junk = inputs(3), inputs(4)
    dy_TD = np.random.default_rng(5).normal(size=(T, D)).astype(np.float32)

    def padded(a_T, b_T):
        a, b = (v.reshape(B, L, *v.shape[1:]) for v in (a_T, b_T))
        return np.concatenate([np.concatenate([a, b], 1), np.concatenate([b, b], 1)]).reshape(-1, *a_T.shape[1:])

    mask_T = padded(given.mask_T, np.zeros(T, bool))
    small = gradient_of(config, context(given.mask_T, given.ids_T), dy_TD, aux=1.0)
    large = gradient_of(config, context(mask_T, padded(given.ids_T, junk.ids_T), 2 * B), padded(dy_TD, dy_TD), aux=1.0)
    leaves = leaves_of(given)
    want, (want_TD, want_record) = small(leaves)
    got, (y_TD, record) = large({**leaves, "x": padded(given.x_TD, junk.x_TD)})
    assert not np.any(np.asarray(y_TD)[~mask_T]) and not np.any(np.asarray(got["x"])[~mask_T])
    assert_close(np.asarray(y_TD)[mask_T], np.asarray(want_TD)[given.mask_T], 1e-6)
    got["x"], want["x"] = np.asarray(got["x"])[mask_T], np.asarray(want["x"])[given.mask_T]
    jax.tree.map(assert_close, got, want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), record, want_record)


def test_without_capacity_a_token_depends_on_itself_alone():
    """Permuting the batch permutes the output, and other neighbours change nothing."""
    given, other, config = inputs(6), inputs(7), config_of()
    order, kept = np.random.default_rng(0).permutation(T), np.arange(T) % 3 == 0
    y_TD, _ = run(config, leaves_of(given), context(given.mask_T))
    moved_TD, _ = run(config, {**leaves_of(given), "x": given.x_TD[order]}, context(given.mask_T[order]))
    assert_close(moved_TD, np.asarray(y_TD)[order], 1e-6)
    mixed = np.where(kept[:, None], given.x_TD, other.x_TD)
    mixed_TD, _ = run(config, {**leaves_of(given), "x": mixed}, context(given.mask_T))
    assert_close(np.asarray(mixed_TD)[kept], np.asarray(y_TD)[kept], 1e-6)


def test_jitter_reaches_the_router_but_not_the_experts():
    """With one expert the weight is 1 whatever the router sees, so only its z-loss may change."""
    given, key = inputs(8, experts=1), jax.random.key(0)
    clean, noisy = (config_of(num_experts=1, experts_per_token=1, jitter=jitter) for jitter in (0.0, 0.5))
    where = context(given.mask_T, key=key)
    (y_TD, record), (noisy_TD, noisy_record) = (run(config, leaves_of(given), where) for config in (clean, noisy))
    np.testing.assert_array_equal(noisy_TD, y_TD)
    assert noisy_record.losses["router_z"] != record.losses["router_z"]


@pytest.mark.parametrize("router", ["topk", "expert_choice"])
def test_jitter_multiplies_the_routers_input_by_a_uniform_factor_in_training_alone(router):
    config = config_of(router, num_experts=1, experts_per_token=1, jitter=0.3)
    parameters, x_TD = {"w_DE": np.ones((1, 1), np.float32)}, np.full((1, 1), 2.0, np.float32)

    def factor(key, train=True):
        loss = eager_route(config, parameters, {}, x_TD, context([True], sequences=1, train=train, key=key))
        return jnp.sqrt(loss.losses["router_z"]) / 2

    drawn = np.asarray(jax.jit(jax.vmap(factor))(jax.random.split(jax.random.key(0), 2000)))
    assert 0.7 <= drawn.min() < 0.71 and 1.29 < drawn.max() <= 1.3
    np.testing.assert_allclose(drawn.mean(), 1, atol=0.02)
    np.testing.assert_allclose(drawn.std(), 0.6 / np.sqrt(12), rtol=0.05)
    np.testing.assert_allclose(jax.jit(factor, static_argnums=1)(jax.random.key(1), False), 1, rtol=1e-6)


@pytest.mark.parametrize("experts_per_token, renormalize", [(1, False), (2, True)])
def test_a_router_that_starts_at_zero_learns_from_the_language_model_loss(experts_per_token, renormalize):
    given = inputs(9)
    config = config_of(experts_per_token=experts_per_token, renormalize=renormalize)
    leaves = {**leaves_of(given), "router": {"w_DE": np.zeros((D, E), np.float32)}}
    gradients, _ = gradient_of(config, context(given.mask_T), np.ones((T, D), np.float32))(leaves)
    assert np.linalg.norm(gradients["router"]["w_DE"]) > 0.1


def test_rematerialisation_repeats_the_same_choices_and_counts_nothing_twice():
    given, config = inputs(10), config_of(bias_rate=0.01, capacity_factor=0.75, jitter=0.2)
    state = reference.initial_state(config)

    def total(leaves, remat):
        layer = jax.checkpoint(run, static_argnums=0) if remat else run
        y_TD, record = layer(config, leaves, context(given.mask_T, key=jax.random.key(1)), state)
        return jnp.sum(jnp.sin(y_TD)) + sum(record.losses.values()), record

    results = [jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)(leaves_of(given), remat)
               for remat in (False, True)]
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), *results)
    assert results[1][0][1].statistics["assigned_E"].sum() == K * given.mask_T.sum()


def test_the_module_initialises_each_expert_like_a_lone_layer_and_names_every_axis():
    """The standard deviation follows the expert's own fan-in, not that of the stack."""
    width, hidden, out_scale, count = 48, 40, 0.5, 32
    module = MixtureOfExperts(config_of(num_experts=count, router_init=0.1), hidden, out_scale, jnp.float32)
    where = context(np.ones(6, bool), sequences=2)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((2, 3, width)), {}, where)
    assert set(variables) == {"params"}, "nothing hides in other collections"
    params, logical = nn.meta.unbox(variables["params"]), nn.get_partition_spec(variables)["params"]
    for name, std in (("w_in", width**-0.5), ("w_out", out_scale * hidden**-0.5), ("router_w_DE", 0.1 * width**-0.5)):
        assert params[name].dtype == jnp.float32 and params[name].ndim == len(sharding.spec(logical[name]))
        np.testing.assert_allclose(np.std(params[name]), std, rtol=0.1)
    assert logical["w_in"][0] == logical["w_out"][0] == "experts"


def test_a_bfloat16_module_routes_in_float32_and_keeps_its_parameters_in_float32():
    given = inputs(11)
    module = MixtureOfExperts(config_of(), F, 1.0, jnp.bfloat16)
    x_BLD, where = jnp.asarray(given.x_TD.reshape(B, L, D), jnp.bfloat16), context(given.mask_T)
    y_BLD, record, _ = jax.jit(module.apply)(parameters_of(given), x_BLD, {}, where)
    assert y_BLD.dtype == jnp.bfloat16
    x_TD = np.asarray(x_BLD.reshape(T, D).astype(jnp.float32))
    want_TD, want = run(module.config, {**leaves_of(given), "x": x_TD}, where)
    jax.tree.map(np.testing.assert_array_equal, record, want)
    assert_close(y_BLD.reshape(T, D).astype(jnp.float32), want_TD, 0.02)


def test_noise_needs_training_and_evaluation_needs_no_key():
    given = inputs(12)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def apply(train, config, rngs):
        return MixtureOfExperts(config, F, 1.0, jnp.float32).apply(
            parameters_of(given), given.x_TD.reshape(B, L, D), {}, context(given.mask_T, train=train), rngs=rngs)[0]

    quiet, _ = run(config_of(), leaves_of(given), context(given.mask_T))
    restless = config_of(jitter=0.5, expert_dropout=0.5)
    assert_close(apply(False, restless, {}).reshape(T, D), quiet, 1e-6)
    one, again, other = (apply(True, restless, {"dropout": jax.random.key(seed)}) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1 and np.abs(one.reshape(T, D) - quiet).max() > 0.1


def small_model(**changes):
    tree = configs.default()
    tree.model.update(dict(vocab_size=13, embed=12, heads=2, kv_heads=1, head_dim=4, ffn=10, layers=2, max_length=L))
    tree.data.length = L
    tree.moe.update(dict(
        num_experts=E, experts_per_token=1, renormalize=False, shared_experts=2, block_rows=4) | changes)
    return transformer.build(configs.build(tree))


@functools.cache
def small_batch_and_parameters():
    tokens_BL = jax.random.randint(jax.random.key(1), (B, L), 0, 13)
    batch = (tokens_BL, jnp.broadcast_to(jnp.arange(L), (B, L)), jnp.ones((B, L), jnp.int32), {})
    return batch, nn.meta.unbox(jax.jit(small_model().init)(jax.random.key(0), *batch))["params"]


def test_layers_that_collapse_onto_different_experts_each_pay_for_it():
    """Losses are taken in each layer; pooled over layers, one collapse would balance the other."""
    batch, params = small_batch_and_parameters()
    # Equal embeddings make all tokens alike, so each layer sends all to one expert.
    change = {"table": jnp.ones_like, "router_w_DE": lambda w: 30 * w}
    alike = jax.tree_util.tree_map_with_path(lambda path, a: change.get(path[-1].key, jnp.asarray)(a), params)
    records = transformer.in_order(jax.jit(small_model().apply)({"params": alike}, *batch).records)
    winners = [np.flatnonzero(record.load.assigned_E).tolist() for record in records]
    assert len(records) == 2 and [len(winner) for winner in winners] == [1, 1] and winners[0] != winners[1]
    for record in records:
        assert record.losses["balance"] > 0.9 * E and record.losses["balance"].shape == ()


def test_shared_experts_see_every_token_and_their_output_counts():
    """With the routed experts' weights at 0, the model is the dense one whose layers are the shared experts."""
    batch, params = small_batch_and_parameters()
    module = small_model(route_scale=0.0)
    dense = module.clone(model=dataclasses.replace(module.model, ffn=2 * module.model.ffn),
                         moe=dataclasses.replace(module.moe, every=0))
    block = params["stack_0"]["block_0"]
    dense_block = {"feed_forward" if name == "shared" else name: part for name, part in block.items() if name != "moe"}
    logits_BLV = jax.jit(module.apply)({"params": params}, *batch).logits_BLV
    want = jax.jit(dense.apply)({"params": {**params, "stack_0": {"block_0": dense_block}}}, *batch).logits_BLV
    assert_close(logits_BLV, want)
    assert np.abs(block["shared"]["w_out"]).max() > 0


def test_without_a_mesh_auto_sorts_and_an_expert_choice_list_is_fine():
    for name in ("auto", "sort", "all_gather", "all_to_all", "ragged"):  # all is at hand
        assert choose_dispatcher(config_of(dispatch=name), local=True, pairs=2) is DISPATCHERS["sort"]
        assert choose_dispatcher(config_of(dispatch=name), local=False, pairs=2) is DISPATCHERS["sort"]


def test_a_decoder_refuses_a_router_that_looks_ahead():
    with pytest.raises(UserError, match="router=expert_choice looks at later tokens.*allow_noncausal_routing"):
        small_model(router="expert_choice")
