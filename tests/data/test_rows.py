"""Rows of every objective: by hand, and by laws that hold for all."""

import numpy as np
import pytest

from moejax.config import UserError, build
from moejax.data.prepared import TokenStream
from moejax.data.rows import Layout, denoised, make_rows, masked, pair, with_prefix
from moejax.data.specials import special_ids
from moejax.data.tokenizers import ByteTokenizer, make_tokenizer
from moejax.task import OBJECTIVES, TEXT, Task

SEPARATOR, START = 256, 7
RNG = np.random.default_rng(0)


def stream(count=200, **more):
    """Documents of 9 random bytes behind a separator each."""
    tokens = np.random.default_rng(1).integers(0, 255, count).astype(np.uint16)
    tokens[::10] = SEPARATOR
    return TokenStream(tokens, np.arange(0, count, 10), count, count // 10, **more)


def config(kind, objective, **task):
    return build({"model": {"kind": kind, "vocab_size": 320, "architecture": {"start_token": START}, "max_length": 64},
                  "data": {"length": 24, "source_length": 32 if kind == "encoder_decoder" else None,
                           "task": {"objective": objective, **task}}})


def told(row):
    return row["targets"][row["mask"]].tolist()


def real(row, prefix=""):
    return row[f"{prefix}tokens"][row[f"{prefix}segments"] > 0].tolist()


def test_a_pair_for_an_encoder_and_a_decoder():
    row = pair(np.array([5, 6, 8]), np.array([11, 12, 13]), Layout(True, 6, 4, START))
    assert row["source_tokens"].tolist() == [5, 6, 8, 0] and row["source_segments"].tolist() == [1, 1, 1, 0]
    assert row["tokens"].tolist() == [START, 11, 12, 0, 0, 0] and row["targets"].tolist() == [11, 12, 13, 0, 0, 0]
    assert row["mask"].tolist() == [1, 1, 1, 0, 0, 0] and row["positions"].tolist() == [0, 1, 2, 0, 0, 0]
    cut = pair(np.arange(5, 11), np.arange(11, 20), Layout(True, 6, 4, START))
    assert real(cut, "source_") == [5, 6, 7, 10] and told(cut) == [11, 12, 13, 14, 15, 16]
    assert real(cut) == [START, 11, 12, 13, 14, 15]


def test_a_pair_for_a_decoder():
    """The last token of the input tells the first of the target, and is not in the prefix."""
    row = pair(np.array([5, 6, 8]), np.array([11, 12]), Layout(False, 6, 6, START))
    assert row["tokens"].tolist() == [5, 6, 8, 11, 0, 0] and row["targets"].tolist() == [0, 0, 11, 12, 0, 0]
    assert row["mask"].tolist() == [0, 0, 1, 1, 0, 0] and row["prefix"].tolist() == [1, 1, 0, 0, 0, 0]
    cut = pair(np.arange(5, 11), np.array([11, 12]), Layout(False, 6, 6, START))
    assert real(cut) == [5, 6, 7, 8, 10, 11] and told(cut) == [11, 12]
    both_long = pair(np.arange(5, 11), np.arange(20, 29), Layout(False, 6, 6, START))
    assert real(both_long) == [5, 6, 7, 10, 20, 21] and told(both_long) == [20, 21, 22]


def test_spans_are_cut_out_of_text_without_separators():
    text = np.array([10, SEPARATOR, 11, 12, SEPARATOR, 13, 14])
    task, layout = Task("span_corruption", noise_density=0.4), Layout(True, 24, 32, START)
    row = denoised(text, task, [280, 281, 282], SEPARATOR, layout, np.random.default_rng(0))
    assert SEPARATOR not in real(row, "source_") and told(row).index(SEPARATOR) == len(told(row)) - 1
    assert sorted(t for t in real(row, "source_") + told(row) if t < 100) == [10, 11, 12, 13, 14]


def test_a_window_with_prefixes():
    row = {"tokens": np.arange(6), "targets": np.arange(1, 7), "mask": np.array([1, 1, 1, 1, 1, 0], bool),
           "segments": np.array([1, 1, 1, 2, 2, 0])}

    class Draws:
        def integers(self, low, high):
            return {3: 2, 2: 1}[high]

    found = with_prefix(row, Draws())
    assert found["prefix"].tolist() == [1, 1, 0, 1, 0, 0]
    assert found["mask"].tolist() == [0, 1, 1, 1, 1, 0]  # the target of slot 0 is seen; that of 2 begins another document


def test_a_masked_window_never_hides_separators_or_padding():
    row = {"tokens": np.array([SEPARATOR, 5, 6, SEPARATOR, 8, 0]), "segments": np.array([1, 1, 1, 2, 2, 0])}
    found = masked(row, (np.ones(257, bool),) * 2, SEPARATOR, 299, 1.0, np.random.default_rng(0))
    assert found["mask"].tolist() == [0, 1, 1, 0, 1, 0] and found["targets"].tolist() == row["tokens"].tolist()
    assert found["tokens"][[0, 3, 5]].tolist() == [SEPARATOR, SEPARATOR, 0]


def test_ul2_shows_a_mode_and_then_one_of_its_ways():
    task, text = Task("ul2"), np.arange(100, 120)
    specials, seen = [270, 271, 272, *range(280, 300)], set()
    for seed in range(60):
        row = denoised(text, task, specials, SEPARATOR, Layout(True, 24, 32, START), np.random.default_rng(seed))
        mode, *source = real(row, "source_")
        seen.add(mode)
        assert told(row)[-1] == SEPARATOR
        if mode == 271:  # the rest
            assert source + told(row)[:-1] == text.tolist() and len(source) == 15
        else:
            kept = [t for t in source if t < 270]
            assert sorted(kept + [t for t in told(row)[:-1] if t < 270]) == text.tolist()
            assert len(told(row)) - 1 - sum(t >= 280 for t in told(row)) in ((3,) if mode == 270 else (3, 10))
    assert seen == {270, 271, 272}


EVERY = [(name, kind) for name, objective in OBJECTIVES.items() for kind in objective.kinds if objective.data == TEXT]


@pytest.mark.parametrize("objective, kind", EVERY)
def test_rows_of_text(objective, kind):
    """All have one shape, tell only what is not padding, draw by the generator alone, and end in zeros."""
    cfg = config(kind, objective)
    rows = make_rows(stream(), ByteTokenizer(), cfg)
    made = [rows.make(i, np.random.default_rng(i)) for i in range(rows.count + 1)]
    shapes = {name: array.shape for name, array in made[0].items()}
    assert all({name: array.shape for name, array in row.items()} == shapes for row in made)
    assert shapes["tokens"] == (24,) and shapes.get("source_tokens", (32,)) == (32,)
    assert not any(array.any() for array in made[-1].values())
    for i, row in enumerate(made[:-1]):
        assert not (row["mask"] & (row["segments"] == 0)).any()
        assert max(array.max() for name, array in row.items() if name.endswith(("tokens", "targets"))) < 320
        again = rows.make(i, np.random.default_rng(i))
        assert all((row[name] == again[name]).all() for name in row)
    assert sum(row["mask"].sum() for row in made) > 0


@pytest.mark.parametrize("labels", [np.arange(20, dtype=np.int32), np.eye(20, 3, dtype=np.float32)])
def test_rows_with_labels_keep_their_last_token(labels):
    rows = make_rows(stream(labels=labels), ByteTokenizer(), build({
        "model": {"kind": "encoder", "max_length": 64}, "data": {"length": 6, "task": {"objective": "classification"}}}))
    row = rows.make(3, RNG)
    document = stream().document(3)
    assert row["tokens"].tolist() == [*document[:5], document[-1]] and (row["targets"] == labels[3]).all() and row["mask"]
    assert not rows.make(20, RNG)["mask"] and rows.count == 20


def test_special_ids_lie_behind_the_tokenizers_or_are_its_own():
    assert special_ids(ByteTokenizer(), Task("masked_lm"), 24, 300) == [257]
    assert special_ids(ByteTokenizer(), Task("span_corruption"), 24, 300) == [257]
    with pytest.raises(UserError, match="config.model.vocab_size=258 or more"):
        special_ids(ByteTokenizer(), Task("masked_lm"), 24, 257)

    class Named(ByteTokenizer):
        def named(self, names):
            return [{"[MASK]": 3, "<extra_id_0>": 9}.get(name) for name in names]

    assert special_ids(Named(), Task("masked_lm"), 24, 257) == [3]
    assert special_ids(Named(), Task("span_corruption"), 24, 300) == [9]
    assert special_ids(Named(), Task("span_corruption", mean_span=1.0), 24, 300) == [257, 258, 259, 260]


def test_whole_words_need_a_tokenizer_that_knows_them():
    with pytest.raises(UserError, match="does not tell where words begin"):
        make_rows(stream(), ByteTokenizer(), config("encoder", "masked_lm", whole_words=True))


def test_words_of_whole_lines_are_hidden_one_by_one(tmp_path):
    """No blank stands between them, only line ends and tabs, which are units of their own."""
    corpus = ["one two three four\n"] * 9
    tokenizer = make_tokenizer("sentencepiece", 280, corpus, tmp_path)
    text = "one\ntwo\tthree\n\nfour\r\n" * 3
    tokens = np.array(tokenizer.encode(text) + tokenizer.encode("one Zwei"))
    row = {"tokens": tokens, "segments": np.ones(len(tokens), np.int32)}
    units = set()
    for seed in range(200):
        found = masked(row, tokenizer.word_bounds(), tokenizer.separator_id, 299, 0.001, np.random.default_rng(seed))
        units.add(tuple(np.flatnonzero(found["mask"]).tolist()))
    assert sorted(place for unit in units for place in unit) == list(range(len(tokens))), "units do not overlap"
    cut = [tokenizer.decode(tokens[list(unit)]) for unit in sorted(units)]
    assert cut == ["one", "\n", "two", "\t", "three", "\n\n", "four", "\r", "\n"] * 3 + ["one", " Zwei"]


class WithUnknown(ByteTokenizer):
    """Bytes, of which 250 is the unknown token and 0 to 4 are special."""

    def named(self, names):
        return [{"<unk>": 250}.get(name) for name in names]

    def controls(self):
        return [0, 1, 2, 3, 4, SEPARATOR]


def augmented(objective, kind, rate, **more):
    """Rows of a split as training has them, and as they are."""
    cfg = config(kind, objective, input_mask_rate=rate)
    return [make_rows(more["stream"], more["tokenizer"], cfg, training) for training in (True, False)]


def streams():
    plain = stream(2000)
    target = TokenStream(plain.tokens[::-1].copy(), np.arange(0, 2000, 10), 2000, 200)
    return {"next_token": plain, "prefix_lm": plain, "seq2seq": stream(2000, target=target),
            "classification": stream(2000, labels=np.arange(200, dtype=np.int32))}


HIDING = [(objective, kind) for objective in streams() for kind in OBJECTIVES[objective].kinds]


@pytest.mark.parametrize("objective, kind", HIDING)
@pytest.mark.parametrize("tokenizer, hidden", ((ByteTokenizer(), 257), (WithUnknown(), 250)))
def test_a_share_of_the_input_is_hidden_in_training_and_nothing_else(objective, kind, tokenizer, hidden):
    trained, plain = augmented(objective, kind, 0.25, stream=streams()[objective], tokenizer=tokenizer)
    part, seen, gone = "source_" if kind == "encoder_decoder" else "", 0, 0
    for i in range(plain.count):
        row, before = (rows.make(i, np.random.default_rng(i)) for rows in (trained, plain))
        assert row.keys() == before.keys() and all(row[key].dtype == before[key].dtype for key in row)
        for key in row:
            if key != f"{part}tokens":
                np.testing.assert_array_equal(row[key], before[key])
        tokens_L, before_L = row[f"{part}tokens"], before[f"{part}tokens"]
        changed_L = tokens_L != before_L
        assert (tokens_L[changed_L] == hidden).all()
        free_L = (before["prefix"] if "prefix" in row else before[f"{part}segments"] > 0) & ~np.isin(
            before_L, tokenizer.controls())
        assert not changed_L[~free_L].any(), "special tokens, padding and what is told stay"
        seen, gone = seen + free_L.sum(), gone + changed_L.sum()
    assert gone / seen == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / seen) + 0.01) and seen > 300
    last = trained.make(trained.count, np.random.default_rng(0))
    assert not any(array.any() for array in last.values())


def test_the_whole_input_or_none_is_hidden():
    for rate in (0.0, 1.0):
        trained, plain = augmented("seq2seq", "encoder_decoder", rate, stream=streams()["seq2seq"],
                                   tokenizer=ByteTokenizer())
        row, before = (rows.make(3, np.random.default_rng(0)) for rows in (trained, plain))
        text_L = (before["source_segments"] > 0) & (before["source_tokens"] != SEPARATOR)
        np.testing.assert_array_equal(row["source_tokens"], np.where(text_L & (rate == 1), 257, before["source_tokens"]))


def test_what_hides_input_needs_a_token_or_room_for_one():
    assert special_ids(ByteTokenizer(), Task("seq2seq", input_mask_rate=0.1), 24, 300) == [257]
    assert special_ids(WithUnknown(), Task("seq2seq", input_mask_rate=0.1), 24, 257) == [250]
    with pytest.raises(UserError, match="input_mask_rate=0.1 needs 1 ids .* config.model.vocab_size=258 or more"):
        special_ids(ByteTokenizer(), Task("seq2seq", input_mask_rate=0.1), 24, 257)
