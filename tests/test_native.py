"""C++ is compiled once a machine and kept; where it cannot be, one line says why and nothing else happens."""

import shutil
import stat
import tempfile

import jax
import pytest

from moejax import native

SOURCE = 'extern "C" void* moejax_nothing(void*) { return nullptr; }'
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS)), reason="needs a C++ compiler")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A file of C++, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "nothing.cc"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def registered(monkeypatch):
    """Names of functions that XLA has been told of, which it is not here."""
    names = []
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda name, fn, platform: names.append((name, platform)))
    return names


def libraries(tmp_path):
    return list((tmp_path / "cache/moejax").iterdir())


@needs_compiler
def test_it_is_compiled_once_and_again_when_it_changes(source, tmp_path, registered, capsys):
    assert native._register(source, ("moejax_nothing",)) == ""
    (library,) = libraries(tmp_path)
    assert "compiling nothing.cc for this machine, once" in capsys.readouterr().err
    assert native._register(source, ("moejax_nothing",)) == "" and libraries(tmp_path) == [library]
    assert not capsys.readouterr().err
    source.write_text(SOURCE + "\n")
    assert native._register(source, ("moejax_nothing",)) == "" and len(libraries(tmp_path)) == 2
    assert registered == [("moejax_nothing", "cpu")] * 3


@needs_compiler
def test_what_does_not_compile_leaves_the_compiler_s_first_line(source, tmp_path, registered, capsys):
    source.write_text("not C++\n")
    reason = native.unavailable(source, ("moejax_nothing",))
    assert "does not compile" in reason and f"{source}:1:" in reason and "\n" not in reason
    assert "moejax: does without nothing.cc, so slower: " in capsys.readouterr().err
    assert native.unavailable(source, ("moejax_nothing",)) == reason and not capsys.readouterr().err, "said once"
    assert not (tmp_path / "cache").exists() and not registered


@needs_compiler
def test_a_function_that_is_not_there_is_no_crash(source, registered):
    assert "moejax_other" in native._register(source, ("moejax_other",)) and not registered


def test_without_a_compiler_the_reason_says_what_was_looked_for(source, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert native._register(source, ()) == "there is no C++ compiler ($CXX, c++, g++, clang++)"


def test_a_compiler_that_is_not_there_is_named(source, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert native._register(source, ()) == "$CXX names a program that there is not, no-such-compiler"


@needs_compiler
def test_the_user_s_compiler_comes_first(source, tmp_path, monkeypatch, registered):
    chosen = tmp_path / "chosen"
    chosen.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec c++ "$@"\n')
    chosen.chmod(chosen.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CXX", f"{chosen} -g0")
    assert native._register(source, ("moejax_nothing",)) == ""
    assert "-g0 -O3" in (tmp_path / "calls").read_text()


@needs_compiler
def test_a_damaged_library_is_compiled_again(source, tmp_path, monkeypatch, registered, capsys):
    assert native._register(source, ("moejax_nothing",)) == ""
    (library,) = libraries(tmp_path)
    damaged = tmp_path / "other/moejax" / library.name  # a process that has loaded a file does not look at it again
    damaged.parent.mkdir(parents=True)
    damaged.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert native._register(source, ("moejax_nothing",)) == "" and damaged.read_bytes() == library.read_bytes()
    assert capsys.readouterr().err.count("compiling") == 2


@needs_compiler
@pytest.mark.parametrize("cache", ["a file", "~/nowhere"])
def test_a_cache_that_cannot_be_written_to_is_done_without(cache, source, tmp_path, monkeypatch, registered):
    (tmp_path / "a file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", cache if cache.startswith("~") else str(tmp_path / cache))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert native._register(source, ("moejax_nothing",)) == "" and registered
    assert not list((tmp_path / "temporary").iterdir()) and not (tmp_path / "~").exists()
