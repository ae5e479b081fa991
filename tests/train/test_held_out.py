"""Runs on several tasks: what is recorded, and that nothing depends on how it is cut."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from moejax import commands
from moejax import config as config_lib
from moejax.checkpoint import Store, read_config
from moejax.main import main
from moejax.metrics.record import read
from moejax.train import loop
from moejax.train.held_out import evaluation_line, run_evaluation
from moejax.train.setup import set_up


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One device, for which compiling takes less time."""
    own = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *backend: own)
        yield


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    (folder / "r.jsonl").write_text("\n".join(
        json.dumps({"text": f"number {n}", "label": "odd" if n % 2 else "even"}) for n in range(60)))
    return str(folder / "r.jsonl")


def config(records, tasks=("parity", "words"), **train):
    known = {"parity": {"source": records, "objective": "seq2seq", "input": "parity: {text}", "target": "{label}"},
             "words": {"source": records, "objective": "next_token"}}
    tree = config_lib.default()
    tree.model.update(dict(vocab_size=257, layers=1, embed=16, heads=2, kv_heads=1, head_dim=6, ffn=12))
    tree.moe.update(dict(num_experts=5, ffn=8, bias_rate=0.01))
    tree.data.update(dict(tokenizer="bytes", length=20, batch_size=8, eval_fraction=0.4))
    tree.data.task = {"tasks": {name: known[name] for name in tasks}}
    tree.optimizer.update(dict(schedule="constant", warmup_steps=2))
    tree.train.update(dict(steps=6, log_every=1, eval_every=3, checkpoint_every=3) | train)
    tree.train.finetune = {"metric": f"task/{tasks[-1]}/loss"}
    return tree


@pytest.fixture(scope="module")
def run(records, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    tree = config(records)
    tree.model.architecture = {"router_tasks": 2}
    return workdir, loop.train(config_lib.build(tree), workdir)


def weighted(record, weights):
    return sum(record[f"task/{name}/loss"] * weight for name, weight in weights.items())


@pytest.mark.slow
def test_records_hold_each_task_and_add_up(run):
    workdir, finished = run
    records = read(workdir)
    train = [r for r in records if r["split"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"] - 0.1
    for r in train:
        shares = {name: r[f"task/{name}/share"] for name in ("parity", "words")}
        assert sum(shares.values()) == pytest.approx(1) and weighted(r, shares) == pytest.approx(r["loss"], rel=1e-5)
    held_out = finished.evaluation
    tasks = finished.prepared.tasks
    targets = {"parity": len(tasks["parity"].eval.target.tokens), "words": len(tasks["words"].eval.tokens) - 1}
    assert held_out["targets"] == sum(targets.values())
    assert weighted(held_out, targets) / held_out["targets"] == pytest.approx(held_out["loss"])
    assert held_out["tasks/loss"] == pytest.approx(weighted(held_out, {"parity": 0.5, "words": 0.5}))
    assert held_out["task/words/bits_per_byte"] == pytest.approx(
        held_out["task/words/loss"] / np.log(2) * targets["words"] / tasks["words"].eval.bytes)
    assert 0 <= held_out["task/parity/sequence_accuracy"] <= 1 and "task/words/sequence_accuracy" not in held_out
    assert np.shape(held_out["tasks/load"]) == (1, 2, 5) and np.shape(held_out["tasks/js"]) == (1, 2, 2)
    np.testing.assert_allclose(np.sum(held_out["tasks/load"], axis=-1), 1, atol=1e-5)
    assert held_out["tasks/names"] == ["parity", "words"]
    line = evaluation_line(held_out)
    assert f"mean over tasks {held_out['tasks/loss']:.4f} (parity " in line and "\n" not in line


@pytest.mark.slow
def test_padding_of_the_last_batch_changes_nothing(run):
    workdir, finished = run
    stored = read_config(workdir)
    setup = set_up(dataclasses.replace(stored, data=dataclasses.replace(stored.data, eval_batch_size=31)))
    with jax.set_mesh(setup.mesh):
        found = run_evaluation(setup, finished.prepared, finished.variables["params"], finished.variables["router"], 6)
    for name, value in finished.evaluation.items():
        if name.startswith("task") and name != "tasks/names" or name in ("loss", "accuracy", "targets"):
            np.testing.assert_allclose(value, found[name], rtol=2e-6, atol=2e-6, err_msg=name)


@pytest.mark.slow
def test_a_run_that_was_stopped_is_the_run_that_was_not(run, records, tmp_path):
    workdir, finished = run
    for steps in (3, 6):
        tree = config(records, steps=steps)
        tree.model.architecture = {"router_tasks": 2}
        again = loop.train(config_lib.build(tree), tmp_path)
    one, other = ([{k: v for k, v in r.items() if k not in ("tokens_per_second", "utilisation", "seconds")}
                   for r in read(folder)] for folder in (workdir, tmp_path))
    assert one == other
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(finished.variables), jax.device_get(again.variables))
    positions = [Store(folder, read_only=True).restore({}).data["loader"] for folder in (workdir, tmp_path)]
    assert positions[0] == positions[1] and positions[0]["batches"] == 6 and sum(positions[0]["taken"].values()) == 48


@pytest.mark.slow
@pytest.mark.parametrize("task", ["parity", "words"])
def test_a_mixture_of_one_task_trains_as_the_task_alone_bit_for_bit(records, tmp_path, task):
    mixed = config(records, tasks=(task,), steps=3)
    alone = config(records, tasks=(task,), steps=3)
    options = dict(alone.data.task["tasks"][task])
    alone.data.source = options.pop("source")
    alone.data.task, alone.train.finetune = options, None
    one, other = (loop.train(config_lib.build(tree), tmp_path / str(n)) for n, tree in enumerate((mixed, alone)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one.variables), jax.device_get(other.variables))
    for name in ("loss", "accuracy", "perplexity", "targets", "moe/load"):
        assert one.evaluation[name] == other.evaluation[name], name
    assert one.evaluation[f"task/{task}/loss"] == other.evaluation["loss"]


@pytest.mark.slow
def test_the_best_goes_by_a_task_and_prompts_need_one(run, records, capfd):
    workdir, finished = run
    assert finished.best.metric == "task/words/loss" and finished.best.value == finished.evaluation["task/words/loss"]
    assert commands.sample(config_lib.build(config(records, sample_prompt="x")), finished, ()) == (
        "no sample: this model has several tasks; name one with --task (parity, words)")
    generate = ("main", f"--workdir={workdir}", "--mode=generate", "--prompt=number 3", "--max_new_tokens=2")
    assert main([*generate]) == 2 and "name one with --task (parity, words)" in capfd.readouterr().err
    assert main([*generate, "--task=word"]) == 2 and "did you mean words?" in capfd.readouterr().err


@pytest.mark.slow
def test_prompts_and_pairs_of_a_task_are_answered(run, tmp_path, capfd):
    workdir = shutil.copytree(run[0], tmp_path / "copy")
    assert main(["main", f"--workdir={workdir}", "--mode=generate", "--prompt=number 3", "--max_new_tokens=2",
                 "--task=words"]) == 0
    assert capfd.readouterr().out.startswith("number 3")
    assert main(["main", f"--workdir={workdir}", "--mode=eval", "--answers=3", "--max_new_tokens=2"]) == 0
    assert "parity: bleu" in capfd.readouterr().out
    assert len((workdir / "answers_parity.jsonl").read_text().splitlines()) == 3
    record = read(workdir)[-1]
    assert record["task/parity/answers"] == 3 and "task/parity/exact_match" in record
