"""Hunyuan-A13B (2411.02265 describes its kind): norms on heads after the rotation, a shared layer as wide as an expert."""

from typing import Any, Iterator

from moejax.config import ModelConfig, MoEConfig
from moejax.hf import common
from moejax.hf.family import Family, Options
from moejax.hf.tensors import Tensor

EXPERTS = {"count": "num_experts", "width": "intermediate_size", "choices": "moe_topk", "coefficient": None}


def tensors(model: ModelConfig, moe: MoEConfig, other: bool) -> Iterator[Tensor]:
    """See `Family.tensors`."""
    yield from common.ends(model)
    for i in range(model.layers):
        disk = f"model.layers.{i}.mlp"
        yield from common.attention(model, i, qk_norms=("query_layernorm", "key_layernorm"))
        yield from common.router(i, f"{disk}.gate.wg.weight")
        yield from common.experts(moe, i, f"{disk}.experts", other)
        yield from common.feed_forward(model, i, f"{disk}.shared_mlp", path="shared")


def read(options: Options) -> dict[str, Any]:
    """See `Family.read`."""
    model = common.read_model(options) | {"qk_norm": True}
    model["architecture"] |= common.read_attention_bias(options) | {"qk_norm": "rotated_head"}
    return {"model": model, "moe": common.read_experts(options, **EXPERTS) | {
        "router": "topk", "renormalize": True, "shared_experts": 1}}


def write(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """See `Family.write`."""
    return common.write_model(model) | common.write_experts(model, moe, **EXPERTS) | {
        "attention_bias": model.architecture.qkv_bias}


HUNYUAN = Family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", read, write, tensors)
