"""Attention and rotary embedding against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.layers.attention import attend
from moejax.layers.rotary import angles, rotate


def numpy_attention(q, k, v, visible):
    """softmax(q k / sqrt(H)) v per head, in float64: the formula."""
    batch, length, heads, size = q.shape
    out = np.zeros(q.shape)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[2])
            for i in range(length):
                seen = np.flatnonzero(visible[b, i])
                scores = np.array([q[b, i, h] @ k[b, j, g] for j in seen]) / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                out[b, i, h] = (weights / weights.sum()) @ v[b, seen, g]
    return out


def test_attention_is_the_formula():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 5, 6, 4)), rng.normal(size=(2, 7, 3, 4)), rng.normal(size=(2, 7, 3, 4))
    visible = rng.random((2, 5, 7)) < 0.6
    visible[:, :, 0] = True
    got = attend(jnp.float32(q), jnp.float32(k), jnp.float32(v), visible, causal=False)
    np.testing.assert_allclose(got, numpy_attention(q, k, v, visible), atol=1e-5)


@pytest.mark.parametrize("length", [5, 130, 257])
def test_blocks_of_causal_attention_are_the_formula_and_have_its_gradients(length):
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(1, length, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
    visible = np.tril(rng.random((1, length, length)) < 0.6) | np.eye(length, dtype=bool)

    def run(causal):
        return jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(jnp.sin(attend(*qkv, visible, causal))), argnums=(0, 1, 2)))

    np.testing.assert_allclose(attend(q, k, v, visible, causal=True), numpy_attention(q, k, v, visible), atol=1e-5)
    blocks, whole = run(True)(q, k, v), run(False)(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), blocks, whole)


def test_rotary_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 6))
    def score(i, j):
        at = lambda x, p: rotate(x, *angles(jnp.array([[p]]), 6, 100.0))  # noqa: E731
        return float(jnp.sum(at(q, i) * at(k, j)))
    assert score(7, 3) == pytest.approx(score(14, 10), abs=1e-5)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)


def test_rotary_is_the_formula():
    x, positions = np.random.default_rng(2).normal(size=(2, 5, 3, 6)), np.array([[0, 1, 2, 3, 4], [9, 0, 700, 1, 33]])
    angle = positions[:, :, None, None] * 100.0 ** (-np.arange(3) / 3)
    first, second = x[..., :3], x[..., 3:]
    wanted = np.concatenate([first * np.cos(angle) - second * np.sin(angle),
                             second * np.cos(angle) + first * np.sin(angle)], axis=-1)
    got = jax.jit(lambda x, positions: rotate(x, *angles(positions, 6, 100.0)))(np.float32(x), positions)
    np.testing.assert_allclose(got, wanted, atol=1e-4)  # float32 has the angle 700 to 3e-5


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA:CPU fuses")
def test_all_rotations_share_one_sine_on_a_cpu():
    def rotations(x, positions):
        cos_sin = angles(positions, 6, 100.0)
        return [rotate(x + i, *cos_sin) for i in range(3)]

    compiled = jax.jit(rotations).lower(jnp.ones((2, 5, 3, 6)), jnp.ones((2, 5), jnp.int32)).compile().as_text()
    assert compiled.count(" sine(") == compiled.count(" cosine(") == 1
