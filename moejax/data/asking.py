"""What a trained model is asked, and what it answers: a prompt as rows of tokens as in training, and new tokens as text."""

from collections.abc import Sequence

from moejax.config import Config
from moejax.data.specials import special_ids
from moejax.data.tokenizers import Tokenizer, added_text
from moejax.task import PAIRS, Task, window_of


def encode_prompts(tokenizer: Tokenizer, config: Config, prompts: Sequence[str]) -> list[list[int]]:
    """Prompts as rows of tokens, laid out as in training by the resolved config of one task.

    A text begins with the separator, or with UL2's token of the mode in which it goes on. An input of pairs is framed.

    Raises:
      UserError: the model has no room for the ids that its objective needs.
    """
    task, first = config.data.task, tokenizer.separator_id
    if task.data == PAIRS:
        return tokenizer.frame_batch(prompts)
    if task.objective == "ul2":
        first = special_ids(tokenizer, task, window_of(config.data, config.model.kind), config.model.vocab_size)[1]
    return [[first, *ids] for ids in tokenizer.encode_batch(prompts)]


def reads_prefix(config: Config) -> bool:
    """Whether the tokens of a prompt but the last see each other in both directions, as a decoder was trained to read
    what it goes on from; config as in `encode_prompts`."""
    return config.model.kind == "decoder" and config.data.task.objective != "next_token"


def answers(task: Task) -> bool:
    """Whether the model writes a text of its own, rather than one that goes on where the prompt ends."""
    return task.data == PAIRS or task.objective == "span_corruption"


def new_text(tokenizer: Tokenizer, task: Task, prompt: list[int], new: Sequence[int], ends: Sequence[int] = ()) -> str:
    """The text of new tokens after those of a prompt, but for `ends`, with which it may end beside the separator."""
    new = [token for token in new if token not in ends]
    return tokenizer.decode(new) if answers(task) else added_text(tokenizer, prompt[1:], new)
