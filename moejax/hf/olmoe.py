"""OLMoE (2409.02060) and FlexOlmo (2507.07024): norms over whole queries and keys; in FlexOlmo norms behind the layers."""

from typing import Any, Iterator

from moejax.config import ModelConfig, MoEConfig
from moejax.hf import common
from moejax.hf.family import Family, Options
from moejax.hf.tensors import Tensor

EXPERTS = {"count": "num_experts", "width": "intermediate_size", "normalised": "norm_topk_prob"}


def tensors(model: ModelConfig, moe: MoEConfig, other: bool) -> Iterator[Tensor]:
    """The table of both."""
    behind = {"before": "post_attention_layernorm", "after": "post_feedforward_layernorm"}
    yield from common.ends(model)
    for i in range(model.layers):
        disk = f"model.layers.{i}.mlp"
        yield from common.attention(model, i, **(behind if model.architecture.norm_place == "output" else {}))
        yield from common.router(i, f"{disk}.gate.weight")
        yield from common.experts(moe, i, f"{disk}.experts", other)


def read(options: Options, norm_place: str) -> dict[str, Any]:
    """See `Family.read`."""
    model = common.read_model(options) | {"qk_norm": True}
    clip = options.take("clip_qkv", None)
    model["architecture"] |= common.read_attention_bias(options) | {
        "qk_norm": "projection", "norm_place": norm_place, "clip_qkv": None if clip is None else float(clip)}
    return {"model": model, "moe": common.read_experts(options, **EXPERTS) | {"router": "olmoe"}}


def write(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """See `Family.write`."""
    design = model.architecture
    return common.write_model(model, head_dim=False) | common.write_experts(model, moe, **EXPERTS) | {
        "attention_bias": design.qkv_bias} | ({} if design.clip_qkv is None else {"clip_qkv": design.clip_qkv})


OLMOE = Family("olmoe", "OlmoeForCausalLM", lambda options: read(options, "input"), write, tensors)
FLEX_OLMO = Family("flex_olmo", "FlexOlmoForCausalLM", lambda options: read(options, "output"), write, tensors)
