"""A run that was interrupted, killed and continued is bit for bit the run that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from benchmarks.faults import scene
from moejax.checkpoint import Store, place, read_config
from moejax.data.loader import train_loader
from moejax.data.prepared import load_prepared
from moejax.data.rows import make_rows
from moejax.metrics.record import read
from moejax.train.loop import items
from moejax.train.setup import set_up

ROOT = Path(__file__).parent.parent
CONFIG = """\
from moejax import config


def get_config():
    c = config.default()
    c.model.update(dict(vocab_size=300, layers=2, embed=16, heads=2, kv_heads=1, head_dim=6, ffn=24, dropout=0.1))
    c.moe.update(dict(num_experts=5, experts_per_token=2, ffn=12, jitter=0.1, bias_rate=0.01, block_rows=4))
    c.data.update(dict(source="corpus.jsonl", length=24, batch_size=16, eval_fraction=0.2))
    c.optimizer.update(dict(warmup_steps=5))
    c.train.update(dict(steps=20, checkpoint_every=10, eval_every=10, eval_batches=1, log_every=1))
    return c
"""
SLOW_MAIN = """\
import signal, sys, time
from moejax.main import main
from moejax.metrics.record import Recorder

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells may ignore it
write = Recorder.write
Recorder.write = lambda self, record: (write(self, record), time.sleep(0.1))
sys.exit(main())
"""
"""The command with a pause after every record, so that a signal meets it in the middle."""


def start(folder: Path, workdir: str, overrides: tuple[str, ...], slow: bool) -> subprocess.Popen:
    """The same command each time. Compiled code without optimisation, kept for the next process, saves the time."""
    settings = {"PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))), "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
                "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    program = ["-c", SLOW_MAIN] if slow else ["-m", "moejax.main"]
    return subprocess.Popen([sys.executable, *program, "--config=c.py", f"--workdir={workdir}", *overrides], cwd=folder,
                            env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, status: int, warned: str = "") -> str:
    out, err = process.communicate(timeout=110)
    assert process.returncode == status and warned in err, (process.returncode, out, err)
    return out


def wait_until(process: subprocess.Popen, true) -> None:
    while not true():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def steps_recorded(workdir: Path) -> list[int]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def checkpoint(workdir: Path, step: int):
    """Every array of a checkpoint and the position in the data."""
    setup = set_up(read_config(workdir))
    here = SingleDeviceSharding(jax.devices()[0])
    store = Store(workdir, read_only=True)
    restored = store.restore(place(items(setup.shapes), jax.tree.map(lambda _: here, items(setup.shapes))), step)
    store.close()
    return restored.items, restored.data


def batches(workdir: Path, position: dict | None, count: int) -> list[dict[str, np.ndarray]]:
    prepared = load_prepared(workdir / "data")
    config = read_config(workdir)
    loader = train_loader(make_rows(prepared.train, prepared.tokenizer, config), config)
    if position is not None:
        loader.set_state(position)
    return [next(loader) for _ in range(count)]


@pytest.mark.slow  # test_fault_suite.py kills and continues runs, too
@pytest.mark.parametrize("overrides", (
    ("--config.data.tokenizer=bytes",),
    ("--config.train.microbatches=2", "--config.optimizer.name=muon"),
), ids=("bytes", "sentencepiece_microbatches_muon"))
def test_interrupted_killed_and_continued_equals_straight(tmp_path, overrides):
    rng = np.random.default_rng(0)
    words = "a flock of sheep went over the hill and down to some water where it met two goats".split()
    texts = [" ".join(rng.choice(words, rng.integers(5, 40))) for _ in range(150)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "c.py").write_text(CONFIG)
    straight, broken = tmp_path / "straight", tmp_path / "broken"

    finish(start(tmp_path, "straight", overrides, slow=False), 0)

    process = start(tmp_path, "broken", overrides, slow=True)
    wait_until(process, lambda: steps_recorded(broken)[-1:] >= [4])
    process.send_signal(signal.SIGINT)
    assert "all saved; the same command goes on" in finish(process, 0)
    stopped = steps_recorded(broken)[-1]
    assert 4 <= stopped < 10 and (broken / "checkpoints" / str(stopped)).exists()

    process = start(tmp_path, "broken", overrides, slow=True)
    wait_until(process, lambda: (broken / "checkpoints" / "10").exists() and steps_recorded(broken)[-1] >= 12)
    process.kill()
    assert f"continuing at step {stopped}\n" in finish(process, -signal.SIGKILL)
    assert max(int(name) for name in os.listdir(broken / "checkpoints") if name.isdigit()) == 10

    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 19, "split": "tr')
    torn = broken / "checkpoints" / "20.orbax-checkpoint-tmp"
    shutil.copytree(broken / "checkpoints" / "10", torn)
    shutil.rmtree(torn / "training")
    shutil.copytree(broken / "checkpoints" / "10", broken / "checkpoints" / "20")
    position = checkpoint(broken, 10)[1]["loader"]
    for ours, theirs in zip(batches(broken, position, 7), batches(straight, None, 17)[10:]):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)

    assert "continuing at step 10\n" in finish(start(tmp_path, "broken", overrides, slow=False), 0, (
        "checkpoints/20 is damaged: manifest.json is that of step 10; taking that of step 10 instead\n"))
    assert steps_recorded(broken) == steps_recorded(straight)
    for step in (10, 20):
        (ours, our_position), (theirs, their_position) = checkpoint(broken, step), checkpoint(straight, step)
        assert our_position == their_position
        differing = [jax.tree_util.keystr(path) for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True)
            if np.asarray(a).tobytes() != np.asarray(b).tobytes()]
        assert not differing
    assert scene.records(broken) == scene.records(straight)
    assert [record["step"] for record in read(straight) if record["split"] == "train"] == list(range(1, 21))
