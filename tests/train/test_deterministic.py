"""The same seed gives the same bits twice on one topology, in programs that were compiled apart."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import tiny_batch, tiny_config

from moejax.config import MeshConfig, UserError
from moejax.train.setup import set_up


def three_steps(config):
    jax.clear_caches()
    setup = set_up(config)
    state = setup.initialise()
    for _ in range(3):
        state, means, _ = setup.train_step(state, setup.put(tiny_batch(config)))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state, means))]


@pytest.mark.parametrize("mesh", (MeshConfig(), pytest.param(MeshConfig(data=4, replica=2), marks=pytest.mark.slow)))
def test_three_steps_twice(mesh):
    config = dataclasses.replace(tiny_config(model__dropout=0.1, moe__jitter=0.1, moe__bias_rate=0.1), mesh=mesh)
    first = three_steps(config)
    assert first == three_steps(config)
    assert first != three_steps(dataclasses.replace(config, seed=1))


def test_deterministic_programs_do_without_cudnn():
    deterministic = {"train__faults": {"deterministic": True}}
    setups = [set_up(tiny_config(**changes)) for changes in (deterministic, {})]
    assert [one.model.model.attention for one in setups] == ["plain", "auto"]
    assert [one.config.model.attention for one in setups] == ["auto", "auto"]  # as the workdir keeps it
    with pytest.raises(UserError, match="attention=cudnn gives other bits each time"):
        set_up(tiny_config(model__attention="cudnn", **deterministic))
