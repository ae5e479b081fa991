"""The Transformer: embedding, stacks of pre-norm blocks with dense or sparse feed-forward layers, head."""

import dataclasses
from functools import partial
from typing import Any, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import PartitionSpec

from moejax import axes, sharding
from moejax.config import Config, ModelConfig, MoEConfig, check
from moejax.layers.attention import Attention, Cache
from moejax.layers.embedding import Embedding
from moejax.layers.mlp import FeedForward, dropout
from moejax.layers.norm import RMSNorm
from moejax.layers.rotary import angles
from moejax.models.depths import DepthRouted
from moejax.models.stacks import Stack, plan_stacks
from moejax.moe import routing
from moejax.moe.layer import DECISIONS, MixtureOfExperts
from moejax.moe.types import LayerRecord, RoutingContext, Totals

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass may keep from a block, by the names of config.train.remat."""


@struct.dataclass
class ModelOutput:
    """What a forward pass returns.

    What is not used costs nothing under `jax.jit`.

    Attributes:
      x_BLD: the last activations, of which the head makes the logits.
      logits_BLV: float32.
      records: per stack and sparse block, a `LayerRecord` with a leading axis over the stack's repeats.
      cache: like the one given, filled; or None.
    """

    x_BLD: Array
    logits_BLV: Array
    records: dict[str, dict[str, LayerRecord]]
    cache: Any


class Block(nn.Module):
    """Pre-norm attention and a feed-forward layer, each added to the residual stream.

    Attributes:
      model, moe: settings.
      sparse: whether the feed-forward layer is a mixture of experts.
      dtype: compute type.
    """

    model: ModelConfig
    moe: MoEConfig
    sparse: bool
    dtype: Any

    @nn.compact
    def __call__(self, x_BLD: Array, carry_TC: Array | None, state: Any, whole: Any, cache: Cache | None,
                 rotary: tuple[Array, Array], visible_BLS: Array, at: Array | None, context: RoutingContext
                 ) -> tuple[Array, Array | None, LayerRecord | None, Any]:
        """Returns [B, L, D], what the next router sees, the record of a sparse layer (else None) and the new cache."""
        model, moe = self.model, self.moe
        out_scale = (2 * model.layers)**-0.5  # keeps the residual stream's variance independent of depth
        drop_key = self.make_rng("dropout") if context.train and model.dropout > 0 else None
        attention_key, feed_forward_key = (None, None) if drop_key is None else jax.random.split(drop_key)

        y_BLD, cache = Attention(
            model.heads, model.kv_heads, model.head_dim, model.norm_eps if model.qk_norm else None, out_scale, self.dtype,
            name="attention")(RMSNorm(model.norm_eps, name="attention_norm")(x_BLD), rotary, visible_BLS, cache, at)
        x_BLD = x_BLD + dropout(y_BLD, model.dropout, attention_key)

        h_BLD = RMSNorm(model.norm_eps, name="feed_forward_norm")(x_BLD)
        if not self.sparse:
            y_BLD, record = FeedForward(model.ffn, out_scale, self.dtype, name="feed_forward")(h_BLD), None
        else:
            hidden = moe.ffn or model.ffn
            y_BLD, record, carry_TC = MixtureOfExperts(moe, hidden, out_scale, self.dtype, name="moe")(
                h_BLD, state, context.replace(whole=whole, carry_TC=carry_TC))
            if moe.shared_experts:
                shared_BLD = FeedForward(moe.shared_experts * hidden, out_scale, self.dtype, name="shared")(h_BLD)
                y_BLD = with_shared(moe.shared_gate, y_BLD, shared_BLD, self.shared_logits(h_BLD))
        return x_BLD + dropout(y_BLD, model.dropout, feed_forward_key), carry_TC, record, cache

    def shared_logits(self, h_BLD: Array) -> Array | None:
        """Scores of the shared experts (sigmoid), or of them and the routed ones (softmax), for each token, float32."""
        count = {"none": 0, "sigmoid": 1, "softmax": 2}[self.moe.shared_gate]
        if count == 0:
            return None
        w_DC = self.param("shared_gate", nn.with_logical_partitioning(
            nn.initializers.normal(self.model.embed**-0.5), ("embed", "router")), (self.model.embed, count))
        return h_BLD.astype(jnp.float32) @ w_DC


def passes_blocks(moe: MoEConfig) -> bool:
    """Whether the router lets tokens pass whole blocks, the sparse ones, rather than sends them to experts in these."""
    return routing.get_router(moe.router).level == "block"


class Run(nn.Module):
    """One repeat of a stack: its blocks in order, with the state, loads and caches of this repeat."""

    model: ModelConfig
    moe: MoEConfig
    sparse: tuple[bool, ...]
    dtype: Any
    remat: str

    @nn.compact
    def __call__(self, stream: tuple[Array, Array | None], per_layer: tuple[dict, dict, dict], *shared: Any
                 ) -> tuple[tuple[Array, Array | None], tuple[dict, dict]]:
        """Takes and returns [B, L, D] and what routers hand on; and returns, by block name, records and caches."""
        (x_BLD, carry_TC), (states, wholes, caches) = stream, per_layer
        records, new_caches = {}, {}
        for j, sparse in enumerate(self.sparse):
            name = f"block_{j}"
            kind, settings = Block, (self.model, self.moe, sparse, self.dtype)
            if sparse and passes_blocks(self.moe):
                kind, settings = DepthRouted, (self.moe, partial(Block, self.model, self.moe, False, self.dtype))
            if self.remat != "none":
                kind = nn.remat(kind, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
            x_BLD, carry_TC, record, cache = kind(*settings, name=name)(
                x_BLD, carry_TC, states.get(name, {}), wholes.get(name), caches.get(name), *shared)
            if record is not None:
                records[name] = record
            if cache is not None:
                new_caches[name] = cache
        return (x_BLD, carry_TC), (records, new_caches)


class Transformer(nn.Module):
    """A decoder. Parameters are float32; `dtype` is the type that activations and matmuls use.

    Attributes:
      model, moe: settings.
      dtype: compute type.
      remat: what the backward pass recomputes, a name of config.train.remat.
      scan: scan over the repeats of a stack, or run them one after another. The parameters are the same.
    """

    model: ModelConfig
    moe: MoEConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    scan: bool = True

    @nn.compact
    def __call__(self, tokens_BL: Array, positions_BL: Array, segments_BL: Array, router_state: Mapping[str, Any], *,
                 train: bool = False, totals: Totals | None = None, wholes: Mapping[str, Any] | None = None,
                 cache: Mapping[str, Any] | None = None, at: Array | None = None,
                 cached_segments_BS: Array | None = None) -> ModelOutput:
        """Scores the next token at every position.

        Args:
          tokens_BL: int32 ids.
          positions_BL: int32 position of each token in its document.
          segments_BL: int32 document of each token within its row; tokens see only their own. 0 is padding.
          router_state: from `initial_router_state`, or as trained.
          train: apply dropout, router noise and the training capacity; needs the rng `dropout` if there is noise.
          totals: sizes of the whole batch, if this is a part of it.
          wholes: the routers' statistics of the whole batch, by stack and block, if this is a part of it.
          cache: from `empty_cache`, or as returned, to go on from tokens seen before.
          at: int32 scalar, first slot of the cache that the tokens take.
          cached_segments_BS: segments of the cache's slots, those of the tokens included; 0 where it is empty.

        Returns:
          `ModelOutput`.
        """
        model = self.model
        embedding = Embedding(model.vocab_size, model.embed, model.tie_embeddings, self.dtype, name="embedding")
        mask_BL = segments_BL > 0
        if totals is None:
            totals = count_totals(mask_BL)
        mesh = sharding.current_mesh()
        shards = 1 if mesh is None else sharding.size(mesh, axes.BATCH_AXES)
        context = RoutingContext(tokens_BL.reshape(-1), mask_BL.reshape(-1), totals, whole=None, carry_TC=None, key=None,
                                 sequences=tokens_BL.shape[0], shards=shards, train=train)
        visible_BLS = visibility(segments_BL, cached_segments_BS, at)
        shared = (angles(positions_BL, model.head_dim, model.rope_base), visible_BLS, at, context)

        carried = routing.get_router(self.moe.router).carry(self.moe) if self.moe.every else 0
        stream = embedding(tokens_BL), jnp.zeros((tokens_BL.size, carried)) if carried else None
        records, new_cache = {}, {}
        for i, stack in enumerate(plan_stacks(model.layers, self.moe)):
            name = f"stack_{i}"
            per_layer = (router_state.get(name, {}), (wholes or {}).get(name, {}), (cache or {}).get(name, {}))
            if self.scan or self.is_initializing():
                run = nn.scan(
                    Run, variable_axes={"params": 0, DECISIONS: 0}, split_rngs={"params": True, "dropout": True},
                    length=stack.repeats, in_axes=(0, *(nn.broadcast,) * len(shared)),
                    metadata_params={nn.PARTITION_NAME: "layers"})
                stream, (stack_records, stack_cache) = run(
                    model, self.moe, stack.sparse, self.dtype, self.remat, name=name)(stream, per_layer, *shared)
            else:
                stream, (stack_records, stack_cache) = self.one_by_one(name, stack, stream, per_layer, *shared)
            if stack_records:
                records[name] = stack_records
            if stack_cache:
                new_cache[name] = stack_cache
        x_BLD = RMSNorm(model.norm_eps, name="final_norm")(stream[0])
        return ModelOutput(x_BLD, embedding.logits(x_BLD), records, new_cache or None)

    def one_by_one(self, name: str, stack: Stack, stream: tuple[Array, Array | None], per_layer: tuple[Any, Any, Any],
                   *shared: Any) -> tuple[tuple[Array, Array | None], tuple[Any, tuple[Any, ...]]]:
        """What a scan over a stack's repeats does, without one; returns the caches as a tuple over repeats."""
        params, *rest = (by_layer(tree, stack.repeats) for tree in (self.variables["params"][name], *per_layer))
        records, caches = [], []
        for params_of, *own in zip(params, *rest, strict=True):
            noise = {"dropout": self.make_rng("dropout")} if self.has_rng("dropout") else {}
            stream, (record, cache) = Run(self.model, self.moe, stack.sparse, self.dtype, self.remat, parent=None).apply(
                {"params": params_of}, stream, tuple(own), *shared, rngs=noise)
            records.append(record)
            caches += [cache] if cache else []
        return stream, (jax.tree.map(lambda *layers: jnp.stack(layers), *records), tuple(caches))


