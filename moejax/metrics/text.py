"""Metrics of written texts against references, over a whole set: by sacrebleu and rouge-score, and the rule of SQuAD."""

import collections
import re
import string
from collections.abc import Sequence
from typing import Any

from moejax.config import UserError


def text_metrics(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """How near answers are to their references.

    Args:
      answers, references: as many, at least one.

    Returns:
      `bleu` and `chrf` of the corpus from 0 to 100, as sacrebleu computes them; and means from 0 to 1: `rouge1`, `rouge2`
      and `rougeL` (F1, without stemming), `exact_match` and `token_f1` (SQuAD 1606.05250: without case, punctuation and
      English articles).

    Raises:
      UserError: the packages are not installed.
    """
    sacrebleu, RougeScorer = scorers()
    names = ("rouge1", "rouge2", "rougeL")
    scorer, count = RougeScorer(list(names)), len(references)
    rouge = [scorer.score(reference, answer) for reference, answer in zip(references, answers, strict=True)]
    return {"bleu": sacrebleu.corpus_bleu(list(answers), [list(references)]).score,
            "chrf": sacrebleu.corpus_chrf(list(answers), [list(references)]).score,
            **{name: sum(score[name].fmeasure for score in rouge) / count for name in names},
            "exact_match": sum(words(a) == words(b) for a, b in zip(answers, references)) / count,
            "token_f1": sum(token_f1(a, b) for a, b in zip(answers, references)) / count}


def scorers() -> tuple[Any, Any]:
    """sacrebleu, and the class of rouge-score. Raises `UserError` if they are not installed."""
    try:
        import sacrebleu
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError(f"scores of texts need the package {error.name}: pip install 'moejax[metrics]'") from None
    return sacrebleu, RougeScorer


def words(text: str) -> list[str]:
    """A text as SQuAD compares it."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words that two texts share; of texts without words, whether both are."""
    one, other = words(answer), words(reference)
    if not one or not other:
        return float(one == other)
    shared = sum((collections.Counter(one) & collections.Counter(other)).values())
    return 2 * shared / (len(one) + len(other))
