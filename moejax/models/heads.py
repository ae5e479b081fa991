"""Attention whose heads are experts; see `moejax.moe.heads`."""

from typing import Any, Mapping

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from moejax import sharding
from moejax.config import ModelConfig, MoEConfig
from moejax.layers.attention import Attention, Cache, Sight
from moejax.moe import heads, routing
from moejax.moe.layer import DECISIONS, router_parameters
from moejax.moe.types import LayerRecord, RoutingContext


class ExpertAttention(nn.Module):
    """A router and experts around `Attention`, which has keys, values and all that happens to heads.

    Attributes:
      model, moe: settings; query heads are K for each of the G heads of keys and values.
      kind: of attention.
      out_scale: factor on the initial standard deviation of the output projections.
      dtype: compute type; the router computes in float32.
    """

    model: ModelConfig
    moe: MoEConfig
    kind: str
    out_scale: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BLD: Array, sight: Sight, cache: Cache | None, at: Array | None, state: Mapping[str, Array],
                 context: RoutingContext) -> tuple[Array, Cache | None, LayerRecord]:
        """As `Attention`, and the record of the router."""
        model, moe, (batch, length, width) = self.model, self.moe, x_BLD.shape
        groups, size, count, choices = model.kv_heads, model.head_dim, moe.num_experts, moe.experts_per_token

        def matrices(name: str, shape: tuple[int, ...], names: tuple[str, ...], stddev: float) -> Array:
            # The expert axis is a stack of layers, so it is no part of the fan-in.
            return self.param(name, nn.with_logical_partitioning(nn.initializers.normal(stddev), names),
                              shape).astype(self.dtype)

        own = router_parameters(self, moe, width)
        w_q_EDGH = matrices("w_q", (count, width, groups, size), ("experts", "embed", "kv_heads", "head_dim"), width**-0.5)
        w_o_EGHD = matrices("w_o", (count, groups, size, width), ("experts", "kv_heads", "head_dim", "embed"),
                            self.out_scale * (groups * size)**-0.5)
        noisy = context.train and routing.get_router(moe.router).noisy(moe)
        made = heads.queries(moe, own, state, w_q_EDGH.reshape(count, width, -1), x_BLD.reshape(-1, width),
                             context.replace(key=self.make_rng("dropout") if noisy else None))
        if not self.is_initializing():
            self.sow(DECISIONS, "assignments", made.assignments)
        # Query heads that share keys and values lie side by side.
        q_BLGKH = jnp.swapaxes(made.q_TKF.reshape(batch, length, choices, groups, size), 2, 3)
        o_BLQH, cache = Attention(model, self.kind, self.out_scale, self.dtype, name="heads")(
            x_BLD, sight, cache, at, q_BLGKH.reshape(batch, length, -1, size))
        o_TKGH = jnp.swapaxes(o_BLQH.reshape(-1, groups, choices, size), 1, 2)
        y_TD = heads.outputs(moe, made.kept, w_o_EGHD.reshape(count, -1, width),
                             o_TKGH.reshape(batch * length, choices, -1), context.sequences)
        if model.architecture.output_bias:
            y_TD += self.param("b_o", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
                               (width,)).astype(self.dtype)
        y_BLD = sharding.constrain(y_TD.reshape(batch, length, width), "batch", "length", None)
        return y_BLD, cache, made.record
