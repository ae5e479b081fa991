"""Steps whose loss or gradients are not finite: they change nothing, the run says what was wrong, and ends in time."""

import json
import math

import jax
import numpy as np
import pytest
from tiny import tiny_batch, tiny_config

from moejax.main import main
from moejax.metrics import record
from moejax.sharding import flat
from moejax.train.diagnosis import Findings, first_unsound
from moejax.train.setup import set_up


@pytest.fixture(scope="module")
def setup():
    return set_up(tiny_config())


def filled(setup, ends, value):
    """A fresh state in which the parameter whose name ends so is of that number throughout."""
    state = setup.initialise()
    names = ["/".join(path) for path in flat(state.params)]
    name, = (name for name in names if name.endswith(ends))
    leaves = [np.full_like(leaf, value) if own == name else leaf for own, leaf in zip(names, jax.tree.leaves(state.params))]
    return state.replace(params=jax.device_put(jax.tree.unflatten(jax.tree.structure(state.params), leaves),
                                               setup.shardings.params))


def held(tree):
    return jax.tree.map(np.asarray, jax.device_get(tree))


@pytest.mark.parametrize("poison, limit", [(math.nan, math.inf), (math.inf, math.inf), (None, -1.0)])
def test_a_step_that_is_not_sound_changes_nothing_but_its_number(setup, poison, limit):
    batch = setup.put(tiny_batch(setup.config))
    state = setup.initialise() if poison is None else filled(setup, "stack_0/block_0/attention/w_q", poison)
    before = held(state)
    after, means, _ = setup.train_step(state, batch, np.float32(limit))
    after = held(after)
    assert means["skipped"] == 1 and after.step == before.step + 1
    jax.tree.map(np.testing.assert_array_equal, after.replace(step=before.step), before)


def test_a_sound_step_changes_every_parameter(setup):
    before = held(setup.initialise())
    after, means, _ = setup.train_step(setup.initialise(), setup.put(tiny_batch(setup.config)), np.float32(math.inf))
    assert means["skipped"] == 0
    for path, same in flat(jax.tree.map(lambda a, b: bool(np.all(a == b)), before.params, held(after.params))).items():
        assert not same, path


@pytest.mark.parametrize("ends, value, said", [
    ("stack_0/block_0/feed_forward/w_in", math.nan, "parameter stack_0/block_0/feed_forward/w_in holds"),
    ("stack_0/block_0/feed_forward/w_out", 3e38, "the output of block 0 (stack_0/block_0, repeat 0) is the first"),
    ("stack_1/block_0/moe/w_out", 3e38, "the output of block 1 (stack_1/block_0, repeat 0) is the first"),
    ("final_norm/scale", 3e38, "the outputs of all blocks are finite, the loss is not"),
    ("final_norm/scale", 1.0, "all parameters, outputs and gradients are finite"),
])
def test_what_came_first_is_named(setup, ends, value, said):
    findings = setup.examine(filled(setup, ends, value), setup.put(tiny_batch(setup.config)))
    assert first_unsound(setup.config, findings).startswith(said)


def test_a_gradient_alone_is_named(setup):
    params = jax.tree.map(lambda _: True, setup.shapes.params)
    outputs = {name: {"after_block_0": (np.ones(2, bool),)} for name in ("stack_0", "stack_1")}
    grads = {**params, "final_norm": {"scale": False}}
    assert "the gradient of final_norm/scale is not" in first_unsound(setup.config, Findings(params, outputs, True, grads))


CONFIG = """\
from moejax import config


def get_config():
    c = config.default()
    c.model.update(dict(vocab_size=264, layers=1, embed=16, heads=4, kv_heads=4, head_dim=4, ffn=24))
    c.moe.update(dict(num_experts=4, experts_per_token=2, ffn=12, block_rows=16))
    c.data.update(dict(source="corpus.jsonl", tokenizer="bytes", length=16, batch_size=8, eval_fraction=0.2))
    c.optimizer.update(dict(learning_rate=3e37, warmup_steps=0))  # the first step makes all further ones overflow
    c.train.update(dict(steps=30, checkpoint_every=8, log_every=1, sample_prompt=""))
    c.train.faults = dict(max_skipped=4)
    return c
"""


@pytest.mark.slow  # test_fault_suite.py has a run none of whose batches are finite
def test_a_run_that_diverges_ends_and_its_step_can_be_done_again(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(CONFIG)
    texts = [f"number {i} and then {i + 1}" for i in range(60)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert main(["main", "--config=c.py", "--workdir=w"]) == 1
    error, = capfd.readouterr().err.splitlines()[-1:]
    # Steps 2 to 5 are skipped; that is known two steps later.
    assert "moejax: step 7: 4 steps in a row were skipped, the last because" in error and "not finite" in error
    assert "--mode=replay --step=7" in error
    records = record.read(tmp_path / "w")
    assert [r["skipped"] for r in records] == [0, 1, 1, 1, 1, 1, 1]
    text = (tmp_path / "w" / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text

    files = sorted(path for path in (tmp_path / "w").rglob("*"))
    assert main(["main", "--workdir=w", "--mode=replay", "--step=5"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("from the beginning to step 5") and "skipped" in lines[1] and "not finite" in lines[2]
    assert sum(line.startswith("row ") for line in lines) == 8 and "umber" in lines[3]
    assert files == sorted(path for path in (tmp_path / "w").rglob("*"))

    assert main(["main", "--config=c.py", "--workdir=w", "--config.train.faults.max_skipped=None"]) == 0
    assert record.read(tmp_path / "w")[-1]["step"] == 30
    assert main(["main", "--workdir=w", "--mode=replay", "--step=31"]) == 2
    assert "--step=31 must be from 1 to" in capfd.readouterr().err