def with_shared(gate: str, routed_BLD: Array, shared_BLD: Array, logits_BLC: Array | None) -> Array:
    """Adds the shared experts' output to the routed ones': as it is, or weighted; see `config.moe.shared_gate`."""
    if gate == "none":
        return routed_BLD + shared_BLD
    if gate == "sigmoid":
        return routed_BLD + jax.nn.sigmoid(logits_BLC).astype(shared_BLD.dtype) * shared_BLD
    share_BL2 = jax.nn.softmax(logits_BLC).astype(shared_BLD.dtype)
    return share_BL2[..., :1] * routed_BLD + share_BL2[..., 1:] * shared_BLD


def resolve(config: Config) -> Config:
    """A config with nothing left open.

    Raises:
      UserError: an unknown router, what its rule cannot do, or a router that looks at later tokens without leave to do so.
    """
    moe = routing.resolve(config.moe)
    config = dataclasses.replace(config, moe=moe)
    if moe.every:
        reason = routing.leak(moe)
        check(reason is None or moe.allow_noncausal_routing,
              f"{reason}, so a decoder's loss would be too good to be true; set config.moe.allow_noncausal_routing=True if "
              "you know what you do")
        whole_batch = moe.routing_group == "global" and (moe.capacity_factor is not None
                                                         or routing.get_router(moe.router).by_group)
        check(config.train.microbatches == 1 or not whole_batch,
              "config.moe.routing_group=global decides over the whole batch and cannot be split into "
              f"config.train.microbatches={config.train.microbatches}; use routing_group=sequence or one micro-batch")
    return config


