"""Low-rank adapters: a matrix W counts as W + alpha / rank * down @ up, and only down and up learn. LoRA, Hu et al. 2021,
arXiv 2106.09685.

They are parameters beside the model's, under `ADAPTERS`, with the paths of the matrices that they belong to. Every stacked
matrix (of a layer, of an expert, of gate and up) has its own. They are added to the matrices before the model runs, so all
that takes a model's parameters takes the sum, and the model itself knows nothing of them. A training step holds the sums
and their gradients, but no optimizer state but that of the adapters.
"""

import math
import string
from typing import Any, Mapping

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from moejax import axes
from moejax.config import check
from moejax.finetune import Finetune, matching
from moejax.matrices import is_matrix, sides

ADAPTERS = "adapters"
"""Where the adapters are among the parameters."""


def abstract(shapes: Mapping[str, Any], logical: Mapping[str, Any], options: Finetune) -> tuple[dict, dict]:
    """Shapes and logical axes of parameters with the adapters that the options ask for.

    Args:
      shapes, logical: of the model's parameters.
      options: which matrices get adapters, and of which rank.

    Raises:
      UserError: a pattern that matches no weight matrix.
    """
    if not options.lora_rank:
        return dict(shapes), dict(logical)
    matrices = {path: names for path, names in flatten_dict(logical).items() if is_matrix(names)}
    names_of = {"/".join(path): path for path in matrices}
    chosen = [names_of[name] for name in sorted(matching(options.lora, names_of, "lora"))]
    flat_shapes, added_shapes, added_names = flatten_dict(shapes), {}, {}
    for path in chosen:
        names, shape = matrices[path], flat_shapes[path].shape
        stacked, inputs, outputs = dimensions(names)
        check(options.lora_rank < min(math.prod(shape[i] for i in side) for side in (inputs, outputs)),
              f"config.train.finetune.lora_rank={options.lora_rank} is not below the rank of {'/'.join(path)}; lower it")
        for side, which in (("down", (*stacked, *inputs, None)), ("up", (*stacked, None, *outputs))):
            added_names[*path, side] = tuple("rank" if i is None else names[i] for i in which)
            added_shapes[*path, side] = jax.ShapeDtypeStruct(
                tuple(options.lora_rank if i is None else shape[i] for i in which), jnp.float32)
    return ({**shapes, ADAPTERS: unflatten_dict(added_shapes)}, {**logical, ADAPTERS: unflatten_dict(added_names)})


def dimensions(names: tuple[str | None, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Positions of the axes that stack matrices, of their inputs and of their outputs."""
    inputs, outputs = sides(names)
    return tuple(i for i, name in enumerate(names) if name in axes.STACKING_AXES), inputs, outputs


def initial(shapes: Mapping[str, Any], logical: Mapping[str, Any], key: Array) -> dict[str, Any]:
    """Fresh adapters: `down` normal with variance 1 / inputs, `up` zero, so that at first nothing changes.

    Args:
      shapes, logical: of the adapters.
      key: PRNG key.
    """
    drawn, flat_names = {}, flatten_dict(logical)
    for i, (path, shape) in enumerate(sorted(flatten_dict(shapes).items())):
        inner = [n for n, name in zip(shape.shape, flat_names[path]) if name not in axes.STACKING_AXES]
        drawn[path] = jnp.zeros(shape.shape) if path[-1] == "up" else (
            math.prod(inner[:-1])**-0.5 * jax.random.normal(jax.random.fold_in(key, i), shape.shape))
    return unflatten_dict(drawn)


def merge(logical: Mapping[str, Any], options: Finetune, params: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own parameters, adapters added; without adapters the parameters as they are.

    Args:
      logical: axes of the model's parameters.
      options: which say how much adapters count.
      params: with or without adapters.
    """
    if ADAPTERS not in params:
        return dict(params)
    own = flatten_dict({name: tree for name, tree in params.items() if name != ADAPTERS})
    flat_names, pairs = flatten_dict(logical), flatten_dict(params[ADAPTERS])
    for path in sorted({path[:-1] for path in pairs}):  # processes must trace the same program
        letters = dict(enumerate(string.ascii_lowercase))
        stacked, inputs, outputs = ("".join(letters[i] for i in part) for part in dimensions(flat_names[path]))
        whole = "".join(letters[i] for i in range(own[path].ndim))
        product = jnp.einsum(f"{stacked}{inputs}z,{stacked}z{outputs}->{whole}", pairs[*path, "down"], pairs[*path, "up"])
        own[path] = own[path] + options.lora_alpha / options.lora_rank * product
    return unflatten_dict(own)
