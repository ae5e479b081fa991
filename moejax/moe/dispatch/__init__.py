"""HOW TOKENS MOVE: one file per transport, one interface: plan, dispatch, combine."""

from moejax.moe.dispatch import all_gather, all_to_all, dense, ragged, sort
from moejax.moe.dispatch.base import Dispatcher, Sizes

DISPATCHERS: dict[str, Dispatcher] = {
    "dense": Dispatcher(dense.plan, dense.dispatch, dense.combine, manual=False, reaches_all=True),
    "sort": Dispatcher(sort.plan, sort.dispatch, sort.combine, splits_experts=False),
    "all_gather": Dispatcher(all_gather.plan, all_gather.dispatch, all_gather.combine, reaches_all=True),
    "all_to_all": Dispatcher(all_to_all.plan, all_to_all.dispatch, all_to_all.combine, bounded=True),
    "ragged": Dispatcher(ragged.plan, ragged.dispatch, ragged.combine, bounded=True),
}

__all__ = ["DISPATCHERS", "Dispatcher", "Sizes"]
