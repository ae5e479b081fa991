"""Every test runs on eight simulated CPU devices, unless JAX_PLATFORMS names another platform; those marked `slow` run only
with `--slow`."""

import os
import pathlib
import shutil
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from absl import flags

OWN_CACHE = jax.config.jax_compilation_cache_dir is None
if OWN_CACHE:
    # Many tests compile the same small programs; workers and the processes that tests start share them.
    folder = tempfile.mkdtemp(prefix="moejax_tests_")
    for name, value in (("jax_compilation_cache_dir", folder), ("jax_persistent_cache_min_compile_time_secs", 0),
                        ("jax_persistent_cache_min_entry_size_bytes", -1)):
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)

# Nearly all the time of the tests is compiling; they run as well without the optimisations that take longest.
jax.config.update("jax_disable_most_optimizations", True)

flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Lets a file's compiled programs go after it: each takes several memory maps, of which Linux gives a process 65,530,
    and where they run out XLA crashes. What another file needs again comes from the cache on disk."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def forget_programs_in_time(request):
    """The same where one file alone compiles that many, as with `--slow` in one process."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if request.config.getoption("--slow") and maps.exists() and maps.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that are marked slow, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long and repeats in another combination what a fast test covers")


def pytest_unconfigure(config):
    if OWN_CACHE:
        shutil.rmtree(jax.config.jax_compilation_cache_dir, ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))
