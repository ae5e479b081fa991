"""The split, the streams on disk and their reuse, held to laws; the baselines, to their definitions."""

import collections
import dataclasses
import json
import lzma
import math

import numpy as np
import pytest
import tokenizers

from moejax.config import UserError, build
from moejax.data import baselines
from moejax.data import prepare as module
from moejax.data.prepare import prepare
from moejax.data.prepared import load_prepared
from moejax.task import ADDED, resolve

TEXTS = [f"document {n}: " + "word " * (n % 7) + "é" * (n % 3) for n in range(90)]
TEXTS += TEXTS[:30]  # copies


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "corpus.jsonl", TEXTS)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def config(source, seed=3, vocab_size=300, **data):
    data = {"source": source, "tokenizer": "bytes", "eval_fraction": 0.3, **data}
    return build({"seed": seed, "model": {"vocab_size": vocab_size}, "data": data})


def quiet(line):
    assert line and "\n" not in line


def read(stream, tokenizer):
    """The documents of a stream in its order, by its own starts."""
    assert (stream.tokens[stream.starts] == tokenizer.separator_id).all()
    assert np.count_nonzero(stream.tokens == tokenizer.separator_id) == stream.documents == len(stream.starts)
    parts = np.split(stream.tokens, stream.starts[1:])
    return [tokenizer.decode(part) for part in parts]


def test_every_document_is_in_one_split_and_copies_stay_together(corpus, tmp_path):
    prepared = prepare(config(corpus), tmp_path / "out", quiet)
    train, held_out = (read(stream, prepared.tokenizer) for stream in (prepared.train, prepared.eval))
    assert collections.Counter(train + held_out) == collections.Counter(TEXTS)
    assert not set(train) & set(held_out)
    assert 0.15 < len(set(held_out)) / 90 < 0.45
    assert held_out == [text for text in TEXTS if text in set(held_out)], "held-out documents keep their order"
    for texts, stream in ((train, prepared.train), (held_out, prepared.eval)):
        assert stream.bytes == sum(len(text.encode()) for text in texts)
        assert stream.tokens.dtype == np.uint16 and len(stream.tokens) == stream.bytes + stream.documents
    assert (tmp_path / "out" / "eval.utf8").read_text() == "".join(held_out)


@pytest.mark.parametrize("on_bad_record", ("error", "skip"))
def test_blank_documents_are_counted(tmp_path, on_bad_record):
    said, path = [], write(tmp_path / "a.jsonl", [*TEXTS, "", *TEXTS, " \n"])
    prepare(config(path, on_bad_record=on_bad_record), tmp_path / "out", said.append)
    assert f"data: 2 records left out; the first: {path}, line {len(TEXTS) + 1}: the text is empty" in said


def test_training_documents_are_shuffled_by_the_seed_alone(corpus, tmp_path):
    def order(name, **changes):
        prepared = prepare(config(corpus, **changes), tmp_path / name, quiet)
        return read(prepared.train, prepared.tokenizer), prepared.content

    first, content = order("a")
    assert order("b") == (first, content)
    other, other_content = order("c", seed=4)
    plain, _ = order("d", shuffle=False)
    assert other != first and sorted(other) == sorted(first) and other_content == content
    assert plain == [text for text in TEXTS if text in set(first)] != first


def test_eval_source_is_held_out_and_taken_from_training(corpus, tmp_path):
    held_out = [*TEXTS[5:9], "only here"]
    prepared = prepare(config(corpus, eval_source=write(tmp_path / "eval.jsonl", held_out)), tmp_path / "out", quiet)
    assert read(prepared.eval, prepared.tokenizer) == held_out
    assert sorted(read(prepared.train, prepared.tokenizer)) == sorted(text for text in TEXTS if text not in held_out)


