"""The Transformer: embedding, one or two trunks of blocks with dense or sparse feed-forward layers, head."""

import dataclasses
from functools import partial
from typing import Any, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import PartitionSpec

from moejax import axes, faults, finetune, mixture, sharding, task
from moejax.config import Config, ModelConfig, MoEConfig, check
from moejax.layers.attention import Cache, Encoded
from moejax.layers.embedding import Embedding
from moejax.layers.norm import make_norm
from moejax.layers.pool import Pooled
from moejax.layers.relative import RelativeBias
from moejax.models.blocks import FINITE, Run, passes_blocks
from moejax.models.checks import check_experts, check_router_tasks, resolve_model
from moejax.models.sight import distances, look
from moejax.models.stacks import ENCODER, Stack, Trunk, plan_stacks, routers, trunk_stacks, trunks
from moejax.models.stream import Stream
from moejax.moe import routing
from moejax.moe.layer import DECISIONS, INPUTS, INTO
from moejax.moe.types import LayerRecord, RoutingContext, Totals


@struct.dataclass
class Source:
    """What an encoder reads for a decoder: ids, positions and segments, as `Transformer` takes those of the decoder."""

    tokens_BS: Array
    positions_BS: Array
    segments_BS: Array


@struct.dataclass
class ModelOutput:
    """What a forward pass returns.

    What is not used costs nothing under `jax.jit`.

    Attributes:
      hidden_BLD: the last activations.
      x_BLD: the same as the head takes them; see `Embedding.before_head`.
      logits_BLV: float32, scores of tokens; None without such a head.
      logits_BC: float32, scores of classes; None without such a head.
      pooled_BD: what stands for a row; None with a head for tokens.
      records: per stack and router (see `moejax.models.stacks.routers`), a `LayerRecord` with a leading axis over the
        stack's repeats.
      cache: like the one given, filled; or None.
    """

    hidden_BLD: Array
    x_BLD: Array
    logits_BLV: Array | None
    logits_BC: Array | None
    pooled_BD: Array | None
    records: dict[str, dict[str, LayerRecord]]
    cache: Any


