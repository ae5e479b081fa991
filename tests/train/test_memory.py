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

SMALL = """\
from moejax import config


def get_config():
    c = config.default()
    c.model.update(dict(vocab_size=257, layers=1, embed=16, heads=4, kv_heads=4, head_dim=4, ffn=16))
    c.moe.every = 0
    c.data.update(dict(source="t.txt", eval_source="e.txt", tokenizer="bytes", length=16, batch_size=8))
    c.train.update(dict(steps=2, sample_prompt=""))
    return c
"""


@pytest.mark.parametrize("mesh", (MeshConfig(), MeshConfig(data=4, replica=2)))
def test_held_bytes_are_those_that_the_arrays_take_on_the_fullest_device(mesh):
    setup = set_up(dataclasses.replace(tiny_config(), mesh=mesh))
    state = setup.initialise()
    told = memory.held(setup)
    taken = [max(shard.data.nbytes for shard in leaf.addressable_shards) for leaf in jax.tree.leaves(state)]
    assert sorted(one.bytes for one in told) == sorted(taken)
    assert [one.bytes for one in told] == sorted(taken, reverse=True)
    named = {one.name for one in told}
    assert {"step", "key", "params/final_norm/scale"} <= named and any(name.startswith("opt_state/") for name in named)


def test_what_the_state_needs_is_counted_to_the_byte():
    setup = set_up(tiny_config())
    told = memory.held(setup)
    state = sum(one.bytes for one in told)
    memory.check_state(setup, state)
    memory.check_state(setup, None)
    with pytest.raises(UserError, match="on each device, .* now data=8.* Largest: params/.*float32") as raised:
        memory.check_state(setup, state - 1)
    assert told[0].name in str(raised.value)


@pytest.mark.slow
def test_a_compiled_step_is_held_against_what_is_left():
    setup = set_up(tiny_config())
    compiled = setup.train_step.lower(setup.initialise(), setup.put(tiny_batch(setup.config))).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    memory.check_step(setup, lambda: compiled, lambda: 2 * temporaries)
    memory.check_step(setup, lambda: compiled, lambda: None)
    with pytest.raises(UserError, match="a train step needs .*config.train.microbatches.*Largest: "):
        memory.check_step(setup, lambda: compiled, lambda: temporaries // 2)


def test_what_the_compiler_refuses_is_told_alike():
    def refuse(message):
        raise jax.errors.JaxRuntimeError(message)

    setup = set_up(tiny_config())
    with pytest.raises(UserError, match="RESOURCE_EXHAUSTED: Ran out of memory; fewer rows .*Largest: "):
        memory.check_step(setup, lambda: refuse("RESOURCE_EXHAUSTED: Ran out of memory\nProgram hbm"), lambda: 1)
    with pytest.raises(jax.errors.JaxRuntimeError):
        memory.check_step(setup, lambda: refuse("INTERNAL: something else"), lambda: 1)


def test_memory_of_the_machine(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:  42 kB\n")
    assert memory.host_memory(tmp_path / "meminfo", tmp_path) == 42 * 1024
    (tmp_path / "memory.current").write_text("1200\n")
    (tmp_path / "memory.max").write_text("1300\n")
    assert memory.host_memory(tmp_path / "meminfo", tmp_path) == 42 * 1024  # what is in use is not known
    (tmp_path / "memory.stat").write_text("anon 300\nfile 900\nactive_file 500\ninactive_file 400\n")
    for limit, left in (("max", 42 * 1024), ("1300", 1000), ("99999999", 42 * 1024)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        assert memory.host_memory(tmp_path / "meminfo", tmp_path) == left
    (tmp_path / "torn").write_text("MemTotal\n")
    assert memory.host_memory(tmp_path / "torn", tmp_path) is None is memory.host_memory(tmp_path / "none", tmp_path)
    assert [memory.size(n) for n in (5, 2048, 3 * 2**20, 2**30)] == ["5 bytes", "2.00 KiB", "3.00 MiB", "1.00 GiB"]


@pytest.mark.slow
def test_a_step_that_cannot_fit_ends_the_run_before_it_and_keeps_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(SMALL)
    (tmp_path / "t.txt").write_text("some words\n" * 99)
    (tmp_path / "e.txt").write_text("other words\n" * 99)
    free = iter((10**9, 10**3))
    monkeypatch.setattr(memory, "free", lambda mesh: next(free))
    assert main(["main", "--config=c.py", "--workdir=w"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("moejax: a train step needs ") and "there are 0.98 KiB" in err
    assert (tmp_path / "w" / "data").is_dir() and not (tmp_path / "w" / "metrics.jsonl").exists()
    assert main(["main", "--config=c.py", "--workdir=w", "--config.train.faults.predict_memory=False"]) == 0


def test_a_run_that_cannot_fit_ends_before_anything_is_allocated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(HUGE)
    (tmp_path / "t.txt").write_text("some words\n" * 99)
    assert main(["main", "--config=c.py", "--workdir=w"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "parameters and optimizer state take" in err and "GiB" in err
    assert "Largest: params/stack_0/block_0" in err
    assert not (tmp_path / "w").exists()
    assert np.isfinite(memory.free(set_up(tiny_config()).mesh))
