"""A decoder as a model of EleutherAI's lm-evaluation-harness, registered there as `moejax`.

It scores continuations and whole texts and writes answers; tasks, few-shot prompts and metrics are the harness's own.
Needs `pip install -e ".[lm-eval]"`.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from moejax.checkpoint.origin import end_tokens
from moejax.config import check
from moejax.data.tokenizers import added_text, load_tokenizer
from moejax.generation import score
from moejax.generation.begin import bucket
from moejax.generation.generate import generate
from moejax.harness.opened import open_decoder
from moejax.models.transformer import Transformer

ROWS = 8
"""Scored or continued at once, unless it is said."""
NEW_TOKENS = 256
"""Of an answer, if the task does not say."""
OPTIONS = ("temperature", "top_k", "top_p", "repetition_penalty")
"""How a task may ask for samples."""


@register_model("moejax")
class HarnessModel(TemplateLM):
    """Requests come as texts. Every text begins with the separator, as in training."""

    def __init__(self, workdir: str, step: int | None = None, batch_size: int | str = ROWS, max_length: int | None = None,
                 task: str | int | None = None, **others: Any) -> None:
        """Loads the model of a workdir.

        Args:
          workdir: of a run, an import or a compressed model.
          step: of the checkpoint; None takes the newest.
          batch_size: rows that are scored or continued at once.
          max_length: tokens of a row; None takes those of the model.
          task: which one of a mixture's; the harness turns a name of digits into a number.
          others: what the harness tells models of other libraries, such as their device.

        Raises:
          UserError: as `open_decoder`.
        """
        super().__init__()
        self.model, self.variables, self.config = open_decoder(workdir, step, None if task is None else str(task))
        self.tokenizer = load_tokenizer(Path(workdir) / "data")
        self.ends = end_tokens(Path(workdir), self.model.model.vocab_size)
        self.rows = int(batch_size) if str(batch_size).isdecimal() else ROWS
        self.room = min(max_length or self.model.model.max_length, self.model.model.max_length)

    @property
    def eot_token_id(self) -> int:
        """The separator, which stands before every text and ends an answer; of an imported model other tokens do, too."""
        return self.tokenizer.separator_id

    @property
    def tokenizer_name(self) -> str:
        """Under which the harness keeps prepared requests apart."""
        return f"moejax-{self.tokenizer.name}-{self.tokenizer.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """Token ids of a text, the separator first unless that is not wanted."""
        ids = self.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
                              **others: Any) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is what greedy decoding gives."""
        rows = [((*context, *told)[-self.room - 1:], len(told)) for _, context, told in requests]
        check(all(0 < told <= self.room for _, told in rows), f"a continuation has no token, or more than the {self.room} "
              "that a row has room for; the task's texts do not suit this model")
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for part in self._batches([len(row) for row, _ in rows], "scoring", disable_tqdm):
            log_BL, most_BL = self._told([rows[n][0] for n in part])
            for b, n in enumerate(part):
                end = len(rows[n][0]) - 1
                at = slice(end - rows[n][1], end)
                found[n] = float(log_BL[b, at].sum(dtype=np.float64)), bool(most_BL[b, at].all())
                if requests[n][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[n][0], found[n])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, every token after all that fits before it."""
        pieces, owner = [], []
        for n, request in enumerate(requests):
            windows = get_rolling_token_windows(self.tok_encode(request.args[0], add_special_tokens=False),
                                                self.prefix_token_id, self.room, 1)
            for context, told in map(make_disjoint_window, windows):
                pieces.append((None, context, told))
                owner.append(n)
        found = np.zeros(len(requests))
        for n, (log_probability, _) in zip(owner, self._loglikelihood_tokens(pieces, disable_tqdm), strict=True):
            found[n] += log_probability
        return found.tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each prompt, up to the first of the texts that end an answer."""
        asked = [(self.tok_encode(request.args[0]), dict(request.args[1])) for request in requests]
        texts = [""] * len(requests)
        kinds = sorted({repr(_sampling(options)) for _, options in asked})
        for kind in kinds:
            members = [n for n, (_, options) in enumerate(asked) if repr(_sampling(options)) == kind]
            settings = _sampling(asked[members[0]][1])
            new = min(settings.pop("max_new_tokens"), self.room - 1)
            prompts = {n: asked[n][0][-(self.room - new):] for n in members}
            for part in self._batches([len(prompts[n]) for n in members], "writing", disable_tqdm):
                chosen = [members[m] for m in part]
                made = generate(self.model, self.variables, [prompts[n] for n in chosen], max_new_tokens=new,
                                stop_tokens=(self.eot_token_id, *self.ends), **settings)
                for n, row, length in zip(chosen, made.tokens, made.lengths):
                    new_ids = [token for token in row[:length].tolist() if token not in self.ends]
                    texts[n] = _until(added_text(self.tokenizer, prompts[n], new_ids), asked[n][1].get("until"))
                    self.cache_hook.add_partial("generate_until", requests[n].args, texts[n])
        return texts

    def _batches(self, lengths: Sequence[int], what: str, silent: bool) -> Iterable[list[int]]:
        """Numbers of rows of similar length, the longest first: what does not fit in memory fails at once."""
        order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
        parts = [order[first:first + self.rows] for first in range(0, len(order), self.rows)]
        return tqdm(parts, desc=what, unit="batch", disable=silent or len(parts) < 2)

    def _told(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """For each token but the first of each row: its log-probability, and whether it is the most probable."""
        size = bucket(max(map(len, rows)) - 1, self.room)
        tokens_BL = np.zeros((self.rows, size + 1), np.int32)  # few shapes, so few compilations
        mask_BL = np.zeros(tokens_BL.shape, bool)
        for b, row in enumerate(rows):
            tokens_BL[b, :len(row)], mask_BL[b, :len(row)] = row, True
        mask_BL[len(rows):, :2] = True  # a row of nothing else is refused
        batch, _ = score.arrays(self.model, tokens_BL[:, :-1], mask_BL[:, 1:], None, None, None)
        return tuple(map(np.asarray, _score(self.model, self.variables, batch, tokens_BL[:, 1:])))


@partial(jax.jit, static_argnames="model")
def _score(model: Transformer, variables: Mapping[str, Any], batch: Mapping[str, Array], next_BL: Array
           ) -> tuple[Array, Array]:
    logits_BLV = score.forward(model, variables, batch, "logits_BLV")[:next_BL.shape[0], :next_BL.shape[1]]
    own_BL = jnp.take_along_axis(logits_BLV, next_BL[..., None], axis=2)[..., 0]
    return own_BL - jax.nn.logsumexp(logits_BLV, axis=2), jnp.argmax(logits_BLV, axis=2) == next_BL


def _sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """A task's wishes in our words; it samples only if it says so."""
    known = {name: options[name] for name in OPTIONS if options.get(name) is not None}
    if not options.get("do_sample", known.get("temperature", 0) > 0):
        known = {"temperature": 0.0}
    asked = options.get("max_gen_toks", options.get("max_new_tokens", options.get("max_tokens", NEW_TOKENS)))
    return known | {"max_new_tokens": int(asked)}


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """A text up to the first of these."""
    stops = [stops] if isinstance(stops, str) else stops or []
    return text[:min((at for at in map(text.find, filter(None, stops)) if at >= 0), default=len(text))]
