"""C++ for CPUs: compiled for this machine when it is first wanted, kept, and called in programs through XLA's FFI."""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
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
    compiler = shutil.which(os.environ.get("CXX", "")) or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return f"there is no C++ compiler ($CXX, {', '.join(COMPILERS)})"
    try:
        with tempfile.TemporaryDirectory() as spare:  # a loaded library may be deleted
            library = ctypes.CDLL(str(_compiled(source, compiler, pathlib.Path(spare))))
        for name in functions:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except subprocess.CalledProcessError as error:
        return f"{compiler} does not compile {source}: {(error.stderr.strip() or 'it says nothing').splitlines()[0]}"
    except (OSError, AttributeError) as error:
        return f"{source.name} cannot be compiled or loaded: {error}"
    return ""


def _compiled(source: pathlib.Path, compiler: str, spare: pathlib.Path) -> pathlib.Path:
    """The library, from the cache or new; in the folder `spare` if the cache cannot be written to."""
    arm = platform.machine() in ("aarch64", "arm64")
    options = ["-O3", "-mcpu=native" if arm else "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC"]
    about = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    told = "\n".join([source.read_text(), about, jaxlib.__version__, platform.machine(), _processor(), *options])
    name = f"{source.stem}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "moejax"
    if (folder / name).exists():
        return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        building = pathlib.Path(tempfile.mkdtemp(dir=folder))
    except OSError:
        folder = building = spare
    print(f"moejax: compiling {source.name} for this machine, once, into {folder}", file=sys.stderr, flush=True)
    try:
        subprocess.run([compiler, *options, "-isystem", jax.ffi.include_dir(), str(source), "-o", str(building / name)],
                       capture_output=True, text=True, check=True)
        os.replace(building / name, folder / name)  # whole or not at all, whoever else compiles it now
    finally:
        if building != folder:
            shutil.rmtree(building, ignore_errors=True)
    return folder / name


def _processor() -> str:
    """What of a processor decides which instructions a compiler uses for it: homes are shared by unlike machines."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model", "flags", "Features", "CPU part"))}))
