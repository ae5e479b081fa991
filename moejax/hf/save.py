"""From a model and its parameters to a folder that other libraries load."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import ml_dtypes
import numpy as np

from moejax.checkpoint.made import built_beside, check_free
from moejax.config import ModelConfig, MoEConfig, UserError, check, flatten, to_dict
from moejax.evaluation.load import abstract_variables
from moejax.hf import disk, tensors
from moejax.hf.families import FAMILIES
from moejax.hf.family import Family, Options
from moejax.hf.load import interpret
from moejax.models import stacks, transformer
from moejax.moe.routing import get_router
from moejax.sharding import flat

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def to_hf(model: transformer.Transformer, params: Mapping[str, Any], folder: str | Path, *, family: str | None = None,
          dtype: str = "float32", options: Mapping[str, Any] | None = None, shard_bytes: int = disk.SHARD_BYTES,
          more: Callable[[Path], None] | None = None) -> None:
    """Writes config.json and *.safetensors, or nothing.

    Args:
      model: the model.
      params: {"params": ..., "router": ...}.
      folder: to be made; an empty one will do.
      family: a name in `moejax.hf.FAMILIES`; None takes that from which the model came.
      dtype: of the tensors: float32, bfloat16 or float16.
      options: more options of config.json, such as ids of special tokens; those of the model itself win.
      shard_bytes: of a file, at most.
      more: writes other files into the folder, such as a tokenizer's.

    Raises:
      UserError: a model that the family cannot express, an unknown family or dtype, values that are not finite in it, or a
        folder with something in it, or that cannot be written.
    """
    folder, name = Path(folder), family or model.model.architecture.family
    check(name in FAMILIES, f"family={name!r} must be one of {', '.join(FAMILIES)}")
    check(dtype in DTYPES, f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    check_free(folder)
    chosen = FAMILIES[name]
    values = express(chosen, model)
    shapes = flat(abstract_variables(model)[0])
    places = stacks.places(model.model, model.moe)
    table = tensors.by_disk(chosen.tensors(model.model, model.moe, False))
    left = set(shapes) - {tensors.locate(line, places)[0] for lines in table.values() for line in lines}
    check(not left, f"parameter {'/'.join(min(left, default=()))} has no place in a model of type {name}")
    variables = flat({"params": params["params"], "router": params["router"]})
    named = {"model_type": chosen.model_type, "architectures": [chosen.architecture], "torch_dtype": dtype}
    unknown = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # else defaults, which may be no ids at all
    written = {**unknown, **(options or {}), **values, **named}
    for names in ("id2label", "label2id"):
        if names in values and len((options or {}).get(names) or ()) == len(values[names]):
            written[names] = options[names]
    written.pop("dtype", None)
    if "rope_theta" in values:  # two spellings of one thing could contradict each other
        written.pop("rope_parameters", None)
    with built_beside(folder) as part:
        disk.write(part, {name: partial(gather, lines, variables, places, DTYPES[dtype]) for name, lines in table.items()},
                   shard_bytes)
        (part / "config.json").write_text(json.dumps(written, indent=2) + "\n")
        if more is not None:
            more(part)


COMPUTED = ("experts_per_token", "num_experts", "latent_divisor", "shared_experts", "shared_gate", "score", "renormalize",
            "route_scale", "options", "eval_capacity_factor", "capacity_places")
"""Keys of `config.moe` that change what a model computes, beside widths, routers and which blocks are sparse."""


def express(family: Family, model: transformer.Transformer) -> dict[str, Any]:
    """The options of config.json. Raises `UserError` if, read again, they would give another model."""
    name = family.name or family.model_type
    try:
        values = family.write(model.model, model.moe)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError, LookupError):
        raise UserError(f"this model cannot be written as a model of type {name}: other routers or blocks") from None
    again = interpret(family, Options(values, f"as a model of type {name}"))
    mine, theirs = computed(model.model, model.moe), computed(again.model, again.moe)
    for key in sorted(mine.keys() | theirs.keys()):
        one, other = mine.get(key), theirs.get(key)
        floats = isinstance(one, float) and isinstance(other, float)
        same = math.isclose(one, other, rel_tol=1e-9) if floats else one == other
        check(same, f"config.{key}={one!r} cannot be written as a model of type {name}, which would have {other!r}")
    return values


def computed(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """What changes a model's outputs, by the dotted names of the keys."""
    sparse, hidden = [kind.sparse for kind in stacks.kinds(model, moe)], moe.ffn or model.ffn
    own = flatten({"model": to_dict(model)})
    for name in ("dropout", "architecture.family", *(["ffn"] if all(sparse) else [])):
        del own[f"model.{name}"]
    own["moe.every"] = sparse
    if model.kind == "encoder_decoder":
        own["model.encoder_layers"] = stacks.trunks(model)[0].layers
    del own["model.architecture.encoder_sparse_blocks"]  # told by `sparse`
    if model.head != "tokens":
        for name in ("tie_embeddings", "architecture.head_bias", "architecture.head_layer"):
            del own[f"model.{name}"]
    if not any(sparse):
        return own
    return own | flatten({"moe": {
        "ffn": hidden, "router": get_router(moe.router).route, "bias_rate": moe.bias_rate > 0,
        "shared_ffn": (moe.shared_ffn or moe.shared_experts * hidden) if moe.shared_experts else 0,
        **{key: value for key, value in to_dict(moe).items() if key in COMPUTED}}})


def gather(lines: Sequence[tensors.Tensor], variables: Mapping[tuple[str, ...], Any],
           places: Sequence[tuple[str, str, int]], dtype: Any) -> np.ndarray:
    """A tensor as it lies on disk, of the parameters of which it is made. Raises `UserError` if it is not finite there."""
    parts = []
    for line in sorted(lines, key=lambda line: line.part or (0, 0)):
        if line.unread is not None:
            parts.append(np.zeros(line.unread, dtype))
            continue
        path, index = tensors.locate(line, places)
        parts.append(tensors.to_disk(line, np.asarray(variables[path][tensors.slices(index)])))
    whole = np.concatenate(parts, axis=lines[0].axis)
    with np.errstate(over="ignore"):
        made = whole.astype(dtype)
    check(bool(np.isfinite(made).all()), f"tensor {lines[0].disk} holds values that are not finite"
          + (f" as {np.dtype(dtype).name}; write it as bfloat16 or float32" if np.isfinite(whole).all() else
             "; the model has diverged, take an earlier --step"))
    return made
