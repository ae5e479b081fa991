"""Memory that importing an open checkpoint takes beside the parameters themselves.

    python -m benchmarks.import_memory --layers=8 --experts=16

Writes a random Mixtral to a temporary folder, imports it in a fresh process, and prints one JSON object: MiB of the
parameters, of the largest tensor on disk and of the largest parameter, and by how much the import raised the process's peak
beyond the parameters. Memory is what no file backs; pages of the files themselves come and go as the system likes.

On CPU (jax 0.10.2): 102 MiB beyond 824 MiB of parameters, and with --layers=4 --experts=8 88 MiB beyond 236 MiB, the code
of the programs that fill the parameters included. The largest tensor has 16 MiB, the largest parameter 512 and 128 MiB.
"""

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Iterator

MIB = 2**20


def write_checkpoint(folder: Path, layers: int, experts: int) -> None:
    """A random model of width 512, written as a Mixtral."""
    import jax

    import moejax
    from moejax import config as config_lib
    from moejax.models import transformer
    config = transformer.resolve(config_lib.build({
        "model": {"vocab_size": 8192, "layers": layers, "embed": 512, "heads": 8, "kv_heads": 4, "head_dim": 64},
        "moe": {"router": "mixtral", "num_experts": experts, "ffn": 1024}}))
    model = transformer.build(config)
    params = jax.jit(lambda key: transformer.initial_params(model, key))(jax.random.key(0))
    variables = {"params": params, "router": transformer.initial_router_state(config.model, config.moe)}
    moejax.to_hf(model, variables, folder, family="mixtral")


def anonymous() -> int:
    """Bytes of this process's memory that no file backs (Linux): pages of the checkpoint that are mapped can be dropped."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """Inside, keeps the largest `anonymous` in the list, looking every two milliseconds."""
    most, done = [anonymous()], threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous())

    thread = threading.Thread(target=look)
    thread.start()
    yield most
    done.set()
    thread.join()


def measure(folder: Path) -> dict[str, float]:
    """Imports a checkpoint in this process."""
    import jax
    import jax.numpy as jnp

    import moejax
    from moejax.hf.disk import Files
    from moejax.sharding import bytes_of
    jax.block_until_ready(jnp.ones(8) + 1)  # what the library itself takes
    files = Files(folder)
    largest = max(4 * math.prod(files.shape(name)) for name in files.file_of)
    before, begin = anonymous(), time.monotonic()
    with watched() as most:
        _, params = moejax.from_hf(folder)
        jax.block_until_ready(params)
    return {"parameters": bytes_of(params) / MIB, "largest_tensor": largest / MIB,
            "largest_parameter": max(leaf.nbytes for leaf in jax.tree.leaves(params)) / MIB,
            "peak_beyond_parameters": (most[0] - before - bytes_of(params)) / MIB, "seconds": time.monotonic() - begin}


def main() -> None:
    """Writes, then measures in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps({name: round(value, 1) for name, value in measure(given.measure).items()}))
        return
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "checkpoint"
        write_checkpoint(folder, given.layers, given.experts)
        subprocess.run([sys.executable, __file__, f"--measure={folder}"], check=True)


if __name__ == "__main__":
    main()