def build(config: Config) -> Transformer:
    """The model of a config. Raises `UserError` as `resolve` does."""
    config = resolve(config)
    return Transformer(config.model, config.moe, jnp.dtype(config.train.dtype), config.train.remat,
                       config.train.scan_layers)


def by_layer(tree: Any, repeats: int) -> tuple[Any, ...]:
    """A tree with a leading axis over a stack's repeats as one tree for each; such a tuple is returned as it is."""
    if isinstance(tree, tuple):
        return tree
    # Split rather than indexed, as the gradient of that is one concatenation.
    split = jax.tree.map(lambda a: jnp.split(a, repeats), tree)
    return tuple(jax.tree.map(lambda parts, r=r: parts[r][0], split, is_leaf=lambda node: isinstance(node, list))
                 for r in range(repeats))


def split_layers(model: Transformer, params: Mapping[str, Any]) -> dict[str, Any]:
    """The same parameters with a tuple over layers for each stack: what a model that does not scan can take as well.

    A loop around such a model reads the matrices where they lie, while it would cut a stack apart in every turn.
    """
    repeats = {f"stack_{i}": stack.repeats for i, stack in enumerate(plan_stacks(model.model.layers, model.moe))}
    return {name: by_layer(tree, repeats[name]) if name in repeats else tree for name, tree in params.items()}


def abstract_params(model: Transformer) -> tuple[Any, Any]:
    """Shapes of a model's parameters and, in a tree of the same structure, their logical axes."""
    boxed = jax.eval_shape(partial(boxed_params, model), jax.random.key(0))
    names = jax.tree.map(tuple, nn.get_partition_spec(boxed), is_leaf=lambda p: isinstance(p, PartitionSpec))
    return nn.meta.unbox(boxed), names


def initial_params(model: Transformer, key: Array) -> Any:
    """Random float32 parameters."""
    return nn.meta.unbox(boxed_params(model, key))


