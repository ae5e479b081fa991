"""Beam search: the most probable texts found by following the best few at once (Sutskever et al. 2014, arXiv 1409.3215).

A text of n new tokens, the stop token included, counts its log-probability over n ** length_penalty (1.0: the mean of its
tokens; 0.0: the sum; compare Wu et al. 2016, 1609.08144).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from moejax.config import check
from moejax.generation import cache
from moejax.generation.begin import begin
from moejax.models.transformer import Source, Transformer, split_layers

MOST_BEAMS = 4096


class Found(NamedTuple):
    """The best text of each row.

    Attributes:
      tokens: int32 [B, max_new_tokens]; behind a stop token the row is filled with zeros.
      lengths: int32 [B], new tokens, the stop token included.
      scores: float32 [B], log-probability over length ** length_penalty.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray


def beam_search(model: Transformer, params: Mapping[str, Any], tokens: Any, mask: Any = None, *, beams: int = 4,
                max_new_tokens: int = 32, length_penalty: float = 1.0, stop_tokens: Sequence[int] = (),
                decoder_tokens: Any = None, prefix: bool = False) -> Found:
    """Continues prompts with the best text that a beam finds; those that meet no stop token end at max_new_tokens.

    Args:
      beams: texts that are followed at once; 1 follows the most probable token.
      length_penalty: see above; at least 0.
      model, params, tokens, mask, max_new_tokens, stop_tokens, decoder_tokens, prefix: see
        `moejax.generation.generate.generate`.

    Returns:
      `Found`.

    Raises:
      UserError: as `generate`, or a setting out of range.
    """
    check(1 <= beams <= MOST_BEAMS, f"beams={beams} must be at least 1 and at most {MOST_BEAMS}")
    check(0 <= length_penalty < float("inf"), f"length_penalty={length_penalty} must be at least 0")
    begun = begin(model, tokens, mask, max_new_tokens, stop_tokens, decoder_tokens)
    found = _search(begun.model, params, begun.source, begun.tokens_BL, begun.mask_BL, begun.stop_V, float(length_penalty),
                    int(max_new_tokens), slots=begun.slots, beams=beams, stops=int(begun.stop_V.sum()), prefix=prefix)
    tokens_BN, lengths_B, scores_B = (np.asarray(a)[:begun.rows] for a in found)
    return Found(tokens_BN[:, :max_new_tokens], lengths_B, scores_B)


class Beam(NamedTuple):
    """What one step of the search hands to the next; M texts a row.

    Attributes:
      step: int32 scalar, new tokens so far.
      memory: of all tokens but the last, with B * M rows.
      live_BMN, live_score_BM: texts that go on, and their log-probabilities.
      done_BMN, done_score_BM, done_length_BM: the best texts that ended, with their scores; -inf where there is none yet.
    """

    step: Array
    memory: cache.Memory
    live_BMN: Array
    live_score_BM: Array
    done_BMN: Array
    done_score_BM: Array
    done_length_BM: Array


