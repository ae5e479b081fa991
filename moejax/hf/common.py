"""Settings and tables that families of decoders share. Names on disk are those of Llama unless they are given."""

from typing import Any, Callable, Iterator, Mapping, Sequence

from moejax.architecture import PLAIN
from moejax.config import ModelConfig, MoEConfig, check
from moejax.hf.family import REQUIRED, Options
from moejax.hf.tensors import Tensor

SIZES = {"vocab_size": "vocab_size", "hidden_size": "embed", "num_hidden_layers": "layers", "num_attention_heads": "heads",
         "max_position_embeddings": "max_length"}
"""Options of config.json and the key of `config.model` that each is."""

ROPE = {"linear": {"factor": "factor"},
        "llama3": {"factor": "factor", "low_freq_factor": "low_factor", "high_freq_factor": "high_factor",
                   "original_max_position_embeddings": "original_length"},
        "yarn": {"factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow", "mscale": "mscale",
                 "mscale_all_dim": "mscale_all_dim", "attention_factor": "attention_factor", "truncate": "truncate",
                 "original_max_position_embeddings": "original_length"}}
"""Options of each way to stretch the rotary embedding, and the field of `Rope` that each is."""

KINDS = {"full_attention": "full", "sliding_attention": "sliding", "chunked_attention": "chunked"}
"""Kinds of attention as config.json names them."""

EXPERTS = {"count": "num_local_experts", "width": "intermediate_size"}
"""Names of the options of `read_experts` in families whose layers are all sparse, mostly."""


def read_model(options: Options, *, sizes: Mapping[str, str] = SIZES, ffn: str = "intermediate_size", tied: bool = False,
               base: Any = REQUIRED, fraction: Any = 1.0) -> dict[str, Any]:
    """Sizes, norm and rotary embedding of a decoder with grouped queries, and an empty architecture to add to.

    Args:
      options: of config.json.
      sizes: names of options, and keys of `config.model`.
      ffn: name of the width of dense layers.
      tied: whether embedding and head are one if nothing is said.
      base: of the rotary embedding if nothing is said.
      fraction: share of a head that is rotated if nothing is said; at 1.0 nothing else is allowed.
    """
    model = {ours: options.take(theirs) for theirs, ours in sizes.items()}
    model |= {"norm_eps": options.take("rms_norm_eps"), "tie_embeddings": options.take("tie_word_embeddings", tied)}
    model["ffn"] = options.take(ffn)
    options.only("hidden_act", "silu")
    model["kv_heads"] = options.take("num_key_value_heads", None) or model["heads"]
    model["head_dim"] = options.take("head_dim", None) or model["embed"] // model["heads"]
    base, rope = read_rope(options, model["max_length"], base, fraction)
    return model | {"rope_base": base, "architecture": {"rope": rope}}


def read_attention_bias(options: Options, default: bool = False) -> dict[str, bool]:
    """attention_bias, which in most families is on all four projections."""
    bias = options.take("attention_bias", default)
    return {"qkv_bias": bias, "output_bias": bias}


def write_model(model: ModelConfig, *, sizes: Mapping[str, str] = SIZES, ffn: str = "intermediate_size",
                head_dim: bool = True) -> dict[str, Any]:
    """What `read_model` reads."""
    written = {theirs: getattr(model, ours) for theirs, ours in sizes.items()}
    return written | {ffn: model.ffn, "rms_norm_eps": model.norm_eps, "num_key_value_heads": model.kv_heads,
                      "tie_word_embeddings": model.tie_embeddings, "hidden_act": "silu"} | (
        {"head_dim": model.head_dim} if head_dim else {}) | write_rope(model)


