"""Sort: all experts are at hand; tokens are gathered into rows ordered by expert, and their results gathered back.

Dispatch and combine are each other's transpose, so with a token-major list both their gradients are gathers too:
nothing scatters, which is slow on CPU and not deterministic on GPU.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from moejax.moe.dispatch.base import Sizes
from moejax.moe.types import Assignments


@struct.dataclass
class SortPlan:
    """Where everything lies. An index equal to the length of what it points into means "nothing".

    Attributes:
      sizes_E: rows of each expert; those of expert 0 come first, and so on.
      weight_N: of each pair; 0 where it has no row.
      used_N: float32, 1 for pairs that have a row and 0 for others.
      row_N: the row of each pair.
      pair_R: the pair of each row.
      token_N: the token of each pair.
      token_R: the token of each row.
      tokens: T.
      choices: as in `Assignments`.
    """

    sizes_E: Array
    weight_N: Array
    used_N: Array
    row_N: Array
    pair_R: Array
    token_N: Array
    token_R: Array
    tokens: int = struct.field(pytree_node=False)
    choices: int = struct.field(pytree_node=False)


def plan(assignments: Assignments, sizes: Sizes) -> SortPlan:
    """Orders the valid pairs by expert, keeping list order within one, with rows of nothing behind them."""
    rows = -(-(assignments.expert_N.shape[0] + sizes.spare) // sizes.multiple) * sizes.multiple
    place_N, _, first_E = order(assignments, sizes.experts)
    row_N = jnp.where(assignments.valid_N, place_N, rows)
    return lay_out(assignments, row_N, rows, sizes.tokens, jnp.diff(first_E))


def order(assignments: Assignments, num_experts: int) -> tuple[Array, Array, Array]:
    """Puts the pairs in order of their experts, keeping list order within one, those that are not valid last.

    Returns:
      int32: the place of each pair [N]; its expert, or `num_experts` if it is not valid [N]; and the first place of each
      expert [E + 1], that behind the last one included.
    """
    pairs = assignments.expert_N.shape[0]
    pair_N = jnp.arange(pairs, dtype=jnp.int32)
    expert_N = jnp.where(assignments.valid_N, assignments.expert_N, num_experts)
    if pairs * (num_experts + 1) < 2**31:
        # One number that holds both sorts faster than two arrays.
        sorted_N = jnp.sort(expert_N * pairs + pair_N)
        order_N, sorted_N = sorted_N % pairs, sorted_N // pairs
    else:
        sorted_N, order_N = jax.lax.sort((expert_N, pair_N), num_keys=1, is_stable=True)
    # Unrolled, for a loop's steps are waited for on a GPU.
    first_E = jnp.searchsorted(sorted_N, jnp.arange(num_experts + 1), method="scan_unrolled").astype(jnp.int32)
    return jnp.zeros_like(pair_N).at[order_N].set(pair_N, unique_indices=True), expert_N, first_E


def lay_out(assignments: Assignments, row_N: Array, rows: int, tokens: int, sizes_E: Array) -> SortPlan:
    """The plan that puts pair n in row row_N[n] of `rows` rows, or nowhere if it is `rows`."""
    pairs = row_N.shape[0]
    pair_R = jnp.full(rows, pairs, jnp.int32).at[row_N].set(
        jnp.arange(pairs, dtype=jnp.int32), mode="drop", unique_indices=True)
    token_R = assignments.token_N.at[pair_R].get(mode="fill", fill_value=tokens)
    weight_N = jnp.where(row_N < rows, assignments.weight_N, 0)
    return SortPlan(sizes_E, weight_N, (row_N < rows).astype(jnp.float32), row_N, pair_R, assignments.token_N, token_R,
                    tokens, assignments.choices)


def take(x: Array, index: Array) -> Array:
    """Rows of x; any row where the index points past the end: what is read there must not count."""
    return jnp.take(x, index, axis=0, mode="clip")


def sum_per_token(x_RD: Array, weight_N: Array, plan: SortPlan) -> Array:
    """Adds up, in float32, the weighted rows of every token: [T, D]. A weight of 0 leaves a pair out, whatever it holds."""
    if plan.choices:
        x_TKD = take(x_RD, plan.row_N).reshape(plan.tokens, plan.choices, -1).astype(jnp.float32)
        weight_TK1 = weight_N.reshape(plan.tokens, plan.choices, 1)
        return jnp.sum(jnp.where(weight_TK1 == 0, 0, x_TKD * weight_TK1), axis=1).astype(x_RD.dtype)
    x_RD, dtype = x_RD.astype(jnp.float32) * take(weight_N, plan.pair_R)[:, None], x_RD.dtype
    return jnp.zeros((plan.tokens, x_RD.shape[1])).at[plan.token_R].add(x_RD, mode="drop").astype(dtype)


@jax.custom_vjp
def dispatch(x_TD: Array, plan: SortPlan) -> Array:
    """Copies each token to the rows of its experts: [T, D] -> [R, D]. Rows of nothing hold another token."""
    return take(x_TD, plan.token_R)


dispatch.defvjp(
    lambda x_TD, plan: (dispatch(x_TD, plan), plan),
    lambda plan, dx_RD: (sum_per_token(dx_RD, plan.used_N, plan), None),
)


def combine(y_RD: Array, plan: SortPlan) -> Array:
    """Adds each token's rows, weighted: [R, D] -> [T, D]."""
    return _combine(y_RD, plan.weight_N, plan)


@jax.custom_vjp
def _combine(y_RD: Array, weight_N: Array, plan: SortPlan) -> Array:
    return sum_per_token(y_RD, weight_N, plan)


def _combine_backward(saved, dy_TD):
    y_RD, weight_N, plan = saved
    dy_RD = take(dy_TD, plan.token_R)
    d_weight_R = jnp.sum(dy_RD.astype(jnp.float32) * y_RD.astype(jnp.float32), axis=1)
    d_weight_N = jnp.where(plan.used_N > 0, take(d_weight_R, plan.row_N), 0)
    dy_RD = dy_RD * take(weight_N, plan.pair_R)[:, None]
    return dy_RD.astype(y_RD.dtype), d_weight_N.astype(weight_N.dtype), None


_combine.defvjp(lambda y_RD, weight_N, plan: (_combine(y_RD, weight_N, plan), (y_RD, weight_N, plan)),
                _combine_backward)
