"""T5 v1.0 and v1.1 (Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020, 2002.05202), and Switch (2101.03961)."""

from typing import Any, Iterator

from moejax.architecture import GATED
from moejax.config import ModelConfig, MoEConfig
from moejax.hf.family import REQUIRED, Family, Options
from moejax.hf.tensors import Tensor
from moejax.models.stacks import Trunk, kinds, trunk_kinds, trunks

SIZES = {"vocab_size": "vocab_size", "d_model": "embed", "d_kv": "head_dim", "d_ff": "ffn", "num_heads": "heads",
         "num_layers": "encoder_layers", "layer_norm_epsilon": "norm_eps",
         "relative_attention_num_buckets": "relative_buckets", "relative_attention_max_distance": "relative_distance"}
DEFAULTS = {"layer_norm_epsilon": 1e-6, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
"""Of options that the first released files leave out."""
IN_ARCHITECTURE = ("relative_buckets", "relative_distance")
ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu_tanh", "gated-silu": "swiglu", "gelu": "gelu", "silu": "silu"}
MAX_LENGTH = 512
"""Relative positions know no end; this is the length of T5's own training."""


def read_model(options: Options) -> dict[str, Any]:
    """Sizes and design that both families share."""
    model = {ours: options.take(theirs, DEFAULTS.get(theirs, REQUIRED)) for theirs, ours in SIZES.items()}
    design = {name: model.pop(name) for name in IN_ARCHITECTURE} | {
        "positions": "relative", "attention_scale": 1.0,
        "start_token": options.take("decoder_start_token_id", None) or 0}
    options.only("is_encoder_decoder", True)
    options.only("is_decoder", False)
    options.only("add_cross_attention", False)
    return model | {
        "kind": "encoder_decoder", "kv_heads": model["heads"], "architecture": design,
        "layers": options.take("num_decoder_layers", None) or model["encoder_layers"],
        "max_length": options.take("n_positions", MAX_LENGTH),
        "tie_embeddings": options.take("tie_word_embeddings", True)}


def read_t5(options: Options) -> dict[str, Any]:
    """See `Family.read`."""
    model = read_model(options)
    options.only("feed_forward_proj", *ACTIVATIONS, default="relu")
    options.taken |= {"dense_act_fn", "is_gated_act"}  # the same in other words
    # Some files say that v1.1 is tied, which it never is; but only v1.0 scales what its head reads.
    scaled = options.take("scale_decoder_outputs", model["tie_embeddings"])
    model["tie_embeddings"] &= scaled
    model["architecture"] |= {"activation": ACTIVATIONS[options.take("feed_forward_proj", "relu")]} | (
        {"logit_multiplier": model["embed"]**-0.5} if scaled else {})
    return {"model": model}


def read_switch(options: Options) -> dict[str, Any]:
    """See `Family.read`."""
    model = read_model(options)
    options.only("dense_act_fn", "relu", "gelu", "silu", default="relu")
    for name in ("router_bias", "router_ignore_padding_tokens", "batch_prioritized_routing", "is_gated_act"):
        options.only(name, False)
    options.only("num_selected_experts", 1)
    options.only("router_type", "tokens_masked")
    options.only("feed_forward_proj", options.values.get("dense_act_fn", "relu"))
    options.only("router_dtype", "float32")
    model["architecture"] |= {"activation": ACTIVATIONS[options.take("dense_act_fn", "relu")]} | (
        {"logit_multiplier": model["embed"]**-0.5} if model["tie_embeddings"] else {})

    def sparse(side: str, layers: int) -> tuple[int, ...]:
        step = options.take(f"{side}_sparse_step", None)
        count = options.take(f"num_sparse_{side}_layers")
        step = step if step is not None else layers // count if count else layers
        return tuple(i for i in range(layers) if step and (i % step == 1 or step == 1))

    model["architecture"]["encoder_sparse_blocks"] = sparse("encoder", model["encoder_layers"])
    options.take("add_router_probs", None)  # only what is returned
    sizes = {"balance_weight": options.take("router_aux_loss_coef", 0.001),
             "z_weight": options.take("router_z_loss_coef", 0.001),
             "jitter": float(options.take("router_jitter_noise", 0.01))}
    return {"model": model, "moe": sizes | {
        "every": 1, "router": "switch", "num_experts": options.take("num_experts"), "experts_per_token": 1,
        "sparse_blocks": sparse("decoder", model["layers"]),
        "capacity_places": options.take("expert_capacity", None) or 64}}


def write_model(model: ModelConfig) -> dict[str, Any]:
    """What `read_model` reads."""
    design = model.architecture
    written = {theirs: getattr(design if ours in IN_ARCHITECTURE else model, ours) for theirs, ours in SIZES.items()}
    encoder, decoder = trunks(model)
    return written | {"num_layers": encoder.layers, "num_decoder_layers": decoder.layers,
                      "n_positions": model.max_length, "decoder_start_token_id": design.start_token,
                      "is_encoder_decoder": True}


def write_t5(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """See `Family.write`."""
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return write_model(model) | {"feed_forward_proj": theirs[model.architecture.activation],
                                 "tie_word_embeddings": model.tie_embeddings}


def write_switch(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """See `Family.write`."""
    def spread(side: str, trunk: Trunk) -> dict[str, int]:
        """Blocks 1, 1 + step, ...; of step 1 all. There is no way to say that none is sparse."""
        blocks = [i for i, kind in enumerate(trunk_kinds(model, moe, trunk)) if kind.sparse]
        step = blocks[1] - blocks[0] if len(blocks) > 1 else trunk.layers
        return {f"num_sparse_{side}_layers": trunk.layers // step, f"{side}_sparse_step": step}

    if moe.capacity_places is None:
        raise ValueError("Switch always has a capacity")
    encoder, decoder = trunks(model)
    return write_model(model) | {
        "dense_act_fn": model.architecture.activation, "tie_word_embeddings": model.tie_embeddings,
        "num_experts": moe.num_experts, "expert_capacity": moe.capacity_places, "router_jitter_noise": moe.jitter,
        "router_aux_loss_coef": moe.balance_weight, "router_z_loss_coef": moe.z_weight,
        **spread("encoder", encoder), **spread("decoder", decoder)}


def attention(disk: str, path: str, layer: int) -> Iterator[Tensor]:
    """The four matrices of attention."""
    for name in "qkv":
        yield Tensor(f"{disk}.{name}.weight", ("params", path, f"w_{name}"), "(q h) d -> d q h", layer)
    yield Tensor(f"{disk}.o.weight", ("params", path, "w_o"), "d (q h) -> q h d", layer)


def dense(model: ModelConfig, disk: str, path: str, layer: int, expert: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """A feed-forward layer, or an expert."""
    inputs = ("wi_0", "wi_1") if model.architecture.activation in GATED else ("wi",)
    for g, name in enumerate(inputs):
        yield Tensor(f"{disk}.{name}.weight", ("params", path, "w_in"), "f d -> d f", layer, at=(*expert, None, g))
    yield Tensor(f"{disk}.wo.weight", ("params", path, "w_out"), "d f -> f d", layer, at=expert)


def tensors(model: ModelConfig, moe: MoEConfig, other: bool) -> Iterator[Tensor]:
    """Both families. Blocks of dense T5 name their layer DenseReluDense, whatever it computes; those of Switch mlp."""
    blocks, switch = kinds(model, moe), moe.every > 0
    yield Tensor("shared.weight", ("params", "embedding", "table"), "v d -> v d")
    if not model.tie_embeddings:
        yield Tensor("lm_head.weight", ("params", "embedding", "head"), "v d -> d v")
    layer = 0
    for trunk in trunks(model):
        side = "decoder" if trunk.cross else "encoder"
        yield Tensor(f"{side}.final_layer_norm.weight", ("params", f"{trunk.prefix}final_norm", "scale"), "d -> d")
        yield Tensor(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                     ("params", f"{trunk.prefix}relative_bias", "table"), "n q -> n q")
        for i in range(trunk.layers):
            disk, last = f"{side}.block.{i}.layer", 2 if trunk.cross else 1
            norms = ["attention_norm", *(["cross_norm"] if trunk.cross else []), "feed_forward_norm"]
            for n, name in enumerate(norms):
                yield Tensor(f"{disk}.{n}.layer_norm.weight", ("params", name, "scale"), "d -> d", layer)
            yield from attention(f"{disk}.0.SelfAttention", "attention", layer)
            if trunk.cross:
                yield from attention(f"{disk}.1.EncDecAttention", "cross_attention", layer)
            if not blocks[layer].sparse:
                yield from dense(model, f"{disk}.{last}.{'mlp' if switch else 'DenseReluDense'}", "feed_forward", layer)
            else:
                yield Tensor(f"{disk}.{last}.mlp.router.classifier.weight", ("params", "moe", "router_w_DE"), "e d -> d e",
                             layer)
                for e in range(moe.num_experts):
                    yield from dense(model, f"{disk}.{last}.mlp.experts.expert_{e}", "moe", layer, (e,))
            layer += 1


UNUSED = ("coder.embed_tokens.weight", "EncDecAttention.relative_attention_bias.weight")
T5 = Family("t5", "T5ForConditionalGeneration", read_t5, write_t5, tensors, UNUSED, ("lm_head.weight", "shared.weight"))
SWITCH = Family("switch_transformers", "SwitchTransformersForConditionalGeneration", read_switch, write_switch, tensors,
                UNUSED, ("lm_head.weight", "shared.weight"))
