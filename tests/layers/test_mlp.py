"""The gated feed-forward layer and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.layers.mlp import FeedForward, dropout


def test_is_the_formula():
    x = np.random.default_rng(0).normal(size=(2, 3, 5))
    layer = FeedForward(hidden=7, out_scale=1.0, dtype=jnp.float32)
    params = jax.tree.map(lambda p: p.unbox(), layer.init(jax.random.key(0), jnp.float32(x)),
                          is_leaf=lambda p: hasattr(p, "unbox"))
    w_in, w_out = (np.asarray(params["params"][name], np.float64) for name in ("w_in", "w_out"))
    gate, up = x @ w_in[:, 0], x @ w_in[:, 1]
    wanted = (gate / (1 + np.exp(-gate)) * up) @ w_out
    np.testing.assert_allclose(layer.apply(params, jnp.float32(x)), wanted, atol=1e-5)


def test_dropout_keeps_the_mean_and_drops_its_share():
    x = jnp.ones((400, 500))
    dropped = dropout(x, 0.3, jax.random.key(0))
    assert float(jnp.mean(dropped == 0)) == pytest.approx(0.3, abs=0.01)
    assert float(jnp.mean(dropped)) == pytest.approx(1.0, abs=0.02)
    assert dropout(x, 0.3, None) is x and dropout(x, 0.0, jax.random.key(0)) is x
