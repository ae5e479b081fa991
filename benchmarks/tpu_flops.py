"""What the sparse layer's TPU programs cost over the ideal. They are compiled ahead of time, so any CPU can run this.

    pip install -e ".[tpu-aot]"
    python benchmarks/tpu_flops.py
    python benchmarks/tpu_flops.py --generations v6e --dispatch all_gather --shapes 8192,1024,512,64,8

A shape is T,D,F,E,K with T tokens on each device. `sort` compiles for one device, other transports for eight: two times
four that split the experts. Ideal are the router and three matmuls a row, and three times that with the backward pass.

The grouped kernel's cost is what it declares, 2*R*D*F. R counts every row that its input has room for, so under
`all_gather` four rows for each one that the layer uses if routing is balanced: there the ideal is taken for R rows, too,
and `room` tells R over the mean in use. The kernel stops after the last row in use. It works on tiles of 128 rows (256 on
v6e and 7x) and computes a tile once more for each expert that begins inside it, which it does not declare: at most E - 1
tiles more than the R/128 (R/256) that it counts.
"""

import argparse
import importlib.metadata
import json
import os

# libtpu reads these when it is loaded: there is no TPU whose metadata to ask for, or that processes could fight over.
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import axes, compiler_options, sharding
from moejax.config import MeshConfig, MoEConfig
from moejax.moe.layer import mixture
from moejax.moe.routing import resolve
from moejax.moe.types import RoutingContext, Totals

# v4 is two cores a chip unless asked to be one. Every topology has eight devices.
TOPOLOGIES = {
    "v4": ("v4:2x2x2", {"chip_config_name": "megacore"}),
    "v5p": ("v5p:2x2x2", {}),
    "v5e": ("v5e:2x4", {}),
    "v6e": ("v6e:2x4", {}),
    "tpu7x": ("tpu7x:2x2x1", {}),
}


def measure(generation, dispatch, shape):
    """Compiles the layer's forward pass, and forward with backward, and returns what they cost."""
    T, D, F, E, K = shape
    name, chip = TOPOLOGIES[generation]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **chip).devices
    split = 1 if dispatch == "sort" else 4
    devices = devices[:1] if dispatch == "sort" else devices
    mesh = sharding.make_mesh(MeshConfig(data=-1, expert=split), devices)
    tokens = T * mesh.size
    config = resolve(MoEConfig(num_experts=E, experts_per_token=K, compute="ragged_dot", dispatch=dispatch))

    def forward(router, w_in_ED2F, w_out_EFD, x_TD):
        context = RoutingContext(jnp.zeros(tokens, jnp.int32), jnp.ones(tokens, bool),
                                 Totals(jnp.float32(tokens), jnp.float32(mesh.size)), whole=None, carry_TC=None, key=None,
                                 sequences=mesh.size, shards=mesh.size, train=True)
        return mixture(config, router, {}, w_in_ED2F, w_out_EFD, x_TD, context, None)[0]

    def loss(router, w_in_ED2F, w_out_EFD, x_TD, dy_TD):
        return jnp.sum(forward(router, w_in_ED2F, w_out_EFD, x_TD) * dy_TD, dtype=jnp.float32)

    def argument(shape, *over, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*over)))

    x_TD = argument((tokens, D), axes.TOKEN_AXES)
    arguments = ({"w_DE": argument((D, E), dtype=jnp.float32)}, argument((E, D, 2, F), axes.EXPERT),
                 argument((E, F, D), axes.EXPERT), x_TD)
    options = compiler_options.for_devices(devices)
    with jax.set_mesh(mesh):
        ahead = jax.jit(forward).lower(*arguments).compile(options)
        both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).lower(*arguments, x_TD).compile(options)

    rows = T * K * split
    ideal = 2 * rows * 3 * D * F + 2 * T * D * E
    forward_flops, both_flops = (program.cost_analysis()["flops"] for program in (ahead, both))
    return {
        "generation": generation, "dispatch": dispatch, "shape": shape, "room": split,
        "forward_flops": forward_flops, "both_flops": both_flops,
        "forward": forward_flops / ideal, "both": both_flops / (3 * ideal),
        "temp_mib": both.memory_analysis().temp_size_in_bytes / 2**20,
    }


def main():
    """Prints a line for each generation and shape, and all of it as one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--generations", nargs="+", default=["v5p", "v5e", "v6e"], choices=TOPOLOGIES)
    parser.add_argument("--dispatch", default="sort", choices=("sort", "all_gather"))
    parser.add_argument("--shapes", nargs="+", default=["8192,1024,512,16,2", "8192,1024,512,64,8"], help="T,D,F,E,K")
    options = parser.parse_args()
    print("TPU    T,D,F,E,K             room  forward  forward+backward  temp MiB")
    results = []
    for generation in options.generations:
        for shape in options.shapes:
            results.append(r := measure(generation, options.dispatch, [int(n) for n in shape.split(",")]))
            print(f"{generation:5}  {shape:20}  {r['room']:4}  {r['forward']:7.4f}  {r['both']:16.4f}"
                  f"  {r['temp_mib']:8,.0f}", flush=True)
    print(json.dumps({"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu"), "results": results}))


if __name__ == "__main__":
    main()
