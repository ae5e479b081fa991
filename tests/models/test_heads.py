"""Attention whose heads are experts, in a model: what learns, what is told and counted, and what cannot go together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_batch, tiny_config, tiny_model

from moejax.config import UserError
from moejax.models import count, transformer
from moejax.models.surgery import check_surgery
from moejax.models.upcycle import Upcycling, upcycle

BOTH = {"block_0", "block_0_heads"}


def config_of(**changes):
    return tiny_config(**{"model__layers": 2, "moe__first_dense": 0, "moe__bias_rate": 0.01, "moe__balance_weight": 0.01,
                          "moe__dispatch": "dense", "model__architecture": {"expert_heads": True}, **changes})


def run(model, params, state, batch, **options):
    return transformer.apply_batch(model, params, state, {name: batch[name] for name in (
        "tokens", "positions", "segments")}, train=True, **options)


def test_both_routers_learn_tell_their_losses_and_move_their_biases():
    config = config_of()
    model, params, state = tiny_model(config)
    batch = tiny_batch(config)

    @jax.jit
    def differentiate(params):
        def loss(params):
            output = run(model, params, state, batch)
            return jnp.sum(jnp.where(batch["segments"][..., None] > 0, output.hidden_BLD, 0)**2), output.records
        return jax.grad(loss, has_aux=True)(params)

    gradients, records = differentiate(params)
    own = gradients["stack_0"]["block_0"]
    for name in ("attention", "moe"):
        assert (np.abs(own[name]["router_w_DE"]).max(axis=(1, 2)) > 1e-4).all()
    assert set(records["stack_0"]) == set(state["stack_0"]) == BOTH
    losses = [record.losses["balance"] for record in records["stack_0"].values()]
    assert all((np.asarray(loss) > 0).all() for loss in losses) and not np.allclose(*losses)
    assert len(transformer.in_order(records)) == 4
    moved = transformer.update_router_state(config.moe, state, records)["stack_0"]
    for name in BOTH:
        load_RE = np.asarray(records["stack_0"][name].load.assigned_E)
        error_RE = load_RE.mean(axis=1, keepdims=True) - load_RE
        np.testing.assert_allclose(moved[name]["bias_E"], 0.01 * np.sign(error_RE), atol=1e-7)


@pytest.mark.slow
def test_parts_of_a_batch_know_each_routers_whole():
    config = config_of(moe__balance_scope="global")
    model, params, state = tiny_model(config)
    batch = tiny_batch(config)
    totals = transformer.count_totals(batch["segments"])
    told = jax.jit(lambda part, wholes: run(model, params, state, part, totals=totals, wholes=wholes).records)
    whole = jax.jit(lambda batch: run(model, params, state, batch).records)(batch)
    parts = [told({name: batch[name][i::2] for name in batch}, transformer.statistics_of(whole)) for i in range(2)]
    for name in BOTH:
        a, b, both = (records["stack_0"][name].losses["balance"] for records in (*parts, whole))
        np.testing.assert_allclose(a + b, both, rtol=1e-5)


def test_parameters_and_operations_by_hand():
    """Two experts of two heads a token, of five: as many operations as plain heads, and a second router."""
    config, plain = config_of(), config_of(model__architecture={})
    counted, before = (count.count_parameters(*transformer.abstract_params(transformer.build(one)), one.moe)
                       for one in (config, plain))
    heads = 2 * 24 * 2 * 6  # query and output projection of an expert
    assert counted.total - before.total == 2 * (24 * 5 + 5 * heads - 2 * heads)
    assert counted.active - before.active == 2 * 24 * 5
    added = count.forward_flops(config.model, config.moe, 14) - count.forward_flops(plain.model, plain.moe, 14)
    assert added == 2 * 2 * 24 * 5


@pytest.mark.parametrize("changes, words", [
    ({"moe__experts_per_token": 3}, "so set config.model.heads to 6, not 4"),
    ({"moe__router": "expert_choice", "moe__allow_noncausal_routing": True, "moe__bias_rate": 0.0}, "needs a top-k router"),
    ({"model__architecture": {"expert_heads": True, "qkv_bias": True}}, "together with config.model.architecture.qkv_bias"),
    ({"model__kv_heads": 4, "moe__experts_per_token": 1, "moe__renormalize": False, "model__architecture": {
        "expert_heads": True, "latent": {"rank": 5, "rotary_dim": 2, "value_dim": 3}}}, "architecture.latent"),
])
def test_what_does_not_go_together(changes, words):
    with pytest.raises(UserError, match=words):
        config_of(**changes)


def test_experts_that_are_heads_are_neither_pruned_nor_upcycled():
    with pytest.raises(UserError, match="expert_heads"):
        check_surgery(transformer.build(config_of()), 3)
    dense = config_of(moe__every=0)
    with pytest.raises(UserError, match="expert_heads"):
        upcycle(transformer.build(dense), {}, config_of().moe, Upcycling(), jax.random.key(0))
