"""Several processes compute what one does: the same batches, losses and checkpoints; and they stop together."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.faults import damage
from benchmarks.faults.scene import address, losses
from moejax import processes
from moejax.checkpoint import read_config
from moejax.checkpoint.verify import verify
from moejax.data.loader import train_loader
from moejax.data.prepared import load_prepared
from moejax.data.rows import make_rows
from moejax.main import main

ROOT = Path(__file__).parent.parent
CONFIG = """\
from moejax import config


def get_config():
    c = config.default()
    c.model.update(dict(vocab_size=264, layers=1, embed=16, heads=4, kv_heads=4, head_dim=4, ffn=24))
    c.moe.update(dict(num_experts=4, experts_per_token=2, ffn=12, bias_rate=0.01, block_rows=16))
    c.data.update(dict(source="corpus.jsonl", tokenizer="bytes", length=16, batch_size=16, eval_fraction=0.2))
    c.train.update(dict(steps=12, checkpoint_every=3, keep=9, eval_every=100, eval_batches=1, log_every=1,
                        sample_prompt=""))
    return c
"""
MEETING = """\
import json, sys
from pathlib import Path
import jax
import numpy as np
from moejax import processes, sharding
from moejax.config import MeshConfig, UserError

processes.start(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), 100)
here, devices = jax.process_index(), jax.devices()
whole_BL = np.arange(16 * 8).reshape(16, 8)
rows = []
for sizes, dealt in ((dict(data=8), devices), (dict(replica=2, expert=4), devices), (dict(data=4, model=2), devices),
                     (dict(model=4, context=2), devices), (dict(context=8), devices), (dict(expert=2, context=4), devices),
                     (dict(data=8), devices[::2] + devices[1::2])):
    mesh = sharding.make_mesh(MeshConfig(**{"data": 1} | sizes), dealt)
    rows.append(sharding.batch_rows(mesh, 16))
    placed = sharding.put_batch(mesh, {"tokens": whole_BL[rows[-1]]})["tokens"]
    assert placed.shape == whole_BL.shape
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole_BL[shard.index])
if sys.platform == "linux":
    assert len(list(Path("/proc/self/task").iterdir())) > processes.THREADS  # XLA:CPU took the number
agree = processes.agree_by_step()
answers = [agree(here == 1 and step == 3) for step in range(6)]
try:
    with processes.same_fate():
        if here > 1:
            raise UserError("not found")
except UserError as error:
    print(json.dumps([[row.tolist() for row in rows], answers, str(error)]))
"""
WATCHED = """\
import hashlib, sys, time
from jax.experimental.multihost_utils import process_allgather
from moejax.main import main
from moejax.train import loop

set_up = loop.set_up

def watched(config):
    setup = set_up(config)
    def put(rows):
        batch = setup.put(rows)
        whole = [process_allgather(batch[name], tiled=True).tobytes() for name in sorted(batch)]
        print("fed", hashlib.md5(b"".join(whole)).hexdigest(), flush=True)
        time.sleep(PAUSE)
        return batch
    return setup._replace(put=put)

