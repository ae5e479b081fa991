"""Beam search: against all texts that there are, and against the most probable token."""

import itertools

import jax
import numpy as np
import pytest
from tiny import tiny_config, tiny_model

from moejax import beam_search, generate, logits
from moejax.config import UserError

VOCAB, STOP, NEW = 5, 4, 3
PROMPTS = [[1, 2, 3], [2, 0]]


def model_of(kind="decoder", **changes):
    config = tiny_config(model__vocab_size=VOCAB, model__kind=kind, model__layers=2, **changes)
    model, params, state = tiny_model(config, seed=3)
    # Scores far apart, so that the texts differ in more than roundings.
    params["embedding"]["head"] = params["embedding"]["head"] * 3
    return model, {"params": params, "router": state}


def all_texts(model, given, prompt, penalty):
    """Every text of at most NEW tokens that ends with STOP or at the limit, with its score, best first."""
    texts = [text for n in range(1, NEW + 1) for text in itertools.product(range(VOCAB), repeat=n)
             if STOP not in text[:-1] and (text[-1] == STOP or n == NEW)]
    both = model.model.kind == "encoder_decoder"
    start = [0] if both else prompt
    rows = [[*start, *text][:-1] for text in texts]
    scores = np.asarray(logits(model, given, [prompt] * len(rows), decoder_tokens=rows) if both
                        else logits(model, given, rows))
    log_probs = np.asarray(jax.nn.log_softmax(scores))
    found = [(sum(log_probs[i, len(start) - 1 + j, token] for j, token in enumerate(text)) / len(text)**penalty, text)
             for i, text in enumerate(texts)]
    return sorted(found, reverse=True)


@pytest.mark.parametrize("kind, penalty", [("decoder", 1.0), ("encoder_decoder", 0.0), *(
    pytest.param(kind, penalty, marks=pytest.mark.slow) for kind, penalty in (
        ("decoder", 0.0), ("decoder", 2.5), ("encoder_decoder", 1.0), ("encoder_decoder", 2.5)))])
def test_enough_beams_find_the_best_of_all_texts(kind, penalty):
    model, given = model_of(kind)
    found = beam_search(model, given, PROMPTS, beams=VOCAB**(NEW - 1), max_new_tokens=NEW, length_penalty=penalty,
                        stop_tokens=(STOP,))
    for b, prompt in enumerate(PROMPTS):
        score, text = all_texts(model, given, prompt, penalty)[0]
        assert tuple(found.tokens[b, :found.lengths[b]]) == text and not found.tokens[b, found.lengths[b]:].any()
        assert found.scores[b] == pytest.approx(score, abs=1e-5)


def test_one_beam_follows_the_most_probable_token():
    model, given = model_of()
    found, wanted = (search(model, given, PROMPTS, max_new_tokens=6) for search in (
        lambda *args, **more: beam_search(*args, beams=1, **more), generate))
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    assert (found.lengths == 6).all()


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_more_beams_find_no_worse_and_neighbours_change_nothing(scan, monkeypatch):
    from moejax.generation import begin
    monkeypatch.setattr(begin, "UNROLLED_LAYERS", 0 if scan else 16)
    model, given = model_of()
    searches = [beam_search(model, given, PROMPTS, beams=beams, max_new_tokens=6, stop_tokens=(STOP,)) for beams in (1, 6)]
    assert (searches[1].scores >= searches[0].scores - 1e-6).all()
    for b, prompt in enumerate(PROMPTS):
        alone = beam_search(model, given, [prompt], beams=6, max_new_tokens=6, stop_tokens=(STOP,))
        np.testing.assert_array_equal(alone.tokens[0], searches[1].tokens[b])


@pytest.mark.parametrize("bad, words", [({"beams": 0}, "beams=0 must be at least 1"), ({"length_penalty": -1.0},
                                        "length_penalty=-1.0 must be at least 0"), ({"max_new_tokens": 0}, "at least 1")])
def test_wrong_settings(bad, words):
    model, given = model_of()
    with pytest.raises(UserError, match=words):
        beam_search(model, given, PROMPTS, **bad)
