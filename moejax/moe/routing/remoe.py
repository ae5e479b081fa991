"""ReMoE: an expert is on where the ReLU of its logit is, and that ReLU is its weight. Wang et al. 2024, arXiv 2412.14711.

No top-k and no normalisation, so the output is continuous in the logits. A load-weighted L1 loss whose strength follows
the sparsity brings the mean number of experts to K. Logits start near normal, so half of the experts are on at first.
"""

import dataclasses
from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig, key
from moejax.moe import balance
from moejax.moe.routing import select, topk
from moejax.moe.routing.base import Router, jitters
from moejax.moe.types import RouterOutput, RoutingContext

STRENGTH_BOUNDS = 1e-20, 1e20
"""Whatever the sparsity does for however long, the strength stays positive and finite. No healthy run comes near."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ReLU routing."""

    start: float = key(1e-8, "strength of the L1 loss before the first step", low=STRENGTH_BOUNDS[0])
    rate: float = key(1.2, "factor by which the strength grows or shrinks in a step", low=1)


def initial_state(config: MoEConfig, vocab_size: int) -> dict[str, Array]:
    """The strength of the L1 loss: one for all layers, as `update` gets the statistics of all of them."""
    return {"strength": jnp.float32(config.options.start)}


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Routes each token to the experts with a positive logit, weighted by it; see `Router.route`.

    The loss is strength * sum_e f_e mean_t ReLU(z_te), with f_e = E / (K T) * (pairs of expert e) and no gradient to f.
    It holds the strength, so its weight is 1.
    """
    experts = config.num_experts
    logits_TE = select.linear(select.add_jitter(x_TD, config, context), parameters["w_DE"])
    expert_TK = select.best(logits_TE, experts, context)
    logit_TK = jnp.take_along_axis(logits_TE, expert_TK, axis=1)
    valid_TK = (logit_TK > 0) & context.mask_T[:, None]
    assignments = select.listed(expert_TK, jnp.where(valid_TK, config.route_scale * logit_TK, 0.0), valid_TK)

    statistics = {"assigned_E": balance.count_per_expert(assignments, experts)[0],
                  "tokens": jnp.sum(context.mask_T, dtype=jnp.int32)}
    tokens = jnp.maximum(context.totals.tokens, 1.0)
    load_E = experts * (context.whole or statistics)["assigned_E"] / (config.experts_per_token * tokens)
    gate_TE = jnp.where(context.mask_T[:, None], jax.nn.relu(logits_TE), 0.0)
    loss = state["strength"] * jnp.sum(load_E * jnp.sum(gate_TE, axis=0) / tokens)

    sum_T1 = jnp.sum(gate_TE, axis=1, keepdims=True)
    share_TE = jax.lax.stop_gradient(gate_TE / jnp.where(sum_T1 > 0, sum_T1, 1.0))
    return RouterOutput(assignments, {"l1": loss}, jnp.sum(jax.scipy.special.entr(share_TE)), statistics)


def update(config: MoEConfig, state: Mapping[str, Array], statistics: Mapping[str, Array]) -> dict[str, Array]:
    """strength * rate^sign(target - sparsity), with the target 1 - K/E and the sparsity 1 - pairs / (E * tokens).

    The sign is that of the pairs in excess of K a token; a batch of nothing but padding leaves the strength alone.
    """
    pairs = jnp.sum(statistics["assigned_E"].astype(jnp.float32))
    excess = pairs - config.experts_per_token * statistics["tokens"].astype(jnp.float32)
    return {"strength": jnp.clip(state["strength"] * config.options.rate**jnp.sign(excess), *STRENGTH_BOUNDS)}


def loss_weights(config: MoEConfig) -> dict[str, float]:
    """1 for the L1 loss, which already holds its strength."""
    return {"l1": 1.0}


def needs_whole(config: MoEConfig) -> bool:
    """The L1 loss is weighted by the load of the whole batch."""
    return True


REMOE = Router("ReMoE", "2412.14711", "all experts with a positive logit; an L1 loss keeps them few", route, variable=True,
               options=Options(), parameters=topk.parameters, initial_state=initial_state, update=update,
               pools_layers=True, loss_weights=loss_weights, noisy=jitters, needs_whole=needs_whole)
