"""Prompts as trained models take them, and what they write as text."""

import pytest

from moejax.config import build, default
from moejax.data.asking import encode_prompts, new_text, reads_prefix
from moejax.data.tokenizers import ByteTokenizer
from moejax.models import transformer


def config(kind, objective):
    tree = default()
    tree.model.update(dict(kind=kind, vocab_size=400, max_length=24))
    tree.data.length, tree.data.task = 24, {"objective": objective}
    return transformer.resolve(build(tree))


@pytest.mark.parametrize("kind, objective, first, prefix", [
    ("decoder", "next_token", 256, False), ("decoder", "prefix_lm", 256, True), ("decoder", "seq2seq", 256, True),
    ("decoder", "ul2", 258, True), ("encoder_decoder", "ul2", 258, False), ("encoder_decoder", "seq2seq", 256, False)])
def test_a_prompt_begins_and_is_read_as_in_training(kind, objective, first, prefix):
    """Of UL2's three modes, 257 to 259, the second goes on from a text."""
    one = config(kind, objective)
    assert encode_prompts(ByteTokenizer(), one, ["a", ""]) == [[first, 97], [first]]
    assert reads_prefix(one) == prefix


def test_an_answer_is_a_text_of_its_own_only_of_pairs():
    tokenizer, split = ByteTokenizer(), list("é".encode())
    ids = [256, *b"a", split[0]]
    assert new_text(tokenizer, config("decoder", "ul2").data.task, ids, [split[1], 98]) == "b"
    assert new_text(tokenizer, config("decoder", "seq2seq").data.task, ids, [98]) == "b"
