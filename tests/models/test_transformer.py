"""Laws of the Transformer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import positions_of, tiny_batch, tiny_config, tiny_model

from moejax.config import UserError
from moejax.models import stacks, transformer


@functools.partial(jax.jit, static_argnames=("model", "train"))
def run(model, params, state, batch, train=False):
    return model.apply({"params": params}, batch["tokens"], batch["positions"], batch["segments"], state, train=train)


def test_later_tokens_change_nothing_before_them():
    config = tiny_config()
    model, params, state = tiny_model(config)
    batch = tiny_batch(config, padded=0)
    batch["segments"] = np.ones_like(batch["segments"])
    at = 9
    tokens = batch["tokens"]
    changed = batch | {"tokens": np.concatenate([tokens[:, :at], tokens[:, at:] * 5 % 37], axis=1)}
    before, after = (run(model, params, state, b).logits_BLV for b in (batch, changed))
    np.testing.assert_allclose(before[:, :at], after[:, :at], atol=2e-6)
    assert np.abs(before[:, at:] - after[:, at:]).max() > 1e-2


def test_packed_documents_do_not_see_each_other():
    config = tiny_config()
    model, params, state = tiny_model(config)
    batch = tiny_batch(config, padded=0)
    packed = run(model, params, state, batch).logits_BLV
    for row in range(3):
        second = batch["segments"][row] == 2
        alone = {"tokens": batch["tokens"][row, second][None], "segments": np.ones((1, second.sum()), np.int32)}
        alone["positions"] = positions_of(alone["tokens"])
        wanted = run(model, params, state, alone).logits_BLV[0]
        np.testing.assert_allclose(packed[row, second], wanted, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("router", [
    "topk", pytest.param("hash", marks=pytest.mark.slow), pytest.param("expert_choice", marks=pytest.mark.slow)])
def test_padding_changes_nothing(router):
    config = tiny_config(moe__router=router, moe__allow_noncausal_routing=True, moe__capacity_factor=1.0)
    model, params, state = tiny_model(config)
    short = tiny_batch(config)
    rng = np.random.default_rng(5)
    extra = {name: np.zeros((len(a), 14), a.dtype) for name, a in short.items()}
    extra["tokens"] = rng.integers(0, 37, extra["tokens"].shape, dtype=np.int32)
    long = {name: np.concatenate([short[name], extra[name]], axis=1) for name in short}

    def loss(params, batch):
        output = run(model, params, state, batch, train=True)
        records = transformer.in_order(output.records)
        real = (batch["segments"] > 0)[..., None]
        return (jnp.sum(jnp.where(real, jnp.sin(output.logits_BLV), 0))
                + sum(sum(record.losses.values()) for record in records)), (output.logits_BLV, records)

    (a, (logits, records)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, short)
    (b, (long_logits, long_records)), long_grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, long)
    assert float(a) == pytest.approx(float(b), rel=1e-6)
    real = short["segments"] > 0
    np.testing.assert_allclose(logits[real], long_logits[:, :14][real], atol=1e-6 * np.abs(logits).max())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(
        x, y, atol=5e-6 * np.abs(x).max()), grads, long_grads)  # float32 sums over 112 tokens in another order
    for record, long_record in zip(records, long_records, strict=True):
        np.testing.assert_array_equal(record.load.assigned_E, long_record.load.assigned_E)
        np.testing.assert_array_equal(record.load.received_E, long_record.load.received_E)
        assert int(record.load.tokens) == int(real.sum()) == int(long_record.load.tokens)


@pytest.mark.parametrize("router", ["topk", "hash"])
def test_batch_mates_change_nothing_in_evaluation(router):
    config = tiny_config(moe__router=router, moe__capacity_factor=0.5)
    model, params, state = tiny_model(config)
    batch = tiny_batch(config)
    whole = run(model, params, state, batch).logits_BLV
    order = np.random.default_rng(1).permutation(8)
    shuffled = run(model, params, state, {name: a[order] for name, a in batch.items()}).logits_BLV
    alone = run(model, params, state, {name: a[2:3] for name, a in batch.items()}).logits_BLV
    real = batch["segments"] > 0
    bound = 1e-6 * np.abs(whole).max()  # a batch of another size is another program, with sums in another order
    np.testing.assert_allclose(shuffled[real[order]], whole[order][real[order]], atol=bound)
    np.testing.assert_allclose(alone[0][real[2]], whole[2][real[2]], atol=bound)


@pytest.mark.parametrize("changes", [
    pytest.param({"train__remat": "full"}, marks=pytest.mark.slow),
    pytest.param({"train__remat": "dots"}, marks=pytest.mark.slow),
    pytest.param({"train__scan_layers": False}, marks=pytest.mark.slow)])
def test_remat_and_unrolling_change_nothing(changes):
    """Gradients, and counts of the routers, which recomputation must not double."""
    def gradient(config):
        model = transformer.build(config)
        _, params, state = tiny_model(tiny_config(moe__bias_rate=0.1, model__layers=5, moe__every=2))
        batch = tiny_batch(config)
        def loss(params):
            output = run(model, params, state, batch, train=True)
            return jnp.sum(jnp.sin(output.logits_BLV)), output.records
        return jax.jit(jax.grad(loss, has_aux=True))(params)
    grads, records = gradient(tiny_config(moe__bias_rate=0.1, model__layers=5, moe__every=2))
    other_grads, other_records = gradient(tiny_config(moe__bias_rate=0.1, model__layers=5, moe__every=2, **changes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max()), grads, other_grads)
    counts = [jax.tree.map(lambda r: r.load.assigned_E, r, is_leaf=lambda n: hasattr(n, "load"))
              for r in (records, other_records)]
    jax.tree.map(np.testing.assert_array_equal, *counts)


@pytest.mark.parametrize("layers, every, first_dense", [(1, 1, 0), (4, 1, 1), (5, 2, 0), (7, 3, 2), (3, 0, 0), (2, 1, 5)])
def test_stacks_hold_the_right_blocks(layers, every, first_dense):
    config = tiny_config(model__layers=layers, moe__every=every, moe__first_dense=first_dense)
    planned = stacks.plan_stacks(config.model, config.moe).values()
    flat = [sparse for stack in planned for sparse in stack.sparse * stack.repeats]
    wanted = [every > 0 and i >= first_dense and (i - first_dense + 1) % every == 0 for i in range(layers)]
    assert flat == wanted
    model, params, state = tiny_model(config)
    records = transformer.in_order(run(model, params, state, tiny_batch(config)).records)
    assert len(records) == sum(wanted)


def test_shared_experts_and_qk_norm_and_tied_head_take_part():
    config = tiny_config(moe__shared_experts=2, model__qk_norm=True, model__tie_embeddings=True)
    model = transformer.build(config)
    params = jax.jit(lambda key: transformer.initial_params(model, key))(jax.random.key(0))
    assert "head" not in params["embedding"]
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(run(
        model, p, transformer.initial_router_state(config.model, config.moe), tiny_batch(config)).logits_BLV))))(params)
    sparse = grads["stack_1"]["block_0"]
    for leaf in (sparse["shared"]["w_in"], sparse["attention"]["q_norm"]["scale"], sparse["moe"]["router_w_DE"]):
        assert np.abs(leaf).max() > 0


def test_expert_initialisation_does_not_count_the_expert_axis():
    config = tiny_config(moe__num_experts=40, model__embed=48)
    params = jax.jit(lambda key: transformer.initial_params(transformer.build(config), key))(jax.random.key(0))
    params = params["stack_1"]["block_0"]["moe"]
    assert np.std(params["w_in"]) == pytest.approx(48**-0.5, rel=0.05)
    assert np.std(params["w_out"]) == pytest.approx(12**-0.5 * 6**-0.5, rel=0.05)


def test_initial_loss_is_that_of_a_uniform_guess():
    config = tiny_config()
    model = transformer.build(config)
    params = jax.jit(lambda key: transformer.initial_params(model, key))(jax.random.key(0))
    logits = run(model, params, transformer.initial_router_state(config.model, config.moe), tiny_batch(config)).logits_BLV
    assert np.abs(jax.nn.logsumexp(logits, axis=-1) - np.log(37)).max() < 0.1


def test_bfloat16_routes_as_float32_does_on_the_same_input():
    from moejax.moe.routing import ROUTERS
    from moejax.moe.types import RoutingContext, Totals
    config = tiny_config().moe
    x = jax.random.normal(jax.random.key(0), (50, 24), jnp.bfloat16)
    context = RoutingContext(jnp.arange(50), jnp.ones(50, bool), Totals(jnp.float32(50), jnp.float32(5)), whole=None,
                             carry_TC=None, key=None, sequences=5, shards=1, train=False)
    weights = {"w_DE": jax.random.normal(jax.random.key(1), (24, 5))}
    low, high = (ROUTERS["topk"].route(config, weights, {}, a, context) for a in (x, x.astype(jnp.float32)))
    np.testing.assert_array_equal(low.assignments.expert_N, high.assignments.expert_N)
    np.testing.assert_array_equal(low.assignments.weight_N, high.assignments.weight_N)
    model, params, state = tiny_model(tiny_config(train__dtype="bfloat16"))
    text = str(jax.make_jaxpr(lambda p: run(model, p, state, tiny_batch(tiny_config())).logits_BLV)(params))
    assert "bf16" in text


def test_a_router_that_sees_the_future_needs_leave():
    with pytest.raises(UserError, match="allow_noncausal_routing"):
        transformer.build(tiny_config(moe__router="expert_choice"))
    with pytest.raises(UserError, match="did you mean topk"):
        transformer.build(tiny_config(moe__router="topkk"))
