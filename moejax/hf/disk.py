"""Folders of open checkpoints: config.json and safetensors files, one or several with an index."""

import json
from pathlib import Path
from typing import Any, Callable, Mapping

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moejax.bounded import read_object
from moejax.config import UserError, check

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 2**30


class Files:
    """The tensors of a folder, read one by one.

    Raises:
      UserError: no safetensors file, or one that is missing, damaged, or not in the folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if (folder / INDEX).exists():
            where = read_object(folder / INDEX, "check its permissions", "fetch it again").get("weight_map")
            check(isinstance(where, dict) and all(isinstance(name, str) for name in where.values()),
                  f"{folder / INDEX}: has no weight_map; fetch it again")
            names = sorted(set(where.values()))
            for name in names:
                check(Path(name).name == name, f"{folder / INDEX}: names {name!r}, which is not a file of the folder")
        else:
            # Beside the model's own file there may be others: adapters, gradients, the same in another layout.
            single = [SINGLE] if (folder / SINGLE).exists() else []
            names = single or sorted(path.name for path in folder.glob("*.safetensors"))
            check(bool(names), f"{folder}: holds no *.safetensors; other formats (.bin, .pt) can run code when they are "
                  "read and are not supported: save the model with safetensors first")
        self.file_of: dict[str, str] = {}
        self._open = {}
        for name in names:
            try:
                self._open[name] = safe_open(folder / name, framework="np")
            except (OSError, SafetensorError, UnicodeError) as error:
                raise UserError(f"{folder / name}: cannot be read ({error}); fetch it again") from None
            for tensor in self._open[name].keys():
                check(tensor not in self.file_of,
                      f"{folder}: tensor {tensor} is in both {self.file_of.get(tensor)} and {name}")
                self.file_of[tensor] = name

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Of a tensor, which is not read."""
        return tuple(self._slice(tensor).get_shape())

    def dtype(self, tensor: str) -> str:
        """Of a tensor, as safetensors names it: F32, BF16 ..."""
        return self._slice(tensor).get_dtype()

    def _slice(self, tensor: str) -> Any:
        return self._open[self.file_of[tensor]].get_slice(tensor)

    def read(self, tensor: str) -> np.ndarray:
        """A tensor as float32. Raises `UserError` on other types than floats and on values that are not finite."""
        dtype, where = self.dtype(tensor), f"{self.folder / self.file_of[tensor]}: tensor {tensor}"
        check(dtype in ("F64", "F32", "F16", "BF16"), f"{where} is of type {dtype}; only float32, bfloat16 and float16 are "
              "supported, so dequantise the checkpoint first")
        values = np.asarray(self._open[self.file_of[tensor]].get_tensor(tensor)).astype(np.float32)
        check(bool(np.isfinite(values).all()), f"{where} holds values that are not finite; the file is damaged, or was "
              "saved from a run that diverged")
        return values


def write(folder: Path, tensors: Mapping[str, Callable[[], np.ndarray]], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes tensors (name -> function that makes the array) in files of at most `shard_bytes`; several get an index.

    Raises:
      OSError: the folder cannot be written.
    """
    held: dict[str, np.ndarray] = {}
    parts, held_bytes, total = [], 0, 0
    for name, make in tensors.items():
        array = np.ascontiguousarray(make())
        if held and held_bytes + array.nbytes > shard_bytes:
            parts.append(_write_part(folder, len(parts), held))
            held, held_bytes = {}, 0
        held[name] = array
        held_bytes, total = held_bytes + array.nbytes, total + array.nbytes
    parts.append(_write_part(folder, len(parts), held))
    if len(parts) == 1:
        parts[0][0].rename(folder / SINGLE)
        return
    where = {}
    for number, (path, names) in enumerate(parts, 1):
        final = f"model-{number:05}-of-{len(parts):05}.safetensors"
        path.rename(folder / final)
        where |= dict.fromkeys(names, final)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))


def _write_part(folder: Path, number: int, tensors: dict[str, np.ndarray]) -> tuple[Path, list[str]]:
    path = folder / f".part-{number}.safetensors"
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # which is all that it says of a full disk
        raise OSError(0, str(error)) from None
    return path, list(tensors)
