"""Fewer experts: which ones a text uses, and models without the others or with several made one.

Pruning leaves experts out, by how often they are chosen or by REAP: the mean of weight times size of output over the tokens
that an expert gets (router-weighted expert activation pruning, 2510.13999). Merging makes groups of experts one, after
MC-SMoE (2310.01334): the most frequent experts lead, every other one joins the leader whose router scores are most like
its own, units are matched with the leader's, and weights are averaged by frequency. The router keeps its scores, so
a token goes where its experts went.
"""

import dataclasses
from functools import partial
from typing import Any, Iterable, Mapping, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.optimize import linear_sum_assignment

from moejax.config import MoEConfig, check
from moejax.layers.mlp import Activation
from moejax.models import transformer
from moejax.models.stacks import sparse_places
from moejax.moe import experts, routing
from moejax.moe.layer import DECISIONS, INPUTS, INTO, weights_of
from moejax.moe.routing.topk import TOPK

SCORES = ("frequency", "reap")
"""What experts are pruned by."""


class Use(NamedTuple):
    """What the experts of one layer did for a text.

    Attributes:
      tokens_E: tokens that chose them.
      output_E: sum over these of weight times Euclidean size of the output.
      gram_EE: sum over all tokens of products of two experts' router scores (before softmax or sigmoid).
    """

    tokens_E: Array
    output_E: Array
    gram_EE: Array

    def score(self, by: str) -> np.ndarray:
        """How much each expert matters, float64 [E], by one of `SCORES`."""
        tokens_E = np.asarray(self.tokens_E, np.float64)
        return tokens_E if by == "frequency" else np.asarray(self.output_E, np.float64) / np.maximum(tokens_E, 1)


def check_surgery(model: transformer.Transformer, keep: int) -> None:
    """Raises `UserError` unless the experts can be told apart by a plain top-k router, and `keep` are some of them."""
    moe, design = model.moe, model.model.architecture
    check(moe.every > 0 and bool(sparse_places(model.model, moe)), "this model has no experts")
    check(routing.get_router(moe.router).route is TOPK.route and moe.options.gate == "output" and moe.options.groups == 1
          and moe.latent_divisor == 1, f"config.moe.router={moe.router}: only experts of a top-k router that has no "
          "groups, no gate on the input and no latent space can be pruned or merged")
    check(not design.expert_bits and design.merged_experts is None, "experts in few bits, or merged ones, cannot be pruned "
          "or merged; take the model that they were made of")
    check(not design.expert_heads, "config.model.architecture.expert_heads has as many experts of heads as of feed-forward "
          "layers, of which only these can be pruned or merged")
    check(1 <= keep <= moe.num_experts, f"{keep} experts of {moe.num_experts} cannot be kept; give a number between")


