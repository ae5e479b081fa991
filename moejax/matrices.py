"""Which parameters are weight matrices, and what their sides are: read off their logical axes, not their names."""

from moejax import axes


def matrix_axes(names: tuple[str | None, ...]) -> tuple[int, ...]:
    """Positions of the axes that make up one weight matrix: not those that stack layers, experts or gate and up."""
    return tuple(i for i, name in enumerate(names) if name not in axes.STACKING_AXES)


def is_matrix(names: tuple[str | None, ...]) -> bool:
    """Whether a parameter holds weight matrices between activations: not norms, biases, embeddings, head or router.

    These decay and are what Muon orthogonalises. A router's scale is the business of its z-loss. One side of a matrix is
    always the model width or a latent's; what has two axes and neither is a bias or the scale of a norm over all heads.
    """
    inner = {names[i] for i in matrix_axes(names)}
    between = bool({"embed", "latent"} & inner) and not {"vocab", "router", "positions", "classes", "rank"} & inner
    return between and len(matrix_axes(names)) >= 2


def sides(names: tuple[str | None, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Positions of the input and of the output axes of a weight matrix.

    The width of model or latent is always one whole side, so the other axes (heads and head size, say) are the other.
    """
    inner = matrix_axes(names)
    cut = 1 if names[inner[0]] in ("embed", "latent") else len(inner) - 1
    return inner[:cut], inner[cut:]
