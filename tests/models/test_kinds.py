"""Encoders, encoders with decoders and prefixes: what sees what, and the cache against one forward pass."""

import jax
import numpy as np
import pytest
from tiny import tiny_config, tiny_model

from moejax import generate, logits
from moejax.config import UserError
from moejax.layers.relative import buckets_by_distance
from moejax.models import transformer

DESIGNS = {
    "rotary": {},
    "relative": {"positions": "relative", "relative_buckets": 8, "relative_distance": 6, "attention_scale": 1.0},
    "bert": {"norm": "layer", "norm_place": "sum", "embedding_norm": True, "final_norm": False, "positions": "learned",
             "activation": "gelu", "head_layer": True, "head_bias": True, "token_types": 2},
}
RNG = np.random.default_rng(0)
TOKENS, SOURCE = RNG.integers(1, 37, (2, 9)), RNG.integers(1, 37, (2, 7))


def model_of(kind, design="rotary", **changes):
    sizes = {"model__layers": 2, "moe__first_dense": 0}  # one stack, compiled once
    return tiny_model(tiny_config(**{**sizes, **changes}, model__kind=kind, model__architecture=DESIGNS[design]))


def variables(params, state):
    return {"params": params, "router": state}


slow = pytest.mark.slow
every_design = pytest.mark.parametrize("design", [
    design if design in ("bert", "relative") else pytest.param(design, marks=slow) for design in DESIGNS])


def changed(tokens, column):
    other = tokens.copy()
    other[:, column] = (other[:, column] + 5) % 37
    return other


@every_design
def test_tokens_of_an_encoder_see_each_other_and_padding_changes_nothing(design):
    model, params, state = model_of("encoder", design)
    given = variables(params, state)
    whole = np.asarray(logits(model, given, TOKENS))
    moved = np.abs(np.asarray(logits(model, given, changed(TOKENS, 8))) - whole).max(axis=(0, 2))
    assert (moved > 1e-4).all()
    mask = np.ones((2, 12), bool)
    mask[:, :3] = False
    junk = np.concatenate([RNG.integers(1, 37, (2, 3)), TOKENS], axis=1)
    np.testing.assert_allclose(np.asarray(logits(model, given, junk, mask))[:, 3:], whole, atol=1e-5)
    np.testing.assert_allclose(np.asarray(logits(model, given, TOKENS[1:])), whole[1:], atol=1e-5)


@pytest.mark.parametrize("design", [pytest.param("rotary", marks=slow), "relative"])
def test_a_decoder_sees_all_of_the_encoder_and_what_is_before(design):
    model, params, state = model_of("encoder_decoder", design, model__encoder_layers=1)
    given = variables(params, state)
    whole = np.asarray(logits(model, given, SOURCE, decoder_tokens=TOKENS))
    by_source = np.asarray(logits(model, given, changed(SOURCE, 6), decoder_tokens=TOKENS))
    assert (np.abs(by_source - whole).max(axis=(0, 2)) > 1e-4).all()
    by_later = np.asarray(logits(model, given, SOURCE, decoder_tokens=changed(TOKENS, 5)))
    np.testing.assert_allclose(by_later[:, :5], whole[:, :5], atol=1e-6)
    assert (np.abs(by_later - whole).max(axis=(0, 2))[5:] > 1e-4).all()

    mask = np.arange(11) >= 4
    junk = np.concatenate([RNG.integers(1, 37, (2, 4)), SOURCE], axis=1)
    padded = np.asarray(logits(model, given, junk, np.tile(mask, (2, 1)), TOKENS))
    np.testing.assert_allclose(padded, whole, atol=1e-5)
    unrolled = np.asarray(logits(model.clone(scan=False), given, SOURCE, decoder_tokens=TOKENS))
    np.testing.assert_allclose(unrolled, whole, atol=1e-5)


