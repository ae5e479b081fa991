"""WHO: which experts a token goes to. One file per family; a new router is a file and a line in `ROUTERS`."""

import dataclasses
from typing import Any, Mapping

from moejax.config import AUTO, ROUTED, MoEConfig, UserError, build_group, check, nearest
from moejax.moe.routing import presets
from moejax.moe.routing.base import Parameter, Router
from moejax.moe.routing.base_layers import BASE
from moejax.moe.routing.cosine import X_MOE
from moejax.moe.routing.depths import MIXTURE_OF_DEPTHS
from moejax.moe.routing.dselect import DSELECT
from moejax.moe.routing.expert_choice import EXPERT_CHOICE
from moejax.moe.routing.gshard import GSHARD
from moejax.moe.routing.hash import HASH, HASH_BALANCED, HASH_WEIGHTS, MULTI_HASH
from moejax.moe.routing.merge import LORY, SMEAR
from moejax.moe.routing.noisy import NOISY_TOPK, V_MOE
from moejax.moe.routing.null import ADAMOE, LONGCAT, MOE_PP
from moejax.moe.routing.quantile import QUANTILE
from moejax.moe.routing.random import RANDOM
from moejax.moe.routing.remoe import REMOE
from moejax.moe.routing.rounding import ROUNDING
from moejax.moe.routing.sinkhorn import SINKHORN
from moejax.moe.routing.soft import SOFT_MOE
from moejax.moe.routing.sparse_mixer import SPARSE_MIXER
from moejax.moe.routing.threshold import THRESHOLD
from moejax.moe.routing.top_p import TOP_P
from moejax.moe.routing.topk import TOPK

ROUTERS: dict[str, Router] = {
    "topk": TOPK,
    "switch": presets.SWITCH,
    "st_moe": presets.ST_MOE,
    "mixtral": presets.MIXTRAL,
    "olmoe": presets.OLMOE,
    "deepseek_moe": presets.DEEPSEEK_MOE,
    "deepseek_v2": presets.DEEPSEEK_V2,
    "deepseek_v3": presets.DEEPSEEK_V3,
    "loss_free": presets.LOSS_FREE,
    "loss_free_softmax": presets.LOSS_FREE_SOFTMAX,
    "qwen_global": presets.QWEN_GLOBAL,
    "llama4": presets.LLAMA4,
    "latent_moe": presets.LATENT_MOE,
    "pr_moe": presets.PR_MOE,
    "noisy_topk": NOISY_TOPK,
    "v_moe": V_MOE,
    "sparse_mixer": SPARSE_MIXER,
    "gshard": GSHARD,
    "x_moe": X_MOE,
    "top_p": TOP_P,
    "adamoe": ADAMOE,
    "moe_pp": MOE_PP,
    "longcat": LONGCAT,
    "remoe": REMOE,
    "dselect": DSELECT,
    "expert_choice": EXPERT_CHOICE,
    "base": BASE,
    "sinkhorn": SINKHORN,
    "hash": HASH,
    "multi_hash": MULTI_HASH,
    "hash_balanced": HASH_BALANCED,
    "hash_weights": HASH_WEIGHTS,
    "random": RANDOM,
    "quantile": QUANTILE,
    "expert_threshold": THRESHOLD,
    "token_rounding": ROUNDING,
    "mixture_of_depths": MIXTURE_OF_DEPTHS,
    "soft_moe": SOFT_MOE,
    "smear": SMEAR,
    "lory": LORY,
}


def get_router(name: str) -> Router:
    """The router of that name. Raises `UserError`, with the nearest name, if there is none."""
    if name not in ROUTERS:
        raise UserError(f"config.moe.router={name!r} must be one of {', '.join(ROUTERS)}{nearest(name, list(ROUTERS))}")
    return ROUTERS[name]


def resolve(config: MoEConfig) -> MoEConfig:
    """Puts in what a config leaves to its router, and checks the router's options. Again does nothing.

    Raises:
      UserError: an unknown router or option, or settings that its rule cannot do.
    """
    router = get_router(config.router)
    fallbacks = {field.name: field.metadata["fallback"] for field in dataclasses.fields(config) if field.name in ROUTED}
    values = {name: router.defaults.get(name, fallbacks[name]) for name in ROUTED if getattr(config, name) == AUTO}
    if values.get("experts_per_token", 0) > config.num_experts:
        values["experts_per_token"] = config.num_experts
    resolved = dataclasses.replace(config, options=resolve_options(router, config.options), **values)
    check(resolved.experts_per_token <= resolved.num_experts,
          f"config.moe.experts_per_token={resolved.experts_per_token} is more than "
          f"config.moe.num_experts={resolved.num_experts}")
    router.check(resolved)
    check(resolved.bias_rate == 0 or "bias_E" in router.initial_state(resolved, 1),
          f"config.moe.router={config.router} has no selection bias; leave config.moe.bias_rate alone or set it to 0")
    return resolved


def resolve_options(router: Router, given: Any) -> Any:
    """The options of a router as its own frozen dataclass."""
    kind = type(router.options)
    if isinstance(given, kind):
        return given
    check(given is None or isinstance(given, Mapping),
          f"config.moe.options are those of another router ({type(given).__module__}); give them by name")
    return build_group(kind, dataclasses.asdict(router.options) | dict(given or {}), "config.moe.options")


def leak(config: MoEConfig) -> str | None:
    """Why the layer's output for a token depends on later tokens, in training or evaluation; None if it does not."""
    router = get_router(config.router)
    if not router.causal:
        return f"config.moe.router={config.router} looks at later tokens"
    orders = ("choice_major",) if config.experts_per_token > 1 or router.variable else ()
    drops = (config.capacity_factor, config.eval_capacity_factor, config.capacity_places) != (None, None, None)
    if drops and config.drop_policy in (*orders, "token_weight", "weight"):
        return (f"config.moe.drop_policy={config.drop_policy} with a capacity gives places in an expert to later tokens "
                "before earlier ones (token_major would not, nor no capacity at all)")
    return None


__all__ = ["ROUTERS", "Parameter", "Router", "get_router", "leak", "resolve"]
