"""Every objective with every kind of model that it is defined for: two steps, in which routers and experts learn."""

import itertools

import jax
import numpy as np
import optax
import pytest
from tiny import tiny_config, tiny_functions, tiny_model

from moejax.data.prepared import TokenStream
from moejax.data.rows import make_rows
from moejax.data.tokenizers import ByteTokenizer
from moejax.moe.routing import ROUTERS
from moejax.task import LABELS, OBJECTIVES, PAIRS
from moejax.train.state import TrainState
from moejax.train.step import gradients

LEARNED = ("topk", "expert_choice", "soft_moe")
SETTINGS = {"lory": {"segment": 2}, "token_rounding": {"tile": 4}, "sparse_mixer": {"jitter_eps": 0.5},
            "mixture_of_depths": {"share": 0.5}}
"""Options of routers whose defaults are made for longer sequences than those here."""
FAST = {("prefix_lm", "decoder", "topk"), ("classification", "encoder", "soft_moe")}
CASES = [pytest.param(name, kind, router, marks=[] if (name, kind, router) in FAST else pytest.mark.slow)
         for name, objective in OBJECTIVES.items() for kind, router in itertools.product(objective.kinds, ROUTERS)]
CLASSES = {"regression": 1, "multi_label": 3}


def case(name, kind, router):
    """A config and two batches of 8 rows. Attention follows the sparse block, so that a head of one token hears of all."""
    config = tiny_config(
        model__kind=kind, model__head=OBJECTIVES[name].head, model__classes=CLASSES.get(name, 3), model__vocab_size=300,
        model__layers=2, model__max_length=40, moe__router=router, moe__sparse_blocks=(0,), moe__num_experts=8,
        moe__experts_per_token="auto", moe__options=SETTINGS.get(router),
        moe__allow_noncausal_routing=True, data__length=20, data__source_length=24 if kind == "encoder_decoder" else None,
        data__task={"objective": name})
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, 16 * 30).astype(np.uint16)
    starts = np.arange(0, len(tokens), 30)
    tokens[starts] = 256
    more = {}
    if OBJECTIVES[name].data == LABELS:
        more["labels"] = {"classification": rng.integers(0, 3, 16).astype(np.int32),
                          "regression": rng.normal(size=16).astype(np.float32),
                          "multi_label": (rng.random((16, 3)) < 0.5).astype(np.float32)}[name]
    if OBJECTIVES[name].data == PAIRS:
        more["target"] = TokenStream(rng.integers(0, 256, 16 * 9).astype(np.uint16), np.arange(0, 16 * 9, 9), 1, 16)
    rows = make_rows(TokenStream(tokens, starts, len(tokens), 16, **more), ByteTokenizer(), config)
    made = [rows.make(i, np.random.default_rng(i)) for i in range(16)]
    return config, [{key: np.stack([row[key] for row in part]) for key in part[0]} for part in (made[:8], made[8:])]


@pytest.mark.parametrize("name, kind, router", CASES)
def test_two_steps(name, kind, router):
    config, batches = case(name, kind, router)
    model, params, router_state = tiny_model(config)
    functions, optimizer = tiny_functions(config, model)[0], optax.adam(1e-2)

    @jax.jit
    def step(state, batch):
        grads, means, _ = gradients(functions, state, batch, 1)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates),
                             opt_state=opt_state), grads, means

    state = TrainState(np.int32(0), params, jax.jit(optimizer.init)(params), router_state, jax.random.key(0))
    for batch in batches:
        state, grads, means = step(state, batch)
        assert np.isfinite(float(means["loss"])) and float(means["loss"]) > 0
        flat = {jax.tree_util.keystr(path): np.abs(np.asarray(leaf)) for path, leaf in
                jax.tree_util.tree_leaves_with_path(grads)}
        assert all(np.isfinite(leaf).all() for leaf in flat.values())
        routers = [leaf.max() for path, leaf in flat.items() if "router" in path]
        blocks = ROUTERS[router].level == "block"  # whose experts are the blocks themselves
        experts = [leaf.max() for path, leaf in flat.items() if ("'moe'" in path or blocks) and "w_in" in path]
        assert min(experts) > 0 and bool(routers) == bool(ROUTERS[router].parameters(config.moe, config.model.embed))
        assert max(routers, default=1) > 0
        still = {path for path, leaf in flat.items() if leaf.max() == 0}
        assert router not in (*LEARNED, "hash") or not still, still


QUICK = {("masked_lm", "encoder"), ("seq2seq", "encoder_decoder"), ("classification", "encoder"), ("prefix_lm", "decoder")}


@pytest.mark.parametrize("name, kind, router", [
    pytest.param(name, kind, router, marks=[] if router == "topk" and (name, kind) in QUICK else pytest.mark.slow)
    for name, objective in OBJECTIVES.items() for kind in objective.kinds
    for router in ("topk", "expert_choice", "hash", "soft_moe")])
def test_padding_rows_and_batch_mates_change_nothing(name, kind, router):
    """The sums of a batch are those of its rows alone, and a row of zeros adds nothing."""
    config, (batch, _) = case(name, kind, router)
    model, params, router_state = tiny_model(config)
    functions, _ = tiny_functions(config, model)

    @jax.jit
    def sums(batch):
        x, _ = functions.forward(params, router_state, batch)
        return functions.objective(params, x, batch)[1]

    def part(rows, zeros):
        return {key: np.concatenate([a[rows], np.zeros((zeros, *a.shape[1:]), a.dtype)]) for key, a in batch.items()}

    whole = sums(batch)
    parts = [sums(part(slice(0, 5), 3)), sums(part(slice(5, 8), 5))]
    for key, value in whole.items():
        np.testing.assert_allclose(float(parts[0][key]) + float(parts[1][key]), float(value), rtol=2e-5)


def test_the_classes_of_a_config_weigh_as_it_says():
    """Rows of a class without weight count for nothing, those of another three times."""
    def objective(**task):
        config = tiny_config(model__kind="encoder", model__head="classes", model__classes=3, model__layers=1,
                             moe__first_dense=0, data__task={"objective": "classification", **task})
        functions, _ = tiny_functions(config, tiny_model(config)[0])
        batch = {"targets": np.array([0, 2, 1, 2]), "mask": np.array([True, True, True, False])}
        return functions.objective({}, np.random.default_rng(0).normal(size=(4, 3)), batch)

    (plain, plain_sums), (weighed, sums) = objective(), objective(labels=["a", "b", "c"], class_weights=[0.0, 1.0, 3.0])
    losses = -np.asarray(jax.nn.log_softmax(np.random.default_rng(0).normal(size=(4, 3))))
    np.testing.assert_allclose([plain, weighed], [losses[0, 0] + losses[1, 2] + losses[2, 1],
                                                  3 * losses[1, 2] + losses[2, 1]], rtol=1e-5)
    assert plain_sums["loss"] == sums["loss"] == plain