@pytest.mark.parametrize("design", [pytest.param("rotary", marks=slow), "relative"])
def test_decoding_with_a_cache_is_the_argmax_of_full_passes(design):
    model, params, state = model_of("encoder_decoder", design)
    given = variables(params, state)
    sources = [SOURCE[0].tolist(), SOURCE[1, :4].tolist()]
    made = generate(model, given, sources, max_new_tokens=6)
    for source, row in zip(sources, made.tokens):
        said = [0, *row.tolist()]
        scores = np.asarray(logits(model, given, [source], decoder_tokens=[said[:-1]]))
        np.testing.assert_array_equal(scores[0].argmax(axis=-1), said[1:])


def test_a_prefix_is_seen_from_before_it_and_decoding_agrees():
    model, params, state = model_of("decoder")
    given = variables(params, state)
    prefix = np.tile(np.arange(9) < 4, (2, 1))
    whole = np.asarray(logits(model, given, TOKENS, prefix=prefix))
    inside = np.abs(np.asarray(logits(model, given, changed(TOKENS, 3), prefix=prefix)) - whole).max(axis=(0, 2))
    assert (inside > 1e-4).all()
    behind = np.abs(np.asarray(logits(model, given, changed(TOKENS, 6), prefix=prefix)) - whole).max(axis=(0, 2))
    assert (behind[:6] < 1e-6).all() and (behind[6:] > 1e-4).all()
    assert np.abs(np.asarray(logits(model, given, TOKENS)) - whole).max() > 1e-3

    made = generate(model, given, [TOKENS[0, :5].tolist(), TOKENS[1, :3].tolist()], max_new_tokens=4, prefix=True)
    for length, tokens, row in zip((5, 3), TOKENS, made.tokens):
        said = [*tokens[:length].tolist(), *row.tolist()]
        scores = np.asarray(logits(model, given, [said[:-1]], prefix=[np.arange(length + 3) < length - 1]))
        np.testing.assert_array_equal(scores[0, length - 1:].argmax(axis=-1), said[length:])


def test_a_prefix_stays_within_its_part_of_chunked_attention():
    """Parts of four: tokens of the prefix see all of their own part and nothing of others; in one block."""
    model, params, state = tiny_model(tiny_config(model__layers=1, moe__first_dense=1, model__architecture={
        "attention": ("chunked",), "window": 4}))
    given, prefix = variables(params, state), np.ones((2, 9), bool)
    whole = np.asarray(logits(model, given, TOKENS, prefix=prefix))
    moved = np.abs(np.asarray(logits(model, given, changed(TOKENS, 5), prefix=prefix)) - whole).max(axis=(0, 2)) > 1e-5
    assert np.flatnonzero(moved).tolist() == [4, 5, 6, 7]


def test_padding_between_tokens_is_refused_where_distances_are_slots():
    model, params, state = model_of("encoder", "relative")
    with pytest.raises(UserError, match="not between them"):
        logits(model, variables(params, state), TOKENS, np.arange(9)[None].repeat(2, 0) != 4)
    both, params, state = model_of("encoder_decoder", "relative")
    gap, mask = np.insert(SOURCE, 3, 1, axis=1), np.arange(8)[None].repeat(2, 0) != 3
    found, wanted = (generate(both, variables(params, state), *source, max_new_tokens=5) for source in (
        (gap, mask), (SOURCE,)))
    np.testing.assert_array_equal(found.tokens, wanted.tokens)


@pytest.mark.parametrize("pool", ["first", pytest.param("last", marks=slow), pytest.param("mean", marks=slow)])
def test_scores_of_a_row_know_no_padding(pool):
    config = tiny_config(model__kind="encoder", model__head="classes", model__classes=5, model__architecture={
        "pool": pool, "pooler": pool == "first"})
    model, params, state = tiny_model(config)
    given = variables(params, state)
    whole = np.asarray(logits(model, given, TOKENS))
    assert whole.shape == (2, 5)
    mask = np.tile((np.arange(13) >= 2) & (np.arange(13) < 11), (2, 1))
    junk = np.concatenate([RNG.integers(1, 37, (2, 2)), TOKENS, RNG.integers(1, 37, (2, 2))], axis=1)
    np.testing.assert_allclose(np.asarray(logits(model, given, junk, mask)), whole, atol=1e-5)


