"""Numbers of several tasks."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from moejax.metrics.tasks import js_divergence, losses_line, routing_of_tasks, training_summary
from moejax.moe.types import ExpertLoad, LayerRecord

COUNTS = strategies.lists(strategies.integers(0, 40), min_size=5, max_size=5).filter(any)


def entropy(p):
    return -sum(x * np.log2(x) for x in p if x > 0)


@hypothesis.given(COUNTS, COUNTS)
def test_js_divergence_is_the_definition_symmetric_and_bounded(p, q):
    found = js_divergence(p, q)
    assert found == js_divergence(q, p) and 0 <= found <= 1
    p, q = np.array(p) / sum(p), np.array(q) / sum(q)
    assert found == pytest.approx(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, abs=1e-12)


def test_js_divergence_of_equal_and_of_disjoint_loads():
    assert js_divergence([3, 1, 0], [6, 2, 0]) == 0
    assert js_divergence([3, 1, 0, 0], [0, 0, 7, 2]) == pytest.approx(1, abs=1e-12)
    assert js_divergence([0, 0], [1, 2]) == 0


def record(load):
    load = np.array(load)
    return LayerRecord({}, ExpertLoad(load, 0 * load, load, 0 * load, load.sum(), 0.0), {})


def test_routing_of_tasks_is_laid_out_by_layer():
    found = routing_of_tasks({"a": [record([4, 0]), record([1, 1])], "b": [record([0, 9]), record([3, 3])],
                              "c": [record([1, 1]), record([1, 3])]})
    assert found["tasks/names"] == ["a", "b", "c"]
    assert found["tasks/load"] == [[[1, 0], [0, 1], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5], [0.25, 0.75]]]
    first, second = np.array(found["tasks/js"])
    assert first[0, 1] == 1 and second[0, 1] == 0 and (first == first.T).all() and (np.diag(second) == 0).all()
    means = [layer[np.triu_indices(3, 1)].mean() for layer in (first, second)]
    np.testing.assert_allclose(found["tasks/js_mean"], means, atol=1e-6)
    assert "tasks/js_mean" not in routing_of_tasks({"a": [record([4, 0])]})
    assert routing_of_tasks({"a": [], "b": []}) == {}


def test_the_losses_of_tasks_weighted_by_targets_are_the_whole_loss():
    found = training_summary(("a", "b", "c"), np.array([0.6, 0.0, 1.2]), np.array([0.25, 0.0, 0.75]))
    assert found == {"task/a/loss": 2.4, "task/a/share": 0.25, "task/c/loss": pytest.approx(1.6), "task/c/share": 0.75}
    assert sum(found[f"task/{name}/loss"] * found[f"task/{name}/share"] for name in "ac") == pytest.approx(1.8)
    assert losses_line(found) == "a 2.4000, c 1.6000" and losses_line({"loss": 1.0}) == ""
