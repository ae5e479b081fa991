"""A model whose experts' matrices are stored in few bits, for inference; see `moejax.moe.weights`."""

import dataclasses
from typing import Any, Mapping

import jax

from moejax.config import check
from moejax.models import transformer
from moejax.models.checks import check_experts
from moejax.models.stacks import sparse_places
from moejax.moe.weights import quantise


def in_few_bits(model: transformer.Transformer, variables: Mapping[str, Any], bits: int
                ) -> tuple[transformer.Transformer, dict[str, Any]]:
    """The same model with its experts rounded to 8 or 4 bits.

    Raises:
      UserError: no experts, experts in few bits already, or at 4 bits an odd width.
    """
    model_config, moe = model.model, model.moe
    sparse = sorted({place[:2] for place in sparse_places(model_config, moe)})
    check(bits in (4, 8), f"experts are stored in 8 or 4 bits, not {bits}")
    check(bool(sparse) and not model_config.architecture.expert_bits, "this model has no experts that are not in few bits "
          "already")
    design = dataclasses.replace(model_config.architecture, expert_bits=bits)
    check_experts(dataclasses.replace(model_config, architecture=design), moe)
    params = dict(variables["params"])
    for stack, block in sparse:
        own = dict(params[stack][block]["moe"])
        for name in ("w_in", "w_out"):
            own[name], own[f"{name}_scale"] = jax.vmap(lambda w: quantise(w, bits))(own[name])
        params[stack] = {**params[stack], block: {**params[stack][block], "moe": own}}
    return model.clone(model=dataclasses.replace(model_config, architecture=design)), {**variables, "params": params}
