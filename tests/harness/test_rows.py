"""Rows for the harness: cut at their beginnings, and scored as `moejax.logits` says; all without the harness."""

import jax
import numpy as np
import pytest

import moejax
from moejax.harness.rows import cut, fit, score_rows


def test_a_row_that_is_cut_keeps_its_first_token_and_its_last_ones():
    assert cut((9, 1, 2, 3), 4) == [9, 1, 2, 3]
    assert cut((9, 1, 2, 3), 3) == [9, 2, 3]
    assert cut((9, 1, 2, 3), 1) == [9]


@pytest.mark.parametrize("size, room, wanted, kept, new", [
    (10, 24, 256, 10, 14), (12, 24, 256, 12, 12), (13, 24, 256, 12, 12), (99, 25, 256, 13, 12),  # more than fits
    (10, 24, 7, 10, 7), (17, 24, 7, 17, 7), (18, 24, 7, 17, 7), (99, 24, 7, 17, 7)])
def test_a_prompt_is_cut_only_if_an_answer_has_less_than_it_wants_and_than_half_of_the_room(size, room, wanted, kept, new):
    prompt = [256, *range(1, size)]
    left, count = fit(prompt, room, wanted)
    assert (len(left), count) == (kept, new)
    assert left == [256, *prompt[len(prompt) - kept + 1:]]


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_run):
    return moejax.load(make_run(tmp_path_factory.mktemp("rows") / "run", {"objective": "prefix_lm"}))


@pytest.mark.parametrize("prefix", [True, False])
def test_what_is_scored_follows_a_prefix_only_if_the_model_learned_so(model, prefix):
    rows = [([256, *b"one two"], 3), ([256, *b"ab"], 2)]
    found = score_rows(*model, rows, size=3, room=24, prefix=prefix)
    for (ids, told), (log_probability, greedy) in zip(rows, found, strict=True):
        seen_BL = np.arange(len(ids) - 1)[None] < len(ids) - told - 1
        log_LV = np.asarray(jax.nn.log_softmax(moejax.logits(*model, [ids[:-1]], prefix=seen_BL if prefix else None)[0]))
        want_N = log_LV[np.arange(len(ids) - 1), ids[1:]][-told:]
        np.testing.assert_allclose(log_probability, want_N.sum(), atol=1e-4)
        assert greedy == (log_LV.argmax(1) == ids[1:])[-told:].all()


def test_the_answer_of_generate_is_what_scores_best(model):
    """If both read the prompt as a prefix."""
    prompt = [256, *b"one two"]
    new = moejax.generate(*model, [prompt], max_new_tokens=4, prefix=True).tokens[0].tolist()
    (read, same), (otherwise, _) = (score_rows(*model, [([*prompt, *new], 4)], size=1, room=24, prefix=prefix)[0]
                                    for prefix in (True, False))
    assert same and abs(read - otherwise) > 1e-4
