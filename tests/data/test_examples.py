"""Records to examples; and what a bad record is told."""

import json

import numpy as np
import pytest

from moejax.config import UserError, build
from moejax.data.examples import Reader
from moejax.data.prepare import prepare
from moejax.data.sources import Record
from moejax.task import resolve


def quiet(line):
    del line


def reader(task, **data):
    config = build({"data": {"task": task, **data}})
    data = type(config.data)(**{**vars(config.data), "task": resolve(config.data.task, config.model)})
    return Reader(type(config)(**{**vars(config), "data": data}))


def write(path, lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return str(path)


def test_templates_and_labels(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"en": "a", "de": "b", "n": 3, "l": True, "m": ["x", "y", "x"]}])
    example, = reader({"objective": "seq2seq", "input": "to German: {en} ({n})", "target": "{de}"}).read(path)
    assert (example.text, example.target, example.label) == ("to German: a (3)", "b", None)
    for objective, label, wanted in (("classification", "l", "True"), ("classification", "n", "3"),
                                     ("regression", "n", 3.0), ("multi_label", "m", ("x", "y"))):
        example, = reader({"objective": objective, "input": "{en}", "label": label}).read(path)
        assert (example.text, example.label) == ("a", wanted)


@pytest.mark.parametrize("suffix, delimiter", [(".csv", ","), (".tsv", "\t")])
def test_tables(tmp_path, suffix, delimiter):
    (tmp_path / f"a{suffix}").write_bytes(f"text{delimiter}label\r\na b{delimiter}x\r\nc\r\nd{delimiter}y\r\n".encode())
    path = str(tmp_path / f"a{suffix}")
    with pytest.raises(UserError, match=r"line 3: has 1 fields, not the 2"):
        list(reader({"objective": "classification"}).read(path))
    lenient = reader({"objective": "classification"}, on_bad_record="skip")
    assert [(e.text, e.label) for e in lenient.read(path)] == [("a b", "x"), ("d", "y")]
    assert len(lenient.left_out) == 1


def test_names_of_fields_may_be_anything(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"0": "x", "review.text": "y", "a[0]": "z"}])
    example, = reader({"objective": "seq2seq", "input": "{0}-{review.text}", "target": "{a[0]}"}).read(path)
    assert (example.text, example.target) == ("x-y", "z")


def test_tables_with_an_unnamed_column_long_fields_and_quotes(tmp_path):
    long = "a" * 200_000
    (tmp_path / "a.csv").write_text(f',text,label\n0,"one\ntwo",x\n1,{long},y\n', encoding="utf-8-sig")
    found = [(e.text, e.label) for e in reader({"objective": "classification"}).read(str(tmp_path / "a.csv"))]
    assert found == [("one\ntwo", "x"), (long, "y")]