class Transformer(nn.Module):
    """A decoder, an encoder, or both. Parameters are float32; `dtype` is the type that activations and matmuls use.

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
                 types_BL: Array | None = None, prefix_BL: Array | None = None, source: Source | None = None,
                 source_segments_BS: Array | None = None, train: bool = False, totals: Mapping[str, Totals] | None = None,
                 wholes: Mapping[str, Any] | None = None, cache: Mapping[str, Any] | None = None, at: Array | None = None,
                 cached_segments_BS: Array | None = None, task_B: Array | None = None) -> ModelOutput:
        """Scores tokens at every position, or classes for every row; see `config.model.head`.

        Args:
          tokens_BL: int32 ids.
          positions_BL: int32 position of each token in its document.
          segments_BL: int32 document of each token within its row; tokens see only their own. 0 is padding.
          router_state: from `initial_router_state`, or as trained.
          types_BL: int32 type of each token, if the architecture has token types; None is the first everywhere.
          prefix_BL: bool, tokens of a decoder that all tokens of their segment see, also those before them (prefix LM).
          source: what the encoder of an encoder-decoder reads. A token of the decoder sees that of its own segment.
          source_segments_BS: its segments, if the encoder has read it before and the cache holds what the decoder needs.
          train: apply dropout, router noise and the training capacity; needs the rng `dropout` if there is noise.
          totals: sizes of the whole batch by trunk, as `count_totals` gives them, if this is a part of it.
          wholes: the routers' statistics of the whole batch, by stack and block, if this is a part of it.
          cache: from `empty_cache`, or as returned, to go on from tokens seen before.
          at: int32 scalar, first slot of the cache that the tokens take.
          cached_segments_BS: segments of the cache's slots, those of the tokens included; 0 where it is empty.
          task_B: int32 number of each row's task, if the routers know of several.

        Returns:
          `ModelOutput`.
        """
        model = self.model
        tasks = model.architecture.router_tasks
        check(task_B is not None or tasks < 2 or self.is_initializing(), f"this model's routers know of {tasks} tasks; "
              "say which is meant: --task=NAME, or moejax.for_task")
        embedding = Embedding(model, self.dtype, name="embedding")
        totals = totals or count_totals(segments_BL, None if source is None else source.segments_BS)
        *before, own = trunks(model)
        encoded, records = None, {}
        if before:
            x_BSD, segments_BS = None, source_segments_BS
            if source is not None:
                segments_BS = source.segments_BS
                x_BSD, records, _ = self.run(before[0], embedding(source.tokens_BS, source.positions_BS), source.tokens_BS,
                                             source.positions_BS, segments_BS, router_state, train, totals, wholes,
                                             task_B=task_B)
            encoded = Encoded(x_BSD, segments_BL[:, :, None] == segments_BS[:, None, :])
        x_BLD, own_records, cache = self.run(
            own, embedding(tokens_BL, positions_BL, types_BL), tokens_BL, positions_BL, segments_BL, router_state, train,
            totals, wholes, prefix_BL, encoded, cache, at, cached_segments_BS, task_B)
        records |= own_records
        if model.head == "tokens":
            head_BLD = embedding.before_head(x_BLD)
            return ModelOutput(x_BLD, head_BLD, embedding.logits(head_BLD), None, None, records, cache)
        pooled_BD, logits_BC = Pooled(model, self.dtype, name="pooled")(x_BLD, segments_BL > 0)
        return ModelOutput(x_BLD, x_BLD, None, logits_BC, pooled_BD, records, cache)

    def run(self, trunk: Trunk, x_BLD: Array, tokens_BL: Array, positions_BL: Array, segments_BL: Array,
            router_state: Mapping[str, Any], train: bool, totals: Mapping[str, Totals], wholes: Mapping[str, Any] | None,
            prefix_BL: Array | None = None, encoded: Encoded | None = None, cache: Mapping[str, Any] | None = None,
            at: Array | None = None, cached_segments_BS: Array | None = None, task_B: Array | None = None
            ) -> tuple[Array, dict, dict | None]:
        """Passes vectors through the stacks of a trunk: returns [B, L, D], records and caches."""
        model, mesh = self.model, sharding.current_mesh()
        shards = 1 if mesh is None else sharding.size(mesh, axes.BATCH_AXES)
        context = RoutingContext(tokens_BL.reshape(-1), segments_BL.reshape(-1) > 0, totals[trunk.prefix], whole=None,
                                 carry_TC=None, key=None, sequences=tokens_BL.shape[0], shards=shards, train=train,
                                 task_T=None if task_B is None else jnp.repeat(task_B, tokens_BL.shape[1]))
        sight = look(model, trunk, positions_BL, segments_BL, cached_segments_BS, at, prefix_BL, encoded)
        if model.architecture.positions == "relative":
            keys = segments_BL if cached_segments_BS is None else cached_segments_BS
            bias = RelativeBias(model, trunk.causal, name=f"{trunk.prefix}relative_bias")
            sight = sight.replace(bias_BQLS=bias(distances(segments_BL.shape[1], keys.shape[1], at)))
        shared = (sight, at, context)

        carried = routing.get_router(self.moe.router).carry(self.moe) if self.moe.every else 0
        stream = Stream(x_BLD, jnp.zeros((tokens_BL.size, carried)) if carried else None,
                        jnp.zeros_like(x_BLD) if model.architecture.shortcut else None)
        records, new_cache = {}, {}
        for name, stack in trunk_stacks(model, self.moe, trunk).items():
            per_layer = (router_state.get(name, {}), (wholes or {}).get(name, {}), (cache or {}).get(name, {}))
            if self.scan or self.is_initializing():
                run = nn.scan(
                    Run, variable_axes={"params": 0, DECISIONS: 0, INPUTS: 0, FINITE: 0}, length=stack.repeats,
                    split_rngs={"params": True, "dropout": True}, in_axes=(0, *(nn.broadcast,) * len(shared)),
                    metadata_params={nn.PARTITION_NAME: "layers"})
                stream, (stack_records, stack_cache) = run(
                    model, self.moe, stack.kinds, self.dtype, self.remat, name=name)(stream, per_layer, *shared)
            else:
                stream, (stack_records, stack_cache) = self.one_by_one(name, stack, stream, per_layer, *shared)
            if stack_records:
                records[name] = stack_records
            if stack_cache:
                new_cache[name] = stack_cache
        x_BLD = stream.x_BLD if stream.late_BLD is None else stream.x_BLD + stream.late_BLD
        if model.architecture.final_norm:
            eps = model.norm_eps if model.architecture.final_norm_eps is None else model.architecture.final_norm_eps
            x_BLD = make_norm(model.architecture.norm, eps, f"{trunk.prefix}final_norm")(x_BLD)
        return x_BLD, records, new_cache or None

    def one_by_one(self, name: str, stack: Stack, stream: Stream, per_layer: tuple[Any, Any, Any], *shared: Any
                   ) -> tuple[Stream, tuple[Any, tuple[Any, ...]]]:
        """What a scan over a stack's repeats does, without one; returns the caches as a tuple over repeats."""
        params, *rest = (by_layer(tree, stack.repeats) for tree in (self.variables["params"][name], *per_layer))
        records, caches = [], []
        for params_of, *own in zip(params, *rest, strict=True):
            noise = {"dropout": self.make_rng("dropout")} if self.has_rng("dropout") else {}
            stream, (record, cache) = Run(self.model, self.moe, stack.kinds, self.dtype, self.remat, parent=None).apply(
                {"params": params_of}, stream, tuple(own), *shared, rngs=noise)
            records.append(record)
            caches += [cache] if cache else []
        return stream, (jax.tree.map(lambda *layers: jnp.stack(layers), *records), tuple(caches))


