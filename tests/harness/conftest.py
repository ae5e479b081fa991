"""Untrained decoders of bytes with a short context, as workdirs."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from moejax.checkpoint.made import save_model
from moejax.config import build, default
from moejax.data.tokenizers import ByteTokenizer
from moejax.models import transformer

ROOM = 24


def save_run(folder, task=None, vocab_size=257, **architecture):
    """Writes a model of that `config.data.task` to the folder, and returns the folder."""
    tree = default()
    tree.model.update(dict(vocab_size=vocab_size, layers=2, embed=16, heads=2, kv_heads=1, head_dim=8, ffn=12,
                           max_length=ROOM))
    tree.moe.update(dict(num_experts=3, experts_per_token=2))
    tree.data.length, tree.data.task, tree.model.architecture = ROOM, task, architecture or None
    config = transformer.resolve(build(tree))
    model = transformer.build(config)
    tokens = np.zeros((1, 4), np.int32)
    router = transformer.initial_router_state(config.model, config.moe)
    params = model.init(jax.random.key(0), tokens, tokens, tokens + 1, router)["params"]
    params = jax.tree.map(lambda a: a + 0.1 * np.sin(np.arange(a.size)).reshape(a.shape), nn.meta.unbox(params))  # no zeros
    (folder / "data").mkdir(parents=True)
    ByteTokenizer().save(folder / "data")
    save_model(folder, folder, config, {"params": params, "router": router})
    return folder


@pytest.fixture(scope="session")
def make_run():
    return save_run
