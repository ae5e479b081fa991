"""Routers that know of tasks: a vector each, learned, and one model for each task."""

from functools import partial

import jax
import numpy as np
import pytest
from tiny import relative_errors, tiny_batch, tiny_config, tiny_functions, tiny_model

import moejax
from moejax.config import UserError
from moejax.models import transformer
from moejax.moe.layer import TASK_VECTORS
from moejax.train.state import TrainState
from moejax.train.step import gradients

SMALL = {"model__layers": 1, "moe__first_dense": 0, "moe__balance_scope": "sequence",
         "data__task": {"tasks": {name: {"source": "x"} for name in "abc"}}}
KNOWING = SMALL | {"model__architecture": {"router_tasks": 3}}
TASK = np.array([0, 2, 2, 0, 2, 0, 2, 0], np.int32)  # none of task 1


def vectors(params):
    """Of the one sparse layer, [3, D]."""
    return np.asarray(params["stack_0"]["block_0"]["moe"][TASK_VECTORS])[0]


@partial(jax.jit, static_argnums=0)
def scores(model, params, state, batch):
    return transformer.apply_batch(model, params, state, batch).logits_BLV


@pytest.fixture(scope="module")
def made():
    config = tiny_config(**KNOWING)
    return config, *tiny_model(config)


def differentiate(made, parts):
    """Gradients and means of a batch in so many parts."""
    config, model, params, state = made
    functions = tiny_functions(config, model)[0]
    now = TrainState(np.int32(0), params, None, state, jax.random.PRNGKey(0))
    return jax.jit(partial(gradients, functions, parts=parts))(now, tiny_batch(config) | {"task": TASK})


@pytest.fixture(scope="module")
def whole(made):
    return differentiate(made, 1)


def test_each_tasks_vector_learns_from_its_rows_alone(made, whole):
    changes = np.abs(vectors(whole[0])).max(axis=1)
    assert changes[0] > 0 and changes[2] > 0 and changes[1] == 0
    mask_BL = tiny_batch(made[0])["mask"]
    loss_N, share_N = (np.asarray(whole[1][name]) for name in ("task_loss", "task_targets"))
    np.testing.assert_allclose(loss_N.sum(), whole[1]["loss"], rtol=1e-5)
    wanted = [mask_BL[task == TASK].sum() / mask_BL.sum() for task in range(3)]
    np.testing.assert_allclose(share_N, wanted, rtol=1e-6)


@pytest.mark.slow
def test_micro_batches_add_up_task_by_task(made, whole):
    split = differentiate(made, 2)
    assert max(relative_errors(split[0], whole[0]).values()) < 1e-5
    assert max(relative_errors(split[1], whole[1]).values()) < 1e-5


def test_a_fresh_model_routes_by_its_input_alone(made):
    config, model, params, state = made
    batch = tiny_batch(config)
    own = dict(params["stack_0"]["block_0"]["moe"])
    own[TASK_VECTORS] = 0 * own[TASK_VECTORS]
    fresh = {**params, "stack_0": {"block_0": {**params["stack_0"]["block_0"], "moe": own}}}
    plain = transformer.build(tiny_config(**SMALL))
    bare = {**params, "stack_0": {"block_0": {**params["stack_0"]["block_0"],
                                              "moe": {k: v for k, v in own.items() if k != TASK_VECTORS}}}}
    one = scores(model, fresh, state, batch | {"task": TASK})
    np.testing.assert_array_equal(one, scores(plain, bare, state, batch))
    other = scores(model, params, state, batch | {"task": TASK})
    assert np.abs(np.asarray(one - other)).max() > 1e-3
    initial = jax.eval_shape(lambda: transformer.initial_params(model, jax.random.key(0)))
    assert vectors(jax.tree.map(lambda a: np.zeros(a.shape), initial)).shape == (3, 24)


def test_the_model_for_a_task_is_the_model_with_rows_of_that_task(made):
    config, model, params, state = made
    batch = tiny_batch(config)
    for number in range(3):
        alone, variables = moejax.for_task(model, {"params": params, "router": state}, number)
        one = scores(alone, variables["params"], state, batch)
        other = scores(model, params, state, batch | {"task": np.full(8, number, np.int32)})
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_without_a_task_it_says_so(made):
    _, model, params, state = made
    variables = {"params": params, "router": state}
    for call in (moejax.logits, moejax.generate):
        with pytest.raises(UserError, match="routers know of 3 tasks; say which is meant: --task=NAME, or moejax.for_task"):
            call(model, variables, [[1, 2, 3]])
    with pytest.raises(UserError, match="number=3: the routers know of 3 tasks, from 0"):
        moejax.for_task(model, variables, 3)


@pytest.mark.parametrize("changes, message", [
    ({"model__architecture": {"router_tasks": 2}}, "router_tasks=2, but config.data.task has 3 tasks"),
    ({"data__task": None}, "there is one task only"), ({"moe__router": "hash"}, "no router that could learn of tasks"),
    ({"moe__every": 0}, "no router that could learn of tasks")])
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**KNOWING | changes)