def apply_batch(model: Transformer, params: Any, router_state: Any, batch: Mapping[str, Array], **options: Any
                ) -> ModelOutput:
    """Calls the model on a batch: tokens, positions, segments, and of prefix, types, task and source_* what it has."""
    source = Source(*(batch[f"source_{name}"] for name in ("tokens", "positions", "segments"))
                    ) if "source_tokens" in batch else None
    return model.apply({"params": params}, batch["tokens"], batch["positions"], batch["segments"], router_state,
                       types_BL=batch.get("types"), prefix_BL=batch.get("prefix"), source=source, task_B=batch.get("task"),
                       **options)


def resolve(config: Config) -> Config:
    """A config with nothing left open.

    Raises:
      UserError: an unknown router, what its rule cannot do, or a router that looks at later tokens without leave to do so.
    """
    moe = routing.resolve(config.moe)
    data = dataclasses.replace(config.data, task=mixture.resolve(config.data.task, config.model))
    train = dataclasses.replace(config.train, finetune=finetune.resolve(config.train.finetune, data.task.metrics),
                                faults=faults.resolve(config.train.faults))
    config = dataclasses.replace(config, moe=moe, model=resolve_model(config.model), data=data, train=train)
    if isinstance(data.task, task.Task):
        objective, kind = task.OBJECTIVES[data.task.objective], config.model.kind
        check(kind in objective.kinds and config.model.head in (objective.head, "none"), "config.data.task.objective="
              f"{data.task.objective} needs config.model.kind={' or '.join(objective.kinds)} and config.model.head="
              f"{objective.head}, not {kind} and {config.model.head}")
    plan_stacks(config.model, moe)  # which raises on blocks that there are not
    check_experts(config.model, moe)
    check_router_tasks(config.model, moe, len(data.task.names) if isinstance(data.task, mixture.Mixture) else 0)
    if moe.every:
        reason = routing.leak(moe)
        check(reason is None or moe.allow_noncausal_routing or not trunks(config.model)[-1].causal,
              f"{reason}, so a decoder's loss would be too good to be true; set config.moe.allow_noncausal_routing=True if "
              "you know what you do")
        whole_batch = moe.routing_group == "global" and (moe.capacity_factor is not None or moe.capacity_places is not None
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
    stacks = plan_stacks(model.model, model.moe)
    return {name: by_layer(tree, stacks[name].repeats) if name in stacks else tree for name, tree in params.items()}


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
    source = Source(tokens, tokens, tokens) if model.model.kind == "encoder_decoder" else None
    return model.init(key, tokens, tokens, tokens, initial_router_state(model.model, model.moe), source=source)["params"]


def in_head(path: tuple[str, ...]) -> bool:
    """Whether the parameter at a path of a model's variables belongs to its head: another task has another."""
    return path[:2] == ("params", "pooled") or (path[:2] == ("params", "embedding") and path[2] not in (
        "table", "positions", "types", "norm"))


def head(model: Transformer, params: Mapping[str, Any]) -> Array:
    """The matrix that turns the last activations into logits, float32 [D, V]."""
    return Embedding(model.model, model.dtype).apply({"params": params["embedding"]}, method=Embedding.head)


def count_totals(segments_BL: Array, source_segments_BS: Array | None = None) -> dict[str, Totals]:
    """Real tokens, and sequences with any, of a batch, by the prefix of the trunk that reads them."""
    def count(mask_BL: Array) -> Totals:
        return Totals(jnp.sum(mask_BL, dtype=jnp.float32), jnp.sum(jnp.any(mask_BL, axis=1), dtype=jnp.float32))
    own = {"": count(segments_BL > 0)}
    return own if source_segments_BS is None else own | {ENCODER: count(source_segments_BS > 0)}


def initial_router_state(model: ModelConfig, moe: MoEConfig) -> dict[str, dict[str, dict[str, Array]]]:
    """The routers' state by stack and router, with a leading axis over repeats. An empty dict for stateless routers."""
    merged = model.architecture.merged_experts
    into = {INTO: jnp.arange(moe.num_experts, dtype=jnp.int32) % merged} if merged else {}

    def stacked(repeats: int) -> dict[str, Array]:
        own = routing.get_router(moe.router).initial_state(moe, model.vocab_size) | into
        return {name: jnp.broadcast_to(value, (repeats, *value.shape)) for name, value in own.items()}
    stacks = {name: {router: stacked(stack.repeats) for router in routers(model, stack)}
              for name, stack in plan_stacks(model, moe).items()}
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

    def updated(old: Mapping[str, Array], own: Any) -> dict[str, Array]:
        return {name: old[name] for name in old if name == INTO} | router.update(moe, old, own)
    return {stack: {block: jax.vmap(updated)(old, seen[stack][block]) if old else {} for block, old in blocks.items()}
            for stack, blocks in state.items()}


def statistics_of(records: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Array]]]:
    """The routers' statistics by stack and block: of a whole batch, the `wholes` of the model."""
    return jax.tree.map(lambda record: record.statistics, records, is_leaf=lambda node: isinstance(node, LayerRecord))


