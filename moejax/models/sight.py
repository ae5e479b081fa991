"""Where tokens stand and what they see."""

import jax.numpy as jnp
from jax import Array

from moejax.architecture import Architecture
from moejax.config import ModelConfig
from moejax.layers.attention import Sight
from moejax.layers.rotary import angles


def look(model: ModelConfig, positions_BL: Array, segments_BL: Array, cached_segments_BS: Array | None,
         at: Array | None) -> Sight:
    """Where the tokens of a batch stand and what they see; see `Transformer` for the arguments."""
    design = model.architecture
    cos = sin = temperature_BL = None
    if design.positions == "rotary":
        dims = design.latent.rotary_dim or int(model.head_dim * design.rope.fraction)
        cos, sin = angles(positions_BL, dims, model.rope_base, design.rope)
    if design.temperature_floor:
        passed_BL = jnp.floor((positions_BL + 1.0) / design.temperature_floor)
        temperature_BL = 1 + design.temperature_scale * jnp.log1p(passed_BL)
    return Sight(cos, sin, visibility(design, positions_BL, segments_BL, cached_segments_BS, at), temperature_BL)


def visibility(design: Architecture, positions_BL: Array, segments_BL: Array, cached_segments_BS: Array | None,
               at: Array | None) -> dict[str, Array]:
    """Which slots each token sees, by kind of attention: those of its own segment up to itself, or the last of them.

    Bool [B, L, S].
    """
    keys_BS = segments_BL if cached_segments_BS is None else cached_segments_BS
    slots_L = jnp.arange(segments_BL.shape[1]) + (0 if at is None else at)
    back_LS = slots_L[:, None] - jnp.arange(keys_BS.shape[1])  # tokens of a segment lie one behind the other
    full_BLS = (segments_BL[:, :, None] == keys_BS[:, None, :]) & (back_LS >= 0)
    bounds = {
        "sliding": lambda: back_LS < design.window,
        "chunked": lambda: back_LS <= (positions_BL % max(design.window, 1))[:, :, None],
    }
    return {kind: full_BLS & bounds[kind]() if kind in bounds else full_BLS for kind in sorted(set(design.attention))}
