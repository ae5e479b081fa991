"""GraniteMoE (2408.13359) and its form with a shared layer: multipliers on embedding, residuals, scores and logits."""

from typing import Any, Iterator

from moejax.config import ModelConfig, MoEConfig
from moejax.hf import common
from moejax.hf.family import Family, Options
from moejax.hf.tensors import Tensor


def tensors(model: ModelConfig, moe: MoEConfig, other: bool) -> Iterator[Tensor]:
    """The experts of a layer always lie in one tensor."""
    inner, router, outer = ("experts.gate_up_proj", "router.weight", "experts.down_proj") if other else (
        "input_linear.weight", "router.layer.weight", "output_linear.weight")
    yield from common.ends(model)
    for i in range(model.layers):
        disk = f"model.layers.{i}"
        yield from common.attention(model, i)
        yield from common.router(i, f"{disk}.block_sparse_moe.{router}")
        yield Tensor(f"{disk}.block_sparse_moe.{inner}", ("params", "moe", "w_in"), "e (g f) d -> e d g f", i)
        yield Tensor(f"{disk}.block_sparse_moe.{outer}", ("params", "moe", "w_out"), "e d f -> e f d", i)
        if moe.shared_experts:
            yield Tensor(f"{disk}.shared_mlp.input_linear.weight", ("params", "shared", "w_in"), "(g f) d -> d g f", i)
            yield Tensor(f"{disk}.shared_mlp.output_linear.weight", ("params", "shared", "w_out"), "d f -> f d", i)


def read(options: Options, shared: bool) -> dict[str, Any]:
    """See `Family.read`."""
    model = common.read_model(options)
    model["architecture"] |= common.read_attention_bias(options) | {
        "attention_scale": float(options.take("attention_multiplier", 1.0)),
        "embedding_multiplier": float(options.take("embedding_multiplier", 1.0)),
        "residual_multiplier": float(options.take("residual_multiplier", 1.0)),
        "logit_multiplier": 1 / options.take("logits_scaling", 1.0)}
    moe = common.read_experts(options, **common.EXPERTS) | {"router": "topk", "renormalize": True}
    width = options.take("shared_intermediate_size", 0) if shared else 0
    return {"model": model, "moe": moe | ({"shared_experts": 1, "shared_ffn": width} if width else {})}


def write(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """See `Family.write`."""
    design = model.architecture
    return common.write_model(model, head_dim=False) | common.write_experts(model, moe, **common.EXPERTS) | {
        "attention_bias": design.qkv_bias, "attention_multiplier": design.attention_scale,
        "embedding_multiplier": design.embedding_multiplier, "residual_multiplier": design.residual_multiplier,
        "logits_scaling": 1 / design.logit_multiplier} | (
        {"shared_intermediate_size": moe.shared_ffn} if moe.shared_experts else {})


GRANITE_MOE = Family("granitemoe", "GraniteMoeForCausalLM", lambda options: read(options, False), write, tensors)
GRANITE_MOE_SHARED = Family("granitemoeshared", "GraniteMoeSharedForCausalLM", lambda options: read(options, True), write,
                            tensors)
