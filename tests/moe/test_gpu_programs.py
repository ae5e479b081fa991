"""The sparse layer's programs for GPUs, lowered on a CPU: every product is a kernel, on meshes too."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_reference import context

from moejax import sharding
from moejax.config import MeshConfig, MoEConfig
from moejax.moe.layer import mixture
from moejax.moe.routing import resolve

if jax.__version_info__ < (0, 11):
    pytest.skip("jax cannot lower kernels without a GPU", allow_module_level=True)

TOKENS, WIDTH, HIDDEN, EXPERTS = 1024, 256, 512, 8


@pytest.fixture
def on_hopper(monkeypatch):
    """Lets the code believe in a GPU. Lowering asks jax itself what kind it is."""
    from jax._src.pallas.triton import gpu_info
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(core_count=132, compute_capability="9.0")])
    monkeypatch.setattr(gpu_info, "get_gpu_info", lambda: types.SimpleNamespace(compute_capability=90))


@pytest.mark.parametrize("compute, target", [("triton", "__gpu$xla.gpu.triton("), ("hopper", "@mosaic_gpu_v2(")])
@pytest.mark.parametrize("dispatch, mesh", [
    ("sort", MeshConfig(data=8)), ("all_gather", MeshConfig(data=2, expert=4)),
    pytest.param("ragged", MeshConfig(data=2, expert=2, model=2), marks=pytest.mark.slow)])
def test_each_product_of_the_layer_and_of_its_gradient_is_a_kernel(on_hopper, compute, target, dispatch, mesh):
    config = resolve(MoEConfig(num_experts=EXPERTS, experts_per_token=2, ffn=HIDDEN, compute=compute, dispatch=dispatch))

    def loss(x_TD, router_DE, w_in_EDGF, w_out_EFD):
        where = context(np.ones(TOKENS, bool), sequences=8, shards=8)
        y_TD = mixture(config, {"w_DE": router_DE}, {}, w_in_EDGF, w_out_EFD, x_TD, where, None).y_TD
        return jnp.sum(y_TD.astype(jnp.float32))

    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((TOKENS, WIDTH), jnp.bfloat16), ((WIDTH, EXPERTS), jnp.float32), ((EXPERTS, WIDTH, 2, HIDDEN), jnp.bfloat16),
        ((EXPERTS, HIDDEN, WIDTH), jnp.bfloat16))]
    with jax.set_mesh(sharding.make_mesh(mesh)):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Two products forward, and for each of them two back; transports with two ways to go share those of equal shapes.
    assert text.count(target) >= 6 and "ragged_dot" not in text
