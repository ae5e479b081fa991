"""Relative position bias (Raffel et al. 2020, arXiv 1910.10683): a learned score for each head and class of distance."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax import sharding
from moejax.config import ModelConfig


def buckets_by_distance(buckets: int, most: int, causal: bool) -> np.ndarray:
    """The class of each distance from -most to most, int32 [2 * most + 1].

    A distance is how far a key lies behind its query, negative if it lies after it. Half of the classes are single
    distances, the others grow with the logarithm; from `most` on all are the last one. If causal, keys after the query
    count as distance 0; else they have one half of the classes to themselves.
    """
    back = np.arange(-most, most + 1)
    offset = 0
    if causal:
        back = np.maximum(back, 0)
    else:
        buckets //= 2
        offset, back = np.where(back < 0, buckets, 0), np.abs(back)
    exact = buckets // 2
    # In float32, as others take it: at the bounds of the classes roundings decide.
    far = np.log(np.maximum(back, 1).astype(np.float32) / exact) / math.log(most / exact) * (buckets - exact)
    return (offset + np.where(back < exact, back, np.minimum(exact + far.astype(int), buckets - 1))).astype(np.int32)


class RelativeBias(nn.Module):
    """The table of scores, one for all blocks of a trunk.

    Attributes:
      model: `heads`, and the classes in `architecture`.
      causal: see `buckets_by_distance`.
    """

    model: ModelConfig
    causal: bool

    @nn.compact
    def __call__(self, back_LS: Array) -> Array:
        """What the distances add to the scores, float32 [1, Q, L, S]."""
        design = self.model.architecture
        most = design.relative_distance
        bucket_N = jnp.asarray(buckets_by_distance(design.relative_buckets, most, self.causal))
        # T5 starts it with the deviation of its queries' projection, 1/sqrt(D).
        table_NQ = self.param("table", nn.with_logical_partitioning(
            nn.initializers.normal(self.model.embed**-0.5), ("positions", "q_heads")),
            (design.relative_buckets, self.model.heads))
        bias_LSQ = table_NQ[bucket_N[jnp.clip(back_LS, -most, most) + most]]
        return sharding.constrain(jnp.transpose(bias_LSQ, (2, 0, 1))[None], None, "q_heads", None, None)
