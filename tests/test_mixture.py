"""Options of mixtures: typed once, refused clearly, and rates as they are defined."""

import json

import numpy as np
import pytest

from moejax import mixture
from moejax.checkpoint.workdir import changed
from moejax.config import UserError, build, default, to_dict
from moejax.models import transformer

PAIRS = {"source": "b.jsonl", "objective": "seq2seq", "input": "{a}", "target": "{b}"}
TEXT = {"source": "a.txt", "objective": "next_token"}


def config(tasks=None, kind="decoder", head="tokens", **options):
    tree = default()
    tree.model.kind, tree.model.head = kind, head
    tree.data.task = {"tasks": {"text": TEXT, "pairs": PAIRS} if tasks is None else tasks, **options}
    return transformer.resolve(build(tree))


def task(rates, temperature=1.0, weights=(None, None, None)):
    tasks = {name: TEXT | {"rate": rate} for name, rate in zip("abc", weights)}
    return config(tasks, rates=rates, temperature=temperature).data.task


def test_rates():
    rows = (30, 10, 60)
    assert mixture.rates(task("proportional"), rows) == pytest.approx((0.3, 0.1, 0.6))
    assert mixture.rates(task("temperature"), rows) == pytest.approx((0.3, 0.1, 0.6))
    roots = np.sqrt(rows)
    assert mixture.rates(task("temperature", 2.0), rows) == pytest.approx(roots / roots.sum())
    assert mixture.rates(task("temperature", 1e9), rows) == pytest.approx([1 / 3] * 3, rel=1e-6)
    assert mixture.rates(task("fixed", weights=(2.0, 1.0, 5.0)), rows) == pytest.approx((0.25, 0.125, 0.625))
    assert mixture.rates(config({name: TEXT | {"samplings": n} for name, n in zip("abc", (1, 2, 3))}).data.task, rows
                         ) == pytest.approx(np.array((6, 1, 4)) / 11)


def test_a_stored_config_is_the_same_again_whatever_the_order_of_its_tasks():
    one = config()
    assert one.data.task.names == ("pairs", "text")
    again = transformer.resolve(build(json.loads(json.dumps(to_dict(one)))))
    assert again == one == config({"pairs": PAIRS, "text": TEXT})
    assert changed(one, again) == ([], [])


def test_another_task_or_one_less_or_another_option_is_another_run():
    one = config()
    more = config({"text": TEXT, "pairs": PAIRS, "more": PAIRS})
    assert "data.task.tasks.more.source" in changed(one, more)[0] and "data.task.tasks.more.source" in changed(more, one)[0]
    assert changed(one, config({"text": TEXT, "pairs": PAIRS | {"input": "{c}"}}))[0] == ["data.task.tasks.pairs.input"]
    assert "data.task.rates" in changed(one, config(rates="temperature"))[0]


def test_parts_are_the_tasks_alone():
    whole = config({"text": TEXT | {"text_key": "body"}, "pairs": PAIRS | {"eval_source": "c.jsonl"}})
    parts = mixture.parts(whole)
    tree = default()
    tree.data.update(dict(source="b.jsonl", eval_source="c.jsonl"))
    tree.data.task = {name: PAIRS[name] for name in ("objective", "input", "target")}
    assert parts["pairs"] == transformer.resolve(build(tree))
    assert parts["text"].data.text_key == "body" and parts["pairs"].data.text_key == whole.data.text_key
    assert mixture.parts(parts["text"]) == {"": parts["text"]}


@pytest.mark.parametrize("change, message", [
    ({"tasks": {}}, "must be a dict of tasks"),
    ({"tasks": None, "rates": "equal"}, "rates='equal' must be one of proportional, temperature, fixed"),
    ({"tasks": {"a": {**TEXT, "sorce": "x"}}}, r"unknown config key config.data.task.tasks.a.sorce \(did you mean source"),
    ({"tasks": {"a": TEXT}, "temprature": 2.0, "rates": "temperature"}, r"temprature \(did you mean temperature"),
    ({"tasks": {"a": {"objective": "next_token"}}}, "tasks.a.source: name the task's text"),
    ({"tasks": {"a/b": TEXT}}, "letters, digits, _ and -"),
    ({"tasks": {"a": TEXT}, "temperature": 2.0}, "temperature has no effect with"),
    ({"tasks": {"a": TEXT | {"rate": 1.0}, "b": TEXT}, "rates": "fixed"}, "tasks.b.rate=None: .* every task needs one"),
    ({"tasks": {"a": TEXT | {"rate": 1.0}}}, "tasks.a.rate=1.0: .* no effect"),
    ({"tasks": {"a": TEXT | {"rate": 0}}, "rates": "fixed"}, "never draws it"),
    ({"tasks": {"a": TEXT | {"label_smoothing": 0.1}, "b": TEXT}}, "one loss is for all"),
    ({"tasks": {"a": PAIRS | {"input": "no field"}}}, "tasks.a.input='no field' is not a template"),
    ({"tasks": {"a": PAIRS | {"objective": "classification"}}}, "for labels take seq2seq"),
    ({"tasks": {"a": TEXT | {"objective": "masked_lm"}}}, "needs config.model.kind=encoder, not decoder"),
    ({"tasks": {"a": TEXT | {"objective": "ul2"}, "b": TEXT | {"objective": "span_corruption"}}}, "leave one out"),
    ({"tasks": {"a": TEXT}, "kind": "encoder_decoder"}, "needs config.model.kind=decoder, not encoder_decoder"),
    ({"tasks": {"a": TEXT}, "head": "classes"}, "share config.model.head=tokens")])
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        config(**{"tasks": None} | change)


def test_options_of_mixtures_are_refused_without_one():
    tree = default()
    tree.data.task = {"source": "x"}
    with pytest.raises(UserError, match="is for tasks of a mixture"):
        transformer.resolve(build(tree))
    with pytest.raises(UserError, match=r"--task=txt is none of pairs, text \(did you mean text\?\)"):
        mixture.part(config(), "txt")
    with pytest.raises(UserError, match=r"name one with --task \(pairs, text\)"):
        mixture.part(config(), None)


@pytest.mark.parametrize("kind, objectives", [
    ("decoder", ("next_token", "seq2seq", "prefix_lm", "span_corruption")), ("encoder", ("masked_lm", "masked_lm")),
    ("encoder_decoder", ("seq2seq", "span_corruption", "prefix_lm"))])
def test_what_can_share_a_head_is_taken(kind, objectives):
    tasks = {f"{n}_{name}": {"source": "x", "objective": name} for n, name in enumerate(objectives)}
    assert tuple(task.objective for task in config(tasks, kind).data.task.tasks.values()) == objectives
