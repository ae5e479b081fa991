"""The picture and the table of which experts serve which task."""

import json

import pytest

from experiments.multitask.plot import last, main, table
from experiments.multitask.prepare import WORDS, translations, usable
from moejax.config import UserError

RECORD = {"step": 7, "split": "eval", "loss": 2.0, "tasks/loss": 1.5, "task/a/loss": 1.0, "task/b/loss": 2.0,
          "task/b/accuracy": 0.5, "tasks/names": ["a", "b"], "tasks/load": [[[0.5, 0.5, 0.0], [0.25, 0.0, 0.75]]],
          "tasks/js": [[[0.0, 0.6], [0.6, 0.0]]], "tasks/js_mean": [0.6]}


def test_plots_and_tabulates_the_last_evaluation(tmp_path, capsys):
    lines = [RECORD | {"step": 3, "tasks/loss": 9.0}, RECORD, {"step": 8, "split": "train", "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    main([str(tmp_path)])
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "| run | step | a | b | mean |" and told[2] == f"| {tmp_path} | 7 | 1.0000 | 2.0000 | 1.5000 |"
    picture = tmp_path / "tasks.png"
    assert told[3] == str(picture) and picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_runs_without_several_tasks_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        last(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "split": "eval", "loss": 1.0}))
    with pytest.raises(UserError, match="no evaluation on several tasks"):
        main([str(tmp_path)])
    assert "nan" in table({"x": RECORD, "y": {"step": 2, "tasks/loss": 1.0}})


def test_strings_are_whole_texts_that_differ():
    assert usable("The device is off.", WORDS) and not usable("Off", WORDS)
    assert not usable("Press {button} now please", WORDS)
    assert usable("Off", range(1, 3)) and not usable("The device is off.", range(1, 3))
    found = {"en": {("a",): "The device is off.", ("b",): "OK then do so", ("c",): "Only in English here"},
             "de": {("a",): "Das Ger\u00e4t ist aus.", ("b",): "OK then do so", ("d",): "Nur auf Deutsch da"}}
    assert translations(found, "de", WORDS) == [("The device is off.", "Das Ger\u00e4t ist aus.")]
    assert len(translations(found, "en", WORDS)) == 3
