"""Documents to token streams on disk, once: split, train or load the tokenizer, tokenise, write memory maps.

A prepared folder holds

    train.npy, eval.npy                 uint16 or uint32 [N]: every document as [separator] + tokens, one after another
    train_starts.npy, eval_starts.npy   int64 [documents]: where each document's separator lies
    eval.utf8                           the held-out text, joined
    tokenizer files                     see `tokenizers.load_tokenizer`
    summary.json                        counts, `fingerprint` and `content`; written last, so no other file is trusted
                                        without it

`fingerprint` decides whether the folder is used again. It covers the keys below, the size of the vocabulary, the seed,
and of the sources and a tokenizer file only names, sizes and times of change, so that a second start reads no text.
`content` is a hash of all documents, in order, with their split and the tokenizer: equal on machines with equal data.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moejax.config import Config, check
from moejax.data import sources
from moejax.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer, tokenizer_files

FORMAT = 1
"""Raise it when the same config would give other files."""
KEYS = ("source", "eval_source", "eval_fraction", "text_key", "tokenizer", "shuffle")
"""Keys of config.data that change what is prepared; the others act when batches are made."""
SPLITS = ("train", "eval")
BATCH_DOCUMENTS, BATCH_LETTERS = 1000, 4 << 20
"""Documents and text tokenised together: what is held in memory."""
SAY_SECONDS = 10


class TokenStream(NamedTuple):
    """One split. tokens_N: memory map uint16 or uint32; starts: int64 [documents], offsets of the separators; bytes:
    size of the text in UTF-8 without separators."""

    tokens: np.ndarray
    starts: np.ndarray
    bytes: int
    documents: int


class Prepared(NamedTuple):
    """All that training and evaluation need of the data."""

    tokenizer: Tokenizer
    train: TokenStream
    eval: TokenStream
    folder: Path
    content: str


def prepare(config: Config, folder: Path, say: Callable[[str], None] = print, content: str | None = None) -> Prepared:
    """Makes the prepared folder, or uses the one that is there if it was made of the same data in the same way.

    Documents are held out by a hash of their text, so copies of one document are on the same side; with
    config.data.eval_source, training documents that also occur there are left out. The training documents are shuffled
    once by config.seed (if config.data.shuffle); the held-out ones keep the order of their source.

    The folder is built beside its place and moved there when it is whole, so whatever goes wrong leaves an old one as it
    was.

    Only one process may write a folder; on several hosts let one prepare and the others call `load_prepared` after it.

    Args:
      config: what to prepare.
      folder: made if missing.
      say: takes lines about the progress.
      content: the hash that the data must have, if a model was trained on it before.

    Raises:
      UserError: from the sources and the tokenizer, a split without documents, or data with another hash.
    """
    fingerprint = _fingerprint(config)
    summary = read_json(folder / "summary.json")
    if summary.get("fingerprint") == fingerprint and content in (None, summary.get("content")):
        say(f"data: {folder} is up to date")
        return load_prepared(folder)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        found = _build(config, part, say, fingerprint)
        check(content in (None, found), f"config.data.source={config.data.source} is not the text that {folder.parent} was "
              "trained on; restore the text, or take another --workdir")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return load_prepared(folder)


def _build(config: Config, folder: Path, say: Callable[[str], None], fingerprint: str) -> str:
    """Fills an empty folder; returns the hash of the data."""
    begin = time.monotonic()
    training = (text for split, text in _split(config) if split == "train")
    tokenizer = make_tokenizer(config.data.tokenizer, config.model.vocab_size, training, folder)
    say(f"data: tokenizer {config.data.tokenizer} with {tokenizer.vocab_size:,} ids, {time.monotonic() - begin:.1f} s")
    lengths, text_bytes, content = _tokenise(config, tokenizer, folder, say)
    for split in SPLITS:
        order = np.arange(len(lengths[split]))
        if split == "train" and config.data.shuffle:
            order = np.random.default_rng(config.seed).permutation(order)
        _arrange(folder, split, np.asarray(lengths[split], np.int64), order, _dtype(tokenizer))
    counts = {split: {"documents": len(lengths[split]), "bytes": text_bytes[split], "tokens": sum(lengths[split])}
              for split in SPLITS}
    write_json(folder / "summary.json", {"fingerprint": fingerprint, "content": content, **counts})
    for split, count in counts.items():
        say(f"data: {split}: {count['documents']:,} documents, {count['bytes'] / 1e6:.2f} MB, "
            f"{count['tokens']:,} tokens")
    say(f"data: prepared in {time.monotonic() - begin:.1f} s")
    return content


def load_prepared(folder: Path) -> Prepared:
    """What an earlier `prepare` left in a folder. Raises UserError if that is missing or not whole."""
    summary = read_json(folder / "summary.json")
    check(bool(summary), f"{folder} holds no prepared data (summary.json); train with this workdir first")
    try:
        streams = [TokenStream(np.load(folder / f"{split}.npy", mmap_mode="r"), np.load(folder / f"{split}_starts.npy"),
                               summary[split]["bytes"], summary[split]["documents"]) for split in SPLITS]
        whole = all(len(stream.tokens) == summary[split]["tokens"] and len(stream.starts) == stream.documents
                    for split, stream in zip(SPLITS, streams))
        content = summary["content"]
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        whole = False
    check(whole, f"{folder}: the prepared data is damaged; delete the folder and start again")
    return Prepared(load_tokenizer(folder), *streams, folder, content)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes an object so that the file is there whole or not at all."""
    path.with_suffix(".part").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".part"), path)


