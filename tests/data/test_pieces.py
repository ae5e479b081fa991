"""Which texts a SentencePiece model is trained on."""

from moejax.data.tokenizers import make_tokenizer

CORPUS = [f"The {word} of the states,\tin {year}:\n\n  we {word} what we {word}ed.\n" for year in range(1790, 1830)
          for word in ("report", "govern", "conclud", "harvest")]


def test_a_large_corpus_is_sampled_the_same_way_in_any_order(tmp_path, monkeypatch):
    limit = sum(map(len, CORPUS)) // 2
    monkeypatch.setattr("moejax.data.pieces.TRAINING_BYTES", limit)
    seen = []
    monkeypatch.setattr("moejax.data.pieces._sentences", lambda chosen: seen.append(chosen) or iter(CORPUS))
    for corpus in (CORPUS, CORPUS[::-1]):
        make_tokenizer("sentencepiece", 350, iter(corpus), tmp_path)
    assert sorted(seen[0]) == sorted(seen[1]) and limit * 0.9 < sum(map(len, seen[0])) <= limit
