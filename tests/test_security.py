"""Nothing that is read can run code or lead out of its folder; only config files, which say that they are code."""

import ast
import pathlib
import re

import numpy as np
import pytest

from moejax.config import UserError
from moejax.data.prepared import load_prepared
from moejax.data.sources import files
from moejax.hf.disk import INDEX, Files
from moejax.mixture import task_name

ROOT = pathlib.Path(__file__).parent.parent
RUN_WHAT_THEY_READ = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "torch", "tarfile", "zipfile"}
BUILT_IN, METHODS = {"eval", "exec", "compile", "__import__"}, {"extractall", "unpack_archive", "unsafe_load"}
CONFIG_FILES = "main"
"""The module that runs config files."""
OUTSIDE = ("../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a/../../x", "")


def modules():
    return sorted((ROOT / "moejax").rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_what_it_reads(path):
    text = path.read_text()
    assert not set(re.findall(r"\w+", text)) & {"allow_pickle", "trust_remote_code"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & RUN_WHAT_THEY_READ
        elif isinstance(node, ast.ImportFrom):
            assert node.module.partition(".")[0] not in RUN_WHAT_THEY_READ
        elif isinstance(node, ast.Call):
            name, method = getattr(node.func, "id", ""), getattr(node.func, "attr", "")
            assert name not in BUILT_IN and method not in METHODS, f"line {node.lineno}"
            assert ast.unparse(node.func) not in {"np.load", "numpy.load"}, f"line {node.lineno}"
            assert method not in {"run_path", "run_module"} or path.stem == CONFIG_FILES, f"line {node.lineno}"


def test_the_readme_says_that_config_files_are_code():
    assert "config files are code" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_no_file_outside_its_folder(name, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(bytes(8))
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / INDEX).write_text('{"weight_map": {"a": "%s"}}' % name)
    with pytest.raises(UserError, match="not a file of the folder|cannot be read"):
        Files(folder)


@pytest.mark.parametrize("name", (*OUTSIDE, ".", "a\0b", 3, None, "x" * 300))
def test_the_name_of_a_task_is_the_name_of_a_folder_in_the_workdir(name, tmp_path):
    with pytest.raises(UserError, match="the name of a task has letters"):
        task_name(name)
    (tmp_path / "summary.json").write_text('{"tasks": [%s], "content": "0"}' % ("null" if name is None else f'"{name}"'))
    with pytest.raises(UserError, match="no prepared data|damaged"):
        load_prepared(tmp_path)


def test_a_package_is_named_not_imported_and_no_path():
    for source in ("package:os.path/x", "package:../x/y", "package:/etc/passwd", "package:a b/x", "package:json"):
        with pytest.raises(UserError, match="must have the form package:NAME/GLOB"):
            files(source)


def test_numpy_files_hold_numbers_only(tmp_path):
    from moejax.data.prepared import _load_array
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "archive.npy", a=np.arange(3))
    (tmp_path / "archive.npy.npz").rename(tmp_path / "archive.npy")
    for name in ("objects.npy", "archive.npy"):
        with pytest.raises(ValueError):
            _load_array(tmp_path / name)
