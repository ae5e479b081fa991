"""Pruned and merged experts: scores by hand, and where nothing may be lost nothing is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_batch, tiny_config, tiny_model

from moejax.config import UserError
from moejax.layers.mlp import activate
from moejax.models import surgery, transformer
from moejax.models.few_bits import in_few_bits

SPARSE = ("stack_0", "block_0")


def tiny(**changes):
    """One stack of two sparse blocks: model, variables, batch."""
    config = tiny_config(model__layers=2, moe__first_dense=0, **changes)
    model, params, state = tiny_model(config)
    return model, {"params": params, "router": state}, tiny_batch(config)


def logits(model, variables, batch):
    return np.asarray(jax.jit(lambda v: transformer.apply_batch(model, v["params"], v["router"], batch).logits_BLV)(
        variables))[batch["segments"] > 0]


def with_moe(variables, change, router=None):
    """The variables with change(parameters) of the sparse blocks."""
    stack, block = SPARSE
    own = {**variables["params"][stack][block], "moe": change(dict(variables["params"][stack][block]["moe"]))}
    return {"params": {**variables["params"], stack: {**variables["params"][stack], block: own}},
            "router": router or variables["router"]}


def doubled(variables, score):
    """Expert 1 once more as a sixth; score(column of expert 1) is the sixth's, its bias a little less."""
    def change(moe):
        grown = {name: jnp.concatenate([moe[name], moe[name][:, 1:2]], axis=1) for name in ("w_in", "w_out")}
        if "router_b_E" in moe:
            grown["router_b_E"] = jnp.concatenate([moe["router_b_E"], moe["router_b_E"][..., 1:2] - 1e-3], axis=-1)
        column = moe["router_w_DE"][..., 1:2]
        return moe | grown | {"router_w_DE": jnp.concatenate([moe["router_w_DE"], score(column)], axis=-1)}
    return with_moe(variables, change)


def six(model):
    return model.clone(moe=dataclasses.replace(model.moe, num_experts=6))


@pytest.fixture(scope="module")
def parts():
    return tiny()


def test_uses_are_counted_as_a_loop_over_tokens_counts_them(parts):
    """Of one layer, whose input is what the block's norms make of the stream; twice the batch is twice the sums."""
    model, variables, batch = parts
    first, twice = surgery.calibrate(model, variables, [batch]), surgery.calibrate(model, variables, [batch] * 2)
    _, found = transformer.apply_batch(model, variables["params"], variables["router"], batch,
                                       mutable=["decisions", "inputs"])
    stack, block = SPARSE
    for layer, use in enumerate(first):
        moe = jax.tree.map(lambda a, r=layer: np.asarray(a[r], np.float64), variables["params"][stack][block]["moe"])
        made = jax.tree.map(lambda a, r=layer: np.asarray(a[r]), found["decisions"][stack][block]["moe"]["assignments"][0])
        x_TD = np.asarray(found["inputs"][stack][block]["moe"]["x_TD"][0][layer], np.float64)
        tokens, output = np.zeros(5), np.zeros(5)
        for token, expert, weight, valid in zip(made.token_N, made.expert_N, made.weight_N, made.valid_N):
            if valid:
                h = np.asarray(activate(jnp.einsum("d,dgf->gf", x_TD[token], moe["w_in"][expert])))
                tokens[expert] += 1
                output[expert] += weight * np.linalg.norm(h @ moe["w_out"][expert])
        np.testing.assert_array_equal(use.tokens_E, tokens)
        np.testing.assert_allclose(use.output_E, output, rtol=1e-4)
        np.testing.assert_allclose(use.score("reap"), output / tokens, rtol=1e-4)
        scores_TE = x_TD[batch["segments"].ravel() > 0] @ moe["router_w_DE"]
        np.testing.assert_allclose(use.gram_EE, scores_TE.T @ scores_TE, rtol=1e-4, atol=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-5), first, twice)


@pytest.mark.parametrize("by", surgery.SCORES)
def test_a_duplicated_expert_is_pruned_without_loss(by):
    """With one choice a token, the twin whose bias is a little less is never chosen; sigmoids know no other expert."""
    model, variables, batch = tiny(moe__experts_per_token=1, moe__renormalize=False, moe__score="sigmoid",
                                   moe__options={"bias": True})
    bigger, grown = six(model), doubled(variables, lambda column: column)
    uses = surgery.calibrate(bigger, grown, [batch])
    assert all(use.tokens_E[5] == 0 and use.tokens_E.sum() == (batch["segments"] > 0).sum() for use in uses)
    pruned, left = surgery.prune(bigger, grown, [use.score(by) for use in uses], 5)
    assert pruned.moe.num_experts == 5
    np.testing.assert_allclose(logits(pruned, left, batch), logits(bigger, grown, batch), atol=1e-6)


