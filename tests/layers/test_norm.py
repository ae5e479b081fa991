"""RMSNorm."""

import jax.numpy as jnp
import numpy as np

from moejax.layers.norm import rms_norm


def test_is_the_formula_in_float32_whatever_comes_in():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(3, 7)) * 50, rng.normal(size=7)
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * scale
    np.testing.assert_allclose(rms_norm(jnp.float32(x), jnp.float32(scale), 1e-3), wanted, rtol=1e-5)
    low = rms_norm(jnp.bfloat16(x), jnp.float32(scale), 1e-3)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(np.float32), wanted, rtol=2e-2, atol=1e-2)
