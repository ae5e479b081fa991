"""A decoder as a model of EleutherAI's lm-evaluation-harness, registered there as `moejax`.

It scores continuations and whole texts and writes answers; tasks, few-shot prompts and metrics are the harness's own.
Needs `pip install -e ".[lm-eval]"`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from moejax.checkpoint.origin import end_tokens
from moejax.checkpoint.store import warn
from moejax.config import check
from moejax.data.asking import encode_prompts, new_text, reads_prefix
from moejax.data.tokenizers import load_tokenizer
from moejax.generation.generate import generate
from moejax.harness.opened import open_decoder
from moejax.harness.rows import cut, fit, score_rows
from moejax.task import PAIRS

ROWS = 8
"""Scored or continued at once, unless it is said."""
NEW_TOKENS = 256
"""Of an answer, if the task does not say."""
WHOLE = ("next_token", "prefix_lm")
"""Objectives by which a text may begin with nothing before it."""
OPTIONS = ("temperature", "top_k", "top_p", "repetition_penalty")
"""How a task may ask for samples."""


@register_model("moejax")
class HarnessModel(TemplateLM):
    """Requests come as texts, and are laid out as in training.

    Running text begins with the separator, or with UL2's token of the mode in which it goes on. A model of pairs takes a
    prompt as its input, and a continuation as the target. What is before an answer or a continuation is read as a prefix
    by a model that learned so.
    """

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
        """The separator, which ends an answer; of an imported model other tokens do, too."""
        return self.tokenizer.separator_id

    @property
    def prefix_token_id(self) -> int:
        """Stands before a continuation that has nothing else before it."""
        return self.tok_encode("")[-1]

    @property
    def tokenizer_name(self) -> str:
        """Under which the harness keeps prepared requests apart."""
        return f"moejax-{self.tokenizer.name}-{self.tokenizer.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """Token ids of a text, those that a prompt has beside them included unless that is not wanted."""
        if add_special_tokens is False:
            return self.tokenizer.encode(string)
        return encode_prompts(self.tokenizer, self.config, [string])[0]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.config.data.task.data == PAIRS:  # an input and its target are two texts
            return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)
        return super()._encode_pair(context, continuation)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
                              **others: Any) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is what greedy decoding gives."""
        check(all(0 < len(told) <= self.room for _, _, told in requests), f"a continuation has no token, or more than the "
              f"{self.room} that a row has room for; the task's texts do not suit this model")
        rows = [((*cut(context, self.room + 1 - len(told)), *told), len(told)) for _, context, told in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for part in self._batches([len(row) for row, _ in rows], "scoring", disable_tqdm):
            scored = score_rows(self.model, self.variables, [rows[n] for n in part], size=self.rows, room=self.room,
                                prefix=reads_prefix(self.config))
            for n, one in zip(part, scored, strict=True):
                found[n] = one
                if requests[n][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[n][0], found[n])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, every token after all that fits before it.

        Raises:
          UserError: for a model that has not learned to write texts as a whole.
        """
        objective = self.config.data.task.objective
        check(objective in WHOLE, f"config.data.task.objective={objective}: a task asks how probable whole texts are, "
              f"which is for models of {' and '.join(WHOLE)}; take tasks of continuations or answers")
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
        """What the model writes after each prompt, up to the first of the texts that end an answer.

        A prompt that fits is whole, and the answer has what room is left; see `rows.fit`.
        """
        prompts, settings, cuts = [], [], 0
        for request in requests:
            ids, wishes = self.tok_encode(request.args[0]), _sampling(request.args[1])
            prompt, new = fit(ids, self.room, wishes["max_new_tokens"])
            prompts.append(prompt)
            settings.append(wishes | {"max_new_tokens": new})
            cuts += len(prompt) < len(ids)
        if cuts:
            warn(f"{cuts} of {len(requests)} prompts are too long for the {self.room} tokens of a row; the beginning of "
                 "their text is left out")
        texts = [""] * len(requests)
        for kind in sorted(set(map(repr, settings))):
            members = [n for n, own in enumerate(settings) if repr(own) == kind]
            for part in self._batches([len(prompts[n]) for n in members], "writing", disable_tqdm):
                chosen = [members[m] for m in part]
                # All batches have as many rows, so that few shapes are compiled.
                filled = [prompts[n] for n in (*chosen, *[chosen[-1]] * (self.rows - len(chosen)))]
                made = generate(self.model, self.variables, filled, stop_tokens=(self.eot_token_id, *self.ends),
                                prefix=reads_prefix(self.config), **settings[chosen[0]])
                for n, row, length in zip(chosen, made.tokens, made.lengths):
                    text = new_text(self.tokenizer, self.config.data.task, prompts[n], row[:length].tolist(), self.ends)
                    texts[n] = _until(text, requests[n].args[1].get("until"))
                    self.cache_hook.add_partial("generate_until", requests[n].args, texts[n])
        return texts

    def _batches(self, lengths: Sequence[int], what: str, silent: bool) -> Iterable[list[int]]:
        """Numbers of rows of similar length, the longest first: what does not fit in memory fails at once."""
        order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
        parts = [order[first:first + self.rows] for first in range(0, len(order), self.rows)]
        return tqdm(parts, desc=what, unit="batch", disable=silent or len(parts) < 2)


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
