"""What a model's bits per byte on the held-out text must beat: a general compressor, and token frequencies.

Both are cached in the prepared folder's baselines.json, which `prepare` removes when the data changes.
"""

import lzma
from collections.abc import Callable

import numpy as np

from moejax.config import UserError
from moejax.data.prepare import write_json
from moejax.data.prepared import Prepared, read_json

CHUNK_BYTES = 1 << 20
CHUNK_TOKENS = 1 << 24


def xz_bits_per_byte(prepared: Prepared) -> float:
    """Bits that `xz -9e` needs for a byte of the held-out text, all documents joined in one stream (about 1 s a MB)."""
    return _cached(prepared, "xz_bits_per_byte", _xz)


def unigram_bits_per_byte(prepared: Prepared) -> float:
    """Bits for a byte of the held-out text if each token is drawn by its add-one-smoothed frequency in training.

    Counts the tokens that a language model predicts too: all of the stream, separators included, but the first.
    """
    return _cached(prepared, "unigram_bits_per_byte", _unigram)


def _xz(prepared: Prepared) -> float:
    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    size = 0
    with open(prepared.folder / "eval.utf8", "rb") as text:
        while chunk := text.read(CHUNK_BYTES):
            size += len(compressor.compress(chunk))
    size += len(compressor.flush())
    return 8 * size / prepared.eval.bytes


def _unigram(prepared: Prepared) -> float:
    vocab_size = prepared.tokenizer.vocab_size
    smoothed_V = _counts(prepared.train.tokens, vocab_size) + 1
    bits_V = np.log2(smoothed_V.sum()) - np.log2(smoothed_V)
    return float(_counts(prepared.eval.tokens[1:], vocab_size) @ bits_V) / prepared.eval.bytes


def _counts(tokens_N: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each token occurs [V], read in chunks because bincount copies its input as int64."""
    chunks = (tokens_N[start:start + CHUNK_TOKENS] for start in range(0, len(tokens_N), CHUNK_TOKENS))
    return sum((np.bincount(chunk, minlength=vocab_size) for chunk in chunks), np.zeros(vocab_size, np.int64))


def _cached(prepared: Prepared, name: str, compute: Callable[[Prepared], float]) -> float:
    path = prepared.folder / "baselines.json"
    known = read_json(path)
    if not isinstance(known.get(name), float):
        try:
            known[name] = compute(prepared)
        except (OSError, ValueError) as error:
            raise UserError(f"{prepared.folder}: the prepared data is damaged ({error}); delete the folder and start again"
                            ) from None
        write_json(path, known)
    return known[name]
