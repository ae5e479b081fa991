"""Options of a model that cannot be together, or that a router cannot do."""

import dataclasses

from moejax.architecture import Architecture
from moejax.config import ModelConfig, MoEConfig, build_group, check
from moejax.layers.mlp import PLAIN_ONES
from moejax.moe import routing


def check_experts(model: ModelConfig, moe: MoEConfig) -> None:
    """Raises `UserError` on options of sparse blocks that the router or a size does not allow."""
    design, where = model.architecture, "config.model.architecture"
    known = routing.get_router(moe.router)
    check(not design.merged_experts or (known.level == "layer" and known.route is routing.get_router("topk").route
                                        and design.merged_experts <= moe.num_experts),
          f"{where}.merged_experts={design.merged_experts} needs a top-k router and no more than config.moe.num_experts="
          f"{moe.num_experts}; python -m moejax.compress merge makes such models")
    check(not design.shortcut or known.level == "layer", f"{where}.shortcut needs experts that a block's output can do "
          f"without for a while; config.moe.router={moe.router} lets tokens pass whole blocks")
    if moe.every and design.expert_heads:
        check_heads(model, moe)
    width, hidden = model.embed // moe.latent_divisor, moe.ffn or model.ffn
    check(design.expert_bits != 4 or width % 2 == hidden % 2 == 0, f"{where}.expert_bits=4: numbers go in pairs, so the "
          f"width {width} and the experts' hidden width {hidden} must be even; take 8 bits")


def check_heads(model: ModelConfig, moe: MoEConfig) -> None:
    """Raises `UserError` on experts that are attention heads, where there cannot be such."""
    design, where = model.architecture, "config.model.architecture.expert_heads"
    check(routing.get_router(moe.router).route is routing.get_router("topk").route and moe.options.gate == "output",
          f"{where} needs a top-k router that weighs outputs, not config.moe.router={moe.router}")
    check(model.heads == model.kv_heads * moe.experts_per_token, f"{where}: a token has the heads of its config.moe."
          f"experts_per_token={moe.experts_per_token} experts, config.model.kv_heads={model.kv_heads} each, so set "
          f"config.model.heads to {model.kv_heads * moe.experts_per_token}, not {model.heads}")
    others = {"latent": bool(design.latent.rank), "qkv_bias": design.qkv_bias,
              "merged_experts": design.merged_experts is not None}
    found = [name for name, there in others.items() if there]
    check(not found, f"{where} is not implemented together with config.model.architecture.{found and found[0]}")


def check_router_tasks(model: ModelConfig, moe: MoEConfig, tasks: int) -> None:
    """Raises `UserError` if routers are to know of tasks and cannot, or of others than the mixture's; 0 tasks are none."""
    known, where = model.architecture.router_tasks, "config.model.architecture.router_tasks"
    if not known:
        return
    check(known == tasks, f"{where}={known}, but " + (f"config.data.task has {tasks} tasks" if tasks else "there is one "
          "task only; it is for mixtures (config.data.task.tasks)"))
    check(not model.architecture.expert_heads, f"{where} is not implemented together with config.model.architecture."
          "expert_heads")
    router = routing.get_router(moe.router)
    check(moe.every > 0 and router.level == "layer" and bool(router.parameters(moe, model.embed)), f"{where}: there is no "
          f"router that could learn of tasks (config.moe.every={moe.every}, config.moe.router={moe.router}); set it to 0")


def resolve_model(model: ModelConfig) -> ModelConfig:
    """The settings with a typed `Architecture`. Raises `UserError` on unknown options and on what cannot be together."""
    given = model.architecture
    if isinstance(given, Architecture):
        return model
    design = build_group(Architecture, given or {}, "config.model.architecture")
    where, latent = "config.model.architecture", design.latent
    check(model.kind == "encoder_decoder" or model.encoder_layers is None,
          f"config.model.encoder_layers={model.encoder_layers} needs config.model.kind=encoder_decoder")
    if model.kind == "encoder_decoder":
        without = [name for name in ("sinks", "clip_qkv") if getattr(design, name)] + (["latent"] if latent.rank else [])
        check(not without and not model.qk_norm, f"{where}.{without[0] if without else 'qk_norm'} is not implemented for "
              "config.model.kind=encoder_decoder")
    if design.positions == "relative":
        least = 2 if model.kind == "decoder" else 4
        check(design.relative_buckets >= least and design.relative_distance > design.relative_buckets // 2,
              f"{where}.relative_buckets={design.relative_buckets} must be at least {least}, and relative_distance="
              f"{design.relative_distance} more than half of them")
    check(model.kind == "decoder" or "chunked" not in design.attention,
          f"{where}.attention=chunked is for decoders only; use sliding")
    check(not design.head_layer or design.activation in PLAIN_ONES,
          f"{where}.head_layer needs an activation without a gate, not {design.activation}: {', '.join(PLAIN_ONES)}")
    check(model.kind != "decoder" or model.head == "tokens" or design.pool != "first",
          f"{where}.pool=first: the first token of a decoder sees nothing of the text; take last or mean")
    check(not design.pooler or model.head != "tokens", f"{where}.pooler needs config.model.head=classes or none")
    check(design.start_token < model.vocab_size, f"{where}.start_token={design.start_token} is not in the vocabulary of "
          f"config.model.vocab_size={model.vocab_size}")
    check(len(design.attention) > 0, f"{where}.attention must name at least one kind")
    check(design.window > 0 or not {"sliding", "chunked"} & set(design.attention),
          f"{where}.attention is {' and '.join(design.attention)}; set {where}.window to how many tokens they see")
    check(design.rope.scaling not in ("llama3", "yarn") or design.rope.original_length > 0,
          f"{where}.rope.scaling={design.rope.scaling} needs {where}.rope.original_length")
    check(not latent.rank or (0 < latent.rotary_dim < model.head_dim and latent.rotary_dim % 2 == 0 and latent.value_dim > 0
                              and model.kv_heads == model.heads),
          f"{where}.latent needs an even rotary_dim below config.model.head_dim={model.head_dim}, a value_dim, and "
          "config.model.kv_heads=config.model.heads")
    check(not design.shortcut or design.norm_place == "input", f"{where}.shortcut adds to the stream behind a block's "
          f"layers, so {where}.norm_place must be input, not {design.norm_place}")
    check(not latent.scaled or latent.rank > 0, f"{where}.latent.scaled needs {where}.latent.rank")
    if latent.rank:
        ignored = [name for name in ("sinks", "attention_scale", "clip_qkv", "temperature_floor") if getattr(design, name)]
        check(not ignored, f"{where}.{ignored and ignored[0]} has no effect with {where}.latent; leave one of them out")
        check(design.positions == "rotary" and "unrotated" not in design.attention and not model.qk_norm,
              f"{where}.latent rotates a part of every head and has norms of its own; leave out positions=learned, "
              "unrotated blocks and config.model.qk_norm")
    return dataclasses.replace(model, architecture=design)
