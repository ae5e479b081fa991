"""A fuzz of folders of open checkpoints: config.json, safetensors, and their index."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from benchmarks.faults.fuzz_inputs import NUMBERS, TEXT, VALUES, Reader, damaged, json_file, json_of, write
from moejax.hf.__main__ import main
from moejax.hf.disk import INDEX, SINGLE, Files
from moejax.hf.load import read_config

GOLDEN = Path(__file__).parents[2] / "tests" / "hf" / "golden"
"""Small checkpoints of all families."""
OTHER = "model-00001-of-00001.safetensors"


@functools.cache
def options_of_families() -> list[Any]:
    """config.json of each."""
    return [json.loads(path.read_text()) for path in sorted(GOLDEN.glob("*/config.json"))]


def config(content: bytes, folder: Path) -> Callable[[], Any]:
    """config.json of an open checkpoint."""
    write(folder, {"config.json": content})
    return lambda: read_config(folder)


@functools.cache
def sample() -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """A whole checkpoint: options, header and values."""
    content = (GOLDEN / "llama" / SINGLE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    options = json.loads((GOLDEN / "llama" / "config.json").read_bytes())
    return options, json.loads(content[8:8 + size]), content[8 + size:]


def safetensors(header: bytes, values: bytes, size: int | None = None) -> bytes:
    """A file, which may say another size of its header."""
    return (len(header) if size is None else size).to_bytes(8, "little") + header + values


@st.composite
def tensor_files(draw: st.DrawFn) -> bytes:
    """A file with a wrong header, of a wrong size, or damaged anywhere."""
    _, header, values = sample()
    how = draw(st.sampled_from(("header", "header", "entry", "size", "cut", "damage")))
    if how == "header":
        return safetensors(draw(json_file(header)), values)
    if how == "entry":
        name = draw(st.sampled_from(sorted(header)))
        entry = draw(st.fixed_dictionaries({}, optional={
            "dtype": st.sampled_from(("F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "U8", "C64", "X", 3)),
            "shape": st.lists(st.one_of(NUMBERS, st.sampled_from((2**60, 2**62))), max_size=3),
            "data_offsets": st.lists(st.sampled_from((0, 4, 8, 2**60, 2**63, 2**64, -1)), min_size=1, max_size=3)}))
        return safetensors(json_of(header | {name: header[name] | entry if draw(st.booleans()) else entry}), values)
    whole = safetensors(json_of(header), values)
    if how == "size":
        wrong = draw(st.sampled_from((0, 1, 7, 2**30, 2**60, 2**63, 2**64 - 1, len(whole) - 8, len(whole) - 7)))
        return safetensors(json_of(header), values, wrong)
    if how == "cut":
        return whole[:draw(st.integers(0, len(whole) - 1))]
    return draw(damaged(whole))


@st.composite
def indices(draw: st.DrawFn) -> bytes:
    """An index that names files of which there is one, there is none, or that lie elsewhere."""
    names = st.one_of(TEXT, st.sampled_from((OTHER, "../../x.safetensors", "/etc/passwd", "..", ".", "", "a/../" + OTHER,
                                             "config.json", "a\\b", "\ud800", "link.safetensors")), VALUES)
    tree = {"metadata": {"total_size": 1}, "weight_map": draw(st.dictionaries(TEXT, names, max_size=4))}
    return draw(st.one_of(st.just(json_of(tree)), json_file(tree)))


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, bytes]:
    """A folder of which one file is wrong."""
    options, header, values = sample()
    files = {"config.json": json_of(options), SINGLE: safetensors(json_of(header), values)}
    how = draw(st.sampled_from(("config", "tensors", "tensors", "index", "tokenizer")))
    if how == "config":
        return files | {"config.json": draw(json_file(options))}
    if how == "tensors":
        return files | {SINGLE: draw(tensor_files())}
    if how == "index":
        return files | {OTHER: files[SINGLE], INDEX: draw(indices())}
    return files | {draw(st.sampled_from(("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))): draw(
        st.one_of(st.binary(max_size=99), damaged(b'{"model": {}}')))}


def tensors(files: dict[str, bytes], folder: Path) -> Callable[[], Any]:
    """All tensors of a folder are read."""
    write(folder, files)

    def work() -> None:
        found = Files(folder)
        for name in found.file_of:
            found.shape(name), found.read(name)
    return work


def imported(files: dict[str, bytes], folder: Path) -> Callable[[], int]:
    """A checkpoint becomes a workdir."""
    write(folder / "hf", files)
    return lambda: main(["import", str(folder / "hf"), str(folder / "w")])


READERS = {
    "open config.json": Reader(st.deferred(lambda: st.sampled_from(options_of_families()).flatmap(json_file)), config,
                               share=3),
    "safetensors": Reader(st.deferred(lambda: st.one_of(
        tensor_files().map(lambda content: {SINGLE: content}),
        indices().map(lambda content: {OTHER: safetensors(json_of(sample()[1]), sample()[2]), INDEX: content}))), tensors,
        share=2),
    "import": Reader(st.deferred(checkpoints), imported, share=0.2),
}