def boxed_params(model: Transformer, key: Array) -> Any:
    """Random parameters with their logical axes around them, from the smallest batch that the mesh can split."""
    mesh = sharding.current_mesh()
    shape = (1, 1) if mesh is None else (sharding.size(mesh, axes.BATCH_AXES), sharding.size(mesh, (axes.CONTEXT,)))
    tokens = jnp.zeros(shape, jnp.int32)
    return model.init(key, tokens, tokens, tokens, initial_router_state(model.model, model.moe))["params"]


def head(model: Transformer, params: Mapping[str, Any]) -> Array:
    """The matrix that turns the last activations into logits, float32 [D, V]."""
    embedding = Embedding(model.model.vocab_size, model.model.embed, model.model.tie_embeddings, model.dtype)
    return embedding.apply({"params": params["embedding"]}, method=Embedding.head)


def visibility(segments_BL: Array, cached_segments_BS: Array | None, at: Array | None) -> Array:
    """Which slots each token sees: those of its own segment up to itself. Bool [B, L, S]."""
    keys_BS = segments_BL if cached_segments_BS is None else cached_segments_BS
    slots_L = jnp.arange(segments_BL.shape[1]) + (0 if at is None else at)
    same_BLS = segments_BL[:, :, None] == keys_BS[:, None, :]
    return same_BLS & (slots_L[:, None] >= jnp.arange(keys_BS.shape[1]))


def count_totals(mask_BL: Array) -> Totals:
    """Real tokens, and sequences with any, of a batch."""
    return Totals(jnp.sum(mask_BL, dtype=jnp.float32), jnp.sum(jnp.any(mask_BL, axis=1), dtype=jnp.float32))


def initial_router_state(model: ModelConfig, moe: MoEConfig) -> dict[str, dict[str, dict[str, Array]]]:
    """The routers' state by stack and block, with a leading axis over repeats. An empty dict for stateless routers."""
    def stacked(repeats: int) -> dict[str, Array]:
        return {name: jnp.broadcast_to(value, (repeats, *value.shape))
                for name, value in routing.get_router(moe.router).initial_state(moe, model.vocab_size).items()}
    stacks = {f"stack_{i}": {f"block_{j}": stacked(stack.repeats) for j, sparse in enumerate(stack.sparse) if sparse}
              for i, stack in enumerate(plan_stacks(model.layers, moe))}
    return {name: blocks for name, blocks in stacks.items() if blocks}


def update_router_state(moe: MoEConfig, state: Mapping[str, Any], records: Mapping[str, Any]) -> dict[str, Any]:
    """The routers' state after an optimizer step, from the records of its whole batch."""
    router = routing.get_router(moe.router)
    seen = statistics_of(records)
    if router.pools_layers:
        blocks = [seen[stack][block] for stack in seen for block in seen[stack]]
        total = jax.tree.map(lambda *layers: sum(jnp.sum(a, axis=0) for a in layers), *blocks)
        seen = jax.tree.map(lambda a, sum_a: jnp.broadcast_to(sum_a, a.shape), seen,
                            {stack: dict.fromkeys(seen[stack], total) for stack in seen})
    return {stack: {block: jax.vmap(lambda old, own: router.update(moe, old, own))(old, seen[stack][block])
                    if old else {} for block, old in blocks.items()} for stack, blocks in state.items()}


def statistics_of(records: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Array]]]:
    """The routers' statistics by stack and block: of a whole batch, the `wholes` of the model."""
    return jax.tree.map(lambda record: record.statistics, records, is_leaf=lambda node: isinstance(node, LayerRecord))


def empty_cache(model: ModelConfig, moe: MoEConfig, batch: int, slots: int, dtype: Any) -> dict[str, dict[str, Cache]]:
    """A key-value cache for `slots` tokens a row."""
    def stacked(repeats: int, sparse: bool) -> Cache:
        zeros = jnp.zeros((repeats, batch, slots, model.kv_heads, model.head_dim), dtype)
        return Cache(zeros, zeros, jnp.zeros((repeats, batch, slots), bool) if sparse and passes_blocks(moe) else None)
    return {f"stack_{i}": {f"block_{j}": stacked(stack.repeats, sparse) for j, sparse in enumerate(stack.sparse)}
            for i, stack in enumerate(plan_stacks(model.layers, moe))}


def in_order(records: Mapping[str, Mapping[str, LayerRecord]]) -> list[LayerRecord]:
    """The records of the sparse layers, first layer first."""
    ordered = []
    for stack in records.values():
        repeats = jax.tree.leaves(stack)[0].shape[0]
        ordered += [jax.tree.map(lambda a, r=r: a[r], record) for r in range(repeats) for record in stack.values()]
    return ordered
