"""A block of the Transformer, and a run of blocks as it is scanned."""

from functools import partial
from typing import Any, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import ModelConfig, MoEConfig
from moejax.layers.attention import Attention, Cache, Sight
from moejax.layers.cross import CrossAttention
from moejax.layers.latent import LatentAttention
from moejax.layers.mlp import FeedForward, dropout
from moejax.layers.norm import make_norm
from moejax.models.depths import DepthRouted
from moejax.models.heads import ExpertAttention
from moejax.models.stacks import HEADS, Kind
from moejax.models.stream import Stream
from moejax.moe import routing
from moejax.moe.layer import MixtureOfExperts
from moejax.moe.types import LayerRecord, RoutingContext

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass may keep from a block, by the names of config.train.remat."""


class Block(nn.Module):
    """Attention, in a decoder with an encoder cross-attention, and a feed-forward layer, each added to the residual stream.

    Attributes:
      model, moe: settings.
      kind: of attention, and whether the feed-forward layer is a mixture of experts.
      dtype: compute type.
    """

    model: ModelConfig
    moe: MoEConfig
    kind: Kind
    dtype: Any

    @nn.compact
    def __call__(self, stream: Stream, states: Mapping[str, Any], wholes: Mapping[str, Any], cache: Cache | None,
                 sight: Sight, at: Array | None, context: RoutingContext) -> tuple[Stream, dict[str, LayerRecord], Any]:
        """Returns the stream, the records of routers and the new cache. Routers go by "" and `HEADS`."""
        model, moe, design, x_BLD = self.model, self.moe, self.model.architecture, stream.x_BLD
        out_scale = (2 * model.layers)**-0.5  # keeps the residual stream's variance independent of depth
        drop_key = self.make_rng("dropout") if context.train and model.dropout > 0 else None
        attention_key, feed_forward_key = (None, None) if drop_key is None else jax.random.split(drop_key)
        cross_key, late_key = (None if drop_key is None else jax.random.fold_in(drop_key, n) for n in (2, 3))
        attention_norm, feed_forward_norm = (
            make_norm(design.norm, model.norm_eps, name) for name in ("attention_norm", "feed_forward_norm"))

        def enter(norm: nn.Module, x_BLD: Array) -> Array:
            return norm(x_BLD) if design.norm_place == "input" else x_BLD

        def weighted(y_BLD: Array, key: Array | None) -> Array:
            y_BLD = dropout(y_BLD, model.dropout, key)
            return y_BLD if design.residual_multiplier == 1 else y_BLD * design.residual_multiplier

        def leave(norm: nn.Module, x_BLD: Array, y_BLD: Array, key: Array | None) -> Array:
            x_BLD = x_BLD + weighted(norm(y_BLD) if design.norm_place == "output" else y_BLD, key)
            return norm(x_BLD) if design.norm_place == "sum" else x_BLD

        records, h_BLD = {}, enter(attention_norm, x_BLD)
        if self.kind.sparse and design.expert_heads:
            attention = ExpertAttention(model, moe, self.kind.attention, out_scale, self.dtype, name="attention")
            y_BLD, cache, records[HEADS] = attention(h_BLD, sight, cache, at, states[HEADS],
                                                     context.replace(whole=wholes[HEADS]))
        else:
            attention = (LatentAttention if design.latent.rank else Attention)(
                model, self.kind.attention, out_scale, self.dtype, name="attention")
            y_BLD, cache = attention(h_BLD, sight, cache, at)
        x_BLD = leave(attention_norm, x_BLD, y_BLD, attention_key)

        if self.kind.cross:
            cross_norm = make_norm(design.norm, model.norm_eps, "cross_norm")
            cross = CrossAttention(model, out_scale, self.dtype, name="cross_attention")
            y_BLD, cache = cross(enter(cross_norm, x_BLD), sight.encoded, cache)
            x_BLD = leave(cross_norm, x_BLD, y_BLD, cross_key)

        h_BLD, routed_BLD = enter(feed_forward_norm, x_BLD), None
        if self.kind.sparse:
            hidden = moe.ffn or model.ffn
            routed_BLD, records[""], carry_TC = MixtureOfExperts(moe, hidden, out_scale, self.dtype, design, name="moe")(
                h_BLD, states[""], context.replace(whole=wholes[""], carry_TC=stream.carry_TC))
            stream = stream.replace(carry_TC=carry_TC)
            if moe.shared_experts:
                width = moe.shared_ffn or moe.shared_experts * hidden
                shared_BLD = FeedForward(width, out_scale, self.dtype, design, name="shared")(h_BLD)
                routed_BLD = with_shared(moe.shared_gate, routed_BLD, shared_BLD, self.shared_logits(h_BLD))
        y_BLD = routed_BLD
        if not self.kind.sparse or design.shortcut:
            y_BLD = FeedForward(model.ffn, out_scale, self.dtype, design, name="feed_forward")(h_BLD)
        x_BLD = leave(feed_forward_norm, x_BLD, y_BLD, feed_forward_key)
        if design.shortcut:
            x_BLD += stream.late_BLD
            late_BLD = weighted(routed_BLD, late_key) if self.kind.sparse else jnp.zeros_like(x_BLD)
            stream = stream.replace(late_BLD=late_BLD)
        return stream.replace(x_BLD=x_BLD), records, cache

    def shared_logits(self, h_BLD: Array) -> Array | None:
        """Scores of the shared experts (sigmoid), or of them and the routed ones (softmax), for each token, float32."""
        count = {"none": 0, "sigmoid": 1, "softmax": 2}[self.moe.shared_gate]
        if count == 0:
            return None
        w_DC = self.param("shared_gate", nn.with_logical_partitioning(
            nn.initializers.normal(self.model.embed**-0.5), ("embed", "router")), (self.model.embed, count))
        return h_BLD.astype(jnp.float32) @ w_DC


def passes_blocks(moe: MoEConfig) -> bool:
    """Whether the router lets tokens pass whole blocks, the sparse ones, rather than sends them to experts in these."""
    return routing.get_router(moe.router).level == "block"


FINITE = "finite"
"""The collection in which it is found whether all numbers that a block gave are finite, if it is asked for as mutable."""


class Run(nn.Module):
    """One repeat of a stack: its blocks in order, with the state, loads and caches of this repeat."""

    model: ModelConfig
    moe: MoEConfig
    kinds: tuple[Kind, ...]
    dtype: Any
    remat: str

    @nn.compact
    def __call__(self, stream: Stream, per_layer: tuple[dict, dict, dict], *shared: Any
                 ) -> tuple[Stream, tuple[dict, dict]]:
        """Takes and returns the stream; and returns, by block name, records and caches."""
        states, wholes, caches = per_layer
        records, new_caches = {}, {}
        for j, kind in enumerate(self.kinds):
            name = f"block_{j}"
            block, settings = Block, (self.model, self.moe, kind, self.dtype)
            if kind.sparse and passes_blocks(self.moe):
                block, settings = DepthRouted, (self.moe, partial(Block, self.model, self.moe, kind._replace(sparse=False),
                                                                  self.dtype))
            if self.remat != "none":
                block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
            own = ({kind: given.get(f"{name}{kind}", default) for kind in ("", HEADS)}
                   for given, default in ((states, {}), (wholes, None)))
            stream, told, cache = block(*settings, name=name)(stream, *own, caches.get(name), *shared)
            if self.is_mutable_collection(FINITE) and not self.is_initializing():
                given = [stream.x_BLD] + ([] if stream.late_BLD is None else [stream.late_BLD])
                self.sow(FINITE, f"after_{name}", jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in given])))
            records |= {f"{name}{kind}": record for kind, record in told.items()}
            if cache is not None:
                new_caches[name] = cache
        return stream, (records, new_caches)


def with_shared(gate: str, routed_BLD: Array, shared_BLD: Array, logits_BLC: Array | None) -> Array:
    """Adds the shared experts' output to the routed ones': as it is, or weighted; see `config.moe.shared_gate`."""
    if gate == "none":
        return routed_BLD + shared_BLD
    if gate == "sigmoid":
        return routed_BLD + jax.nn.sigmoid(logits_BLC).astype(shared_BLD.dtype) * shared_BLD
    share_BL2 = jax.nn.softmax(logits_BLC).astype(shared_BLD.dtype)
    return share_BL2[..., :1] * routed_BLD + share_BL2[..., 1:] * shared_BLD
