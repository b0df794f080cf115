"""The table of cells: what an engine must know about a cell besides its gate arithmetic.

The arithmetic stands once per language: in ``csrc/cells/*.h`` for C++ and CUDA, in ``engines/_numba_kernels.py``
for Numba, and here, as ``step``, in torch operations that the reference engine differentiates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: ``step(x, h, states) -> states``: one time step of a cell. ``x`` are the gates' input products
#: ``W_ih x_t + b_ih`` and ``h`` their recurrent products ``W_hh h_{t-1} + b_hh``, each (rows, H);
#: ``states`` the states at t-1. Before a projection (if any) is applied to the first returned state.
Step = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class Cell:
    """One kind of recurrent cell.

    Attributes:
        name: the name in ``csrc/cells`` and in every table.
        mode: torch.nn's name of it (``RNNBase.mode``).
        gates: row blocks of ``weight_ih`` and ``weight_hh``, in torch's order.
        states: what is carried from step to step; the first is the output ``h``.
        step: the equations, in torch operations.
    """

    name: str
    mode: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    step: Step

    def __repr__(self) -> str:
        return f"<Cell {self.name}>"

    def __reduce__(self) -> tuple[Callable[[str], Cell], tuple[str]]:
        return CELLS.__getitem__, (self.name,)


def _rnn_tanh(x: Sequence[Tensor], h: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (torch.tanh(x[0] + h[0]),)


def _rnn_relu(x: Sequence[Tensor], h: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (torch.relu(x[0] + h[0]),)


def _lstm(x: Sequence[Tensor], h: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    i, f, g, o = (a + b for a, b in zip(x, h, strict=True))
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(x: Sequence[Tensor], h: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    r, z = torch.sigmoid(x[0] + h[0]), torch.sigmoid(x[1] + h[1])
    n = torch.tanh(x[2] + r * h[2])
    return ((1 - z) * n + z * states[0],)


CELLS = {
    cell.name: cell
    for cell in (
        # Elman, "Finding structure in time", Cognitive Science 14 (1990).
        Cell("rnn_tanh", "RNN_TANH", ("h",), ("h",), _rnn_tanh),
        Cell("rnn_relu", "RNN_RELU", ("h",), ("h",), _rnn_relu),
        # Hochreiter and Schmidhuber (1997) with the forget gate of Gers et al. (2000), without peepholes.
        Cell("lstm", "LSTM", ("i", "f", "g", "o"), ("h", "c"), _lstm),
        # Cho et al. (2014) with the reset gate after the product, as cuDNN and torch compute it.
        Cell("gru", "GRU", ("r", "z", "n"), ("h",), _gru),
    )
}
MODES = {cell.mode: cell for cell in CELLS.values()}
