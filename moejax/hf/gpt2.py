"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, one matrix for queries, keys and values."""

from typing import Any, Iterator

from moejax.config import ModelConfig, MoEConfig
from moejax.hf import common
from moejax.hf.family import Family, Options
from moejax.hf.tensors import Tensor

SIZES = {"vocab_size": "vocab_size", "n_embd": "embed", "n_layer": "layers", "n_head": "heads", "n_positions": "max_length"}
DESIGN = {"norm": "layer", "positions": "learned", "activation": "gelu_tanh", "qkv_bias": True, "output_bias": True,
          "ffn_bias": True}


def read(options: Options) -> dict[str, Any]:
    """See `Family.read`."""
    model = {ours: options.take(theirs) for theirs, ours in SIZES.items()}
    model |= {"kv_heads": model["heads"], "head_dim": model["embed"] // model["heads"], "architecture": dict(DESIGN),
              "ffn": options.take("n_inner", None) or 4 * model["embed"],
              "norm_eps": options.take("layer_norm_epsilon", 1e-5),
              "tie_embeddings": options.take("tie_word_embeddings", True)}
    options.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    options.only("scale_attn_weights", True)
    options.only("scale_attn_by_inverse_layer_idx", False)
    options.only("reorder_and_upcast_attn", False)
    options.only("add_cross_attention", False)
    options.take("n_ctx", None)  # n_positions again
    return {"model": model}


def write(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """See `Family.write`."""
    return {theirs: getattr(model, ours) for theirs, ours in SIZES.items()} | {
        "n_inner": model.ffn, "layer_norm_epsilon": model.norm_eps, "activation_function": "gelu_new",
        "tie_word_embeddings": model.tie_embeddings}


def tensors(model: ModelConfig, moe: MoEConfig, other: bool) -> Iterator[Tensor]:
    """Matrices lie as [in, out]. The first released files have no `transformer.` before their names."""
    top, width = "" if other else "transformer.", model.heads * model.head_dim
    yield Tensor(f"{top}wpe.weight", ("params", "embedding", "positions"), "l d -> l d")
    yield from common.ends(model, embedding=f"{top}wte.weight", norm=f"{top}ln_f")
    for i in range(model.layers):
        disk = f"{top}h.{i}"
        yield from common.norms(model, f"{disk}.ln_1", ("params", "attention_norm"), i)
        yield from common.norms(model, f"{disk}.ln_2", ("params", "feed_forward_norm"), i)
        for n, name in enumerate("qkv"):
            part = (n * width, (n + 1) * width)
            yield Tensor(f"{disk}.attn.c_attn.weight", ("params", "attention", f"w_{name}"), "d (q h) -> d q h", i, axis=1,
                         part=part)
            yield Tensor(f"{disk}.attn.c_attn.bias", ("params", "attention", f"b_{name}"), "(q h) -> q h", i, part=part)
        yield Tensor(f"{disk}.attn.c_proj.weight", ("params", "attention", "w_o"), "(q h) d -> q h d", i)
        yield Tensor(f"{disk}.attn.c_proj.bias", ("params", "attention", "b_o"), "d -> d", i)
        yield Tensor(f"{disk}.mlp.c_fc.weight", ("params", "feed_forward", "w_in"), "d f -> d f", i, at=(None, 0))
        yield Tensor(f"{disk}.mlp.c_fc.bias", ("params", "feed_forward", "b_in"), "f -> f", i, at=(0,))
        yield Tensor(f"{disk}.mlp.c_proj.weight", ("params", "feed_forward", "w_out"), "f d -> f d", i)
        yield Tensor(f"{disk}.mlp.c_proj.bias", ("params", "feed_forward", "b_out"), "d -> d", i)


GPT2 = Family("gpt2", "GPT2LMHeadModel", read, write, tensors, unused=(".attn.bias", ".attn.masked_bias"),
              tied=("lm_head.weight", "transformer.wte.weight"))