def test_rows_of_tables_that_are_not_utf8_are_left_out_alone(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,label\na,x\n\xff,y\nb,x\n")
    lenient = reader({"objective": "classification"}, on_bad_record="skip")
    assert [e.text for e in lenient.read(str(tmp_path / "a.csv"))] == ["a", "b"]
    assert "line 3: not UTF-8" in lenient.left_out[0]


def test_a_text_is_no_list_of_letters():
    task = {"objective": "seq2seq", "input": "{text}", "target": "{answers.text.0}"}
    for given, wanted in ((["red"], "red"), ([b"red"], "red"), ("red", None), (b"red", None), ("1", None)):
        record = Record("here", {"text": "a", "answers": {"text": given}})
        if wanted is not None:
            assert reader(task).example(record).target == wanted
            continue
        with pytest.raises(UserError, match=r"^here: no field 'answers.text.0', as 'answers.text' is a text, not a list; "
                           "set config.data.task.target$"):
            reader(task).example(record)


GOOD = {"text": "a", "target": "b", "label": "x"}


@pytest.mark.parametrize("bad, task, words", [
    ({"target": "b"}, {"objective": "seq2seq"}, "no field 'text'; set config.data.task.input to one of target"),
    ({"text": "a"}, {"objective": "seq2seq"}, "no field 'target'; set config.data.task.target to one of text"),
    ({"text": " ", "target": "b"}, {"objective": "seq2seq"}, "field 'text' is empty"),
    ({"text": "a", "target": ""}, {"objective": "seq2seq"}, "field 'target' is empty"),
    ({"text": ["a"], "target": "b"}, {"objective": "seq2seq"}, "field 'text' holds no string"),
    ({"text": "a"}, {"objective": "classification"}, "no field 'label'; set config.data.task.label to one of text"),
    ({"text": "a", "label": None}, {"objective": "classification"}, "holds None, which is no label"),
    ({"text": "a", "label": "z"}, {"objective": "classification", "labels": ["x", "y"]}, "label 'z' is none of"),
    ({"text": "a", "label": "z"}, {"objective": "multi_label"}, "holds 'z', which is no list of labels"),
    ({"text": "a", "label": " "}, {"objective": "classification"}, "field 'label' holds an empty label"),
    ({"text": "a", "label": ["x", ""]}, {"objective": "multi_label"}, "field 'label' holds an empty label"),
    ({"text": "a", "label": float("nan")}, {"objective": "classification"}, "holds nan, which is no label"),
    ({"text": "a", "label": ["x", None]}, {"objective": "multi_label"}, "holds None, which is no label"),
    ({"text": "a", "label": "\ud800"}, {"objective": "classification"}, "half of a surrogate pair is no text"),
    ({"text": "a", "label": "z"}, {"objective": "regression"}, "holds 'z', which is no number"),
    ({"text": "a", "label": float("nan")}, {"objective": "regression"}, "holds nan, which is no number"),
    ({"text": "a", "label": 10**400}, {"objective": "regression"}, "which is no number"),
    ({"text": "a", "label": 1e39}, {"objective": "regression"}, "which is no number"),
    (b'{"text": "\xff"}', {"objective": "seq2seq"}, "not UTF-8 at byte 10"),
    (b'{"text": ', {"objective": "seq2seq"}, "not JSON"),
    (b"[1]", {"objective": "seq2seq"}, "no field 'text'"),
])
def test_bad_records_are_named_or_left_out(tmp_path, bad, task, words):
    good = GOOD | ({"label": 1} if task["objective"] == "regression" else {"label": ["x"]} if task[
        "objective"] == "multi_label" else {})
    path = write(tmp_path / "a.jsonl", [good, bad, good])
    with pytest.raises(UserError, match="a.jsonl, line 2: .*" + words.replace("[", r"\[")):
        list(reader(task).read(path))
    lenient = reader(task, on_bad_record="skip")
    assert len(list(lenient.read(path))) == 2 and words in lenient.left_out[0]
    with pytest.raises(UserError, match="holds no example"):
        list(reader(task, on_bad_record="skip").read(write(tmp_path / "b.jsonl", [bad])))


def test_labels_in_bytes_are_utf8():
    for objective, given in (("classification", bytes), ("multi_label", lambda label: np.array([label], object))):
        example = reader({"objective": objective}).example(Record("here", {"text": "a", "label": given("\u00e9".encode())}))
        assert example.label == ("\u00e9" if objective == "classification" else ("\u00e9",))
        with pytest.raises(UserError, match="here: not UTF-8 at byte 1"):
            reader({"objective": objective}).example(Record("here", {"text": "a", "label": given(b"a\xff")}))


def test_a_table_with_an_empty_label_names_the_line(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,x\nsome text,\nb,y\n")
    with pytest.raises(UserError, match="a.csv, line 3: field 'label' holds an empty label"):
        list(reader({"objective": "classification"}).read(str(tmp_path / "a.csv")))
    lenient = reader({"objective": "classification"}, on_bad_record="skip")
    assert [e.label for e in lenient.read(str(tmp_path / "a.csv"))] == ["x", "y"] and len(lenient.left_out) == 1


def test_labels_of_a_prepared_folder(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"text {i}", "label": "odd" if i % 2 else "even"} for i in range(60)])
    tree = {"model": {"kind": "encoder", "head": "classes", "vocab_size": 300},
            "data": {"source": path, "tokenizer": "bytes", "eval_fraction": 0.3, "task": {"objective": "classification"}}}
    prepared = prepare(build(tree), tmp_path / "data", quiet)
    assert prepared.labels == ("even", "odd")
    for split in (prepared.train, prepared.eval):
        for i, label in enumerate(split.labels):
            text = prepared.tokenizer.decode(split.document(i))
            assert label == int(text.split()[1]) % 2
    tree["model"]["classes"] = 3
    with pytest.raises(UserError, match=r"there are 2 labels \(even, odd\); set config.model.classes=2, not 3"):
        prepare(build(tree), tmp_path / "other", quiet)


