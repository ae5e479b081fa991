"""Laws of dispatch: every way to move tokens is the same function as a loop over the list, and has its gradients.

The list is what a router may say: any number of pairs, in any order, with some that are not valid.
"""

from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from hypothesis import strategies
from moe_reference import D, E, K, T, assert_close, assignments_of, config_of, context, inputs, listed

from moejax.moe import experts
from moejax.moe.dispatch import DISPATCHERS, Sizes, sort
from moejax.moe.layer import mixture
from moejax.moe.types import Assignments

WAYS = [("dense", "blocked", 4), ("sort", "native", 1), ("sort", "blocked", 5), ("sort", "blocked", 64),
        ("sort", "ragged_dot", 1), ("sort", "triton", 1)]
every_way = pytest.mark.parametrize("dispatch, compute, block_rows", WAYS)
settings = hypothesis.settings(max_examples=8, deadline=None)
seeds = hypothesis.given(strategies.integers(0, 2**32 - 1))


@partial(jax.jit, static_argnums=(0, 1, 2))
def forward_and_backward(dispatch, compute, block_rows, assignments, x_TD, w_in, w_out, dy_TD):
    """y_TD, and the gradients of sum(y * dy) to x, the weights of the pairs, w_in and w_out."""
    way = DISPATCHERS[dispatch]

    def run(x_TD, weight_N, w_in, w_out):
        sizes = Sizes(x_TD.shape[0], w_in.shape[0], experts.spare_rows(compute, block_rows))
        plan = way.plan(assignments.replace(weight_N=weight_N), sizes)
        rows = way.dispatch(x_TD, plan)
        if way.manual:
            rows = experts.feed_forward(rows, plan.sizes_E, w_in, w_out, compute=compute, block_rows=block_rows)
        else:
            rows = experts.dense_feed_forward(rows, w_in, w_out)
        return way.combine(rows, plan)

    y_TD, pull = jax.vjp(run, x_TD, assignments.weight_N, w_in, w_out)
    return y_TD, dict(zip(("x", "weight", "w_in", "w_out"), pull(dy_TD), strict=True))


def check_equal_to_the_loop(way, assignments, seed):
    given, valid_N = inputs(seed), np.asarray(assignments.valid_N)
    dy_TD = np.random.default_rng(seed).normal(size=(T, D)).astype(np.float32)
    y_TD, gradients = forward_and_backward(*way, assignments, given.x_TD, given.w_in_ED2F, given.w_out_EFD, dy_TD)
    want_TD, want = reference.experts(given.x_TD, listed(assignments), given.w_in_ED2F, given.w_out_EFD, dy_TD)
    assert_close(y_TD, want_TD)
    assert_close(gradients["x"], want["x"])
    assert_close(np.asarray(gradients["weight"])[valid_N], want["weight"])
    assert not np.any(np.asarray(gradients["weight"])[~valid_N])
    assert_close(gradients["w_in"], want["w_in"], per_expert=True)
    assert_close(gradients["w_out"], want["w_out"], per_expert=True)


@every_way
@settings
@seeds
def test_any_list_equals_a_loop_over_its_valid_pairs(dispatch, compute, block_rows, seed):
    """In any order, tokens with many pairs or none, pairs that occur twice, and invalid pairs that name anything."""
    rng = np.random.default_rng(seed)
    pairs = 37
    valid_N = rng.random(pairs) < rng.random()
    valid_N[rng.integers(pairs)] = True
    token_N, expert_N = rng.integers(0, T, pairs), rng.integers(0, rng.integers(1, E + 1), pairs)
    free = Assignments(token_N.astype(np.int32), expert_N.astype(np.int32), rng.normal(size=pairs).astype(np.float32),
                       valid_N, choices=0)
    check_equal_to_the_loop((dispatch, compute, block_rows), free, seed % 1000)


def skewed(kind, rng):
    """Token-major choices: all on the same experts, popularity 1/rank, or one expert that nobody wants."""
    popularity_E = {"one": -100.0 * np.arange(E), "zipf": -np.log(np.arange(1, E + 1)),
                    "one empty": -100.0 * (np.arange(E) == 3)}[kind]
    return np.argsort(-(popularity_E + rng.gumbel(size=(T, E))), axis=1)[:, :K]


@every_way
@pytest.mark.parametrize("kind", ["one", "zipf", "one empty"])
def test_skewed_token_choice_equals_a_loop_and_an_empty_expert_gets_exactly_no_gradient(dispatch, compute, block_rows,
                                                                                       kind):
    rng = np.random.default_rng(1)
    expert_TK = skewed(kind, rng)
    valid_TK = np.repeat(inputs(0).mask_T[:, None], K, 1) & (rng.random((T, K)) < 0.9)
    chosen = assignments_of(expert_TK, rng.random((T, K)), valid_TK)
    assert kind == "zipf" or (np.bincount(expert_TK[valid_TK], minlength=E) == 0).any()
    check_equal_to_the_loop((dispatch, compute, block_rows), chosen, 2)


@every_way
def test_a_list_without_valid_pairs_gives_zeros(dispatch, compute, block_rows):
    nothing = assignments_of(np.zeros((T, K)), np.ones((T, K)), np.zeros((T, K), bool))
    check_equal_to_the_loop((dispatch, compute, block_rows), nothing, 3)


