"""How much arithmetic a cell of the grid needs."""

from __future__ import annotations

from ..cells import CELLS
from .grid import Shape


def flops(cell: str, shape: Shape, mode: str) -> int:
    """Floating-point operations of the matrix products, where nearly all of the time should go.

    Forward multiplies the input and the state of every token by their weights; backward does as much twice again,
    for the gradients of the activations and for those of the weights. The gates' own arithmetic is not counted.

    Args:
        cell: a name in ``grid.CELLS``.
        shape: tokens, I, H, layers and directions.
        mode: ``"inference"`` or ``"training"``.

    Returns:
        2 * tokens * (I + H) * gates * H for each layer and direction, three times that for training.
    """
    features = [shape.I] + [shape.directions * shape.H] * (shape.layers - 1)
    gates = len(CELLS[cell].gates)
    forward = sum(2 * shape.tokens * (I + shape.H) * gates * shape.H * shape.directions for I in features)
    return forward * (3 if mode == "training" else 1)
