"""JetMoE (2404.07413): experts that are attention heads, experts of the feed-forward layer, and a bias behind each."""

from typing import Any, Iterator

from moejax.config import ModelConfig, MoEConfig
from moejax.hf import common
from moejax.hf.family import Family, Options
from moejax.hf.tensors import Tensor

SIZES = {"vocab_size": "vocab_size", "hidden_size": "embed", "num_hidden_layers": "layers", "kv_channels": "head_dim",
         "num_key_value_heads": "kv_heads", "max_position_embeddings": "max_length"}
EXPERTS = {**common.EXPERTS, "coefficient": "aux_loss_coef"}
BLOCK_EPS = 1e-6
"""Of the norms of blocks, whatever rms_norm_eps says, which is for the last norm only."""


def tensors(model: ModelConfig, moe: MoEConfig, other: bool) -> Iterator[Tensor]:
    """See `Family.tensors`. There is one layout."""
    width = model.kv_heads * model.head_dim
    yield from common.ends(model)
    for i in range(model.layers):
        attention, mlp = f"model.layers.{i}.self_attention", f"model.layers.{i}.mlp"
        yield from common.block_norms(model, i)
        for name, part in (("w_k", (0, width)), ("w_v", (width, 2 * width))):
            yield Tensor(f"{attention}.kv_proj.weight", ("params", "attention", "heads", name), "(g h) d -> d g h", i,
                         part=part)
        for disk, path in ((f"{attention}.experts", ("params", "attention")), (mlp, ("params", "moe"))):
            yield Tensor(f"{disk}.router.layer.weight", (*path, "router_w_DE"), "e d -> d e", i)
        yield Tensor(f"{attention}.experts.input_linear.weight", ("params", "attention", "w_q"), "e (g h) d -> e d g h", i)
        yield Tensor(f"{attention}.experts.output_linear.weight", ("params", "attention", "w_o"), "e d (g h) -> e g h d", i)
        yield Tensor(f"{attention}.experts.bias", ("params", "attention", "b_o"), "d -> d", i)
        yield Tensor(f"{mlp}.input_linear.weight", ("params", "moe", "w_in"), "e (g f) d -> e d g f", i)
        yield Tensor(f"{mlp}.output_linear.weight", ("params", "moe", "w_out"), "e d f -> e f d", i)
        yield Tensor(f"{mlp}.bias", ("params", "moe", "b_mixed"), "d -> d", i)


def read(options: Options) -> dict[str, Any]:
    """See `Family.read`."""
    model = {ours: options.take(theirs) for theirs, ours in SIZES.items()}
    moe = common.read_experts(options, **EXPERTS) | {"router": "topk", "renormalize": True}
    options.only("activation_function", "silu")
    model |= {"heads": model["kv_heads"] * moe["experts_per_token"], "ffn": moe["ffn"], "norm_eps": BLOCK_EPS,
              "tie_embeddings": options.take("tie_word_embeddings", True)}
    options.only("num_attention_heads", model["heads"])
    options.only("head_dim", model["head_dim"])
    base, rope = common.read_rope(options, model["max_length"], 10_000.0)
    return {"moe": moe, "model": model | {"rope_base": base, "architecture": {
        "rope": rope, "expert_heads": True, "output_bias": True, "mixture_bias": True,
        "final_norm_eps": options.take("rms_norm_eps", 1e-6)}}}


def write(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """See `Family.write`."""
    return {theirs: getattr(model, ours) for theirs, ours in SIZES.items()} | common.write_rope(model) | (
        common.write_experts(model, moe, **EXPERTS)) | {
        "activation_function": "silu", "rms_norm_eps": model.architecture.final_norm_eps,
        "tie_word_embeddings": model.tie_embeddings}


JETMOE = Family("jetmoe", "JetMoeForCausalLM", read, write, tensors)
