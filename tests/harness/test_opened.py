"""Which models the harness may ask, and as what task they answer; all without the harness."""

import dataclasses

import numpy as np
import pytest

import moejax
from moejax.config import UserError
from moejax.harness import opened
from moejax.harness.opened import open_decoder

TASKS = {name: {"source": "x", "objective": "next_token"} for name in ("left", "right")}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, make_run):
    return make_run(tmp_path_factory.mktemp("opened") / "mixed", {"tasks": TASKS}, router_tasks=2)


def test_a_task_of_a_mixture_is_that_task(mixed):
    """Its routers know of tasks, so the model as it is scores nothing."""
    model, variables, config = open_decoder(mixed, task="right")
    again, knowing = moejax.for_task(*moejax.load(mixed), 1)
    ids = [[256, *b"one"]]
    scores_LV = moejax.logits(model, variables, ids)[0]
    np.testing.assert_array_equal(scores_LV, moejax.logits(again, knowing, ids)[0])
    assert not np.allclose(scores_LV, moejax.logits(*moejax.for_task(*moejax.load(mixed), 0), ids)[0], atol=1e-3)
    assert config.data.task.objective == "next_token" and config.data.source == "x"


@pytest.mark.parametrize("task, message", [
    (None, r"several tasks; name one with --model_args=\.\.\.,task \(left, right\)"),
    ("rigth", "--model_args=...,task=rigth is none of left, right .did you mean right")])
def test_a_task_must_be_one_of_them(mixed, task, message):
    with pytest.raises(UserError, match=message):
        open_decoder(mixed, task=task)


def test_an_encoder_is_refused(mixed, monkeypatch):
    model, variables = moejax.load(mixed)
    monkeypatch.setattr(opened, "load", lambda *_: (
        model.clone(model=dataclasses.replace(model.model, kind="encoder")), variables))
    with pytest.raises(UserError, match="decoders"):
        open_decoder(mixed)


def test_a_model_that_tells_what_was_cut_out_is_refused(tmp_path, make_run):
    run = make_run(tmp_path / "spans", {"objective": "span_corruption"}, vocab_size=300)
    with pytest.raises(UserError, match="span_corruption tells what was cut out of a text.*take a model of next_token"):
        open_decoder(run)
