"""Laws of expert compute: each row passes its own expert, whatever the grouping, and experts without rows stay out."""

from functools import partial

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import D, E, F, assert_close, config_of, context, inputs

from moejax import native
from moejax.config import UserError
from moejax.layers.mlp import FeedForward, activate, dropout
from moejax.moe import blocked, experts, grouped_hopper
from moejax.moe.layer import mixture

LOADS = {"empty experts": (0, 5, 0, 1, 9, 0, 0), "one takes all": (0, 0, 17, 0, 0, 0, 0), "even": (4,) * E,
         "nothing": (0,) * E}
COMPUTES = [("ragged_dot", 1), ("native", 1), ("blocked", 1), ("blocked", 4), ("blocked", 13)]
every_load = pytest.mark.parametrize("load", LOADS)
every_compute = pytest.mark.parametrize("compute, block_rows", COMPUTES)


def grouped(load, rows=128):
    """Rows for a load, the expert of each row (or -1), and random rows where used."""
    sizes_E = np.array(LOADS[load], np.int32)
    expert_R = np.full(rows, -1)
    expert_R[:sizes_E.sum()] = np.repeat(np.arange(E), sizes_E)
    x_RD = np.random.default_rng(0).normal(size=(rows, D)) * (expert_R >= 0)[:, None]
    return x_RD.astype(np.float32), sizes_E, expert_R


@partial(jax.jit, static_argnums=(5, 6))
def forward_and_backward(x_RD, sizes_E, w_in, w_out, dy_RD, compute, block_rows):
    y_RD, pull = jax.vjp(lambda x, w_in, w_out: experts.feed_forward(
        x, sizes_E, w_in, w_out, compute=compute, block_rows=block_rows), x_RD, w_in, w_out)
    return y_RD, *pull(dy_RD)


@every_load
@every_compute
def test_rows_and_all_gradients_equal_a_loop_over_rows(load, compute, block_rows):
    """Rows beyond the groups give zeros, and an expert without rows a gradient of exactly zero."""
    given = inputs(1)
    x_RD, sizes_E, expert_R = grouped(load)
    dy_RD = np.random.default_rng(2).normal(size=x_RD.shape).astype(np.float32)
    y_RD, dx_RD, d_in, d_out = forward_and_backward(x_RD, sizes_E, given.w_in_ED2F, given.w_out_EFD, dy_RD, compute,
                                                    block_rows)
    pairs = [(row, e, 1.0) for row, e in enumerate(expert_R) if e >= 0]
    want, gradients = reference.experts(x_RD, pairs, given.w_in_ED2F, given.w_out_EFD, dy_RD)
    assert_close(y_RD, want)
    assert_close(np.asarray(dx_RD) * (expert_R >= 0)[:, None], gradients["x"])
    assert_close(d_in, gradients["w_in"], per_expert=True)
    assert_close(d_out, gradients["w_out"], per_expert=True)
    assert not np.any(np.asarray(dx_RD)[sizes_E.sum():]), "no gradient beyond the groups"


def test_blocks_and_ragged_dot_take_bfloat16():
    given = inputs(3)
    x_RD, sizes_E, expert_R = grouped("even")
    low = [jnp.asarray(a, jnp.bfloat16) for a in (x_RD, given.w_in_ED2F, given.w_out_EFD)]
    pairs = [(row, e, 1.0) for row, e in enumerate(expert_R) if e >= 0]
    want, _ = reference.experts(*(np.asarray(low[i].astype(jnp.float32)) for i in (0,)), pairs,
                                *(a.astype(jnp.float32) for a in low[1:]))
    for compute in ("blocked", "ragged_dot"):
        y_RD = jax.jit(partial(experts.feed_forward, compute=compute, block_rows=4))(low[0], sizes_E, *low[1:])
        assert y_RD.dtype == jnp.bfloat16
        assert_close(y_RD.astype(jnp.float32), want, 2**-6)


def test_the_weight_gradients_of_many_blocks_do_not_lose_small_terms_in_bfloat16():
    """1,024 blocks of ones add up to 1,024 times one; a bfloat16 sum would stop growing at 256."""
    rows = 1024

    def total(w_out_EFD, count):
        x_RD = (jnp.arange(rows + 1) < count)[:, None].astype(jnp.bfloat16)
        w_in_ED2F = jnp.ones((1, 1, 2, 1), jnp.bfloat16)
        y_RD = blocked.feed_forward(x_RD, jnp.array([count], jnp.int32), w_in_ED2F, w_out_EFD, None, None, 1, 0.0)
        return jnp.sum(y_RD.astype(jnp.float32))

    gradient = jax.jit(jax.grad(total))
    one, many = (gradient(jnp.ones((1, 1, 1), jnp.bfloat16), count).item() for count in (1, rows))
    assert many == rows * one


@pytest.mark.parametrize("block_rows", [1, 4, 7, 64, 192, 255, 256, 768])
def test_a_block_wastes_less_than_a_step_an_expert(block_rows):
    step = blocked.step_rows(block_rows)
    for size in range(3 * block_rows):
        assert size <= blocked.rows_computed(size, block_rows) < size + step


def test_equal_groups_as_plain_einsums_are_the_same_function():
    given = inputs(4)
    x_RD, _, expert_R = grouped("even", rows=sum(LOADS["even"]))
    dense = experts.dense_feed_forward(x_RD.reshape(E, -1, D), given.w_in_ED2F, given.w_out_EFD)
    pairs = [(row, e, 1.0) for row, e in enumerate(expert_R)]
    want, _ = reference.experts(x_RD, pairs, given.w_in_ED2F, given.w_out_EFD)
    assert_close(dense.reshape(-1, D), want)