@settings
@seeds
def test_the_plan_of_sort_is_a_pairing_of_valid_pairs_and_rows_grouped_by_expert(seed):
    rng = np.random.default_rng(seed)
    expert_TK, valid_TK = skewed("zipf", rng), rng.random((T, K)) < 0.7
    chosen = assignments_of(expert_TK, np.ones((T, K)), valid_TK)
    for spare in (0, 5, 64):
        plan = jax.tree.map(np.asarray, jax.jit(sort.plan, static_argnums=1)(chosen, Sizes(T, E, spare)))
        rows, pairs = len(plan.pair_R), T * K
        count_E = np.bincount(expert_TK[valid_TK], minlength=E)
        np.testing.assert_array_equal(plan.sizes_E, count_E)
        assert rows == pairs + spare
        start_E = np.cumsum(count_E) - count_E
        for e in range(E):
            held = plan.pair_R[start_E[e]:start_E[e] + count_E[e]]
            np.testing.assert_array_equal(held, np.flatnonzero((chosen.expert_N == e) & chosen.valid_N))
        used = plan.pair_R < pairs
        assert used.sum() == valid_TK.sum() == (plan.row_N < rows).sum()
        np.testing.assert_array_equal(plan.row_N[plan.pair_R[used]], np.flatnonzero(used))
        np.testing.assert_array_equal(plan.token_R, np.where(used, chosen.token_N[np.where(used, plan.pair_R, 0)], T))


@partial(jax.jit, static_argnums=(0, 3, 4))
def there_and_back(dispatch, assignments, x_TD, num_experts, spare):
    """What identity experts would give."""
    way = DISPATCHERS[dispatch]
    plan = way.plan(assignments, Sizes(x_TD.shape[0], num_experts, spare))
    return way.combine(way.dispatch(x_TD, plan), plan)


@pytest.mark.parametrize("choices", [K, 0])
def test_identity_experts_return_each_token_times_the_sum_of_its_weights(choices):
    rng = np.random.default_rng(4)
    valid_TK, weight_TK = rng.random((T, K)) < 0.7, rng.random((T, K)).astype(np.float32)
    chosen = assignments_of(skewed("zipf", rng), weight_TK, valid_TK).replace(choices=choices)
    x_TD = inputs(4).x_TD
    np.testing.assert_allclose(there_and_back("sort", chosen, x_TD, E, 5),
                               x_TD * np.sum(weight_TK * valid_TK, 1, keepdims=True), rtol=1e-6)


def test_with_a_token_major_list_neither_direction_of_sort_adds_by_scatter():
    chosen = assignments_of(skewed("zipf", np.random.default_rng(5)), np.ones((T, K)), np.ones((T, K), bool))

    def total(x_TD, weight_N, chosen):
        plan = sort.plan(chosen.replace(weight_N=weight_N), Sizes(T, E, 4))
        return jnp.sum(sort.combine(jnp.sin(sort.dispatch(x_TD, plan)), plan)**2)

    def program(choices):
        return str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(inputs(5).x_TD, chosen.weight_N,
                                                                   chosen.replace(choices=choices)))

    assert "scatter-add" in program(0) and "scatter-add" not in program(K)


@pytest.mark.parametrize("choices", [K, 0])
@pytest.mark.parametrize("dispatch", ["dense", "sort"])
def test_bfloat16_rows_are_summed_in_float32(dispatch, choices):
    """300 equal terms of 1: a sum in bfloat16 would stop at 256."""
    many, tokens = 300, 2
    chosen = assignments_of(np.tile(np.arange(many), (tokens, 1)), np.ones((tokens, many)),
                            np.ones((tokens, many), bool)).replace(choices=many if choices else 0)
    y_TD = there_and_back(dispatch, chosen, jnp.ones((tokens, 3), jnp.bfloat16), many, 1)
    assert y_TD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y_TD.astype(jnp.float32), 300)


@partial(jax.jit, static_argnums=0)
@partial(jax.grad, argnums=(1, 2, 3, 4), has_aux=True)
def layer_gradients(config, x_TD, router_parameters, w_in, w_out, where):
    y_TD, record, *_ = mixture(config, router_parameters, {}, w_in, w_out, x_TD, where, None)
    return jnp.sum(jnp.sin(y_TD)) + 0.1 * sum(record.losses.values()), (y_TD, record.load)


@pytest.mark.parametrize("router, compute, block_rows", [
    ("topk", "native", 1), ("topk", "blocked", 3), ("topk", "ragged_dot", 1), ("expert_choice", "native", 1),
    ("expert_choice", "blocked", 3),
    ("topk", "triton", 1), ("expert_choice", "triton", 1)])
def test_sort_equals_the_dense_oracle_in_output_and_in_every_gradient(monkeypatch, router, compute, block_rows):
    """Through the router, too, with popular experts and some that no token chooses. Kernels for GPUs are interpreted."""
    monkeypatch.setattr(experts, "choose_compute", lambda compute, *_: "blocked" if compute == "auto" else compute)
    given = inputs(6)
    x_TD, popular_E = np.abs(given.x_TD), np.linspace(2, -6, E, dtype=np.float32)
    arguments = (x_TD, {"w_DE": given.router["w_DE"] + popular_E}, given.w_in_ED2F, given.w_out_EFD,
                 context(given.mask_T))
    gradients, (y_TD, load) = layer_gradients(
        config_of(router, dispatch="sort", compute=compute, block_rows=block_rows), *arguments)
    want, (want_TD, want_load) = layer_gradients(config_of(router, dispatch="dense"), *arguments)
    assert router != "topk" or (np.asarray(load.assigned_E) == 0).any()
    jax.tree.map(np.testing.assert_array_equal, load, want_load)
    assert_close(y_TD, want_TD)
    jax.tree.map(assert_close, gradients[:2], want[:2])
    jax.tree.map(partial(assert_close, per_expert=True), gradients[2:], want[2:])