loop.set_up = watched
sys.exit(main())
"""
"""The command, but each process prints a hash of every global batch, and waits so that a signal meets it in the middle."""


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:  # the launcher hands the signal on
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def fill(folder: Path) -> None:
    """Writes a config file c.py and a corpus."""
    rng = np.random.default_rng(0)
    words = "a flock of sheep went over the hill and down to some water where it met two goats".split()
    texts = [" ".join(rng.choice(words, rng.integers(5, 40))) for _ in range(60)]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (folder / "c.py").write_text(CONFIG)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with c.py and a corpus."""
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments: str, devices: int = 1) -> subprocess.Popen:
    """Python with arguments; its compiled code is not optimised, and kept for the next process."""
    settings = {"PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))), "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
                             "--xla_llvm_disable_expensive_passes=true",
                "JAX_COMPILATION_CACHE_DIR": str(Path("compiled").absolute()),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    STARTED.append(subprocess.Popen([sys.executable, *arguments], env=os.environ | settings, stdout=subprocess.PIPE,
                                    stderr=subprocess.PIPE, text=True))
    return STARTED[-1]


def several(count: int, devices: int, *arguments: str, pause: float = 0) -> list[subprocess.Popen]:
    """The watched command in `count` processes."""
    coordinator = address()
    return [command("-c", WATCHED.replace("PAUSE", str(pause)), *arguments, f"--coordinator={coordinator}",
                    f"--num_processes={count}", f"--process_id={index}", devices=devices) for index in range(count)]


def launch(count: int, devices: int, *arguments: str) -> subprocess.Popen:
    return command(str(ROOT / "launch/local.py"), f"--processes={count}", f"--devices={devices}", "--", *arguments)


def finish(started: list[subprocess.Popen], status: int = 0) -> list[str]:
    """What each process printed, once all have ended as they should."""
    ended = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [status] * len(started), ended
    return [out for out, _ in ended]


def fed(out: str) -> list[str]:
    return re.findall(r"^fed (\w+)$", out, re.MULTILINE)


def batches(workdir: Path, first: int, last: int) -> list[str]:
    """Hashes of the batches that one process would feed in these steps."""
    prepared = load_prepared(workdir / "data")
    config = read_config(workdir)
    loader = train_loader(make_rows(prepared.train, prepared.tokenizer, config), config)
    taken = [next(loader) for _ in range(last)][first:]
    return [hashlib.md5(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest() for batch in taken]


def cut(workdir: Path, step: int) -> None:
    """Takes a run back to one of its checkpoints."""
    for name in os.listdir(workdir / "checkpoints"):
        if name.isdigit() and int(name) > step:
            shutil.rmtree(workdir / "checkpoints" / name)
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


@pytest.mark.parametrize("flags, words", (
    (("--num_processes=2",), "--coordinator and --process_id missing; give all three"),
    (("--coordinator=localhost:80", "--process_id=0"), "--num_processes missing"),
    (("--coordinator=localhost", "--num_processes=2", "--process_id=0"), "--coordinator=localhost must have the form"),
    (("--coordinator=h:70000", "--num_processes=2", "--process_id=0"), "--coordinator=h:70000 must have the form"),
    (("--coordinator=h:80", "--num_processes=0", "--process_id=0"), "--num_processes=0 must be at least 1"),
    (("--coordinator=h:80", "--num_processes=2", "--process_id=2"), "--process_id=2 must be at least 0 and less than"),
    (("--num_processes=two",), "--num_processes=two: must be an integer"),
))
def test_wrong_flags(here, capfd, flags, words):
    assert main(["main", "--config=c.py", "--workdir=w", *flags]) == 2
    err = capfd.readouterr().err
    assert err.startswith("moejax: ") and words in err and err.count("\n") == 1
    assert not Path("w").exists()


def test_nobody_at_the_coordinator_is_one_line(here):
    started = [command("-m", "moejax.main", "--config=c.py", "--workdir=w", f"--coordinator={address()}",
                       "--num_processes=2", f"--process_id={index}", "--coordinator_timeout=2") for index in range(2)]
    for process in started:
        _, err = process.communicate(timeout=100)
        assert process.returncode == 2 and "not all processes met there within 2 s" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("environ, metadata, several", (
    ({}, {}, False),
    ({"SLURM_NTASKS": "4"}, {}, False),  # the batch script itself, or an allocation
    ({"SLURM_STEP_NUM_TASKS": "1"}, {}, False),
    ({"SLURM_STEP_NUM_TASKS": "4"}, {}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, {}, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, True),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}, True),
    ({}, {"worker-network-endpoints": "n:0:10.0.0.2"}, False),
    ({}, {"worker-network-endpoints": "n:0:10.0.0.2,n:1:10.0.0.3"}, True),
    ({}, {"worker-network-endpoints": "n:0:10.0.0.2", "tpu-env": "A: '1'\nMEGASCALE_NUM_SLICES: '2'\n"}, True),
))
def test_clusters(environ, metadata, several):
    assert processes.in_cluster(environ, lambda key: metadata.get(key, "")) == several


