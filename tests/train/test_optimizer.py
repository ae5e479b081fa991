"""Schedules, masks and update rules."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_config

from moejax import sharding
from moejax.hf.load import read_config
from moejax.matrices import is_matrix
from moejax.models import transformer
from moejax.train import optimizer


@pytest.fixture(scope="module")
def tree():
    """Shapes and logical axes of a model with every kind of parameter."""
    config = tiny_config(moe__shared_experts=1, model__qk_norm=True)
    return transformer.abstract_params(transformer.build(config))


def random_like(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes)


@pytest.mark.parametrize("schedule, middle, last", [
    ("constant", 1.0, 1.0), ("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("wsd", 1.0, 0.1)])
def test_schedules(schedule, middle, last):
    config = tiny_config(optimizer__schedule=schedule, optimizer__warmup_steps=20, optimizer__learning_rate=2.0).optimizer
    rate = optimizer.make_schedule(config, 120, 2.0)
    assert float(rate(0)) == pytest.approx(0.1) and float(rate(9)) == pytest.approx(1.0)  # never an idle first step
    assert float(rate(19)) == pytest.approx(2.0) == float(rate(20))
    assert float(rate(70)) == pytest.approx(2.0 * middle)
    assert float(rate(120)) == pytest.approx(2.0 * last)
    assert all(float(rate(i)) >= float(rate(i + 1)) - 1e-6 for i in range(20, 120))


def test_decay_touches_matrices_alone(tree):
    shapes, logical = tree
    config = tiny_config(optimizer__clip_norm=None, optimizer__weight_decay=0.5, optimizer__warmup_steps=0,
                         optimizer__schedule="constant", optimizer__learning_rate=0.1).optimizer
    params = random_like(shapes, 0)
    for name in ("adamw", "lion", "adafactor", "muon"):
        rule = optimizer.make_optimizer(tiny_config(
            **{f"optimizer__{k}": v for k, v in vars(config).items()} | {"optimizer__name": name}).optimizer, 10, logical)
        updates, _ = jax.jit(rule.update)(jax.tree.map(jnp.zeros_like, params), rule.init(params), params, sound=True)
        for (path, update), param in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params)):
            where = jax.tree_util.keystr(path)
            decays = not any(word in where for word in ("embedding", "norm", "router"))
            np.testing.assert_allclose(update, -0.05 * param if decays else 0 * param, atol=1e-6, err_msg=f"{name}{where}")


def test_muon_orthogonalises_every_expert_apart(tree):
    """The update of one expert's gate is that of the same matrix alone: no axis is a stack by mistake."""
    shapes, logical = tree
    config = tiny_config(optimizer__name="muon", optimizer__weight_decay=0.0, optimizer__clip_norm=None,
                         optimizer__schedule="constant", optimizer__warmup_steps=0).optimizer
    rule = optimizer.make_optimizer(config, 10, logical)
    params, grads = random_like(shapes, 0), random_like(shapes, 1)
    updates, _ = jax.jit(rule.update)(grads, rule.init(params), params)
    alone = optax.contrib.muon(config.learning_rate, beta=config.beta1, eps=config.eps, consistent_rms=0.2)

    def single(matrix):
        return alone.update({"w": matrix}, alone.init({"w": matrix}), {"w": matrix})[0]["w"]

    layer, got = (tree["stack_1"]["block_0"] for tree in (grads, updates))
    np.testing.assert_allclose(got["moe"]["w_in"][1, 3, :, 0], single(layer["moe"]["w_in"][1, 3, :, 0]), atol=1e-5)
    np.testing.assert_allclose(got["moe"]["w_out"][0, 4], single(layer["moe"]["w_out"][0, 4]), atol=1e-5)
    np.testing.assert_allclose(got["attention"]["w_q"][1].reshape(24, 24),
                               single(layer["attention"]["w_q"][1].reshape(24, 24)), atol=1e-5)
    np.testing.assert_allclose(got["attention"]["w_o"][1].reshape(24, 24),
                               single(layer["attention"]["w_o"][1].reshape(24, 24)), atol=1e-5)
    adam = optax.adam(config.learning_rate, config.beta1, config.beta2, config.eps, nesterov=True)
    router = layer["moe"]["router_w_DE"]
    np.testing.assert_allclose(got["moe"]["router_w_DE"], adam.update(router, adam.init(router))[0], atol=1e-5)


