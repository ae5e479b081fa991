"""What a run needs is known before it begins: bytes a device as XLA counts them, and the largest arrays by name."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import tiny_batch, tiny_config

from moejax.config import MeshConfig, UserError
from moejax.main import main
from moejax.train import memory
from moejax.train.setup import set_up

HUGE = """\
from moejax import config


def get_config():
    c = config.default()
    c.model.update(dict(vocab_size=264, layers=200, embed=65536, heads=512, kv_heads=512, head_dim=128, ffn=262144))
    c.moe.every = 0
    c.mesh.replicated_mib = 1e9
    c.data.update(dict(source="t.txt", tokenizer="bytes", batch_size=8))
    return c
"""


@pytest.mark.parametrize("mesh", (MeshConfig(), MeshConfig(data=4, replica=2)))
def test_held_bytes_are_those_that_the_arrays_take_on_the_fullest_device(mesh):
    setup = set_up(dataclasses.replace(tiny_config(), mesh=mesh))
    state = setup.initialise()
    told = memory.held(setup.shapes, setup.shardings)
    taken = [max(shard.data.nbytes for shard in leaf.addressable_shards) for leaf in jax.tree.leaves(state)]
    assert sorted(one.bytes for one in told) == sorted(taken)
    assert [one.bytes for one in told] == sorted(taken, reverse=True)
    named = {one.name for one in told}
    assert {"step", "key", "params/final_norm/scale"} <= named and any(name.startswith("opt_state/") for name in named)


def test_what_the_state_needs_is_counted_to_the_byte_and_gradients_only_of_what_moves():
    setup = set_up(tiny_config())
    told = memory.held(setup.shapes, setup.shardings)
    state, params = sum(one.bytes for one in told), sum(one.bytes for one in told if one.name.startswith("params/"))

    def check(moving, left):
        memory.check_state(setup.shapes, setup.shardings, moving, setup.mesh, left)

    check(setup.moving, state + params)
    check(frozenset(), state)
    check(setup.moving, None)
    for moving, left in ((setup.moving, state + params - 1), (frozenset(), state - 1)):
        with pytest.raises(UserError, match="at least .* on each device .* Largest: params/.*float32") as raised:
            check(moving, left)
        assert told[0].name in str(raised.value) and "now data=8" in str(raised.value)


def test_a_compiled_step_is_held_against_what_is_left():
    setup = set_up(tiny_config())
    compiled = setup.train_step.lower(setup.initialise(), setup.put(tiny_batch(setup.config))).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    memory.check_step(compiled, setup.shapes, setup.shardings, setup.mesh, 2 * temporaries)
    memory.check_step(compiled, setup.shapes, setup.shardings, setup.mesh, None)
    with pytest.raises(UserError, match="a train step needs .*config.train.microbatches.*Largest: "):
        memory.check_step(compiled, setup.shapes, setup.shardings, setup.mesh, temporaries // 2)


def test_memory_of_the_machine(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:  42 kB\n")
    assert memory.host_memory(str(tmp_path / "meminfo")) == 42 * 1024
    (tmp_path / "torn").write_text("MemTotal\n")
    assert memory.host_memory(str(tmp_path / "torn")) is None is memory.host_memory(str(tmp_path / "none"))
    assert [memory.size(n) for n in (5, 2048, 3 * 2**20, 2**30)] == ["5 bytes", "2.00 KiB", "3.00 MiB", "1.00 GiB"]


def test_a_run_that_cannot_fit_ends_before_anything_is_allocated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(HUGE)
    (tmp_path / "t.txt").write_text("some words\n" * 99)
    assert main(["main", "--config=c.py", "--workdir=w"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "training needs at least" in err and "GiB" in err and "params/stack_0/block_0" in err
    assert not (tmp_path / "w").exists()
    assert np.isfinite(memory.free(set_up(tiny_config()).mesh))
