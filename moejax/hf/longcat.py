"""LongCat-Flash (2509.01322): a layer is two blocks of ours, with experts on a shortcut from the first to the end of the
second, and some of them only copy."""

import dataclasses
from typing import Any, Iterator

from moejax.config import ModelConfig, MoEConfig, check
from moejax.hf import common, deepseek
from moejax.hf.family import Family, Options
from moejax.hf.tensors import Tensor, unread

SIZES = {"num_layers" if theirs == "num_hidden_layers" else theirs: ours for theirs, ours in common.SIZES.items()}
EXPERTS = {"count": "n_routed_experts", "width": "expert_ffn_hidden_size", "choices": "moe_topk", "coefficient": None}
NAMES = {"sizes": SIZES, "ffn": "ffn_hidden_size"}


def tensors(model: ModelConfig, moe: MoEConfig, other: bool) -> Iterator[Tensor]:
    """See `Family.tensors`. Experts that copy have input projections on disk, which are zero if nobody has drawn them."""
    yield from common.ends(model)
    for i in range(model.layers):
        disk, half = f"model.layers.{i // 2}", i % 2
        yield from common.norms(model, f"{disk}.input_layernorm.{half}", ("params", "attention_norm"), i)
        yield from common.norms(model, f"{disk}.post_attention_layernorm.{half}", ("params", "feed_forward_norm"), i)
        yield from deepseek.latent_attention(model, i, f"{disk}.self_attn.{half}")
        yield from common.feed_forward(model, i, f"{disk}.mlps.{half}")
        if half == 0:
            yield from common.router(i, f"{disk}.mlp.router.classifier.weight")
            yield Tensor(f"{disk}.mlp.router.e_score_correction_bias", ("router", "bias_E"), "e -> e", i)
            yield from experts(model, moe, i, f"{disk}.mlp.experts", other)


def experts(model: ModelConfig, moe: MoEConfig, layer: int, disk: str, fused: bool) -> Iterator[Tensor]:
    """Those of a layer."""
    real, every, width = moe.num_experts, moe.num_experts + moe.options.copy, (moe.ffn, model.embed)
    for line in common.experts(moe, layer, disk, fused):
        split = line.disk.endswith("gate_up_proj") and every > real
        yield line._replace(part=(0, real)) if split else line
        if split:
            yield unread(line.disk, (every - real, 2 * moe.ffn, model.embed), part=(real, every))
    for e in range(real, every if not fused else real):
        for name in ("gate_proj", "up_proj"):
            yield unread(f"{disk}.{e}.{name}.weight", width)


def read(options: Options) -> dict[str, Any]:
    """See `Family.read`."""
    options.only("attention_method", "MLA")
    options.only("mla_scale_q_lora", True)
    options.only("mla_scale_kv_lora", True)
    options.only("norm_topk_prob", False)
    options.only("router_bias", False)
    options.only("router_dtype", "float32")
    options.only("zero_expert_type", "identity")
    check(bool(options.take("q_lora_rank")), f"{options.where}: option q_lora_rank must be at least 1 for this family")
    model = deepseek.read_latent(options, base=1e7, **NAMES)
    model["layers"] *= 2
    options.only("num_hidden_layers", model["layers"], model["layers"] // 2)
    model["architecture"]["shortcut"] = model["architecture"]["latent"]["scaled"] = True
    return {"model": model, "moe": common.read_experts(options, **EXPERTS) | {
        "router": "longcat", "sparse_blocks": tuple(range(0, model["layers"], 2)),
        "route_scale": float(options.take("routed_scaling_factor")),
        "options": {"copy": options.take("zero_expert_num", None) or 0}}}


def write(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """See `Family.write`."""
    halved = dataclasses.replace(model, layers=model.layers // 2)
    return deepseek.write_latent(halved, **NAMES) | common.write_experts(model, moe, **EXPERTS) | {
        "routed_scaling_factor": moe.route_scale, "zero_expert_num": moe.options.copy}


LONGCAT = Family("longcat_flash", "LongcatFlashForCausalLM", read, write, tensors, beside=("model.mtp.",))
