"""A block that works on some of the tokens and lets the others pass (Mixture-of-Depths)."""

from typing import Any, Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig
from moejax.layers.attention import Cache, Sight
from moejax.models.stream import Stream
from moejax.moe import routing
from moejax.moe.layer import router_parameters
from moejax.moe.types import ExpertLoad, LayerRecord, RoutingContext


class DepthRouted(nn.Module):
    """A router around a block.

    Attributes:
      moe: settings; its router is one of level `block`.
      block: makes the block, given a name.
    """

    moe: MoEConfig
    block: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, stream: Stream, states: Mapping[str, Any], wholes: Mapping[str, Any], cache: Cache | None,
                 sight: Sight, at: Array | None, context: RoutingContext) -> tuple[Stream, dict[str, LayerRecord], Any]:
        """Like a block: returns the stream, its record and the new cache."""
        x_BLD = stream.x_BLD
        batch, length, width = x_BLD.shape
        routed = routing.get_router(self.moe.router).route(
            self.moe, router_parameters(self, self.moe, width), states[""], x_BLD.reshape(-1, width), context)
        on_BL, weight_BL = (a.reshape(batch, length) for a in (routed.assignments.on_T, routed.assignments.weight_T))
        # The tokens that are on, in their order, and behind them others to fill the capacity.
        place_BC = jnp.argsort(~on_BL, axis=1, stable=True)[:, :routed.assignments.capacity]

        def take(a_BL: Array) -> Array:
            return jax.vmap(lambda a, place: a[place])(a_BL, place_BC)

        if cache is None:
            def seen(visible_BLS: Array) -> Array:
                return jax.vmap(lambda a, place: a[place][:, place])(visible_BLS, place_BC) & take(on_BL)[:, None]
        else:
            cache = cache.replace(on_BS=jax.lax.dynamic_update_slice_in_dim(cache.on_BS, on_BL, at, axis=1))
            place_BC = jnp.broadcast_to(jnp.arange(length), (batch, length))  # slots keep their order in the cache
            on_BS = cache.on_BS

            def seen(visible_BLS: Array) -> Array:
                return visible_BLS & on_BS[:, None]
        bias_BQLS, encoded = sight.bias_BQLS, sight.encoded
        if bias_BQLS is not None:
            bias_BQLS = jnp.broadcast_to(bias_BQLS, (batch, *bias_BQLS.shape[1:]))
            columns = (lambda b_QCS, place: b_QCS[:, :, place]) if cache is None else (lambda b_QCS, place: b_QCS)
            bias_BQLS = jax.vmap(lambda b_QLS, place: columns(b_QLS[:, place], place))(bias_BQLS, place_BC)
        there = jax.tree.map(take, sight.replace(visible={}, bias_BQLS=None, encoded=None)).replace(
            visible=jax.tree.map(seen, sight.visible), bias_BQLS=bias_BQLS,
            encoded=None if encoded is None else encoded.replace(visible_BLS=take(encoded.visible_BLS)))
        x_BCD = take(x_BLD)
        changed, _, cache = self.block(name="block")(stream.replace(x_BLD=x_BCD), {}, {}, cache, there, at, context)
        change_BCD = (take(weight_BL) * take(on_BL))[..., None].astype(x_BLD.dtype) * (changed.x_BLD - x_BCD)
        y_BLD = jax.vmap(lambda x, place, change: x.at[place].add(change))(x_BLD, place_BC, change_BCD)
        count_E = jnp.sum(on_BL, dtype=jnp.int32)[None]
        load = ExpertLoad(count_E, 0 * count_E, count_E, 0 * count_E, jnp.sum(context.mask_T, dtype=jnp.int32),
                          routed.entropy)
        record = LayerRecord(routed.losses, load, jax.lax.stop_gradient(routed.statistics))
        return changed.replace(x_BLD=y_BLD), {"": record}, cache