def test_adafactor_factors_every_expert_apart():
    """Factored statistics of large experts are those of the expert alone, even when the expert axis is the longest."""
    shape, names = (2, 300, 130, 2, 140), ("layers", "experts", "embed", "gate_up", "expert_ffn")
    config = tiny_config(optimizer__name="adafactor", optimizer__weight_decay=0.0, optimizer__clip_norm=None,
                         optimizer__schedule="constant", optimizer__warmup_steps=0).optimizer
    rng = np.random.default_rng(0)
    grads = {"w": jnp.asarray(rng.normal(size=shape) * rng.exponential(size=(2, 300, 1, 1, 1)), jnp.float32)}
    rule = optimizer.make_optimizer(config, 10, {"w": names})
    updates, state = jax.jit(rule.update)(grads, rule.init(grads), grads)
    updates, _ = jax.jit(rule.update)(grads, state, grads)
    alone = optimizer.make_optimizer(config, 10, {"w": names[2::2]})
    one = {"w": grads["w"][1, 7, :, 1]}
    _, state = alone.update(one, alone.init(one), one)
    np.testing.assert_allclose(updates["w"][1, 7, :, 1], alone.update(one, state, one)[0]["w"], rtol=1e-4, atol=1e-7)


def test_clipping_bounds_the_global_norm(tree):
    shapes, logical = tree
    grads = random_like(shapes, 0)
    assert float(optimizer.global_norm(grads)) == pytest.approx(np.sqrt(sum(
        np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(grads))), rel=1e-5)
    rules = [optimizer.make_optimizer(tiny_config(optimizer__clip_norm=norm, optimizer__eps=1.0).optimizer, 10, logical)
             for norm in (0.5, None)]
    clipped, plain = (jax.jit(rule.update)(g, rule.init(grads), grads, sound=True)[0] for rule, g in zip(
        rules, (grads, jax.tree.map(lambda g: g * 0.5 / optimizer.global_norm(grads), grads))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8), clipped, plain)


@pytest.mark.parametrize("most", [1e-3, 1.0, 1e6])
def test_clipping_equals_optax(tree, most):
    grads = random_like(tree[0], 6)
    ours, theirs = (rule.update(grads, rule.init(grads))[0] for rule in (
        optimizer.clip_by_global_norm(most), optax.clip_by_global_norm(most)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)
    if most == 1e6:
        jax.tree.map(np.testing.assert_array_equal, ours, grads)


def test_clipping_to_a_norm_of_nothing_gives_zeros(tree):
    rule = optimizer.clip_by_global_norm(0.0)
    for grads in (random_like(tree[0], 6), jax.tree.map(lambda s: jnp.zeros(s.shape), tree[0])):
        clipped = rule.update(grads, rule.init(grads))[0]
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(clipped))


@pytest.mark.slow
def test_of_every_open_family_only_matrices_between_activations_decay():
    """No bias, norm, sink or position of any of them."""
    golden = pathlib.Path(__file__).parent.parent / "hf" / "golden"
    for folder in sorted(path for path in golden.iterdir() if not path.name.endswith("_square")):
        _, logical = transformer.abstract_params(transformer.build(read_config(folder)[1]))
        for path, names in jax.tree_util.tree_leaves_with_path(logical, is_leaf=sharding.is_axes):
            name = path[-1].key
            wanted = name.startswith(("w_", "latent_"))
            assert is_matrix(names) == wanted, (folder.name, jax.tree_util.keystr(path))
