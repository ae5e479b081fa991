"""Parameters and floating-point operations of a model: what is stored, and what one token uses."""

import math
from typing import Any, NamedTuple

import jax

from moejax.config import Config, ModelConfig, MoEConfig
from moejax.layers.mlp import Activation
from moejax.models.stacks import ENCODER, Trunk, trunk_kinds, trunks
from moejax.moe.routing import get_router
from moejax.sharding import is_axes


class ParameterCount(NamedTuple):
    """Numbers of parameters: all; those that one token uses; those of the embedding and the head."""

    total: int
    active: int
    embedding: int


def count_parameters(shapes: Any, logical: Any, moe: MoEConfig) -> ParameterCount:
    """Counts the parameters of a tree. Of stacked experts, a token uses K of all that there are."""
    total = active = embedding = 0
    for leaf, names in zip(jax.tree.leaves(shapes), jax.tree.leaves(logical, is_leaf=is_axes), strict=True):
        size = math.prod(leaf.shape)
        total += size
        experts = leaf.shape[names.index("experts")] if "experts" in names else moe.experts_per_token
        active += size * min(moe.experts_per_token, experts) // experts
        embedding += size if "vocab" in names else 0
    return ParameterCount(total, active, embedding)


def forward_flops(model: ModelConfig, moe: MoEConfig, length: int, source_length: int = 0) -> float:
    """Floating-point operations of the matmuls of a forward pass, per token that is read, an encoder's included.

    The model's settings are resolved ones. Sequences have `length` tokens, those of an encoder before a decoder
    `source_length`.

    A multiply-add counts 2. Causal attention counts half of the scores and values, (length + 1) / 2 keys a token. Router
    and experts are counted as a dropless layer computes them on average; merging experts, norms, softmax and other
    elementwise work is not, nor is a head for classes.
    """
    sizes = {"": length, ENCODER: source_length}
    total = sum(sizes[trunk.prefix] * trunk_flops(model, moe, trunk, length, source_length) for trunk in trunks(model))
    if model.head == "tokens":
        total += length * 2 * model.embed * model.vocab_size
    return total / sum(sizes[trunk.prefix] for trunk in trunks(model))


def trunk_flops(model: ModelConfig, moe: MoEConfig, trunk: Trunk, length: int, source_length: int) -> float:
    """As `forward_flops`, per token of a trunk and without a head."""
    own = source_length if trunk.prefix == ENCODER else length
    width, heads, latent = model.embed, model.heads * model.head_dim, model.architecture.latent
    seen = (own + 1) / 2 if trunk.causal else own
    if latent.rank:
        up = latent.rank * (heads - model.heads * latent.rotary_dim + model.heads * latent.value_dim)
        query = latent.query_rank * (width + heads) if latent.query_rank else width * heads
        values = model.heads * latent.value_dim
        attention = 2 * (query + width * (latent.rank + latent.rotary_dim + values) + up) + 2 * (heads + values) * seen
    else:
        attention = 4 * width * (heads + model.kv_heads * model.head_dim) + 4 * heads * seen
    cross = 0.0
    if trunk.cross:
        keys = 4 * width * model.kv_heads * model.head_dim * source_length / own
        cross = 4 * width * heads + keys + 4 * heads * source_length
    per_unit = 2 * (Activation(model.architecture.activation).inputs + 1)  # of a hidden unit and a unit of the width
    dense = per_unit * width * model.ffn
    router = get_router(moe.router)
    scores = 2 * sum(math.prod(p.shape) for p in router.parameters(moe, width).values() if len(p.shape) > 1)
    passes = router.passes(moe, own)
    if router.level == "block":
        sparse = scores + passes * (attention + cross + dense) - attention - cross
    else:
        hidden, inner = moe.ffn or model.ffn, width // moe.latent_divisor
        projections = 4 * width * inner if moe.latent_divisor > 1 else 0
        shared = (moe.shared_ffn or moe.shared_experts * hidden) if moe.shared_experts else 0
        # Experts that are heads multiply as much as plain heads do, and have a router.
        beside = (dense if model.architecture.shortcut else 0) + (scores if model.architecture.expert_heads else 0)
        sparse = scores + projections + per_unit * (hidden * inner * passes + width * shared) + beside
    return sum(attention + cross + (sparse if kind.sparse else dense) for kind in trunk_kinds(model, moe, trunk))


def training_flops(config: Config) -> float:
    """Operations per token of a training step: the backward pass costs twice the forward; recomputation is not counted."""
    return 3 * forward_flops(config.model, config.moe, *row_lengths(config))


def row_lengths(config: Config) -> tuple[int, int]:
    """Tokens that a row has for the last trunk, and for an encoder before it."""
    both = config.model.kind == "encoder_decoder"
    return config.data.length, config.data.encoder_length if both else 0
