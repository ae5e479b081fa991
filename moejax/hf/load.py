"""From a folder of an open checkpoint to a model and its parameters."""

from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from tqdm import tqdm

from moejax import config as config_lib
from moejax import sharding
from moejax.bounded import read_object
from moejax.config import Config, UserError, check
from moejax.evaluation.load import abstract_variables
from moejax.hf import tensors
from moejax.hf.disk import Files
from moejax.hf.families import FAMILIES
from moejax.hf.family import Family, Options
from moejax.models import stacks, transformer
from moejax.sharding import flat

DEFAULT_LENGTH = 256
MOST_LINES = 1 << 18
"""Of a table; those of the largest open models have 70,000. A damaged config.json may ask for any number."""


def from_hf(folder: str | Path, mesh: Mesh | None = None, *, dtype: str = "float32", progress: bool = False
            ) -> tuple[transformer.Transformer, Any]:
    """A model and its variables from a local folder with config.json and *.safetensors.

    Tensors are read one by one, straight to where they belong, so that beside the parameters themselves memory holds about
    one tensor at a time.

    Args:
      folder: of the checkpoint.
      mesh: devices over which the parameters are split; None takes the default device.
      dtype: compute type of the model; parameters are float32.
      progress: show a bar.

    Returns:
      The model and {"params": ..., "router": ...}.

    Raises:
      UserError: an architecture or option that is not implemented; a tensor that is missing, not needed, of the wrong
        shape or type, or not finite.
    """
    folder = Path(folder)
    family, config = read_config(folder, dtype)
    model = transformer.build(config)
    return model, read_variables(folder, family, model, mesh, progress)


def read_config(folder: Path, dtype: str = "float32") -> tuple[Family, Config]:
    """The family of a checkpoint, and its config.json as ours. Raises `UserError` on what is not implemented."""
    path = folder / "config.json"
    values = read_object(path, "give the folder of a checkpoint with config.json and *.safetensors", "fetch it again")
    name = values.get("model_type")
    families = [family for family in FAMILIES.values() if family.model_type == name]
    known = sorted({family.model_type for family in FAMILIES.values()})
    check(bool(families), f"{path}: model_type={name!r} is not implemented; there are {', '.join(known)}")
    named = values.get("architectures") or [families[0].architecture]
    family = next((family for family in families if named == [family.architecture]), None)
    check(family is not None, f"{path}: architectures={named} is not implemented, only "
          f"{' or '.join(family.architecture for family in families)}")
    check(not values.get("quantization_config"), f"{path}: option quantization_config is not implemented; dequantise the "
          "checkpoint first")
    return family, interpret(family, Options(values, str(path)), dtype)


def interpret(family: Family, options: Options, dtype: str = "float32") -> Config:
    """Options of a family as a resolved config. Raises `UserError` on what is not implemented."""
    try:
        settings = family.read(options)
        length = min(DEFAULT_LENGTH, settings["model"]["max_length"])
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{options.where}: an option has a value that it cannot have ({error})") from None
    options.finish()
    settings["model"]["architecture"] |= {"family": family.name or family.model_type}
    try:
        return transformer.resolve(config_lib.build(
            {"moe": {"every": 0}, **settings, "data": {"length": length}, "train": {"dtype": dtype}}))
    except UserError as error:
        raise UserError(f"{options.where}: {error}") from None


