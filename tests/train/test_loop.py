"""The whole path on a small text: train, record, evaluate, save, load."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from tiny import positions_of

import moejax
from moejax import config as config_lib
from moejax.checkpoint import manifest, read_config
from moejax.data.prepared import load_prepared
from moejax.metrics import record
from moejax.models import transformer
from moejax.sharding import flat
from moejax.train import loop
from moejax.train.benchmark import benchmark
from moejax.train.setup import set_up


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Arithmetic in words that a small model learns at once."""
    folder = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": f"number {i} comes before number {i + 1}, and after number {i - 1}. " * 3})
             for i in range(120)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    tree = config_lib.default()
    tree.model.update(dict(vocab_size=257, layers=2, embed=24, heads=4, kv_heads=2, head_dim=6, ffn=20))
    tree.moe.update(dict(num_experts=5, ffn=12, bias_rate=0.01, capacity_factor=1.0))
    tree.data.update(dict(source=str(folder / "*.jsonl"), tokenizer="bytes", length=20, batch_size=8, eval_fraction=0.2))
    tree.optimizer.update(dict(learning_rate=2e-2, warmup_steps=4))
    tree.train.update(dict(steps=30, log_every=5, eval_every=10, checkpoint_every=10, keep=1))
    return config_lib.build(tree)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, loop.train(config, workdir)


def test_loss_falls_and_every_record_is_whole(run, config):
    workdir, finished = run
    assert finished.step == 30 and not finished.stopped
    records = record.read(workdir)
    train = [r for r in records if r["split"] == "train"]
    held_out = [r for r in records if r["split"] == "eval"]
    assert [r["step"] for r in train] == [5, 10, 15, 20, 25, 30] and [r["step"] for r in held_out] == [10, 20, 30]
    assert train[-1]["loss"] < train[0]["loss"] - 1 and held_out[-1]["bits_per_byte"] < held_out[0]["bits_per_byte"]
    for r in records:
        for name in ("moe/load", "moe/dropped", "moe/entropy", "moe/max_vio", "moe/dead", "aux/balance", "aux/router_z"):
            assert len(r[name]) == 2, (r, name)
        assert r["tokens_per_second"] > 0 and all(sum(load) == pytest.approx(1, abs=1e-4) for load in r["moe/load"])
    assert all(r["utilisation"] > 0 and max(r["moe/dropped"]) > 0 for r in train)
    assert all(max(r["moe/dropped"]) == 0 for r in held_out)  # evaluation is dropless
    assert held_out[-1]["perplexity"] == pytest.approx(np.exp(held_out[-1]["loss"]))
    assert held_out[-1]["targets"] == len(finished.prepared.eval.tokens) - 1
    nats = held_out[-1]["loss"] * held_out[-1]["targets"]
    assert held_out[-1]["bits_per_byte"] == pytest.approx(nats / np.log(2) / finished.prepared.eval.bytes)


def test_the_workdir_gives_the_model_back(run, config):
    workdir, finished = run
    assert transformer.resolve(read_config(workdir)) == transformer.resolve(config)
    model, params = moejax.load(workdir)
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(finished.variables))
    tokens = finished.prepared.eval.tokens[1:15][None].astype(np.int32)
    logits = moejax.logits(model, params, tokens)
    wanted = model.apply({"params": params["params"]}, tokens, positions_of(tokens), np.ones_like(tokens),
                         params["router"]).logits_BLV
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


def test_a_finished_run_evaluates_and_a_longer_one_goes_on(run, config):
    workdir, finished = run
    again = loop.train(config, workdir)
    assert again.step == 30 and again.evaluation["loss"] == finished.evaluation["loss"]


def test_other_data_is_refused_and_the_old_stays(run, config, tmp_path):
    workdir, finished = run
    source = pathlib.Path(config.data.source.replace("*", "text"))
    text = source.read_text()
    for change in (text + '\n{"text": "one more"}', text + "\n{"):
        source.write_text(change)
        with pytest.raises(config_lib.UserError):
            loop.train(config, workdir)
        assert load_prepared(workdir / "data").content == finished.prepared.content
    source.write_text(text)
    assert loop.train(config, workdir).evaluation["loss"] == finished.evaluation["loss"]


def test_nothing_is_compiled_after_the_first_step(config):
    setup = set_up(config)
    with jax.set_mesh(setup.mesh):
        state = setup.initialise()
        rng = np.random.default_rng(0)
        from moejax.train.benchmark import random_batch
        for _ in range(3):
            state, _, _ = setup.train_step(state, setup.put(random_batch(setup, rng)))
    assert setup.train_step._cache_size() == 1


