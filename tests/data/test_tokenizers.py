"""Text in, the same text out; no text can forge a separator; what is saved is what is loaded."""

import json

import hypothesis
import pytest
import sentencepiece
import tokenizers
from hypothesis import strategies

from moejax.config import UserError
from moejax.data.tokenizers import SEPARATORS, load_tokenizer, make_tokenizer

CORPUS = [f"The {word} of the states,\tin {year}:\n\n  we {word} what we {word}ed.\n" for year in range(1790, 1830)
          for word in ("report", "govern", "conclud", "harvest")]
ODD = ["", " ", "  a  b ", "\n", "\n\n\n", "\t\r\n", "\x00", "\u2581", "a\u2581 b\u2581\u2581",
       "<s></s><unk><|endoftext|>", "<0x41>", "é e\u0301 ﬁ", "世界 \U0001f600",
       "\ufeff\u200b\u3000\xa0\u2028", "report" * 900]
letters = strategies.sampled_from("aé \n\t\r\u2581世\U0001f600<s>/\x00,7\u0301")
texts = strategies.text(letters | strategies.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.fixture(scope="module")
def hugging_face_file(tmp_path_factory):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.train_from_iterator(CORPUS, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "[EXTRA]"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "hugging_face"])
def made(request, tmp_path_factory):
    """(tokenizer, the folder it was saved in)"""
    spec = request.getfixturevalue("hugging_face_file") if request.param == "hugging_face" else request.param
    folder = tmp_path_factory.mktemp("saved")
    return make_tokenizer(str(spec), 350, iter(CORPUS), folder), folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return make_tokenizer("sentencepiece", 350, iter(CORPUS), tmp_path_factory.mktemp("pieces"))


def test_odd_texts_come_back_alone_and_in_a_batch(made):
    tokenizer, folder = made
    ids = tokenizer.encode_batch(ODD)
    assert ids == [tokenizer.encode(text) for text in ODD] == load_tokenizer(folder).encode_batch(ODD)
    for text, tokens in zip(ODD, ids):
        assert tokenizer.decode(tokens) == load_tokenizer(folder).decode(tokens) == text


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(text=texts)
def test_every_text_comes_back_and_has_no_separator(made, text):
    tokenizer, _ = made
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocab_size and token != tokenizer.separator_id for token in ids)
    assert tokenizer.decode(ids) == text


def test_decoding_drops_separators_and_ids_that_only_the_model_has(made):
    tokenizer, folder = made
    ids = tokenizer.encode("we report")
    assert tokenizer.decode([tokenizer.separator_id, *ids, tokenizer.vocab_size, tokenizer.separator_id]) == "we report"
    loaded = load_tokenizer(folder)
    assert (loaded.vocab_size, loaded.separator_id) == (tokenizer.vocab_size, tokenizer.separator_id)


