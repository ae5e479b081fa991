"""The ids that an objective needs beside those of text: a mask, or modes and sentinels."""

from moejax.config import check
from moejax.data.tokenizers import Tokenizer
from moejax.task import Task, reserved_ids


def special_ids(tokenizer: Tokenizer, task: Task, window: int, vocab_size: int) -> list[int]:
    """The ids that an objective needs: the tokenizer's own if it has them, else those behind its last.

    Raises:
      UserError: the model has no room for them.
    """
    count = reserved_ids(task, window)
    if task.objective == "masked_lm":
        named = next((token for token in tokenizer.named(("[MASK]", "<mask>")) if token is not None), None)
        if named is not None:
            return [named]
    elif count:
        modes = 3 if task.objective == "ul2" else 0
        sentinels = (f"<extra_id_{i}>" for i in range(count - modes))
        named = tokenizer.named([*("[NLU]", "[S2S]", "[NLG]")[:modes], *sentinels])
        if None not in named:
            return named
    last = tokenizer.vocab_size
    check(last + count <= vocab_size, f"config.data.task.objective={task.objective} needs {count} ids beside the {last} of "
          f"the tokenizer; set config.model.vocab_size={last + count} or more")
    return list(range(last, last + count))
