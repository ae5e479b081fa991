"""GPT-OSS (2508.10925): sinks, alternating windows, biases everywhere, experts with a clamped SwiGLU."""

from typing import Any, Iterator

from moejax.config import ModelConfig, MoEConfig, check
from moejax.hf import common
from moejax.hf.family import Family, Options
from moejax.hf.tensors import Tensor


def tensors(model: ModelConfig, moe: MoEConfig, other: bool) -> Iterator[Tensor]:
    """Gate and up are interleaved, and matrices of experts lie as [in, out]."""
    yield from common.ends(model)
    for i in range(model.layers):
        disk = f"model.layers.{i}.mlp"
        yield from common.attention(model, i)
        yield from common.router(i, f"{disk}.router.weight")
        yield Tensor(f"{disk}.router.bias", ("params", "moe", "router_b_E"), "e -> e", i)
        yield Tensor(f"{disk}.experts.gate_up_proj", ("params", "moe", "w_in"), "e d (f g) -> e d g f", i)
        yield Tensor(f"{disk}.experts.gate_up_proj_bias", ("params", "moe", "b_in"), "e (f g) -> e g f", i)
        yield Tensor(f"{disk}.experts.down_proj", ("params", "moe", "w_out"), "e f d -> e f d", i)
        yield Tensor(f"{disk}.experts.down_proj_bias", ("params", "moe", "b_out"), "e d -> e d", i)


def read(options: Options) -> dict[str, Any]:
    """See `Family.read`."""
    model = common.read_model(options)
    check(model["architecture"]["rope"].get("scaling") == "yarn",
          f"{options.where}: option rope_scaling must be one of type yarn, which others assume")
    options.only("swiglu_alpha", 1.702)
    options.take("experts_per_token", None)  # num_experts_per_tok again
    model["architecture"] |= common.read_attention_bias(options, default=True) | {
        "sinks": True, "expert_bias": True, "activation": "clamped_swiglu",
        "clamp": float(options.take("swiglu_limit", 7.0))} | common.read_windows(
            options, model["layers"], window=128, slides=lambda i: i % 2 == 0, mixed=True)
    return {"model": model, "moe": common.read_experts(options, **common.EXPERTS) | {
        "router": "topk", "renormalize": True, "options": {"bias": True}}}


def write(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """See `Family.write`."""
    design = model.architecture
    return common.write_model(model) | common.write_windows(model) | common.write_experts(
        model, moe, **common.EXPERTS) | {"attention_bias": design.qkv_bias, "swiglu_limit": design.clamp}


GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", read, write, tensors)
