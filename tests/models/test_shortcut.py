"""Experts on a shortcut: where their output joins, what learns, and what cannot go together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_batch, tiny_config, tiny_model

from moejax import sharding
from moejax.config import MeshConfig, UserError
from moejax.models import count, transformer


def config_of(sparse=(0, 2), layers=3, **changes):
    return tiny_config(**{"model__layers": layers, "moe__sparse_blocks": sparse, "moe__first_dense": 0,
                          "moe__dispatch": "dense", "model__architecture": {"shortcut": True}, **changes})


def hidden(model, params, state, batch):
    output = transformer.apply_batch(model, params, state, {name: batch[name] for name in (
        "tokens", "positions", "segments")}, train=True)
    return output.hidden_BLD, output.records


def test_what_experts_give_joins_behind_all_of_the_next_block():
    """So the last vectors are linear in it: nothing of the next block, nor its experts, has seen it."""
    batch = tiny_batch(config_of())
    model, params, state = tiny_model(config_of((0, 1), 2, model__architecture={"shortcut": True, "final_norm": False}))
    moe = params["stack_0"]["block_0"]["moe"]

    @jax.jit
    def scaled(factors):
        own = {**params["stack_0"]["block_0"], "moe": {**moe, "w_out": moe["w_out"] * factors[:, None, None, None]}}
        return hidden(model, {**params, "stack_0": {"block_0": own}}, state, batch)[0]

    none, both, first, second = (np.asarray(scaled(np.float32(factors)))[batch["segments"] > 0] for factors in (
        (0, 0), (1, 1), (2, 0), (0, 3)))
    for one in (both, first, second):
        assert np.abs(one - none).max() > 0.1
    np.testing.assert_allclose(both - none, (first - none) / 2 + (second - none) / 3, atol=2e-5)


def learning(layers, **changes):
    """A model, its parameters, and a jitted function to gradients and records."""
    config = config_of((0,), layers, model__vocab_size=38, moe__router="longcat", moe__experts_per_token=3,
                       moe__num_experts=4, moe__options={"copy": 2}, moe__balance_weight=0.01, **changes)
    batch, (model, params, state) = tiny_batch(config), tiny_model(config)

    @jax.jit
    def differentiate(params):
        def loss(params):
            x_BLD, records = hidden(model, params, state, batch)
            return jnp.sum(jnp.where(batch["segments"][..., None] > 0, x_BLD, 0)**2), records
        return jax.grad(loss, has_aux=True)(params)
    return params, differentiate


def test_routers_learn_and_tell_their_losses():
    params, differentiate = learning(1)
    gradients, records = differentiate(params)
    record = records["stack_0"]["block_0"]
    assert set(record.losses) == {"balance", "router_z"} and (np.asarray(record.losses["balance"]) > 0).all()
    assert np.abs(gradients["stack_0"]["block_0"]["moe"]["router_w_DE"]).max() > 1e-4


@pytest.mark.slow
def test_a_mesh_changes_no_gradient():
    params, differentiate = learning(2, moe__dispatch="auto")
    gradients, _ = differentiate(params)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, expert=2, model=2))):
        split, _ = differentiate(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max()), split, gradients)


def test_operations_count_both_layers():
    short, plain = config_of(), config_of(model__architecture={})
    added = count.forward_flops(short.model, short.moe, 14) - count.forward_flops(plain.model, plain.moe, 14)
    assert added == 2 * (2 * 3 * 24 * 20)  # in two sparse blocks


@pytest.mark.parametrize("changes, words", [
    ({"model__architecture": {"shortcut": True, "norm_place": "output"}}, "norm_place must be input, not output"),
    ({"moe__router": "mixture_of_depths", "moe__allow_noncausal_routing": True}, "lets tokens pass whole blocks"),
    ({"model__architecture": {"latent": {"scaled": True}}}, "latent.scaled needs .*latent.rank"),
])
def test_what_does_not_go_together(changes, words):
    with pytest.raises(UserError, match=words):
        config_of(**changes)
