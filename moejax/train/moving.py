"""Which parameters move in a run, and how fast beside each other."""

from typing import Any, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from moejax.config import ModelConfig, MoEConfig, check
from moejax.finetune import Finetune, matching
from moejax.models.adapters import ADAPTERS
from moejax.models.stacks import ENCODER, places, trunks
from moejax.models.transformer import in_head

Path = tuple[str, ...]


class Moving(NamedTuple):
    """Which parameters move.

    Attributes:
      paths: of those that do.
      factors: on their updates, by path: a number, or for a stack of blocks one for each repeat.
    """

    paths: frozenset[Path]
    factors: dict[Path, np.ndarray]

    def split(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Nested dicts with the parameters that move, and with the others."""
        flat = flatten_dict(params)
        return tuple(unflatten_dict({path: leaf for path, leaf in flat.items() if (path in self.paths) == moves})
                     for moves in (True, False))

    def scaled(self, rule: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
        """An update rule whose updates are multiplied by the factors."""
        if all(np.all(factor == 1) for factor in self.factors.values()):
            return rule
        return optax.chain(rule, optax.stateless(lambda updates, params=None: times(self.factors, updates)))

    def counted(self, grads: Mapping[str, Any]) -> Mapping[str, Any]:
        """Gradients with zeros where a parameter stays though others of its array move, so that they count for nothing."""
        if all(np.all(factor > 0) for factor in self.factors.values()):
            return grads
        return times({path: (factor > 0).astype(np.float32) for path, factor in self.factors.items()}, grads)

    def following(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
        """The routers' new state, but the old one in blocks of which no parameter moves."""
        def of_block(stack: str, block: str) -> Any:
            own = [factor > 0 for path, factor in self.factors.items() if path[:2] == (stack, block)]
            moves_R = np.any(np.stack(own), axis=0) if own else np.zeros(1, bool)
            return jax.tree.map(lambda a, b: jnp.where(moves_R.reshape(-1, *[1] * (a.ndim - 1)), b, a),
                                old[stack][block], new[stack][block])
        return {stack: {block: of_block(stack, block) for block in blocks} for stack, blocks in old.items()}


def times(factors: Mapping[Path, np.ndarray], updates: Mapping[str, Any]) -> dict[str, Any]:
    """Updates times the factors on the repeats of their arrays."""
    scaled = {}
    for path, update in flatten_dict(updates).items():
        factor = factors[path].reshape(-1, *[1] * (update.ndim - 1))
        scaled[path] = jnp.where(factor == 0, 0, update * factor)  # also where the update is no finite number
    return unflatten_dict(scaled)


def join(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that `Moving.split` has parted."""
    return unflatten_dict(flatten_dict(one) | flatten_dict(other))


def moving(options: Finetune, model: ModelConfig, moe: MoEConfig, logical: Mapping[str, Any]) -> Moving:
    """What moves in a run.

    Args:
      options: of the fine-tuning; patterns and blocks.
      model, moe: settings.
      logical: axes of all parameters, adapters included.

    Raises:
      UserError: a pattern that matches nothing, a block that there is not, or nothing that moves.
    """
    names = {"/".join(path): path for path in flatten_dict(logical)}
    new = {name for name, path in names.items()
           if path[0] == ADAPTERS or (model.head == "classes" and in_head(("params", *path)))}
    if options.train is not None:
        chosen = matching(options.train, names, "train") | {name for name in new if names[name][0] == ADAPTERS}
    else:
        chosen = new if options.lora_rank else set(names)
    chosen -= matching(options.freeze, names, "freeze")
    levels, top = levels_of(model, moe)
    check(all(block < top - 1 for block in options.freeze_blocks), "config.train.finetune.freeze_blocks="
          f"{options.freeze_blocks} names blocks beyond the {top - 1} that there are")
    still = {block + 1 for block in options.freeze_blocks}

    def factor(path: Path) -> np.ndarray:
        level = levels(path)
        return np.where(np.isin(level, list(still)), 0, options.layer_decay**(top - level)).astype(np.float32)

    factors = {names[name]: factor(names[name]) for name in chosen}
    paths = frozenset(path for path, value in factors.items() if np.any(value > 0))
    check(bool(paths), "config.train.finetune leaves nothing that moves; let something out of freeze or freeze_blocks")
    return Moving(paths, {path: factors[path] for path in paths})


def levels_of(model: ModelConfig, moe: MoEConfig) -> tuple[Any, int]:
    """How far each parameter is from the input.

    Returns:
      A function of a path: 0 for what makes tokens vectors, i + 1 for block i, an encoder's before its decoder's, and the
      top for what follows them; for a stack of blocks an array over its repeats. And the top.
    """
    blocks: dict[tuple[str, str], list[int]] = {}
    for i, (stack, block, _) in enumerate(places(model, moe)):
        blocks.setdefault((stack, block), []).append(i + 1)
    top = sum(trunk.layers for trunk in trunks(model)) + 1
    before = trunks(model)[0].layers

    def level(path: Path) -> np.ndarray:
        if path[0] == ADAPTERS:
            path = path[1:-1]
        if path[:2] in blocks:
            return np.array(blocks[path[:2]])
        if path[0] == f"{ENCODER}final_norm":
            return np.array([before])
        low = path[0].endswith("relative_bias") or (path[0] == "embedding" and not in_head(("params", *path)))
        return np.array([0 if low else top])

    return level, top
