"""Which attention goes to cuDNN's kernels, and on a machine with a GPU (JAX_PLATFORMS=cuda) that they compute the same."""

import jax
import jax.numpy as jnp
import pytest

from moejax.config import UserError
from moejax.layers import attention, cudnn


def arrays(length=64, keys=64, heads=4, groups=2, head_dim=16, value_dim=16, dtype=jnp.bfloat16):
    drawn = jax.random.split(jax.random.key(0), 3)
    shapes = ((3, length, heads, head_dim), (3, keys, groups, head_dim), (3, keys, groups, value_dim))
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(drawn, shapes, strict=True))


@pytest.mark.parametrize("attention_key, capability, changes, plain_only, wanted", [
    ("auto", (9, 0), {}, False, True),
    ("cudnn", (9, 0), {}, False, True),
    ("plain", (9, 0), {}, False, False),
    ("auto", (0, 0), {}, False, False),  # no GPU, or of another maker
    ("auto", (7, 5), {}, False, False),
    ("auto", (8, 0), {"length": 63, "keys": 63}, False, False),
    ("auto", (9, 0), {"dtype": jnp.float32}, False, False),
    ("auto", (9, 0), {}, True, False),  # biases, sinks, split sequences
    ("cudnn", (9, 0), {"length": 1}, False, False),  # a step of generation
    ("auto", (9, 0), {"value_dim": 8}, False, False),  # latent attention
    ("auto", (9, 0), {"head_dim": 12, "value_dim": 12}, False, False),
])
def test_where_cudnn_is_chosen(monkeypatch, attention_key, capability, changes, plain_only, wanted):
    monkeypatch.setattr(cudnn, "cuda_capability", lambda: capability)
    assert cudnn.chosen(attention_key, *arrays(**changes), plain_only) == wanted


def test_asking_for_it_without_a_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(cudnn, "cuda_capability", lambda: (0, 0))
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        cudnn.chosen("cudnn", *arrays(), False)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("causal", [True, False])
def test_outputs_and_gradients_are_those_of_plain_attention(causal):
    q_BLQH, k_BSGH, v_BSGH = arrays(length=256, keys=256, head_dim=64, value_dim=64)
    segment_BL = jnp.arange(256) // jnp.array([[256], [100], [7]])
    visible_BLS = segment_BL[:, :, None] == segment_BL[:, None]
    if causal:
        visible_BLS &= jnp.tril(jnp.ones((256, 256), bool))
    found = jax.vjp(lambda *qkv: cudnn.attend(*qkv, visible_BLS, causal, None), q_BLQH, k_BSGH, v_BSGH)
    wide = tuple(a.astype(jnp.float32) for a in (q_BLQH, k_BSGH, v_BSGH))
    with jax.default_matmul_precision("highest"):
        wanted = jax.vjp(lambda *qkv: attention.attend(*qkv, visible_BLS, causal), *wide)
        dy = jax.random.normal(jax.random.key(1), found[0].shape, jnp.bfloat16)
        pairs = list(zip((found[0], *found[1](dy)), (wanted[0], *wanted[1](dy.astype(jnp.float32))), strict=True))
    for a, b in pairs:
        assert jnp.linalg.norm(a - b) < 0.01 * jnp.linalg.norm(b)  # bfloat16's rounding is 0.004
