"""Where a model departs from the plain block: what open models differ in, as typed options of the one Transformer.

`config.model.architecture` holds them by name. `python -m moejax.architecture` prints all with default and meaning.
"""

import dataclasses

from moejax.config import key, table

ATTENTION_KINDS = ("full", "sliding", "chunked", "unrotated")
GATED = ("swiglu", "geglu", "geglu_tanh", "clamped_swiglu")
ACTIVATIONS = (*GATED, "gelu", "gelu_tanh", "relu", "silu")


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary embedding beyond its base."""

    fraction: float = key(1.0, "share of a head that is rotated", low=0, high=1)
    scaling: str = key("none", "how frequencies are stretched to longer contexts",
                       choices=("none", "linear", "llama3", "yarn"))
    factor: float = key(1.0, "how much longer", low=1)
    original_length: int = key(0, "llama3, yarn: context of the training before", low=0)
    low_factor: float = key(1.0, "llama3: fewer turns than this within original_length are stretched in full", low=0)
    high_factor: float = key(4.0, "llama3: more turns than this stay", low=0)
    beta_fast: float = key(32.0, "yarn: more turns than this stay", low=0)
    beta_slow: float = key(1.0, "yarn: fewer turns than this are stretched in full", low=0)
    mscale: float | None = key(None, "yarn: numerator of the factor on cosine and sine (DeepSeek)", low=0)
    mscale_all_dim: float | None = key(None, "yarn: its denominator, which scales the scores instead (DeepSeek)", low=0)
    attention_factor: float | None = key(None, "yarn: that factor itself; None computes it", low=0)
    truncate: bool = key(True, "yarn: round the bounds between the frequencies to whole dimensions")


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2 2405.04434). `config.model.head_dim` is the width of a query and a key."""

    rank: int = key(0, "width of the latent of keys and values; 0 has none", low=0)
    query_rank: int = key(0, "width of the latent of queries; 0 has none", low=0)
    rotary_dim: int = key(0, "last dimensions of a head that are rotated, in keys one vector for all heads", low=0)
    value_dim: int = key(0, "width of a value", low=0)
    scaled: bool = key(False, "multiply each latent by the root of model width over its own, which keeps the variance of "
                       "what is made of it (LongCat-Flash 2509.01322)")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """All options."""

    family: str = key("", "name in moejax.hf.FAMILIES that says how the model is written for other libraries")
    norm: str = key("rms", "RMSNorm, LayerNorm, or LayerNorm without bias", choices=("rms", "layer", "layer_without_bias"))
    norm_place: str = key("input", "where attention and feed-forward have their norms: on their inputs, on their outputs "
                          "(OLMo 2), or on the sum with the stream (BERT)", choices=("input", "output", "sum"))
    embedding_norm: bool = key(False, "a norm on the embedding (BERT)")
    final_norm: bool = key(True, "a norm behind the last block")
    final_norm_eps: float | None = key(None, "its own eps; None takes config.model.norm_eps (JetMoE)", low=0)
    token_types: int = key(0, "kinds of token that have a vector each, such as first and second sentence (BERT)", low=0)
    positions: str = key("rotary", "what tells positions; relative: a learned score a head for each distance (T5)",
                         choices=("rotary", "learned", "relative", "none"))
    relative_buckets: int = key(32, "relative: classes of distance", low=2)
    relative_distance: int = key(128, "relative: distances from here on are one class", low=2)
    rope: Rope = dataclasses.field(default_factory=Rope)
    attention: tuple[str, ...] = key(("full",), "kinds of attention, repeated over the blocks", choices=ATTENTION_KINDS)
    window: int = key(0, "tokens that sliding attention sees, itself included; size of the parts of chunked attention",
                      low=0)
    latent: Latent = dataclasses.field(default_factory=Latent)
    expert_heads: bool = key(False, "attention of sparse blocks has experts, too: a second router takes a token to K that "
                             "make its queries and read its heads, kv_heads each; keys and values are for all, and "
                             "config.moe is for both layers (mixture of attention heads 2210.05144, JetMoE 2404.07413)")
    attention_scale: float | None = key(None, "factor on scores; None is 1/sqrt(head_dim)", low=0)
    qkv_bias: bool = key(False, "biases of the query, key and value projections (of the down projections of latents)")
    output_bias: bool = key(False, "bias of attention's output projection")
    clip_qkv: float | None = key(None, "bound on the size of queries, keys and values", low=0)
    qk_norm: str = key("head", "what config.model.qk_norm norms: each head, all heads of a token together, each head after "
                       "the rotation, or that without a scale and not in unrotated blocks",
                       choices=("head", "projection", "rotated_head", "rotated_unit"))
    sinks: bool = key(False, "a learned score a head that takes part in the softmax and has no value (GPT-OSS)")
    temperature_floor: int = key(0, "unrotated blocks: queries grow with the logarithm of position over this (Llama 4)",
                                 low=0)
    temperature_scale: float = key(0.1, "factor on that logarithm", low=0)
    activation: str = key("swiglu", "non-linearity of feed-forward layers and experts", choices=ACTIVATIONS)
    clamp: float = key(7.0, "clamped_swiglu: bound on its inputs", low=0)
    shortcut: bool = key(False, "sparse blocks keep their dense feed-forward layer beside the experts, whose output joins "
                         "the stream only at the end of the next block, or behind the last (ScMoE 2404.05019)")
    ffn_bias: bool = key(False, "biases of dense feed-forward layers and shared experts")
    expert_bias: bool = key(False, "biases of experts")
    mixture_bias: bool = key(False, "a bias on what the experts of a token give together (JetMoE)")
    expert_bits: int = key(0, "bits in which experts' matrices are stored, for inference; 0 are numbers that are trained",
                           choices=(0, 4, 8))
    merged_experts: int | None = key(None, "experts that there are, if those that the router knows have been merged", low=1)
    embedding_multiplier: float = key(1.0, "factor on the embedding (Granite)")
    residual_multiplier: float = key(1.0, "factor on what a layer adds to the stream (Granite)")
    logit_multiplier: float = key(1.0, "factor on the logits")
    head_bias: bool = key(False, "a bias of the output head (PhiMoE)")
    pool: str | None = key(None, "heads `classes` and `none`: what stands for a row, its first or last token or their "
                           "mean; None is the first of an encoder, the last of a decoder",
                           choices=("first", "last", "mean"))
    start_token: int = key(0, "encoder_decoder: the token with which the decoder begins", low=0)
    encoder_sparse_blocks: tuple[int, ...] | None = key(None, "encoder_decoder: numbers of the encoder's sparse blocks, "
                                                        "from 0; None goes by the keys of config.moe", low=0)
    head_layer: bool = key(False, "a dense layer with activation and norm before the output head (BERT)")
    router_tasks: int = key(0, "tasks of a mixture, of each of which routers see a learned vector beside their input",
                            low=0)
    pooler: bool = key(False, "heads `classes` and `none`: a dense layer with tanh on what stands for a row (BERT)")


PLAIN = Architecture()


if __name__ == "__main__":
    print(table(Architecture, "config.model.architecture."))