@pytest.mark.parametrize("choices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_duplicated_expert_is_merged_without_loss(choices):
    """Its units in another order, and its scores another's: tokens that chose either still get the same output."""
    model, variables, batch = tiny(moe__experts_per_token=choices, moe__renormalize=choices > 1)
    order = np.random.default_rng(1).permutation(12)
    grown = with_moe(doubled(variables, lambda column: 1.02 * column), lambda moe: moe | {
        "w_in": moe["w_in"].at[:, 5].set(moe["w_in"][:, 5][..., order]),
        "w_out": moe["w_out"].at[:, 5].set(moe["w_out"][:, 5][:, order])})
    bigger = six(model)
    uses = surgery.calibrate(bigger, grown, [batch])
    # The twins are the most alike, so they and no others become one if the less frequent one does not lead.
    most = [use._replace(tokens_E=np.where(np.arange(6) == min((1, 5), key=lambda e, u=use: u.tokens_E[e]), 0,
                                           np.asarray(use.tokens_E) + 1)) for use in uses]
    merged, left = surgery.merge(bigger, grown, most, 5)
    assert left["params"]["stack_0"]["block_0"]["moe"]["w_in"].shape[1] == 5
    np.testing.assert_allclose(logits(merged, left, batch), logits(bigger, grown, batch), atol=2e-5)
    shapes, _ = transformer.abstract_params(merged)
    jax.tree.map(lambda a, s: np.testing.assert_array_equal(a.shape, s.shape), left["params"], shapes)


def test_groups_follow_frequency_and_likeness():
    gram = np.array([[1, 0.9, 0.1, 0], [0.9, 1, 0, 0], [0.1, 0, 1, 0.6], [0, 0, 0.6, 1]])
    leaders, into = surgery.groups_of(surgery.Use(np.array([5, 1, 2, 9]), np.zeros(4), gram), 2)
    assert leaders.tolist() == [0, 3] and into.tolist() == [0, 0, 1, 1]


def test_merged_weights_are_the_average_by_frequency(parts):
    model, variables, batch = parts
    uses = surgery.calibrate(model, variables, [batch])
    merged, left = surgery.merge(model, variables, uses, 1)
    stack, block = SPARSE
    for layer, use in enumerate(uses):
        own = {name: np.asarray(variables["params"][stack][block]["moe"][name][layer]) for name in ("w_in", "w_out")}
        share = np.asarray(use.tokens_E, np.float64) / use.tokens_E.sum()
        leader = int(np.argmax(share))
        wanted = sum(share[e] * own["w_out"][e][surgery.matching_units(own, leader, e, 2)] for e in range(5))
        np.testing.assert_allclose(left["params"][stack][block]["moe"]["w_out"][layer, 0], wanted, rtol=1e-4, atol=1e-5)
    assert np.isfinite(logits(merged, left, batch)).all()


def test_a_merged_model_trains_and_keeps_its_map():
    model, variables, batch = tiny(moe__bias_rate=0.1)
    merged, left = surgery.merge(model, variables, surgery.calibrate(model, variables, [batch]), 3)
    output = transformer.apply_batch(merged, left["params"], left["router"], batch)
    load = transformer.in_order(output.records)[0].load
    assert load.assigned_E.shape == (3,) and load.received_E.sum() == 2 * (batch["segments"] > 0).sum()
    new = transformer.update_router_state(merged.moe, left["router"], output.records)
    stack, block = SPARSE
    np.testing.assert_array_equal(new[stack][block]["into_E"], left["router"][stack][block]["into_E"])
    assert np.any(new[stack][block]["bias_E"] != 0) and new[stack][block]["bias_E"].shape == (2, 5)


@pytest.mark.parametrize("changes, keep, message", [
    ({}, 1, "fewer than the 2 that a token chooses"), ({}, 6, "6 experts of 5 cannot be kept"),
    ({"moe__router": "hash"}, 3, "only experts of a top-k router"), ({"moe__every": 0}, 3, "has no experts")])
def test_what_cannot_be_pruned_is_an_error(changes, keep, message):
    model, variables, _ = tiny(**changes)
    with pytest.raises(UserError, match=message):
        surgery.prune(model, variables, [np.arange(5)] * 2, keep)


@pytest.mark.parametrize("bits, bound", [(8, 0.02), (4, 0.3)])
def test_experts_in_few_bits_give_nearly_the_same(parts, bits, bound):
    model, variables, batch = parts
    small, rounded = in_few_bits(model, variables, bits)
    stack, block = SPARSE
    own = rounded["params"][stack][block]["moe"]
    assert own["w_in"].nbytes * 32 == variables["params"][stack][block]["moe"]["w_in"].nbytes * bits
    kept, wanted = (jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (
        rounded["params"], transformer.abstract_params(small)[0]))
    assert kept == wanted
    whole, found = logits(model, variables, batch), logits(small, rounded, batch)
    off = np.abs(found - whole).max() / np.abs(whole).max()
    assert 0 < off < bound
    with pytest.raises(UserError, match="not in few bits already"):
        in_few_bits(small, rounded, bits)
