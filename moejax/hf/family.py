"""What a family of open models is: how its config.json maps to ours, and its table of tensors."""

from typing import Any, Callable, Iterator, Mapping, NamedTuple

from moejax.config import ModelConfig, MoEConfig, check, nearest
from moejax.hf.tensors import Tensor

REQUIRED = object()

BLOCKS, MOST_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 10_000
"""Options that count blocks, for each of which families make something, and the most that there may be."""
MOST = 2**53
"""The largest of other whole numbers."""
WITHOUT_EFFECT = frozenset("""
    _name_or_path architectures attention_dropout attn_pdrop auto_map bos_token_id classifier_dropout decoder_start_token_id
    dtype embd_pdrop emb_pdrop eod_token_id eos_token_id ep_size hidden_dropout_prob id2label initializer_factor
    initializer_range label2id model_type num_nextn_predict_layers output_attentions
    output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type resid_pdrop return_dict sep_token_id
    seq_aux summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    task_specific_params tokenizer_class torch_dtype transformers_version unk_token_id use_cache aux_loss_alpha
    attn_implementation initial_context_length attention_probs_dropout_prob dropout_rate gradient_checkpointing output_past
    transformers.js_config
""".split())
"""Options of config.json that change no logit: names, ids of special tokens, initialisation, dropout, what is returned."""


class Options:
    """The options of a config.json, of which every one must be taken."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where, self.taken = dict(values), where, set()

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """An option. Raises `UserError` if it is missing and has no default."""
        self.taken.add(name)
        check(name in self.values or default is not REQUIRED, f"{self.where}: option {name!r} is missing")
        value, most = self.values.get(name, default), MOST_BLOCKS if name in BLOCKS else MOST
        check(type(value) is not int or abs(value) <= most, f"{self.where}: option {name!r} must be at most {most}; the "
              "file is damaged")
        return value

    def only(self, name: str, *supported: Any, default: Any = REQUIRED) -> None:
        """Takes an option of which only some values are supported."""
        value = self.take(name, supported[0] if default is REQUIRED else default)
        check(value in supported, f"{self.where}: option {name}={value!r} is not supported, only "
              f"{' or '.join(map(repr, supported))}")

    def finish(self) -> None:
        """Raises `UserError` on an option that nothing has taken and that may have an effect."""
        left = [name for name, value in self.values.items()
                if name not in self.taken and name not in WITHOUT_EFFECT and value is not None]
        check(not left, f"{self.where}: option {left and left[0]}={left and self.values[left[0]]!r} is not implemented for "
              f"this family{nearest(left[0], sorted(self.taken)) if left else ''}")


class Family(NamedTuple):
    """One family.

    Attributes:
      model_type: its name in config.json.
      architecture: the class that it names there.
      read: options -> our settings, {"model": ..., "moe": ...}, nested.
      write: (model, moe) -> the options of config.json.
      tensors: (model, moe, other) -> its table; `other` in the second layout in which the family lies on disk, mostly with
        all experts of a layer in one tensor, if there is one.
      unused: endings of names of tensors that may be on disk and that nothing needs.
      tied: name of the head, which may be on disk if it is the embedding's, and name of that.
      name: in `FAMILIES`; empty is the model_type.
      beside: beginnings of names of tensors that may be on disk and are not of the model (multi-token prediction).
    """

    model_type: str
    architecture: str
    read: Callable[[Options], dict[str, Any]]
    write: Callable[[ModelConfig, MoEConfig], dict[str, Any]]
    tensors: Callable[[ModelConfig, MoEConfig, bool], Iterator[Tensor]]
    unused: tuple[str, ...] = ("rotary_emb.inv_freq",)
    tied: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")
    name: str = ""
    beside: tuple[str, ...] = ()
