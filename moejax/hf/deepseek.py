"""DeepSeek-V2 (2405.04434) and V3 (2412.19437), and families with V3's layers: GLM-4-MoE (2508.06471), dots1 (2506.05767).

V2 and V3 have multi-head latent attention; the other two have grouped queries.
"""

from typing import Any, Iterator

from moejax.config import ModelConfig, MoEConfig, check
from moejax.hf import common
from moejax.hf.family import Family, Options
from moejax.hf.tensors import Tensor
from moejax.models.stacks import kinds

EXPERTS = {"count": "n_routed_experts", "width": "moe_intermediate_size", "coefficient": None}
LATENT = {"kv_lora_rank": "rank", "qk_rope_head_dim": "rotary_dim", "v_head_dim": "value_dim"}


def latent_attention(model: ModelConfig, layer: int, disk: str) -> Iterator[Tensor]:
    """Latent attention; rotated dimensions lie in interleaved pairs."""
    design, latent = model.architecture, model.architecture.latent
    plain = model.head_dim - latent.rotary_dim

    def line(name: str, parameter: str, layout: str, pairs: tuple[int, int] | None = None) -> Tensor:
        return Tensor(f"{disk}.{name}", ("params", "attention", *parameter.split("/")), layout, layer, pairs=pairs)

    if latent.query_rank:
        yield line("q_a_proj.weight", "w_q_down", "r d -> d r")
        yield line("q_a_layernorm.weight", "q_norm/scale", "r -> r")
        yield line("q_b_proj.weight", "w_q", "(q h) r -> r q h", (2, plain))
    else:
        yield line("q_proj.weight", "w_q", "(q h) d -> d q h", (2, plain))
    yield line("kv_a_proj_with_mqa.weight", "w_kv_down", "r d -> d r", (1, latent.rank))
    yield line("kv_a_layernorm.weight", "kv_norm/scale", "r -> r")
    yield line("kv_b_proj.weight", "w_kv", "(q h) r -> r q h")
    yield line("o_proj.weight", "w_o", "d (q v) -> q v d")
    if design.qkv_bias:
        if latent.query_rank:
            yield line("q_a_proj.bias", "b_q_down", "r -> r")
        yield line("kv_a_proj_with_mqa.bias", "b_kv_down", "r -> r", (0, latent.rank))
    if design.output_bias:
        yield line("o_proj.bias", "b_o", "d -> d")


def tensors(model: ModelConfig, moe: MoEConfig, other: bool) -> Iterator[Tensor]:
    """The table of all."""
    yield from common.ends(model)
    for i, kind in enumerate(kinds(model, moe)):
        disk = f"model.layers.{i}.mlp"
        if model.architecture.latent.rank:
            yield from common.block_norms(model, i)
            yield from latent_attention(model, i, f"model.layers.{i}.self_attn")
        else:
            yield from common.attention(model, i)
        if not kind.sparse:
            yield from common.feed_forward(model, i, disk)
            continue
        yield from common.router(i, f"{disk}.gate.weight")
        if moe.bias_rate:
            yield Tensor(f"{disk}.gate.e_score_correction_bias", ("router", "bias_E"), "e -> e", i)
        yield from common.experts(moe, i, f"{disk}.experts", other)
        if moe.shared_experts:
            yield from common.feed_forward(model, i, f"{disk}.shared_experts", path="shared")


def read_latent(options: Options, **names: Any) -> dict[str, Any]:
    """A model with latent attention; `names` as in `common.read_model`."""
    plain = options.take("qk_nope_head_dim")
    model = common.read_model(options, **names)  # whose head_dim is that of the rotated part, if it is there
    latent = {ours: options.take(theirs) for theirs, ours in LATENT.items()}
    model["head_dim"], model["kv_heads"] = plain + latent["rotary_dim"], model["heads"]
    options.only("qk_head_dim", model["head_dim"])
    options.only("rope_interleave", True)
    model["architecture"] |= common.read_attention_bias(options) | {
        "latent": latent | {"query_rank": options.take("q_lora_rank", None) or 0}}
    return model


def write_latent(model: ModelConfig, **names: Any) -> dict[str, Any]:
    """What `read_latent` reads."""
    latent = model.architecture.latent
    return common.write_model(model, **names) | {theirs: getattr(latent, ours) for theirs, ours in LATENT.items()} | {
        "head_dim": latent.rotary_dim, "qk_nope_head_dim": model.head_dim - latent.rotary_dim,
        "q_lora_rank": latent.query_rank or None, "attention_bias": model.architecture.qkv_bias}