def test_processes_feed_what_their_devices_hold_and_agree(here):
    coordinator = address()
    outs = finish([command("-c", MEETING, coordinator, "4", str(index), devices=2) for index in range(4)])
    rows, answers, errors = zip(*(json.loads(re.search(r"^\[\[.*", out, re.MULTILINE)[0]) for out in outs))
    everything = list(range(16))
    data, both, model, all_rows, context, expert, dealt = zip(*rows)
    assert sum(data, []) == sum(both, []) == sum(model, []) == everything
    assert all(part == everything for part in (*all_rows, *context))
    assert expert == (everything[:8], everything[:8], everything[8:], everything[8:])
    assert dealt[1] == [2, 3, 10, 11] and sorted(sum(dealt, [])) == everything
    assert answers == ([False, False, False, False, True, False],) * 4
    assert errors == ("", "", "not found", "")


@pytest.mark.slow  # test_fault_suite.py stops a job by a signal and goes on with another number of processes
def test_a_signal_to_one_process_stops_both_and_one_goes_on(here):
    """From one process to two, past a damaged checkpoint, and from two to one."""
    flags = ("--config=c.py", "--config.mesh.data=1", "--config.mesh.expert=4", "--config.mesh.model=2")
    straight, broken = Path("straight"), Path("broken")
    assert main(["main", *flags, "--workdir=straight"]) == 0
    shutil.copytree(straight, broken)
    cut(broken, 3)
    damaged = shutil.copytree(straight / "checkpoints" / "6", broken / "checkpoints" / "6")
    largest = max(damage.files(damaged / "model"), key=lambda path: path.stat().st_size)
    largest.write_bytes(bytes(byte ^ 1 for byte in largest.read_bytes()))
    assert any(wrong.startswith("array model/") for wrong in verify(damaged).wrong)

    started = several(2, 4, *flags, "--workdir=broken", pause=0.3)
    while max(losses(broken))[0] < 5:
        assert all(process.poll() is None for process in started), finish(started)
        time.sleep(0.01)
    started[1].send_signal(signal.SIGTERM)
    first, second = finish(started)
    stopped = max(losses(broken))[0]
    assert 5 <= stopped < 12 and f"stopped at step {stopped}, all saved" in first and "step" not in second
    assert (broken / "checkpoints" / str(stopped)).exists()
    assert fed(first) == fed(second) == batches(broken, 3, stopped)

    assert main(["main", *flags, "--workdir=broken"]) == 0
    assert losses(broken) == pytest.approx(losses(straight), rel=1e-5)
    assert len(losses(straight)) == 13
    assert not [verify(folder).wrong for folder in (broken / "checkpoints").iterdir() if verify(folder).wrong]


def test_the_launcher_shows_errors_and_ends_what_is_left(here):
    (here / "x.py").write_text("import sys, time\nif '--process_id=1' in sys.argv: 1 / 0\ntime.sleep(60)\n")
    process = launch(2, 1, "--config=x.py", "--workdir=w")
    _, err = process.communicate(timeout=50)
    assert process.returncode == 2 and err == "[1] moejax: x.py, line 2: ZeroDivisionError: division by zero\n"


def test_the_launcher_hands_signals_on(here):
    (here / "x.py").write_text("import signal, time\nfrom pathlib import Path\n"
                               "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
                               "Path(f'waiting{time.time_ns()}').touch()\ntime.sleep(60)\n")
    process = launch(2, 1, "--config=x.py", "--workdir=w")
    while len(list(here.glob("waiting*"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=50)
    assert process.returncode == 130 and err.count("moejax: interrupted") == 2


def test_the_launcher_begins_again_as_often_as_it_may(here):
    (here / "x.py").write_text("import os, signal, sys\nfrom pathlib import Path\n"
                               "if '--process_id=1' in sys.argv:\n    Path(f'begun{os.getpid()}').touch()\n"
                               "    os.kill(os.getpid(), signal.SIGKILL)\nimport time\ntime.sleep(60)\n")
    process = command(str(ROOT / "launch/local.py"), "--processes=2", "--devices=1", "--restarts=1", "--", "--config=x.py",
                      "--workdir=w")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGKILL and len(list(here.glob("begun*"))) == 2
    assert err.count("launch: process 1 was ended by SIGKILL") == 2 and err.count("beginning again (0 more") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGKILL, signal.SIGSTOP))
