"""Llama (2302.13971, 2407.21783), Mistral (2310.06825), Qwen2 (2407.10671) and Qwen3 (2505.09388): dense decoders."""

from typing import Any, Iterator

from moejax.config import ModelConfig, MoEConfig
from moejax.hf import common
from moejax.hf.family import Family, Options
from moejax.hf.tensors import Tensor


def tensors(model: ModelConfig, moe: MoEConfig, other: bool) -> Iterator[Tensor]:
    """The table of all four."""
    yield from common.ends(model)
    for i in range(model.layers):
        yield from common.attention(model, i)
        yield from common.feed_forward(model, i, f"model.layers.{i}.mlp")


def read_llama(options: Options) -> dict[str, Any]:
    """Biases on all projections, or none."""
    model = common.read_model(options, base=10_000.0)
    options.only("rope_interleaved", False)
    options.taken |= {"is_llama_config", "max_sequence_length"}  # which nothing reads
    model["architecture"] |= common.read_attention_bias(options) | {"ffn_bias": options.take("mlp_bias", False)}
    return {"model": model}


def write_llama(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """What `read_llama` reads."""
    design = model.architecture
    return common.write_model(model) | {"attention_bias": design.qkv_bias, "mlp_bias": design.ffn_bias}


def read_mistral(options: Options) -> dict[str, Any]:
    """A window over all blocks, or none."""
    model = common.read_model(options)
    model["architecture"] |= common.read_windows(options, model["layers"], window=4096)
    return {"model": model}


def write_mistral(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """What `read_mistral` reads."""
    return common.write_model(model) | common.write_windows(model)


def late_windows(options: Options, layers: int) -> dict[str, Any]:
    """A window, if it is switched on, from block max_window_layers on."""
    first, used = options.take("max_window_layers", 28), options.take("use_sliding_window", False)
    return common.read_windows(options, layers, window=4096, slides=lambda i: i >= first, used=used, mixed=True)


def read_qwen2(options: Options) -> dict[str, Any]:
    """Biases on queries, keys and values; a window from some block on."""
    model = common.read_model(options)
    options.only("use_mrope", False)
    model["architecture"] |= {"qkv_bias": True} | late_windows(options, model["layers"])
    return {"model": model}


def write_qwen2(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """What `read_qwen2` reads."""
    return common.write_model(model, head_dim=model.head_dim * model.heads != model.embed) | common.write_windows(
        model, switch=True)


def read_qwen3(options: Options) -> dict[str, Any]:
    """Norms on query and key heads."""
    model = common.read_model(options) | {"qk_norm": True}
    model["architecture"] |= common.read_attention_bias(options) | late_windows(options, model["layers"])
    return {"model": model}


def write_qwen3(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """What `read_qwen3` reads."""
    return common.write_model(model) | common.write_windows(model, True) | {"attention_bias": model.architecture.qkv_bias}


LLAMA = Family("llama", "LlamaForCausalLM", read_llama, write_llama, tensors)
MISTRAL = Family("mistral", "MistralForCausalLM", read_mistral, write_mistral, tensors)
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", read_qwen2, write_qwen2, tensors)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", read_qwen3, write_qwen3, tensors)
