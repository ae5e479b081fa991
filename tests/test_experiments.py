"""Every shipped experiment builds, fits its mesh, and says how to run it."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from moejax import config as config_lib
from moejax.models import count
from moejax.train.benchmark import random_batch
from moejax.train.setup import describe, set_up

ROOT = pathlib.Path(__file__).parent.parent
EXPERIMENTS = sorted(path for path in (ROOT / "experiments").rglob("*.py") if "def get_config(" in path.read_text())


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_builds(path):
    module = load(path)
    for word in ("Command ", "Hardware ", "Time ", "Result ", f"--config={path.relative_to(ROOT)}"):
        assert word in module.__doc__
    config = config_lib.build(module.get_config())
    setup = set_up(config)
    with jax.set_mesh(setup.mesh):
        batch = jax.eval_shape(lambda: random_batch(setup, np.random.default_rng(0)))
        state, means, _ = jax.eval_shape(setup.train_step, setup.shapes, batch)
    assert jax.tree.map(lambda a: a.shape, state) == jax.tree.map(lambda a: a.shape, setup.shapes)
    assert means["loss"].shape == ()
    assert f"{setup.parameters.total:,} parameters" in describe(setup)


def named(name):
    setup = set_up(config_lib.build(load(next(path for path in EXPERIMENTS if path.stem == name)).get_config()))
    return setup.config, setup


def test_the_dense_control_has_equal_operations():
    (sparse, sparse_setup), (dense, dense_setup) = named("tiny"), named("tiny_dense")
    router = 3 * 2 * sparse.model.embed * sparse.moe.num_experts * sparse.model.layers
    assert count.training_flops(sparse) - router == count.training_flops(dense)
    assert sparse_setup.parameters.active - dense_setup.parameters.total == router // 6
    assert sparse_setup.parameters.total > 2 * dense_setup.parameters.total
    differing = {key for key, value in config_lib.flatten(config_lib.to_dict(sparse)).items()
                 if config_lib.flatten(config_lib.to_dict(dense))[key] != value}
    assert differing == {"moe.every"}


def test_the_mixtures_of_tasks_have_equal_operations():
    path = next(path for path in EXPERIMENTS if path.stem == "mixed")
    forms = ("sparse", "dense", "knowing")
    sparse, dense, knowing = (set_up(config_lib.build(load(path).get_config(form))) for form in forms)
    router = 3 * 2 * sparse.config.model.embed * sparse.config.moe.num_experts * sparse.config.model.layers
    assert count.training_flops(sparse.config) - router == count.training_flops(dense.config)
    assert count.training_flops(knowing.config) == count.training_flops(sparse.config)
    vectors = 4 * sparse.config.model.embed * sparse.config.model.layers
    assert knowing.parameters.total - sparse.parameters.total == vectors
    assert sparse.config.data.task.names == ("german", "language", "presidents", "sentiment")


def test_sizes_are_as_announced():
    assert 90e6 < named("small")[1].parameters.total < 130e6
    olmoe = named("olmoe_1b_7b")[1].parameters
    assert 6.8e9 < olmoe.total < 7.0e9 and 1.2e9 < olmoe.active < 1.4e9
