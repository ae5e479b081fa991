"""Configs: typed, checked once, few keys, documented."""

import dataclasses
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax import config as config_lib
from moejax.architecture import Architecture
from moejax.checkpoint.workdir import changed
from moejax.config import Config, UserError, build, default
from moejax.finetune import Finetune
from moejax.mixture import Mixture
from moejax.models import transformer
from moejax.task import Task


def test_fewer_than_a_hundred_keys_and_each_says_what_it_is():
    fields = config_lib.fields()
    assert len(fields) < 100
    assert all(field.metadata["help"] for field in fields.values())


def test_default_builds_to_the_defaults_and_json_round_trips():
    assert build(default()) == Config()
    assert build(config_lib.to_dict(Config())) == Config()


@pytest.mark.parametrize("tree, message", [
    ({"model": {"layrs": 1}}, r"config\.model\.layrs \(did you mean layers\?\)"),
    ({"modle": {}}, r"config\.modle \(did you mean model\?\)"),
    ({"model": {"layers": 2.5}}, r"config\.model\.layers=2\.5 must be of type int"),
    ({"model": {"layers": True}}, "must be of type int"),
    ({"model": 3}, "group of keys"),
    ({"moe": {"score": "sofmax"}}, r"one of softmax, sigmoid \(did you mean softmax\?\)"),
    ({"model": {"dropout": 1.5}}, "at most 1"),
    ({"train": {"steps": 0}}, "at least 1"),
    ({"model": {"heads": 6, "kv_heads": 4}}, "does not divide"),
    ({"moe": {"experts_per_token": 9}}, "more than config.moe.num_experts=8"),
    ({"moe": {"experts_per_token": 1}}, "no gradient; set config.moe.renormalize=False"),
    ({"moe": {"balance_weight": "atuo"}}, "config.moe.balance_weight='atuo' must be of type float"),
    ({"model": {"architecture": {"attention": ["wide"]}}}, r"architecture\.attention='wide' must be one of full"),
    ({"model": {"architecture": {"attention": "full"}}}, r"architecture\.attention='full' must be a list"),
    ({"model": {"architecture": {"attention": ["sliding"]}}}, r"set config\.model\.architecture\.window"),
    ({"model": {"architecture": {"rope": {"scaling": "yarn"}}}}, r"needs config\.model\.architecture\.rope\.original_"),
    ({"model": {"architecture": {"windw": 3}}}, r"unknown config key config\.model\.architecture\.windw \(did you mean w"),
    ({"model": {"architecture": {"latent": {"rank": 8}}}}, "latent needs an even rotary_dim"),
    ({"moe": {"sparse_blocks": [0, 4]}}, r"sparse_blocks=\(0, 4\) names blocks beyond the 4 "),
    ({"moe": {"options": 3}}, "must be None or a dict of options by name"),
    ({"moe": {"options": {"grops": 2}}}, r"unknown config key config\.moe\.options\.grops \(did you mean groups\?\)"),
    ({"moe": {"options": {"groups": 3}}}, "config.moe.options.groups=3 does not divide config.moe.num_experts=8"),
    ({"moe": {"capacity_factor": 1.0, "drop_policy": "choice_major"}}, "token_major would not"),
    ({"data": {"length": 2000}}, "max_length=1024"),
    ({"train": {"microbatches": 3}}, "does not divide"),
    ({"train": {"microbatches": 2}, "moe": {"balance_scope": "shard"}}, "global or sequence"),
    ({"train": {"microbatches": 2}, "moe": {"routing_group": "global", "capacity_factor": 1.0}}, "cannot be split"),
])
def test_what_cannot_be_is_refused_in_one_line(tree, message):
    with pytest.raises(UserError, match=message) as error:
        transformer.resolve(build(tree))
    assert "\n" not in str(error.value)


