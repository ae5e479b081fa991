"""Upcycling: a sparse model that computes what the dense one did, and what makes its experts differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_batch, tiny_config, tiny_model

from moejax.config import MoEConfig, UserError
from moejax.models import transformer
from moejax.models.upcycle import Upcycling, experts_of, upcycle


def dense(**changes):
    """A dense model of three layers, with its variables and a batch."""
    config = tiny_config(moe__every=0, **changes)
    model, params, state = tiny_model(config)
    return model, {"params": params, "router": state}, tiny_batch(config)


def logits(model, variables, batch):
    return np.asarray(jax.jit(lambda variables: model.apply(
        {"params": variables["params"]}, batch["tokens"], batch["positions"], batch["segments"],
        variables["router"]).logits_BLV)(variables))


@pytest.mark.parametrize("changes, granularity", [
    pytest.param({"num_experts": 4, "experts_per_token": 2}, 1, marks=pytest.mark.slow),
    pytest.param({"num_experts": 8, "experts_per_token": 4}, 2, marks=pytest.mark.slow),
    ({"num_experts": 8, "experts_per_token": 4, "every": 2}, 4),
    ({"num_experts": 6, "experts_per_token": 4, "shared_experts": 1, "shared_ffn": 8}, 2),
    pytest.param({"num_experts": 4, "router": "loss_free", "renormalize": True}, 1, marks=pytest.mark.slow),
    pytest.param({"num_experts": 4, "first_dense": 1, "router": "mixtral"}, 1, marks=pytest.mark.slow),
])
def test_the_sparse_model_gives_the_dense_models_logits(changes, granularity):
    model, variables, batch = dense()
    sparse, upcycled = upcycle(model, variables, MoEConfig(**changes), Upcycling(granularity), jax.random.key(1))
    assert jax.tree.structure(upcycled["params"]) == jax.tree.structure(transformer.abstract_params(sparse)[0])
    jax.tree.map(lambda a, shape: np.testing.assert_array_equal(a.shape, shape.shape), upcycled["params"],
                 transformer.abstract_params(sparse)[0])
    real = batch["segments"] > 0
    np.testing.assert_allclose(logits(sparse, upcycled, batch)[real], logits(model, variables, batch)[real], atol=1e-5)


@pytest.mark.parametrize("changes", [pytest.param({"num_experts": 4, "every": 2}, marks=pytest.mark.slow), {
    "num_experts": 8, "experts_per_token": 4, "shared_experts": 1, "shared_ffn": 8}])
def test_biases_are_shared_out_too(changes):
    model, variables, batch = dense(model__architecture={"ffn_bias": True, "activation": "gelu"})
    how = Upcycling(2 if "shared_ffn" in changes else 1)
    sparse, upcycled = upcycle(model, variables, MoEConfig(**changes), how, jax.random.key(1))
    assert jax.tree.structure(upcycled["params"]) == jax.tree.structure(transformer.abstract_params(sparse)[0])
    real = batch["segments"] > 0
    np.testing.assert_allclose(logits(sparse, upcycled, batch)[real], logits(model, variables, batch)[real], atol=1e-5)


def test_drop_redraws_whole_units_and_noise_moves_all():
    rng = np.random.default_rng(0)
    width, units, experts = 6, 20, 4
    layer = {"w_in": jnp.asarray(rng.normal(size=(width, 2, units)), jnp.float32),
             "w_out": jnp.asarray(rng.normal(size=(units, width)), jnp.float32)}
    router = {"router_w_DE": jnp.zeros((width, experts))}
    half = experts_of(layer, router, experts, 0, Upcycling(drop=0.5), jax.random.key(0))["moe"]
    same_in = np.asarray(half["w_in"] == layer["w_in"]).all(axis=(1, 2))
    same_out = np.asarray(half["w_out"] == layer["w_out"]).all(axis=2)
    np.testing.assert_array_equal(same_in, same_out)
    assert (same_in.sum(axis=1) == units // 2).all() and len({row.tobytes() for row in same_in}) == experts
    noisy = experts_of(layer, router, experts, 0, Upcycling(noise=0.1), jax.random.key(0))["moe"]
    moved = np.asarray(noisy["w_in"] - layer["w_in"])
    assert 0.05 < moved.std() / np.std(layer["w_in"]) < 0.2 and (moved != 0).all()


@pytest.mark.parametrize("changes, how, message", [
    ({"num_experts": 4, "renormalize": False}, Upcycling(), "must sum to 1"),
    ({"num_experts": 6, "experts_per_token": 3}, Upcycling(3), "granularity=3 does not divide the 20 hidden units"),
    ({"num_experts": 5}, Upcycling(2), r"granularity=2 does not divide config\.moe\.num_experts=5"),
    ({"num_experts": 4, "experts_per_token": 3}, Upcycling(2), r"does not divide config\.moe\.experts_per_token=3"),
    ({"num_experts": 4, "shared_experts": 1}, Upcycling(), "say how many of the 20 units"),
    ({"num_experts": 4, "router": "remoe"}, Upcycling(), "remoe has a rule of its own"),
    ({"num_experts": 4, "router": "mixture_of_depths"}, Upcycling(), "mixture_of_depths has a rule of its own"),
    ({"num_experts": 4, "router": "st_moe"}, Upcycling(), "a capacity drops tokens"),
    ({"num_experts": 4}, Upcycling(drop=2.0), "between 0 and 1"),
])
def test_what_would_change_the_outputs_is_refused(changes, how, message):
    model, variables, _ = dense()
    with pytest.raises(UserError, match=message):
        upcycle(model, variables, MoEConfig(**changes), how, jax.random.key(0))


def test_a_sparse_model_is_refused():
    model, params, state = tiny_model(tiny_config())
    with pytest.raises(UserError, match="has experts already"):
        upcycle(model, {"params": params, "router": state}, MoEConfig(), Upcycling(), jax.random.key(0))
