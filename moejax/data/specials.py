"""The ids that a task needs beside those of text: a mask, or modes and sentinels."""

from moejax.config import check
from moejax.data.tokenizers import Tokenizer
from moejax.task import Task, reserved_ids

MASKS, UNKNOWN = ("[MASK]", "<mask>"), ("[UNK]", "<unk>")
"""Names of tokens that stand for hidden text, and for text that a tokenizer does not know."""


def special_ids(tokenizer: Tokenizer, task: Task, window: int, vocab_size: int) -> list[int]:
    """The ids that a task needs: the tokenizer's own if it has them, else those behind its last.

    Raises:
      UserError: the model has no room for them.
    """
    count = reserved_ids(task, window)
    if task.objective == "masked_lm" or task.input_mask_rate:
        names, count = (*MASKS, *(UNKNOWN if task.input_mask_rate else ())), 1
        named = next((token for token in tokenizer.named(names) if token is not None), None)
        if named is not None:
            return [named]
    elif count:
        modes = 3 if task.objective == "ul2" else 0
        sentinels = (f"<extra_id_{i}>" for i in range(count - modes))
        named = tokenizer.named([*("[NLU]", "[S2S]", "[NLG]")[:modes], *sentinels])
        if None not in named:
            return named
    option = f".input_mask_rate={task.input_mask_rate}" if task.input_mask_rate else f".objective={task.objective}"
    last = tokenizer.vocab_size
    check(last + count <= vocab_size, f"config.data.task{option} needs {count} ids beside the {last} of "
          f"the tokenizer; set config.model.vocab_size={last + count} or more")
    return list(range(last, last + count))