@pytest.mark.parametrize("objective", ("classification", "multi_label"))
def test_a_label_that_training_lacks_names_a_record_or_is_left_out(tmp_path, objective):
    several = objective == "multi_label"
    rows = [{"text": f"text {i}", "label": ["b", "a"][i % 2:] if several else "ab"[i % 2]} for i in range(8)]
    odd = {"text": "odd", "label": ["a", "c"] if several else "c"}
    data = {"source": write(tmp_path / "a.jsonl", rows[:6]), "tokenizer": "bytes", "task": {"objective": objective},
            "eval_source": write(tmp_path / "b.jsonl", [rows[6], odd, rows[7], odd])}
    tree = {"model": {"kind": "encoder", "head": "classes", "vocab_size": 300, "classes": 2}, "data": data}
    with pytest.raises(UserError, match="b.jsonl, line 2: label 'c' occurs in the eval records only"):
        prepare(build(tree), tmp_path / "data", quiet)
    data["on_bad_record"], said = "skip", []
    prepared = prepare(build(tree), tmp_path / "data", said.append)
    assert (prepared.labels, prepared.train.documents, prepared.eval.documents) == (("a", "b"), 6, 2)
    assert any("2 records left out; the first: " in line and "b.jsonl, line 2: label 'c' is none of a, b" in line
               for line in said)
    data["source"] = write(tmp_path / "a.jsonl", [*rows[:6], odd | {"text": "more"}])
    with pytest.raises(UserError, match=r"3 labels \(a, b, c\).*, not 2 \(the rarest, 'c', is first in .*b.jsonl, line 2"):
        prepare(build(tree), tmp_path / "other", quiet)


def test_a_tokenizer_with_a_mask_of_its_own_needs_no_more_room(tmp_path):
    import tokenizers
    words = {"[SEP]": 0, "[MASK]": 1, "text": 2, "?": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "words.json"))
    path = write(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(60)])
    tree = {"model": {"kind": "encoder", "vocab_size": 4}, "data": {
        "source": path, "tokenizer": str(tmp_path / "words.json"), "eval_fraction": 0.3}}
    assert prepare(build(tree), tmp_path / "data", quiet).tokenizer.vocab_size == 4
    tree["data"]["tokenizer"], tree["model"]["vocab_size"] = "bytes", 257
    with pytest.raises(UserError, match="set config.model.vocab_size=258 or more"):
        prepare(build(tree), tmp_path / "other", quiet)


def test_targets_of_a_prepared_folder(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"text {i}", "target": f"{i * i}"} for i in range(60)])
    prepared = prepare(build({"model": {"vocab_size": 300}, "data": {
        "source": path, "tokenizer": "bytes", "eval_fraction": 0.3, "task": {"objective": "seq2seq"}}}),
        tmp_path / "data", quiet)
    for split in (prepared.train, prepared.eval):
        assert split.documents == len(split.target.starts)
        for i in range(split.documents):
            number = int(prepared.tokenizer.decode(split.document(i)).split()[1])
            target = split.target.document(i)
            assert prepared.tokenizer.decode(target) == str(number**2) and target[-1] == prepared.tokenizer.separator_id


