"""WHO: which experts a token goes to. One file per family; a new router is a file and a line in `ROUTERS`."""

from moejax.config import UserError, nearest
from moejax.moe.routing.base import Parameter, Router
from moejax.moe.routing.expert_choice import EXPERT_CHOICE
from moejax.moe.routing.hash import HASH
from moejax.moe.routing.topk import TOPK

ROUTERS: dict[str, Router] = {
    "topk": TOPK,
    "expert_choice": EXPERT_CHOICE,
    "hash": HASH,
}


def get_router(name: str) -> Router:
    """The router of that name. Raises `UserError`, with the nearest name, if there is none."""
    if name not in ROUTERS:
        raise UserError(f"config.moe.router={name!r} must be one of {', '.join(ROUTERS)}{nearest(name, list(ROUTERS))}")
    return ROUTERS[name]


__all__ = ["Parameter", "ROUTERS", "Router", "get_router"]
