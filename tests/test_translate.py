"""How pairs are split for experiments/translate, and its translation memory."""

import pytest

from experiments.translate.prepare import memory, plain, split

COUNT = 200
PAIRS = [(f"Turn light number {n} on", f"Die Lampe Nummer {n} einschalten") for n in range(COUNT)]


def sides(pairs):
    return [{plain(pair[side]) for pair in pairs} for side in (0, 1)]


def test_no_text_is_on_both_sides_of_the_split():
    extra = [(f"{english}!", f"Bitte {other}") for english, other in PAIRS] + [
        (f"Please {english}", other.upper()) for english, other in PAIRS]
    train, test = split(PAIRS + extra)
    assert test and train
    assert all(not one & other for one, other in zip(sides(train), sides(test)))
    assert len(sides(train)[0]) == len(train) and all(len(side) == len(test) for side in sides(test))


def test_what_is_held_out_depends_on_the_english_text_alone():
    (_, german), (_, other) = split(PAIRS), split([(english, f"{target} maintenant") for english, target in PAIRS])
    assert [english for english, _ in german] == [english for english, _ in other]
    assert 5 < len(german) < 40


def test_the_memory_answers_with_the_nearest():
    scores = memory(PAIRS, PAIRS[:7])
    assert scores["bleu"] == pytest.approx(100) and scores["exact_match"] == 1
    assert memory(PAIRS[7:], PAIRS[:7])["exact_match"] == 0
