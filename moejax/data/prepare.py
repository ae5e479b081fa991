"""Documents to token streams on disk, once: split, train or load the tokenizer, tokenise, write memory maps.

A prepared folder, of a mixture that of each task in a folder of its name, holds

    train.npy, eval.npy                 uint16 or uint32 [N]: every document as [separator] + tokens, or as the tokenizer
                                        frames a single text if there are targets or labels, one after another
    train_starts.npy, eval_starts.npy   int64 [documents]: where each document begins
    train_target.npy ...                pairs: the same four files of the targets, each with its end
    train_labels.npy, eval_labels.npy   labels: int32 or float32 [documents], or float32 0 and 1 [documents, labels]
    eval.utf8                           the held-out text, joined
    eval_references.json                pairs: the held-out targets as texts
    tokenizer files                     see `tokenizers.load_tokenizer`
    summary.json                        counts, `fingerprint` and `content`; written last, so no other file is trusted
                                        without it

`fingerprint` decides whether the folder is used again. It covers the keys below, the size of the vocabulary, the seed,
and of the sources and a tokenizer file only names, sizes and times of change, so that a second start reads no text.
`content` is a hash of all documents, in order, with their split and the tokenizer: equal on machines with equal data.

With `samplings` every training example is there so many times, each time cut into other tokens, and so counts as documents.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.bounded import writing
from moejax.config import Config, UserError, check
from moejax.data import sources
from moejax.data.examples import Example, Reader
from moejax.data.labels import name_labels, names_in, number_labels
from moejax.data.prepared import REFERENCES, SPLITS, Prepared, load_prepared, read_json
from moejax.data.specials import special_ids
from moejax.data.tokenizers import Tokenizer, make_tokenizer, tokenizer_files
from moejax.mixture import parts, resolve
from moejax.task import ADDED, LABELS, OF_MIXTURES, PAIRS, TEXT, Task, reserved_ids, window_of

FORMAT = {TEXT: 2, PAIRS: 4, LABELS: 3}
"""Raise it when the same config would give other files."""
KEYS = ("source", "eval_source", "eval_fraction", "text_key", "task", "on_bad_record", "tokenizer", "shuffle")
"""Keys of config.data that change what is prepared; the others act when batches are made."""
BATCH_DOCUMENTS, BATCH_LETTERS = 1000, 4 << 20
"""Documents and text tokenised together: what is held in memory."""
SAY_SECONDS = 10


def prepare(config: Config, folder: Path, say: Callable[[str], None] = print, content: str | None = None) -> Prepared:
    """Makes the prepared folder, or uses the one that is there if it was made of the same data in the same way.

    Documents are held out by a hash of their text, so copies of one document are on the same side; with
    config.data.eval_source, training documents that also occur there, those of pairs or with labels by their input, are
    left out. The training documents are shuffled once by config.seed (if config.data.shuffle); the held-out ones keep the
    order of their source.

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
    task = resolve(config.data.task, config.model)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, task=task))
    own = parts(config)
    fingerprint = _fingerprint(own)
    summary = read_json(folder / "summary.json")
    if summary.get("fingerprint") == fingerprint and content in (None, summary.get("content")):
        say(f"data: {folder} is up to date")
        return load_prepared(folder)
    with writing(folder), _beside(folder) as new:
        tokenizer, found, taken = _tokenizer(own, new, say), {}, {}
        for name, each in own.items():
            with _of_task(name):
                _take_ids(each, tokenizer, taken)
                found[name] = _build(each, new / name, name, tokenizer, say)
        whole = found.get("") or _hash(found)
        summary = read_json(new / "summary.json") or {"tasks": list(own)}
        write_json(new / "summary.json", {"fingerprint": fingerprint, "content": whole} | summary)
        said = "config.data.task.tasks" if "tasks" in summary else f"config.data.source={config.data.source}"
        check(content in (None, whole), f"{said} is not the text that {folder.parent} was trained on; restore the text, or "
              "take another --workdir")
    return load_prepared(folder)


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A new folder, which takes the place of another one if all goes well, and is gone if not."""
    new = folder.with_name(folder.name + ".part")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def _of_task(name: str) -> Iterator[None]:
    """What is wrong with the input of one of several tasks names the task."""
    try:
        yield
    except UserError as error:
        raise UserError(f"task {name}: {error}" if name else str(error)) from error


def _tokenizer(configs: Mapping[str, Config], folder: Path, say: Callable[[str], None]) -> Tokenizer:
    """The tokenizer of all tasks, trained on all their training texts if it is to be trained, saved in the folder."""
    begin, one = time.monotonic(), next(iter(configs.values()))
    data, model = one.data, one.model

    def training() -> Iterator[str]:
        for name, config in configs.items():
            with _of_task(name):
                for split, example in _split(config, Reader(config)):
                    yield from (text for text in (example.text, example.target) if split == "train" and text is not None)

    trained = data.tokenizer == "sentencepiece"  # which leaves room for the ids that others may have
    reserved = max(reserved_ids(config.data.task, window_of(config.data, model.kind)) for config in configs.values())
    tokenizer = make_tokenizer(data.tokenizer, model.vocab_size - (reserved if trained else 0), training(), folder)
    say(f"data: tokenizer {data.tokenizer} with {tokenizer.vocab_size:,} ids, {time.monotonic() - begin:.1f} s")
    return tokenizer


def _take_ids(config: Config, tokenizer: Tokenizer, taken: dict[int, bool]) -> None:
    """Notes the ids that a task needs beside those of text, and whether it hides input behind them.

    Raises:
      UserError: the model has no room for them, or they mean something else in a task before.
    """
    task = config.data.task
    hides = task.input_mask_rate > 0
    for token in special_ids(tokenizer, task, window_of(config.data, config.model.kind), config.model.vocab_size):
        check(taken.setdefault(token, hides) == hides, "config.data.task.input_mask_rate has no token of its own beside "
              f"objectives that cut out spans, as config.data.tokenizer={config.data.tokenizer} has no mask and no unknown "
              "token; leave it out, or take another tokenizer")


def _build(config: Config, folder: Path, name: str, tokenizer: Tokenizer, say: Callable[[str], None]) -> str:
    """Fills the folder of one task; returns the hash of its data. The only task has the name ""."""
    begin, config = time.monotonic(), _with_labels(config)
    task, where = config.data.task, f"data: {name + ': ' if name else ''}"
    if name:
        folder.mkdir()
        tokenizer.save(folder)
    reader = Reader(config)
    lengths, labels, text_bytes, content = _tokenise(config, tokenizer, reader, folder, say)
    if reader.left_out:
        say(f"{where}{len(reader.left_out):,} records left out; the first: {reader.left_out[0]}")
    for reason, count in reader.unwanted.items():
        say(f"{where}{count:,} training examples left out, as {reason}")
    names = name_labels(config, labels, reader.first) if task.data == LABELS else ()
    for split in SPLITS:
        order = np.arange(len(lengths[split]))
        if split == "train":
            order = order.reshape(-1, task.samplings).T.ravel()  # none comes again before all have come
        if split == "train" and config.data.shuffle:
            order = np.random.default_rng(config.seed).permutation(order)
        for name in (split, f"{split}_target"):
            if name in lengths:
                _arrange(folder, name, np.asarray(lengths[name], np.int64), order, _dtype(tokenizer))
        if task.data == LABELS:
            np.save(folder / f"{split}_labels.npy", number_labels(task, labels[split], names)[order])
    counts = {split: {"documents": len(lengths[split]), "bytes": text_bytes[split], "tokens": sum(lengths[split]),
                      "target_tokens": sum(lengths.get(f"{split}_target", ()))} for split in SPLITS}
    write_json(folder / "summary.json", {"content": content, "labels": names, "samplings": task.samplings, **counts})
    for split, count in counts.items():
        say(f"{where}{split}: {count['documents']:,} documents, {count['bytes'] / 1e6:.2f} MB, {count['tokens']:,} tokens"
            + (f", {count['target_tokens']:,} in targets" if task.data == PAIRS else "")
            + (f" (each document {task.samplings} times)" if split == "train" and task.samplings > 1 else ""))
    say(f"{where}prepared in {time.monotonic() - begin:.1f} s")
    return content


def _with_labels(config: Config) -> Config:
    """Where bad records are left out, and no labels are named, the task gets those of training: so others are bad."""
    task = config.data.task
    if task.data != LABELS or task.objective == "regression" or task.labels or config.data.on_bad_record == "error":
        return config
    found = {name for split, example in _split(config, Reader(config)) if split == "train"
             for name in names_in(task, example.label)}
    task = dataclasses.replace(task, labels=tuple(sorted(found)) or None)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, task=task))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes an object so that the file is there whole or not at all."""
    path.with_suffix(".part").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".part"), path)


