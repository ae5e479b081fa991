"""BASE layers: tokens are assigned to experts so that all are equally full. Lewis et al. 2021, arXiv 2103.16716.

In training the tokens of a group go where the sum of their scores is largest under the constraint that each expert has
ceil(tokens / E) places: a linear assignment problem, solved by an auction (Bertsekas 1979; with the equal places of an
expert bidding as one, Bertsekas and Castanon 1989). In evaluation each token goes to its best expert.

The experts' centroids start as normal vectors at the scale of the paper's orthogonal ones, whose gain is 0.1.
"""

import dataclasses
from functools import partial
from typing import Mapping, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import MoEConfig, check, key
from moejax.moe import balance
from moejax.moe.routing import select, topk
from moejax.moe.routing.base import Router, jitters, z_loss_alone
from moejax.moe.types import RouterOutput, RoutingContext

COARSEST, REFINEMENT = 4, 5
"""The first auction's increment is this part of the spread of the scores; each further auction divides it by this."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of BASE layers."""

    epsilon: float = key(1e-3, "least increment of a bid over the spread of a token's scores; the assignment is at most "
                         "this much a token below the best one", low=1e-5, high=1)
    rounds: int = key(500, "most rounds of bidding; tokens that are left over then take the places that are left over",
                      low=1)


class Auction(NamedTuple):
    """An auction in progress.

    Attributes:
      rounds: int32 scalar, rounds so far.
      increment: float32 scalar, epsilon of this auction.
      price_O: float32, price of each object: tokens, then dummies.
      owner_O: int32, expert that holds each object, or -1.
      sold_O: int32, owners at the end of the last auction in which all was sold; -1 before.
      finished: bool scalar, whether that one had the smallest increment.
    """

    rounds: Array
    increment: Array
    price_O: Array
    owner_O: Array
    sold_O: Array
    finished: Array


def route(config: MoEConfig, parameters: Mapping[str, Array], state: Mapping[str, Array], x_TD: Array,
          context: RoutingContext) -> RouterOutput:
    """Assigns each token to one expert, weighted by its gate (published: sigmoid) there; see `Router.route`."""
    scores_TE = select.linear(select.add_jitter(x_TD, config, context), parameters["w_DE"])
    if context.train:
        groups = context.groups(config.routing_group)
        solve = jax.vmap(partial(assign, epsilon=config.options.epsilon, rounds=config.options.rounds))
        expert_T1 = solve(jax.lax.stop_gradient(scores_TE).reshape(groups, -1, config.num_experts),
                          context.mask_T.reshape(groups, -1))[0].reshape(-1, 1)
    else:
        expert_T1 = select.best(scores_TE, 1, context)
    log_scores_TE = select.log_scores(scores_TE, config.score)
    weight_T1 = config.route_scale * select.gate(log_scores_TE, expert_T1, renormalize=False)
    entropy = balance.entropy(jax.nn.log_softmax(log_scores_TE), context.mask_T)
    return RouterOutput(select.listed(expert_T1, weight_T1, select.real(context, 1)),
                        {"router_z": balance.z_loss(scores_TE, context)}, entropy, {})


