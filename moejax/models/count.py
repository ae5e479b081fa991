"""Parameters and floating-point operations of a model: what is stored, and what one token uses."""

import math
from typing import Any, NamedTuple

import jax

from moejax.config import Config, ModelConfig, MoEConfig
from moejax.layers.mlp import Activation
from moejax.models.stacks import kinds
from moejax.moe.routing import get_router
from moejax.sharding import is_axes


class ParameterCount(NamedTuple):
    """Numbers of parameters: all; those that one token uses; those of the embedding and the head."""

    total: int
    active: int
    embedding: int


def count_parameters(shapes: Any, logical: Any, moe: MoEConfig) -> ParameterCount:
    """Counts the parameters of a tree. Of stacked experts, a token uses K out of E."""
    total = active = embedding = 0
    for leaf, names in zip(jax.tree.leaves(shapes), jax.tree.leaves(logical, is_leaf=is_axes), strict=True):
        size = math.prod(leaf.shape)
        total += size
        active += size * moe.experts_per_token // moe.num_experts if "experts" in names else size
        embedding += size if "vocab" in names else 0
    return ParameterCount(total, active, embedding)


def forward_flops(model: ModelConfig, moe: MoEConfig, length: int) -> float:
    """Floating-point operations of the matmuls of a forward pass, per token, in sequences of `length` tokens.

    The model's settings are resolved ones.

    A multiply-add counts 2. Attention scores and values count the causal half, (length + 1) / 2 keys a token. Router
    and experts are counted as a dropless layer computes them on average; merging experts, norms, softmax and other
    elementwise work is not.
    """
    width, heads = model.embed, model.heads * model.head_dim
    latent = model.architecture.latent
    if latent.rank:
        up = latent.rank * (heads - model.heads * latent.rotary_dim + model.heads * latent.value_dim)
        query = latent.query_rank * (width + heads) if latent.query_rank else width * heads
        values = model.heads * latent.value_dim
        attention = 2 * (query + width * (latent.rank + latent.rotary_dim + values) + up) + (heads + values) * (length + 1)
    else:
        attention = 2 * width * (2 * heads + 2 * model.kv_heads * model.head_dim) + 2 * heads * (length + 1)
    per_unit = 2 * (Activation(model.architecture.activation).inputs + 1)  # of a hidden unit and a unit of the width
    dense = per_unit * width * model.ffn
    router = get_router(moe.router)
    scores = 2 * sum(math.prod(p.shape) for p in router.parameters(moe, width).values() if len(p.shape) > 1)
    passes = router.passes(moe, length)
    if router.level == "block":
        sparse = scores + passes * (attention + dense) - attention
    else:
        hidden, inner = moe.ffn or model.ffn, width // moe.latent_divisor
        projections = 4 * width * inner if moe.latent_divisor > 1 else 0
        shared = (moe.shared_ffn or moe.shared_experts * hidden) if moe.shared_experts else 0
        sparse = scores + projections + per_unit * (hidden * inner * passes + width * shared)
    blocks = sum(attention + (sparse if kind.sparse else dense) for kind in kinds(model, moe))
    return blocks + 2 * width * model.vocab_size


def training_flops(config: Config) -> float:
    """Operations per token of a training step: the backward pass costs twice the forward; recomputation is not counted."""
    return 3 * forward_flops(config.model, config.moe, config.data.length)
