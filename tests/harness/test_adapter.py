"""The lm-evaluation-harness on a small model: its scores are those of `moejax.logits`, its answers those of `generate`."""

import json
import sys
import types

import jax
import numpy as np
import pytest

import moejax
from moejax import commands
from moejax.config import UserError
from moejax.data.asking import encode_prompts
from moejax.data.tokenizers import ByteTokenizer
from moejax.harness.__main__ import main

ROOM = 24
TEXT = {"question": "one", "choices": [" two", " xyz!"], "label": 0, "text": "one two three four five six seven eight nine"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_run):
    return make_run(tmp_path_factory.mktemp("harness") / "run")


@pytest.fixture(scope="module")
def adapter(run):
    pytest.importorskip("lm_eval", reason='needs pip install -e ".[lm-eval]"')
    from moejax.harness.adapter import HarnessModel
    return HarnessModel(str(run), batch_size=2)


def request(*arguments):
    return types.SimpleNamespace(args=arguments)


@pytest.mark.parametrize("context, told", [("one", " two"), ("", "abc"), ("trailing ", "word"), ("x" * 40, "yz")])
def test_a_continuation_scores_as_logits_say(adapter, context, told):
    """Also one whose context is longer than a row has room for, of which the separator and the end are read."""
    ids = [256, *(context + told).encode()[-ROOM:]]
    log_LV = np.asarray(jax.nn.log_softmax(moejax.logits(adapter.model, adapter.variables, [ids[:-1]])[0]))
    count = len(told) + context.endswith(" ")  # a blank belongs to what follows
    want = log_LV[np.arange(len(ids) - 1), ids[1:]][-count:]
    greedy = (log_LV.argmax(1) == ids[1:])[-count:].all()
    other = ("aa", "b" * 17)  # in the same batch, of another length
    (found, _) = adapter.loglikelihood([request(context, told), request(*other)], disable_tqdm=True)
    np.testing.assert_allclose(found[0], want.sum(), atol=1e-4)
    assert found[1] == greedy


def test_a_text_longer_than_a_row_is_scored_in_pieces_that_hold_every_token_once(adapter):
    ids = list(TEXT["text"].encode())
    assert len(ids) > ROOM
    first = [256, *ids[:ROOM - 1]]
    want = sum(np.asarray(jax.nn.log_softmax(moejax.logits(adapter.model, adapter.variables, [given])[0]))[
        np.arange(len(given)), told][-new:].sum() for given, told, new in (
            (first, ids[:ROOM], ROOM), (ids[-ROOM - 1:-1], ids[-ROOM:], len(ids) - ROOM)))
    np.testing.assert_allclose(adapter.loglikelihood_rolling([request(TEXT["text"])], disable_tqdm=True), [want], atol=1e-3)


def test_answers_are_those_of_generate_up_to_the_first_stop(adapter):
    prompts = ["one", "two three", "four"]
    options = {"until": [], "max_gen_toks": 7, "do_sample": False, "temperature": 0.7}
    whole = adapter.generate_until([request(prompt, options) for prompt in prompts], disable_tqdm=True)
    for prompt, text in zip(prompts, whole, strict=True):
        made = moejax.generate(adapter.model, adapter.variables, [[256, *prompt.encode()]], max_new_tokens=7,
                               stop_tokens=(256,))
        ids = [256, *prompt.encode(), *made.tokens[0][:made.lengths[0]].tolist()]
        assert text == ByteTokenizer().decode(ids)[len(prompt):]
    stop = whole[0][2:4]
    assert adapter.generate_until([request("one", options | {"until": ["never", stop]})], disable_tqdm=True) == [
        whole[0][:whole[0].find(stop)]]


def test_a_prompt_that_fits_is_whole_and_one_that_does_not_is_told(adapter, capsys):
    """Their answers, as the task does not say how long, have the room that is left."""
    prompts = ["four", "two three", "x" * 11 + "y" * 11]
    read = [[256, *b"four"], [256, *b"two three"], [256, *b"y" * 11]]
    texts = adapter.generate_until([request(prompt, {"until": []}) for prompt in prompts], disable_tqdm=True)
    for ids, text in zip(read, texts, strict=True):
        made = moejax.generate(adapter.model, adapter.variables, [ids], max_new_tokens=ROOM - len(ids), stop_tokens=(256,))
        before = ByteTokenizer().decode(ids)
        assert text == ByteTokenizer().decode([*ids, *made.tokens[0][:made.lengths[0]].tolist()])[len(before):]
    assert capsys.readouterr().err.count("1 of 3 prompts are too long for the 24 tokens of a row") == 1


