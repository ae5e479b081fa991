"""Text to token ids and back: bytes, SentencePiece (trained here or loaded), or a Hugging Face tokenizer.json.

The three classes have the same fields and methods. `separator_id` is the one special token that moejax puts before
every document; `encode` never yields it, whatever the text says.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax.bounded import parse_json, read_file
from moejax.config import UserError, check, nearest
from moejax.data import sources
from moejax.data.pieces import train

META = "\u2581"
"""SentencePiece's stand-in for a blank. In text it would come back as a blank, so it is spelt in bytes."""
SEPARATORS = ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "</s>", "<eos>",
              "<|end_of_text|>", "[SEP]")
"""Names of a beginning-of-text token, then of an end-of-text token, by which a tokenizer.json is searched."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One token a UTF-8 byte."""

    name: str = "bytes"
    vocab_size: int = 257
    separator_id: int = 256

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def frame_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with the special tokens that one text has: the separator before it."""
        return [[self.separator_id, *ids] for ids in self.encode_batch(texts)]

    def named(self, names: Sequence[str]) -> list[int | None]:
        """Ids of special tokens; None where there is no such token."""
        return [None] * len(names)

    def word_bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Which ids begin a word, bool, and behind which a word ends, bool; None if that cannot be told."""
        return None

    def controls(self) -> list[int]:
        """Ids that stand for no text."""
        return [self.separator_id]

    def sampling(self, alpha: float, draw: int) -> None:
        """The tokenizer that cuts texts at random, or None if it cannot."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Separators and unknown ids are dropped; broken UTF-8 becomes U+FFFD."""
        return bytes(token for token in map(int, ids) if token < 256).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Writes what `load_tokenizer` reads."""
        _write_marker(folder, kind="bytes")


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    """A SentencePiece model.

    Attributes:
      name, vocab_size, separator_id, processor: of the model.
      meta_ids: spell `META` in byte tokens, in models that can keep every text as it is.
      alpha: None, or texts are cut at random: without this share of the merges (BPE-dropout, Provilkov et al. 2020, arXiv
        1910.13267), or in a unigram model by the probabilities of the ways to this power (Kudo 2018, arXiv 1804.10959).
      draw: how often each text was cut before; how it is cut is a function of the text and this number.
    """

    name: str
    vocab_size: int
    separator_id: int
    processor: Any
    meta_ids: tuple[int, ...]
    alpha: float | None = None
    draw: int = 0

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        if not self.meta_ids or not any(META in text for text in texts):
            return self._cut(texts)
        return [self._spell_meta(self._cut(text.split(META))) for text in texts]

    def _cut(self, texts: Sequence[str]) -> list[list[int]]:
        return self.processor.encode(list(texts)) if self.alpha is None else list(map(self._cut_at_random, texts))

    def _cut_at_random(self, text: str) -> list[int]:
        import sentencepiece

        seed = int(sources.digest(f"{self.draw} {text}")[:8], 16) >> 1  # the largest of 32 bits would mean any seed
        sentencepiece.set_random_generator_seed(seed)
        return self.processor.encode(text, enable_sampling=True, nbest_size=-1, alpha=self.alpha)

    def _spell_meta(self, parts: list[list[int]]) -> list[int]:
        return [token for n, part in enumerate(parts) for token in (*(self.meta_ids if n else ()), *part)]

    def frame_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with the special tokens that one text has: the separator before it, or behind it in
        models that only know an end, as T5's."""
        ends = self.processor.bos_id() < 0
        return [[*ids, self.separator_id] if ends else [self.separator_id, *ids] for ids in self.encode_batch(texts)]

    def named(self, names: Sequence[str]) -> list[int | None]:
        """Ids of special tokens; None where there is no such token."""
        found, unknown = [self.processor.piece_to_id(name) for name in names], self.processor.unk_id()
        return [None if token == unknown and name != self.processor.id_to_piece(unknown) else token
                for token, name in zip(found, names)]

    def word_bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Which ids begin a word, bool, and behind which a word ends, bool; None if that cannot be told."""
        return _word_bounds(self, [self.processor.id_to_piece(token) for token in range(self.vocab_size)])

    def controls(self) -> list[int]:
        """Ids that stand for no text."""
        return [token for token in range(self.vocab_size) if self.processor.is_control(token)]

    def sampling(self, alpha: float, draw: int) -> "SentencePieceTokenizer | None":
        """The tokenizer that cuts texts at random, or None if it cannot."""
        found = dataclasses.replace(self, alpha=alpha, draw=draw)
        try:
            found.encode("a")
        except RuntimeError:  # a model of words or of letters
            return None
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Separators and unknown ids are dropped; broken UTF-8 becomes U+FFFD."""
        return self.processor.decode(_known(self, ids))

    def save(self, folder: Path) -> None:
        """Writes what `load_tokenizer` reads."""
        (folder / "tokenizer.model").write_bytes(self.processor.serialized_model_proto())
        _write_marker(folder, kind="sentencepiece")


