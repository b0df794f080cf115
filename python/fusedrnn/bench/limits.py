"""How much arithmetic a cell of the grid needs, and how fast a GPU can do it at best."""

from __future__ import annotations

import torch

from ..cells import CELLS
from .grid import Precision, Shape
from .timer import Clock

#: Seconds in which the multiprocessors of a GPU hand the state to each other through its cache. An estimate on paper
#: for Hopper, not a measurement.
_EXCHANGE = 0.45e-6
_PEAK_WIDTH = 8192


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


def peak(precision: Precision, device: torch.device, clock: Clock, width: int = _PEAK_WIDTH) -> float:
    """Floating-point operations per second of torch's product of two large square matrices.

    Args:
        precision: of the product.
        device: where to measure.
        clock: what tells the time.
        width: of the matrices.
    """
    a, b = (torch.randn(width, width, dtype=precision.dtype, device=device) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision.tf32 else "highest")
    try:
        clock(lambda: a @ b, 3)
        return 2.0 * width**3 / clock(lambda: a @ b, 10)
    finally:
        torch.set_float32_matmul_precision(before)


def floor(cell: str, shape: Shape, mode: str, rate: float) -> float:
    """Seconds in which a GPU could run a cell of the grid at best.

    All products at ``rate``, though the recurrent ones are thin, and between the steps of each pass an exchange of the
    state: a bound for what needs more than one multiprocessor.

    Args:
        cell: a name in ``grid.CELLS``.
        shape: the sizes.
        mode: ``"inference"`` or ``"training"``.
        rate: floating-point operations per second, see ``peak``.
    """
    passes = 2 if mode == "training" else 1
    return flops(cell, shape, mode) / rate + passes * shape.T * shape.layers * _EXCHANGE
