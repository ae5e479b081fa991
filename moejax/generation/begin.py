"""What every way of decoding begins with: prompts that are checked, laid out, and padded to one of few sizes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moejax import axes
from moejax.config import UserError, check
from moejax.generation import prompts
from moejax.models.transformer import Source, Transformer
from moejax.moe.routing import get_router

UNROLLED_LAYERS = 16
"""Models of up to so many layers decode without a scan, which copies each layer's matrices for every token and takes longer
the larger they are; deeper ones would take long to compile."""


class Begun(NamedTuple):
    """What a loop over new tokens takes.

    Attributes:
      model: as the loop is to run it.
      source: what an encoder reads, or None.
      tokens_BL, mask_BL: prompts, padded on the left, and rows added so that a mesh can split them.
      stop_V: bool, tokens that end a row.
      rows: prompts without the rows that were added.
      slots: room for new tokens.
      said: all that was given for each row, encoder's tokens first.
    """

    model: Transformer
    source: Source | None
    tokens_BL: np.ndarray
    mask_BL: np.ndarray
    stop_V: np.ndarray
    rows: int
    slots: int
    said: list[np.ndarray]


def begin(model: Transformer, tokens: Any, mask: Any, max_new_tokens: int, stop_tokens: Sequence[int],
          decoder_tokens: Any) -> Begun:
    """Checks and lays out; for arguments and errors see `moejax.generation.generate.generate`."""
    context, vocab_size = model.model.max_length, model.model.vocab_size
    check_decodable(model)
    check(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
    stop_V = np.zeros(vocab_size, bool)
    for token in stop_tokens:
        check(0 <= token < vocab_size, f"stop token {token} is out of the vocabulary of {vocab_size} ids "
              "(config.model.vocab_size)")
        stop_V[token] = True
    tokens_BL, mask_BL = prompts.read(tokens, mask, vocab_size)
    said, source = [row[real] for row, real in zip(tokens_BL, mask_BL)], None
    if model.model.kind == "encoder_decoder":
        source = read_source(tokens_BL, mask_BL, context)
        started = [[model.model.architecture.start_token]] * len(tokens_BL) if decoder_tokens is None else decoder_tokens
        tokens_BL, mask_BL = prompts.read(started, None, vocab_size)
        check(len(tokens_BL) == len(said), f"there are {len(said)} rows of tokens, but {len(tokens_BL)} of decoder_tokens")
        said = [np.concatenate([row, first[real]]) for row, first, real in zip(said, tokens_BL, mask_BL)]
    else:
        check(decoder_tokens is None, "decoder_tokens are for models with an encoder and a decoder; put them into tokens")
    lengths_B = mask_BL.sum(axis=1)
    longest, shortest = int(lengths_B.max()), int(lengths_B.min())
    check(shortest > 0, f"the prompt in row {int(lengths_B.argmin())} is empty; give it at least one token")
    check(longest + max_new_tokens <= context, f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} are "
          f"more than the model's context of {context} (config.model.max_length); shorten one of them")
    batch = len(tokens_BL)
    rows = prompts.round_up(batch, axes.BATCH_AXES)
    tokens_BL, mask_BL = (prompts.pad_to(a_BL, (rows, a_BL.shape[1])) for a_BL in (tokens_BL, mask_BL))
    tokens_BL, mask_BL = prompts.pack_left(tokens_BL, mask_BL, 1 + bucket(longest - 1, context))
    model = model.clone(scan=model.scan and model.model.layers > UNROLLED_LAYERS)
    return Begun(model, source, tokens_BL, mask_BL, stop_V, batch, bucket(int(max_new_tokens), context), said)


def read_source(tokens_BS: np.ndarray, mask_BS: np.ndarray, context: int) -> Source:
    """What an encoder reads, filled up to a size of which there are few. Raises `UserError` if it is too long or empty."""
    lengths_B = mask_BS.sum(axis=1)
    check(int(lengths_B.max()) <= context, f"a row of {lengths_B.max()} tokens is more than the model's context of "
          f"{context} (config.model.max_length); shorten it")
    check(int(lengths_B.min()) > 0, f"row {int(lengths_B.argmin())} of tokens is empty; give it at least one token")
    rows, length = prompts.round_up(len(tokens_BS), axes.BATCH_AXES), bucket(int(lengths_B.max()), context)
    tokens_BS, mask_BS = (prompts.pad_to(a_BS, (rows, length))
                          for a_BS in prompts.pack_right(tokens_BS, mask_BS, length))
    return Source(tokens_BS, prompts.count_positions(mask_BS), mask_BS.astype(np.int32))


def check_decodable(model: Transformer) -> None:
    """Raises `UserError` unless the model can be asked for one token after another, each row on its own."""
    moe, mesh = model.moe, jax.sharding.get_abstract_mesh()
    check(model.model.kind != "encoder" and model.model.head == "tokens", f"config.model.kind={model.model.kind} with "
          f"config.model.head={model.model.head} generates nothing; moejax.logits and moejax.embed read with such a model")
    if moe.every and not get_router(moe.router).generates:
        raise UserError(f"config.moe.router={moe.router} chooses among tokens that are not there yet, so it has no rule"
                        " for generating; use a token-choice router such as topk")
    limited = (moe.eval_capacity_factor, moe.capacity_places) != (None, None)
    if moe.every and limited and moe.routing_group == "global":
        raise UserError("config.moe.eval_capacity_factor or capacity_places with config.moe.routing_group=global lets the"
                        " prompts of a batch displace each other; to generate, set config.moe.eval_capacity_factor=None"
                        " (dropless)")
    if not mesh.empty and mesh.shape[axes.CONTEXT] > 1:
        raise UserError(f"config.mesh.context={mesh.shape[axes.CONTEXT]} splits sequences, but generation takes one"
                        " token at a time; set config.mesh.context=1 to generate")


def bucket(count: int, most: int) -> int:
    """The next power of two, at least 16, but no more than `most` unless `count` is: few sizes, so few compilations."""
    return max(count, min(most, max(16, 1 << max(count - 1, 0).bit_length())))