def assign(scores_TE: Array, mask_T: Array, epsilon: float, rounds: int) -> tuple[Array, Array]:
    """The assignment of one group: the expert of each token, int32 [T], and the number of rounds that it took.

    A sequence of auctions with smaller and smaller increments, each from the prices of the one before. Whatever the
    number of rounds, every real token has an expert, and no expert more than ceil(real tokens / E) of them.

    Values are whole numbers: bids make many margins equal, and were they equal up to rounding alone, the choice among
    them would depend on the device.
    """
    tokens, experts = scores_TE.shape
    if experts == 1:
        return jnp.zeros(tokens, jnp.int32), jnp.int32(0)
    most, count = -(-tokens // experts), jnp.sum(mask_T, dtype=jnp.int32)
    places = -(-count // experts)
    # Dummies fill the places that the real tokens leave; padding, and dummies beyond that, nobody may bid for.
    offered_O = jnp.concatenate([mask_T, jnp.arange(experts) < experts * places - count])
    # A constant added to all scores of a token changes no assignment; only differences need the precision.
    scores_TE = scores_TE - jnp.mean(scores_TE, axis=1, keepdims=True)
    spread = jnp.max(jnp.where(mask_T, jnp.max(scores_TE, axis=1) - jnp.min(scores_TE, axis=1), 0.0))
    levels = 2**22 // experts  # prices reach some E times the spread; float32 is exact up to 2^24
    value_TE = jnp.round(levels * (scores_TE / jnp.where(spread > 0, spread, 1.0)))
    value_EO = jnp.where(offered_O, jnp.pad(value_TE, ((0, experts), (0, 0))).T, -jnp.inf)
    smallest = jnp.maximum(jnp.round(epsilon * levels), 1.0)

    def bid(now: Auction) -> Auction:
        price_O, owner_O = bidding_round(value_EO, now.price_O, now.owner_O, places, most, now.increment)
        full = jnp.all((owner_O >= 0) | ~offered_O)
        finer = jnp.maximum(jnp.floor(now.increment / REFINEMENT), smallest)
        return Auction(now.rounds + 1, jnp.where(full, finer, now.increment), price_O, jnp.where(full, -1, owner_O),
                       jnp.where(full, owner_O, now.sold_O), full & (now.increment <= smallest))

    nobody_O = jnp.full(len(offered_O), -1, jnp.int32)
    start = Auction(jnp.int32(0), jnp.maximum(levels // COARSEST, smallest), jnp.zeros_like(value_EO[0]), nobody_O,
                    nobody_O, jnp.bool_(False))
    end = jax.lax.while_loop(lambda now: ~now.finished & (now.rounds < rounds), bid, start)
    owner_O = jnp.where(jnp.any(end.sold_O >= 0), end.sold_O, end.owner_O)

    # Tokens that are left over take the places that are left over, in order.
    left_E = places - jnp.sum(owner_O == jnp.arange(experts)[:, None], axis=1)
    unsold_T = mask_T & (owner_O[:tokens] < 0)
    turn_T1 = (jnp.cumsum(unsold_T) - 1)[:, None]
    filler_T = jnp.sum(turn_T1 >= jnp.cumsum(left_E), axis=1, dtype=jnp.int32)
    return jnp.where(unsold_T, filler_T, jnp.maximum(owner_O[:tokens], 0)), end.rounds


def bidding_round(value_EO: Array, price_O: Array, owner_O: Array, places: Array, most: int, increment: Array
                  ) -> tuple[Array, Array]:
    """One round, in which all experts bid at once: the new prices and owners.

    An expert with f free places bids for the f objects with the largest margin (value less price) of those that it does
    not hold, and goes so high that the margin left is that of the next best object, less the increment. It defends what
    it holds up to the same margin: without that, places of one expert would drive up the prices of each other.

    Args:
      value_EO: float32, value of each object to each expert; -inf where it is not for sale.
      price_O: float32.
      owner_O: int32, or -1.
      places: int32 scalar, objects that an expert can hold.
      most: a static bound of `places`, less than O.
      increment: float32 scalar, least rise of the price of an object that changes hands.
    """
    experts = len(value_EO)
    held_EO = owner_O == jnp.arange(experts)[:, None]
    free_E1 = places - jnp.sum(held_EO, axis=1, keepdims=True)
    margin_EM, object_EM = jax.lax.top_k(jnp.where(held_EO, -jnp.inf, value_EO - price_O), most + 1)
    chosen_EO = jnp.put_along_axis(jnp.zeros_like(held_EO), object_EM, jnp.arange(most + 1) < free_E1, axis=1,
                                   inplace=False)
    margin_left_E1 = jnp.take_along_axis(margin_EM, free_E1, axis=1) - increment
    bid_EO = jnp.where((chosen_EO | held_EO) & (free_E1 > 0), value_EO - margin_left_E1, -jnp.inf)
    highest_O = jnp.max(bid_EO, axis=0)
    winner_O = jnp.argmax(bid_EO, axis=0).astype(jnp.int32)
    return jnp.maximum(price_O, highest_O), jnp.where(highest_O > -jnp.inf, winner_O, owner_O)


def check_config(config: MoEConfig) -> None:
    """Raises `UserError` on more than one expert a token."""
    check(config.experts_per_token == 1, f"config.moe.experts_per_token={config.experts_per_token}: BASE layers assign "
          "each token to one expert; set config.moe.experts_per_token=1")


BASE = Router("BASE layers", "2103.16716", "the best assignment with equally full experts; weight: sigmoid of the score",
              route, causal=False, evaluation="argmax of the scores", options=Options(),
              defaults={"experts_per_token": 1, "score": "sigmoid", "renormalize": False, "router_init": 0.1,
                        "z_weight": 0.0},
              parameters=topk.parameters, loss_weights=z_loss_alone, noisy=jitters, by_group=True, check=check_config)