def _fingerprint(configs: Mapping[str, Config]) -> str:
    """Of one task or, by their names, of several."""
    found = {name: _fingerprint_of_one(config) for name, config in configs.items()}
    return found.get("") or _hash(found)


def _hash(parts: Any) -> str:
    """Of what JSON can hold."""
    return hashlib.md5(json.dumps(parts).encode(), usedforsecurity=False).hexdigest()


def _fingerprint_of_one(config: Config) -> str:
    task = {name: value for name, value in dataclasses.asdict(config.data.task).items()
            if name not in OF_MIXTURES and not (name in ADDED and value == getattr(Task, name))}
    data = {key: getattr(config.data, key) for key in KEYS} | {"task": task}
    named = [name for name in (config.data.source, config.data.eval_source) if name is not None]
    found = [sources.identity(name) for name in [*named, *map(str, tokenizer_files(config.data.tokenizer))]]
    classes = config.model.classes if config.data.task.data == LABELS else None
    form = FORMAT[config.data.task.data]
    known = [form, data, config.model.vocab_size, config.model.kind, classes, config.seed, found, reserved_ids(
        config.data.task, window_of(config.data, config.model.kind))]
    return _hash(known)


def _split(config: Config, reader: Reader) -> Iterator[tuple[str, Example]]:
    """(split, example) of every document, in the order of the source, with eval_source first."""
    data, held_out, seen = config.data, set(), set()
    if data.eval_source is not None:
        for example in reader.read(data.eval_source):
            held_out.add(bytes.fromhex(sources.digest(example.text)))
            yield "eval", example
    for example in reader.read(data.source):
        if data.eval_source is None and sources.is_drawn(example.text, data.eval_fraction):
            yield "eval", example
        elif held_out and bytes.fromhex(sources.digest(example.text)) in held_out:
            reader.unwanted["their input is held out"] += 1
        elif data.task.deduplicate and _again(example, seen):
            reader.unwanted["they were there before"] += 1
        else:
            yield "train", example


