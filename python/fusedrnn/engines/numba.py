"""The Numba engine: serves the CPU where the compiled C++ module is missing.

Here is what can be computed for the whole sequence at once; the time loops are in ``_numba_kernels``. That module
imports Numba, which takes a noticeable part of a second, and so is itself imported at the first call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from .base import WEIGHTS_PER_DIRECTION, Call, Outputs, Saved

_COMPUTES_IN = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


class NumbaEngine:
    name = "numba"
    traceable = False
    recomputes = False

    def available(self) -> str | None:
        return _why_not_installed()

    def supports(self, call: Call) -> str | None:
        if not call.input.is_cpu:
            return f"input is on {call.input.device}"
        if call.input.dtype not in _COMPUTES_IN:
            return f"no kernel for {call.input.dtype}"
        if call.input.layout != torch.strided:
            return f"no kernel for {call.input.layout} input"
        return _why_not_importable()

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        return _COMPUTES_IN[dtype]

    def describe(self, call: Call) -> str:
        return f"Numba time loop on one thread, torch's matrix products around it on up to {torch.get_num_threads()}"

    def forward(self, call: Call, save: bool) -> tuple[Outputs, Saved]:
        from ._numba_kernels import KERNELS

        call.check()
        kernels = KERNELS[call.cell.name]
        D, G, H, R = call.directions, len(call.cell.gates), call.hidden_size, call.output_size
        with _plain_torch():
            steps = _Steps(call)
            x, along = steps.pack(call.input), steps.arrays
            tokens, has_c = len(x), len(call.hx) > 1
            nothing = x.new_empty((0, 0))
            output = steps.new(D * R) if call.sequence else None
            every_c = steps.new(D * H) if call.every_state and has_c else None
            kept = x.new_empty((D, tokens if save else 1, kernels.keeps, H))
            states = steps.states(call.hx)  # initial; the loops make them the final ones
            h, c = _h_and_c(states)
            fresh_h, fresh_c = _h_and_c(steps.states(call.reset_state))
            # With zoneout the cell's own results, which ``kept`` holds, are not what the next step reads.
            rows = tokens if save and call.zoneout else 0
            zoned = [x.new_empty((D, rows, width)) for width in call.widths()]
            zoned_h, zoned_c = _h_and_c(zoned)
            for d in range(D):
                w_ih, w_hh, b_ih, b_hh, w_hr = call.of_direction(d)
                assert w_ih is not None
                assert w_hh is not None
                kernels.forward(
                    d,
                    *along,
                    fresh_h[d],
                    fresh_c[d],
                    _array(linear(x, w_ih, b_ih).view(tokens, G, H)),
                    _array(w_hh.t()),
                    _array(x.new_zeros(G * H) if b_hh is None else b_hh),
                    _array(nothing if w_hr is None else w_hr.t()),
                    *steps.drops(d),
                    h[d],
                    c[d],
                    _array(x.new_empty((0, D, R)) if output is None else output.view(tokens, D, R)),
                    _array(x.new_empty((0, D, H)) if every_c is None else every_c.view(tokens, D, H)),
                    _array(kept[d]),
                    zoned_h[d],
                    zoned_c[d],
                    save,
                )
            results = [None if output is None else steps.unpack(output)]
            if every_c is not None:
                results.append(steps.unpack(every_c))
            results += map(steps.unsort, states)
        return tuple(results), (kept, *zoned[: len(zoned) if rows else 0]) if save else ()

    def saved_shapes(self, call: Call) -> tuple[tuple[int, ...], ...]:
        from ._numba_kernels import KERNELS

        if call.lengths is not None:  # as many tokens as the lengths say, which have no values
            return ()
        kept = call.directions, call.tokens, KERNELS[call.cell.name].keeps, call.hidden_size
        return (kept, *((call.directions, call.tokens, width) for width in call.widths() if call.zoneout))

    def backward(
        self, call: Call, saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        from ._numba_kernels import KERNELS, one_step_earlier

        kernels = KERNELS[call.cell.name]
        D, G, H, R = call.directions, len(call.cell.gates), call.hidden_size, call.output_size
        results: list[Tensor | None] = [None] * len(needs)
        with _plain_torch():
            steps = _Steps(call)
            x, along = steps.pack(call.input), steps.arrays
            tokens = len(x)
            nothing = x.new_empty((0, 0))
            doutput, *devery, dfinal = [*grads[: -len(call.hx)], grads[-len(call.hx) :]]
            doutput = x.new_empty((0, D, R)) if doutput is None else steps.pack(doutput).reshape(tokens, D, R)
            given_c = devery[0] if devery else None
            devery_c = x.new_empty((0, D, H)) if given_c is None else steps.pack(given_c).reshape(tokens, D, H)
            initial, fresh = steps.states(call.hx), steps.states(call.reset_state)
            dstates = steps.states(dfinal)  # of the final states; the loops make them those of the initial ones
            dh, dc = _h_and_c(dstates)
            dfresh = steps.states(())
            dfresh_h, dfresh_c = _h_and_c(dfresh)
            dinput = steps.new(x.shape[1]).zero_()
            for d in range(D):
                w_ih, w_hh, _, _, w_hr = call.of_direction(d)
                assert w_ih is not None
                assert w_hh is not None
                kept, *zoned = (t[d] for t in saved)
                last = zoned[-1] if zoned else kept[:, -1]
                before = one_step_earlier(
                    d, *along, _array(last), _array(initial[-1][d]), _array(fresh[-1][d]), _array(nothing)
                )
                ds = x.new_empty((tokens, G * H))
                dx = ds if kernels.sums_gates else torch.empty_like(ds)
                dh_projected = x.new_empty((0 if w_hr is None else tokens, R))
                kernels.backward(
                    d,
                    *along,
                    dfresh_h[d],
                    dfresh_c[d],
                    _array(kept),
                    before,
                    _array(w_hh),
                    _array(nothing if w_hr is None else w_hr),
                    *steps.drops(d),
                    _array(doutput),
                    _array(devery_c),
                    dh[d],
                    dc[d],
                    _array(dx.view(tokens, G, H)),
                    _array(ds.view(tokens, G, H)),
                    _array(dh_projected),
                )

                # What sums over tokens, or does not depend on other tokens, is left to large products.
                if needs[0]:
                    dinput.view(x.shape).addmm_(dx, w_ih)
                first = len(call.hx) + 1 + d * WEIGHTS_PER_DIRECTION
                need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_w_hr = needs[first : first + WEIGHTS_PER_DIRECTION]
                if need_w_ih:
                    results[first] = dx.t() @ x
                if need_w_hh or need_w_hr:
                    hidden = kernels.hidden(kept)
                if need_w_hh:
                    h = zoned[0] if zoned else hidden if w_hr is None else hidden @ w_hr.t()
                    mask, *_ = steps.drops(d)
                    h_before = one_step_earlier(d, *along, _array(h), _array(initial[0][d]), _array(fresh[0][d]), mask)
                    results[first + 1] = ds.t() @ torch.from_numpy(h_before)
                if need_b_ih:
                    results[first + 2] = dx.sum(0)
                if need_b_hh:
                    results[first + 3] = ds.sum(0)
                if need_w_hr:
                    results[first + 4] = dh_projected.t() @ hidden
            if needs[0]:
                results[0] = steps.unpack(dinput)
            of_reset = len(needs) - len(call.reset_state)
            for first, values in ((1, dstates), (of_reset, dfresh[: len(call.reset_state)])):
                for k, dstate in enumerate(values, first):
                    if needs[k]:
                        results[k] = steps.unsort(dstate)
        return results


@cache
def _why_not_installed() -> str | None:
    return None if find_spec("numba") else "numba is not installed"


@cache
def _why_not_importable() -> str | None:
    """An installed Numba may still refuse the NumPy beside it."""
    try:
        from . import _numba_kernels  # noqa: F401
    except ImportError as error:
        return f"numba does not import: {error}"
    return None


@contextmanager
def _plain_torch() -> Iterator[None]:
    """No autograd, whose work this engine does, and no autocast, which would take the products to another dtype."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


