"""Models from the folder of a run."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from moejax import sharding
from moejax.checkpoint import Restored, Store, place, read_config
from moejax.models import transformer


def load(workdir: str | Path, step: int | None = None) -> tuple[transformer.Transformer, Any]:
    """The model of a workdir, on the default device.

    Args:
      workdir: folder of a run.
      step: which checkpoint; None takes the newest.

    Returns:
      The model and its variables, {"params": ..., "router": ...}.

    Raises:
      UserError: no run or no checkpoint there.
    """
    workdir = Path(workdir)
    model = transformer.build(read_config(workdir))
    shapes, _ = abstract_variables(model)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return model, restore(workdir, jax.tree.map(lambda _: here, shapes), model, step).items["model"]


def abstract_variables(model: transformer.Transformer) -> tuple[Any, Any]:
    """Shapes and logical axes of a model's variables; router state is small and has no axes to split."""
    shapes, logical = transformer.abstract_params(model)
    state = jax.eval_shape(lambda: transformer.initial_router_state(model.model, model.moe))
    return ({"params": shapes, "router": state},
            {"params": logical, "router": jax.tree.map(lambda a: (None,) * a.ndim, state)})


def load_sharded(workdir: Path, model: transformer.Transformer, mesh: Mesh, step: int | None = None) -> Restored:
    """Reads the variables of a model (item "model") straight to where they belong on a mesh."""
    _, logical = abstract_variables(model)
    return restore(workdir, sharding.shardings(logical, mesh), model, step)


def restore(workdir: Path, shardings: Any, model: transformer.Transformer, step: int | None) -> Restored:
    """Reads the item "model" of a checkpoint with the given shardings."""
    store = Store(workdir, read_only=True)
    try:
        return store.restore({"model": place(abstract_variables(model)[0], shardings)}, step)
    finally:
        store.close()
