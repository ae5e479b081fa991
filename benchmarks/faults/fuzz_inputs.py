"""What a fuzz feeds readers with: wrong values, changed JSON and damaged bytes, as strategies of hypothesis."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st


class Reader(NamedTuple):
    """Something that reads what users or others wrote.

    Attributes:
      inputs: what it is fed with.
      plant: (input, empty folder) -> what to do; writes the files that are to be read. What it returns does the reading,
        raises what the reader raises, and returns the exit status if it is a command.
      share: how many inputs it gets beside the others.
      statuses: that it may end with.
    """

    inputs: st.SearchStrategy
    plant: Callable[[Any, Path], Callable[[], Any]]
    share: float = 1.0
    statuses: tuple[int, ...] = (0, 2)


TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(("", " ", "auto", "None", "text", "a\0b", "a\nb", "\ud800", "\udcff", "\u2028", "ä" * 300, "../../x",
                     "/etc/passwd", "~", ".", "..", "{", "{a.b", "[", "*", "nan", "1e999", "-1", "0", "x" * 5000)))
"""Strings that are wrong in most places."""
NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from((2**31, 2**32, 2**53 + 1, 2**63, -2**63, 10**30, 10**400, -10**400)),
    st.floats(), st.sampled_from((0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), -0.0)))
"""Numbers, of which many are out of any range."""
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT)
VALUES = st.recursive(SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3),
                                                       st.dictionaries(TEXT, inner, max_size=3)), max_leaves=6)
"""Whatever JSON can hold."""
DEEP = (b"[" * 100_000, b'{"a":' * 100_000, b"[" * 700 + b"]" * 700, b'{"text":' * 700 + b"1" + b"}" * 700)
"""JSON that is nested so deep that Python's recursion ends on the way, some of it only behind the parser."""
ODD = (b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf{}", b"null", b"[]", b"{}", b'""', b"1" * 5000, b"NaN", b"{" * 3,
       b'{"a": ' + b"9" * 5000 + b"}", *DEEP)
"""Whole files that are nothing."""


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that were cut, changed, enlarged, or are others."""
    how = draw(st.sampled_from(("cut", "flip", "insert", "remove", "double", "odd", "any")))
    if how == "odd":
        return draw(st.sampled_from(ODD))
    if how == "any":
        return draw(st.binary(max_size=200))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    if how == "cut":
        return content[:place]
    if how == "double":
        return content + content
    if how == "insert":
        return content[:place] + draw(st.sampled_from((*ODD, b"\n", b",", b'"', b"\\ud800"))) + content[place:]
    if how == "remove":
        return content[:place] + content[place + draw(st.integers(1, 40)):]
    changed = bytearray(content)
    for spot in [place, *draw(st.lists(st.integers(0, max(len(content) - 1, 0)), max_size=3))]:
        changed[spot:spot + 1] = bytes([draw(st.integers(0, 255))])
    return bytes(changed)


@st.composite
def changed(draw: st.DrawFn, tree: Any, values: st.SearchStrategy = VALUES, most: int = 3) -> Any:
    """A tree of JSON in some places of which something else is, nothing, or something more."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        node = tree
        while children := [key for key in _keys(node) if isinstance(node[key], (dict, list)) and len(node[key])]:
            if draw(st.booleans()):
                break
            node = node[draw(st.sampled_from(children))]
        keys = _keys(node)
        how = draw(st.sampled_from(("set", "set", "set", "drop", "more")))
        if how == "more" or not keys:
            if isinstance(node, dict):
                node[draw(TEXT)] = copy.deepcopy(draw(values))
            elif isinstance(node, list):
                node.append(copy.deepcopy(draw(values)))
            continue
        key = draw(st.sampled_from(keys))
        if how == "drop":
            del node[key]
        else:
            node[key] = copy.deepcopy(draw(values))
    return tree


def _keys(node: Any) -> list[Any]:
    return list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []


def json_of(tree: Any) -> bytes:
    """A tree as JSON; halves of surrogate pairs as escapes."""
    return json.dumps(tree).encode()


def json_file(tree: Any, values: st.SearchStrategy = VALUES) -> st.SearchStrategy[bytes]:
    """Files of JSON: a changed tree three times in four, else damaged bytes."""
    trees = changed(tree, values).map(json_of)
    return st.one_of(trees, trees, trees, damaged(json_of(tree)))


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Puts files into a folder, made with the folders that they are in."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read_all(folder: Path) -> dict[str, bytes]:
    """All files of a folder by their paths in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
