"""The mixture-of-experts room in numpy float64, token by token from the formulas, and inputs for its tests.

Everything here is slow and obvious on purpose; nothing is taken from the code under test.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import MoEConfig
from moejax.moe.routing import get_router, resolve
from moejax.moe.types import Assignments, RoutingContext, Totals

B, L, D, E, F, K = 4, 6, 5, 7, 3, 2
T = B * L


class Inputs(NamedTuple):
    """Random float32 inputs. The mask has a padded tail, a hole, and one row of nothing but padding."""

    x_TD: np.ndarray
    router: dict
    w_in_ED2F: np.ndarray
    w_out_EFD: np.ndarray
    mask_T: np.ndarray
    ids_T: np.ndarray


def inputs(seed=0, experts=E):
    rng = np.random.default_rng(seed)
    mask_BL = np.ones((B, L), bool)
    mask_BL[1, 4:] = mask_BL[2, 1] = mask_BL[3] = False

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return Inputs(normal(T, D), {"w_DE": normal(D, experts)}, normal(experts, D, 2, F), normal(experts, F, D),
                  mask_BL.reshape(-1), rng.integers(0, 1000, T).astype(np.int32))


def context(mask_T, ids_T=None, sequences=B, train=True, key=None, shards=1, whole=None, totals=None,
            carry_TC=None):
    mask_T = jnp.asarray(mask_T)
    ids_T = np.zeros(mask_T.shape, np.int32) if ids_T is None else ids_T
    if totals is None:
        totals = Totals(jnp.float32(np.sum(mask_T)), jnp.float32(np.sum(np.reshape(mask_T, (sequences, -1)).any(1))))
    return RoutingContext(jnp.asarray(ids_T), mask_T, totals, whole, carry_TC, key, sequences, shards, train)


def config_of(router="topk", **changes):
    return resolve(MoEConfig(**({"router": router, "num_experts": E, "experts_per_token": K, "block_rows": 4} | changes)))


def initial_state(config):
    return get_router(config.router).initial_state(config, 1000)


def eager_route(config, parameters, state, x_TD, context):
    router = get_router(config.router)
    names = router.parameters(config, x_TD.shape[-1])
    return router.route(config, {name: parameters[name] for name in names}, state, x_TD, context)


route = jax.jit(eager_route, static_argnums=0)


def matrix(assignments, tokens=T, experts=E):
    """How often each token and expert are paired, and with what weight: [T, E] each."""
    count_TE, weight_TE = np.zeros((tokens, experts), int), np.zeros((tokens, experts))
    for token, expert, weight, valid in zip(*map(np.asarray, (
            assignments.token_N, assignments.expert_N, assignments.weight_N, assignments.valid_N)), strict=True):
        if valid:
            count_TE[token, expert] += 1
            weight_TE[token, expert] += weight
    return count_TE, weight_TE


def whole_and_halves(config, given, state):
    """What the router of `given` says of the whole batch, and of its two halves as parts of it."""
    everything = context(given.mask_T)
    whole = route(config, given.router, state, given.x_TD, everything)
    return whole, [route(config, given.router, state, given.x_TD[part],
                         context(given.mask_T[part], sequences=B // 2, totals=everything.totals))
                   for part in (slice(T // 2), slice(T // 2, T))]


def assert_halves_route_alike(config, given):
    """Two halves make the choices of the whole batch, and their shares of z-loss and entropy add up."""
    whole, halves = whole_and_halves(config, given, {})
    np.testing.assert_array_equal(np.concatenate([half.assignments.expert_N for half in halves]),
                                  whole.assignments.expert_N)
    np.testing.assert_allclose(sum(half.losses["router_z"] for half in halves), whole.losses["router_z"], rtol=1e-6)
    np.testing.assert_allclose(sum(half.entropy for half in halves), whole.entropy, rtol=1e-5)


def assert_halves_add_up(config, given):
    """Losses, entropy and statistics of uneven halves, and the gradient of the losses, add up to those of the batch."""
    totals = context(given.mask_T).totals

    def told(w_DE, x_TD, mask_T, sequences, statistics):
        part = context(mask_T, sequences=sequences, whole=statistics, totals=totals)
        out = eager_route(config, {"w_DE": w_DE}, {}, x_TD, part)
        return sum(out.losses.values()), (out.losses, out.entropy, out.statistics)

    evaluate = jax.jit(jax.value_and_grad(told, has_aux=True), static_argnums=3)
    whole = evaluate(given.router["w_DE"], given.x_TD, given.mask_T, B, None)
    halves = [evaluate(given.router["w_DE"], given.x_TD[part], given.mask_T[part], B // 2, whole[0][1][2])
              for part in (slice(T // 2), slice(T // 2, T))]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(b + c, a, rtol=1e-5, atol=1e-7), whole, *halves)


def compare(config, given, formula, rtol):
    """Checks counts and weights against those of a formula of (config, logits, mask); the output, logits and counts."""
    out = route(config, given.router, {}, given.x_TD, context(given.mask_T))
    logits_TE = logits(given.x_TD, given.router["w_DE"])
    count_TE, weight_TE = formula(config, logits_TE, given.mask_T)
    got_count_TE, got_weight_TE = matrix(out.assignments)
    np.testing.assert_array_equal(got_count_TE, count_TE)
    np.testing.assert_allclose(got_weight_TE, weight_TE, rtol=rtol)
    return out, logits_TE, count_TE


def assert_slopes(gradients, function, tree, step, tolerance):
    """Gradients of each entry of a dict of float64 arrays against central differences of a function of the dict."""
    for name, value in tree.items():
        slope = np.zeros(value.shape)
        for at in np.ndindex(value.shape):
            change = np.zeros(value.shape)
            change[at] = step
            slope[at] = (function(tree | {name: value + change}) - function(tree | {name: value - change})) / (2 * step)
        assert_close(gradients[name], slope, tolerance)


def assignments_of(expert_TK, weight_TK, valid_TK):
    """A token-major list."""
    tokens, choices = np.shape(expert_TK)
    columns = (np.repeat(np.arange(tokens), choices), np.ravel(expert_TK), np.ravel(weight_TK), np.ravel(valid_TK))
    dtypes = (jnp.int32, jnp.int32, jnp.float32, bool)
    return Assignments(*(jnp.asarray(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)), choices)


def logits(x_TD, w_DE):
    return np.asarray(x_TD, np.float64) @ np.asarray(w_DE, np.float64)


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def scores(logits_TE, score):
    return softmax(logits_TE) if score == "softmax" else 1 / (1 + np.exp(-logits_TE))


def topk(logits_TE, k, score, renormalize, scale=1.0, bias_E=0.0):
    """The K best experts of each token and their weights, [T, K] each."""
    score_TE = scores(logits_TE, score)
    expert_TK = np.argsort(-(score_TE + bias_E), axis=1, kind="stable")[:, :k]
    weight_TK = np.take_along_axis(score_TE, expert_TK, 1)
    if renormalize:
        weight_TK = weight_TK / weight_TK.sum(1, keepdims=True)
    return expert_TK, scale * weight_TK


def topk_matrix(logits_TE, mask_T, *arguments):
    """The same as counts and weights, [T, E] each; nothing for padding."""
    count_TE, weight_TE = np.zeros(logits_TE.shape, int), np.zeros(logits_TE.shape)
    expert_TK, weight_TK = topk(logits_TE, *arguments)
    np.put_along_axis(count_TE, expert_TK, 1, 1)
    np.put_along_axis(weight_TE, expert_TK, weight_TK, 1)
    return count_TE * mask_T[:, None], weight_TE * mask_T[:, None]


def expert_choice_matrix(logits_TE, mask_T, k, score, groups, scale=1.0):
    """Each expert takes its ceil(k * real tokens / E) best real tokens of each group: counts and weights [T, E]."""
    score_TE = scores(logits_TE, score)
    count_TE = np.zeros(score_TE.shape, int)
    for tokens in np.split(np.arange(len(mask_T)), groups):
        real = tokens[mask_T[tokens]]
        for e in range(score_TE.shape[1]):
            best = real[np.argsort(-score_TE[real, e], kind="stable")]
            count_TE[best[:math.ceil(k * len(real) / score_TE.shape[1])], e] = 1
    return count_TE, scale * count_TE * score_TE


def balance_loss(logits_TE, count_TE, mask_T, score, groups):
    """Mean over the groups with any token of E * sum_e f_e P_e."""
    score_TE = scores(logits_TE, score)
    probs_TE, losses = score_TE / score_TE.sum(1, keepdims=True), []
    for tokens in np.split(np.arange(len(mask_T)), groups):
        real = tokens[mask_T[tokens]]
        if len(real):
            f_E = count_TE[real].sum(0) / count_TE[real].sum()
            losses.append(logits_TE.shape[1] * np.sum(f_E * probs_TE[real].mean(0)))
    return np.mean(losses)


def z_loss(logits_TE, mask_T):
    return np.mean(np.log(np.exp(logits_TE[mask_T]).sum(1))**2)


def capacity(factor, choices, tokens, experts):
    return math.ceil(Fraction(str(factor)) * choices * tokens / experts)


def keep(expert_TK, weight_TK, mask_T, factor, policy, groups, experts):
    """Which pairs find room: fills the experts of each group one pair at a time, in order of priority. [T, K]."""
    kept_TK = np.zeros(expert_TK.shape, bool)
    for tokens in np.split(np.arange(len(mask_T)), groups):
        pairs = [(t, k) for t in tokens if mask_T[t] for k in range(expert_TK.shape[1])]
        order = {"choice_major": lambda pair: (pair[1], pair[0]), "token_major": lambda pair: pair,
                 "token_weight": lambda pair: (pair[1], -weight_TK[pair[0]].max(), pair[0]),
                 "weight": lambda pair: (-weight_TK[pair], *pair)}[policy]
        room = [capacity(factor, expert_TK.shape[1], mask_T[tokens].sum(), experts)] * experts
        for pair in sorted(pairs, key=order):
            if room[expert_TK[pair]] > 0:
                room[expert_TK[pair]] -= 1
                kept_TK[pair] = True
    return kept_TK


def experts(x_TD, pairs, w_in_ED2F, w_out_EFD, dy_TD=None):
    """SwiGLU experts on a list of (token, expert, weight): y_TD and, given its cotangent, all gradients by hand."""
    x_TD, w_in, w_out = (np.asarray(a, np.float64) for a in (x_TD, w_in_ED2F, w_out_EFD))
    dy_TD = np.zeros_like(x_TD) if dy_TD is None else np.asarray(dy_TD, np.float64)
    y_TD, dx_TD, d_in, d_out, d_weight = (np.zeros_like(x_TD), np.zeros_like(x_TD), np.zeros_like(w_in),
                                          np.zeros_like(w_out), np.zeros(len(pairs)))
    for n, (t, e, weight) in enumerate(pairs):
        gate, up = x_TD[t] @ w_in[e, :, 0], x_TD[t] @ w_in[e, :, 1]
        sigmoid = 1 / (1 + np.exp(-gate))
        hidden = gate * sigmoid * up
        y_TD[t] += weight * hidden @ w_out[e]
        d_weight[n] = dy_TD[t] @ (hidden @ w_out[e])
        d_out[e] += weight * np.outer(hidden, dy_TD[t])
        d_hidden = weight * w_out[e] @ dy_TD[t]
        d_gate, d_up = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid)), d_hidden * gate * sigmoid
        d_in[e] += np.stack([np.outer(x_TD[t], d_gate), np.outer(x_TD[t], d_up)], axis=1)
        dx_TD[t] += w_in[e, :, 0] @ d_gate + w_in[e, :, 1] @ d_up
    return y_TD, {"x": dx_TD, "weight": d_weight, "w_in": d_in, "w_out": d_out}


def listed(assignments):
    """(token, expert, weight) of the valid pairs."""
    columns = map(np.asarray, (assignments.token_N, assignments.expert_N, assignments.weight_N, assignments.valid_N))
    return [(t, e, float(w)) for t, e, w, valid in zip(*columns, strict=True) if valid]


def assert_close(got, want, tolerance=1e-5, per_expert=False):
    """The largest error over the largest value; taken of each expert (leading axis) on its own if `per_expert`.

    A part that should be zero must be exactly zero.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape and np.isfinite(got).all()
    parts = zip(got, want, strict=True) if per_expert else [(got, want)]
    for e, (g, w) in enumerate(parts):
        error, size = np.abs(g - w).max(initial=0), np.abs(w).max(initial=0)
        assert error <= tolerance * size, f"part {e}: error {error} at size {size}"
