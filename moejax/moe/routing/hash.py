"""Hash layers: a token's id alone decides its K experts. Roller et al. 2021, arXiv 2106.04426.

The hash is random but fixed (`hash`), or follows the frequencies of ids so that experts are equally used
(`hash_balanced`). MultiHash (`multi_hash`) cuts the feed-forward layer of an expert into K segments and picks each by a
hash of its own. Segments of hidden units add up, so that is a sum of K smaller experts: here K distinct ones of a common
pool, whose weight 1/K their output projections can undo. Weights may be learned although the choice is not
(`hash_weights`, as in the first layers of DeepSeek-V4).
"""

import dataclasses
import math
from typing import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig, check, key
from moejax.moe import balance
from moejax.moe.routing import select, topk
from moejax.moe.routing.base import Router, jitters
from moejax.moe.types import RouterOutput, RoutingContext


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the balanced hash."""

    count_steps: int = key(20, "optimizer steps over which ids are counted, before their experts are fixed", low=1)


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Takes the K experts with the largest hash of (id, expert): distinct, and uniform over ids; see `Router.route`."""
    return equally_weighted(config, choose(context.token_ids_T, config.num_experts, config.experts_per_token), context)


def choose(token_ids_T: Array, experts: int, choices: int) -> Array:
    """The K experts of each id, int32 [T, K]."""
    experts_E = select.mix(jnp.arange(1, experts + 1, dtype=jnp.uint32))
    priority_TE = select.mix(select.mix(token_ids_T.astype(jnp.uint32))[:, None] ^ experts_E)
    return jax.lax.top_k(priority_TE, choices)[1]


def equally_weighted(config: MoEConfig, expert_TK: Array, context: RoutingContext) -> RouterOutput:
    """The output of a router that learns nothing: each chosen expert has weight 1/K."""
    choices = config.experts_per_token
    weight_TK = jnp.full(expert_TK.shape, config.route_scale / choices, jnp.float32)
    entropy = math.log(choices) * jnp.sum(context.mask_T, dtype=jnp.float32)
    return RouterOutput(select.listed(expert_TK, weight_TK, select.real(context, choices)), {}, entropy, {})


def route_with_weights(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
                       context: RoutingContext) -> RouterOutput:
    """Hashes as `route` does, and weighs by the learned score sqrt(softplus(x w)) of each chosen expert."""
    logits_TE = select.linear(select.add_jitter(x_TD, config, context), parameters["w_DE"])
    expert_TK = choose(context.token_ids_T, config.num_experts, config.experts_per_token)
    log_scores_TE = 0.5 * log_softplus(logits_TE)
    weight_TK = config.route_scale * select.gate(log_scores_TE, expert_TK, config.renormalize)
    log_share_TK = jax.nn.log_softmax(jnp.take_along_axis(log_scores_TE, expert_TK, axis=-1))
    return RouterOutput(select.listed(expert_TK, weight_TK, select.real(context, config.experts_per_token)), {},
                        balance.entropy(log_share_TK, context.mask_T), {})


def log_softplus(z: Array) -> Array:
    """log(log(1 + exp(z))), which for z far below 0 is z: there softplus itself becomes 0 and has no logarithm."""
    far_below = z < -20
    return jnp.where(far_below, z, jnp.log(jax.nn.softplus(jnp.where(far_below, 0.0, z))))


def check_weights(config: MoEConfig) -> None:
    """Raises `UserError` on a single renormalised choice, whose weight would always be 1."""
    check(not (config.experts_per_token == 1 and config.renormalize),
          "config.moe.renormalize=True with config.moe.experts_per_token=1 makes every weight 1, so there is nothing to "
          "learn; set config.moe.renormalize=False, or config.moe.router=hash")


def balanced_state(config: MoEConfig, vocab_size: int) -> dict[str, Array]:
    """Steps and ids counted so far, and the expert of each id: at first that of the random hash."""
    ids_V = jnp.arange(vocab_size, dtype=jnp.int32)
    return {"step": jnp.int32(0), "count_V": jnp.zeros_like(ids_V),
            "table_V": choose(ids_V, config.num_experts, 1)[:, 0].astype(jnp.int32)}


def route_by_table(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
                   context: RoutingContext) -> RouterOutput:
    """Takes the expert that the table has for the id, and counts the ids of real tokens; see `Router.route`."""
    out = equally_weighted(config, state["table_V"][context.token_ids_T][:, None], context)
    count_V = jnp.zeros_like(state["count_V"]).at[context.token_ids_T].add(context.mask_T.astype(jnp.int32))
    return out.replace(statistics={"count_V": count_V})


def update_table(config: MoEConfig, state: Mapping[str, Array], statistics: Mapping[str, Array]) -> dict[str, Array]:
    """Counts ids in the first steps; at the last of these fixes the table for good."""
    step = state["step"] + 1
    counting, due = step <= config.options.count_steps, step == config.options.count_steps
    count_V = state["count_V"] + jnp.where(counting, statistics["count_V"], 0)

    # A loop of at most one turn is a branch that stays one under vmap; a cond would build the table in every step.
    def build(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.zeros_like(due), greedy_table(count_V, carry[1], config.num_experts)

    _, table_V = jax.lax.while_loop(lambda carry: carry[0], build, (due, state["table_V"]))
    return {"step": step, "count_V": count_V, "table_V": table_V}


def greedy_table(count_V: Array, table_V: Array, experts: int) -> Array:
    """Gives the ids, most frequent first, each to the expert with the least load so far; ids never seen stay. int32 [V]."""
    order_V = jnp.argsort(-count_V)

    def place(load_E: Array, count: Array) -> tuple[Array, Array]:
        expert = jnp.argmin(load_E).astype(jnp.int32)
        return load_E.at[expert].add(count), expert

    _, expert_V = jax.lax.scan(place, jnp.zeros(experts, jnp.int32), count_V[order_V])
    return jnp.where(count_V > 0, jnp.zeros_like(table_V).at[order_V].set(expert_V), table_V)


def check_balanced(config: MoEConfig) -> None:
    """Raises `UserError` on more than one expert an id."""
    check(config.experts_per_token == 1, f"config.moe.experts_per_token={config.experts_per_token}: the balanced hash "
          "gives each id one expert; set config.moe.experts_per_token=1, or config.moe.router=multi_hash")


HASH = Router("Hash layers", "2106.04426", "a random but fixed expert for each token id (K of them)", route,
              needs_token_ids=True, defaults={"experts_per_token": 1})
MULTI_HASH = HASH._replace(paper="MultiHash", rule="K = 2 hash functions, each of which picks a segment of the layer",
                           defaults={"experts_per_token": 2})
HASH_BALANCED = Router(
    "Balanced hash", "2106.04426", "one fixed expert for each token id, so that frequent ids are spread evenly",
    route_by_table, needs_token_ids=True, defaults={"experts_per_token": 1}, options=Options(),
    initial_state=balanced_state, update=update_table, check=check_balanced)
HASH_WEIGHTS = Router(
    "DeepSeek-V4 hash layers", "", "experts by hash of the token id, weights sqrt(softplus) learned", route_with_weights,
    needs_token_ids=True, defaults={"experts_per_token": 6, "shared_experts": 1, "route_scale": 1.5},
    parameters=topk.parameters, noisy=jitters, check=check_weights)
