"""The command line through other objectives: pre-train, fine-tune with a new head, evaluate, write."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from moejax import commands
from moejax.config import build
from moejax.data.tokenizers import ByteTokenizer
from moejax.evaluation.labels import label_metrics
from moejax.main import main
from moejax.metrics.record import read
from moejax.metrics.text import text_metrics

CONFIG = """\
from moejax import config


def get_config(kind):
    c = config.default()
    c.model.update(dict(kind=kind, vocab_size=300, layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, ffn=12,
                        max_length=40))
    c.moe.update(dict(num_experts=3, experts_per_token=1, renormalize=False))
    c.data.update(dict(source={source!r}, tokenizer="bytes", length=24, batch_size=8, eval_fraction=0.3))
    c.mesh.data = 8
    c.train.update(dict(steps=2, log_every=1))
    return c
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A config file c.py and records with text, target and label."""
    lines = [json.dumps({"text": f"number {n}", "target": str(n * n), "label": "odd" if n % 2 else "even"})
             for n in range(90)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    (tmp_path / "c.py").write_text(CONFIG.format(source=str(tmp_path / "records.jsonl")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_pretrain_fine_tune_and_evaluate_a_classifier(here, capfd):
    assert main(["main", "--config=c.py:encoder", "--workdir=masked"]) == 0
    masked = read(here / "masked")[-1]
    assert masked["split"] == "eval" and "bits_per_byte" not in masked
    assert {"loss", "accuracy", "perplexity"} <= masked.keys()

    tuned = ("--config=c.py:encoder", "--workdir=tuned", "--config.model.head=classes",
             "--config.data.task.objective=classification", "--config.train.init_from=masked")
    assert main(["main", *tuned, "--config.model.classes=3"]) == 2
    assert "there are 2 labels (even, odd); set config.model.classes=2, not 3" in capfd.readouterr().err
    assert not (here / "tuned").exists()
    assert main(["main", *tuned]) == 0
    record = read(here / "tuned")[-1]
    confusion = np.array(record["confusion"])
    assert confusion.sum() == record["targets"]
    assert record["accuracy"] == pytest.approx(np.trace(confusion) / confusion.sum())
    assert f"accuracy {record['accuracy']:.4f}" in capfd.readouterr().out

    assert main(["main", "--workdir=tuned", "--mode=eval"]) == 0
    again = read(here / "tuned")[-1]
    assert again["loss"] == pytest.approx(record["loss"], rel=1e-6) and again["confusion"] == record["confusion"]
    assert main(["main", "--workdir=tuned", "--mode=generate", "--prompt=a"]) == 2
    assert "generates nothing" in capfd.readouterr().err


def test_pairs_are_learned_and_written(here, capfd):
    assert main(["main", "--config=c.py:encoder_decoder", "--workdir=w", "--config.train.sample_prompt=number 3"]) == 0
    assert "sample: number 3|" in capfd.readouterr().out
    assert main(["main", "--workdir=w", "--mode=generate", "--prompt=number 5", "--beams=2", "--max_new_tokens=3"]) == 0
    assert len(capfd.readouterr().out.splitlines()) >= 1
    assert main(["main", "--workdir=w", "--mode=eval", "--answers=5", "--max_new_tokens=3"]) == 0
    assert "5 answers: w/answers.jsonl" in capfd.readouterr().out
    told = [json.loads(line) for line in (here / "w" / "answers.jsonl").read_text().splitlines()]
    assert len(told) == 5 and all(int(line["input"].split()[1])**2 == int(line["reference"]) for line in told)
    record = read(here / "w")[-1]
    found = text_metrics([line["answer"] for line in told], [line["reference"] for line in told])
    assert {name: record[name] for name in found} == pytest.approx(found)
    assert main(["main", "--workdir=w", "--mode=generate", "--prompt=a", "--beams=2", "--temperature=1"]) == 2
    assert "--temperature is for samples" in capfd.readouterr().err


def test_metrics_by_hand():
    scores = np.array([[2.0, 0, 0], [0, 1, 0], [3, 0, 1], [0, 0, 1], [0, 2, 1]])
    found = label_metrics("classification", scores, np.array([0, 1, 1, 2, 1]))
    assert found["confusion"] == [[1, 0, 0], [1, 2, 0], [0, 0, 1]]
    assert found["precision"] == [0.5, 1, 1] and found["recall"] == pytest.approx([1, 2 / 3, 1])
    assert found["f1_macro"] == pytest.approx((2 / 3 + 0.8 + 1) / 3) and found["f1_micro"] == pytest.approx(0.8)
    several = label_metrics("multi_label", np.array([[1.0, -1], [1, 1]]), np.array([[1.0, 0], [0, 1]]))
    assert several["precision"] == [0.5, 1] and several["recall"] == [1, 1]
    numbers = label_metrics("regression", np.array([[1.0], [2], [4]]), np.array([10.0, 20, 90]))
    assert numbers["spearman"] == pytest.approx(1) and 0.9 < numbers["pearson"] < 1
    assert label_metrics("regression", np.array([[1.0]]), np.array([10.0])) == {}
    one = label_metrics("multi_label", np.array([[1.0], [1], [-1]]), np.array([[1.0], [0], [1]]))
    assert one["precision"] == [0.5] and one["recall"] == [0.5]


@pytest.mark.parametrize("objective", ("next_token", "seq2seq"))
def test_prompts_get_the_form_of_the_texts(objective, monkeypatch):
    monkeypatch.setattr(commands, "written", lambda model, variables, mesh, tokenizer, config, encoded, **options: [
        tokenizer.decode(ids) for ids in encoded])
    finished = SimpleNamespace(model=None, variables={}, mesh=None, prepared=SimpleNamespace(tokenizer=ByteTokenizer()))
    for task, seen in (({}, " cafe\u0301\n"), ({"normalize": "nfc", "collapse_space": True}, "caf\u00e9")):
        own = build({"data": {"task": {"objective": objective, **task}}, "train": {"sample_prompt": " cafe\u0301\n"}})
        assert commands.sample(own, finished, ()) == f"sample: {seen}|{seen}"
