"""Mixtral (2401.04088) and MiniMax-M2: experts w1, w3, w2 under `block_sparse_moe`."""

from typing import Any, Iterator

from moejax.config import ModelConfig, MoEConfig
from moejax.hf import common
from moejax.hf.family import REQUIRED, Family, Options
from moejax.hf.tensors import Tensor


def tensors(model: ModelConfig, moe: MoEConfig, other: bool, router_in_memory: str = "gate") -> Iterator[Tensor]:
    """The table of both; in the other layout, that of transformers' memory, the router may have another name."""
    yield from common.ends(model)
    for i in range(model.layers):
        disk = f"model.layers.{i}.{'mlp' if other else 'block_sparse_moe'}"
        yield from common.attention(model, i)
        yield from common.router(i, f"{disk}.{router_in_memory if other else 'gate'}.weight")
        yield from common.experts(moe, i, f"{disk}.experts", other, ("w1", "w3", "w2"))
        if moe.bias_rate:
            yield Tensor(f"{disk}.e_score_correction_bias", ("router", "bias_E"), "e -> e", i)


def read_mixtral(options: Options) -> dict[str, Any]:
    """Softmax over the chosen ones."""
    model = common.read_model(options)
    model["architecture"] |= common.read_windows(options, model["layers"])
    options.only("router_jitter_noise", 0.0, 0)
    return {"model": model, "moe": common.read_experts(options, **common.EXPERTS) | {"router": "mixtral"}}


def write_mixtral(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """What `read_mixtral` reads."""
    return common.write_model(model) | common.write_windows(model) | common.write_experts(model, moe, **common.EXPERTS)


def read_minimax(options: Options) -> dict[str, Any]:
    """Sigmoid scores, a bias on the choice, norms over whole queries and keys."""
    model = common.read_model(options, fraction=REQUIRED) | {"qk_norm": True}
    model["architecture"] |= {"qk_norm": "projection"}
    options.only("router_jitter_noise", 0.0, 0)
    options.only("scoring_func", "sigmoid")
    options.only("use_routing_bias", True)
    options.only("use_qk_norm", True)
    options.only("qk_norm_type", "per_layer")
    return {"model": model, "moe": common.read_experts(options, **common.EXPERTS) | {
        "router": "loss_free", "renormalize": True, "bias_rate": 0.001}}


def write_minimax(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """What `read_minimax` reads."""
    return common.write_model(model) | common.write_experts(model, moe, **common.EXPERTS)


MIXTRAL = Family("mixtral", "MixtralForCausalLM", read_mixtral, write_mixtral, tensors)
MINIMAX_M2 = Family("minimax_m2", "MiniMaxM2ForCausalLM", read_minimax, write_minimax, tensors)
