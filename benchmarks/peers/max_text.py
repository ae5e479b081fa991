"""The train step of MaxText's Mixtral in the shape of experiments/bench_mixtral_small.py.

    python3.12 -m venv peer && peer/bin/pip install uv
    peer/bin/uv pip install --python peer/bin/python 'maxtext[tpu]==0.2.5' --resolution=lowest
    peer/bin/python benchmarks/peers/max_text.py --experts=capacity

The last line is a JSON object with `tokens_per_second`. It runs in an environment of its own and needs nothing of moejax.
`capacity` drops tokens over 1.25 times an expert's share, `dense` and `ragged_dot` drop none.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

EXPERTS = {
    "capacity": {"capacity_factor": 1.25, "sparse_matmul": False, "megablox": False},
    "dense": {"capacity_factor": -1.0, "sparse_matmul": False, "megablox": False},
    "ragged_dot": {"capacity_factor": -1.0, "sparse_matmul": True, "megablox": False},
}
SHAPE = {
    "decoder_block": "mixtral", "vocab_size": 8192, "base_emb_dim": 256, "base_num_decoder_layers": 4,
    "base_num_query_heads": 4, "base_num_kv_heads": 4, "head_dim": 64, "base_mlp_dim": 512, "base_moe_mlp_dim": 512,
    "num_experts": 8, "num_experts_per_tok": 2, "max_target_length": 256, "per_device_batch_size": 8,
    "dtype": "float32", "weight_dtype": "float32",
}
REST = {
    "run_name": "peer", "hardware": "cpu", "dataset_type": "synthetic", "enable_checkpointing": False,
    "attention": "dot_product", "skip_jax_distributed_system": True, "enable_goodput_recording": False,
    "gradient_clipping_threshold": 1.0,
}


def step_seconds(settings: dict[str, object], steps: int) -> float:
    """Median seconds of a step, from MaxText's log; the first half, in which it compiles and runs ahead, is left out."""
    package = importlib.util.find_spec("maxtext")
    if package is None or package.origin is None:
        sys.exit("maxtext is not installed in this environment; the top of this file says how to make one")
    config = pathlib.Path(package.origin).parent / "configs" / "base.yml"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "maxtext.trainers.pre_train.train", str(config), f"steps={steps}",
                   f"base_output_directory={folder}", *(f"{name}={value}" for name, value in settings.items())]
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    seconds = [float(found) for found in re.findall(r"completed step: \d+, seconds: ([0-9.]+)", run.stdout + run.stderr)]
    if run.returncode != 0 or len(seconds) < steps:
        sys.exit(f"MaxText ended with status {run.returncode}:\n{run.stdout[-1000:]}\n{run.stderr[-2000:]}")
    return statistics.median(seconds[steps // 2:])


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", default="capacity", choices=sorted(EXPERTS))
    parser.add_argument("--remat", default="minimal_with_context", help="MaxText's remat_policy; full recomputes layers")
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    seconds = step_seconds({**SHAPE, **REST, **EXPERTS[options.experts], "remat_policy": options.remat}, options.steps)
    print(json.dumps({"tokens_per_second": 2048 / seconds, "seconds": seconds, "experts": options.experts,
                      "remat": options.remat}))


if __name__ == "__main__":
    main()