TRAINED = {"prefix_lm": 257, "ul2": 300, "seq2seq": 257}
"""Objectives by which a decoder reads a prefix, with ids for the modes and sentinels that UL2 needs."""


@pytest.fixture(scope="module", params=TRAINED)
def with_prefix(request, tmp_path_factory, make_run):
    pytest.importorskip("lm_eval", reason='needs pip install -e ".[lm-eval]"')
    from moejax.harness.adapter import HarnessModel
    folder = tmp_path_factory.mktemp("prefix") / request.param
    return HarnessModel(str(make_run(folder, {"objective": request.param}, TRAINED[request.param])), batch_size=2)


def test_a_model_of_prefixes_answers_as_the_command_line_does(with_prefix):
    own, prompts = with_prefix, ["one", "two three"]
    want = commands.continuations(own.model, own.variables, None, own.tokenizer, own.config, prompts, max_new_tokens=7,
                                  temperature=0.0)
    options = {"until": [], "max_gen_toks": 7, "do_sample": False}
    assert own.generate_until([request(prompt, options) for prompt in prompts], disable_tqdm=True) == want


@pytest.mark.parametrize("context, told", [("one two", " three"), ("x" * 40, "yz")])
def test_a_model_of_prefixes_scores_what_follows_one(with_prefix, context, told):
    first, = encode_prompts(with_prefix.tokenizer, with_prefix.config, [""])
    ids = [*first, *(context + told).encode()[-ROOM:]]
    seen_BL = np.arange(len(ids) - 1)[None] < len(ids) - len(told) - 1
    log_LV = np.asarray(jax.nn.log_softmax(moejax.logits(with_prefix.model, with_prefix.variables, [ids[:-1]],
                                                         prefix=seen_BL)[0]))
    want = log_LV[np.arange(len(ids) - 1), ids[1:]][-len(told):].sum()
    (found, _), = with_prefix.loglikelihood([request(context, told)], disable_tqdm=True)
    np.testing.assert_allclose(found, want, atol=1e-4)


def test_whole_texts_are_scored_only_by_models_that_write_them(with_prefix):
    objective = with_prefix.config.data.task.objective
    if objective == "prefix_lm":
        assert with_prefix.loglikelihood_rolling([request(TEXT["text"])], disable_tqdm=True)[0] < 0
        return
    with pytest.raises(UserError, match=f"objective={objective}: a task asks how probable whole texts are"):
        with_prefix.loglikelihood_rolling([request(TEXT["text"])], disable_tqdm=True)


def test_an_answer_of_an_imported_model_ends_as_its_config_says(adapter, monkeypatch):
    options = {"until": [], "max_gen_toks": 7, "do_sample": False}
    made = moejax.generate(adapter.model, adapter.variables, [[256, *b"one"]], max_new_tokens=7, stop_tokens=(256,))
    new = made.tokens[0][:made.lengths[0]].tolist()
    monkeypatch.setattr(adapter, "ends", (new[2],))
    kept = new[:new.index(new[2])]
    assert adapter.generate_until([request("one", options)], disable_tqdm=True) == [ByteTokenizer().decode(kept)]


def test_a_local_task_runs_from_the_command_line(run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason='needs pip install -e ".[lm-eval]"')
    (tmp_path / "data.jsonl").write_text(json.dumps(TEXT) + "\n" + json.dumps(TEXT | {"label": 1}) + "\n")
    (tmp_path / "task.yaml").write_text(f"""
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
""")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert main([f"--model_args=workdir={run}", "--tasks=local_choice", f"--include_path={tmp_path}"]) == 0
    assert "|acc" in (out := capsys.readouterr().out).replace(" ", "") and "0.5" in out  # the same choice twice, once right


def test_a_run_that_is_not_there_is_one_line(tmp_path, capsys):
    pytest.importorskip("lm_eval", reason='needs pip install -e ".[lm-eval]"')
    (tmp_path / "none.yaml").write_text("")
    assert main([f"--model_args=workdir={tmp_path}/none", "--tasks=hellaswag"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_without_the_harness_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert main(["--tasks=x"]) == 2 and "[lm-eval]" in capsys.readouterr().err
    assert main(["--help"]) == 0 and "--model_args=workdir=RUN" in capsys.readouterr().out
