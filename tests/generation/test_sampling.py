"""Laws of the sampling rules on random logits."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from moejax.generation import sampling

B, V = 3, 11
settings = hypothesis.settings(max_examples=20, deadline=None)
seeds = strategies.integers(0, 2**31)
keep_top_k, keep_top_p, sample = (jax.jit(f) for f in (sampling.keep_top_k, sampling.keep_top_p, sampling.sample))


def distinct_logits(seed):
    """No two equal in a row, both signs."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(np.linspace(-3, 2.5, V)) for _ in range(B)]).astype(np.float32)


def softmax(logits_V):
    weights_V = np.exp(np.asarray(logits_V, np.float64) - np.max(logits_V))
    return weights_V / weights_V.sum()


def keys(count):
    return sampling.row_keys(sampling.row_digests([np.array([i]) for i in range(count)], seed=5))


@settings
@hypothesis.given(seeds, strategies.integers(1, V + 3))
def test_top_k_keeps_the_k_largest_logits_as_they_are(seed, k):
    logits_BV = distinct_logits(seed)
    kept_BV = np.asarray(keep_top_k(logits_BV, k))
    inside_BV = np.isfinite(kept_BV)
    assert (inside_BV.sum(axis=1) == min(k, V)).all()
    np.testing.assert_array_equal(kept_BV[inside_BV], logits_BV[inside_BV])
    for kept_V, logits_V in zip(inside_BV, logits_BV):
        assert logits_V[kept_V].min() >= max(logits_V[~kept_V], default=-np.inf)


@settings
@hypothesis.given(seeds, strategies.floats(0.001, 0.999))
def test_top_p_keeps_the_smallest_set_of_that_probability(seed, p):
    logits_BV = distinct_logits(seed)
    for kept_V, logits_V in zip(np.isfinite(keep_top_p(logits_BV, p)), logits_BV):
        probs_V = softmax(logits_V)
        assert probs_V[kept_V].sum() >= p - 1e-6
        assert probs_V[kept_V].sum() - probs_V[kept_V].min() < p + 1e-6
        assert probs_V[kept_V].min() >= max(probs_V[~kept_V], default=0)


def test_equal_logits_stay_together():
    logits_BV = np.array([[1.0, 2.0, 2.0, 0.0]], np.float32)
    np.testing.assert_array_equal(np.isfinite(keep_top_k(logits_BV, 1)), [[False, True, True, False]])
    np.testing.assert_array_equal(np.isfinite(keep_top_p(logits_BV, 0.1)), [[False, True, True, False]])


def test_rules_that_are_off_change_nothing_and_tiny_ones_keep_the_best():
    logits_BV = distinct_logits(1)
    np.testing.assert_array_equal(keep_top_k(logits_BV, 0), logits_BV)
    np.testing.assert_array_equal(keep_top_p(logits_BV, 1.0), logits_BV)
    np.testing.assert_array_equal(sampling.penalise_repetition(logits_BV, np.ones((B, V), bool), 1.0), logits_BV)
    assert (np.isfinite(keep_top_p(logits_BV, 1e-60)).sum(axis=1) == 1).all()


@settings
@hypothesis.given(seeds, strategies.floats(0.2, 5.0))
def test_the_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens(seed, penalty):
    logits_BV = distinct_logits(seed)
    seen_BV = np.random.default_rng(seed + 1).random((B, V)) < 0.5
    penalised_BV = np.asarray(sampling.penalise_repetition(logits_BV, seen_BV, penalty))
    for index, logit in np.ndenumerate(logits_BV):
        factor = 1 if not seen_BV[index] else 1 / penalty if logit > 0 else penalty
        np.testing.assert_allclose(penalised_BV[index], logit * factor, rtol=1e-6)


@pytest.mark.parametrize("rule", [{"temperature": 0.0, "top_k": 4, "top_p": 0.9}, {"temperature": 1e-30},
                                  {"temperature": 3.0, "top_k": 1}, {"temperature": 3.0, "top_p": 1e-9}])
def test_greedy_and_its_limits_take_the_largest_logit(rule):
    logits_BV = distinct_logits(2) * 1e3
    tokens_B = sample(logits_BV, keys(B), **rule)
    assert tokens_B.dtype == jnp.int32
    np.testing.assert_array_equal(tokens_B, logits_BV.argmax(axis=1))


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (2.0, 6, 1.0), (0.5, 0, 0.8), (1.5, 7, 0.7)])
def test_frequencies_follow_temperature_then_top_k_then_top_p(temperature, top_k, top_p):
    draws = 6000
    logits_V = distinct_logits(3)[0]
    expected_V = softmax(logits_V / temperature)
    order_V = np.argsort(-expected_V)
    expected_V[order_V[top_k or V:]] = 0
    expected_V /= expected_V.sum()
    before_V = np.cumsum(expected_V[order_V]) - expected_V[order_V]
    expected_V[order_V[before_V >= top_p]] = 0
    expected_V /= expected_V.sum()
    tokens_B = sample(jnp.broadcast_to(logits_V, (draws, V)), keys(draws), temperature, top_k, top_p)
    seen_V = np.bincount(tokens_B, minlength=V)
    assert not seen_V[expected_V == 0].any()
    deviation_V = (seen_V - draws * expected_V)[expected_V > 0] / np.sqrt(draws * expected_V[expected_V > 0])
    assert np.abs(deviation_V).max() < 4.5


def test_a_row_does_not_depend_on_the_others_and_traced_rules_do_as_static_ones():
    logits_BV, keys_B = distinct_logits(4), keys(B)
    rule = (1.3, 5, 0.9)
    tokens_B = np.asarray(sample(logits_BV, keys_B, *rule))
    np.testing.assert_array_equal(sampling.sample(logits_BV, keys_B, *rule), tokens_B)
    for b in range(B):
        np.testing.assert_array_equal(sample(logits_BV[b:b + 1], keys_B[b:b + 1], *rule), tokens_B[b:b + 1])


def test_digests_follow_content_occurrence_and_seed_alone():
    prompts = [np.array(ids) for ids in ([1, 2], [1], [1, 2], [2, 1])]
    digests_B2 = sampling.row_digests(prompts, seed=7)
    assert len(np.unique(digests_B2, axis=0)) == len(prompts)
    np.testing.assert_array_equal(sampling.row_digests([prompts[i].astype(np.int16) for i in (3, 0, 1, 2)], seed=7),
                                  digests_B2[[3, 0, 1, 2]])
    assert not np.isin(sampling.row_digests(prompts, seed=-7), digests_B2).any()
    assert len(np.unique(jax.random.key_data(sampling.row_keys(digests_B2)), axis=0)) == len(prompts)
