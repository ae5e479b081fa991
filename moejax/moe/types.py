"""The seam between routers, dispatchers and experts: plain arrays with names."""

from flax import struct
from jax import Array


@struct.dataclass
class Assignments:
    """N (token, expert) pairs: what every sparse router decides and every dispatcher carries out.

    Attributes:
      token_N: int32, index of the token in the flattened batch.
      expert_N: int32.
      weight_N: float32, the factor on the expert's output; carries the gradient to the router.
      valid_N: bool; pairs that are not valid reach no expert (padding, dropped, or beyond a variable k).
      choices: K > 0 if the list is token-major with exactly K entries a token, so that combining needs no scatter;
        0 for lists in any other order.
      local: whether the list can be split along the batch into equal parts that hold the pairs of their own tokens.
    """

    token_N: Array
    expert_N: Array
    weight_N: Array
    valid_N: Array
    choices: int = struct.field(pytree_node=False)
    local: bool = struct.field(pytree_node=False, default=True)


@struct.dataclass
class Slots:
    """What a router decides that lets every expert work on mixtures of tokens (Soft MoE), instead of `Assignments`.

    Attributes:
      dispatch_BLES: float32, share of each token of a sequence in the input of each slot; for each slot they sum to 1.
      combine_BLES: float32, share of each slot's output in the output of each token.
    """

    dispatch_BLES: Array
    combine_BLES: Array


@struct.dataclass
class Merger:
    """What a router decides that merges the experts' parameters (SMEAR, Lory), instead of `Assignments`.

    Attributes:
      weight_GE: float32, share of each expert in the merged one, for equal runs of tokens, each within a sequence.
    """

    weight_GE: Array


@struct.dataclass
class Passage:
    """What a router decides that lets tokens pass a whole block (Mixture-of-Depths), instead of `Assignments`.

    Attributes:
      on_T: bool, the tokens that the block works on.
      weight_T: float32, factor on what the block adds to a token.
      capacity: the most tokens of a sequence that are on.
    """

    on_T: Array
    weight_T: Array
    capacity: int = struct.field(pytree_node=False)


@struct.dataclass
class ExpertLoad:
    """Sums over tokens of what happened in one layer: additive over devices and micro-batches.

    Attributes:
      assigned_E: int32, pairs per expert that the router chose.
      dropped_E: int32, those that found no place within the capacity.
      received_E: int32, rows that reached the expert, counted where it computes: assigned less dropped, or tokens were
        lost on the way.
      replayed_E: int32, pairs that did not fit in a transport's buffer; the layer then took another one, so none is lost.
      tokens: int32 scalar, real tokens.
      entropy: float32 scalar, sum over tokens of the entropy (nats) of the router's distribution over experts.
    """

    assigned_E: Array
    dropped_E: Array
    received_E: Array
    replayed_E: Array
    tokens: Array
    entropy: Array


@struct.dataclass
class RouterOutput:
    """What a router returns for one layer.

    Attributes:
      assignments: who goes where, before any dropping; or one of the other kinds of decision.
      losses: named scalars, normalised over the whole batch (`Totals`), so shares of micro-batches add up.
      entropy: float32 scalar, as in `ExpertLoad`.
      statistics: named sums over tokens for the router's state update and for losses over the whole batch; additive like
        `ExpertLoad`.
      input_scale_T: factor on each token before the experts see it, or None.
      added_TD: what the router itself adds to the layer's output (experts that only copy or are constant), or None.
      carry_TC: what the router of the next sparse layer gets to see, or None.
    """

    assignments: Assignments | Slots | Merger | Passage
    losses: dict[str, Array]
    entropy: Array
    statistics: dict[str, Array]
    input_scale_T: Array | None = None
    added_TD: Array | None = None
    carry_TC: Array | None = None


@struct.dataclass
class LayerRecord:
    """What a sparse layer tells beside its output: losses, load and statistics of its router."""

    losses: dict[str, Array]
    load: ExpertLoad
    statistics: dict[str, Array]


@struct.dataclass
class Totals:
    """Sizes of the whole batch, of which the model may see one micro-batch at a time.

    Attributes:
      tokens: float32 scalar, real tokens.
      sequences: float32 scalar, sequences with at least one real token.
    """

    tokens: Array
    sequences: Array


@struct.dataclass
class RoutingContext:
    """What a router may know besides the tokens' vectors.

    Attributes:
      token_ids_T: int32 ids of the tokens.
      mask_T: bool, false for padding, which enters no selection, capacity, loss or statistic.
      totals: normalisers of the losses.
      whole: the router's statistics of the whole batch, if the tokens are a part of it; else None.
      carry_TC: what the router of the sparse layer before handed on; zeros in the first one.
      key: PRNG key for noise in training, or None.
      sequences: B; the tokens are B rows of equal length.
      shards: parts of the batch for losses of scope `shard`.
      train: whether noise and training-only rules apply.
      task_T: int32 number of the task that a token's row is of, for routers that are to know; or None.
    """

    token_ids_T: Array
    mask_T: Array
    totals: Totals
    whole: dict[str, Array] | None
    carry_TC: Array | None
    key: Array | None
    sequences: int = struct.field(pytree_node=False)
    shards: int = struct.field(pytree_node=False)
    train: bool = struct.field(pytree_node=False)
    task_T: Array | None = None

    def groups(self, routing_group: str) -> int:
        """Equal runs of the tokens that are decided on their own, for `config.moe.routing_group`."""
        return self.sequences if routing_group == "sequence" else 1

    def whole_sum(self, name: str) -> Array | None:
        """One of the router's statistics of the whole batch, if the tokens are a part of it; else None."""
        return None if self.whole is None else self.whole[name]
