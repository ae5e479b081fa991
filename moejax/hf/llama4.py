"""The text model of Llama 4: one expert that scales its input beside a shared one, chunked and unrotated attention."""

from typing import Any, Iterator

from moejax.config import ModelConfig, MoEConfig, check
from moejax.hf import common
from moejax.hf.family import Family, Options
from moejax.hf.tensors import Tensor
from moejax.models.stacks import kinds


def tensors(model: ModelConfig, moe: MoEConfig, other: bool) -> Iterator[Tensor]:
    """Experts lie as [in, out], gate before up; rotated dimensions in interleaved pairs."""
    yield from common.ends(model)
    for i, kind in enumerate(kinds(model, moe)):
        disk = f"model.layers.{i}.feed_forward"
        yield from common.attention(model, i, interleaved=kind.attention != "unrotated")
        if not kind.sparse:
            yield from common.feed_forward(model, i, disk)
            continue
        yield from common.router(i, f"{disk}.router.weight")
        yield Tensor(f"{disk}.experts.gate_up_proj", ("params", "moe", "w_in"), "e d (g f) -> e d g f", i)
        yield Tensor(f"{disk}.experts.down_proj", ("params", "moe", "w_out"), "e f d -> e f d", i)
        yield from common.feed_forward(model, i, f"{disk}.shared_expert", path="shared")


def read(options: Options) -> dict[str, Any]:
    """See `Family.read`."""
    model = common.read_model(options, ffn="intermediate_size_mlp") | {"qk_norm": options.take("use_qk_norm", True)}
    layers = model["layers"]
    step = options.take("interleave_moe_layer_step", 1)
    sparse = options.take("moe_layers", None) or list(range(step - 1, layers, step))
    rotated = options.take("no_rope_layers", None)
    every = options.take("no_rope_layer_interval", 4)
    rotated = rotated or [int((i + 1) % every != 0) for i in range(layers)]
    listed = options.take("layer_types", None)
    chunk = options.take("attention_chunk_size", 8192)
    kinds = ["chunked" if has and chunk else "full" if has else "unrotated" for has in rotated]
    check(listed is None or [kind == "chunked_attention" for kind in listed] == [kind == "chunked" for kind in kinds],
          f"{options.where}: option layer_types={listed} does not go with no_rope_layers={rotated}")
    options.only("router_jitter_noise", 0.0, 0)
    options.take("for_llm_compressor", None)
    tuned = options.take("attn_temperature_tuning", True)
    floor, scale = options.take("floor_scale", 8192), options.take("attn_scale", 0.1)
    model["architecture"] |= common.read_attention_bias(options) | {
        "qk_norm": "rotated_unit", "attention": common.shortest_period(kinds),
        "window": chunk if "chunked" in kinds else 0, "temperature_scale": float(scale),
        "temperature_floor": int(floor) if tuned else 0}
    return {"model": model, "moe": common.read_experts(options, **common.EXPERTS) | {
        "router": "llama4", "sparse_blocks": sparse}}


def write(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """See `Family.write`."""
    design, listed = model.architecture, [kind.attention for kind in kinds(model, moe)]
    return common.write_model(model, ffn="intermediate_size_mlp") | common.write_experts(
        model, moe, **common.EXPERTS) | {
        "use_qk_norm": model.qk_norm, "attention_bias": design.qkv_bias, "moe_layers": list(moe.sparse_blocks),
        "no_rope_layers": [int(kind != "unrotated") for kind in listed], "attention_chunk_size": design.window or None,
        "layer_types": ["chunked_attention" if kind == "chunked" else "full_attention" for kind in listed],
        "attn_temperature_tuning": bool(design.temperature_floor), "floor_scale": design.temperature_floor or 8192,
        "attn_scale": design.temperature_scale}


LLAMA4 = Family("llama4_text", "Llama4ForCausalLM", read, write, tensors)
