"""Everything that changes from step to step, and how it is made and laid out on a mesh."""

from typing import Any, Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax import sharding


@struct.dataclass
class TrainState:
    """What a checkpoint holds beside the data position.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: float32 parameters.
      opt_state: optax's.
      router_state: the routers' state by stack and block.
      key: PRNG key of the run; step keys are folded from it.
    """

    step: Array
    params: Any
    opt_state: optax.OptState
    router_state: Any
    key: Array


def initialise(initial_params: Callable[[Array], Any], initial_moments: Callable[[Any], optax.OptState],
               router_state: Any, key: Array) -> TrainState:
    """A fresh state; jit it with `state_shardings` so that every array is made where it belongs.

    Args:
      initial_params: key -> parameters.
      initial_moments: parameters -> the optimizer's state.
      router_state: initial.
      key: raw PRNG key (uint32 [2]) of the run.
    """
    init_key, run_key = jax.random.split(key)
    params = initial_params(init_key)
    return TrainState(jnp.zeros((), jnp.int32), params, initial_moments(params), router_state, run_key)


def state_shardings(state: TrainState, moving: Any, logical: Any, mesh: Mesh) -> TrainState:
    """Where each array of a state lies: optimizer moments like their parameters, everything small everywhere.

    Args:
      state: shapes of a state.
      moving: shapes of the parameters that move.
      logical: logical axes of its parameters.
      mesh: the mesh.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = sharding.shardings(logical, mesh)

    def mirror(node: Any, params: Any, where: Any) -> Any:
        """Places a tree that mirrors the parameters, with some of them masked or replaced by smaller statistics."""
        if isinstance(node, dict):
            return {name: mirror(child, params[name], where[name]) for name, child in node.items()}
        if isinstance(node, jax.ShapeDtypeStruct) and node.shape == params.shape:
            return where
        return jax.tree.map(lambda _: everywhere, node)

    def mirrors(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == moving.keys()

    opt_state = jax.tree.map(lambda node: mirror(node, moving, placed) if mirrors(node) else everywhere,
                             state.opt_state, is_leaf=mirrors)
    return TrainState(step=everywhere, params=placed, key=everywhere,
                      opt_state=opt_state,
                      router_state=jax.tree.map(lambda _: everywhere, state.router_state))
