"""What is learned from data: the objective, and how records become inputs and targets. Every option of `config.data.task`.

`python -m moejax.task` prints them.
"""

import dataclasses
import string
import unicodedata
from functools import lru_cache

from moejax.config import DataConfig, ModelConfig, build_group, check, key, table

TEXT, PAIRS, LABELS = "text", "pairs", "labels"


@dataclasses.dataclass(frozen=True)
class Objective:
    """What an objective needs.

    Attributes:
      kinds: of model that it is defined for.
      data: running text, pairs of input and target text, or texts with labels.
      rule: one line.
    """

    kinds: tuple[str, ...]
    data: str
    rule: str

    @property
    def head(self) -> str:
        """The `config.model.head` that it trains."""
        return "classes" if self.data == LABELS else "tokens"


OBJECTIVES = {
    "next_token": Objective(("decoder",), TEXT, "predict each token from those before"),
    "masked_lm": Objective(("encoder",), TEXT, "tell the tokens that were masked (BERT 1810.04805)"),
    "prefix_lm": Objective(("decoder", "encoder_decoder"), TEXT, "go on from a part that is seen in both directions (T5 "
                           "1910.10683)"),
    "span_corruption": Objective(("decoder", "encoder_decoder"), TEXT, "tell the spans that were cut out (T5 "
                                 "1910.10683)"),
    "ul2": Objective(("decoder", "encoder_decoder"), TEXT, "tell short spans, long spans or the rest, as a first token "
                     "says (UL2 2205.05131)"),
    "seq2seq": Objective(("decoder", "encoder_decoder"), PAIRS, "write the target of an input"),
    "classification": Objective(("decoder", "encoder"), LABELS, "one label of several"),
    "regression": Objective(("decoder", "encoder"), LABELS, "a number"),
    "multi_label": Objective(("decoder", "encoder"), LABELS, "any of several labels, which a record lists"),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """All options."""

    objective: str = key("next_token", "what is learned; left out, next_token, masked_lm or seq2seq by config.model.kind, "
                         "and classification with the head for it", choices=tuple(OBJECTIVES))
    input: str = key("{text}", "pairs and labels: template of the input; names of fields in braces, {a.b.0} "
                     "for what lies in one")
    target: str = key("{target}", "pairs: template of the target")
    label: str = key("label", "labels: field that holds the label")
    labels: tuple[str, ...] | None = key(None, "labels: all that there are, in the order of the scores; None takes those "
                                         "of the training records, sorted")
    class_weights: tuple[float, ...] | None = key(None, "classification: weight of each label in the loss; None weighs "
                                                  "all alike", low=0)
    label_smoothing: float = key(0.0, "tokens and one label of several: share of the target's probability that is spread "
                                 "over all", low=0, high=1)
    head_z_weight: float = key(0.0, "tokens: weight of the squared log-normaliser of the output softmax", low=0)
    mask_rate: float = key(0.15, "masked_lm: share of the tokens that are to be told", low=0, high=1)
    whole_words: bool = key(False, "masked_lm: choose words with all their tokens")
    noise_density: float = key(0.15, "span_corruption: share of the tokens that is cut out", low=0.01, high=0.9)
    mean_span: float = key(3.0, "span_corruption: mean tokens of a span", low=1)
    normalize: str = key("none", "form of Unicode that all texts get, labels and --prompt too, but none of the harness; "
                         "none leaves them as they are, nfkc also writes letters of equal meaning in one way",
                         choices=("none", "nfc", "nfkc"))
    collapse_space: bool = key(False, "white space of all texts becomes one blank between words, and none around them")
    deduplicate: bool = key(False, "training examples that were there before (text and target or label) are left out")
    input_mask_rate: float = key(0.0, "training, objectives that hide nothing themselves: share of the tokens of the input "
                                 "that the tokenizer's mask, else its unknown token, stands in for; targets and special "
                                 "tokens stay", low=0, high=1)
    samplings: int = key(1, "training, SentencePiece only: each example is stored so many times, each time cut into tokens "
                         "in a way that is drawn (1804.10959), so an epoch is as many times as long; 1 draws nothing",
                         low=1, high=1000)
    sampling_alpha: float = key(0.1, "samplings: share of the merges that are left out (BPE, 1910.13267), or the power to "
                                "which the probability of a way is taken (unigram)", low=0, high=1)
    source: str | None = key(None, "a task of a mixture: its text, as config.data.source names some")
    eval_source: str | None = key(None, "a task of a mixture: its held-out text; None holds out config.data.eval_fraction")
    text_key: str | None = key(None, "a task of a mixture: field that holds the text; None takes config.data.text_key")
    rate: float | None = key(None, "a task of a mixture with fixed rates: how often its rows come beside others", low=0)

    @property
    def data(self) -> str:
        """Running text, pairs or labels."""
        return OBJECTIVES[self.objective].data

    @property
    def head(self) -> str:
        """The `config.model.head` that the objective trains."""
        return OBJECTIVES[self.objective].head

    @property
    def metrics(self) -> tuple[str, ...]:
        """What an evaluation measures in one number."""
        if self.data != LABELS:
            more = {"next_token": ("bits_per_byte",), "seq2seq": ("sequence_accuracy",)}
            return ("loss", "perplexity", "accuracy", *more.get(self.objective, ()))
        return {"classification": ("loss", "accuracy", "f1_macro", "f1_micro", "matthews"),
                "multi_label": ("loss", "accuracy", "f1_macro", "f1_micro"),
                "regression": ("loss", "spearman", "pearson")}[self.objective]


ADDED = ("normalize", "collapse_space", "deduplicate", "input_mask_rate", "samplings", "sampling_alpha")
"""Options that data prepared by earlier versions does not know, which is that of their defaults."""
OF_MIXTURES = ("source", "eval_source", "text_key", "rate")
"""Options that a task has only among others; see `moejax.mixture`."""


def resolve(given: "Task | dict | None", model: ModelConfig, where: str = "config.data.task") -> Task:
    """Typed options, with the usual objective of such a model if none is given. Raises `UserError` on impossible ones."""
    if isinstance(given, Task):
        return given
    by_kind = {"decoder": "next_token", "encoder": "masked_lm", "encoder_decoder": "seq2seq"}
    usual = "classification" if model.head == "classes" else by_kind[model.kind]
    task = build_group(Task, {"objective": usual, **(given or {})}, where)
    for name in ("input", "target"):
        fields_of(getattr(task, name), f"{where}.{name}")
    if task.labels:
        task = dataclasses.replace(task, labels=tuple(normal(task, label) for label in task.labels))
    check(not task.labels or len(set(task.labels)) == len(task.labels), f"{where}.labels={task.labels} names a label twice")
    check(task.class_weights is None or task.objective == "classification", f"{where}.class_weights has no effect on "
          f"{task.objective}; leave it out")
    check(task.class_weights is None or (task.labels is not None and len(task.labels) == len(task.class_weights)),
          f"{where}.class_weights needs as many {where}.labels, in the same order")
    check(task.samplings > 1 or task.sampling_alpha == Task.sampling_alpha, f"{where}.sampling_alpha={task.sampling_alpha} "
          f"has no effect without {where}.samplings; set that to 2 or more, or leave this out")
    unsmoothed = task.objective in ("multi_label", "regression")
    for option, idle in (("label_smoothing", unsmoothed), ("head_z_weight", task.head == "classes")):
        check(not (idle and getattr(task, option)), f"{where}.{option}={getattr(task, option)} has no effect on "
              f"{task.objective}; leave it out")
    hides = {"masked_lm": "mask_rate", "span_corruption": "noise_density", "ul2": "objective"}.get(task.objective)
    check(not (task.input_mask_rate and hides), f"{where}.input_mask_rate={task.input_mask_rate}: "
          f"{where}.objective={task.objective} hides tokens itself, by {where}.{hides}; leave it out")
    return task


def normal(task: Task, text: str) -> str:
    """A text as `normalize` and `collapse_space` want it."""
    text = text if task.normalize == "none" else unicodedata.normalize(task.normalize.upper(), text)
    return " ".join(text.split()) if task.collapse_space else text


def fields_of(template: str, where: str) -> list[str]:
    """The names of fields in a template. Raises `UserError` unless it is one."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        parts, reason = [], str(error)
    else:
        reason = "no field in braces"
    names = [name for _, name, form, conversion in parts if name is not None]
    plain = all(name and not form and not conversion for _, name, form, conversion in parts if name is not None)
    reason = reason if not names else "only names may stand in braces"
    check(bool(names) and plain, f"{where}={template!r} is not a template ({reason}); write fields as {{name}}, as in "
          "'summarize: {text}'")
    return names


def denoisers(task: Task) -> tuple[tuple[float, float], ...]:
    """(density, mean span) of each way in which spans are cut out."""
    if task.objective == "ul2":
        return UL2_SPANS
    return ((task.noise_density, task.mean_span),) if task.objective == "span_corruption" else ()


UL2_SPANS = ((0.15, 3.0), (0.5, 3.0), (0.5, 8.0), (0.15, 64.0))
"""The first is UL2's R-denoiser, the others its X-denoisers. The S-denoiser is a prefix language model."""


def num_spans(tokens: int, density: float, mean_span: float) -> tuple[int, int]:
    """Tokens that are cut out, and in how many spans, of at least 2 tokens; as T5 rounds them."""
    noise = min(max(round(tokens * density), 1), tokens - 1)
    return noise, min(max(round(noise / mean_span), 1), noise, tokens - noise)


@lru_cache
def text_window(task: Task, both: bool, length: int, source_length: int) -> int:
    """The most tokens of text from which an objective can make a row that fits; fewer than 2 if none does.

    Args:
      task: its objective cuts spans out.
      both: whether an encoder reads the input, and a decoder the target, or a decoder both, one behind the other.
      length: slots of the decoder.
      source_length: slots of the encoder.
    """
    mode = int(task.objective == "ul2")

    def fits(tokens: int) -> bool:
        rows = [(tokens - noise + spans + mode, noise + spans + 1)
                for noise, spans in (num_spans(tokens, *how) for how in denoisers(task))]
        if mode:
            rows.append((prefix_of(tokens) + mode, tokens - prefix_of(tokens) + 1))
        return all((source <= source_length and target <= length) if both else source + target - 1 <= length
                   for source, target in rows)

    return next((tokens for tokens in range(length + source_length, 1, -1) if fits(tokens)), 0)


def window_of(data: DataConfig, model_kind: str) -> int:
    """Tokens of text from which an objective makes a row. Raises `UserError` if rows are too short for any."""
    task, both = data.task, model_kind == "encoder_decoder"
    if not denoisers(task):
        return min(data.length, data.encoder_length) if both else data.length
    window = text_window(task, both, data.length, data.encoder_length)
    check(window >= 2, f"config.data.length={data.length} with config.data.source_length={data.source_length} is too short "
          f"for config.data.task.objective={task.objective}; raise them")
    return window


def prefix_of(tokens: int) -> int:
    """The part of a text that UL2's S-denoiser shows: three quarters."""
    return max(tokens * 3 // 4, 1)


def reserved_ids(task: Task, tokens: int) -> int:
    """Ids that an objective needs beside those of the text, of which it reads so many: a mask; or modes and sentinels."""
    if task.objective == "masked_lm":
        return 1
    spans = max((num_spans(tokens, *how)[1] for how in denoisers(task)), default=0)
    return spans + 3 * (task.objective == "ul2")


if __name__ == "__main__":
    print(table(Task, "config.data.task."))
