"""Tiny models and batches with all dimensions different, shared by the tests."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax import config as config_lib
from moejax.config import Config
from moejax.matrices import matrix_axes
from moejax.models import adapters, transformer
from moejax.train.moving import moving
from moejax.train.setup import make_functions


def tiny_config(**changes) -> Config:
    """A 3-layer decoder of width 24 with a dense first layer and 5 experts; changes are `group__key=value`."""
    tree = config_lib.default()
    tree.model.update(dict(vocab_size=37, layers=3, embed=24, heads=4, kv_heads=2, head_dim=6, ffn=20, max_length=64))
    tree.moe.update(dict(num_experts=5, experts_per_token=2, ffn=12, first_dense=1, block_rows=3))
    tree.data.update(dict(length=14, batch_size=8))
    tree.optimizer.update(dict(learning_rate=1e-2, warmup_steps=3))
    tree.train.update(dict(steps=20))
    for name, value in changes.items():
        group, _, key = name.rpartition("__")
        (tree[group] if group else tree)[key] = value
    return transformer.resolve(config_lib.build(tree))


def tiny_batch(config: Config, seed: int = 0, padded: int = 3) -> dict[str, np.ndarray]:
    """Random tokens with two packed documents a row; row r ends in r * padded padding positions, up to half the row."""
    rng = np.random.default_rng(seed)
    batch, length = config.data.batch_size, config.data.length
    tokens = rng.integers(0, config.model.vocab_size, (batch, length + 1), dtype=np.int32)
    real = np.arange(length) < length - np.minimum(np.arange(batch) * padded, length // 2)[:, None]
    cut = rng.integers(2, length // 2, (batch, 1))
    slots = np.arange(length)
    segments = np.where(real, np.where(slots < cut, 1, 2), 0).astype(np.int32)
    positions = np.where(slots < cut, slots, slots - cut).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": real, "segments": segments,
            "positions": positions}


def tiny_model(config: Config, seed: int = 0):
    """A model, random parameters whose logits are far from ties, and its router state.

    The parameters come from numpy: compiling the real initialisation takes seconds.
    """
    model = transformer.build(config)
    rng = np.random.default_rng(seed)
    shapes, logical = transformer.abstract_params(model)

    def draw(shape, names):
        if len(matrix_axes(names)) < 2:
            return jnp.float32(1 + 0.3 * rng.normal(size=shape.shape))  # a norm's scale
        return jnp.float32(rng.normal(size=shape.shape) * config.model.embed**-0.5)

    params = jax.tree.map(draw, shapes, logical)
    return model, params, transformer.initial_router_state(model.model, model.moe)


def tiny_functions(config: Config, model: transformer.Transformer):
    """What a train step is made of, and the parameters that move."""
    shapes, logical = transformer.abstract_params(model)
    _, all_logical = adapters.abstract(shapes, logical, config.train.finetune)
    chosen = moving(config.train.finetune, config.model, config.moe, all_logical)
    return make_functions(config, model, chosen, logical), chosen


def relative_errors(got, wanted) -> dict[str, float]:
    """Per leaf, the largest error over the largest value; stacked experts [layers, E, ...] each on their own."""
    errors = {}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        each = tuple(range(2, a.ndim)) if a.ndim >= 4 and "moe" in jax.tree_util.keystr(path) else None
        scale = np.abs(b).max(axis=each)
        errors[jax.tree_util.keystr(path)] = float(np.max(np.abs(a - b).max(axis=each) / np.where(scale == 0, 1, scale)))
    return errors


def positions_of(tokens) -> jnp.ndarray:
    """0, 1, ... in every row."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