def read_experts(options: Options) -> dict[str, Any]:
    """Numbers, scale, shared experts and dense blocks, which all have."""
    options.only("moe_layer_freq", 1)
    return common.read_experts(options, **EXPERTS) | {
        "shared_experts": options.take("n_shared_experts", None) or 0,
        "first_dense": options.take("first_k_dense_replace", 0),
        "route_scale": float(options.take("routed_scaling_factor"))}


def write_experts(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """What `read_experts` reads."""
    return common.write_experts(model, moe, **EXPERTS) | {
        "n_shared_experts": moe.shared_experts or None, "first_k_dense_replace": moe.first_dense,
        "routed_scaling_factor": moe.route_scale, "norm_topk_prob": moe.renormalize}


def read_v2(options: Options) -> dict[str, Any]:
    """Softmax scores; all experts, or those of the groups with the largest score."""
    method = options.take("topk_method", "greedy")
    check(method in ("greedy", "group_limited_greedy"),
          f"{options.where}: option topk_method={method!r} is not implemented")
    groups, kept = options.take("n_group", None) or 1, options.take("topk_group", None) or 1
    options.only("scoring_func", "softmax")
    options.only("norm_topk_prob", False)
    options.only("mlp_bias", False)
    limited = {"groups": groups, "kept_groups": kept} if method != "greedy" else {"groups": 1, "kept_groups": 1}
    return {"model": read_latent(options), "moe": read_experts(options) | {
        "router": "deepseek_v2", "renormalize": False, "balance_weight": float(options.take("aux_loss_alpha", 0.001)),
        "options": limited}}


def write_v2(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """What `read_v2` reads."""
    groups = moe.options.groups
    return write_latent(model) | write_experts(model, moe) | {
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy", "n_group": groups if groups > 1 else None,
        "topk_group": moe.options.kept_groups if groups > 1 else None, "aux_loss_alpha": moe.balance_weight}


def read_v3_router(options: Options, *names: str) -> dict[str, Any]:
    """Sigmoid scores, which `names` may call otherwise, a bias on the choice, groups by their two largest scores."""
    options.only("scoring_func", "sigmoid", *names)
    options.only("topk_method", "noaux_tc")
    return read_experts(options) | {
        "router": "deepseek_v3", "renormalize": options.take("norm_topk_prob"), "bias_rate": 0.001,
        "options": {"groups": options.take("n_group", None) or 1, "kept_groups": options.take("topk_group", None) or 1}}


def write_v3_router(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """What `read_v3_router` reads."""
    return write_experts(model, moe) | {"n_group": moe.options.groups, "topk_group": moe.options.kept_groups}


def read_glm4(options: Options) -> dict[str, Any]:
    """V3's layers with grouped queries."""
    model = common.read_model(options, fraction=0.5) | {"qk_norm": options.take("use_qk_norm", False)}
    model["architecture"] |= {"qkv_bias": options.take("attention_bias", False)}
    return {"model": model, "moe": read_v3_router(options)}


def write_glm4(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """What `read_glm4` reads."""
    return common.write_model(model) | write_v3_router(model, moe) | {
        "use_qk_norm": model.qk_norm, "attention_bias": model.architecture.qkv_bias}


def read_dots1(options: Options) -> dict[str, Any]:
    """V3's layers with Qwen3's attention."""
    model = common.read_model(options) | {"qk_norm": True}
    first = options.take("max_window_layers", 62)
    options.only("use_sliding_window", False)
    model["architecture"] |= common.read_attention_bias(options) | common.read_windows(
        options, model["layers"], window=4096, slides=lambda i: i >= first, mixed=True)
    return {"model": model, "moe": read_v3_router(options, "noaux_tc")}


def write_dots1(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """What `read_dots1` reads."""
    return common.write_model(model) | common.write_windows(model) | write_v3_router(model, moe) | {
        "attention_bias": model.architecture.qkv_bias}


DEEPSEEK_V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", read_v2, write_v2, tensors)
DEEPSEEK_V3 = Family(
    "deepseek_v3", "DeepseekV3ForCausalLM", lambda options: {"model": read_latent(options), "moe": read_v3_router(options)},
    lambda model, moe: write_latent(model) | write_v3_router(model, moe), tensors)
GLM4_MOE = Family("glm4_moe", "Glm4MoeForCausalLM", read_glm4, write_glm4, tensors)
DOTS1 = Family("dots1", "Dots1ForCausalLM", read_dots1, write_dots1, tensors)