def test_a_second_call_reuses_the_files_and_a_changed_key_does_not(corpus, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    first = prepare(config(corpus, length=64), folder, quiet)
    assert baselines.unigram_bits_per_byte(first) > 0
    calls = []
    monkeypatch.setattr(module, "_split", lambda *args, split=module._split: calls.append(1) or split(*args))
    again = prepare(config(corpus, length=32, batch_size=2, boundaries=False), folder, quiet)
    assert not calls and again.content == first.content and (folder / "baselines.json").exists()
    np.testing.assert_array_equal(again.train.tokens, first.train.tokens)
    for change in ({"seed": 5}, {"vocab_size": 301}, {"shuffle": False}, {"eval_fraction": 0.4}):
        calls.clear()
        prepare(config(corpus, **change), folder, quiet)
        assert calls and not (folder / "baselines.json").exists(), change
    write(tmp_path / "corpus.jsonl", [*TEXTS, "a new document"])
    assert prepare(config(corpus), folder, quiet).content != first.content


def test_a_killed_run_leaves_what_was_there(corpus, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    before = prepare(config(corpus), folder, quiet)
    with monkeypatch.context() as patch:
        real, left = module.os.replace, [3]

        def dies(source, target):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            real(source, target)

        patch.setattr(module.os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(corpus, seed=4), folder, quiet)
    still = load_prepared(folder)
    assert still.content == before.content
    np.testing.assert_array_equal(still.train.tokens, before.train.tokens)
    (tmp_path / "out.part").mkdir()  # as a SIGKILL leaves it
    after = prepare(config(corpus, seed=4), folder, quiet)
    assert not np.array_equal(after.train.tokens, before.train.tokens)
    assert not (tmp_path / "out.part").exists()
    assert not [path.name for path in folder.iterdir() if path.suffix in (".part", ".raw")]


def test_loaded_alone_it_is_the_same(corpus, tmp_path):
    made = prepare(config(corpus, tokenizer="sentencepiece"), tmp_path / "out", quiet)
    loaded = load_prepared(tmp_path / "out")
    assert loaded.tokenizer.encode_batch(TEXTS) == made.tokenizer.encode_batch(TEXTS)
    for split in ("train", "eval"):
        np.testing.assert_array_equal(getattr(loaded, split).tokens, getattr(made, split).tokens)
    assert read(loaded.eval, loaded.tokenizer) == read(made.eval, made.tokenizer)


def test_many_small_batches_give_the_same_files(corpus, tmp_path, monkeypatch):
    whole = prepare(config(corpus), tmp_path / "a", quiet)
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(module, "BATCH_LETTERS", 100)
    monkeypatch.setattr(module, "SAY_SECONDS", 0)
    parts = prepare(config(corpus), tmp_path / "b", quiet)
    np.testing.assert_array_equal(parts.train.tokens, whole.train.tokens)
    assert parts.content == whole.content


@pytest.mark.parametrize("largest, dtype", [(65535, np.uint16), (65536, np.uint32)])
def test_token_type_holds_the_largest_id(corpus, tmp_path, largest, dtype):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "?": 1, "word": largest}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "words.json"))
    cfg = config(corpus, vocab_size=1 << 17, tokenizer=str(tmp_path / "words.json"))
    prepared = prepare(cfg, tmp_path / "out", quiet)
    assert prepared.train.tokens.dtype == dtype and prepared.train.tokens.max() == largest


def test_errors(corpus, tmp_path):
    with pytest.raises(UserError, match="no prepared data"):
        load_prepared(tmp_path / "none")
    with pytest.raises(UserError, match=r"raise config\.data\.eval_fraction=0\.0"):
        prepare(config(corpus, eval_fraction=0.0), tmp_path / "out", quiet)
    with pytest.raises(UserError, match="no document is left for training"):
        prepare(config(corpus, eval_source=corpus), tmp_path / "out", quiet)
    prepare(config(corpus), tmp_path / "out", quiet)
    for name in ("train.npy", "eval_starts.npy"):
        content = (tmp_path / "out" / name).read_bytes()
        for broken in (content[:-8], b""):
            (tmp_path / "out" / name).write_bytes(broken)
            with pytest.raises(UserError, match="damaged"):
                load_prepared(tmp_path / "out")
        (tmp_path / "out" / name).write_bytes(content)
    load_prepared(tmp_path / "out")


def test_baselines_are_what_they_say(corpus, tmp_path):
    prepared = prepare(config(corpus), tmp_path / "out", quiet)
    text = "".join(read(prepared.eval, prepared.tokenizer)).encode()
    xz = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert baselines.xz_bits_per_byte(prepared) == xz
    seen = collections.Counter(prepared.train.tokens.tolist())
    total = len(prepared.train.tokens) + prepared.tokenizer.vocab_size
    bits = -sum(math.log2((seen[token] + 1) / total) for token in prepared.eval.tokens.tolist()[1:])
    assert math.isclose(baselines.unigram_bits_per_byte(prepared), bits / len(text), rel_tol=1e-12)
    known = json.loads((tmp_path / "out" / "baselines.json").read_text())
    assert known == {"xz_bits_per_byte": xz, "unigram_bits_per_byte": baselines.unigram_bits_per_byte(prepared)}
    (tmp_path / "out" / "baselines.json").write_text("{")
    assert baselines.xz_bits_per_byte(prepared) == xz


PAIRED = [{"text": f"number {n % 50}", "target": f"word {n % 25}", "label": "ab"[n % 2]} for n in range(100)]
OBJECTIVES = {"next_token": {}, "seq2seq": {}, "classification": {"head": "classes", "classes": 2}}


