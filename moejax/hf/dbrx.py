"""DBRX: LayerNorm without bias, one matrix for queries, keys and values, experts stacked on the rows of a matrix."""

from typing import Any, Iterator

from moejax.config import ModelConfig, MoEConfig, check
from moejax.hf import common
from moejax.hf.family import Family, Options
from moejax.hf.tensors import Tensor

SIZES = {"vocab_size": "vocab_size", "d_model": "embed", "n_layers": "layers", "n_heads": "heads",
         "max_seq_len": "max_length"}
GROUP_WITHOUT_EFFECT = ("chunk_size_feed_forward", "is_encoder_decoder", "hidden_size", "moe_jitter_eps", "attn_pdrop")


def tensors(model: ModelConfig, moe: MoEConfig, other: bool) -> Iterator[Tensor]:
    """See `Family.tensors`."""
    heads, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    parts = {"q": (0, heads), "k": (heads, heads + kv), "v": (heads + kv, heads + 2 * kv)}
    yield from common.ends(model, embedding="transformer.wte.weight", norm="transformer.norm_f")
    for i in range(model.layers):
        block = f"transformer.blocks.{i}"
        yield from common.norms(model, f"{block}.norm_attn_norm.norm_1", ("params", "attention_norm"), i)
        yield from common.norms(model, f"{block}.norm_attn_norm.norm_2", ("params", "feed_forward_norm"), i)
        for name, part in parts.items():
            yield Tensor(f"{block}.norm_attn_norm.attn.Wqkv.weight", ("params", "attention", f"w_{name}"),
                         "(q h) d -> d q h", i, part=part)
        yield Tensor(f"{block}.norm_attn_norm.attn.out_proj.weight", ("params", "attention", "w_o"), "d (q h) -> q h d", i)
        yield from common.router(i, f"{block}.ffn.router.layer.weight")
        for g, name in enumerate(("w1", "v1")):
            yield Tensor(f"{block}.ffn.experts.mlp.{name}", ("params", "moe", "w_in"), "(e f) d -> e d f", i,
                         at=(None, None, g))
        yield Tensor(f"{block}.ffn.experts.mlp.w2", ("params", "moe", "w_out"), "(e f) d -> e f d", i)


def read(options: Options) -> dict[str, Any]:
    """See `Family.read`."""
    attention, ffn = (Options(options.take(group), f"{options.where}: {group}") for group in ("attn_config", "ffn_config"))
    inner = attention.take("rope_theta", 10_000.0)
    base = options.take("rope_theta", None) or inner
    base, rope = common.read_rope(Options({"rope_theta": base} | {
        name: options.take(name, None) for name in ("rope_parameters", "rope_scaling")}, options.where), 0)
    model = {ours: options.take(theirs) for theirs, ours in SIZES.items()}
    options.take("num_key_value_heads", None)
    clip = attention.take("clip_qkv", None)
    ffn.only("ffn_act_fn", {"name": "silu"})
    ffn.only("moe_normalize_expert_weights", 1.0, 1)
    choices = ffn.take("moe_top_k", 1)
    check(choices > 1, f"{ffn.where}: option moe_top_k=1 is not implemented: with a weight of 1 a router does not learn")
    model |= {"kv_heads": attention.take("kv_n_heads", 1), "head_dim": model["embed"] // model["heads"], "norm_eps": 1e-5,
              "tie_embeddings": options.take("tie_word_embeddings", False), "ffn": ffn.take("ffn_hidden_size", 3584),
              "rope_base": base, "architecture": {"rope": rope, "norm": "layer_without_bias",
                                                  "clip_qkv": None if clip is None else float(clip)}}
    moe = {"every": 1, "router": "topk", "renormalize": True, "num_experts": ffn.take("moe_num_experts", 4),
           "experts_per_token": choices, "ffn": model["ffn"], "z_weight": 0.0,
           "balance_weight": ffn.take("moe_loss_weight", 0.01) * choices}
    for group in (attention, ffn):
        group.taken |= set(GROUP_WITHOUT_EFFECT)
        group.finish()
    return {"model": model, "moe": moe}


def write(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """See `Family.write`."""
    attention = {"kv_n_heads": model.kv_heads, "rope_theta": model.rope_base}
    if model.architecture.clip_qkv is not None:
        attention["clip_qkv"] = model.architecture.clip_qkv
    return {theirs: getattr(model, ours) for theirs, ours in SIZES.items()} | {
        "tie_word_embeddings": model.tie_embeddings, "attn_config": attention,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base}, "ffn_config": {
            "ffn_hidden_size": model.ffn, "moe_num_experts": moe.num_experts, "moe_top_k": moe.experts_per_token,
            "ffn_act_fn": {"name": "silu"}, "moe_normalize_expert_weights": 1.0,
            "moe_loss_weight": moe.balance_weight / moe.experts_per_token}}


DBRX = Family("dbrx", "DbrxForCausalLM", read, write, tensors, tied=("lm_head.weight", "transformer.wte.weight"))
