"""Token embedding and output head."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from moejax import sharding


class Embedding(nn.Module):
    """The embedding table and the head that gives logits; one table for both if `tied`.

    Attributes:
      vocab_size: V.
      width: D.
      tied: use the embedding as the head.
      dtype: compute type.
    """

    vocab_size: int
    width: int
    tied: bool
    dtype: jnp.dtype

    def setup(self):
        """Declares the parameters."""
        self.table_VD = self.param("table", nn.with_logical_partitioning(
            nn.initializers.normal(self.width**-0.5), ("vocab", "embed")), (self.vocab_size, self.width))
        if not self.tied:
            # A small head starts the loss at ln(V): it predicts every token equally.
            self.head_DV = self.param("head", nn.with_logical_partitioning(
                nn.initializers.normal(1 / self.width), ("embed", "vocab")), (self.width, self.vocab_size))

    def __call__(self, tokens_BL: Array) -> Array:
        """Vectors of the tokens, [B, L, D]."""
        # Gathered over the data axis first, as FSDP does: else the partitioner replicates the activations.
        table_VD = sharding.constrain(self.table_VD, "vocab", None)
        return sharding.constrain(table_VD[tokens_BL].astype(self.dtype), "batch", "length", None)

    def head(self) -> Array:
        """What turns activations into scores, [D, V]."""
        return self.table_VD.T if self.tied else self.head_DV

    def logits(self, x_BLD: Array) -> Array:
        """Scores over the vocabulary, float32 [B, L, V]."""
        logits_BLV = jnp.einsum("bld,dv->blv", x_BLD, self.head().astype(self.dtype), preferred_element_type=jnp.float32)
        return sharding.constrain(logits_BLV, "batch", "length", "vocab")
