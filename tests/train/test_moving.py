"""What moves in a run: laws of patterns, blocks and factors, through whole train steps."""

from functools import partial

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny import tiny_batch, tiny_config, tiny_functions, tiny_model

from moejax.config import UserError
from moejax.models import adapters, transformer
from moejax.train.moving import join
from moejax.train.optimizer import make_optimizer
from moejax.train.state import TrainState
from moejax.train.step import train_step


def stepped(steps=2, config=None, **options):
    """Parameters before and after some steps by path, and the optimizer's state."""
    config = tiny_config(**{"train__finetune": options, **(config or {})})
    model, params, router_state = tiny_model(config)
    functions, chosen = tiny_functions(config, model)
    shapes, logical = adapters.abstract(*transformer.abstract_params(model), config.train.finetune)
    if adapters.ADAPTERS in shapes:
        params = params | {adapters.ADAPTERS: adapters.initial(
            shapes[adapters.ADAPTERS], logical[adapters.ADAPTERS], jax.random.key(0))}
    optimizer = chosen.scaled(make_optimizer(config.optimizer, config.train.steps, chosen.split(logical)[0]))
    state = TrainState(np.int32(0), params, optimizer.init(chosen.split(params)[0]), router_state, jax.random.PRNGKey(0))
    step = jax.jit(partial(train_step, functions, optimizer, 1))
    for seed in range(steps):
        state, _, _ = step(state, tiny_batch(config, seed))
    before, after = flatten_dict(params), flatten_dict(state.params)
    return {path: np.asarray(after[path] - before[path]) for path in before}, state


@pytest.mark.slow
def test_a_frozen_pattern_stays_and_has_no_moments():
    moved, state = stepped(freeze=("embedding/*", "*/moe/w_*"))
    for path, by in moved.items():
        assert np.any(by) != (path[0] == "embedding" or path[-2:] in (("moe", "w_in"), ("moe", "w_out"))), path
    kept = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
    assert (2, 5, 24, 2, 12) not in kept and (37, 24) not in kept


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow),
                                  pytest.param("adafactor", marks=pytest.mark.slow)])
def test_only_what_train_names_moves(name):
    moved, _ = stepped(train=("*/moe/router_*", "final_norm/scale"), config={"optimizer__name": name})
    assert {path[-1] for path, by in moved.items() if np.any(by)} == {"router_w_DE", "scale"}


@pytest.mark.slow
def test_frozen_blocks_stay_and_the_others_move_as_without_clipping_by_them():
    moved, state = stepped(freeze_blocks=(0, 2), config={"moe__router": "loss_free"})
    bias_RE = np.asarray(state.router_state["stack_1"]["block_0"]["bias_E"])
    assert np.any(bias_RE[0]) and not np.any(bias_RE[1])
    for path, by in moved.items():
        if path[0] == "stack_0":
            assert not np.any(by)
        elif path[0] == "stack_1":
            assert np.any(by[0]) and not np.any(by[1]), path
        else:
            assert np.any(by), path


def test_what_stays_counts_for_nothing_and_its_router_state_follows():
    """Block 0 is stack_0, blocks 1 and 2 are the repeats of stack_1."""
    config = tiny_config(train__finetune={"freeze_blocks": (0, 2)}, moe__router="loss_free")
    _, params, router_state = tiny_model(config)
    functions, chosen = tiny_functions(config, transformer.build(config))
    grads = jax.tree.map(lambda a: np.full(a.shape, np.nan), chosen.split(params)[0])
    for path, grad in flatten_dict(functions.counted(grads)).items():
        assert np.isnan(grad[0] if path[0] == "stack_1" else grad).all(), path
        assert path[0] != "stack_1" or not np.any(grad[1])
    new = chosen.following(router_state, jax.tree.map(lambda a: a + 1, router_state))
    changed = {path: np.any(np.asarray(leaf), axis=1).tolist() for path, leaf in flatten_dict(new).items()}
    assert changed == {("stack_1", "block_0", "bias_E"): [True, False]}
    _, adapted = tiny_functions(tiny_config(train__finetune={"lora_rank": 2}, moe__router="loss_free"),
                                transformer.build(config))
    assert not np.any(flatten_dict(adapted.following(router_state, new))["stack_1", "block_0", "bias_E"])


@pytest.mark.slow
def test_layer_decay_scales_the_rate_by_depth():
    """The first step of Adam without decay is the rate times the gradient's sign, so factors can be read off."""
    config = {"optimizer__weight_decay": 0.0, "optimizer__clip_norm": None, "optimizer__eps": 1e-20}
    (whole, _), (scaled, _) = stepped(1, config), stepped(1, config, layer_decay=0.5)
    wanted = {("embedding", "table"): 0.5**4, ("embedding", "head"): 1.0, ("final_norm", "scale"): 1.0,
              ("stack_0", "block_0", "attention", "w_q"): 0.5**3}
    for path, factor in wanted.items():
        np.testing.assert_allclose(scaled[path], factor * whole[path], rtol=1e-3, atol=1e-7)
    path = ("stack_1", "block_0", "moe", "w_in")
    for layer, factor in enumerate((0.25, 0.5)):
        np.testing.assert_allclose(scaled[path][layer], factor * whole[path][layer], rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_with_adapters_nothing_else_moves():
    moved, state = stepped(lora_rank=2, lora=("*attention/w_*", "*/moe/w_*"))
    for path, by in moved.items():
        assert np.any(by) == (path[0] == adapters.ADAPTERS), path
    assert (2, 5, 24, 2, 12) not in {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}


def test_parts_join_to_the_whole():
    config = tiny_config(train__finetune={"freeze": ["*/attention/*"]})
    model, params, _ = tiny_model(config)
    _, chosen = tiny_functions(config, model)
    one, other = chosen.split(params)
    assert set(flatten_dict(one)).isdisjoint(flatten_dict(other))
    jax.tree.map(np.testing.assert_array_equal, join(one, other), params)


@pytest.mark.parametrize("options, message", [
    ({"freeze": ["*atention*"]}, "freeze: '.atention.' matches no parameter"),
    ({"train": ["stack_7/*"]}, "train: 'stack_7/.' matches no parameter"),
    ({"freeze": ["*"]}, "leaves nothing that moves"),
    ({"freeze_blocks": [3]}, r"freeze_blocks=\(3,\) names blocks beyond the 3"),
    ({"lora_rnk": 2}, "unknown config key config.train.finetune.lora_rnk .did you mean lora_rank"),
    ({"lora_alpha": 8.0}, "lora_alpha has no effect without"), ({"teacher_weight": 0.1}, "has no effect without"),
    ({"metric": "f1_macro"}, "metric=f1_macro is not measured here; there are loss, perplexity")])
def test_what_cannot_be_is_an_error(options, message):
    with pytest.raises(UserError, match=message):
        config = tiny_config(train__finetune=options)
        tiny_functions(config, transformer.build(config))


def test_a_new_head_for_classes_moves_with_the_adapters():
    config = tiny_config(train__finetune={"lora_rank": 2}, model__kind="encoder", model__head="classes")
    _, chosen = tiny_functions(config, transformer.build(config))
    assert {path[0] for path in chosen.paths} == {adapters.ADAPTERS, "pooled"}
