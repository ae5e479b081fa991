"""New tokens after prompts: one forward pass over the prompts, then a compiled loop of one token a step.

What a prompt yields depends on the prompt, its number among equal prompts of the batch, the seed and the settings; not
on its neighbours, its row or its padding (up to the rounding of sums, which may differ between array shapes).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from moejax.config import check
from moejax.generation import cache, prompts, sampling
from moejax.generation.begin import begin
from moejax.models.transformer import Source, Transformer, split_layers


class Generated(NamedTuple):
    """New tokens.

    Attributes:
      tokens: int32 [B, max_new_tokens]; behind a stop token the row is filled with it.
      lengths: int32 [B], new tokens of each row, the stop token included.
    """

    tokens: np.ndarray
    lengths: np.ndarray


class Settings(NamedTuple):
    """How a token is chosen; see `generate`."""

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float


def generate(model: Transformer, params: Mapping[str, Any], tokens: Any, mask: Any = None, max_new_tokens: int = 32,
             temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0,
             stop_tokens: Sequence[int] = (), seed: int = 0, decoder_tokens: Any = None, prefix: bool = False) -> Generated:
    """Continues prompts. Compiles once for each model, batch size and power of two of prompt length and new tokens.

    Args:
      model: a decoder, or an encoder with a decoder.
      params: {"params": parameters, "router": router state}.
      tokens: int [B, L], or a list of B lists of ids; what the encoder reads, if there is one.
      mask: bool [B, L], false at padding, which may lie anywhere; None: every token is real.
      max_new_tokens: new tokens of a row that meets no stop token.
      temperature: divides the logits; 0 takes the most probable token.
      top_k: sample among the k most probable tokens; 0 is off.
      top_p: sample among the fewest most probable tokens that together have this probability; 1 is off.
      repetition_penalty: divides positive and multiplies negative logits of tokens in the row; 1 is off.
      stop_tokens: ids that end a row.
      seed: of the samples. The same prompt twice in a batch gives two samples, but equal calls give equal results.
      decoder_tokens: with an encoder, lists of ids with which the decoder begins each row; None: that of the model.
      prefix: the tokens of a prompt but the last see each other in both directions, as a decoder is trained on pairs and on
        prefixes.

    Returns:
      `Generated`.

    Raises:
      UserError: a model that cannot decode; malformed or empty prompts; ids out of the vocabulary; prompt and new
        tokens together beyond the context; a setting out of range.
    """
    check(0 <= temperature < math.inf, f"temperature={temperature} must be at least 0 (0: the most probable token)")
    check(top_k >= 0, f"top_k={top_k} must be at least 0 (0 is off)")
    check(0 < top_p <= 1, f"top_p={top_p} must be above 0 and at most 1 (1 is off)")
    check(0 < repetition_penalty < math.inf, f"repetition_penalty={repetition_penalty} must be above 0 (1 is off)")
    begun = begin(model, tokens, mask, max_new_tokens, stop_tokens, decoder_tokens)
    digests_B2 = prompts.pad_to(sampling.row_digests(begun.said, seed), (len(begun.tokens_BL), 2))
    top_k = min(int(top_k), model.model.vocab_size)  # which is all, and a number that the device has
    settings = Settings(float(temperature), top_k, float(top_p), float(repetition_penalty))
    new_BN, lengths_B = decode(begun.model, params, begun.source, begun.tokens_BL, begun.mask_BL, digests_B2, begun.stop_V,
                               settings, int(max_new_tokens), slots=begun.slots, prefix=prefix)
    return Generated(np.asarray(new_BN)[:begun.rows, :max_new_tokens], np.asarray(lengths_B)[:begun.rows])


class Progress(NamedTuple):
    """What one step of the loop hands to the next.

    Attributes:
      step: int32 scalar, new tokens of a row so far.
      token_B: int32, the last token of each row, which the model has not read.
      memory: of all tokens before.
      seen_BV: bool, the tokens that a row holds.
      done_B: bool, rows that ended.
      new_BN: int32, new tokens.
      lengths_B: int32, new tokens of each row until it ended.
    """

    step: Array
    token_B: Array
    memory: cache.Memory
    seen_BV: Array
    done_B: Array
    new_BN: Array
    lengths_B: Array


@partial(jax.jit, static_argnames=("model", "slots", "prefix"))
def decode(model: Transformer, params: Mapping[str, Any], source: Source | None, tokens_BL: Array, mask_BL: Array,
           digests_B2: Array, stop_V: Array, settings: Settings, limit: Array, *, slots: int, prefix: bool = False
           ) -> tuple[Array, Array]:
    """`generate` on arrays: reads all but the last token of the prompts at once, then goes on from the last.

    Args:
      model, params: see `generate`.
      source: what an encoder reads.
      tokens_BL: int32 prompts, padded on the left only; 0 at padding.
      mask_BL: bool, real tokens; a row with none yields nothing of meaning.
      digests_B2: see `sampling.row_digests`.
      stop_V: bool, tokens that end a row.
      settings: numbers, traced.
      limit: int32 scalar, new tokens wanted, at most `slots`.
      slots: room for new tokens.
      prefix: see `generate`.

    Returns:
      int32 [B, slots], of which the first `limit` columns have meaning, and int32 [B]; both replicated on a mesh.
    """
    if not model.scan:
        params = {**params, "params": split_layers(model, params["params"])}
    batch, length = tokens_BL.shape
    vocab_size = model.model.vocab_size
    keys_B = sampling.row_keys(digests_B2)
    row_B = jnp.arange(batch)
    memory, positions_BL = cache.read_prompts(model, params, source, tokens_BL, mask_BL, slots, prefix)

    def go_on(now: Progress) -> Array:
        return (now.step < limit) & ~jnp.all(now.done_B)

    def take_step(now: Progress) -> Progress:
        # A row that ended reads padding from here on, so it weighs on no expert.
        logits_BLV, memory = cache.extend(
            model, params, now.memory, now.token_B[:, None], positions_BL[:, -1:] + now.step,
            ~now.done_B[:, None], at=length - 1 + now.step)
        logits_BV = sampling.penalise_repetition(logits_BLV[:, 0], now.seen_BV, settings.repetition_penalty)
        step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, now.step)
        drawn_B = sampling.sample(logits_BV, step_keys_B, settings.temperature, settings.top_k, settings.top_p)
        token_B = jnp.where(now.done_B, now.token_B, drawn_B)
        return Progress(
            step=now.step + 1,
            token_B=token_B,
            memory=memory,
            seen_BV=now.seen_BV.at[row_B, token_B].set(True),
            done_B=now.done_B | stop_V[token_B],
            new_BN=now.new_BN.at[:, now.step].set(token_B),
            lengths_B=now.lengths_B + ~now.done_B,
        )

    end = jax.lax.while_loop(go_on, take_step, Progress(
        step=jnp.zeros((), jnp.int32),
        token_B=tokens_BL[:, -1],
        memory=memory,
        seen_BV=jnp.zeros((batch, vocab_size), bool).at[row_B[:, None], tokens_BL].max(mask_BL),
        done_B=~mask_BL[:, -1],
        new_BN=jnp.zeros((batch, slots), jnp.int32),
        lengths_B=jnp.zeros(batch, jnp.int32),
    ))
    new_BN = jnp.where(jnp.arange(slots) < end.step, end.new_BN, end.token_B[:, None])
    if jax.sharding.get_abstract_mesh().empty:
        return new_BN, end.lengths_B
    return jax.lax.with_sharding_constraint((new_BN, end.lengths_B), PartitionSpec())