def read_rope(options: Options, max_length: int, base: Any = REQUIRED, fraction: Any = 1.0) -> tuple[float, dict[str, Any]]:
    """Base and fields of `Rope`, from either spelling (rope_parameters, or rope_theta and rope_scaling)."""
    given = [options.take(name, None) or {} for name in ("rope_parameters", "rope_scaling")]
    check(all(isinstance(values, dict) for values in given), f"{options.where}: options rope_parameters and rope_scaling "
          "must be objects")
    newer, older = map(dict, given)
    said = newer.pop("rope_theta", None), older.pop("rope_theta", None)
    base = said[0] or said[1] or options.take("rope_theta", base)
    rotated = newer.pop("partial_rotary_factor", None) or options.take("partial_rotary_factor", fraction)
    options.taken |= {"rope_theta", "partial_rotary_factor"}
    check(isinstance(base, int | float), f"{options.where}: option rope_theta={base!r} is no number")
    check(fraction != 1.0 or rotated == 1.0,
          f"{options.where}: option partial_rotary_factor={rotated} is not implemented for this family")
    given = older or newer
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if kind == "default":
        check(not given, f"{options.where}: option rope_parameters.{next(iter(given), '')} is not implemented")
        return float(base), {"fraction": float(rotated)}
    check(kind in ROPE, f"{options.where}: option rope_type={kind!r} is not implemented, only {', '.join(ROPE)}")
    check(given.get("factor") is not None, f"{options.where}: option rope_parameters.factor is missing")
    rope = {}
    for name, value in given.items():
        check(name in ROPE[kind], f"{options.where}: option rope_parameters.{name}={value!r} is not implemented for {kind}")
        if value is not None:
            rope[ROPE[kind][name]] = value
    if kind == "yarn":
        rope.setdefault("original_length", max_length)
    return float(base), {"fraction": float(rotated), "scaling": kind} | rope


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """What `read_rope` reads, as versions 4 and 5 of transformers both understand it."""
    rope, plain = model.architecture.rope, PLAIN.rope
    written = {"rope_theta": model.rope_base, "rope_scaling": None, "partial_rotary_factor": rope.fraction}
    if rope.scaling != "none":
        values = {theirs: getattr(rope, ours) for theirs, ours in ROPE[rope.scaling].items()}
        optional = ("mscale", "mscale_all_dim", "attention_factor", "truncate")
        written["rope_scaling"] = {"rope_type": rope.scaling} | {
            name: value for name, value in values.items()
            if name not in optional or value != getattr(plain, ROPE[rope.scaling][name])}
    return written


def read_experts(options: Options, *, count: str, width: str, choices: str = "num_experts_per_tok",
                 normalised: str | None = None, coefficient: str | None = "router_aux_loss_coef") -> dict[str, Any]:
    """Number and width of experts, choices, and the load-balancing loss, which is K at balance there and 1 here."""
    moe = {"every": 1, "num_experts": options.take(count), "experts_per_token": options.take(choices), "z_weight": 0.0,
           "ffn": options.take(width)}
    if normalised is not None:
        moe["renormalize"] = options.take(normalised, False)
    if coefficient is not None:
        moe["balance_weight"] = options.take(coefficient, 0.001) * moe["experts_per_token"]
    return moe


def write_experts(model: ModelConfig, moe: MoEConfig, *, count: str, width: str, choices: str = "num_experts_per_tok",
                  normalised: str | None = None, coefficient: str | None = "router_aux_loss_coef") -> dict[str, Any]:
    """What `read_experts` reads."""
    written = {count: moe.num_experts, width: moe.ffn or model.ffn, choices: moe.experts_per_token}
    if normalised is not None:
        written[normalised] = moe.renormalize
    if coefficient is not None:
        written[coefficient] = moe.balance_weight / moe.experts_per_token
    return written


def ends(model: ModelConfig, *, embedding: str = "model.embed_tokens.weight", norm: str = "model.norm"
         ) -> Iterator[Tensor]:
    """Embedding, last norm and head."""
    yield Tensor(embedding, ("params", "embedding", "table"), "v d -> v d")
    yield from norms(model, norm, ("params", "final_norm"), None)
    if not model.tie_embeddings:
        yield Tensor("lm_head.weight", ("params", "embedding", "head"), "v d -> d v")
    if model.architecture.head_bias:
        yield Tensor("lm_head.bias", ("params", "embedding", "head_bias"), "v -> v")


def norms(model: ModelConfig, disk: str, path: tuple[str, ...], layer: int | None) -> Iterator[Tensor]:
    """Scale, and bias where there is one."""
    yield Tensor(f"{disk}.weight", (*path, "scale"), "d -> d", layer)
    if model.architecture.norm == "layer":
        yield Tensor(f"{disk}.bias", (*path, "bias"), "d -> d", layer)


def block_norms(model: ModelConfig, layer: int, before: str = "input_layernorm", after: str = "post_attention_layernorm"
                ) -> Iterator[Tensor]:
    """The norms of attention and of the feed-forward layer."""
    yield from norms(model, f"model.layers.{layer}.{before}", ("params", "attention_norm"), layer)
    yield from norms(model, f"model.layers.{layer}.{after}", ("params", "feed_forward_norm"), layer)


