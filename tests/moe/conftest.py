"""Compiling takes most of the time of these tests, so XLA's costly optimisations are off, except with `--slow`."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not request.config.getoption("--slow"))
    yield
    jax.config.update("jax_disable_most_optimizations", before)
