"""Models from the folder of a run."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from moejax import sharding
from moejax.checkpoint import Restored, Store, place, read_config
from moejax.finetune import PLAIN, Finetune
from moejax.models import adapters, transformer


def load(workdir: str | Path, step: int | None = None) -> tuple[transformer.Transformer, Any]:
    """The model of a workdir, on the default device.

    Args:
      workdir: folder of a run.
      step: which checkpoint; None takes the newest that is good, and says so if that is not the newest.

    Returns:
      The model and its variables, {"params": ..., "router": ...}.

    Raises:
      UserError: no run or no good checkpoint there.
    """
    workdir = Path(workdir)
    model, options = model_of(workdir)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes, logical = abstract_variables(model, options)
    return model, restore(workdir, options, shapes, logical, jax.tree.map(lambda _: here, shapes), step).items["model"]


def model_of(workdir: Path) -> tuple[transformer.Transformer, Finetune]:
    """The model of a workdir's config, and with which adapters it is stored. Raises `UserError` as `read_config` does."""
    config = transformer.resolve(read_config(workdir))
    return transformer.build(config), config.train.finetune


def abstract_variables(model: transformer.Transformer, options: Finetune = PLAIN) -> tuple[Any, Any]:
    """Shapes and logical axes of a model's variables; router state is small and has no axes to split.

    With adapters, if the options ask for some.
    """
    shapes, logical = adapters.abstract(*transformer.abstract_params(model), options)
    state = jax.eval_shape(lambda: transformer.initial_router_state(model.model, model.moe))
    return ({"params": shapes, "router": state},
            {"params": logical, "router": jax.tree.map(lambda a: (None,) * a.ndim, state)})


def load_sharded(workdir: Path, mesh: Mesh, step: int | None = None) -> Restored:
    """Reads the variables of a workdir's model (item "model") straight to where they belong on a mesh.

    Raises:
      UserError: as `load`, or a dimension that the mesh does not divide.
    """
    model, options = model_of(workdir)
    shapes, logical = abstract_variables(model, options)
    sharding.placements(shapes, logical, mesh)  # which raises if the mesh cannot split it
    return restore(workdir, options, shapes, logical, sharding.shardings(logical, mesh), step)


def restore(workdir: Path, options: Finetune, shapes: Any, logical: Any, shardings: Any, step: int | None) -> Restored:
    """Reads the item "model" of a checkpoint with the given shardings, and adds adapters to the matrices.

    Args:
      workdir: of the run.
      options: of its adapters.
      shapes, logical: as `abstract_variables` gives them.
      shardings: of each array.
      step: which checkpoint; None takes the newest that is good.
    """
    store = Store(workdir, read_only=True)
    try:
        read = store.restore({"model": place(shapes, shardings)}, step)
    finally:
        store.close()
    variables = read.items["model"]
    if adapters.ADAPTERS in variables["params"]:
        own, placed = ({name: part for name, part in tree["params"].items() if name != adapters.ADAPTERS}
                       for tree in (logical, shardings))
        merge = jax.jit(partial(adapters.merge, own, options), out_shardings=placed)
        variables = {**variables, "params": merge(variables["params"])}
    return read._replace(items={"model": variables})
