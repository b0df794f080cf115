"""The reference engine: a readable time loop in torch operations.

Slow, and right for every dtype and device, differentiable any number of times, seen through by torch.func.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..dropouts import stays
from .base import Call, Outputs, Saved


class ReferenceEngine:
    name = "reference"
    traceable = True
    recomputes = False

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
        output, *every = (torch.cat(values, -1) for values in zip(*(steps for steps, _ in runs), strict=True))
        states = (torch.stack(values) for values in zip(*(final for _, final in runs), strict=True))
        return (output if call.sequence else None, *every, *states), ()

    def saved_shapes(self, call: Call) -> tuple[tuple[int, ...], ...]:
        return ()

    def backward(
        self, call: Call, saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        raise NotImplementedError("autograd differentiates the reference engine itself")


def _one_direction(call: Call, direction: int) -> tuple[list[Tensor], list[Tensor]]:
    """What one direction has at every step (T, B, width) or (tokens, width): output, with ``every_state`` the other
    states; and the final states (B, width)."""
    w_ih, w_hh, b_ih, b_hh, w_hr = call.of_direction(direction)
    assert w_ih is not None
    assert w_hh is not None
    gates = len(call.cell.gates)
    dense = call.batch_sizes is None
    sizes = [call.batch] * call.time if call.batch_sizes is None else [int(size) for size in call.batch_sizes]
    T, widths = len(sizes), call.widths()
    x, lengths = call.input, None
    if call.lengths is not None:
        lengths = call.lengths.to(x.device)
        there = torch.arange(T, device=x.device)[:, None, None] < lengths[:, None]
        x = torch.where(there, x, torch.zeros_like(x))  # a NaN behind a row's end would reach the weights' gradients
    products = list(linear(x, w_ih, b_ih).unbind(0) if dense else torch.split(linear(x, w_ih, b_ih), sizes))

    def of_direction(values: Sequence[Tensor | None]) -> list[Tensor]:
        return [
            call.input.new_zeros(call.batch, width) if value is None else value[direction]
            for value, width in zip(values, widths, strict=True)
        ]

    states, fresh = of_direction(call.hx), of_direction(call.reset_state or (None,) * len(widths))
    resets = None if call.resets is None else (call.resets.unbind(0) if dense else torch.split(call.resets, sizes))
    wanted = len(widths) if call.every_state else 1
    steps: list[list[Tensor]] = [[call.input] * T for _ in range(wanted)]
    for t in range(T) if direction == 0 else reversed(range(T)):
        # Segments are cut before a step that is reset; in reverse that is where the step after it hands over to this.
        cut = t if direction == 0 else t + 1
        if resets is not None and cut < T:
            begins = resets[cut][:, None]
            if lengths is not None:
                begins = begins & (lengths > cut)[:, None]
            n = sizes[cut]
            states = [
                torch.cat([torch.where(begins, new[:n], old[:n]), old[n:]])
                for new, old in zip(fresh, states, strict=True)
            ]
        rows = [state[: sizes[t]] for state in states]
        h = rows[0] if call.h_mask is None else rows[0] * call.h_mask[direction][: sizes[t]]
        new = list(call.cell.step(products[t].chunk(gates, -1), linear(h, w_hh, b_hh).chunk(gates, -1), rows))
        if w_hr is not None:
            new[0] = linear(new[0], w_hr)
        if call.zoneout:
            new = [
                _zoned_out(call, direction, t, k, old, value)
                for k, (old, value) in enumerate(zip(rows, new, strict=True))
            ]
        active = None if lengths is None else (lengths > t)[:, None]
        for of_state, value in zip(steps, new, strict=False):
            of_state[t] = value if active is None else torch.where(active, value, torch.zeros_like(value))
        # Rows whose sequence has ended (or not yet begun, in reverse) keep their state.
        if active is not None:
            states = [torch.where(active, a, b) for a, b in zip(new, states, strict=True)]
        else:
            states = [
                torch.cat([a, b[sizes[t] :]]) if sizes[t] < len(b) else a for a, b in zip(new, states, strict=True)
            ]
    return [torch.stack(values) if dense else torch.cat(values) for values in steps], states


def _zoned_out(call: Call, direction: int, t: int, state: int, old: Tensor, new: Tensor) -> Tensor:
    """A state after step t (rows, width), where some units keep the one before."""
    rate, seed = call.zoneout[state], call.seed
    if seed is None:
        return rate * old + (1 - rate) * new
    device = old.device
    first = (state * call.directions + direction) * call.time + t
    rows = first * call.batch + torch.arange(old.shape[0], device=device)
    place = rows[:, None] * call.hidden_size + torch.arange(old.shape[1], device=device)
    return torch.where(stays(rate, seed.to(device), place), old, new)