def test_token_types_count():
    model, params, state = model_of("encoder", "bert")
    given = variables(params, state)
    one, other = (np.asarray(logits(model, given, TOKENS, types=np.full((2, 9), kind))) for kind in (0, 1))
    np.testing.assert_allclose(one, np.asarray(logits(model, given, TOKENS)), atol=1e-6)
    assert np.abs(one - other).max() > 1e-3


def test_classes_of_distance_by_hand():
    """Of 8: distances 0 to 3 alone, then up to 6 in logarithmic steps; both ways, half of them for each side."""
    assert buckets_by_distance(8, 6, True).tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 6, 7]
    assert buckets_by_distance(8, 6, False).tolist() == [7, 7, 7, 6, 6, 5, 0, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("changes, words", [
    ({"model__encoder_layers": 2}, "needs config.model.kind=encoder_decoder"),
    ({"model__kind": "encoder", "data__task": {"objective": "next_token"}}, "next_token needs config.model.kind=decoder"),
    ({"model__head": "classes", "data__task": {"objective": "prefix_lm"}}, "prefix_lm needs .* config.model.head=tokens"),
    ({"model__architecture": {"pooler": True}}, "pooler needs config.model.head=classes or none"),
    ({"model__kind": "encoder", "model__architecture": {"positions": "relative", "relative_buckets": 2}}, "at least 4"),
    ({"model__kind": "encoder_decoder", "model__qk_norm": True}, "qk_norm is not implemented"),
    ({"model__head": "classes", "model__architecture": {"pool": "first"}}, "sees nothing of the text; take last or mean"),
    ({"model__architecture": {"start_token": 99}}, "start_token=99 is not in the vocabulary"),
    ({"model__architecture": {"head_layer": True}}, "head_layer needs an activation without a gate"),
])
def test_what_does_not_go_together(changes, words):
    with pytest.raises(UserError, match=words):
        tiny_config(**changes)


def test_encoders_and_classifiers_generate_nothing_and_others_want_their_inputs():
    model, params, state = model_of("encoder")
    with pytest.raises(UserError, match="generates nothing"):
        generate(model, variables(params, state), TOKENS)
    with pytest.raises(UserError, match="leave out"):
        logits(model, variables(params, state), TOKENS, decoder_tokens=TOKENS)
    both, params, state = model_of("encoder_decoder")
    with pytest.raises(UserError, match="give"):
        logits(both, variables(params, state), TOKENS)


@pytest.mark.slow
def test_parts_of_a_batch_are_normalised_by_the_whole_of_each_trunk():
    model, params, state = model_of("encoder_decoder", moe__balance_scope="sequence")
    batch = {"tokens": TOKENS, "positions": np.tile(np.arange(9), (2, 1)), "segments": np.ones((2, 9), int),
             "source_tokens": SOURCE, "source_positions": np.tile(np.arange(7), (2, 1)),
             "source_segments": np.ones((2, 7), int)}

    def losses(part, totals=None):
        output = transformer.apply_batch(model, params, state, part, totals=totals)
        return jax.tree.map(lambda record: record.losses, output.records, is_leaf=lambda node: hasattr(node, "losses"))

    totals = transformer.count_totals(batch["segments"], batch["source_segments"])
    assert {name: int(total.tokens) for name, total in totals.items()} == {"": 18, "encoder_": 14}
    parts = [losses({name: a[i:i + 1] for name, a in batch.items()}, totals) for i in range(2)]
    jax.tree.map(lambda a, b, whole: np.testing.assert_allclose(a + b, whole, rtol=1e-5), *parts, losses(batch))
