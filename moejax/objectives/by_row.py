"""What an objective of tokens gives for each row: of this the losses of tasks and the share of faultless rows are made."""

import jax.numpy as jnp
from jax import Array

from moejax.objectives.chunked import Objective
from moejax.objectives.cross_entropy import of_targets


def with_rows(objective: Objective, rows: int) -> Objective:
    """The objective, which then also takes the number of each token's row and reports sums for each row of the batch.

    Args:
      objective: of scores, targets and mask, as `over_chunks` takes them.
      rows: B of the whole batch, of which the objective may see some rows and slots at a time.

    Returns:
      (logits_BLV, targets_BL, mask_BL, ..., row_BL) -> what the objective gives, with `row_loss` (negative log-likelihood,
      nats) and `row_errors` (targets that another token outscores), float32 [B], among the sums to report.
    """
    def of_batch_and_rows(logits_BLV: Array, targets_BL: Array, mask_BL: Array, *rest: Array
                          ) -> tuple[Array, dict[str, Array]]:
        *more, row_BL = rest
        total, sums = objective(logits_BLV, targets_BL, mask_BL, *more)
        log_z_BL, target_BL, right_BL = of_targets(logits_BLV, targets_BL)  # as in the objective; XLA computes it once

        def by_row(value_BL: Array) -> Array:
            return jnp.zeros(rows).at[row_BL[:, 0]].add(jnp.sum(jnp.where(mask_BL, value_BL, 0.0), axis=-1))
        return total, sums | {"row_loss": by_row(log_z_BL - target_BL), "row_errors": by_row(jnp.float32(~right_BL))}
    return of_batch_and_rows


def sums_of_tasks(loss_B: Array, mask_BL: Array, task_B: Array, tasks: int) -> dict[str, Array]:
    """`task_loss` and `task_targets`, float32 [tasks]: sums over the rows of each task; of parts of a batch they add up."""
    def by_task(value_B: Array) -> Array:
        return jnp.zeros(tasks).at[task_B].add(value_B)
    return {"task_loss": by_task(loss_B), "task_targets": by_task(jnp.sum(mask_BL, axis=1, dtype=jnp.float32))}


def faultless(errors_B: Array, mask_BL: Array) -> dict[str, Array]:
    """`rows`, those with anything to tell, and `faultless`, those of them without an error.

    A row without an error is what greedy decoding would write, and any other is not.
    """
    told_B = jnp.any(mask_BL, axis=1)
    return {"rows": jnp.sum(told_B), "faultless": jnp.sum(told_B & (errors_B == 0))}
