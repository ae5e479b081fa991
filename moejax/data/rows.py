"""What the model reads and is to tell, row by row, for every objective."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from moejax.config import Config, check
from moejax.data.packing import num_windows, pack
from moejax.data.prepared import TokenStream
from moejax.data.specials import special_ids
from moejax.data.tokenizers import Tokenizer
from moejax.objectives.masked_lm import mask_tokens
from moejax.objectives.prefix_lm import draw_prefix
from moejax.objectives.span_corruption import corrupt, draw_spans
from moejax.task import LABELS, PAIRS, Task, denoisers, num_spans, prefix_of, resolve, window_of

Row = dict[str, np.ndarray]


class Rows(NamedTuple):
    """The rows of a split.

    Attributes:
      count: their number.
      make: (number, random generator) -> arrays of one row; zeros, with nothing to tell, for numbers from `count` on.
    """

    count: int
    make: Callable[[int, np.random.Generator], Row]


class Layout(NamedTuple):
    """How input and target become a row.

    Attributes:
      both: an encoder reads the input and a decoder the target; or a decoder reads both.
      length: slots of the decoder.
      source_length: slots of the encoder.
      start_id: with which a decoder behind an encoder begins.
    """

    both: bool
    length: int
    source_length: int
    start_id: int


def make_rows(stream: TokenStream, tokenizer: Tokenizer, config: Config, training: bool = False) -> Rows:
    """The rows of a split for the objective in config.data.task, in training with hidden input if the task wants that.

    Raises `UserError` if there is nothing to tell.
    """
    task = resolve(config.data.task, config.model)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, task=task))
    rows, rate = _make_rows(stream, tokenizer, config), task.input_mask_rate
    if not (training and rate):
        return rows
    hidden_id, = special_ids(tokenizer, task, window_of(config.data, config.model.kind), config.model.vocab_size)
    controls = tokenizer.controls()
    return Rows(rows.count, lambda index, rng: with_hidden(rows.make(index, rng), controls, hidden_id, rate, rng))


def _make_rows(stream: TokenStream, tokenizer: Tokenizer, config: Config) -> Rows:
    data, task = config.data, config.data.task
    design, both = config.model.architecture, config.model.kind == "encoder_decoder"
    layout = Layout(both, data.length, data.encoder_length, getattr(design, "start_token", 0))
    needed = {LABELS: stream.labels, PAIRS: stream.target}.get(task.data, stream)
    check(needed is not None, f"the prepared data has no {task.data}, which config.data.task.objective={task.objective} "
          "needs; delete the folder data/ of the workdir and start again")
    if task.data == LABELS:
        return _with_empty(stream.documents, lambda index, rng: labelled(stream, data.length, index))
    if task.data == PAIRS:
        return _with_empty(stream.documents, lambda index, rng: pair(
            stream.document(index), stream.target.document(index), layout))
    separator, window = tokenizer.separator_id, window_of(data, config.model.kind)
    count = num_windows(len(stream.tokens), window)
    check(count > 0, "a data split has fewer than two tokens; take more text in config.data.source")
    specials = special_ids(tokenizer, task, window, config.model.vocab_size)
    if both or denoisers(task):
        return _with_empty(count, lambda index, rng: denoised(np.asarray(
            stream.tokens[index * window:(index + 1) * window], np.int32), task, specials, separator, layout, rng))
    packed = partial(pack, stream.tokens, separator, data.length, data.boundaries)
    if task.objective == "next_token":
        return Rows(count, lambda index, rng: packed(index))
    if task.objective == "prefix_lm":
        return Rows(count, lambda index, rng: with_prefix(packed(index), rng))
    mask_id, = specials
    words = tokenizer.word_bounds() if task.whole_words else (np.ones(tokenizer.vocab_size, bool),) * 2
    check(words is not None, f"config.data.task.whole_words: config.data.tokenizer={data.tokenizer} does not tell where "
          "words begin; set it to False")
    return Rows(count, lambda index, rng: masked(packed(index), words, separator, mask_id, task.mask_rate, rng))


def with_hidden(row: Row, controls: list[int], hidden_id: int, rate: float, rng: np.random.Generator) -> Row:
    """A row of whose input each token is hidden with probability `rate`, behind another id.

    The input is what an encoder reads; of a decoder its prefix, or where there is none all that it reads, but never what it
    is to tell.

    Args:
      row: as an objective makes it.
      controls: ids that are not hidden.
      hidden_id: the other id.
      rate: from 0 to 1.
      rng: draws.
    """
    part = "source_" if "source_tokens" in row else ""
    tokens_L = row[f"{part}tokens"]
    may_L = row["prefix"] if "prefix" in row else row[f"{part}segments"] > 0
    hidden_L = may_L & ~np.isin(tokens_L, controls) & (rng.random(len(tokens_L)) < rate)
    return row | {f"{part}tokens": np.where(hidden_L, np.int32(hidden_id), tokens_L)}


def masked(row: Row, words: tuple[np.ndarray, np.ndarray], separator_id: int, mask_id: int, rate: float,
           rng: np.random.Generator) -> Row:
    """A packed window for an encoder that is to tell the hidden tokens. Separators are never hidden.

    Args:
      row: the window.
      words: bool [V] each, which ids begin a unit that is hidden as a whole, and behind which such a unit ends.
      separator_id, mask_id, rate, rng: see `mask_tokens`.
    """
    tokens_L, size = row["tokens"], len(words[0])
    real_L = (row["segments"] > 0) & (tokens_L != separator_id)
    known_L = tokens_L < size
    begin_L, end_L = (np.where(known_L, ids_V[np.where(known_L, tokens_L, 0)], True) for ids_V in words)
    seen_L, chosen_L = mask_tokens(tokens_L, real_L, begin_L | np.roll(end_L, 1), rate, mask_id, size, rng)
    return row | {"tokens": seen_L.astype(np.int32), "targets": tokens_L, "mask": chosen_L}


def with_prefix(row: Row, rng: np.random.Generator) -> Row:
    """A packed window of which each document has a prefix; what is told begins behind it."""
    prefix_L, segments_L = draw_prefix(row["segments"], rng), row["segments"]
    next_in_prefix_L = np.append(prefix_L[1:] & (segments_L[1:] == segments_L[:-1]), False)
    return row | {"prefix": prefix_L, "mask": row["mask"] & ~next_in_prefix_L}


def denoised(tokens_N: np.ndarray, task: Task, specials: list[int], end_id: int, layout: Layout, rng: np.random.Generator
             ) -> Row:
    """A window of text for an objective that hides a part of it.

    Where spans are cut out documents follow each other without the separators between them, since these end targets.
    """
    kinds, ul2 = denoisers(task), task.objective == "ul2"
    choice = int(rng.integers(len(kinds) + 1)) if ul2 else 0
    rest = choice == len(kinds)  # of a prefix language model there is no other way
    if not rest:
        tokens_N = tokens_N[tokens_N != end_id]
    if len(tokens_N) < 2:
        return pair(tokens_N if len(tokens_N) else np.array([end_id]), np.zeros(0, np.int32), layout)
    if rest:
        cut = prefix_of(len(tokens_N)) if ul2 else int(rng.integers(1, len(tokens_N)))
        source, target = tokens_N[:cut], np.append(tokens_N[cut:], end_id) if ul2 else tokens_N[cut:]
    else:
        noise_N = draw_spans(len(tokens_N), *num_spans(len(tokens_N), *kinds[choice]), rng)
        source, target = corrupt(tokens_N, noise_N, specials[3 if ul2 else 0:], end_id)
    if ul2:
        mode = 1 if rest else 0 if choice == 0 else 2
        source = np.concatenate([[specials[mode]], source])
    return pair(source, target, layout)


def pair(source: np.ndarray, target: np.ndarray, layout: Layout) -> Row:
    """Input and target, cut to fit, as a row.

    A target that is cut has no end. Of an input the beginning and the last token stay, which may be a special one. Where a
    decoder reads both, a long target has at least half of the row, and the input the rest.
    """
    if layout.both:
        decoder = np.concatenate([[layout.start_id], target])[:layout.length]
        told = np.asarray(target[:layout.length], np.int32)
        read = fill(shorten(source, layout.source_length), layout.source_length)
        return {f"source_{name}": array for name, array in read.items()} | fill(
            decoder[:max(len(told), 1)], layout.length) | tell(told, 0, layout.length)
    room = layout.length + 1
    target = target[:max(room - len(source), room // 2)]
    source = shorten(source, room - len(target))
    whole = np.concatenate([source, target]).astype(np.int32)
    prefix_L = np.arange(layout.length) < len(source) - 1  # the last token of the input already tells the target's first
    return fill(whole[:-1] if len(target) else whole[:layout.length], layout.length) | tell(
        whole[len(source):], len(source) - 1, layout.length) | {"prefix": prefix_L}


def shorten(tokens_N: np.ndarray, length: int) -> np.ndarray:
    """At most so many tokens: the first ones and the last."""
    return tokens_N if len(tokens_N) <= length else np.append(tokens_N[:length - 1], tokens_N[-1])


def fill(tokens_N: np.ndarray, length: int) -> Row:
    """tokens, segments and positions of one segment, with padding behind it."""
    real_L = np.arange(length) < len(tokens_N)
    padded_L = np.zeros(length, np.int32)
    padded_L[:len(tokens_N)] = tokens_N
    return {"tokens": padded_L, "segments": real_L.astype(np.int32),
            "positions": np.where(real_L, np.arange(length), 0).astype(np.int32)}


def tell(told_N: np.ndarray, first: int, length: int) -> Row:
    """targets and mask: what is to be told from a slot on."""
    targets_L, mask_L = np.zeros(length, np.int32), np.zeros(length, bool)
    targets_L[first:first + len(told_N)] = told_N
    mask_L[first:first + len(told_N)] = True
    return {"targets": targets_L, "mask": mask_L}


def labelled(stream: TokenStream, length: int, index: int) -> Row:
    """A text with its label. A text that is too long is cut; its last token stays, which may be a special one."""
    tokens_N = np.asarray(stream.document(index), np.int32)
    return fill(shorten(tokens_N, length), length) | {"targets": stream.labels[index], "mask": np.bool_(True)}


def _with_empty(count: int, make: Callable[[int, np.random.Generator], Row]) -> Rows:
    """Rows that are zeros from `count` on."""
    def row(index: int, rng: np.random.Generator) -> Row:
        if index < count:
            return make(index, rng)
        return {name: np.zeros_like(array) for name, array in make(0, rng).items()}
    return Rows(count, row)