def test_files_of_unequal_lengths_are_an_error_or_their_surplus_is_left_out(tmp_path):
    (tmp_path / "a.en").write_text("one\ntwo\nthree\nfour\n")
    (tmp_path / "a.de").write_text("eins\nzwei\n")
    source = f"pairs:{tmp_path}/a.en,{tmp_path}/a.de"
    task = {"objective": "seq2seq", "input": "to German: {en}", "target": "{de}"}
    with pytest.raises(UserError, match=r"a.en, line 3: .*a.en has 4 lines and .*a.de 2;"):
        list(reader(task).read(source))
    lenient = reader(task, on_bad_record="skip")
    assert [(e.text, e.target) for e in lenient.read(source)] == [
        ("to German: one", "eins"), ("to German: two", "zwei")]
    assert [line.partition(":")[0].rpartition("/")[2] for line in lenient.left_out] == ["a.en, line 3", "a.en, line 4"]
    with pytest.raises(UserError, match="a.en, line 1: no field 'text'; set config.data.task.input to one of en, de"):
        list(reader({"objective": "seq2seq"}).read(source))


ODD = "  \ufb01ne\u2028 cafe\u0301\t\u00a0"
FORMS = {("none", False): ODD, ("nfc", False): "  \ufb01ne\u2028 caf\u00e9\t\u00a0",
         ("nfkc", False): "  fine\u2028 caf\u00e9\t ", ("none", True): "\ufb01ne cafe\u0301",
         ("nfc", True): "\ufb01ne caf\u00e9", ("nfkc", True): "fine caf\u00e9"}


@pytest.mark.parametrize("normalize, collapse_space", FORMS)
def test_texts_targets_and_labels_get_the_wanted_form(tmp_path, normalize, collapse_space):
    wanted = FORMS[normalize, collapse_space]
    path = write(tmp_path / "a.jsonl", [{"text": ODD, "target": ODD, "label": ODD, "labels": [ODD, wanted]}])
    (tmp_path / "a.txt").write_text(ODD)
    form = {"normalize": normalize, "collapse_space": collapse_space}
    for source in (path, str(tmp_path / "a.txt")):
        for bad in ("error", "skip"):
            example, = reader({"objective": "next_token", **form}, on_bad_record=bad).read(source)
            assert example.text == wanted
    example, = reader({"objective": "seq2seq", **form}).read(path)
    assert (example.text, example.target) == (wanted, wanted)
    example, = reader({"objective": "classification", "labels": [ODD, "b"], **form}).read(path)
    assert example.label == wanted
    example, = reader({"objective": "multi_label", "label": "labels", **form}).read(path)
    assert example.label == tuple(sorted({ODD, wanted} if wanted == ODD else {wanted}))


def test_labels_of_one_form_are_one_label():
    with pytest.raises(UserError, match="names a label twice"):
        reader({"objective": "classification", "labels": ["caf\u00e9", "cafe\u0301"], "normalize": "nfc"})


@pytest.mark.parametrize("kind, objective", [("encoder", "masked_lm"), ("decoder", "ul2"), ("decoder", "span_corruption")])
def test_objectives_that_hide_tokens_themselves_take_no_other_rate(kind, objective):
    with pytest.raises(UserError, match=f"objective={objective} hides tokens itself"):
        resolve({"objective": objective, "input_mask_rate": 0.1}, build({"model": {"kind": kind}}).model)


@pytest.mark.parametrize("objective, option", [("regression", "label_smoothing"), ("multi_label", "label_smoothing"),
                                               ("classification", "head_z_weight")])
def test_options_of_other_losses_are_no_options(objective, option):
    model = build({"model": {"kind": "encoder", "head": "classes"}}).model
    with pytest.raises(UserError, match=f"config.data.task.{option}=0.1 has no effect on {objective}; leave it out"):
        resolve({"objective": objective, option: 0.1}, model)