def test_benchmark_reports_what_it_should(config):
    result = benchmark(config, steps=2)
    assert set(result) >= {"tokens_per_second", "step_seconds", "compile_seconds", "flops_per_token",
                           "matmul_ceiling_flops", "utilisation", "peak_memory_bytes"}
    assert all(value > 0 for name, value in result.items() if name != "platform")
    assert result["tokens_per_second"] == pytest.approx(8 * 20 / result["step_seconds"])
    json.dumps(result)


def changed(config, **changes):
    tree = config_lib.to_dict(config)
    for name, value in changes.items():
        group, key = name.split("__")
        tree[group][key] = value
    return config_lib.build(tree)


@pytest.mark.slow
def test_adapters_go_on_from_a_model_and_come_back_as_one(run, config, tmp_path):
    """The base stays as it was, the adapters learn, and what is loaded is their sum."""
    base, finished = run
    tuned = changed(config, train__init_from=str(base), train__steps=10, optimizer__warmup_steps=0, train__keep=2,
                    train__checkpoint_every=4, train__finetune={"lora_rank": 2, "lora": ["*attention/w_*", "*/moe/w_*"]})
    ended = loop.train(tuned, tmp_path / "straight")
    assert ended.evaluation["loss"] < finished.evaluation["loss"]
    model, variables = moejax.load(tmp_path / "straight")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), variables,
                 jax.device_get(ended.variables))
    _, before = moejax.load(base)
    assert jax.tree.structure(before["params"]) == jax.tree.structure(variables["params"])
    moved = {path: float(np.abs(a - b).max()) for path, a, b in zip(
        flat(before["params"]), jax.tree.leaves(before["params"]), jax.tree.leaves(variables["params"]))}
    assert {path[-1] for path, by in moved.items() if by > 0} == {"w_q", "w_k", "w_v", "w_o", "w_in", "w_out"}

    shutil.copytree(tmp_path / "straight", tmp_path / "broken")  # as it is if the run ends behind its second checkpoint
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "10")
    again = loop.train(tuned, tmp_path / "broken")
    assert again.evaluation["loss"] == ended.evaluation["loss"]
    straight, broken = (arrays_of(tmp_path / name / "checkpoints" / "10") for name in ("straight", "broken"))
    assert straight == broken and any("adapters" in name for name in straight["training"])


def arrays_of(checkpoint):
    """Shapes and hashes of all that a checkpoint holds, the optimizer's state included."""
    return json.loads((checkpoint / manifest.NAME).read_text().split("\n", 1)[1])["arrays"]


@pytest.mark.slow
def test_a_run_ends_when_its_patience_does_and_keeps_the_best(config, tmp_path):
    """Without any learning no evaluation is better than the first."""
    idle = changed(config, optimizer__learning_rate=0.0, moe__bias_rate=0.0, train__eval_every=3,
                   train__checkpoint_every=30, train__finetune={"patience": 2})
    ended = loop.train(idle, tmp_path)
    assert (ended.step, ended.stopped, ended.best.step) == (9, False, 3)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [3, 9]
    again = loop.train(idle, tmp_path)
    assert again.step == 9 and again.evaluation["loss"] == ended.evaluation["loss"]
    longer = loop.train(changed(idle, train__finetune={"patience": 3}), tmp_path)
    assert longer.step == 12 and longer.best.step == 3


@pytest.mark.slow
def test_a_dense_student_learns_from_a_sparse_teacher(run, config, tmp_path):
    """With the teacher alone as its aim it comes to score as the teacher does; the text's own targets count for nothing."""
    teacher, finished = run
    student = changed(config, moe__every=0, train__eval_every=30, train__checkpoint_every=30, train__finetune={
        "teacher": str(teacher), "teacher_weight": 1.0})
    ended = loop.train(student, tmp_path / "student")
    told = [r["aux/teacher"] for r in record.read(tmp_path / "student") if r["split"] == "train"]
    assert told[-1] < 0.3 * told[0]
    assert ended.evaluation["loss"] < finished.evaluation["loss"] + 0.5
    (tmp_path / "other").mkdir()
    with pytest.raises(config_lib.UserError, match="was not trained with the tokenizer of this run"):
        loop.train(changed(student, data__tokenizer="sentencepiece", model__vocab_size=300), tmp_path / "other")
    with pytest.raises(config_lib.UserError, match="model of another kind, head or vocabulary"):
        loop.train(changed(student, model__vocab_size=300), tmp_path / "third")