@partial(jax.jit, static_argnames=("model", "slots", "beams", "stops", "prefix"))
def _search(model: Transformer, params: Mapping[str, Any], source: Source | None, tokens_BL: Array, mask_BL: Array,
            stop_V: Array, penalty: Array, limit: Array, *, slots: int, beams: int, stops: int,
            prefix: bool) -> tuple[Array, Array, Array]:
    """`beam_search` on arrays: tokens [B, slots], lengths [B] and scores [B] of the best."""
    if not model.scan:
        params = {**params, "params": split_layers(model, params["params"])}
    batch, length = tokens_BL.shape
    vocab_size = model.model.vocab_size
    row_axis = 1 if model.scan else 0  # of a filled cache: with a scan all layers' lie in one array
    memory, positions_BL = cache.read_prompts(model, params, source, tokens_BL, mask_BL, slots, prefix)

    def pick(rows_BMX: Array, which_BM: Array) -> Array:
        """Of each row's M entries those at an index."""
        return jnp.take_along_axis(rows_BMX, which_BM.reshape(*which_BM.shape, *(1,) * (rows_BMX.ndim - 2)), axis=1)

    def repeated(memory: cache.Memory) -> cache.Memory:
        """Each row M times."""
        return cache.Memory(jax.tree.map(lambda a: jnp.repeat(a, beams, axis=row_axis), memory.layers),
                            *(None if a is None else jnp.repeat(a, beams, axis=0) for a in memory[1:]))

    def reordered(memory: cache.Memory, parent_BM: Array) -> cache.Memory:
        """The memory of each text that goes on is that of the one it came from."""
        rows_N = (jnp.arange(batch)[:, None] * beams + parent_BM).reshape(-1)
        return memory._replace(layers=jax.tree.map(lambda a: jnp.take(a, rows_N, axis=row_axis), memory.layers))

    def go_on(now: Beam) -> Array:
        # A text that goes on gains nothing in log-probability, so its score can at best be this one's.
        best_B = jnp.max(now.live_score_BM, axis=1) / jnp.maximum(limit, 1).astype(jnp.float32)**penalty
        better_B = mask_BL[:, -1] & (best_B > jnp.max(now.done_score_BM, axis=1))
        return (now.step < limit) & jnp.any(better_B)

    def take_step(now: Beam) -> Beam:
        last_BM = jnp.where(now.step == 0, tokens_BL[:, -1:], now.live_BMN[:, :, jnp.maximum(now.step - 1, 0)])
        real_N = jnp.repeat(mask_BL[:, -1], beams)
        logits_NLV, memory = cache.extend(
            model, params, now.memory, last_BM.reshape(-1, 1), jnp.repeat(positions_BL[:, -1:], beams, axis=0) + now.step,
            real_N[:, None], at=length - 1 + now.step)
        log_probs_BMV = jax.nn.log_softmax(logits_NLV[:, 0]).reshape(batch, beams, vocab_size)
        # At first all texts of a row are the same: only one may go on.
        first_M = jnp.where((jnp.arange(beams) == 0) | (now.step > 0), 0.0, -jnp.inf)
        total_BN = (now.live_score_BM[..., None] + first_M[:, None] + log_probs_BMV).reshape(batch, -1)
        # Each text has at most `stops` ends, so among these at least M go on, if there are as many.
        score_BC, place_BC = jax.lax.top_k(total_BN, min((1 + stops) * beams, beams * vocab_size))
        parent_BC, token_BC = place_BC // vocab_size, place_BC % vocab_size
        text_BCN = pick(now.live_BMN, parent_BC).at[:, :, now.step].set(token_BC)
        ends_BC = stop_V[token_BC]

        ended_score_BC = jnp.where(ends_BC, score_BC / (now.step + 1).astype(jnp.float32)**penalty, -jnp.inf)
        all_score_BC = jnp.concatenate([now.done_score_BM, ended_score_BC], axis=1)
        all_text_BCN = jnp.concatenate([now.done_BMN, text_BCN], axis=1)
        all_length_BC = jnp.concatenate([now.done_length_BM, jnp.broadcast_to(now.step + 1, token_BC.shape)], axis=1)
        done_score_BM, kept_BM = jax.lax.top_k(all_score_BC, beams)

        live_score_BM, chosen_BM = jax.lax.top_k(jnp.where(ends_BC, -jnp.inf, score_BC), beams)
        return Beam(now.step + 1, reordered(memory, pick(parent_BC, chosen_BM)), pick(text_BCN, chosen_BM), live_score_BM,
                    pick(all_text_BCN, kept_BM), done_score_BM, pick(all_length_BC, kept_BM))

    none_BM = jnp.full((batch, beams), -jnp.inf)
    texts_BMN = jnp.zeros((batch, beams, slots), jnp.int32)
    end = jax.lax.while_loop(go_on, take_step, Beam(
        jnp.zeros((), jnp.int32), repeated(memory), texts_BMN, jnp.zeros((batch, beams)), texts_BMN, none_BM,
        jnp.zeros((batch, beams), jnp.int32)))
    # Texts that met no stop token count as they are, if the limit ended them.
    open_score_BM = end.live_score_BM / jnp.maximum(end.step, 1).astype(jnp.float32)**penalty
    open_BM = jnp.where(end.step == limit, open_score_BM, -jnp.inf)
    score_BC = jnp.concatenate([end.done_score_BM, open_BM], axis=1)
    best_B1 = jnp.argmax(score_BC, axis=1)[:, None]
    found = (pick(jnp.concatenate([end.done_BMN, end.live_BMN], axis=1), best_B1)[:, 0],
             pick(jnp.concatenate([end.done_length_BM, jnp.broadcast_to(end.step, open_BM.shape)], axis=1), best_B1)[:, 0],
             pick(score_BC, best_B1)[:, 0])
    if jax.sharding.get_abstract_mesh().empty:
        return found
    return jax.lax.with_sharding_constraint(found, PartitionSpec())
