"""ERNIE 4.5 MoE: softmax scores with a bias on the choice, interleaved rotation, biases outside the experts."""

from typing import Any, Iterator

from moejax.config import ModelConfig, MoEConfig
from moejax.hf import common
from moejax.hf.family import Family, Options
from moejax.hf.tensors import Tensor
from moejax.models.stacks import kinds

EXPERTS = {"count": "moe_num_experts", "width": "moe_intermediate_size", "choices": "moe_k"}


def tensors(model: ModelConfig, moe: MoEConfig, other: bool) -> Iterator[Tensor]:
    """See `Family.tensors`."""
    yield from common.ends(model)
    for i, kind in enumerate(kinds(model, moe)):
        disk = f"model.layers.{i}.mlp"
        yield from common.attention(model, i, interleaved=True)
        if not kind.sparse:
            yield from common.feed_forward(model, i, disk)
            continue
        yield from common.router(i, f"{disk}.gate.weight")
        bias = f"{disk}.{'gate.' if other else ''}moe_statics.e_score_correction_bias"
        yield Tensor(bias, ("router", "bias_E"), "1 e -> e", i)
        yield from common.experts(moe, i, f"{disk}.experts", other)
        if moe.shared_experts:
            yield from common.feed_forward(model, i, f"{disk}.shared_experts", path="shared")


def read(options: Options) -> dict[str, Any]:
    """See `Family.read`."""
    model = common.read_model(options, tied=True)
    bias, layers = options.take("use_bias", False), model["layers"]
    model["architecture"] |= {"qkv_bias": bias, "output_bias": bias, "ffn_bias": bias, "head_bias": bias}
    first, last = options.take("moe_layer_start_index", 1), options.take("moe_layer_end_index", -1)
    step, last = options.take("moe_layer_interval", 1), layers - 1 if last in (-1, None) else last
    options.only("moe_norm_min", 1e-12)
    options.only("moe_gate", "topk")
    options.only("moe_use_aux_free", True)
    options.taken |= {"moe_capacity"}  # of the training that it comes from; transformers drops no token
    sparse = [i for i in range(layers) if (i + 1) % step == 0 and first <= i <= last]
    return {"model": model, "moe": common.read_experts(options, **EXPERTS) | {
        "router": "loss_free_softmax", "renormalize": True, "sparse_blocks": sparse,
        "shared_experts": options.take("moe_num_shared_experts", 0)}}


def write(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """See `Family.write`."""
    blocks = moe.sparse_blocks
    step = blocks[1] - blocks[0] if len(blocks) > 1 else 1
    return common.write_model(model, head_dim=False) | common.write_experts(model, moe, **EXPERTS) | {
        "use_bias": model.architecture.ffn_bias, "moe_num_shared_experts": moe.shared_experts,
        "moe_layer_start_index": blocks[0], "moe_layer_end_index": blocks[-1], "moe_layer_interval": step}


ERNIE = Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", read, write, tensors)
