"""The reference engine: a readable time loop in torch operations.

Slow, and right for every dtype and device, differentiable any number of times, seen through by torch.func.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from .base import Call, Outputs, Saved


class ReferenceEngine:
    name = "reference"
    traceable = True

    def available(self) -> str | None:
        return None

    def supports(self, call: Call) -> str | None:
        return None

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def describe(self, call: Call) -> str:
        return "loop over time in torch operations (slow)"

    def forward(self, call: Call, save: bool) -> tuple[Outputs, Saved]:
        call.check()
        runs = [_one_direction(call, direction) for direction in range(call.directions)]
        output = torch.cat([out for out, _ in runs], -1) if call.sequence else None
        states = (torch.stack(values) for values in zip(*(final for _, final in runs), strict=True))
        return (output, *states), ()

    def saved_shapes(self, call: Call) -> tuple[tuple[int, ...], ...]:
        return ()

    def backward(
        self, call: Call, saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        raise NotImplementedError("autograd differentiates the reference engine itself")


def _one_direction(call: Call, direction: int) -> tuple[Tensor, list[Tensor]]:
    """Output (T, B, R) or (tokens, R), and final states (B, width), of one direction."""
    w_ih, w_hh, b_ih, b_hh, w_hr = call.of_direction(direction)
    assert w_ih is not None
    assert w_hh is not None
    gates = len(call.cell.gates)
    dense = call.batch_sizes is None
    sizes = [call.batch] * call.time if call.batch_sizes is None else [int(size) for size in call.batch_sizes]
    products = list(
        linear(call.input, w_ih, b_ih).unbind(0) if dense else torch.split(linear(call.input, w_ih, b_ih), sizes)
    )
    states = [
        call.input.new_zeros(call.batch, width) if state is None else state[direction]
        for state, width in zip(call.hx, call.widths(), strict=True)
    ]
    outputs: list[Tensor] = [call.input] * len(sizes)
    for t in range(len(sizes)) if direction == 0 else reversed(range(len(sizes))):
        rows = [state[: sizes[t]] for state in states]
        new = list(call.cell.step(products[t].chunk(gates, -1), linear(rows[0], w_hh, b_hh).chunk(gates, -1), rows))
        if w_hr is not None:
            new[0] = linear(new[0], w_hr)
        outputs[t] = new[0]
        # Rows of a packed batch whose sequence has ended (or not yet begun, in reverse) keep their state.
        states = [torch.cat([a, b[sizes[t] :]]) if sizes[t] < len(b) else a for a, b in zip(new, states, strict=True)]
    return torch.stack(outputs) if dense else torch.cat(outputs), states
