"""The hash of arrays: the same on devices, on the host and in parts as in plain integers; any change changes it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from moejax import sharding
from moejax.checkpoint import digest
from moejax.config import MeshConfig

TYPES = ("bool", "int8", "uint8", "bfloat16", "float16", "int32", "uint32", "float32", "float8_e4m3fn")
SHAPES = st.lists(st.integers(1, 6), max_size=4).map(tuple)


def draw(shape, dtype, seed=0) -> np.ndarray:
    """Random bytes: also what is no number, and denormal ones."""
    dtype = jnp.dtype(dtype)
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def by_hand(a: np.ndarray) -> list[int]:
    words = a.reshape(-1).view({1: np.uint8, 2: np.uint16}.get(a.dtype.itemsize, np.uint32)).tolist()
    lanes = [0, 0]
    for index, word in enumerate(words):
        h = (word + index * 0x9E3779B1) % 2**32
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        h ^= h >> 16
        lanes = [lanes[0] + h, lanes[1] + ((h ^ h >> 15) * 0x846CA68B % 2**32 ^ h)]
    return [lane % 2**32 for lane in lanes]


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from((*TYPES, "float64", "int64")), st.data())
def test_parts_add_up_to_the_whole_in_plain_integers(shape, dtype, data):
    a = draw(shape, dtype)
    assert digest.on_host(a).tolist() == by_hand(a)
    cuts = [[0, *sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=2))), n] if n > 1 else [0, n] for n in shape]
    parts = [digest.on_host(a[tuple(slice(*ends) for ends in region)], [begin for begin, _ in region], shape)
             for region in itertools.product(*([*zip(ends, ends[1:])] for ends in cuts))]
    assert digest.combine(parts).tolist() == by_hand(a)


@pytest.mark.parametrize("shape", ((70001,), (3, 70001), (300, 300), (40001, 3)))
def test_blocks_do_not_show(shape):
    a = draw(shape, "float32")
    rows = a.reshape(-1)
    words, index = rows.view(np.uint32).copy(), np.arange(rows.size, dtype=np.uint32)
    assert digest.on_host(a).tolist() == digest._mixed(words, index).tolist()
    half = shape[0] // 2
    assert digest.combine([digest.on_host(a[:half], (0,) * a.ndim, shape),
                           digest.on_host(a[half:], (half,) + (0,) * (a.ndim - 1), shape)]).tolist() == by_hand(a)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", ((), (5,), (4, 8, 3)))
def test_devices_hash_as_the_host(dtype, shape):
    a = draw(shape, dtype)
    for hashed in (digest.on_devices, digest.on_accelerators):
        assert digest.own_part(hashed(jnp.asarray(a))).tolist() == digest.on_host(a).tolist()


@pytest.mark.parametrize("spec", ((None, "data"), ("data", "model"), (("model", "data"),), (None, None, None)))
def test_a_sharded_array_hashes_as_a_whole_one(spec):
    mesh = sharding.make_mesh(MeshConfig(data=4, model=2))
    a = draw((8, 16, 3), "float32")
    placed = jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
    with jax.set_mesh(mesh):
        for hashed in (digest.on_devices, digest.on_accelerators):
            assert digest.own_part(hashed(placed)).tolist() == digest.on_host(a).tolist()


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from(TYPES[1:]), st.integers(0, 2**32), st.integers(0, 2**32))
def test_every_single_bit_counts(shape, dtype, place, bit):
    a = draw(shape, dtype)
    changed = bytearray(a.tobytes())
    changed[place % len(changed)] ^= 1 << bit % 8
    other = np.frombuffer(bytes(changed), a.dtype).reshape(shape)
    assert digest.on_host(a)[0] != digest.on_host(other)[0]


def test_order_counts_and_text_has_sixteen_digits():
    a = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    swapped, moved = a.copy(), np.roll(a, 1)
    swapped[0, 1], swapped[2, 3] = a[2, 3], a[0, 1]
    texts = {digest.text(digest.on_host(x)) for x in (a, swapped, moved, a.T, np.zeros_like(a), np.zeros(13, np.float32))}
    assert len(texts) == 6 and all(len(text) == 16 and int(text, 16) >= 0 for text in texts)
