"""Records: hand-made routing gives exact numbers, and files survive a kill."""

import json
import math

import numpy as np
import pytest

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
