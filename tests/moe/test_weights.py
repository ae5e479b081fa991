"""Experts in few bits: rounding errors, packing and zeros."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.moe.weights import dequantise, inputs_of_a_scale, quantise


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 5), st.sampled_from([4, 8]), st.integers(0, 99))
def test_every_number_is_off_by_half_a_scale_at_most(experts, half, outputs, bits, seed):
    w = np.random.default_rng(seed).normal(size=(experts, 2 * half, 2, outputs)).astype(np.float32)
    rounded, scale = quantise(jnp.asarray(w), bits)
    back = np.asarray(dequantise(rounded, scale, bits, jnp.float32))
    each = np.repeat(np.asarray(scale), inputs_of_a_scale(2 * half, bits), axis=1)
    assert (np.abs(back - w) <= 0.5 * each * (1 + 1e-5)).all()
    assert rounded.nbytes == w.size * bits // 8


@pytest.mark.parametrize("bits", [4, 8])
def test_multiples_of_a_scale_come_back_as_they_were(bits):
    """All values that there are, of both signs, in every place of a pair."""
    most = 2**(bits - 1) - 1
    values = np.arange(-most, most + 1, dtype=np.float32)
    values = np.append(values, most)  # an even number
    w = 0.25 * np.stack([values, values[::-1]], axis=1)[None]
    if bits == 4:
        assert inputs_of_a_scale(w.shape[1], bits) == w.shape[1]
    np.testing.assert_array_equal(dequantise(*quantise(jnp.asarray(w), bits), bits, jnp.float32), w)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zeros(bits):
    w = jnp.zeros((2, 6, 3))
    np.testing.assert_array_equal(dequantise(*quantise(w, bits), bits, jnp.float32), w)