def test_training_is_a_function_of_the_documents_and_shortens_them(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        tokenizer = make_tokenizer("sentencepiece", 350, iter(CORPUS), tmp_path / name)
    first, second = ((tmp_path / name / "tokenizer.model").read_bytes() for name in "ab")
    assert first == second and tokenizer.vocab_size == 350
    assert sum(map(len, tokenizer.encode_batch(CORPUS))) < 0.5 * sum(map(len, CORPUS))
    (tmp_path / "c").mkdir()
    copied = make_tokenizer(str(tmp_path / "a" / "tokenizer.model"), 350, iter(()), tmp_path / "c")
    assert copied.encode_batch(ODD) == tokenizer.encode_batch(ODD)


@pytest.mark.parametrize("ids, separator", [((1, 2), 1), ((-1, 1), 1), ((2, 1), 2), ((-1, -1), None)])
def test_foreign_sentencepiece_models_keep_their_way(tmp_path, ids, separator):
    """`ids` are those of <s> and </s>. The model puts a blank before each text and folds the letter for a blank."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(tmp_path / "foreign"), vocab_size=320, bos_id=ids[0],
        eos_id=ids[1], model_type="bpe", byte_fallback=True, minloglevel=2)
    spec = str(tmp_path / "foreign.model")
    if separator is None:
        with pytest.raises(UserError, match="foreign.model: no <s> or </s>"):
            make_tokenizer(spec, 320, (), tmp_path)
        return
    tokenizer = make_tokenizer(spec, 400, (), tmp_path)
    assert (tokenizer.separator_id, tokenizer.vocab_size) == (separator, 320)
    reference = sentencepiece.SentencePieceProcessor(model_file=spec)
    texts = ["we report", " a\u2581b ", "states"]
    assert tokenizer.encode_batch(texts) == reference.encode(texts)
    assert tokenizer.decode([separator, *reference.encode("we report")]) == "we report"
    plain = reference.encode("we report")  # which models without a beginning, such as T5's, end
    assert tokenizer.frame_batch(["we report"]) == [[separator, *plain] if ids[0] >= 0 else [*plain, separator]]


def with_special(path, folder, names, **config):
    """The tokenizer.json at `path` with its special tokens renamed, and a tokenizer_config.json beside it."""
    text = path.read_text()
    for old, new in zip(("<|endoftext|>", "[EXTRA]"), names):
        text = text.replace(json.dumps(old), json.dumps(new))
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize("names, config, separator", [
    (("</s>", "<s>"), {}, "<s>"),
    (("</s>", "[SEP]"), {}, "</s>"),
    (("</s>", "[NEW]"), {"bos_token": "[NEW]"}, "[NEW]"),
    (("</s>", "[NEW]"), {"bos_token": {"content": "[NEW]"}}, "[NEW]"),
    (("[A]", "[END]"), {"bos_token": None, "eos_token": "[END]"}, "[END]"),
])
def test_the_separator_of_a_tokenizer_json(hugging_face_file, tmp_path, names, config, separator):
    spec = with_special(hugging_face_file, tmp_path, names, **config)
    (tmp_path / "out").mkdir()
    tokenizer = make_tokenizer(spec, 300, (), tmp_path / "out")
    assert tokenizer.separator_id == names.index(separator)
    assert load_tokenizer(tmp_path / "out").separator_id == tokenizer.separator_id


def test_errors_name_what_is_wrong(hugging_face_file, tmp_path):
    def fails(said, spec, vocab_size=350, corpus=()):
        with pytest.raises(UserError, match=said) as error:
            make_tokenizer(str(spec), vocab_size, iter(corpus), tmp_path)
        assert "\n" not in str(error.value)

    fails(r"config\.data\.tokenizer='sentencepeice'.*did you mean sentencepiece", "sentencepeice")
    fails(r"config\.model\.vocab_size=256 is less than the 257 ids", "bytes", 256)
    fails(r"config\.model\.vocab_size=299 is less than the 300 ids", hugging_face_file, 299)
    fails(r"config\.model\.vocab_size=9999 does not suit.*set \d+ or less", "sentencepiece", 9999, CORPUS)
    fails(r"config\.model\.vocab_size=257 does not suit.*take \d+ pieces", "sentencepiece", 257, CORPUS)
    fails("no training documents", "sentencepiece")
    fails("no token that can separate.*<s>", with_special(hugging_face_file, tmp_path, ("[A]", "[B]")))
    for name, content in [("t.model", b""), ("t.model", b"junk"), ("t.json", b"{}"), ("t.json", b"\xff")]:
        (tmp_path / name).write_bytes(content)
        fails(f"{name}: not a", tmp_path / name)
    assert "[A]" not in SEPARATORS


def test_a_damaged_folder_is_named(made, tmp_path):
    with pytest.raises(UserError, match="tokenizer_config.json: missing or broken"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"kind": "sentencepiece"}')
    with pytest.raises(UserError, match="tokenizer.model: the tokenizer file cannot be read"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_model_with_pieces_that_are_no_text_is_refused(tmp_path):
    processor = make_tokenizer("sentencepiece", 320, CORPUS, tmp_path).processor
    pieces = processor.id_to_piece(list(range(processor.get_piece_size())))
    piece = next(piece for piece in pieces if piece.isascii() and piece.isalpha() and len(piece) > 1)
    content = (tmp_path / "tokenizer.model").read_bytes()
    place = content.index(bytes([len(piece)]) + piece.encode()) + 1
    (tmp_path / "tokenizer.model").write_bytes(content[:place] + b"\xff" + content[place + 1:])
    with pytest.raises(UserError, match="tokenizer.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_encode_a_text_says_so(tmp_path):
    """Of words, without one for those that it does not know."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "known": 1}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "made").mkdir()
    made = make_tokenizer(str(tmp_path / "tokenizer.json"), 300, (), tmp_path / "made")
    assert made.encode("known") == [1] and made.frame_batch(["known"]) == [[0, 1]]
    for use in (made.encode, lambda text: made.frame_batch([text])):
        with pytest.raises(UserError, match=r"tokenizer\.json: this tokenizer cannot encode the text \("):
            use("unknown")


@pytest.mark.parametrize("content", ("", "[]", "3", "[" * 100_000, "{}"))
def test_the_file_that_says_which_tokenizer_it_is_may_be_damaged(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: missing or broken"):
        load_tokenizer(tmp_path)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(text=texts, draw=strategies.integers(0, 5))
def test_every_way_in_which_a_text_is_cut_gives_it_back(pieces, text, draw):
    sampling = pieces.sampling(0.5, draw)
    for given in (text, *ODD):
        ids, = sampling.encode_batch([given])
        assert pieces.decode(ids) == given and pieces.separator_id not in ids
        assert sampling.encode(given) == ids == pieces.sampling(0.5, draw).encode_batch(["other", given])[1]
    assert [sampling.encode(given) for given in ODD] == sampling.encode_batch(ODD)


def test_texts_are_cut_in_many_ways_that_are_longer(pieces):
    plain = sum(map(len, pieces.encode_batch(CORPUS)))
    ways = [pieces.sampling(0.3, draw).encode_batch(CORPUS[:9]) for draw in range(5)]
    assert all(len({tuple(way[n]) for way in ways}) == 5 for n in range(9))
    sizes = [sum(map(len, pieces.sampling(alpha, 0).encode_batch(CORPUS))) for alpha in (0.0, 0.1, 0.4, 1.0)]
    assert plain == sizes[0] < sizes[1] < sizes[2] < sizes[3]


def test_unigram_models_sample_and_those_of_words_do_not(tmp_path):
    for kind in ("unigram", "word"):
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_prefix=str(tmp_path / kind),
                                                 vocab_size=60, model_type=kind, minloglevel=2, hard_vocab_limit=False)
    unigram, words = (make_tokenizer(str(tmp_path / f"{kind}.model"), 400, (), tmp_path) for kind in ("unigram", "word"))
    assert words.sampling(0.1, 0) is None
    ways = {tuple(unigram.sampling(0.1, draw).encode(CORPUS[0])) for draw in range(9)}
    assert len(ways) > 5 and {unigram.decode(way) for way in ways} == {unigram.decode(unigram.encode(CORPUS[0]))}


def test_special_tokens_are_named_and_stand_for_no_text(made, pieces):
    tokenizer, _ = made
    controls = tokenizer.controls()
    assert tokenizer.separator_id in controls and len(controls) < 10
    assert not set(controls) & {token for ids in tokenizer.encode_batch([*ODD, *CORPUS]) for token in ids}
    assert pieces.named(["<unk>", "<s>", "none"]) == [0, 1, None]


def test_words_begin_behind_blanks_line_ends_and_tabs(made):
    tokenizer, _ = made
    ids = tokenizer.encode("The\nreport\tof states\r\nZ")
    if (words := tokenizer.word_bounds()) is None:
        assert tokenizer.name == "bytes"
        return
    begin, end = words
    cut, ended = [], True
    for token in ids:
        cut = [*cut, [token]] if ended or begin[token] else [*cut[:-1], [*cut[-1], token]]
        ended = end[token]
    assert list(map(tokenizer.decode, cut)) == ["The", "\n", "report", "\t", "of", " states", "\r", "\n", "Z"]


def test_pieces_that_end_with_a_line_end_a_word(tmp_path):
    """As models have them that keep punctuation and line ends together."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "\u0120a": 1, ".\u010a": 2, "b": 3, "\u0120": 4}))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "made").mkdir()
    begin, end = make_tokenizer(str(tmp_path / "tokenizer.json"), 300, (), tmp_path / "made").word_bounds()
    assert begin.tolist() == [False, True, False, False, True] and end.tolist() == [False, False, True, False, False]