def records(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared_for(objective, source, folder, say=quiet, seed=3, vocab_size=300, data=(), **task):
    return prepare(build({"seed": seed, "model": {"vocab_size": vocab_size, **OBJECTIVES[objective]}, "data": {
        "source": source, "tokenizer": "bytes", "eval_fraction": 0.3, "task": {"objective": objective, **task},
        **dict(data)}}), folder, say)


def examples(prepared, split):
    """Every example of a split, in its order, as texts."""
    stream, decode = getattr(prepared, split), prepared.tokenizer.decode
    return [(decode(stream.document(i)), decode(stream.target.document(i)) if stream.target else None,
             None if stream.labels is None else int(stream.labels[i])) for i in range(stream.documents)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_example_comes_once_in_training_if_that_is_wanted(tmp_path, objective):
    rows = [*PAIRED, {"text": "number 7", "target": "other", "label": "a"}]
    source, said = records(tmp_path / "a.jsonl", rows), []
    plain = prepared_for(objective, source, tmp_path / "plain")
    once = prepared_for(objective, source, tmp_path / "once", said.append, deduplicate=True)
    assert examples(once, "eval") == examples(plain, "eval")
    counts = collections.Counter(examples(plain, "train"))
    assert max(counts.values()) > 1 and collections.Counter(examples(once, "train")) == dict.fromkeys(counts, 1)
    same_input = [example for example in counts if example[0] == "number 7"]
    assert len(same_input) == (1 if objective == "next_token" else 2)  # another target or label is another example
    assert f"data: {counts.total() - len(counts)} training examples left out, as they were there before" in said


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_inputs_that_are_held_out_are_not_in_training_and_are_counted(tmp_path, objective):
    held_out = records(tmp_path / "b.jsonl", [*PAIRED[:5], {"text": "number\t9", "target": "new", "label": "b"}])
    said = []
    prepared = prepared_for(objective, records(tmp_path / "a.jsonl", PAIRED), tmp_path / "data", said.append,
                            data={"eval_source": held_out}, collapse_space=True)
    assert {text for text, *_ in examples(prepared, "train")} == {f"number {n}" for n in range(50) if n > 4 and n != 9}
    assert "data: 12 training examples left out, as their input is held out" in said


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_example_is_stored_as_often_as_it_is_sampled(tmp_path, objective):
    source, more = records(tmp_path / "a.jsonl", PAIRED), {"data": {"tokenizer": "sentencepiece", "shuffle": False}}
    plain = prepared_for(objective, source, tmp_path / "plain", vocab_size=290, **more)
    many = prepared_for(objective, source, tmp_path / "many", vocab_size=290, samplings=3, sampling_alpha=0.5, **more)
    assert examples(many, "train") == examples(plain, "train") * 3, "each comes again after all have come"
    assert many.train.bytes == 3 * plain.train.bytes and (many.samplings, plain.samplings) == (3, 1)
    np.testing.assert_array_equal(many.eval.tokens, plain.eval.tokens)
    count, differ = plain.train.documents, 0
    for i in range(count):
        ways = {tuple(many.train.document(n).tolist()) for n in (i, i + count, i + 2 * count)}
        assert all(many.tokenizer.decode(way) == many.tokenizer.decode(plain.train.document(i)) for way in ways)
        assert all((many.tokenizer.separator_id in way) and way.count(many.tokenizer.separator_id) == 1 for way in ways)
        differ += len(ways) > 1
    assert differ > count // 2 and many.content != plain.content


def test_samples_depend_on_the_texts_alone(corpus, tmp_path, monkeypatch):
    def made(name, **more):
        return prepared_for("next_token", corpus, tmp_path / name, vocab_size=290, samplings=2,
                            data={"tokenizer": "sentencepiece", "shuffle": False}, **more)

    first = made("a")
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 7)
    other = made("b", seed=4)
    np.testing.assert_array_equal(first.train.tokens, other.train.tokens)
    assert first.content == other.content
    further = made("c", sampling_alpha=0.9)
    assert len(further.train.tokens) > len(first.train.tokens)  # fewer merges


def test_a_tokenizer_that_cannot_sample_is_named(corpus, tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "[SEP]": 1, "a": 2}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "pieces.json"))
    for tokenizer in ("bytes", str(tmp_path / "pieces.json")):
        with pytest.raises(UserError, match="samplings=2: config.data.tokenizer=.* cuts a text in one way only"):
            prepared_for("next_token", corpus, tmp_path / "out", samplings=2, data={"tokenizer": tokenizer})
        assert not (tmp_path / "out").exists()


def test_only_options_that_are_set_tell_data_from_that_of_earlier_versions(corpus, monkeypatch):
    def task(**options):
        seen = []
        monkeypatch.setattr(module, "_hash", lambda known: seen.append(known) or "")
        cfg = config(corpus)
        task = resolve({"objective": "next_token", **options}, cfg.model)
        module._fingerprint({"": dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, task=task))})
        return seen[0][1]["task"]

    assert not set(task()) & set(ADDED)
    changed = {"normalize": "nfc", "collapse_space": True, "deduplicate": True, "input_mask_rate": 0.1, "samplings": 2,
               "sampling_alpha": 0.2}
    assert set(changed) == set(ADDED)
    for name, value in changed.items():
        beside = {"samplings": 2} if name == "sampling_alpha" else {}
        assert task(**{**beside, name: value}) == {**task(**beside), name: value}