def _again(example: Example, seen: set[bytes]) -> bool:
    """Whether an example was seen before; from now on it was."""
    digest = bytes.fromhex(sources.digest(repr(example)))
    again = digest in seen
    seen.add(digest)
    return again


def _tokenise(config: Config, tokenizer: Tokenizer, reader: Reader, folder: Path, say: Callable[[str], None],
              ) -> tuple[dict[str, list[int]], dict[str, list[Any]], dict[str, int], str]:
    """Writes NAME.raw with the tokens in the order of the source, NAME being a split or a split's targets, and eval.utf8.

    Returns:
      Tokens of each document by name; labels by split; bytes of text by split; the content hash.
    """
    task, dtype = config.data.task, _dtype(tokenizer)
    names = [f"{split}{part}" for split in SPLITS for part in ("", "_target") if part == "" or task.data == PAIRS]
    lengths, labels = {name: [] for name in names}, {split: [] for split in SPLITS}
    text_bytes, references, ways = dict.fromkeys(SPLITS, 0), [], {"train": _ways(tokenizer, config), "eval": [tokenizer]}
    content = hashlib.md5((folder / "tokenizer_config.json").read_bytes(), usedforsecurity=False)
    begin = said = time.monotonic()
    with contextlib.ExitStack() as stack:
        raw = {name: stack.enter_context(open(folder / f"{name}.raw", "wb")) for name in names}
        held_out_text = stack.enter_context(open(folder / "eval.utf8.part", "wb"))
        for batch in _batches(_split(config, reader), task.samplings):
            found = {split: [_encode(way, task, [example for of, example in batch if of == split]) for way in ways[split]]
                     for split in SPLITS}
            for split, example in batch:
                data = example.text.encode("utf-8")
                text_bytes[split] += len(data) * len(ways[split])
                if split == "eval":
                    held_out_text.write(data)
                    references += [] if example.target is None else [example.target]
                content.update(f"{split} {len(data)} ".encode() + data)
                for part, rows in (item for parts in found[split] for item in parts.items()):
                    tokens = np.array(next(rows), dtype)
                    raw[split + part].write(tokens)
                    lengths[split + part].append(len(tokens))
                    content.update(tokens)
                if example.label is not None:
                    labels[split] += [example.label] * len(ways[split])
                    content.update(repr(example.label).encode())
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                say(f"data: {sum(len(lengths[split]) for split in SPLITS):,} documents, "
                    f"{sum(text_bytes.values()) / 1e6:.1f} MB tokenised in {said - begin:.0f} s")
    os.replace(folder / "eval.utf8.part", folder / "eval.utf8")
    if task.data == PAIRS:
        (folder / REFERENCES).write_text(json.dumps(references, ensure_ascii=False), encoding="utf-8")
    where = f"config.data.source={config.data.source!r}"
    check(bool(lengths["eval"]), f"{where}: none of its {len(lengths['train'])} documents is held out; raise "
          f"config.data.eval_fraction={config.data.eval_fraction} or set config.data.eval_source")
    check(bool(lengths["train"]), f"{where}: no document is left for training; take more text, or less held out")
    return lengths, labels, text_bytes, content.hexdigest()