def attention(model: ModelConfig, layer: int, *, qk_norms: tuple[str, str] = ("q_norm", "k_norm"),
              interleaved: bool = False, **block_norm_names: str) -> Iterator[Tensor]:
    """The norms of a block, and attention with grouped queries."""
    design, disk = model.architecture, f"model.layers.{layer}.self_attn"
    yield from block_norms(model, layer, **block_norm_names)
    for name in ("q", "k", "v"):
        pairs = interleaved and name != "v"
        yield Tensor(f"{disk}.{name}_proj.weight", ("params", "attention", f"w_{name}"), "(q h) d -> d q h", layer,
                     pairs=(2, 0) if pairs else None)
        if design.qkv_bias:
            yield Tensor(f"{disk}.{name}_proj.bias", ("params", "attention", f"b_{name}"), "(q h) -> q h", layer,
                         pairs=(1, 0) if pairs else None)
    yield Tensor(f"{disk}.o_proj.weight", ("params", "attention", "w_o"), "d (q h) -> q h d", layer)
    if design.output_bias:
        yield Tensor(f"{disk}.o_proj.bias", ("params", "attention", "b_o"), "d -> d", layer)
    if model.qk_norm and design.qk_norm != "rotated_unit":
        layout = "(q h) -> q h" if design.qk_norm == "projection" else "h -> h"
        for name, theirs in zip("qk", qk_norms):
            yield Tensor(f"{disk}.{theirs}.weight", ("params", "attention", f"{name}_norm", "scale"), layout, layer)
    if design.sinks:
        yield Tensor(f"{disk}.sinks", ("params", "attention", "sinks"), "q -> q", layer)


def feed_forward(model: ModelConfig, layer: int, disk: str, *, path: str = "feed_forward") -> Iterator[Tensor]:
    """A gated dense layer, of its own or shared beside experts."""
    for g, name in enumerate(("gate_proj", "up_proj")):
        yield Tensor(f"{disk}.{name}.weight", ("params", path, "w_in"), "f d -> d f", layer, at=(None, g))
        if model.architecture.ffn_bias:
            yield Tensor(f"{disk}.{name}.bias", ("params", path, "b_in"), "f -> f", layer, at=(g,))
    yield Tensor(f"{disk}.down_proj.weight", ("params", path, "w_out"), "d f -> f d", layer)
    if model.architecture.ffn_bias:
        yield Tensor(f"{disk}.down_proj.bias", ("params", path, "b_out"), "d -> d", layer)


def router(layer: int, disk: str) -> Iterator[Tensor]:
    """The scores of a linear router."""
    yield Tensor(disk, ("params", "moe", "router_w_DE"), "e d -> d e", layer)


def experts(moe: MoEConfig, layer: int, disk: str, fused: bool,
            names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Iterator[Tensor]:
    """Gated experts: a tensor for each, or one for all of a layer."""
    if fused:
        yield Tensor(f"{disk}.gate_up_proj", ("params", "moe", "w_in"), "e (g f) d -> e d g f", layer)
        yield Tensor(f"{disk}.down_proj", ("params", "moe", "w_out"), "e d f -> e f d", layer)
        return
    for e in range(moe.num_experts):
        for g, name in enumerate(names[:2]):
            yield Tensor(f"{disk}.{e}.{name}.weight", ("params", "moe", "w_in"), "f d -> d f", layer, at=(e, None, g))
        yield Tensor(f"{disk}.{e}.{names[2]}.weight", ("params", "moe", "w_out"), "d f -> f d", layer, at=(e,))



def shortest_period(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern that, repeated, gives the kinds of all blocks."""
    return next(tuple(kinds[:n]) for n in range(1, len(kinds) + 1)
                if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))


def read_windows(options: Options, layers: int, *, window: int | None = None,
                 slides: Callable[[int], bool] = lambda i: True, used: bool = True, mixed: bool = False) -> dict[str, Any]:
    """Kinds of attention and their window.

    Args:
      options: of config.json.
      layers: number of blocks.
      window: if nothing is said.
      slides: number of a block -> whether it slides, if nothing is said.
      used: whether the window counts.
      mixed: whether layer_types may name different kinds.
    """
    window, listed = options.take("sliding_window", window), options.take("layer_types", None)
    if listed is None:
        listed = ["sliding_attention" if used and window and slides(i) else "full_attention" for i in range(layers)]
    unknown = [kind for kind in listed if kind not in KINDS]
    check(not unknown and len(listed) == layers and (mixed or len(set(listed)) == 1),
          f"{options.where}: option layer_types={unknown or listed} is not implemented for this family")
    kinds = shortest_period([KINDS[kind] for kind in listed])
    return {"attention": kinds, "window": window if "sliding" in kinds else 0}


def write_windows(model: ModelConfig, switch: bool = False) -> dict[str, Any]:
    """What `read_windows` reads; with `switch` also use_sliding_window."""
    design, theirs = model.architecture, {ours: name for name, ours in KINDS.items()}
    if set(design.attention) == {"full"}:
        return {"sliding_window": None} | ({"use_sliding_window": False} if switch else {})
    kinds = [theirs[design.attention[i % len(design.attention)]] for i in range(model.layers)]
    return {"sliding_window": design.window, "layer_types": kinds} | ({"use_sliding_window": True} if switch else {})
