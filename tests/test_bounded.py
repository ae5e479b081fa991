"""Files, JSON and messages of others have bounds."""

import os

import pytest

from moejax import bounded
from moejax.bounded import DEPTH, one_line, parse_json, read_file, read_object
from moejax.config import UserError


@pytest.mark.parametrize("kind", (str, str.encode))
def test_json_is_as_deep_as_it_may_be_and_no_deeper(kind):
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        deepest = parse_json(kind(opening * DEPTH + "1" + closing * DEPTH))
        for _ in range(DEPTH):
            deepest = deepest[0] if isinstance(deepest, list) else deepest["a"]
        assert deepest == 1
        for depth in (DEPTH + 1, 100_000):
            with pytest.raises(ValueError, match="nested too deeply"):
                parse_json(kind(opening * depth + "1" + closing * depth))


def test_many_brackets_side_by_side_or_in_texts_are_not_deep():
    assert parse_json("[" + "[]," * 999 + "[]]") == [[]] * 1000
    assert parse_json(b'["' + b"[{" * 999 + b'"]') == ["[{" * 999]


@pytest.mark.parametrize("text", ("", "{", "9" * 5000, b"\xff", b"\xff\xfe1", '{"a": 1}x'))
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_only_files_of_such_a_size_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "file") == read_file(tmp_path / "link") == b"content"
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    (tmp_path / "device").symlink_to("/dev/zero")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(bounded.LIMIT + 1)  # a sparse file
    for name in ("pipe", "device", "large", "."):
        with pytest.raises(ValueError, match="not a file of at most 64 MiB"):
            read_file(tmp_path / name)
    with pytest.raises(ValueError):
        read_file(tmp_path / "link", links=False)
    with pytest.raises(OSError):
        read_file(tmp_path / "none")


def test_an_object_that_cannot_be_read_names_the_file_and_the_advice(tmp_path):
    for content, said in ((b"[" * 100_000, "nested too deeply"), (b"[]", "not a JSON object"), (b"\xff", "not valid JSON")):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(UserError, match=rf"a\.json: .*{said}.*fetch it again"):
            read_object(tmp_path / "a.json", "", "fetch it again")


def test_a_message_is_one_line_without_commands_to_the_terminal():
    said = one_line("a\nb\r\x1b[31mc\u2028d\ud800\x00é世")
    assert said == "a b  [31mc d  é世" and said.isprintable()
    long = one_line("begin" + "x" * 100_000 + "end")
    assert long.startswith("begin") and long.endswith("end") and len(long) < bounded.LETTERS + 10
