"""Every backend gets options that it knows."""

from types import SimpleNamespace

import jax

from moejax import compiler_options


def test_a_program_for_this_backend_compiles_with_its_options():
    options = compiler_options.for_devices(jax.devices())
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2


def test_only_tpus_take_the_grouped_kernel():
    def options(*platforms):
        return compiler_options.for_devices([SimpleNamespace(platform=platform) for platform in platforms])
    assert options("tpu", "tpu") == {"xla_tpu_enable_ragged_dot_kernel": "true"}
    assert options("gpu") == options("cpu") == options("cpu", "tpu") == {}


def test_the_option_of_deterministic_programs_is_one_that_xla_knows():
    options = compiler_options.for_devices([SimpleNamespace(platform="gpu")], deterministic=True)
    assert options and jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    for platform in ("cpu", "tpu"):
        device = [SimpleNamespace(platform=platform)]
        assert compiler_options.for_devices(device, True) == compiler_options.for_devices(device)