def test_one_expert_is_the_dense_feed_forward_layer():
    given = inputs(5)
    module = FeedForward(F, 1.0, jnp.float32)
    x_BLD = given.x_TD[None]
    variables = {"params": {"w_in": given.w_in_ED2F[0], "w_out": given.w_out_EFD[0]}}
    want, _ = reference.experts(given.x_TD, [(t, 0, 1.0) for t in range(len(given.x_TD))], given.w_in_ED2F,
                                given.w_out_EFD)
    assert_close(module.apply(variables, x_BLD)[0], want)


def test_the_gate_is_silu_and_the_other_half_passes():
    h = np.array([[[0.0, 1.0, -2.0, 30.0], [5.0, 2.0, 3.0, -1.0]]])
    want = [[0.0, 2 / (1 + np.exp(-1)), -6 / (1 + np.exp(2)), -30.0]]
    np.testing.assert_allclose(activate(jnp.asarray(h, jnp.float32)), want, rtol=1e-6)


@pytest.mark.parametrize("backend, capability, chosen", [
    ("cpu", (0, 0), "blocked"), ("gpu", (8, 0), "triton"), ("gpu", (7, 0), "ragged_dot"), ("gpu", (0, 0), "ragged_dot"),
    ("tpu", (0, 0), "ragged_dot")])
def test_auto_goes_by_the_backend(monkeypatch, backend, capability, chosen):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(experts, "cuda_capability", lambda: capability)
    assert experts.choose_compute("auto", weights(), pairs=9999) == chosen


@pytest.mark.parametrize("reason, dtype, chosen", [
    ("", jnp.float32, "native"), ("", jnp.bfloat16, "blocked"), ("no compiler", jnp.float32, "blocked")])
def test_on_a_cpu_float32_goes_to_native_kernels_if_they_can_be_compiled(monkeypatch, reason, dtype, chosen):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(native, "unavailable", lambda *_: reason)
    assert experts.choose_compute("auto", weights(dtype=dtype), pairs=9) == chosen


@pytest.mark.parametrize("changes, capability, pairs, chosen", [
    ({}, (9, 0), 384, "hopper"), ({}, (9, 0), 383, "triton"), ({}, (8, 0), 384, "triton"), ({}, (10, 0), 384, "triton"),
    ({"width": 384}, (9, 0), 384, "triton"), ({"hidden": 640}, (9, 0), 384, "triton"),
    ({"dtype": jnp.float32}, (9, 0), 384, "triton")])
def test_hopper_s_kernels_are_chosen_where_they_fit(monkeypatch, changes, capability, pairs, chosen):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    for module in (experts, grouped_hopper):
        monkeypatch.setattr(module, "cuda_capability", lambda: capability)
    assert experts.choose_compute("auto", weights(**changes), pairs) == chosen


def weights(width=256, hidden=512, dtype=jnp.bfloat16):
    return jnp.zeros((3, width, 2, hidden), dtype), jnp.zeros((3, hidden, width), dtype)


def test_kernels_for_gpus_are_refused_on_a_cpu():
    with pytest.raises(UserError, match="compute=triton needs a GPU"):
        experts.choose_compute("triton", weights(), pairs=1)


def test_only_blocks_need_spare_rows():
    assert experts.choose_compute("ragged_dot", weights(), pairs=1) == "ragged_dot"
    assert (experts.spare_rows("blocked", 200), experts.spare_rows("ragged_dot", 200)) == (12, 0)


def test_dropout_zeroes_a_share_and_keeps_the_mean():
    x, key = jnp.ones((100, 100), jnp.bfloat16), jax.random.key(0)
    assert dropout(x, 0.3, None) is x and dropout(x, 0.0, key) is x
    y = dropout(x, 0.25, key)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(np.unique(y.astype(jnp.float32)), [0, 4 / 3], rtol=2**-7)
    np.testing.assert_allclose(np.mean(np.asarray(y) == 0), 0.25, atol=0.02)
    np.testing.assert_array_equal(y, dropout(x, 0.25, key))
    assert np.any(y != dropout(x, 0.25, jax.random.key(1)))


def test_dropout_of_everything_gives_zeros_and_a_zero_gradient():
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(dropout(x, 1.0, jax.random.key(0))))(jnp.ones((2, 3)))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


@pytest.mark.parametrize("dispatch", ["dense", "sort"])
def test_expert_dropout_acts_on_hidden_units_by_the_key(dispatch):
    """The mean over many keys is the layer without dropout, and no two keys give the same."""
    given = inputs(6)
    config = config_of(dispatch=dispatch, expert_dropout=0.5)

    def run(key):
        return mixture(config, given.router, {}, given.w_in_ED2F, given.w_out_EFD, given.x_TD, context(given.mask_T),
                       key)[0]

    y_NTD = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 1000)), np.float64)
    plain_TD = np.asarray(jax.jit(lambda: run(None))())
    error_TD = np.abs(y_NTD.mean(0) - plain_TD) / (y_NTD.std(0) / np.sqrt(1000) + 1e-12)
    assert error_TD.max() < 5 and np.std(y_NTD, axis=0)[given.mask_T].min() > 0
    assert not y_NTD[:, ~given.mask_T].any()
