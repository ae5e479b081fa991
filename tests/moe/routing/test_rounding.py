"""Laws of token rounding: the published rule expert by expert, whole tiles, and lists that devices can split."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import B, D, E, K, L, T, config_of, context, eager_route, inputs, matrix, route

from moejax.config import UserError
from moejax.moe.layer import mixture
from moejax.moe.routing import ROUTERS
from moejax.moe.routing.rounding import rounded

ROUTER = ROUTERS["token_rounding"]
rounded = jax.jit(rounded, static_argnums=(3, 4))


def tiled(tile, **changes):
    return config_of("token_rounding", options={"tile": tile}, **changes)


GLOBAL, SEQUENCE = tiled(4), tiled(4, routing_group="sequence", renormalize=True, route_scale=2.5)
SMALL_SEQUENCE = tiled(3, routing_group="sequence")
each = pytest.mark.parametrize("config", [GLOBAL, SEQUENCE, SMALL_SEQUENCE], ids=["global", "sequence", "tile-3"])


def groups_of(config):
    return B if config.routing_group == "sequence" else 1


def kept(score_TE, top_TE, mask_T, groups, tile):
    """Each expert's top-k tokens by score, then its other tokens by score; of these the rounded number. Counts [T, E]."""
    count_TE = np.zeros(top_TE.shape, int)
    for tokens in np.split(np.arange(len(mask_T)), groups):
        real = [t for t in tokens if mask_T[t]]
        for e in range(top_TE.shape[1]):
            by_score = sorted(real, key=lambda t: -score_TE[t, e])
            queue = [t for t in by_score if top_TE[t, e]] + [t for t in by_score if not top_TE[t, e]]
            load = sum(top_TE[t, e] for t in real)
            tiles = load // tile + (2 * (load % tile) >= tile)
            count_TE[queue[:min(tiles, len(real) // tile) * tile], e] = 1
    return count_TE


def formula(config, logits_TE, mask_T):
    """Counts and weights [T, E], and the plain top-k counts."""
    score_TE = reference.softmax(logits_TE)
    top_TE, _ = reference.topk_matrix(logits_TE, np.ones(len(mask_T), bool), config.experts_per_token, "softmax", False)
    count_TE = kept(score_TE, top_TE, mask_T, groups_of(config), config.options.tile)
    weight_TE = config.route_scale * count_TE * score_TE
    if config.renormalize:
        weight_TE /= np.sum(top_TE * score_TE, axis=1, keepdims=True)
    return count_TE, weight_TE, top_TE * mask_T[:, None]


@each
def test_pairs_and_weights_equal_the_formula_and_losses_are_those_of_the_plain_choices(config):
    given = inputs(1)
    out = route(config, given.router, {}, given.x_TD, context(given.mask_T))
    logits_TE = reference.logits(given.x_TD, given.router["w_DE"])
    count_TE, weight_TE, top_TE = formula(config, logits_TE, given.mask_T)
    assert (count_TE < top_TE).any() and (count_TE > top_TE).any(), "pairs must go and come for this test"
    np.testing.assert_array_equal(matrix(out.assignments)[0], count_TE)
    np.testing.assert_allclose(matrix(out.assignments)[1], weight_TE, rtol=2e-6)
    want = reference.balance_loss(logits_TE, top_TE, given.mask_T, "softmax", 1)
    np.testing.assert_allclose(out.losses["balance"], want, rtol=1e-6)
    np.testing.assert_allclose(out.losses["router_z"], reference.z_loss(logits_TE, given.mask_T), rtol=1e-6)
    np.testing.assert_array_equal(out.statistics["assigned_E"], top_TE.sum(0))
    assert ROUTER.loss_weights(config) == {"balance": 0.01, "router_z": 0.001} and ROUTER.needs_whole(config)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(seed=st.integers(0, 10**6), k=st.integers(1, E), sizes=st.sampled_from([(1, 4), (1, 5), (B, 2), (B, L)]),
                  skew=st.sampled_from([0.0, 3.0, 1e4]))
def test_loads_are_whole_tiles_near_the_plain_loads_and_top_k_tokens_come_first(seed, k, sizes, skew):
    """From even loads over one hot expert to logits of 1e4; some scores equal, and any mask."""
    groups, tile = sizes
    rng = np.random.default_rng(seed)
    logits_TE = np.round(rng.normal(size=(T, E)), 1) + skew * np.eye(E)[2]
    mask_T = rng.random(T) < rng.choice([0.0, 0.5, 1.0])
    log_scores_TE = (logits_TE - logits_TE.max(1, keepdims=True)).astype(np.float32)
    expert_TK = np.argsort(-logits_TE, axis=1, kind="stable")[:, :k]
    expert_TK = np.concatenate([expert_TK, expert_TK[:, :1].repeat(E - k, 1)], 1)  # of one shape, so compiled once
    got_GSE = np.asarray(rounded(log_scores_TE, expert_TK, mask_T, groups, tile))
    top_TE = (expert_TK[:, :, None] == np.arange(E)).any(1) & mask_T[:, None]
    score_GSE, top_GSE, real_GS = (np.reshape(a, (groups, T // groups, *np.shape(a)[1:])) for a in (
        log_scores_TE, top_TE, mask_T))
    load_GE, plain_GE, real_G1 = got_GSE.sum(1), top_GSE.sum(1), real_GS.sum(1)[:, None]
    whole_G1 = real_G1 // tile * tile
    assert not got_GSE[~real_GS].any() and (load_GE % tile == 0).all() and (load_GE <= whole_G1).all()
    assert ((2 * abs(load_GE - plain_GE) <= tile) | (load_GE == whole_G1)).all()
    assert (load_GE.sum(1) <= k * T // groups + E * (tile // 2)).all()
    for g, e in np.ndindex(groups, E):
        got_S, top_S, score_S = got_GSE[g, :, e], top_GSE[g, :, e], score_GSE[g, :, e]
        assert not (got_S & ~top_S).any() or got_S[top_S].all()
        for rank_S in (top_S, real_GS[g] & ~top_S):
            assert score_S[got_S & rank_S].min(initial=np.inf) >= score_S[~got_S & rank_S].max(initial=-np.inf)


def test_half_a_tile_rounds_up():
    """Four tokens, tiles of two: expert 0 is chosen by three, expert 1 by one, expert 2 by none."""
    logits_TE = np.array([[3, 1, 0], [2, 0, 0], [4, 0, 1], [0, 5, 1]], np.float32)
    config = tiled(2, num_experts=3, experts_per_token=1)
    out = route(config, {"w_DE": np.eye(3, dtype=np.float32)}, {}, logits_TE, context(np.ones(4, bool), sequences=1))
    np.testing.assert_array_equal(matrix(out.assignments, 4, 3)[0], [[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0]])


def test_tiles_of_one_token_are_plain_top_k():
    given, config = inputs(2), tiled(1, routing_group="sequence")
    out = route(config, given.router, {}, given.x_TD, context(given.mask_T))
    plain = route(config_of(renormalize=False), given.router, {}, given.x_TD, context(given.mask_T))
    for got, want in zip(matrix(out.assignments), matrix(plain.assignments), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_evaluation_is_plain_top_k():
    given, plain = inputs(3), config_of(renormalize=True, route_scale=2.5)
    where = context(given.mask_T, given.ids_T, train=False)
    jax.tree.map(np.testing.assert_array_equal, route(SEQUENCE, given.router, {}, given.x_TD, where),
                 route(plain, given.router, {}, given.x_TD, where))
    assert not ROUTER.causal and ROUTER.generates and ROUTER.by_group


@each
def test_lists_have_room_for_what_rounding_adds_and_equal_parts_keep_to_their_own_tokens(config):
    given = inputs(4)
    a = route(config, given.router, {}, given.x_TD, context(given.mask_T)).assignments
    size, tile, groups = T // groups_of(config), config.options.tile, groups_of(config)
    assert a.choices == 0 and a.local == (config.routing_group == "sequence")
    assert len(a.token_N) == groups * min(K * size + E * (tile // 2), size // tile * tile * E)
    assert (np.asarray(a.token_N).reshape(groups, -1) // size == np.arange(groups)[:, None]).all()
    assert not np.asarray(a.weight_N)[~np.asarray(a.valid_N)].any()


@pytest.mark.parametrize("config", [GLOBAL, SEQUENCE], ids=["global", "sequence"])
def test_the_gradient_is_that_of_the_scores_of_the_pairs_and_of_the_losses(config):
    given, c_TE = inputs(1), np.random.default_rng(0).normal(size=(T, E))
    exact_DE = given.router["w_DE"].astype(np.float64)
    count_TE = formula(config, reference.logits(given.x_TD, exact_DE), given.mask_T)[0]

    def total_of_formula(w_DE):
        logits_TE = reference.logits(given.x_TD, w_DE)
        counts, weight_TE, top_TE = formula(config, logits_TE, given.mask_T)
        assert (counts == count_TE).all()
        return np.sum(weight_TE * c_TE) + reference.balance_loss(logits_TE, top_TE, given.mask_T, "softmax", 1)

    def total(w_DE):
        out = eager_route(config, {"w_DE": w_DE}, {}, given.x_TD, context(given.mask_T))
        # Pairs that are not valid are left in: they must not produce gradients.
        a = out.assignments
        return jnp.sum(a.weight_N * jnp.asarray(c_TE, jnp.float32)[a.token_N, a.expert_N]) + out.losses["balance"]

    steps = 1e-6 * np.eye(D * E).reshape(-1, D, E)
    want = [(total_of_formula(exact_DE + step) - total_of_formula(exact_DE - step)) / 2e-6 for step in steps]
    reference.assert_close(jax.jit(jax.grad(total))(given.router["w_DE"]), np.reshape(want, (D, E)))


def test_the_layer_computes_the_pairs_of_the_list():
    given = inputs(6)
    y_TD, record = jax.jit(mixture, static_argnums=0)(
        GLOBAL, given.router, {}, given.w_in_ED2F, given.w_out_EFD, given.x_TD, context(given.mask_T), None)[:2]
    count_TE, weight_TE, _ = formula(GLOBAL, reference.logits(given.x_TD, given.router["w_DE"]), given.mask_T)
    pairs = [(t, e, weight_TE[t, e]) for t, e in zip(*np.nonzero(count_TE), strict=True)]
    reference.assert_close(y_TD, reference.experts(given.x_TD, pairs, given.w_in_ED2F, given.w_out_EFD)[0])
    np.testing.assert_array_equal(record.load.received_E, count_TE.sum(0))


def test_micro_batches_add_up_where_sequences_are_the_groups():
    given = inputs(7)
    everything = context(given.mask_T)
    whole = route(SEQUENCE, given.router, {}, given.x_TD, everything)
    halves = [route(SEQUENCE, given.router, {}, given.x_TD[part], context(
        given.mask_T[part], sequences=B // 2, totals=everything.totals, whole=whole.statistics))
              for part in (slice(T // 2), slice(T // 2, T))]
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-6),
                 *[jax.tree.map(jnp.add, *[(half.losses, half.statistics) for half in halves]),
                   (whole.losses, whole.statistics)])
    parts = np.concatenate([matrix(half.assignments, T // 2)[1] for half in halves])
    np.testing.assert_allclose(parts, matrix(whole.assignments)[1], rtol=1e-6)


def test_extreme_logits_stay_finite():
    where = context(np.ones(T, bool), np.arange(T, dtype=np.int32))

    @jax.jit
    def run(w_DE):
        def total(w_DE):
            out = eager_route(SEQUENCE, {"w_DE": w_DE}, {}, jnp.ones((T, 1)), where)
            return jnp.sum(out.assignments.weight_N) + sum(out.losses.values()) + out.entropy, out
        return jax.value_and_grad(total, has_aux=True)(w_DE)

    hot_E = np.where(np.arange(E) == 2, 1e4, -60)
    for logit_E in (np.zeros(E), np.resize([60, -60], E), np.resize([1e4, -1e4, 0], E), hot_E):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run(np.float32([logit_E]))))


def test_settings_that_leave_nothing_to_route_or_to_learn_are_refused():
    given = inputs(8)
    with pytest.raises(UserError, match=f"config.moe.options.tile={L + 1} is more than the {L} tokens of a routing group"):
        route(tiled(L + 1, routing_group="sequence"), given.router, {}, given.x_TD, context(given.mask_T))
    with pytest.raises(UserError, match="config.moe.renormalize=True with config.moe.experts_per_token=1"):
        tiled(2, experts_per_token=1, renormalize=True)