def calibrate(model: transformer.Transformer, variables: Mapping[str, Any], batches: Iterable[Mapping[str, Any]]
              ) -> list[Use]:
    """The use of the experts over some batches, by sparse layer in order; padding counts for nothing."""
    check_surgery(model, model.moe.num_experts)
    step = jax.jit(partial(uses_of, model.clone(scan=True)))  # without a scan layers show nothing of what is inside
    total: list[Use] | None = None
    for batch in batches:
        found = step(variables, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return total


def uses_of(model: transformer.Transformer, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> list[Use]:
    """The use of the experts over one batch."""
    _, found = transformer.apply_batch(model, variables["params"], variables["router"], batch, mutable=[DECISIONS, INPUTS])
    activation = Activation(model.model.architecture.activation, model.model.architecture.clamp)
    return [use_of(model.moe, activation, *(jax.tree.map(lambda a, r=repeat: a[r], tree) for tree in (
        variables["params"][stack][block]["moe"], found[DECISIONS][stack][block]["moe"]["assignments"][0],
        found[INPUTS][stack][block]["moe"]["x_TD"][0])))
        for stack, block, repeat in sparse_places(model.model, model.moe)]


def use_of(moe: MoEConfig, activation: Activation, params: Mapping[str, Array], assignments: Any, x_TD: Array) -> Use:
    """The use of one layer's experts: every expert works on all tokens, one expert after another."""
    weight_TE = weights_of(assignments, len(x_TD), moe.num_experts)
    chosen_TE = weights_of(assignments.replace(weight_N=jnp.ones_like(assignments.weight_N)), len(x_TD), moe.num_experts)

    def size_of(weights: tuple[Array | None, ...]) -> Array:
        w_in, w_out, b_in, b_out = (None if w is None else w[None] for w in weights)
        y_TD = experts.dense_feed_forward(x_TD[None], w_in, w_out, b_in_EGF=b_in, activation=activation)[0]
        return jnp.linalg.norm(y_TD if b_out is None else y_TD + b_out, axis=1)

    size_ET = jax.lax.map(size_of, tuple(params.get(name) for name in ("w_in", "w_out", "b_in", "b_out")))
    real_T = jnp.any(chosen_TE > 0, axis=1)
    logits_TE = jnp.where(real_T[:, None], x_TD @ params["router_w_DE"] + params.get("router_b_E", 0), 0)
    return Use(jnp.sum(chosen_TE, axis=0), jnp.sum(weight_TE * size_ET.T, axis=0), logits_TE.T @ logits_TE)


def prune(model: transformer.Transformer, variables: Mapping[str, Any], scores: Sequence[np.ndarray], keep: int
          ) -> tuple[transformer.Transformer, dict[str, Any]]:
    """A model with the `keep` experts of each layer that matter most; of equal ones the first.

    Args:
      model, variables: with experts.
      scores: [E] of each sparse layer.
      keep: experts to keep.

    Raises:
      UserError: a router other than plain top-k, or more choices than experts that are kept.
    """
    check_surgery(model, keep)
    check(keep >= model.moe.experts_per_token, f"{keep} experts are fewer than the {model.moe.experts_per_token} that a "
          "token chooses; keep more")
    moe = dataclasses.replace(model.moe, num_experts=keep)
    routing.get_router(moe.router).check(moe)
    kept = [np.sort(np.argsort(-np.asarray(score), kind="stable")[:keep]) for score in scores]

    def part(layer: int, params: Mapping[str, Array], state: Mapping[str, Array]) -> tuple[dict, dict]:
        # Experts are the first dimension of their own arrays, and the last of all that a top-k router has.
        own = {name: jnp.take(a, kept[layer], axis=a.ndim - 1 if name.startswith("router_") else 0)
               for name, a in params.items()}
        return own, {name: jnp.take(a, kept[layer], axis=-1) for name, a in state.items()}

    return model.clone(moe=moe), changed_layers(model, variables, part)


def merge(model: transformer.Transformer, variables: Mapping[str, Any], uses: Sequence[Use], keep: int
          ) -> tuple[transformer.Transformer, dict[str, Any]]:
    """A model in which each layer's experts are merged to `keep`.

    Args:
      model, variables: with experts.
      uses: of the experts of each sparse layer; see `calibrate`.
      keep: experts that remain.

    Raises:
      UserError: a router other than plain top-k.
    """
    check_surgery(model, keep)
    gated = Activation(model.model.architecture.activation).inputs

    def part(layer: int, params: Mapping[str, Array], state: Mapping[str, Array]) -> tuple[dict, dict]:
        use = jax.tree.map(lambda a: np.asarray(a, np.float64), uses[layer])
        leaders, into_E = groups_of(use, keep)
        own = {name: np.asarray(params[name]) for name in ("w_in", "w_out", "b_in", "b_out") if name in params}
        merged = {name: np.zeros((keep, *a.shape[1:]), np.float32) for name, a in own.items()}
        for group, leader in enumerate(leaders):
            members = np.flatnonzero(into_E == group)
            share = np.maximum(use.tokens_E[members], 1e-9)  # a group that no token chose is averaged evenly
            for member, weight in zip(members, share / share.sum()):
                order = matching_units(own, leader, member, gated)
                for name, a in own.items():
                    unit_axis = {"w_in": 2, "w_out": 0, "b_in": 1, "b_out": None}[name]
                    merged[name][group] += weight * (a[member] if unit_axis is None else np.take(
                        a[member], order, axis=unit_axis))
        routers = {name: a for name, a in params.items() if name.startswith("router_")}
        return routers | merged, dict(state) | {INTO: into_E.astype(np.int32)}

    design = dataclasses.replace(model.model.architecture, merged_experts=keep)
    return model.clone(model=dataclasses.replace(model.model, architecture=design)), changed_layers(model, variables, part)


def groups_of(use: Use, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """The experts that lead, and the number of the leader that each expert joins, int [keep] and [E]."""
    leaders = np.sort(np.argsort(-use.tokens_E, kind="stable")[:keep])
    size_E = np.sqrt(np.maximum(np.diag(use.gram_EE), 1e-30))
    cosine_EM = (use.gram_EE / size_E / size_E[:, None])[:, leaders]
    into_E = np.argmax(cosine_EM, axis=1)
    into_E[leaders] = np.arange(keep)
    return leaders, into_E


def matching_units(own: Mapping[str, np.ndarray], leader: int, member: int, inputs: int) -> np.ndarray:
    """The order of a member's hidden units in which they are most like the leader's, by the products of their weights."""
    if leader == member:
        return np.arange(own["w_out"].shape[1])

    def units(expert: int) -> np.ndarray:
        w_in, w_out = own["w_in"][expert], own["w_out"][expert]
        return np.concatenate([*(w_in[:, g].T for g in range(inputs)), w_out], axis=1)
    _, order = linear_sum_assignment(units(leader) @ units(member).T, maximize=True)
    return order


def changed_layers(model: transformer.Transformer, variables: Mapping[str, Any], part: Any) -> dict[str, Any]:
    """The variables with part(layer, parameters, router state) instead of those of each sparse layer."""
    layers: dict[tuple[str, str], list[tuple[dict, dict]]] = {}
    for layer, (stack, block, repeat) in enumerate(sparse_places(model.model, model.moe)):
        params = variables["params"][stack][block]["moe"]
        state = variables["router"].get(stack, {}).get(block, {})
        layers.setdefault((stack, block), []).append(
            part(layer, *(jax.tree.map(lambda a, r=repeat: a[r], dict(tree)) for tree in (params, state))))
    params, router = dict(variables["params"]), {name: dict(tree) for name, tree in variables["router"].items()}
    for (stack, block), made in layers.items():
        own, state = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in zip(*made))
        params[stack] = {**params[stack], block: {**params[stack][block], "moe": own}}
        router[stack] = {**router.get(stack, {}), block: state}
    return {"params": params, "router": router}
