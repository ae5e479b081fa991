"""Token, position and type embedding, and output head."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from moejax import sharding
from moejax.config import ModelConfig
from moejax.layers.mlp import PLAIN_ONES
from moejax.layers.norm import make_norm


class Embedding(nn.Module):
    """The embedding table and the head that gives logits; one table for both if `tie_embeddings`.

    Attributes:
      model: sizes and architecture.
      dtype: compute type.
    """

    model: ModelConfig
    dtype: jnp.dtype

    def setup(self):
        """Declares the parameters."""
        model, design, width = self.model, self.model.architecture, self.model.embed
        self.table_VD = self.param("table", nn.with_logical_partitioning(
            nn.initializers.normal(width**-0.5), ("vocab", "embed")), (model.vocab_size, width))
        if design.positions == "learned":
            self.positions_LD = self.param("positions", nn.with_logical_partitioning(
                nn.initializers.normal(width**-0.5), ("positions", "embed")), (model.max_length, width))
        if design.token_types:
            self.types_ND = self.param("types", nn.with_logical_partitioning(
                nn.initializers.normal(width**-0.5), ("positions", "embed")), (design.token_types, width))
        if design.embedding_norm:
            self.norm = make_norm(design.norm, model.norm_eps, "norm")
        if model.head != "tokens":
            return
        if design.head_layer:
            self.layer_DD = self.param("w_head", nn.with_logical_partitioning(
                nn.initializers.normal(width**-0.5), ("embed", None)), (width, width))
            self.layer_bias_D = self.param("b_head", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
                                           (width,))
            self.layer_norm = make_norm(design.norm, model.norm_eps, "head_norm")
        if not model.tie_embeddings:
            # A small head starts the loss at ln(V): it predicts every token equally.
            self.head_DV = self.param("head", nn.with_logical_partitioning(
                nn.initializers.normal(1 / width), ("embed", "vocab")), (width, model.vocab_size))
        if design.head_bias:
            self.bias_V = self.param("head_bias", nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",)),
                                     (model.vocab_size,))

    def __call__(self, tokens_BL: Array, positions_BL: Array, types_BL: Array | None = None) -> Array:
        """Vectors of the tokens, [B, L, D]. Without types all are of the first."""
        # Gathered over the data axis first, as FSDP does: else the partitioner replicates the activations.
        x_BLD = sharding.constrain(self.table_VD, "vocab", None)[tokens_BL].astype(self.dtype)
        design = self.model.architecture
        if design.embedding_multiplier != 1:
            x_BLD = x_BLD * design.embedding_multiplier
        if design.positions == "learned":
            x_BLD += sharding.constrain(self.positions_LD, None, None)[positions_BL].astype(self.dtype)
        if design.token_types:
            types_BL = jnp.zeros_like(tokens_BL) if types_BL is None else types_BL
            x_BLD += sharding.constrain(self.types_ND, None, None)[types_BL].astype(self.dtype)
        if design.embedding_norm:
            x_BLD = self.norm(x_BLD)
        return sharding.constrain(x_BLD, "batch", "length", None)

    def before_head(self, x_BLD: Array) -> Array:
        """What the head's matrix multiplies: x, scaled, and with a 1 for the bias where there is one."""
        design = self.model.architecture
        if design.head_layer:
            x_BLD = PLAIN_ONES[design.activation](x_BLD @ self.layer_DD.astype(self.dtype)
                                                  + self.layer_bias_D.astype(self.dtype))
            x_BLD = self.layer_norm(x_BLD)
        if design.logit_multiplier != 1:
            x_BLD = x_BLD * design.logit_multiplier
        if design.head_bias:
            x_BLD = jnp.concatenate([x_BLD, jnp.ones_like(x_BLD[..., :1])], axis=-1)
        return x_BLD

    def head(self) -> Array:
        """What turns these activations into scores, [D, V], with a bias [D + 1, V]."""
        head_DV = self.table_VD.T if self.model.tie_embeddings else self.head_DV
        return jnp.concatenate([head_DV, self.bias_V[None]]) if self.model.architecture.head_bias else head_DV

    def logits(self, x_BLD: Array) -> Array:
        """Scores over the vocabulary of what `before_head` returns, float32 [B, L, V]."""
        logits_BLV = jnp.einsum("bld,dv->blv", x_BLD, self.head().astype(self.dtype), preferred_element_type=jnp.float32)
        return sharding.constrain(logits_BLV, "batch", "length", "vocab")
