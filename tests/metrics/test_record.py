"""Records: hand-made routing gives exact numbers, and files survive a kill."""

import json
import math
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog

from moejax.metrics import record
from moejax.moe.types import ExpertLoad, LayerRecord


def layer(assigned, received, tokens, entropy, balance=1.0):
    assigned, received = np.array(assigned), np.array(received)
    load = ExpertLoad(assigned, assigned - received, received, np.zeros_like(assigned), np.int32(tokens),
                      np.float32(entropy))
    return LayerRecord({"balance": np.float32(balance)}, load, {})


def test_routing_summary_by_hand():
    summary = record.routing_summary([layer([6, 2, 0, 0], [3, 2, 0, 0], 4, 4 * math.log(2)),
                                      layer([2, 2, 2, 2], [2, 2, 2, 2], 4, 0)])
    assert summary == {"moe/load": [[0.75, 0.25, 0, 0], [0.25] * 4], "moe/dropped": [0.375, 0.0],
                       "moe/replayed": [0.0, 0.0], "moe/entropy": [pytest.approx(math.log(2)), 0.0],
                       "moe/max_vio": [2.0, 0.0], "moe/dead": [2, 0]}
    assert record.routing_summary([]) == {} == record.loss_summary([])


def test_a_record_in_which_an_expert_received_other_than_what_was_sent_is_refused():
    whole = layer([6, 2], [3, 2], 4, 0.0)
    record.routing_summary([whole])
    torn = whole.replace(load=whole.load.replace(received_E=np.array([3, 1])))
    with pytest.raises(RuntimeError, match="layer 1, expert 1: 2 pairs were sent, 1 received and 0 dropped"):
        record.routing_summary([whole, torn])


def test_batches_add_up():
    total, = record.total_records([[layer([1, 2], [1, 1], 3, 0.5, 1.0)], [layer([3, 0], [2, 0], 3, 1.5, 2.0)]])
    np.testing.assert_array_equal(total.load.assigned_E, [4, 2])
    np.testing.assert_array_equal(total.load.received_E, [3, 1])
    assert (total.load.tokens, total.load.entropy, total.losses["balance"]) == (6, 2.0, 1.5)


def test_reader_survives_torn_lines_and_repeated_steps(tmp_path):
    recorder = record.Recorder(tmp_path)
    recorder.write({"step": 1, "split": "train", "loss": 3.0, "moe/max_vio": [0.5, 1.0], "moe/load": [[1.0], [1.0]]})
    recorder.write({"step": 2, "split": "train", "loss": 2.0})
    recorder.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "spl')
    again = record.Recorder(tmp_path)
    again.write({"step": 2, "split": "train", "loss": 2.5})
    again.write({"step": 2, "split": "eval", "loss": 2.6})
    again.close()
    assert [(r["step"], r["split"], r["loss"]) for r in record.read(tmp_path)] == [
        (1, "train", 3.0), (2, "train", 2.5), (2, "eval", 2.6)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["loss"] == 2.6
    assert list((tmp_path / "tensorboard").glob("events*"))


def events(path: Path) -> list[Event]:
    content, found = path.read_bytes(), []
    while content:
        size = int.from_bytes(content[:8], "little")
        found.append(Event.FromString(content[12:12 + size]))
        content = content[16 + size:]
    return found


def written(workdir) -> list[str]:
    return (workdir / "metrics.jsonl").read_text().splitlines()


def test_going_on_takes_out_torn_lines_and_what_was_recorded_after_the_checkpoint(tmp_path):
    recorder = record.Recorder(tmp_path)
    for step in range(1, 6):
        recorder.write({"step": step, "split": "train", "loss": float(step)})
    recorder.write({"step": 3, "split": "eval", "loss": 0.5})
    recorder.close()
    whole = written(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff{}\n[1]\n{"step": 2}\n{"step": 6, "split": "tr')
    again = record.Recorder(tmp_path)
    again.go_on_after(3)
    assert written(tmp_path) == [*whole[:3], whole[5]]
    again.write({"step": 4, "split": "train", "loss": 4.0})
    again.close()
    assert [json.loads(line)["step"] for line in written(tmp_path)] == [1, 2, 3, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
    first, second = (events(path) for path in sorted((tmp_path / "tensorboard").iterdir()))
    assert [event.step for event in first if event.summary.value] == [1, 2, 3, 4, 5, 3]
    # With this TensorBoard hides what other files of the folder have from step 4 on.
    assert [(event.step, event.session_log.status) for event in second if event.HasField("session_log")] == [
        (4, SessionLog.START)]
    assert [event.step for event in second if event.summary.value] == [4]


def test_going_on_after_the_last_record_leaves_the_file_alone(tmp_path):
    recorder = record.Recorder(tmp_path)
    recorder.go_on_after(0)
    recorder.write({"step": 1, "split": "train", "loss": 1.0})
    before = (tmp_path / "metrics.jsonl").stat()
    recorder.go_on_after(1)
    after = (tmp_path / "metrics.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    recorder.go_on_after(0)
    assert written(tmp_path) == []
    recorder.close()


@given(st.lists(st.integers(1, 9), max_size=6), st.binary(max_size=12), st.integers(0, 60), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_whatever_a_kill_leaves_every_reader_reads_on(steps, garbage, cut, step):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        lines = "".join(json.dumps({"step": s, "split": "train", "loss": 0.1}) + "\n" for s in steps).encode()
        path.write_bytes(lines[:max(len(lines) - cut, 0)] + garbage)
        record.read(Path(folder))
        recorder = record.Recorder(Path(folder))
        recorder.go_on_after(step)
        recorder.write({"step": step + 1, "split": "train", "loss": 0.2})
        recorder.close()
        found = [json.loads(line) for line in path.read_bytes().splitlines()]
        assert all(one["step"] <= step for one in found[:-1]) and found[-1]["step"] == step + 1
        assert record.read(Path(folder))[-1]["loss"] == 0.2


def test_a_full_disk_costs_records_and_not_the_run(tmp_path, capsys):
    recorder = record.Recorder(tmp_path)
    recorder.write({"step": 1, "split": "train", "loss": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, before[1]))
    try:
        for step in range(2, 40):
            recorder.write({"step": step, "split": "train", "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "WARNING" in capsys.readouterr().err
    recorder.write({"step": 40, "split": "train", "loss": 2.0})
    recorder.close()
    assert [json.loads(line)["step"] for line in written(tmp_path)] == [1, 40]
