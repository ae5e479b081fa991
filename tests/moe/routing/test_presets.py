"""Named rules of the top-k family against their papers' formulas: groups, their losses, the bias, the gate on the input."""

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import B, D, F, T, assert_close, config_of, context, inputs, matrix, route

from moejax.moe.layer import mixture
from moejax.moe.routing import ROUTERS

E, G, M, K = 12, 4, 2, 3


def by_groups(score_TE, bias_E, kept, top, k):
    """Experts of the best groups, token by token: sorted indices [T, K]."""
    chosen = []
    for score_E in np.asarray(score_TE) + bias_E:
        groups = [np.sort(part)[::-1][:top].sum() for part in np.split(score_E, G)]
        best = np.argsort(groups)[::-1][:kept]
        allowed = [e for e in range(E) if e // (E // G) in best]
        chosen.append(sorted(allowed, key=lambda e, s=score_E: -s[e])[:k])
    return np.array(chosen)


def grouped(name, **changes):
    options = {"groups": G, "kept_groups": M}
    return config_of(name, **({"num_experts": E, "experts_per_token": K, "options": options} | changes))


@pytest.mark.parametrize("name, score, top, renormalize, scale", [
    ("deepseek_v2", "softmax", 1, False, 1.0), ("deepseek_v3", "sigmoid", 2, True, 2.5)])
@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_groups_are_chosen_by_their_best_scores_and_experts_within_them(name, score, top, renormalize, scale, shift):
    """Also where biased scores are below zero: an expert of another group must not win by being masked with 0."""
    given, config = inputs(2, E), grouped(name)
    bias_E = np.linspace(0.4, -0.4, E).astype(np.float32) + np.float32(shift) if score == "sigmoid" else np.zeros(E)
    state = {"bias_E": jnp.asarray(bias_E)} if score == "sigmoid" else {}
    out = route(config, given.router, state, given.x_TD, context(given.mask_T))
    score_TE = reference.scores(reference.logits(given.x_TD, given.router["w_DE"]), score)
    want_TK = by_groups(score_TE, bias_E, M, top, K)
    weight_TK = np.take_along_axis(score_TE, want_TK, 1)
    weight_TK = scale * (weight_TK / weight_TK.sum(1, keepdims=True) if renormalize else weight_TK)
    count_TE, weight_TE = matrix(out.assignments, experts=E)
    want_TE = np.zeros((T, E))
    np.put_along_axis(want_TE, want_TK, weight_TK, 1)
    np.testing.assert_allclose(weight_TE, want_TE * given.mask_T[:, None], rtol=1e-5)
    reached = (count_TE.reshape(T, G, -1).sum(2) > 0).sum(1)
    assert reached.max() <= M
    plain_TE = by_groups(score_TE, 0.0, G, top, K)
    assert (np.sort(plain_TE) != np.sort(want_TK)).any(), "the groups must matter for this test"


def test_the_three_losses_of_deepseek_v2_equal_their_formulas():
    given, config = inputs(3, E), grouped("deepseek_v2")
    out = route(config, given.router, {}, given.x_TD, context(given.mask_T))
    prob_TE = reference.softmax(reference.logits(given.x_TD, given.router["w_DE"]))[given.mask_T]
    chosen_TK = by_groups(prob_TE, 0.0, M, 1, K)
    tokens = len(prob_TE)
    f_E = E / (K * tokens) * np.bincount(chosen_TK.ravel(), minlength=E)
    P_E = prob_TE.mean(0)
    device_f, device_P = f_E.reshape(G, -1).mean(1), P_E.reshape(G, -1).sum(1)
    sent = np.array([sum(any(e // (E // G) == g for e in row) for row in chosen_TK) for g in range(G)])
    np.testing.assert_allclose(out.losses["group_balance"], np.sum(device_f * device_P), rtol=1e-5)
    np.testing.assert_allclose(out.losses["communication"], np.sum(G / (M * tokens) * sent * device_P), rtol=1e-5)
    weights = ROUTERS["deepseek_v2"].loss_weights(config)
    assert (weights["balance"], weights["group_balance"], weights["communication"]) == (0.003, 0.05, 0.02)


def test_the_sequence_loss_of_deepseek_v3_counts_the_choices_without_the_bias():
    given, config = inputs(4, E), grouped("deepseek_v3")
    bias_E = np.linspace(0.5, -0.5, E).astype(np.float32)
    score_TE = reference.scores(reference.logits(given.x_TD, given.router["w_DE"]), "sigmoid")
    out = route(config, given.router, {"bias_E": jnp.asarray(bias_E)}, given.x_TD, context(given.mask_T))
    share_TE, losses = score_TE / score_TE.sum(1, keepdims=True), []
    for tokens in np.split(np.arange(T), B):
        real = tokens[given.mask_T[tokens]]
        if len(real):
            count_E = np.bincount(by_groups(score_TE[real], 0.0, M, 2, K).ravel(), minlength=E)
            losses.append(np.sum(E / (K * len(real)) * count_E * share_TE[real].mean(0)))
    np.testing.assert_allclose(out.losses["balance"], np.mean(losses), rtol=1e-5)
    biased_E = np.bincount(by_groups(score_TE[given.mask_T], bias_E, M, 2, K).ravel(), minlength=E)
    np.testing.assert_array_equal(out.statistics["assigned_E"], biased_E)


def test_llama_4_scales_what_the_expert_sees_and_not_what_it_says():
    given = inputs(5)
    config = config_of("llama4", dispatch="dense", experts_per_token=1)
    logits_TE = reference.logits(given.x_TD, given.router["w_DE"])
    best_T, sigmoid_TE = logits_TE.argmax(1), reference.scores(logits_TE, "sigmoid")
    scaled_TD = given.x_TD * sigmoid_TE[np.arange(T), best_T][:, None]
    pairs = [(t, best_T[t], 1.0) for t in np.flatnonzero(given.mask_T)]
    want_TD, _ = reference.experts(scaled_TD, pairs, given.w_in_ED2F, given.w_out_EFD)

    def output(router):
        return mixture(config, router, {}, given.w_in_ED2F, given.w_out_EFD, given.x_TD, context(given.mask_T), None).y_TD

    assert_close(jax.jit(output)(given.router), want_TD)
    gradient = jax.jit(jax.grad(lambda router: jnp.sum(jnp.sin(output(router)))))(given.router)["w_DE"]
    assert np.abs(gradient).max() > 1e-2, "the router learns through the experts' input"


def test_in_a_latent_moe_the_router_sees_the_token_and_experts_see_its_projection():
    rng, given, width = np.random.default_rng(6), inputs(6), 2
    down_DL, up_LD = rng.normal(size=(D, width)).astype(np.float32), rng.normal(size=(width, D)).astype(np.float32)
    w_in = rng.normal(size=(7, width, 2, F)).astype(np.float32)
    w_out = rng.normal(size=(7, F, width)).astype(np.float32)
    config = config_of("latent_moe", dispatch="dense")
    got_TD = mixture(config, given.router, {}, w_in, w_out, given.x_TD, context(given.mask_T), None,
                     (jnp.asarray(down_DL), jnp.asarray(up_LD))).y_TD
    expert_TK, weight_TK = reference.topk(reference.logits(given.x_TD, given.router["w_DE"]), 2, "softmax", True)
    pairs = [(t, expert_TK[t, k], weight_TK[t, k]) for t in np.flatnonzero(given.mask_T) for k in range(2)]
    latent_TL, _ = reference.experts(given.x_TD.astype(np.float64) @ down_DL, pairs, w_in, w_out)
    assert_close(got_TD, latent_TL @ up_LD)


@pytest.mark.parametrize("name, values", [
    ("switch", dict(experts_per_token=1, renormalize=False, capacity_factor=1.25, eval_capacity_factor=2.0, jitter=0.01)),
    ("mixtral", dict(renormalize=True, score="softmax", capacity_factor=None)),
    ("olmoe", dict(renormalize=False, balance_weight=0.01, z_weight=0.001)),
    ("deepseek_v3", dict(score="sigmoid", route_scale=2.5, bias_rate=0.001, balance_scope="sequence")),
    ("loss_free_softmax", dict(score="softmax", bias_rule="proportional", balance_weight=0.0)),
    ("pr_moe", dict(shared_experts=1, shared_gate="softmax"))])
def test_a_preset_sets_what_is_left_to_it_and_a_given_value_wins(name, values):
    for key, value in values.items():
        assert getattr(config_of(name, num_experts=8, experts_per_token="auto"), key) == value
    assert config_of(name, num_experts=8, balance_weight=0.5, experts_per_token="auto").balance_weight == 0.5