@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` package."""

    name: str
    vocab_size: int
    separator_id: int
    backend: Any

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return self._ids(texts, add_special_tokens=False)

    def frame_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with the special tokens that the tokenizer puts around it, or the separator before it."""
        plain, framed = self.encode_batch(texts), self._ids(texts, add_special_tokens=True)
        return [[self.separator_id, *ids] if ids == whole else whole for ids, whole in zip(plain, framed)]

    def _ids(self, texts: Sequence[str], **how: bool) -> list[list[int]]:
        with _as_user_error(f"{self.name}: this tokenizer cannot encode the text"):
            return [encoding.ids for encoding in self.backend.encode_batch(list(texts), **how)]

    def named(self, names: Sequence[str]) -> list[int | None]:
        """Ids of special tokens; None where there is no such token."""
        return [self.backend.token_to_id(name) for name in names]

    def word_bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Which ids begin a word, bool, and behind which a word ends, bool; None if that cannot be told."""
        return _word_bounds(self, [self.backend.id_to_token(token) or "" for token in range(self.vocab_size)])

    def controls(self) -> list[int]:
        """Ids that stand for no text."""
        added = self.backend.get_added_tokens_decoder()
        return sorted({self.separator_id} | {token for token, meaning in added.items() if meaning.special})

    def sampling(self, alpha: float, draw: int) -> None:
        """The tokenizer that cuts texts at random, or None if it cannot, for what this package draws has no seed."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Separators and unknown ids are dropped."""
        with _as_user_error(f"{self.name}: this tokenizer cannot decode"):
            return self.backend.decode(_known(self, ids), skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Writes what `load_tokenizer` reads."""
        (folder / "tokenizer.json").write_text(self.backend.to_str(), encoding="utf-8")
        _write_marker(folder, kind="huggingface", bos_token=self.backend.id_to_token(self.separator_id))


Tokenizer = ByteTokenizer | SentencePieceTokenizer | HuggingFaceTokenizer


def make_tokenizer(spec: str, vocab_size: int, training_documents: Iterable[str], folder: Path) -> Tokenizer:
    """The tokenizer that config.data.tokenizer asks for, saved in `folder`.

    Args:
      spec: bytes, sentencepiece, or a file (a path or package:NAME/PATH): a tokenizer.json or a SentencePiece model.
      vocab_size: config.model.vocab_size: the size of a trained tokenizer, the limit of any other.
      training_documents: read only if spec is sentencepiece.
      folder: exists; see `load_tokenizer`.

    Raises:
      UserError: no such tokenizer, a broken file, no separator in it, more ids than vocab_size, or a corpus that does
        not fit vocab_size.
    """
    if spec == "bytes":
        tokenizer = ByteTokenizer()
    elif spec == "sentencepiece":
        tokenizer = _sentencepiece(train(training_documents, vocab_size), spec)
    else:
        tokenizer = _from_file(tokenizer_files(spec)[0])
    check(tokenizer.vocab_size <= vocab_size,
          f"config.model.vocab_size={vocab_size} is less than the {tokenizer.vocab_size} ids of config.data.tokenizer="
          f"{spec}; raise it to {tokenizer.vocab_size} or more")
    tokenizer.save(folder)
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `save` put into a folder: tokenizer_config.json and tokenizer.model or tokenizer.json.

    Raises:
      UserError: a file is missing or broken.
    """
    marker = folder / "tokenizer_config.json"
    try:
        kind = parse_json(read_file(marker))["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{marker}: missing or broken; delete the folder and give the training command again") from error
    if kind == "bytes":
        return ByteTokenizer()
    return _from_file(folder / ("tokenizer.model" if kind == "sentencepiece" else "tokenizer.json"))


def added_text(tokenizer: Tokenizer, before: list[int], new: list[int]) -> str:
    """What new tokens add to the text of those before them: a blank before a word belongs to it."""
    return tokenizer.decode(before + new)[len(tokenizer.decode(before)):]


def tokenizer_files(spec: str) -> list[Path]:
    """The one file of a tokenizer spec, or none for those that have no file. Raises UserError if it is not there."""
    if spec in ("bytes", "sentencepiece"):
        return []
    try:
        found = sources.files(spec)
    except UserError as error:
        hint = nearest(spec, ("bytes", "sentencepiece"))
        message = f"config.data.tokenizer={spec!r} is neither bytes nor sentencepiece{hint}, and as a file: {error}"
        raise UserError(message) from error
    check(len(found) == 1, f"config.data.tokenizer={spec!r} matches {len(found)} files; name one")
    return found


def _word_bounds(tokenizer: "Tokenizer", pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """Which pieces begin a word: those after a blank, or all that do not go on with ##. None if neither is marked.

    Line ends and tabs stand apart too, whether pieces of their own or the first or last letter of one: no blank follows
    them. A piece that is only the blank belongs to the letters behind it.
    """
    going_on = any(piece.startswith("##") for piece in pieces)
    starts = [not piece.startswith("##") if going_on else piece.startswith((META, "\u0120")) for piece in pieces]
    if not any(starts):
        return None
    texts = [tokenizer.decode([token]) for token in range(len(pieces))]
    return (np.array([start or _is_break(text[:1]) for start, text in zip(starts, texts)]),
            np.array([_is_break(text[-1:]) for text in texts]))


def _is_break(letter: str) -> bool:
    return letter.isspace() and letter != " "


def _write_marker(folder: Path, **values: str) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(values) + "\n", encoding="utf-8")


def _known(tokenizer: Tokenizer, ids: Iterable[int]) -> list[int]:
    """Ids that stand for text. A model's vocabulary may be larger than its tokenizer's, so it can yield others."""
    return [token for token in map(int, ids) if token != tokenizer.separator_id and token < tokenizer.vocab_size]


def _from_file(path: Path) -> Tokenizer:
    return _hugging_face(path) if path.suffix == ".json" else _sentencepiece(_read(path), str(path))


@contextlib.contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    """Turns what the `tokenizers` package raises into `UserError`: nothing more precise, and panics of Rust."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise UserError(f"{what} ({error}); make or download the file again") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the tokenizer file cannot be read ({error.strerror})") from error


def _sentencepiece(proto: bytes, where: str) -> SentencePieceTokenizer:
    import sentencepiece

    try:
        # An empty model loads without complaint and then answers 0 to everything.
        processor = sentencepiece.SentencePieceProcessor(model_proto=proto) if proto else None
        if processor is not None:
            processor.id_to_piece(list(range(processor.get_piece_size())))  # raises unless all of them are UTF-8
    except (RuntimeError, ValueError):
        processor = None
    check(processor is not None and processor.get_piece_size() > 0,
          f"{where}: not a SentencePiece model; make or download it again")
    separator = next((token for token in (processor.bos_id(), processor.eos_id()) if token >= 0), None)
    check(separator is not None, f"{where}: no <s> or </s> that can separate documents; use another tokenizer")
    byte_ids = tuple(processor.piece_to_id(f"<0x{byte:02X}>") for byte in META.encode("utf-8"))
    tokenizer = SentencePieceTokenizer(where, processor.get_piece_size(), separator, processor, byte_ids)
    # Models that put a blank before every text would put one after the spelt letter too: those keep their own way.
    sample = f" a{META}b "
    exact = tokenizer.decode(tokenizer.encode(sample)) == sample
    return tokenizer if exact else dataclasses.replace(tokenizer, meta_ids=())


def _hugging_face(path: Path) -> HuggingFaceTokenizer:
    import tokenizers

    content = _read(path)
    with _as_user_error(f"{path}: not a tokenizer.json"):
        backend = tokenizers.Tokenizer.from_buffer(content)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # "<s>" in a text is three letters, not a separator
    names = _named(path, "bos_token") + SEPARATORS + _named(path, "eos_token")
    separator = next((token for token in map(backend.token_to_id, names) if token is not None), None)
    check(separator is not None, f"{path}: no token that can separate documents (none of {', '.join(SEPARATORS)}); "
          "name one as bos_token in a tokenizer_config.json beside it")
    return HuggingFaceTokenizer(str(path), max(backend.get_vocab().values()) + 1, separator, backend)


def _named(path: Path, role: str) -> tuple[str, ...]:
    """The special token of that role in the tokenizer_config.json beside a tokenizer.json, if there is one."""
    try:
        token = parse_json(read_file(path.parent / "tokenizer_config.json")).get(role)
    except (OSError, ValueError, AttributeError):
        return ()
    token = token.get("content") if isinstance(token, dict) else token
    return (token,) if isinstance(token, str) else ()
