"""Every router and dispatch on every mesh equals the dense oracle on one device; what cannot be split is refused."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import moe_reference as reference
import numpy as np
import pytest
from moe_reference import assert_close, config_of, context

from moejax import axes, sharding
from moejax import config as configs
from moejax.config import MeshConfig, UserError
from moejax.models import transformer
from moejax.moe import experts
from moejax.moe.dispatch import DISPATCHERS
from moejax.moe.layer import choose_dispatcher, mixture

ROWS, LENGTH, VOCAB, E = 8, 6, 12, 8
MESHES = {
    "data8": MeshConfig(data=8),
    "expert8": MeshConfig(data=1, expert=8),
    "data2 expert4": MeshConfig(data=2, expert=4),
    "data4 expert2": MeshConfig(data=4, expert=2),
    "data2 expert2 model2": MeshConfig(data=2, expert=2, model=2),
    "expert4 context2": MeshConfig(data=1, expert=4, context=2),
}
ROUTERS = {
    "topk": {"router": "topk"},
    "bias": {"router": "topk", "score": "sigmoid", "bias_rate": 0.01, "capacity_factor": 1.0},
    "choice in sequences": {"router": "expert_choice"},
    "choice in the batch": {"router": "expert_choice", "routing_group": "global"},
    "hash": {"router": "hash"},
}
FAST = {
    ("data8", "topk", "sort"),
    ("expert8", "bias", "all_gather"),
    ("data2 expert4", "choice in the batch", "all_gather"),
    ("data4 expert2", "hash", "dense"),
    ("expert4 context2", "choice in sequences", "all_gather"),
    ("data2 expert2 model2", "bias", "all_to_all"),
    ("expert4 context2", "hash", "ragged"),
}
"""A subset that holds every mesh, router and dispatch."""


CASES = [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
         for case in itertools.product(MESHES, ROUTERS, DISPATCHERS)
         if case[1] != "choice in the batch" or DISPATCHERS[case[2]].reaches_all]


def config_for(router, dispatch, **changes):
    tree = configs.default()
    tree.model.update(dict(vocab_size=VOCAB, embed=16, heads=4, kv_heads=2, head_dim=4, ffn=10, layers=1,
                           max_length=LENGTH))
    tree.data.length = LENGTH
    tree.moe.update(dict(num_experts=E, block_rows=4, allow_noncausal_routing=True, dispatch=dispatch) | ROUTERS[router]
                    | changes)
    return transformer.resolve(configs.build(tree))


def batch_and_state(config):
    """Rows with padding at different places and one row of nothing else; a bias that leaves expert 7 without tokens.

    No token repeats in a row: two equal first tokens have equal vectors, and rounding would decide between them.
    """
    rng = np.random.default_rng(0)
    tokens_BL = np.stack([rng.permutation(VOCAB)[:LENGTH] for _ in range(ROWS)]).astype(np.int32)
    segments_BL = np.ones((ROWS, LENGTH), np.int32)
    segments_BL[0, 4:] = segments_BL[2, 5:] = segments_BL[5] = 0
    positions_BL = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    state = jax.tree.map(lambda bias: bias + np.linspace(0.5, -2.0, E, dtype=np.float32),
                         transformer.initial_router_state(config.model, config.moe))
    return tokens_BL, positions_BL, segments_BL, state


@functools.cache
def parameters():
    config = config_for("topk", "dense")
    variables = jax.jit(transformer.build(config).init)(jax.random.key(0), *batch_and_state(config))
    return jax.tree.map(np.asarray, nn.meta.unbox(variables["params"]))


def parameters_for(router):
    params = dict(parameters())
    if router == "hash":
        stack = params["stack_0"]["block_0"]
        moe = {name: value for name, value in stack["moe"].items() if not name.startswith("router")}
        params["stack_0"] = {"block_0": {**stack, "moe": moe}}
    return params


def loss_function(config):
    module, batch = transformer.build(config), batch_and_state(config)

    def loss(params, state):
        out = module.apply({"params": params}, *batch[:3], state, train=True)
        log_probs_BLV = jax.nn.log_softmax(out.logits_BLV)
        own_BL = jnp.take_along_axis(log_probs_BLV, batch[0][..., None], axis=2)[..., 0]
        losses = sum(sum(record.losses.values()) for record in transformer.in_order(out.records))
        return -jnp.mean(own_BL * (batch[2] > 0)) + losses, out.records

    return jax.value_and_grad(loss, has_aux=True), batch[3]


def loss_and_gradients(router, dispatch, **changes):
    differentiate, state = loss_function(config_for(router, dispatch, **changes))
    (loss, records), gradients = jax.device_get(jax.jit(differentiate)(parameters_for(router), state))
    return (loss, transformer.in_order(records)), gradients


@functools.cache
def oracle(router):
    """The dense oracle on one device, all of it in float64: the code asks for float32 by the name `jnp.float32`."""
    parameters_for(router)  # made in float32
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, "float32", jnp.float64)
        patch.setattr(transformer, "build", functools.partial(double, transformer.build))
        return double_loss_and_gradients(router)


def double(build, config):
    return build(config).clone(dtype=jnp.float64)


def double_loss_and_gradients(router):
    differentiate, state = loss_function(config_for(router, "dense"))
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (parameters_for(router), state))
    (loss, records), gradients = jax.device_get(jax.jit(differentiate)(*wide))
    assert {a.dtype for a in jax.tree.leaves((loss, gradients))} == {np.dtype(np.float64)}
    return (loss, transformer.in_order(records)), gradients


@pytest.mark.parametrize("mesh, router, dispatch", CASES)
def test_loss_and_every_gradient_on_a_mesh_equal_the_dense_oracle_on_one_device(mesh, router, dispatch):
    check(mesh, router, dispatch)


@pytest.mark.parametrize("mesh, router, dispatch", [("data2 expert2 model2", "bias", "all_to_all"),
                                                    ("data2 expert4", "choice in the batch", "all_gather")])
def test_so_do_experts_in_blocks(mesh, router, dispatch):
    """What CPUs use without a C++ compiler."""
    check(mesh, router, dispatch, compute="blocked")


def check(mesh, router, dispatch, **changes):
    (want_loss, want_records), want = oracle(router)
    with jax.set_mesh(sharding.make_mesh(MESHES[mesh])):
        (loss, records), gradients = loss_and_gradients(router, dispatch, **changes)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    for record, want_record in zip(records, want_records, strict=True):
        load, want_load = record.load, want_record.load
        for name in ("assigned_E", "dropped_E", "received_E", "tokens"):
            np.testing.assert_array_equal(getattr(load, name), getattr(want_load, name))
        np.testing.assert_array_equal(load.assigned_E, load.received_E + load.dropped_E)
        assert router != "bias" or load.assigned_E[-1] == 0, "an expert must be empty"

    def compare(path, got, wanted):
        per_expert = path[-1].key in ("w_in", "w_out")
        got, wanted = (got[0], wanted[0]) if per_expert else (got, wanted)
        assert_close(got, wanted, per_expert=per_expert)

    jax.tree_util.tree_map_with_path(compare, gradients, want)


STEPS, RATE = 5, 0.1


def after_five_steps(router, dispatch):
    """Losses of five steps of gradient descent in which the bias moves too, and the parameters after them."""
    config = config_for(router, dispatch)
    differentiate, state = loss_function(config)

    @jax.jit
    def step(params, state):
        (loss, records), gradients = differentiate(params, state)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, gradients)
        return params, transformer.update_router_state(config.moe, state, records), loss

    params, losses = parameters_for(router), []
    for _ in range(STEPS):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return losses, jax.device_get((params, state))


@functools.cache
def five_steps_of_the_oracle(router):
    return after_five_steps(router, "dense")


@pytest.mark.slow
@pytest.mark.parametrize("mesh, router, dispatch", CASES)
def test_five_steps_on_a_mesh_equal_those_of_the_dense_oracle_on_one_device(mesh, router, dispatch):
    want_losses, (want, want_state) = five_steps_of_the_oracle(router)
    with jax.set_mesh(sharding.make_mesh(MESHES[mesh])):
        losses, (params, state) = after_five_steps(router, dispatch)
    assert want_losses[-1] < want_losses[0]
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    jax.tree.map(assert_close, params, want)
    jax.tree.map(np.testing.assert_array_equal, state, want_state)


@pytest.mark.parametrize("dispatch, buffer_factor, overflows", [
    ("all_to_all", 0.5, True), ("ragged", 1.0, True), ("all_to_all", None, False),
    pytest.param("ragged", 8.0, False, marks=pytest.mark.slow)])
def test_a_buffer_that_is_too_small_is_counted_and_the_layer_replayed_without_loss(dispatch, buffer_factor, overflows):
    """At buffer_factor 1 the skew alone overflows; at 8 devices times the mean, nothing can."""
    (want_loss, [want_record]), want = oracle("topk")
    differentiate, state = loss_function(config_for("topk", dispatch, buffer_factor=buffer_factor))
    with jax.set_mesh(sharding.make_mesh(MESHES["expert8"])):
        (loss, records), gradients = jax.device_get(jax.jit(differentiate)(parameters_for("topk"), state))
    [record] = transformer.in_order(records)
    assert (record.load.replayed_E.sum() > 0) == overflows
    assert (record.load.replayed_E <= record.load.assigned_E).all()
    np.testing.assert_array_equal(record.load.received_E, want_record.load.assigned_E)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    jax.tree.map(assert_close, gradients, want)


def lone_layer(config, tokens, sequences):
    rng = np.random.default_rng(1)
    experts, width, hidden = config.num_experts, 5, 4
    shapes = {"x": (tokens, width), "router": (width, experts), "w_in": (experts, width, 2, hidden),
              "w_out": (experts, hidden, width)}
    x, router, w_in, w_out = (rng.normal(size=shape).astype(np.float32) for shape in shapes.values())
    where = context(np.ones(tokens, bool), sequences=sequences)
    return jax.jit(mixture, static_argnums=0)(config, {"w_DE": router}, {}, w_in, w_out, x, where, None)[0]


@pytest.mark.parametrize("mesh, group, rows, length, experts", [
    (MeshConfig(data=8), "global", 8, 5, 6), (MeshConfig(data=4, context=2), "sequence", 4, 14, 3)])
def test_a_list_whose_length_the_devices_do_not_divide_works_too(mesh, group, rows, length, experts):
    """The number of pairs that experts choose follows from experts and capacity, not from the mesh."""
    def output(dispatch):
        config = config_of("expert_choice", num_experts=experts, experts_per_token=1, routing_group=group,
                           dispatch=dispatch)
        return np.asarray(lone_layer(config, rows * length, rows))

    want_TD = output("dense")
    with jax.set_mesh(sharding.make_mesh(mesh)):
        assert_close(output("all_gather"), want_TD)


def test_ragged_dot_on_a_mesh_equals_the_oracle():
    want_TD = lone_layer(config_of(num_experts=E, dispatch="dense"), 48, 8)
    with jax.set_mesh(sharding.make_mesh(MESHES["data2 expert2 model2"])):
        assert_close(lone_layer(config_of(num_experts=E, dispatch="all_gather", compute="ragged_dot"), 48, 8), want_TD)


@pytest.mark.parametrize("router, dispatch, mesh", [
    pytest.param("bias", "all_to_all", "data4 expert2", marks=pytest.mark.slow),
    pytest.param("topk", "all_gather", "data2 expert4", marks=pytest.mark.slow),
    pytest.param("bias", "sort", "data8", marks=pytest.mark.slow),
    pytest.param("hash", "ragged", "expert8", marks=pytest.mark.slow),
    pytest.param("choice in the batch", "all_gather", "data2 expert2 model2", marks=pytest.mark.slow),
    pytest.param("topk", "ragged", "expert4 context2", marks=pytest.mark.slow),
    pytest.param("topk", "all_to_all", "expert8", marks=pytest.mark.slow)])
def test_what_kernels_leave_behind_the_groups_never_counts(monkeypatch, router, dispatch, mesh):
    """Results and gradients behind the last group are not numbers here, as they may be on a GPU."""
    @jax.custom_vjp
    def poison(x_RD, behind_R1):
        return jnp.where(behind_R1, jnp.nan, x_RD)

    poison.defvjp(lambda x_RD, behind_R1: (poison(x_RD, behind_R1), behind_R1),
                  lambda behind_R1, dx_RD: (poison(dx_RD, behind_R1), None))
    feed_forward = experts.feed_forward

    def leaving(x_RD, sizes_E, *weights, **more):
        behind_R1 = jnp.arange(x_RD.shape[0])[:, None] >= jnp.sum(sizes_E)
        y_RD = feed_forward(jnp.where(behind_R1, 0, poison(x_RD, behind_R1)), sizes_E, *weights, **more)
        return jnp.where(behind_R1, jnp.nan, y_RD)

    want = loss_and_gradients(router, "dense")
    monkeypatch.setattr(experts, "feed_forward", leaving)
    with jax.set_mesh(sharding.make_mesh(MESHES[mesh])):
        (loss, _), gradients = loss_and_gradients(router, dispatch)
    np.testing.assert_allclose(loss, want[0][0], rtol=1e-5)
    jax.tree.map(assert_close, gradients, want[1])


@pytest.mark.parametrize("dispatch", ["sort", "all_to_all", "ragged"])
def test_a_transport_refuses_a_list_that_names_tokens_that_it_cannot_reach(dispatch):
    with jax.set_mesh(sharding.make_mesh(MESHES["data8"])):
        with pytest.raises(UserError, match=f"config.moe.dispatch={dispatch} cannot reach the tokens of other devices"):
            choose_dispatcher(config_of(dispatch=dispatch), local=False, pairs=2)


@pytest.mark.parametrize("mesh, local, buffer_factor, chosen", [
    ("data8", True, 2.0, "sort"), ("data8", False, 2.0, "all_gather"), ("data4 expert2", True, 2.0, "all_gather"),
    ("expert8", True, 2.0, "all_to_all"), ("expert8", True, 4.0, "all_gather"), ("expert8", False, 2.0, "all_gather"),
    ("expert8", True, None, "all_gather")])
def test_auto_takes_the_transport_that_moves_fewer_rows(mesh, local, buffer_factor, chosen):
    with jax.set_mesh(sharding.make_mesh(MESHES[mesh])):
        config = config_of(dispatch="auto", buffer_factor=buffer_factor)
        assert choose_dispatcher(config, local, config.experts_per_token) is DISPATCHERS[chosen]


def test_balance_over_shards_is_the_mean_over_the_parts_of_the_batch_on_each_device():
    """Without attention the router sees the normed embedding, so numpy can follow. The last shard is all padding."""
    config = config_for("topk", "dense", balance_scope="shard")
    tokens_BL, positions_BL, segments_BL, state = batch_and_state(config)
    segments_BL[6:] = 0
    params = jax.tree.map(np.copy, parameters())
    block = params["stack_0"]["block_0"]
    block["attention"]["w_o"][:] = 0
    with jax.set_mesh(sharding.make_mesh(MESHES["data2 expert2 model2"])):
        out = jax.jit(transformer.build(config).apply)({"params": params}, tokens_BL, positions_BL, segments_BL, state)
    x_TD = params["embedding"]["table"][tokens_BL.reshape(-1)].astype(np.float64)
    x_TD = x_TD / np.sqrt(np.mean(x_TD**2, axis=1, keepdims=True) + config.model.norm_eps)
    logits_TE, mask_T = reference.logits(x_TD, block["moe"]["router_w_DE"][0]), (segments_BL > 0).reshape(-1)
    count_TE, _ = reference.topk_matrix(logits_TE, mask_T, 2, "softmax", True)
    want = {parts: reference.balance_loss(logits_TE, count_TE, mask_T, "softmax", parts) for parts in (1, 4, 8)}
    assert len({round(value, 3) for value in want.values()}) == 3
    [record] = transformer.in_order(out.records)
    np.testing.assert_allclose(record.losses["balance"], want[4], rtol=1e-5)


def shapes_and_names(router):
    config = config_for(router, "dense")
    variables = jax.eval_shape(transformer.build(config).init, jax.random.key(0), *batch_and_state(config))["params"]
    return nn.meta.unbox(variables), jax.tree.map(tuple, nn.get_partition_spec(variables), is_leaf=sharding.is_axes)


def test_parameters_lie_where_the_rules_say():
    shapes, names = shapes_and_names("topk")
    mesh = sharding.make_mesh(MESHES["data2 expert2 model2"])
    planned = {place.name: place for place in sharding.placements(shapes, names, mesh)}
    assert planned["stack_0/block_0/moe/w_in"].parts == 8
    assert planned["stack_0/block_0/moe/w_in"].bytes == E // 2 * 16 // 2 * 2 * 10 // 2 * 4
    placed = jax.tree.map(jax.device_put, parameters(), sharding.shardings(names, mesh))
    moe = placed["stack_0"]["block_0"]["moe"]
    assert {shard.data.shape for shard in moe["w_in"].addressable_shards} == {(1, E // 2, 16 // 2, 2, 10 // 2)}
    assert {shard.data.shape for shard in moe["w_out"].addressable_shards} == {(1, E // 2, 10 // 2, 16 // 2)}


def test_what_a_mesh_cannot_divide_is_refused_with_the_name_of_the_parameter():
    shapes, names = shapes_and_names("topk")
    shapes["stack_0"]["block_0"]["moe"]["w_in"] = jax.ShapeDtypeStruct((1, 6, 16, 2, 10), jnp.float32)
    with pytest.raises(UserError, match="stack_0/block_0/moe/w_in: dimension experts=6 .* expert of size 4"):
        sharding.placements(shapes, names, sharding.make_mesh(MESHES["data2 expert4"]))


WRONG_AXES = pytest.mark.parametrize("wrong, complaint", [
    (("expert", "embed"), "unknown logical axis 'expert' .did you mean experts"), (("embed", "batch"), "twice")])


@WRONG_AXES
def test_an_unknown_logical_axis_and_a_mesh_axis_used_twice_are_refused(wrong, complaint):
    with pytest.raises(ValueError, match=complaint):
        sharding.spec(wrong)


@WRONG_AXES
def test_validation_names_the_parameter_whose_axes_are_wrong(wrong, complaint):
    shapes = {"layer": {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}}
    with pytest.raises((UserError, ValueError), match=f"layer/w.*{complaint}"):
        sharding.placements(shapes, {"layer": {"w": wrong}}, sharding.make_mesh(MESHES["data8"]))


def test_a_large_parameter_that_would_lie_whole_on_every_device_is_refused():
    shapes, names = shapes_and_names("topk")
    for mesh, refused in (("data8", False), ("expert8", True)):
        mesh = sharding.make_mesh(MESHES[mesh])
        placed = sharding.placements(shapes, names, mesh)
        sharding.validate(placed, mesh, replicated_mib=1)
        if refused:
            with pytest.raises(UserError, match="parameter embedding/head: .* whole on each of the 8 devices.*mesh.data"):
                sharding.validate(placed, mesh, replicated_mib=0.0007)


def test_the_table_of_placements_names_shape_split_and_bytes():
    shapes, names = shapes_and_names("topk")
    lines = sharding.table(sharding.placements(shapes, names, sharding.make_mesh(MESHES["data2 expert4"]))).splitlines()
    row, = (line for line in lines if line.startswith("stack_0/block_0/moe/w_in"))
    assert row.split()[1:] == ["1x8x16x2x10", "-,", "expert,", "data,", "-,", "model", "8", f"{8 * 16 * 2 * 10 * 4 // 8:,}"]
    assert lines[-1].startswith("in all") and len({len(line) for line in lines}) == 1


def test_rules_cover_the_legend_and_a_spec_names_all_axes_of_a_dimension():
    assert set(sharding.RULES) == set(axes.LOGICAL_AXES)
    assert {axis for split in sharding.RULES.values() for axis in split} == set(axes.MESH_AXES)
    assert sharding.spec(("batch", "length", None)) == jax.sharding.PartitionSpec(axes.BATCH_AXES, ("context",), None)


def test_constrain_splits_an_array_or_raises_and_does_nothing_without_a_mesh():
    x_BLD = jnp.zeros((4, 6, 3))
    assert sharding.constrain(x_BLD, "batch", "length", None) is x_BLD
    with jax.set_mesh(sharding.make_mesh(MESHES["data2 expert2 model2"])):
        split = jax.jit(lambda x: sharding.constrain(x, "batch", "length", None))(x_BLD)
        assert {shard.data.shape for shard in split.addressable_shards} == {(1, 6, 3)}
        with pytest.raises(ValueError, match="cannot be split"):
            jax.jit(lambda x: sharding.constrain(x, None, "batch", None))(x_BLD)
        with pytest.raises(ValueError, match="unknown logical axis 'batches'"):
            jax.jit(lambda x: sharding.constrain(x, "batches", None, None))(x_BLD)


@pytest.mark.parametrize("wrong, complaint", [
    (MeshConfig(data=3), "needs 3 devices, but there are 8"),
    (MeshConfig(data=-1, expert=-1), "only one axis may be -1"),
    (MeshConfig(data=-1, expert=3), "config.mesh.data=-1 has no value"), (MeshConfig(data=0), "size 0")])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(wrong, complaint):
    with pytest.raises(UserError, match=complaint):
        sharding.make_mesh(wrong)


def test_minus_one_takes_the_devices_that_are_left_and_all_axes_stay():
    assert dict(sharding.make_mesh(MeshConfig(expert=2)).shape) == dict(replica=1, data=4, expert=2, model=1, context=1)
