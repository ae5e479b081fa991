"""A model whose routers know of tasks, as it is for one of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.config import check
from moejax.models.stacks import sparse_places
from moejax.models.transformer import Transformer
from moejax.moe.layer import TASK_VECTORS


def for_task(model: Transformer, variables: Mapping[str, Any], number: int) -> tuple[Transformer, dict[str, Any]]:
    """The model that every row is one of a task for; the same one if its routers do not know of tasks.

    Args:
      model: of a mixture with `config.model.architecture.router_tasks`.
      variables: {"params": parameters, "router": router state}.
      number: of the task, in the order of the names.

    Raises:
      UserError: there is no task of that number.
    """
    design = model.model.architecture
    if not design.router_tasks:
        return model, dict(variables)
    check(0 <= number < design.router_tasks, f"number={number}: the routers know of {design.router_tasks} tasks, from 0")
    params = dict(variables["params"])
    for stack, block in sorted({place[:2] for place in sparse_places(model.model, model.moe)}):
        own = params[stack][block]
        vectors_LND = own["moe"][TASK_VECTORS][:, number:number + 1]
        params[stack] = {**params[stack], block: {**own, "moe": {**own["moe"], TASK_VECTORS: vectors_LND}}}
    alone = dataclasses.replace(model.model, architecture=dataclasses.replace(design, router_tasks=1))
    return model.clone(model=alone), {**variables, "params": params}