def _ways(tokenizer: Tokenizer, config: Config) -> list[Tokenizer]:
    """With each of which every training example is tokenised. Raises `UserError` if one is to draw but cannot."""
    task = config.data.task
    if task.samplings == 1:
        return [tokenizer]
    found = [tokenizer.sampling(task.sampling_alpha, draw) for draw in range(task.samplings)]
    check(None not in found, f"config.data.task.samplings={task.samplings}: config.data.tokenizer={config.data.tokenizer} "
          "cuts a text in one way only; leave it out, or take a SentencePiece model of BPE or unigrams")
    return found


def _encode(tokenizer: Tokenizer, task: Task, examples: list[Example]) -> dict[str, Iterator[list[int]]]:
    """Tokens of the texts, and of their targets if there are any, as they are stored."""
    texts = [example.text for example in examples]
    parts = {"": ([tokenizer.separator_id, *ids] for ids in tokenizer.encode_batch(texts)) if task.data == TEXT
             else iter(tokenizer.frame_batch(texts))}
    if task.data == PAIRS:
        targets = tokenizer.encode_batch([example.target for example in examples])
        parts["_target"] = ([*ids, tokenizer.separator_id] for ids in targets)
    return parts


def _batches(items: Iterable[tuple[str, Example]], ways: int) -> Iterator[list[tuple[str, Example]]]:
    """Lists of items which, each tokenised so many times, have BATCH_DOCUMENTS documents or about BATCH_LETTERS letters at
    most, or are one."""
    batch, letters = [], 0
    for item in items:
        batch.append(item)
        letters += len(item[1].text)
        if len(batch) * ways >= BATCH_DOCUMENTS or letters * ways >= BATCH_LETTERS:
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
