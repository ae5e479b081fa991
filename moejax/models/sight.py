"""Where tokens stand and what they see."""

import jax.numpy as jnp
from jax import Array

from moejax.architecture import Architecture
from moejax.config import ModelConfig
from moejax.layers.attention import Encoded, Sight
from moejax.layers.rotary import angles
from moejax.models.stacks import Trunk


def look(model: ModelConfig, trunk: Trunk, positions_BL: Array, segments_BL: Array,
         cached_segments_BS: Array | None = None, at: Array | None = None, prefix_BL: Array | None = None,
         encoded: Encoded | None = None) -> Sight:
    """Where the tokens of a batch stand and what they see; see `Transformer` for the arguments."""
    design = model.architecture
    cos = sin = temperature_BL = None
    if design.positions == "rotary":
        dims = design.latent.rotary_dim or int(model.head_dim * design.rope.fraction)
        cos, sin = angles(positions_BL, dims, model.rope_base, design.rope)
    if design.temperature_floor:
        passed_BL = jnp.floor((positions_BL + 1.0) / design.temperature_floor)
        temperature_BL = 1 + design.temperature_scale * jnp.log1p(passed_BL)
    seen = visibility(design, trunk.causal, positions_BL, segments_BL, cached_segments_BS, at, prefix_BL)
    return Sight(cos, sin, seen, temperature_BL, encoded=encoded, causal=trunk.causal and prefix_BL is None)


def distances(length: int, keys: int, at: Array | None) -> Array:
    """How far each of `keys` slots lies behind each of L tokens, the first of them in slot `at`; int32 [L, S]."""
    # Tokens of a segment lie one behind the other, so these are the distances of their positions too.
    return (jnp.arange(length) + (0 if at is None else at))[:, None] - jnp.arange(keys)


def visibility(design: Architecture, causal: bool, positions_BL: Array, segments_BL: Array,
               cached_segments_BS: Array | None, at: Array | None, prefix_BL: Array | None) -> dict[str, Array]:
    """Which slots each token sees, by kind of attention. Bool [B, L, S].

    Those of its own segment, if causal up to itself and of the prefix; or those of them that are near.
    """
    keys_BS = segments_BL if cached_segments_BS is None else cached_segments_BS
    back_LS = distances(segments_BL.shape[1], keys_BS.shape[1], at)
    full_BLS = segments_BL[:, :, None] == keys_BS[:, None, :]
    if causal and prefix_BL is None:
        full_BLS &= back_LS >= 0
    elif causal:
        in_prefix_BS = jnp.zeros(keys_BS.shape, bool).at[:, (0 if at is None else at) + jnp.arange(prefix_BL.shape[1])].set(
            prefix_BL)
        full_BLS &= (back_LS >= 0) | in_prefix_BS[:, None, :]
    since_BL1 = (positions_BL % max(design.window, 1))[:, :, None]  # tokens of its part that are before it
    bounds = {
        "sliding": lambda: abs(back_LS) < design.window,
        "chunked": lambda: (back_LS <= since_BL1) & (back_LS > since_BL1 - design.window),
    }
    return {kind: full_BLS & bounds[kind]() if kind in bounds else full_BLS for kind in sorted(set(design.attention))}
