"""Metrics of texts: by hand, and as the libraries compute them."""

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from moejax.metrics.text import text_metrics, token_f1


@pytest.mark.parametrize("answer, reference, wanted", [
    ("The cat sat.", "a cat sat", 1.0), ("cat", "dog", 0.0), ("a dog ran far", "dog ran", 0.8), ("", "the", 1.0),
    ("", "dog", 0.0), ("dog dog cat", "dog", 0.5)])
def test_token_f1_by_hand(answer, reference, wanted):
    assert token_f1(answer, reference) == pytest.approx(wanted)


def test_all_metrics_are_the_libraries_own():
    answers = ["the cat sat on the mat", "a dog runs", "nothing else"]
    references = ["the cat sat on a mat", "the dog runs", "something else"]
    found = text_metrics(answers, references)
    assert found["bleu"] == sacrebleu.corpus_bleu(answers, [references]).score
    assert found["chrf"] == sacrebleu.corpus_chrf(answers, [references]).score
    scorer = RougeScorer(["rouge2"])
    assert found["rouge2"] == pytest.approx(sum(
        scorer.score(b, a)["rouge2"].fmeasure for a, b in zip(answers, references)) / 3)
    assert found["exact_match"] == pytest.approx(2 / 3) and found["token_f1"] == pytest.approx(2.5 / 3)
    same = text_metrics(references, references)
    assert same["bleu"] == pytest.approx(100) and same["rougeL"] == same["exact_match"] == 1
