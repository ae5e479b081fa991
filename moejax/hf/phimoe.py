"""Phi-3.5-MoE (2404.14219): the SparseMixer router, LayerNorm, biases on attention and head."""

from functools import partial
from typing import Any

from moejax.config import ModelConfig, MoEConfig
from moejax.hf import common, mixtral
from moejax.hf.family import Family, Options

tensors = partial(mixtral.tensors, router_in_memory="router")


def read(options: Options) -> dict[str, Any]:
    """See `Family.read`."""
    model = common.read_model(options)
    options.only("input_jitter_noise", 0.0, 0)
    model["architecture"] |= common.read_attention_bias(options) | common.read_windows(options, model["layers"]) | {
        "norm": "layer", "head_bias": options.take("lm_head_bias", False)}
    return {"model": model, "moe": common.read_experts(options, **common.EXPERTS) | {
        "router": "sparse_mixer", "options": {"jitter_eps": float(options.take("router_jitter_noise", 0.01))}}}


def write(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """See `Family.write`."""
    design = model.architecture
    return common.write_model(model, head_dim=False) | common.write_windows(model) | common.write_experts(
        model, moe, **common.EXPERTS) | {"attention_bias": design.qkv_bias, "lm_head_bias": design.head_bias,
                                  "router_jitter_noise": moe.options.jitter_eps}


PHI_MOE = Family("phimoe", "PhimoeForCausalLM", read, write, tensors)