def read_variables(folder: Path, family: Family, model: transformer.Transformer, mesh: Mesh | None, progress: bool) -> Any:
    """The variables of a model from the tensors of a folder. Raises `UserError` as `from_hf` does."""
    files = Files(folder)
    shapes, logical = abstract_variables(model)
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        where = jax.tree.map(lambda _: here, shapes)
    else:
        sharding.validate(sharding.placements(shapes, logical, mesh), mesh, float("inf"))
        where = sharding.shardings(logical, mesh)
    table = choose_table(family, model, files)
    leaves, places = flat(shapes), stacks.places(model.model, model.moe)
    check_complete(files, family, model, table, leaves, places)
    where_of = flat(where)
    variables = {path: jax.jit(partial(jnp.zeros, leaf.shape, leaf.dtype), out_shardings=where_of[path])()
                 for path, leaf in leaves.items()}
    wanted = {disk: lines for disk, lines in table.items() if tensors.needed(lines)}
    for disk, lines in tqdm(wanted.items(), desc=f"reading {folder}", unit="tensor", disable=not progress):
        on_disk = files.read(disk)
        for line in (line for line in lines if line.unread is None):
            path, index = tensors.locate(line, places)
            part = on_disk if line.part is None else on_disk.take(range(*line.part), axis=line.axis)
            piece = tensors.to_piece(line, part, tensors.piece_shape(index, leaves[path].shape))
            single = tuple(axis for axis, i in enumerate(index) if i is not None)
            start = np.zeros(leaves[path].ndim, np.int32)
            start[:len(index)] = [i or 0 for i in index]
            variables[path] = _fill(where_of[path])(variables[path], piece, single, start)
    return jax.tree.unflatten(jax.tree.structure(shapes), variables.values())


def choose_table(family: Family, model: transformer.Transformer, files: Files) -> dict[str, list[tensors.Tensor]]:
    """The table of the layout of which fewer names are missing."""
    tables = [tensors.by_disk(islice(family.tensors(model.model, model.moe, other), MOST_LINES)) for other in (False, True)]
    return min(tables, key=lambda table: len(missing_of(files, table)))


def missing_of(files: Files, table: Mapping[str, list[tensors.Tensor]]) -> list[str]:
    """Names of tensors that a table needs and that are not there."""
    return [name for name, lines in table.items() if name not in files.file_of and tensors.needed(lines)]


def check_complete(files: Files, family: Family, model: transformer.Transformer, table: Mapping[str, list[tensors.Tensor]],
                   leaves: Mapping[tuple[str, ...], Any], places: Sequence[tuple[str, str, int]]) -> None:
    """Raises `UserError` unless every tensor on disk is used and there with the right shape."""
    missing = missing_of(files, table)
    check(not missing, f"{files.folder}: tensor {missing and missing[0]} is missing ({len(missing)} in all)")
    extra = [name for name in files.file_of
             if name not in table and not name.endswith(family.unused) and not name.startswith(family.beside)]
    if model.model.tie_embeddings and family.tied[0] in extra:
        extra.remove(family.tied[0])
        own, tied = family.tied
        check(np.array_equal(files.read(own), files.read(tied)),
              f"{files.folder}: tie_word_embeddings is set, but tensor {own} differs from {tied}")
    check(not extra, f"{files.folder}: tensor {extra and extra[0]} is not part of the model ({len(extra)} in all)")
    for disk, lines in ((disk, lines) for disk, lines in table.items() if disk in files.file_of):
        path, index = tensors.locate(lines[0], places)
        wanted = list(lines[0].unread or tensors.disk_shape(lines[0], tensors.piece_shape(index, leaves[path].shape)))
        if lines[0].part is not None:
            wanted[lines[0].axis] = max(line.part[1] for line in lines)
        check(files.shape(disk) == tuple(wanted), f"{files.folder}: tensor {disk} has shape {files.shape(disk)}, but by "
              f"config.json it should be {tuple(wanted)}")


@lru_cache
def _fill(where: jax.sharding.Sharding) -> Any:
    """`_write` in place, for parameters that lie there."""
    return jax.jit(_write, static_argnums=2, donate_argnums=0, out_shardings=where)


def _write(parameter: Array, piece: Array, single: tuple[int, ...], start: Array) -> Array:
    """The parameter with a piece, which lacks the `single` axes, from an index on."""
    return jax.lax.dynamic_update_slice(parameter, jnp.expand_dims(piece, single).astype(parameter.dtype), tuple(start))
