"""Qwen2-MoE (2407.10671) and Qwen3-MoE (2505.09388): many small experts; in Qwen2 beside a gated shared one."""

from typing import Any, Iterator, Mapping

from moejax.config import ModelConfig, MoEConfig
from moejax.hf import common
from moejax.hf.family import Family, Options
from moejax.hf.tensors import Tensor
from moejax.models.stacks import kinds

EXPERTS = {"count": "num_experts", "width": "moe_intermediate_size", "normalised": "norm_topk_prob"}


def tensors(model: ModelConfig, moe: MoEConfig, other: bool) -> Iterator[Tensor]:
    """The table of both."""
    yield from common.ends(model)
    for i, kind in enumerate(kinds(model, moe)):
        disk = f"model.layers.{i}.mlp"
        yield from common.attention(model, i)
        if not kind.sparse:
            yield from common.feed_forward(model, i, disk)
            continue
        yield from common.router(i, f"{disk}.gate.weight")
        yield from common.experts(moe, i, f"{disk}.experts", other)
        if moe.shared_experts:
            yield from common.feed_forward(model, i, f"{disk}.shared_expert", path="shared")
            yield Tensor(f"{disk}.shared_expert_gate.weight", ("params", "shared_gate"), "c d -> d c", i)


def read_sparse(options: Options, layers: int) -> dict[str, Any]:
    """Which blocks are sparse: each decoder_sparse_step-th, without those in mlp_only_layers."""
    step, dense = options.take("decoder_sparse_step", 1), options.take("mlp_only_layers", None) or []
    if not dense:
        return {"every": step}
    return {"every": 1, "sparse_blocks": [i for i in range(layers) if (i + 1) % step == 0 and i not in dense]}


def write_sparse(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """What `read_sparse` reads."""
    if moe.sparse_blocks is None:
        return {"decoder_sparse_step": moe.every, "mlp_only_layers": []}
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i in range(model.layers) if i not in moe.sparse_blocks]}


def read_qwen2(options: Options) -> dict[str, Any]:
    """See `Family.read`."""
    model = common.read_model(options)
    first, used = options.take("max_window_layers", 28), options.take("use_sliding_window", False)
    model["architecture"] |= {"qkv_bias": options.take("qkv_bias", True)} | common.read_windows(
        options, model["layers"], window=4096, slides=lambda i: i % 2 == 0 and i < first, used=used, mixed=True)
    moe = common.read_experts(options, **EXPERTS) | read_sparse(options, model["layers"])
    return {"model": model, "moe": moe | {
        "router": "topk", "shared_experts": 1, "shared_gate": "sigmoid",
        "shared_ffn": options.take("shared_expert_intermediate_size")}}


def write_qwen2(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """See `Family.write`."""
    return common.write_model(model, head_dim=model.head_dim * model.heads != model.embed) | common.write_windows(
        model, True) | common.write_experts(model, moe, **EXPERTS) | write_sparse(model, moe) | {
        "qkv_bias": model.architecture.qkv_bias, "shared_expert_intermediate_size": moe.shared_ffn}


def qwen3_experts(options: Mapping[str, Any]) -> dict[str, str]:
    """Version 5 of transformers writes num_local_experts for what was num_experts."""
    return EXPERTS | {"count": "num_local_experts" if "num_local_experts" in options else "num_experts"}


def read_qwen3(options: Options) -> dict[str, Any]:
    """See `Family.read`."""
    model = common.read_model(options) | {"qk_norm": True}
    used = options.take("use_sliding_window", False)
    options.take("max_window_layers", None)  # all blocks have one mask
    model["architecture"] |= common.read_attention_bias(options) | common.read_windows(
        options, model["layers"], window=4096, used=used)
    moe = common.read_experts(options, **qwen3_experts(options.values)) | read_sparse(options, model["layers"])
    return {"model": model, "moe": moe | {"router": "topk"}}


def write_qwen3(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """See `Family.write`."""
    return common.write_model(model) | common.write_windows(model, True) | common.write_experts(
        model, moe, **EXPERTS) | write_sparse(model, moe) | {"attention_bias": model.architecture.qkv_bias}


QWEN2_MOE = Family("qwen2_moe", "Qwen2MoeForCausalLM", read_qwen2, write_qwen2, tensors)
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", read_qwen3, write_qwen3, tensors)
