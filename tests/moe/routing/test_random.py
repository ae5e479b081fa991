"""Random routing: uniform, and in evaluation the same chance every time."""

import jax
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import B, E, K, T, config_of, context, inputs, matrix, route

from moejax.moe.routing import ROUTERS

CONFIG = config_of("random", route_scale=1.5)
MANY = 4000


def chosen(ids_T, sequences=1, seed=None, mask_T=None, config=CONFIG):
    """How often each token and expert are paired; in training with this seed, or in evaluation."""
    mask_T = np.ones(len(ids_T), bool) if mask_T is None else mask_T
    key = None if seed is None else jax.random.key(seed)
    out = route(config, {}, {}, np.zeros((len(ids_T), 1), np.float32),
                context(mask_T, np.asarray(ids_T, np.int32), sequences, train=seed is not None, key=key))
    return matrix(out.assignments, len(ids_T))[0]


@pytest.mark.parametrize("train", [True, False])
def test_every_expert_and_every_pair_of_experts_is_equally_likely(train):
    count_TE = chosen(np.arange(MANY), seed=3 if train else None)
    assert count_TE.max() == 1 and (count_TE.sum(1) == K).all()
    share = K / E
    assert np.abs(count_TE.mean(0) - share).max() < 4 * np.sqrt(share * (1 - share) / MANY)
    together_EE, pair = count_TE.T @ count_TE / MANY, K * (K - 1) / (E * (E - 1))
    assert np.abs(together_EE - pair)[~np.eye(E, dtype=bool)].max() < 4.5 * np.sqrt(pair / MANY)
    neighbours = np.mean(np.sum(count_TE[1:] * count_TE[:-1], axis=1))
    assert abs(neighbours - K * K / E) < 5 * np.sqrt(K * K / E / MANY), "one token tells nothing about the next"


def test_in_training_every_key_draws_anew_and_ids_do_not_matter():
    one, other = chosen(np.arange(T), B, seed=0), chosen(np.arange(T), B, seed=1)
    assert (one != other).any()
    np.testing.assert_array_equal(one, chosen(np.zeros(T), B, seed=0))
    assert ROUTERS["random"].noisy(CONFIG) and ROUTERS["random"].causal


def test_in_evaluation_the_id_alone_decides():
    ids_T = np.random.default_rng(0).integers(0, 50, MANY)
    first = chosen(ids_T)
    np.testing.assert_array_equal(first, chosen(ids_T))
    np.testing.assert_array_equal(first[::-1], chosen(ids_T[::-1], sequences=4))


@pytest.mark.parametrize("experts, choices", [(E, 1), (E, E), (1, 1)])
@pytest.mark.parametrize("train", [True, False])
def test_weights_are_one_over_k_and_nothing_else_is_said(experts, choices, train):
    given = inputs(1, experts)
    config = config_of("random", num_experts=experts, experts_per_token=choices, route_scale=1.5)
    out = route(config, {}, {}, given.x_TD, context(given.mask_T, given.ids_T, train=train,
                                                    key=jax.random.key(0) if train else None))
    count_TE, weight_TE = matrix(out.assignments, experts=experts)
    np.testing.assert_array_equal(count_TE.sum(1), choices * given.mask_T)
    np.testing.assert_allclose(weight_TE, 1.5 / choices * count_TE, rtol=1e-6)
    np.testing.assert_allclose(out.entropy, np.log(choices) * given.mask_T.sum(), rtol=1e-6)
    assert (out.losses, out.statistics) == ({}, {}) and reference.initial_state(config) == {}
