"""C++ for CPUs: compiled for this machine when it is first wanted, kept, and called in programs through XLA's FFI."""

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading

import jax
import jaxlib

COMPILERS = ("c++", "g++", "clang++")
_lock = threading.Lock()


def unavailable(source: pathlib.Path, functions: tuple[str, ...]) -> str:
    """Makes C++ functions known to XLA under their names, compiling them if this machine has not yet.

    The compiled library is kept in `moejax` in the user's cache (`$XDG_CACHE_HOME`, else `~/.cache`). `$CXX` names the
    compiler, else it is the first of `COMPILERS`. A cache that cannot be written to costs each process a compilation.

    Args:
      source: a file in C++17 that includes xla/ffi/api/ffi.h.
      functions: its handlers.

    Returns:
      Why they cannot be used, one line; nothing if they can.
    """
    with _lock:
        return _once(source, functions)


@functools.cache
def _once(source: pathlib.Path, functions: tuple[str, ...]) -> str:
    reason = _register(source, functions)
    if reason:
        print(f"moejax: does without {source.name}, so slower: {reason}", file=sys.stderr, flush=True)
    return reason


def _register(source: pathlib.Path, functions: tuple[str, ...]) -> str:
    compiler = shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, COMPILERS))[:1]
    if not compiler:
        return f"there is no C++ compiler ($CXX, {', '.join(COMPILERS)})"
    if not shutil.which(compiler[0]):
        return f"$CXX names a program that there is not, {compiler[0]}"
    try:
        library = _loaded(source, compiler)
        for name in functions:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or ["it says nothing"]
        return f"{compiler[0]} does not compile {source}: {next((line for line in said if 'error' in line), said[0])}"
    except (OSError, AttributeError) as error:
        return f"{source.name} cannot be compiled or loaded: {error}"
    return ""


def _loaded(source: pathlib.Path, compiler: list[str]) -> ctypes.CDLL:
    """The library: from the cache, or compiled and left there."""
    arm = platform.machine() in ("aarch64", "arm64")
    options = ["-O3", "-mcpu=native" if arm else "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC"]
    about = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    told = "\n".join([source.read_text(), about, jaxlib.__version__, platform.machine(), _processor(), *compiler, *options])
    name = f"{source.stem}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    kept = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "moejax" / name
    with contextlib.suppress(OSError):  # not there, damaged, or not to be read
        return ctypes.CDLL(str(kept))
    print(f"moejax: compiling {source.name} for this machine, once", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:  # a loaded library may be deleted
        made = pathlib.Path(folder) / name
        subprocess.run([*compiler, *options, "-isystem", jax.ffi.include_dir(), str(source), "-o", str(made)],
                       capture_output=True, text=True, check=True)
        _keep(made, kept)
        with contextlib.suppress(OSError):  # either may lie where nothing can be executed
            return ctypes.CDLL(str(kept))
        return ctypes.CDLL(str(made))


def _keep(made: pathlib.Path, kept: pathlib.Path) -> None:
    """Copies a library into the cache, if there is one: whole or not at all, whoever else does so now."""
    if not kept.is_absolute():  # no home
        return
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            os.replace(shutil.copy(made, folder), kept)


def _processor() -> str:
    """What of a processor decides which instructions a compiler uses for it: homes are shared by unlike machines."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model", "flags", "Features", "CPU part"))}))