@pytest.mark.parametrize("gone", (0, 1))
def test_a_process_that_is_killed_or_stands_still_is_named_by_the_others(here, number, gone):
    flags = ("--config=c.py", "--config.mesh.data=2")
    started = several(2, 1, *flags, "--workdir=w", pause=0.3)
    while not Path("w/metrics.jsonl").exists() or max(losses(Path("w")), default=(0,))[0] < 4:
        assert all(process.poll() is None for process in started), finish(started)
        time.sleep(0.05)
    started[gone].send_signal(number)
    begin = time.monotonic()
    _, err = started[1 - gone].communicate(timeout=100)
    assert started[1 - gone].returncode not in (0, None) and time.monotonic() - begin < 60, err
    assert f"process {gone}" in err or gone == 0 and "leader" in err, err
    started[gone].kill()
    started[gone].communicate()
    assert main(["main", *flags, "--workdir=w", "--config.mesh.data=8"]) == 0  # goes on from the last checkpoint
    assert max(losses(Path("w")))[0] == 12


@pytest.mark.slow
def test_processes_with_other_configs_end_and_name_the_key(here):
    coordinator = address()
    started = [command("-m", "moejax.main", "--config=c.py", "--workdir=w", f"--config.seed={7 * index}",
                       f"--coordinator={coordinator}", "--num_processes=2", f"--process_id={index}") for index in range(2)]
    begin = time.monotonic()
    for process in started:
        _, err = process.communicate(timeout=100)
        assert process.returncode == 2
        assert "process 1 has another config.seed than process 0 (7, not 0)" in err and "Traceback" not in err
    assert time.monotonic() - begin < 60 and not Path("w").exists()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of one process with one device."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        fill(folder)
        patch.chdir(folder)
        finish(several(1, 1, "--config=c.py", "--workdir=w", "--config.train.steps=5"))
        return losses(folder / "w")


@pytest.mark.slow
@pytest.mark.parametrize("count, devices, mesh", (
    (2, 4, "data=8"),
    (2, 4, "data=2 expert=2 model=2"),
    (2, 4, "data=1 model=2 context=4"),
    (2, 1, "data=1 context=2"),
    (4, 2, "data=2 expert=4"),
    (4, 2, "data=1 model=4 context=2"),
    (4, 2, "data=1 replica=2 expert=2 model=2"),
))
def test_every_mesh_over_processes_has_the_losses_of_one(here, alone, count, devices, mesh):
    flags = ("--config=c.py", "--workdir=w", *(f"--config.mesh.{size}" for size in mesh.split()))
    outs = finish(several(count, devices, *flags, "--config.train.steps=5"))
    assert losses(Path("w")) == pytest.approx(alone, rel=1e-5) and len(alone) == 6
    assert all(fed(out)[:5] == batches(Path("w"), 0, 5) for out in outs)  # behind them the batch of the evaluation


@pytest.mark.slow
def test_all_modes_in_two_processes(here, capfd):
    flags = ("--config.mesh.data=1", "--config.mesh.expert=4", "--config.mesh.model=2")
    sample = ("--config.train.sample_prompt=a flock", "--config.train.steps=2")
    out, = finish([launch(2, 4, "--config=c.py", "--workdir=w", *flags, *sample)])
    assert "\nsample: a flock|" in out and out.endswith("(step 2), data/\n")
    mode = ("--workdir=w", "--mode=generate", "--prompt=a flock", "--prompt=the", "--temperature=0", "--max_new_tokens=8")
    generated, = finish([launch(2, 4, *mode)])
    capfd.readouterr()
    assert main(["main", *mode]) == 0
    assert generated.endswith(capfd.readouterr().out)
    before = losses(Path("w"))
    out, = finish([launch(2, 4, "--workdir=w", "--mode=eval")])
    assert "step 2  held-out loss" in out and losses(Path("w")) == pytest.approx(before, rel=1e-6)
    out, = finish([launch(2, 4, "--config=c.py", "--mode=benchmark", *flags)])
    assert json.loads(out.splitlines()[-1])["devices"] == 8
    process = launch(2, 4, "--workdir=w", "--mode=eval", "--step=7")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and err.startswith("[0] moejax: ") and "--step=7" in err and err.count("\n") == 1
