"""What flows from block to block."""

from flax import struct
from jax import Array


@struct.dataclass
class Stream:
    """Vectors of tokens, and what blocks hand on beside them.

    Attributes:
      x_BLD: the residual stream.
      carry_TC: what the router of the next sparse layer gets to see, or None.
      late_BLD: what the experts of the block before gave, which joins at the end of this one, or None; see
        `Architecture.shortcut`.
    """

    x_BLD: Array
    carry_TC: Array | None = None
    late_BLD: Array | None = None