class _Steps:
    """The tokens of a call one after another, step by step, and the way there and back.

    Attributes:
        arrays: for each step the number of active rows, in a dense batch always all of them, and the first row's token;
            for each token whether a segment begins with it, empty without resets.
    """

    def __init__(self, call: Call) -> None:
        self._call, self._order, self._there = call, None, None
        T, B = call.time, call.batch
        if call.lengths is not None:
            lengths, self._order = call.lengths.sort(descending=True, stable=True)
            self._there = torch.arange(T)[:, None] < lengths
            sizes = _array(self._there.sum(1))
        elif call.batch_sizes is not None:
            sizes = _array(call.batch_sizes)
        else:
            sizes = np.full(T, B, dtype=np.int64)
        resets = torch.empty(0, dtype=torch.bool) if call.resets is None else self.pack(call.resets[..., None])[:, 0]
        self.arrays = sizes, np.cumsum(sizes) - sizes, _array(resets)
        order = torch.arange(B) if self._order is None else self._order
        seed = np.array([] if call.seed is None else [int(call.seed)], dtype=np.int64).view(np.uint64)
        self._lots = np.array(call.zoneout, dtype=np.float64), seed, _array(order)

    def drops(self, direction: int) -> tuple[NDArray[Any], ...]:
        """What recurrent dropout and zoneout leave: the mask of h (B, R), or no rows; the rates of zoneout, the seed of
        its lots, each row's place among them.
        """
        mask = self._call.h_mask
        if mask is None:
            return self._call.input.new_empty((0, 0)).numpy(), *self._lots
        return _array(mask[direction] if self._order is None else mask[direction, self._order]), *self._lots

    def pack(self, rows: Tensor) -> Tensor:
        """(tokens, features) of what is laid out as the input."""
        if self._there is not None:
            return rows[:, self._order][self._there]
        return rows if self._call.batch_sizes is not None else rows.flatten(0, 1)

    def new(self, features: int) -> Tensor:
        """New memory for a row of features of each token, laid out as the input unless that is padded."""
        input = self._call.input
        tokens = input.shape[:-1] if self._there is None else (int(self._there.sum()),)
        return input.new_empty((*tokens, features))

    def unpack(self, rows: Tensor) -> Tensor:
        """Such rows laid out as the input in any case, zero behind the sequences' ends."""
        if self._there is None:
            return rows
        shape = (*self._call.input.shape[:-1], rows.shape[1])
        padded, result = rows.new_zeros(shape), rows.new_empty(shape)
        padded[self._there] = rows
        result[:, self._order] = padded
        return result

    def states(self, values: Sequence[Tensor | None]) -> list[Tensor]:
        """For each state of the cell new memory (D, B, width), sorted, with the value in it, zeros for None or none."""
        call = self._call
        states = [call.input.new_zeros((call.directions, call.batch, width)) for width in call.widths()]
        for state, value in zip(states, values, strict=False):
            if value is not None:
                state.copy_(value if self._order is None else value[:, self._order])
        return states

    def unsort(self, state: Tensor) -> Tensor:
        """A state (D, B, width) with its rows in the call's order."""
        if self._order is None:
            return state
        result = torch.empty_like(state)
        result[:, self._order] = state
        return result


def _h_and_c(states: list[Tensor]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The memory of both states, without columns for a c that the cell does not have."""
    h = states[0]
    return _array(h), _array(states[1] if len(states) > 1 else h.new_empty((*h.shape[:2], 0)))


def _array(tensor: Tensor) -> NDArray[Any]:
    """The tensor as a C-contiguous array, which is its own memory, to be written to, if it is contiguous itself."""
    return tensor.detach().contiguous().resolve_neg().numpy()  # type: ignore[no-any-return]
