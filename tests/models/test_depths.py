"""Mixture-of-Depths: who is worked on, what passes, and that decoding agrees with reading at once."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_batch, tiny_config, tiny_model

from moejax.evaluation.causality import leak
from moejax.generation import cache
from moejax.layers.attention import Sight
from moejax.models import transformer
from moejax.models.blocks import Block
from moejax.models.depths import DepthRouted
from moejax.models.sight import look
from moejax.models.stacks import Kind, trunks
from moejax.models.stream import Stream

SHARE = 0.3


def model_of(share=SHARE):
    config = tiny_config(moe__router="mixture_of_depths", moe__options={"share": share}, moe__first_dense=0, moe__every=2,
                         moe__allow_noncausal_routing=True, model__layers=4)
    return config, *tiny_model(config)


def one_block(config, train, x_BLD, batch, seed=0, share=SHARE):
    """A depth-routed block alone: what goes in, what comes out, its record and its parameters."""
    model = transformer.build(config)
    block = DepthRouted(model.moe, partial(Block, model.model, model.moe, Kind(False, "full"), jnp.float32))
    mask = jnp.asarray(batch["segments"] > 0)
    context = transformer.RoutingContext(
        jnp.asarray(batch["tokens"]).reshape(-1), mask.reshape(-1), transformer.count_totals(batch["segments"])[""],
        whole=None, carry_TC=None, key=None, sequences=len(mask), shards=1, train=train)
    sight = look(model.model, trunks(model.model)[0], jnp.asarray(batch["positions"]), jnp.asarray(batch["segments"]))
    shared = sight, None, context
    params = jax.tree.map(lambda a: jnp.asarray(np.random.default_rng(seed).normal(size=a.shape) * 0.3, jnp.float32),
                          jax.eval_shape(lambda: transformer.nn.meta.unbox(block.init(
                              jax.random.key(0), Stream(x_BLD), {"": {}}, {}, None, *shared))))
    stream, record, _ = jax.jit(lambda params: block.apply(params, Stream(x_BLD), {"": {}}, {}, None, *shared))(params)
    inner = Block(model.model, model.moe, Kind(False, "full"), jnp.float32)
    return stream.x_BLD, record[""], params["params"], lambda x, sight: inner.apply(
        {"params": params["params"]["block"]}, Stream(x), {}, {}, None, sight, None, context)[0].x_BLD, sight


@pytest.mark.parametrize("train", [pytest.param(True, marks=pytest.mark.slow), pytest.param(False, marks=pytest.mark.slow)])
def test_a_block_works_on_its_tokens_as_if_the_others_were_not_there(train):
    """Row by row, the chosen tokens alone go through the plain block; others come out bit by bit as they were."""
    config, *_ = model_of()
    batch = tiny_batch(config)
    x_BLD = jnp.asarray(np.random.default_rng(1).normal(size=(*batch["tokens"].shape, 24)), jnp.float32)
    y_BLD, record, params, plain, sight = one_block(config, train, x_BLD, batch)
    chosen = 0
    for b, real in enumerate(batch["segments"] > 0):
        score_L = np.asarray(x_BLD[b]) @ np.asarray(params["router_w_D1"][:, 0])
        if train:
            best = sorted(np.flatnonzero(real), key=lambda t, s=score_L: -s[t])[:math.ceil(SHARE * real.sum())]
        else:
            best = np.flatnonzero(real & (np.asarray(x_BLD[b]) @ np.asarray(params["router_predictor_D1"][:, 0]) > 0))
        on = np.sort(np.asarray(best, int))
        chosen += len(on)
        want_LD = np.array(x_BLD[b])
        if len(on):
            alone = x_BLD[b:b + 1, on]
            changed = plain(alone, Sight(*(a[b:b + 1, on] for a in (sight.cos, sight.sin)),
                                         {"full": sight.visible["full"][b:b + 1][:, on][:, :, on]}))
            want_LD[on] += score_L[on, None] * np.asarray(changed - alone)[0]
        np.testing.assert_allclose(y_BLD[b], want_LD, rtol=1e-4, atol=1e-5)
        off = np.setdiff1d(np.arange(len(real)), on)
        np.testing.assert_array_equal(y_BLD[b][off], x_BLD[b][off])
    assert record.load.assigned_E.tolist() == record.load.received_E.tolist() == [chosen] and chosen > 0


def test_a_predictor_makes_evaluation_causal_and_training_is_not():
    config, model, params, state = model_of()
    batch = {name: jnp.asarray(value) for name, value in tiny_batch(config, padded=0).items()}
    variables = {"params": params, "router": state}
    assert float(jnp.abs(leak(model, variables, batch, train=True)).max()) > 1e-3
    assert float(jnp.abs(leak(model, variables, batch, train=False)).max()) < 1e-6


def test_decoding_token_by_token_equals_reading_at_once():
    config, model, params, state = model_of()
    tokens = jnp.asarray(tiny_batch(config)["tokens"][:3, :9])
    positions, real = jnp.broadcast_to(jnp.arange(9), tokens.shape), jnp.ones(tokens.shape, bool)
    variables = {"params": params, "router": state}
    want = jax.jit(model.apply)({"params": params}, tokens, positions, real.astype(jnp.int32), state).logits_BLV
    step = jax.jit(partial(cache.extend, model))
    memory, got = cache.empty(model, 3, 9), []
    for begin, end in ((0, 5), *((t, t + 1) for t in range(5, 9))):
        logits, memory = step(variables, memory, tokens[:, begin:end], positions[:, begin:end], real[:, begin:end], begin)
        got.append(logits)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, rtol=2e-4, atol=2e-5)


def test_the_predictor_alone_learns_from_its_loss():
    config, model, params, state = model_of()
    batch = tiny_batch(config)

    def loss(params):
        out = model.apply({"params": params}, batch["tokens"], batch["positions"], batch["segments"], state, train=True)
        return sum(jnp.sum(record.losses["predictor"]) for record in transformer.in_order(out.records))

    gradients = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.any(leaf) == ("predictor" in jax.tree_util.keystr(path)), path
