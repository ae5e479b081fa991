"""Paragraphs with their period: what is held out is what a pre-training run holds out, and forms differ as they say."""

import pytest

from experiments.masked_lm.period import get_config
from experiments.masked_lm.prepare import LABELLED, PERIODS, held_out, paragraphs, period, split
from moejax.config import build, flatten, to_dict
from moejax.data.prepare import prepare
from moejax.data.sources import files


def test_pre_training_holds_out_the_same_messages(tmp_path):
    for n in range(80):
        (tmp_path / f"{n:02}.txt").write_text(f"Message {n}.\n\nWith a second paragraph\r\nand an é.", encoding="utf-8",
                                              newline="")
    config = get_config()
    config.data.source, config.data.tokenizer = str(tmp_path / "*.txt"), "bytes"
    made = prepare(build(config), tmp_path / "data", lambda line: None)
    texts = [path.read_bytes().decode() for path in files(config.data.source)]
    ours = [text for text in texts if held_out(text)]
    assert made.eval.documents == len(ours) and 2 < len(ours) < 40
    assert (tmp_path / "data" / "eval.utf8").read_bytes().decode() == "".join(ours)


def test_periods_follow_each_other():
    assert [period(year) for year in (1790, 1828, 1829, 1968, 1969, 2026)] == [
        "1790-1828", "1790-1828", "1829-1860", "1933-1968", "1969-2026", "1969-2026"]
    begins = [int(name[:4]) for name in PERIODS.values()]
    assert begins[1:] == list(PERIODS)[:-1] and get_config("scratch_dense").model.classes == len(PERIODS)


def test_paragraphs_are_whole_and_on_one_side():
    words = " ".join(f"word{n}" for n in range(70))
    cut = " ".join(words.split()[:64])
    assert paragraphs(f"Sir:\n\n{words}\n\n  {words[:160]}\r\n\r\nshort") == [cut, words[:160].strip()]
    messages = [(1790 + n % 200, f"{n} {words}\n\nthe same {words}") for n in range(90)]
    train, test = split(messages)
    assert len(train) + len(test) == 90 and not set(train) & set(test)
    assert {text.split()[0] for text, _ in test} == {text.split()[0] for _, text in messages if held_out(text)}
    assert len(split([(1900, f"{n} {words}") for n in range(2 * LABELLED)])[0]) == LABELLED


@pytest.mark.parametrize("form", ("sparse", "dense"))
def test_from_scratch_differs_in_where_it_starts(form):
    tuned, scratch = (flatten(to_dict(build(get_config(f"{how}_{form}")))) for how in ("finetune", "scratch"))
    assert {name for name in tuned if tuned[name] != scratch[name]} == {"train.init_from"}
    assert tuned["train.init_from"] == f"runs/masked_lm/{form}"