def empty_cache(model: ModelConfig, moe: MoEConfig, batch: int, slots: int, dtype: Any) -> dict[str, dict[str, Cache]]:
    """A key-value cache of the last trunk for `slots` tokens a row. The keys of an encoder come to it when that has run."""
    def stacked(repeats: int, sparse: bool) -> Cache:
        latent = model.architecture.latent
        k_GH, v_GH = ((1, latent.rank + latent.rotary_dim), (1, 0)) if latent.rank else (
            ((model.kv_heads, model.head_dim),) * 2)
        keys, values = (jnp.zeros((repeats, batch, slots, *shape), dtype) for shape in (k_GH, v_GH))
        return Cache(keys, values, jnp.zeros((repeats, batch, slots), bool) if sparse and passes_blocks(moe) else None)
    return {name: {f"block_{j}": stacked(stack.repeats, sparse) for j, sparse in enumerate(stack.sparse)}
            for name, stack in trunk_stacks(model, moe, trunks(model)[-1]).items()}


def in_order(records: Mapping[str, Mapping[str, LayerRecord]]) -> list[LayerRecord]:
    """The records of the sparse layers, first layer first; in a block, feed-forward layers before attention."""
    ordered = []
    for stack in records.values():
        repeats = jax.tree.leaves(stack)[0].shape[0]
        ordered += [jax.tree.map(lambda a, r=r: a[r], record) for r in range(repeats) for record in stack.values()]
    return ordered
