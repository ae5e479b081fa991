"""Names of dimensions, mesh axes and logical axes: one legend for the whole of moejax.

Array names end in the letters of their dimensions, as in `x_TD` or `w_in_EDF`:

    B batch             L length            T = B*L tokens      V vocabulary       D model width
    Q query heads       G key/value heads   H head size         S cached positions, or slots of an expert
    E experts           e local experts     K choices a token   C capacity         F expert hidden width
    N assignments       R received rows     M bins, or members  G groups           C values handed on by a router
"""

REPLICA, DATA, EXPERT, MODEL, CONTEXT = "replica", "data", "expert", "model", "context"
MESH_AXES = (REPLICA, DATA, EXPERT, MODEL, CONTEXT)
"""Axes of the device mesh, slowest links first. Axes of size 1 are kept, so every spec is valid on every mesh."""

BATCH_AXES = (REPLICA, DATA, EXPERT)
"""Mesh axes over which the sequences of a batch are split."""

TOKEN_AXES = (REPLICA, DATA, EXPERT, CONTEXT)
"""Mesh axes over which the flattened tokens of a batch are split."""

LOGICAL_AXES = ("batch", "length", "embed", "q_heads", "kv_heads", "head_dim", "vocab", "layers", "experts", "ffn",
                "expert_ffn", "gate_up", "router", "latent", "positions", "classes", "rank")
"""What a dimension of an array means; `sharding.RULES` says where it lies. `gate_up` is the pair of input projections
of a gated feed-forward layer, `router` the scores that a router gives, `latent` what latent attention makes queries, keys
and values of, `positions` the rows of a small table (positions, types, distances), `classes` the scores of a
classifier, `rank` the inner side of an adapter."""

STACKING_AXES = ("layers", "experts", "gate_up")
"""Logical axes that stack independent matrices; no axis of a matrix itself."""
