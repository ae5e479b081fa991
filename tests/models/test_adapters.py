"""Low-rank adapters: nothing at first, each matrix its own, the same merged as beside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny import tiny_batch, tiny_config, tiny_model

from moejax.config import UserError
from moejax.finetune import Finetune
from moejax.matrices import is_matrix
from moejax.models import adapters, transformer

EVERYWHERE = Finetune(lora_rank=3, lora=("*w_*",), lora_alpha=6.0)


@pytest.fixture(scope="module")
def parts():
    model, params, state = tiny_model(tiny_config())
    shapes, logical = transformer.abstract_params(model)
    return model, params, state, shapes, logical


def added(parts, options, seed=0):
    """Adapters of which none is zero."""
    _, _, _, shapes, logical = parts
    all_shapes, _ = adapters.abstract(shapes, logical, options)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape)), all_shapes[adapters.ADAPTERS])


def test_every_matrix_gets_its_own_product(parts):
    """Experts, layers, gate and up each on their own, as a loop over them computes it."""
    _, params, _, _, logical = parts
    pairs = added(parts, EVERYWHERE)
    merged = flatten_dict(adapters.merge(logical, EVERYWHERE, params | {adapters.ADAPTERS: pairs}))
    flat, flat_pairs = flatten_dict(params), flatten_dict(pairs)
    w_in = ("stack_1", "block_0", "moe", "w_in")
    down, up = flat_pairs[*w_in, "down"], flat_pairs[*w_in, "up"]
    assert down.shape == (2, 5, 2, 24, 3) and up.shape == (2, 5, 2, 3, 12)
    for layer in range(2):
        for expert in range(5):
            for gate in range(2):
                wanted = flat[w_in][layer, expert, :, gate] + 2.0 * down[layer, expert, gate] @ up[layer, expert, gate]
                np.testing.assert_allclose(merged[w_in][layer, expert, :, gate], wanted, rtol=1e-5, atol=1e-5)
    w_o = ("stack_1", "block_0", "attention", "w_o")
    wanted = flat[w_o][1].reshape(24, 24) + 2.0 * flat_pairs[*w_o, "down"][1].reshape(24, 3) @ flat_pairs[*w_o, "up"][1]
    np.testing.assert_allclose(merged[w_o][1].reshape(24, 24), wanted, rtol=1e-5, atol=1e-5)
    assert {path[:-1] for path in flat_pairs} == {path for path, names in flatten_dict(logical).items() if is_matrix(names)}


def test_the_gradient_of_an_adapter_is_that_of_its_matrix_through_the_product(parts):
    """Of the experts, too: d/d down = scale * dW @ up^T and d/d up = scale * down^T @ dW."""
    model, params, state, _, logical = parts
    pairs, batch = added(parts, EVERYWHERE), tiny_batch(tiny_config())

    def loss(params):
        return jnp.mean(transformer.apply_batch(model, params, state, batch).logits_BLV[..., 0] ** 2)

    with_pairs = params | {adapters.ADAPTERS: pairs}
    grads = jax.jit(jax.grad(lambda tree: loss(adapters.merge(logical, EVERYWHERE, tree))))(with_pairs)[adapters.ADAPTERS]
    whole = jax.jit(jax.grad(loss))(adapters.merge(logical, EVERYWHERE, with_pairs))
    path = ("stack_1", "block_0", "moe", "w_out")
    dw = flatten_dict(whole)[path]
    down, up = (flatten_dict(pairs)[*path, side] for side in ("down", "up"))
    for side, wanted in (("down", jnp.einsum("lefd,lerd->lefr", dw, up)), ("up", jnp.einsum("lefr,lefd->lerd", down, dw))):
        got = flatten_dict(grads)[*path, side]
        np.testing.assert_allclose(got, 2.0 * wanted, rtol=1e-4, atol=1e-6 * float(jnp.abs(wanted).max()))
        assert (jnp.abs(got).max(axis=(2, 3)) > 0).all()


def test_fresh_adapters_change_nothing(parts):
    _, params, _, shapes, logical = parts
    all_shapes, all_logical = adapters.abstract(shapes, logical, EVERYWHERE)
    fresh = adapters.initial(all_shapes[adapters.ADAPTERS], all_logical[adapters.ADAPTERS], jax.random.key(0))
    merged = adapters.merge(logical, EVERYWHERE, params | {adapters.ADAPTERS: fresh})
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    down = flatten_dict(fresh)["stack_1", "block_0", "moe", "w_in", "down"]
    assert float(jnp.std(down)) == pytest.approx(24**-0.5, rel=0.1)


@pytest.mark.parametrize("options, message", [
    (Finetune(lora_rank=2, lora=("*atention*",)), "lora: '.atention.' matches no parameter"),
    (Finetune(lora_rank=2, lora=("embedding/table",)), "matches no parameter"),
    (Finetune(lora_rank=20, lora=("*w_in",)), "lora_rank=20 is not below the rank")])
def test_what_cannot_be_adapted_is_an_error(parts, options, message):
    with pytest.raises(UserError, match=message):
        adapters.abstract(parts[3], parts[4], options)
