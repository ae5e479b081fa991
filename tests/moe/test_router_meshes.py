"""Every router on eight devices decides, computes and learns what it does on one."""

import functools

import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
import test_routers as laws
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import axes, sharding
from moejax.config import MeshConfig
from moejax.moe.layer import mixture
from moejax.moe.routing import get_router
from moejax.moe.types import RoutingContext, Totals

ROWS, LENGTH, D, F = 8, 6, 5, 4
TOKENS = ROWS * LENGTH
MESH = MeshConfig(data=2, expert=4)
FAST = ("moe_pp", "soft_moe")
"""A token-major list with something added, and a decision of another kind; other families run with `--slow`."""


@functools.partial(jax.jit, static_argnums=0)
def layer(config, leaves, state, rest):
    """Output, load, losses, new router state and all gradients."""
    mask_T, ids_T, carry_TC = rest
    totals = Totals(jnp.sum(mask_T, dtype=jnp.float32), jnp.sum(jnp.any(mask_T.reshape(ROWS, -1), 1), dtype=jnp.float32))
    context = RoutingContext(ids_T, mask_T, totals, whole=None, carry_TC=carry_TC, key=laws.KEY, sequences=ROWS, shards=8,
                             train=True)

    def total(leaves):
        y_TD, record, *_ = mixture(config, leaves["router"], state, leaves["w_in"], leaves["w_out"], leaves["x"], context,
                                   None)
        return jnp.sum(jnp.where(mask_T[:, None], jnp.sin(y_TD), 0)) + sum(record.losses.values()), (y_TD, record)

    gradients, (y_TD, record) = jax.grad(total, has_aux=True)(leaves)
    new = get_router(config.router).update(config, state, record.statistics)
    return y_TD, record.load, record.losses, new, gradients


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in laws.FAMILIES.values()])
def test_eight_devices_equal_one(name):
    """Uneven padding, one row of nothing else; dispatch `auto`."""
    config = laws.config_of(name, dispatch="auto", block_rows=4)
    rng = np.random.default_rng(0)
    mask_BL = np.ones((ROWS, LENGTH), bool)
    mask_BL[1, 4:] = mask_BL[2, 1] = mask_BL[5] = False
    carry = laws.carry_of(config, tokens=TOKENS)
    rest = (jnp.asarray(mask_BL.reshape(-1)), jnp.asarray(rng.integers(0, 1000, TOKENS), jnp.int32), carry)
    leaves = {"x": rng.normal(size=(TOKENS, D)), "router": laws.parameters_of(config),
              "w_in": rng.normal(size=(laws.E, D, 2, F)), "w_out": rng.normal(size=(laws.E, F, D))}
    leaves = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), leaves)
    state = laws.state_of(config)
    want = jax.device_get(layer(config, leaves, state, rest))

    mesh = sharding.make_mesh(MESH)

    def put(a, *spec):
        return jax.device_put(a, NamedSharding(mesh, P(*spec)))

    tokens = axes.TOKEN_AXES
    placed = {"x": put(leaves["x"], tokens), "router": jax.tree.map(put, leaves["router"]),
              "w_in": put(leaves["w_in"], axes.EXPERT), "w_out": put(leaves["w_out"], axes.EXPERT)}
    with jax.set_mesh(mesh):
        got = jax.device_get(layer(config, placed, jax.tree.map(put, state), jax.tree.map(lambda a: put(a, tokens), rest)))
    loads = [load.replace(replayed_E=0) for load in (want[1], got[1])]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5), *loads)
    for a, b in zip(jax.tree.leaves((want[0], want[2:])), jax.tree.leaves((got[0], got[2:])), strict=True):
        reference.assert_close(b, a) if np.any(a) else np.testing.assert_allclose(b, a, atol=1e-6)
