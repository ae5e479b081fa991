"""Every shipped experiment builds, fits its mesh, and says how to run it."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from moejax import config as config_lib
from moejax.models import count
from moejax.models.transformer import resolve
from moejax.train.benchmark import random_batch
from moejax.train.setup import describe, set_up

ROOT = pathlib.Path(__file__).parent.parent
EXPERIMENTS = sorted(path for path in (ROOT / "experiments").rglob("*.py") if "def get_config(" in path.read_text())
FORMS = {"base": ("full", "quick"), "finetune": ("dense", "sparse"), "mixed": ("sparse", "dense", "knowing"),
         "period": ("sparse", "dense", "finetune_sparse", "finetune_dense", "scratch_sparse", "scratch_dense"),
         "summary": ("sparse", "dense"),
         "tfds": ("lm1b", "c4", "glue_sst2", "glue_mnli", "glue_stsb", "wmt14_de_en", "cnn_dailymail", "squad"),
         "translate": ("all", "dense", "german", "french", "spanish")}
"""Of each experiment that has some, the default one first."""


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


def by_name(name):
    return load(next(path for path in EXPERIMENTS if path.stem == name))


def named(name):
    setup = set_up(config_lib.build(by_name(name).get_config()))
    return setup.config, setup


def differing(one, other):
    one, other = (config_lib.flatten(config_lib.to_dict(config)) for config in (one, other))
    return {key for key in one | other if key not in one or key not in other or one[key] != other[key]}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_builds_and_no_other(name):
    experiment = by_name(name)
    forms = {form: config_lib.build(experiment.get_config(form)) for form in FORMS[name]}
    assert list(getattr(experiment, "FORMS", forms)) == list(forms)
    assert all(count.training_flops(resolve(config)) > 0 for config in forms.values())
    default, *others = forms.values()
    assert not differing(config_lib.build(experiment.get_config()), default)
    assert all(differing(default, other) for other in others)
    with pytest.raises(ValueError, match="'another' is n.*" + ".*".join(FORMS[name])):
        experiment.get_config("another")


@pytest.mark.parametrize("name, sparse, dense, also", (
    ("period", "sparse", "dense", set()),
    ("period", "finetune_sparse", "finetune_dense", {"data.tokenizer", "train.init_from"}),
    ("period", "scratch_sparse", "scratch_dense", {"data.tokenizer"}),
    ("summary", "sparse", "dense", set()),
    ("translate", "all", "dense", set())))
def test_the_dense_forms_have_equal_operations(name, sparse, dense, also):
    sparse, dense = (config_lib.build(by_name(name).get_config(form)) for form in (sparse, dense))
    assert differing(sparse, dense) == {"moe.every", *also} and dense.moe.every == 0
    routers = 3 * 2 * sparse.model.embed * sparse.moe.num_experts * sparse.model.layers // sparse.moe.every
    flops = [count.training_flops(resolve(config)) for config in (sparse, dense)]
    assert flops[0] - routers == pytest.approx(flops[1])


def test_a_language_alone_takes_a_third_of_the_steps():
    get_config = by_name("translate").get_config
    together, *alone = (resolve(config_lib.build(get_config(form))) for form in ("all", "german", "french", "spanish"))
    assert [config.data.task.names for config in alone] == [("german",), ("french",), ("spanish",)]
    assert sorted(together.data.task.names) == ["french", "german", "spanish"]
    assert {config.train.steps for config in alone} == {together.train.steps // 3}


def test_the_dense_control_has_equal_operations():
    (sparse, sparse_setup), (dense, dense_setup) = named("tiny"), named("tiny_dense")
    router = 3 * 2 * sparse.model.embed * sparse.moe.num_experts * sparse.model.layers
    assert count.training_flops(sparse) - router == count.training_flops(dense)
    assert sparse_setup.parameters.active - dense_setup.parameters.total == router // 6
    assert sparse_setup.parameters.total > 2 * dense_setup.parameters.total
    assert differing(sparse, dense) == {"moe.every"}


def test_the_mixtures_of_tasks_have_equal_operations():
    sparse, dense, knowing = (set_up(config_lib.build(by_name("mixed").get_config(form))) for form in FORMS["mixed"])
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
