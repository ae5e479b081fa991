"""The grouped matmuls: products and both gradients are those of plain matmuls in float64. Those for GPUs are interpreted.

On a machine with a GPU `JAX_PLATFORMS=cuda python -m pytest tests/moe/test_grouped.py` runs the kernels themselves.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import UserError
from moejax.gpus import cuda_capability
from moejax.moe import grouped, grouped_hopper, grouped_native

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="needs a CPU")


def products(x_RD, w_EDF, dy_RF, sizes):
    """y, dx and dw in float64, of the rows in the groups."""
    x_ND, w_EDF, dy_NF = (np.asarray(a, np.float64)[:rows] for a, rows in (
        (x_RD, sum(sizes)), (w_EDF, None), (dy_RF, sum(sizes))))
    expert_N = np.repeat(np.arange(len(sizes)), sizes)
    dw_EDF = np.stack([x_ND[expert_N == e].T @ dy_NF[expert_N == e] for e in range(len(sizes))])
    return (np.einsum("nd,ndf->nf", x_ND, w_EDF[expert_N]), np.einsum("nf,ndf->nd", dy_NF, w_EDF[expert_N]), dw_EDF)


def check(rows, width, columns, sizes, dtype, bound, seed=0, kernels="triton"):
    """Compares all three. What lies behind the groups is not a number, in what comes in and in what goes back."""
    rng = np.random.default_rng(seed)
    x_RD, w_EDF, dy_RF = (jnp.asarray(rng.normal(size=shape), dtype) for shape in (
        (rows, width), (len(sizes), width, columns), (rows, columns)))
    behind = jnp.arange(rows)[:, None] >= sum(sizes)
    with jax.default_matmul_precision("highest"):
        y_RF, back = jax.vjp(lambda x, w: grouped.matmul(x, w, jnp.array(sizes, jnp.int32), kernels),
                             jnp.where(behind, jnp.nan, x_RD), w_EDF)
        dx_RD, dw_EDF = back(jnp.where(behind, jnp.nan, dy_RF))
    assert (y_RF.dtype, dx_RD.dtype, dw_EDF.dtype) == (dtype,) * 3
    compare((y_RF[:sum(sizes)], dx_RD[:sum(sizes)], dw_EDF), products(x_RD, w_EDF, dy_RF, sizes), bound)


def compare(found, wanted, bound):
    """`bound` is relative to the largest number of each."""
    for name, a, b in zip(("y", "dx", "dw"), found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=bound * max(1, np.abs(b).max(initial=0)), rtol=0,
                                   err_msg=name)


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 1e-6), pytest.param(jnp.bfloat16, 4e-3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows, width, columns, sizes", [
    (70, 24, 40, (5, 0, 33, 1, 20)),  # empty, unaligned, rows behind; no dimension a multiple of a tile's
    (300, 96, 80, (0, 129, 0, 3, 150, 0)),  # more than a tile, the first and the last empty
    (512, 256, 512, (128, 256, 0, 128)),  # whole tiles
    (33, 16, 16, (0, 0)),  # nothing at all
])
def test_products_and_gradients(rows, width, columns, sizes, dtype, bound):
    check(rows, width, columns, sizes, dtype, bound)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 9), st.integers(1, 40), st.integers(0, 2**31))
def test_any_sizes(sizes, behind, width, seed):
    check(max(sum(sizes) + behind, 1), width, 17, sizes, jnp.float32, 1e-6, seed)


@on_cpu
@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 20), st.integers(250, 310)), min_size=1, max_size=5), st.integers(0, 9),
       st.one_of(st.integers(1, 40), st.integers(250, 310)), st.one_of(st.integers(1, 40), st.integers(505, 540)),
       st.integers(0, 2**31))
def test_native_kernels(sizes, behind, width, columns, seed):
    """On both sides of every bound by which they part their work. Sums of up to 540 terms, one after another, of which some
    products hold nothing larger: 60 shapes came to 0.93e-6."""
    check(max(sum(sizes) + behind, 1), width, columns, sizes, jnp.float32, 3e-6, seed, "native")


@on_cpu
@pytest.mark.parametrize("sizes", [(5, 0, 33, 1, 20), (0, 0, 0, 0, 70), (0,) * 5])
def test_native_kernels_give_exact_zeros_where_there_are_no_rows(sizes):
    rng = np.random.default_rng(0)
    x_RD, w_EDF, dy_RF = (rng.normal(size=shape).astype(np.float32) for shape in ((80, 24), (5, 24, 40), (80, 40)))
    sizes_E = np.array(sizes, np.int32)
    for rows, transposed in ((x_RD, False), (dy_RF, True)):
        assert not np.any(grouped_native.rows_times(rows, w_EDF, sizes_E, transposed)[sum(sizes):])
    dw_EDF = np.asarray(grouped_native.weights_of(x_RD, dy_RF, sizes_E))
    assert [bool(np.any(dw_DF)) for dw_DF in dw_EDF] == [size > 0 for size in sizes]


@on_cpu
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(0, 30), st.booleans())
def test_a_row_s_product_does_not_depend_on_its_place(rows, before, transposed):
    """Bit for bit, so that no transport changes it."""
    rng = np.random.default_rng(rows)
    x_RD, w_EDF = rng.normal(size=(rows, 300)).astype(np.float32), rng.normal(size=(2, 300, 300)).astype(np.float32)
    moved_RD = np.concatenate([rng.normal(size=(before, 300)).astype(np.float32), x_RD[::-1]])
    y_RF = grouped_native.rows_times(x_RD, w_EDF, np.array([0, rows], np.int32), transposed)
    moved_RF = grouped_native.rows_times(moved_RD, w_EDF, np.array([before, rows], np.int32), transposed)
    np.testing.assert_array_equal(y_RF, moved_RF[before:][::-1])


@on_cpu
def test_what_is_no_number_stays_with_its_expert_in_native_kernels():
    sizes_E, x_RD, dy_RF = np.array([70, 50, 8]), np.ones((128, 128), np.float32), np.ones((128, 256), np.float32)
    x_RD[80] = np.nan
    dw_EDF = grouped_native.weights_of(x_RD, dy_RF, sizes_E.astype(np.int32))
    assert np.isnan(dw_EDF[1]).all() and (dw_EDF[0] == 70).all() and (dw_EDF[2] == 8).all()


@on_cpu
def test_native_kernels_take_nothing_that_does_not_fit():
    """Sizes that lead astray count as far as there are rows; other shapes are errors; no width at all gives zeros."""
    x_RD, w_EDF = np.ones((8, 16), np.float32), np.ones((2, 16, 4), np.float32)
    y_RF = grouped_native.rows_times(x_RD, w_EDF, np.array([-5, 100], np.int32), False)
    assert (y_RF == 16).all()
    assert not np.any(grouped_native.rows_times(x_RD[:, :0], w_EDF[:, :0], np.array([4, 4], np.int32), False))
    for sizes, w in (([8], w_EDF), ([4, 4], w_EDF[:, :8])):
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit each other"):
            np.asarray(grouped_native.rows_times(x_RD, w, np.array(sizes, np.int32), False))
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit each other"):
        np.asarray(grouped_native.weights_of(x_RD, np.ones((7, 4), np.float32), np.array([4, 4], np.int32)))


@on_cpu
def test_native_kernels_map_over_a_batch():
    rng = np.random.default_rng(0)
    x_BRD, w_EDF = rng.normal(size=(3, 20, 24)).astype(np.float32), rng.normal(size=(2, 24, 40)).astype(np.float32)
    sizes_BE = jnp.array([[20, 0], [3, 17], [9, 11]], jnp.int32)
    run = jax.value_and_grad(lambda x, w, sizes: jnp.sum(jnp.sin(grouped.matmul(x, w, sizes, "native"))), argnums=(0, 1))
    mapped = jax.vmap(run, in_axes=(0, None, 0))(x_BRD, w_EDF, sizes_BE)
    for i in range(3):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), mapped, run(x_BRD[i], w_EDF, sizes_BE[i]))


@pytest.mark.parametrize("backend, dtype, complaint", [
    ("cpu", jnp.bfloat16, "native cannot be used: multiplies float32, not bfloat16; use auto"),
    ("tpu", jnp.float32, "needs a CPU, not tpu")])
def test_what_native_kernels_cannot_take_is_refused(monkeypatch, backend, dtype, complaint):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with pytest.raises(UserError, match=complaint):
        grouped_native.check_fit(jnp.zeros((3, 8, 8), dtype), 9)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax cannot interpret these kernels")
@pytest.mark.skipif(jax.default_backend() == "gpu" and cuda_capability() != (9, 0), reason="needs a Hopper GPU")
@pytest.mark.parametrize("sizes", [
    (5, 0, 133, 128, 1),  # tiles of several experts, one in the middle of another's rows, rows behind
    (0, 128, 256, 0),  # whole tiles, the first and the last expert empty
    pytest.param((0, 0), marks=pytest.mark.slow),
    pytest.param((384,), marks=pytest.mark.slow),
    pytest.param((7, 1, 8, 360, 8), marks=pytest.mark.slow),
])
def test_hopper_kernels(sizes, capfd):
    """The interpreter says so if two groups of threads touch a place in no order."""
    rows, width, columns = 384, 256, 512
    rng = np.random.default_rng(0)
    x_RD, w_EDF, dy_RF = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in (
        (rows, width), (len(sizes), width, columns), (rows, columns)))
    sizes_E = jnp.array(sizes, jnp.int32)
    behind = jnp.arange(rows)[:, None] >= sum(sizes)
    given_RD, given_RF = jnp.where(behind, jnp.nan, x_RD), jnp.where(behind, jnp.nan, dy_RF)
    found = (grouped_hopper.rows_times(given_RD, w_EDF, sizes_E, transposed=False)[:sum(sizes)],
             grouped_hopper.rows_times(given_RF, w_EDF, sizes_E, transposed=True)[:sum(sizes)],
             grouped_hopper.weights_of(given_RD, given_RF, sizes_E))
    compare(found, products(x_RD, w_EDF, dy_RF, sizes), 4e-3)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax cannot interpret these kernels")
@pytest.mark.skipif(jax.default_backend() == "gpu" and cuda_capability() != (9, 0), reason="needs a Hopper GPU")
def test_what_is_no_number_stays_with_its_expert_in_hopper_kernels():
    """Also where two experts' rows share a tile."""
    sizes_E, x_RD, dy_RF = jnp.array([70, 50, 8]), jnp.ones((128, 128), jnp.bfloat16), jnp.ones((128, 256), jnp.bfloat16)
    for x, dy in ((x_RD.at[80].set(jnp.nan), dy_RF), (x_RD, dy_RF.at[80].set(jnp.nan))):
        dw_EDF = grouped_hopper.weights_of(x, dy, sizes_E)
        assert np.isnan(np.asarray(dw_EDF[1], np.float32)).all()
        assert (dw_EDF[0] == 70).all() and (dw_EDF[2] == 8).all()


@pytest.mark.parametrize("capability, dtype, width, rows, complaint", [
    ((8, 0), jnp.bfloat16, 256, 128, "needs a Hopper GPU"),
    ((9, 0), jnp.float32, 256, 128, "needs config.train.dtype=bfloat16"),
    ((9, 0), jnp.bfloat16, 96, 128, "multiples of 256, not 96 by 512"),
    ((9, 0), jnp.bfloat16, 256, 100, "multiples of 128 rows, not 100")])
def test_what_hopper_kernels_cannot_take_is_refused(monkeypatch, capability, dtype, width, rows, complaint):
    monkeypatch.setattr(grouped_hopper, "cuda_capability", lambda: capability)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    with pytest.raises(UserError, match=complaint):
        grouped_hopper.check_fit(jnp.zeros((3, width, 512), dtype), rows)