@settings(max_examples=300, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5), lambda inner:
                    st.dictionaries(st.sampled_from([*config_lib.fields(), "model", "moe", "layers", "steps", "x"]),
                                    inner, max_size=3), max_leaves=6).filter(lambda tree: isinstance(tree, dict)))
def test_no_tree_raises_anything_but_a_user_error(tree):
    try:
        assert isinstance(build(tree), Config)
    except UserError as error:
        assert "\n" not in str(error)


def test_changed_keys_are_told_apart():
    new = dataclasses.replace(Config(), seed=3, train=dataclasses.replace(Config().train, steps=7))
    assert changed(Config(), new) == (["seed"], ["train.steps"])


def test_the_page_of_keys_is_up_to_date():
    page = pathlib.Path(__file__).parent.parent / "docs" / "config.md"
    assert config_lib.table() in page.read_text(), "run: python -m moejax.config, and paste the table into docs/config.md"
    options = config_lib.table(Architecture, "config.model.architecture.")
    assert options in page.read_text(), "run: python -m moejax.architecture, and paste the table into docs/config.md"
    assert config_lib.table(Task, "config.data.task.") in page.read_text(), (
        "run: python -m moejax.task, and paste the table into docs/config.md")
    assert config_lib.table(Mixture, "config.data.task.") in page.read_text(), (
        "run: python -m moejax.mixture, and paste the table into docs/config.md")
    assert config_lib.table(Finetune, "config.train.finetune.") in page.read_text(), (
        "run: python -m moejax.finetune, and paste the table into docs/config.md")


def test_a_config_of_an_earlier_version_is_read_and_its_open_options_are_the_defaults():
    """Two keys of train are options of the task now, and there were no options of fine-tuning."""
    old = config_lib.to_dict(transformer.resolve(Config()))
    del old["train"]["finetune"], old["data"]["task"]["label_smoothing"], old["data"]["task"]["head_z_weight"]
    old["train"] |= {"label_smoothing": 0.1, "head_z_weight": 0.0}
    read = build(old)
    assert transformer.resolve(read).data.task.label_smoothing == 0.1
    same = build({"data": {"task": {"label_smoothing": 0.1}}})
    assert changed(read, transformer.resolve(same)) == ([], [])
    other = build({"data": {"task": {"label_smoothing": 0.1}}, "train": {"finetune": {"lora_rank": 4}}})
    assert changed(read, transformer.resolve(other)) == (["train.finetune.lora_rank"], [])


@pytest.mark.parametrize("tree, words", (
    ({"model": {"layers": 10**30}}, "config.model.layers=10+ must be at most 10000"),
    ({"model": {"embed": 2**32}}, "config.model.embed=4294967296 must be at most 4294967295"),
    ({"moe": {"num_experts": 2**21}}, "config.moe.num_experts=2097152 must be at most"),
    ({"optimizer": {"eps": 10**400}}, "config.optimizer.eps=inf must be finite"),
    ({"optimizer": {"eps": -10**400}}, "config.optimizer.eps=inf must be finite"),
    ({"train": 3}, "config.train is a group of keys, not 3"), ({"train": None}, "config.train is a group"),
    ({"train": {"sample_tokens": 3}, "data": 4}, "config.data is a group of keys, not 4|unknown config key"),
    ({"train": {"sample_tokens": 3}, "data": {"task": 4}}, "config.data.task=4 must be None or a dict"),
    ({3: 4}, "unknown config key config.3"), ({"model": {None: 4}}, "unknown config key config.model.None"),
    ({"x" * 10**6: 4}, "unknown config key"),
))
def test_values_of_any_size_and_names_of_any_type_are_refused(tree, words):
    with pytest.raises(UserError, match=words):
        build(tree)


@pytest.mark.parametrize("task", ({1: 2}, {"tasks": {1: {}, "a": {}}}, {"tasks": {None: {}, 2: {}}}, {"tasks": [1]}))
def test_names_of_options_and_tasks_are_names(task):
    with pytest.raises(UserError):
        transformer.resolve(build({"data": {"task": task}}))
