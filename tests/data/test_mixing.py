"""Draws of tasks: rates kept, every row in its turn, and exactly resumable."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from moejax.config import UserError, build, default
from moejax.data.loader import eval_batches, train_loader
from moejax.data.mixing import MixtureLoader, Position, draw, open_loader, rows_of_tasks
from moejax.data.prepare import prepare
from moejax.data.prepared import load_prepared
from moejax.data.rows import Rows, make_rows
from moejax.mixture import parts
from moejax.models import transformer

BATCH = 7
COUNTS = {"a": 5, "b": 11, "c": 30}
SHARES = strategies.lists(strategies.integers(1, 1000), min_size=1, max_size=6)


def settings(**options):
    tree = default()
    tree.data.update(dict(batch_size=BATCH, tokenizer="bytes", length=12, eval_fraction=0.3))
    tree.model.update(dict(vocab_size=300, max_length=40))
    tree.data.task = {"tasks": {name: {"source": name} for name in COUNTS}} | options
    return transformer.resolve(build(tree))


def counted(counts=COUNTS):
    """Rows that tell their task and number, and draw."""
    return {name: Rows(count, lambda index, rng, task=task: {"task": np.int32(task), "number": np.int32(index),
                                                             "drawn": rng.integers(0, 1 << 30, 2)})
            for task, (name, count) in enumerate(counts.items())}


def take(loader, n):
    return [next(loader) for _ in range(n)]


def same(one, other):
    return len(one) == len(other) and all(a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
                                          for a, b in zip(one, other))


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(SHARES, strategies.integers(1, 9), strategies.integers(0, 30))
def test_no_task_is_ever_a_row_beyond_its_share(weights, size, batches):
    shares, position = np.array(weights) / sum(weights), Position(0, (0,) * len(weights))
    for _ in range(batches):
        drawn = draw(shares, position, size, seed=3)
        for task in range(len(shares)):
            turns = drawn.turn_B[drawn.task_B == task]
            np.testing.assert_array_equal(turns, position.taken[task] + np.arange(len(turns)))
            assert drawn.after.taken[task] == position.taken[task] + len(turns)
        position = drawn.after
    beyond = np.array(position.taken) - shares * batches * size
    assert position.batches == batches and sum(position.taken) == batches * size
    assert (beyond < 1 + 1e-9).all() and (beyond > -max(len(shares) - 1, 1) - 1e-9).all()


def test_places_within_a_batch_are_shuffled_anew_each_time():
    orders, position = [], Position(0, (0, 0))
    for _ in range(12):
        drawn = draw((0.5, 0.5), position, 8, seed=3)
        assert drawn.task_B.sum() == 4
        np.testing.assert_array_equal(drawn.task_B, draw((0.5, 0.5), position, 8, seed=3).task_B)
        orders.append(tuple(drawn.task_B.tolist()))
        position = drawn.after
    assert len(set(orders)) > 8 and not np.array_equal(draw((0.5, 0.5), position, 8, 4).task_B,
                                                       draw((0.5, 0.5), position, 8, 3).task_B)


def test_every_row_of_each_task_comes_once_an_epoch_of_its_own():
    batches = take(MixtureLoader(counted(), settings(rates="temperature", temperature=1e9)), 20)
    tasks, numbers = (np.concatenate([batch[key] for batch in batches]) for key in ("task", "number"))
    for task, count in enumerate(COUNTS.values()):
        own = numbers[tasks == task]
        for start in range(0, len(own) - count + 1, count):
            assert sorted(own[start:start + count].tolist()) == list(range(count))
    assert np.ptp(np.bincount(tasks)) <= 1  # uniform


def test_tasks_with_as_many_rows_have_orders_of_their_own():
    batches = take(MixtureLoader(counted(dict.fromkeys("abc", 20)), settings()), 8)
    tasks, numbers = (np.concatenate([batch[key] for batch in batches]) for key in ("task", "number"))
    orders = {tuple(numbers[tasks == task][:15].tolist()) for task in range(3)}
    assert len(orders) == 3


@hypothesis.settings(max_examples=6, deadline=None)
@hypothesis.given(strategies.integers(0, 6), strategies.sets(strategies.integers(0, BATCH - 1), min_size=1),
                  strategies.sets(strategies.integers(0, BATCH - 1), min_size=1))
def test_a_restored_loader_goes_on_bitwise_whatever_rows_it_makes(done, before, after):
    before, after = np.array(sorted(before)), np.array(sorted(after))
    whole = take(MixtureLoader(counted(), settings()), 7)
    first, restored = (MixtureLoader(counted(), settings(), own) for own in (before, after))
    take(first, done)
    restored.set_state(json.loads(json.dumps(first.get_state())))
    assert same(take(restored, 7 - done), [{k: a[after] for k, a in batch.items()} for batch in whole[done:]])
    assert first.get_state()["batches"] == done
    assert sum(first.get_state()["taken"].values()) == done * BATCH  # where each task is


def test_a_position_of_other_tasks_is_refused():
    loader = MixtureLoader(counted(), settings())
    for state in ({"next_index": 4}, {"batches": 1, "taken": {"a": 7, "z": 0, "c": 0}}):
        with pytest.raises(UserError, match="not on the tasks a, b, c"):
            loader.set_state(state)


def test_a_mixture_of_one_task_is_that_task():
    rows, cfg = counted({"b": 11}), settings(tasks={"b": {"source": "b"}})
    assert same(take(MixtureLoader(rows, cfg), 9), take(train_loader(rows["b"], cfg), 9))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({"text": f"number {n}", "square": str(n * n)})
                                                  for n in range(40)))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"body": f"text number {n} is not long"}) for n in range(70)))
    return folder


def of_records(folder, **changes):
    pairs = {"source": f"{folder}/pairs.jsonl", "objective": "seq2seq", "target": "{square}"}
    text = {"source": f"{folder}/text.jsonl", "objective": "next_token", "text_key": "body"}
    return settings(tasks={"squares": pairs | changes, "words": text})


def test_each_task_is_prepared_as_if_it_were_alone(records, tmp_path):
    cfg = of_records(records)
    prepared = prepare(cfg, tmp_path / "data", say=lambda line: None)
    said = []
    prepare(cfg, tmp_path / "data", say=said.append)
    assert said == [f"data: {tmp_path / 'data'} is up to date"]
    tree = default()
    tree.data.update(dict(batch_size=BATCH, tokenizer="bytes", length=12, eval_fraction=0.3, text_key="body",
                          source=f"{records}/text.jsonl"))
    tree.model.update(dict(vocab_size=300, max_length=40))
    alone = prepare(transformer.resolve(build(tree)), tmp_path / "alone", say=lambda line: None)
    words = load_prepared(tmp_path / "data").tasks["words"]
    assert words.content == alone.content and set(prepared.tasks) == {"squares", "words"}
    np.testing.assert_array_equal(words.train.tokens, alone.train.tokens)
    other = of_records(records, input="{text}!")
    assert prepare(other, tmp_path / "data", say=lambda line: None).content != prepared.content


def test_rows_of_all_tasks_have_the_same_arrays_and_their_own_content(records, tmp_path):
    cfg = of_records(records)
    prepared = prepare(cfg, tmp_path / "data", say=lambda line: None)
    rows = rows_of_tasks(prepared, cfg, "eval")
    for task, name in enumerate(rows):
        batches = list(eval_batches(rows[name], cfg))
        own = make_rows(prepared.tasks[name].eval, prepared.tokenizer, parts(cfg)[name])
        assert {tuple(sorted(batch)) for batch in batches} == {
            ("mask", "positions", "prefix", "segments", "targets", "task", "tokens")}
        assert all((batch["task"] == task).all() for batch in batches)
        for index in range(own.count):
            for key, array in own.make(index, np.random.default_rng((cfg.seed, 1, index))).items():
                np.testing.assert_array_equal(batches[index // BATCH][key][index % BATCH], array)
    assert not any(batch["prefix"].any() for batch in eval_batches(rows["words"], cfg))


def test_what_is_wrong_with_the_records_of_a_task_names_the_task(records, tmp_path):
    with pytest.raises(UserError, match="task squares: .*pairs.jsonl.*no field 'sqare'"):
        prepare(of_records(records, target="{sqare}"), tmp_path / "data", say=lambda line: None)
    assert not (tmp_path / "data").exists()


def test_the_tokenizer_is_trained_on_the_texts_of_all_tasks(tmp_path):
    for name, letters in (("a", "xyxyxy zzxy"), ("b", "qrqrqr ssqr")):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{letters} {n}" * 9}) for n in range(40)))
    tree = default()
    tree.data.update(dict(batch_size=BATCH, tokenizer="sentencepiece", length=12, eval_fraction=0.3))
    tree.model.update(dict(vocab_size=300, max_length=40))
    tree.data.task = {"tasks": {name: {"source": f"{tmp_path}/{name}.jsonl"} for name in "ab"}}
    cfg = transformer.resolve(build(tree))
    prepared = prepare(cfg, tmp_path / "data", say=lambda line: None)
    pieces = {prepared.tokenizer.processor.id_to_piece(n) for n in range(prepared.tokenizer.vocab_size)}
    assert {"xy", "qr"} <= pieces
    loader = open_loader(prepared, cfg)
    assert next(loader)["tokens"].shape == (BATCH, 12)


AUGMENTED = {"input_mask_rate": 0.3, "samplings": 2, "sampling_alpha": 0.4}


def of_augmented(folder, alone, **changes):
    """Pairs with all that is drawn in training, alone or beside text; and the same without."""
    tree = default()
    tree.data.update(dict(batch_size=BATCH, tokenizer="sentencepiece", length=24, eval_fraction=0.3))
    tree.model.update(dict(vocab_size=290, max_length=40))
    pairs = {"objective": "seq2seq", "input": "{text} and {square}", "target": "{square}", **changes}
    source = f"{folder}/pairs.jsonl"
    tree.data.task = pairs if alone else {"tasks": {
        "squares": pairs | {"source": source}, "words": {"source": f"{folder}/text.jsonl", "text_key": "body"}}}
    tree.data.source = source
    return transformer.resolve(build(tree))


@pytest.mark.parametrize("alone", (True, False))
def test_what_is_drawn_in_training_is_drawn_again_after_a_stop_and_never_in_evaluation(records, tmp_path, alone):
    cfg, plain = of_augmented(records, alone, **AUGMENTED), of_augmented(records, alone)
    prepared = prepare(cfg, tmp_path / "data", say=lambda line: None)
    whole = take(open_loader(prepared, cfg), 9)
    own = np.array([0, 2, 5])
    first = open_loader(prepared, cfg)
    take(first, 4)
    restored = open_loader(load_prepared(tmp_path / "data"), cfg, own)
    restored.set_state(json.loads(json.dumps(first.get_state())))
    assert same(take(restored, 5), [{key: array[own] for key, array in batch.items()} for batch in whole[4:]])
    unknown = prepared.tokenizer.named(["<unk>"])[0]
    assert sum((batch["tokens"] == unknown).sum() for batch in whole) > 20
    without = prepare(plain, tmp_path / "plain", say=lambda line: None)
    for name, rows in rows_of_tasks(prepared, cfg, "eval").items():
        assert same(list(eval_batches(rows, cfg)), list(eval_batches(rows_of_tasks(without, plain, "eval")[name], plain)))


def test_samples_of_one_example_count_as_one_in_the_rates(records, tmp_path):
    loaders = []
    for n, options in enumerate(({}, {"samplings": 3})):
        cfg = of_augmented(records, alone=False, **options)
        prepared = prepare(cfg, tmp_path / str(n), say=lambda line: None)
        loaders.append(open_loader(prepared, cfg))
        assert len(rows_of_tasks(prepared, cfg, "train")) == 2
    assert loaders[0].rates == pytest.approx(loaders[1].rates)


def test_a_token_that_hides_input_may_mean_nothing_else_in_another_task(records, tmp_path):
    spans = {"source": f"{records}/text.jsonl", "objective": "span_corruption", "text_key": "body"}
    pairs = {"source": f"{records}/pairs.jsonl", "objective": "seq2seq", "target": "{square}", "input_mask_rate": 0.1}
    with pytest.raises(UserError, match="task squares: config.data.task.input_mask_rate has no token of its own"):
        prepare(settings(tasks={"squares": pairs, "spans": spans}), tmp_path / "data", say=lambda line: None)
    assert not (tmp_path / "data").exists()
