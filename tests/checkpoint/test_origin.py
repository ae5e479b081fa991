"""What stays of an imported checkpoint in the runs that come of it."""

import json
import shutil

import pytest

from moejax.checkpoint.made import copy_data
from moejax.checkpoint.origin import check_tokens, copy_tokenizer, end_tokens, keep_origin, origin_of
from moejax.config import UserError, default


def make_run(folder, tokenizer, init_from=None):
    """A workdir without a model."""
    tree = default().to_dict()
    tree["train"]["init_from"] = init_from and str(init_from)
    (folder / "data").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(tree))
    (folder / "data" / "tokenizer.json").write_text(tokenizer)
    (folder / "data" / "tokenizer_config.json").write_text(json.dumps({"kind": "huggingface", "bos_token": "<s>"}))
    return folder


@pytest.fixture
def imported(tmp_path):
    """The workdir of an import."""
    folder = make_run(tmp_path / "open", "as read")
    (folder / "hf").mkdir()
    for name, content in (("config.json", {"eos_token_id": 2}), ("generation_config.json", {"eos_token_id": [7, 5, 999]}),
                          ("tokenizer.json", "as it was"), ("special_tokens_map.json", {"eos_token": "</s>"})):
        (folder / "hf" / name).write_text(json.dumps(content))
    return folder


def test_the_origin_is_found_through_runs_that_started_from_each_other(imported, tmp_path):
    tuned = make_run(tmp_path / "tuned", "as read", imported)
    twice = make_run(tmp_path / "twice", "as read", tuned)
    assert origin_of(imported) == origin_of(tuned) == origin_of(twice) == imported / "hf"
    shutil.rmtree(imported)
    assert origin_of(twice) is None
    circle = make_run(tmp_path / "circle", "as read", tmp_path / "other")
    make_run(tmp_path / "other", "as read", circle)
    assert origin_of(circle) is None and origin_of(make_run(tmp_path / "own", "x")) is None


def test_texts_end_as_the_checkpoint_says_if_they_are_cut_as_its_own(imported, tmp_path):
    tuned = make_run(tmp_path / "tuned", "as read", imported)
    assert end_tokens(imported, 100) == end_tokens(tuned, 100) == (7, 5)
    assert end_tokens(make_run(tmp_path / "other", "another", imported), 100) == ()
    (imported / "hf" / "generation_config.json").unlink()
    assert end_tokens(tuned, 100) == (2,)
    (imported / "hf" / "config.json").write_text(json.dumps({"eos_token_id": None}))
    assert end_tokens(tuned, 100) == ()


def test_the_tokenizer_of_the_checkpoint_travels_and_another_replaces_it(imported, tmp_path):
    tuned, other = make_run(tmp_path / "tuned", "as read", imported), make_run(tmp_path / "other", "another", imported)
    for run in (imported, tuned):
        (target := tmp_path / f"{run.name}_out").mkdir()
        copy_tokenizer(run, target)
        assert {path.name: path.read_text() for path in target.iterdir()} == {
            path.name: path.read_text() for path in (imported / "hf").iterdir() if path.name != "config.json"}
    (target := tmp_path / "other_out").mkdir()
    copy_tokenizer(other, target)
    assert {path.name for path in target.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert (target / "tokenizer.json").read_text() == "another"
    assert json.loads((target / "tokenizer_config.json").read_text())["bos_token"] == "<s>"


def test_a_run_that_reads_as_the_checkpoint_keeps_its_files_and_hands_them_on(imported, tmp_path):
    tuned, other = make_run(tmp_path / "tuned", "as read", imported), make_run(tmp_path / "other", "another", imported)
    for run in (tuned, other, imported):
        keep_origin(run)
        keep_origin(run)
    assert origin_of(tuned) == tuned / "hf" and not (other / "hf").exists()
    shutil.rmtree(imported)
    assert end_tokens(tuned, 100) == (7, 5)
    (made := tmp_path / "made").mkdir()  # of the tuned one, as upcycling and compression do
    copy_data(tuned, made)
    assert end_tokens(made, 100) == (7, 5) and (made / "hf" / "special_tokens_map.json").exists()


def test_a_run_starts_from_a_model_that_reads_the_same_tokens(imported, tmp_path):
    check_tokens(make_run(tmp_path / "tuned", "as read"), imported)
    check_tokens(make_run(tmp_path / "anyhow", "another"), tmp_path / "without tokenizer")
    other, run = make_run(tmp_path / "other", "another"), make_run(tmp_path / "bytes", "x")
    (run / "data" / "tokenizer.json").unlink()
    check_tokens(run, run)
    for own, start, name in ((other, imported, imported / "data" / "tokenizer.json"), (run, imported, "tokenizer.json"),
                             (imported, run, "config.data.tokenizer=bytes")):
        with pytest.raises(UserError, match="was not trained with the tokenizer of this run; set ") as caught:
            check_tokens(own, start)
        assert str(caught.value).endswith(str(name))
