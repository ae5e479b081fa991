"""Parameters and operations against a count by hand."""

import jax
import pytest
from tiny import tiny_config

from moejax.models import count, transformer


def test_parameters_by_hand():
    config = tiny_config(moe__shared_experts=1)
    model = transformer.build(config)
    counted = count.count_parameters(*transformer.abstract_params(model), config.moe)
    attention = 24 * 4 * 6 + 2 * (24 * 2 * 6) + 4 * 6 * 24
    norms = 2 * 24
    dense = attention + norms + 3 * 24 * 20
    expert = 3 * 24 * 12
    sparse = attention + norms + 24 * 5 + expert  # router and one shared expert
    outside = 2 * 37 * 24 + 24
    assert counted.total == dense + 2 * (sparse + 5 * expert) + outside
    assert counted.active == dense + 2 * (sparse + 2 * expert) + outside
    assert counted.embedding == 2 * 37 * 24
    assert counted.total == sum(p.size for p in jax.tree.leaves(jax.eval_shape(
        lambda: transformer.initial_params(model, jax.random.key(0)))))


@pytest.mark.parametrize("choices, shared", [(1, 0), (2, 0), (2, 1)])
def test_operations_by_hand(choices, shared):
    config = tiny_config(moe__experts_per_token=choices, moe__shared_experts=shared, moe__renormalize=False)
    projections = 2 * 24 * (24 + 12 + 12) + 2 * 24 * 24
    scores = 2 * 2 * 4 * 6 * (1 + 14) / 2  # scores and values, over 1 to 14 keys
    dense = 2 * 3 * 24 * 20
    sparse = 2 * 24 * 5 + (choices + shared) * 2 * 3 * 24 * 12
    head = 2 * 24 * 37
    wanted = 3 * (projections + scores) + dense + 2 * sparse + head
    assert count.forward_flops(config.model, config.moe, 14) == wanted
    assert count.training_flops(config) == 3 * wanted