def _fingerprint(config: Config) -> str:
    data = {key: getattr(config.data, key) for key in KEYS}
    named = [name for name in (config.data.source, config.data.eval_source) if name is not None]
    found = [sources.identity(name) for name in [*named, *map(str, tokenizer_files(config.data.tokenizer))]]
    parts = [FORMAT, data, config.model.vocab_size, config.seed, found]
    return hashlib.md5(json.dumps(parts).encode(), usedforsecurity=False).hexdigest()


def _split(config: Config) -> Iterator[tuple[str, str]]:
    """(split, text) of every document, in the order of the source, with eval_source first."""
    data, held_out = config.data, set()
    if data.eval_source is not None:
        for text in sources.documents(data.eval_source, data.text_key):
            held_out.add(bytes.fromhex(sources.digest(text)))
            yield "eval", text
    for text in sources.documents(data.source, data.text_key):
        digest = sources.digest(text)
        if data.eval_source is None:
            yield "eval" if int(digest[:8], 16) / 2**32 < data.eval_fraction else "train", text
        elif bytes.fromhex(digest) not in held_out:
            yield "train", text


def _tokenise(config: Config, tokenizer: Tokenizer, folder: Path, say: Callable[[str], None],
              ) -> tuple[dict[str, list[int]], dict[str, int], str]:
    """Writes SPLIT.raw with the tokens in the order of the source, and eval.utf8.

    Returns:
      Tokens of each document by split; bytes of text by split; the content hash.
    """
    lengths = {split: [] for split in SPLITS}
    text_bytes = dict.fromkeys(SPLITS, 0)
    content = hashlib.md5((folder / "tokenizer_config.json").read_bytes(), usedforsecurity=False)
    begin = said = time.monotonic()
    with (open(folder / "train.raw", "wb") as train, open(folder / "eval.raw", "wb") as held_out,
          open(folder / "eval.utf8.part", "wb") as held_out_text):
        raw = {"train": train, "eval": held_out}
        for batch in _batches(_split(config)):
            for (split, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch])):
                tokens = np.array([tokenizer.separator_id, *ids], _dtype(tokenizer))
                raw[split].write(tokens)
                lengths[split].append(len(tokens))
                data = text.encode("utf-8")
                text_bytes[split] += len(data)
                if split == "eval":
                    held_out_text.write(data)
                content.update(f"{split} {len(data)} ".encode() + data)
                content.update(tokens)
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                say(f"data: {sum(map(len, lengths.values())):,} documents, {sum(text_bytes.values()) / 1e6:.1f} MB "
                    f"tokenised in {said - begin:.0f} s")
    os.replace(folder / "eval.utf8.part", folder / "eval.utf8")
    where = f"config.data.source={config.data.source!r}"
    check(bool(lengths["eval"]), f"{where}: none of its {len(lengths['train'])} documents is held out; raise "
          f"config.data.eval_fraction={config.data.eval_fraction} or set config.data.eval_source")
    check(bool(lengths["train"]), f"{where}: no document is left for training; take more text, or less held out")
    return lengths, text_bytes, content.hexdigest()


def _batches(items: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Lists of items with BATCH_DOCUMENTS documents or about BATCH_LETTERS letters at most."""
    batch, letters = [], 0
    for item in items:
        batch.append(item)
        letters += len(item[1])
        if len(batch) == BATCH_DOCUMENTS or letters >= BATCH_LETTERS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def _arrange(folder: Path, split: str, lengths: np.ndarray, order: np.ndarray, dtype: type) -> None:
    """SPLIT.raw -> SPLIT.npy and SPLIT_starts.npy with the documents in the given order; removes SPLIT.raw."""
    raw = np.memmap(folder / f"{split}.raw", dtype, mode="r")
    ends = np.cumsum(lengths)
    tokens = np.lib.format.open_memmap(folder / f"{split}.npy.part", "w+", dtype, (len(raw),))
    starts = np.cumsum(lengths[order]) - lengths[order]
    for source, start in zip(order, starts):
        tokens[start:start + lengths[source]] = raw[ends[source] - lengths[source]:ends[source]]
    tokens.flush()
    with open(folder / f"{split}_starts.npy.part", "wb") as file:
        np.save(file, starts)
    for name in (f"{split}.npy", f"{split}_starts.npy"):
        os.replace(folder / f"{name}.part", folder / name)
    (folder / f"{split}.raw").unlink()


def _dtype(tokenizer: Tokenizer) -> type:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
