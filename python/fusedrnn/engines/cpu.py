"""The compiled C++ engine for the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..installation import load
from ..torch_state import in_memory
from .base import Call, Outputs, Saved

_cpu, _missing = load("_cpu")


class CpuEngine:
    name = "cpu"
    traceable = False
    recomputes = True

    def available(self) -> str | None:
        return _missing or None

    def supports(self, call: Call) -> str | None:
        if not call.input.is_cpu:
            return f"input is on {call.input.device}"
        if call.input.dtype not in _COMPUTES_IN:
            return f"no kernel for {call.input.dtype}"
        if call.input.layout != torch.strided:
            return f"no kernel for {call.input.layout} input"
        if call.zoneout and call.weights[4] is not None:
            return "no kernel for zoneout with a projection"
        return None

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        return _COMPUTES_IN[dtype]

    def describe(self, call: Call) -> str:
        assert _cpu is not None
        notes = ""
        if call.input.dtype == torch.bfloat16:
            factors = "factors of" if _cpu.multiplies_bfloat16() else "factors widened from"
            notes += f", {factors} bfloat16, sums and gates in float32"
        if _recomputes(call):
            notes += ", backward computes the gates again"
        if _cpu.is_batch_invariant():
            notes += ", batch-invariant"
        if (cost := _cpu.meeting_cost()) is not None:
            notes += f", {cost:.0f} ns to meet"
        if left_out := _cpu.threads_left_out():
            notes += f", {left_out} of them left out: their cores are busy"
        return f"C++ kernels, {_cpu.isa()}, up to {torch.get_num_threads()} threads{notes}"

    def forward(self, call: Call, save: bool) -> tuple[Outputs, Saved]:
        assert _cpu is not None
        threads = torch.get_num_threads()
        try:
            *outputs, saved = _cpu.forward(*_arguments(call), call.sequence, call.every_state, save, threads)
        except ValueError:
            call.check()
            try:
                *outputs, saved = _cpu.forward(
                    *_arguments(_contiguous(call)), call.sequence, call.every_state, save, threads
                )
            except ValueError as error:
                raise RuntimeError(str(error)) from None
        return tuple(outputs), (saved,) if save else ()

    def saved_shapes(self, call: Call) -> tuple[tuple[int, ...], ...]:
        assert _cpu is not None
        projected = call.weights[4] is not None
        sizes = int(call.hidden_size), int(call.output_size), projected
        each = _cpu.saved_per_token(call.cell.name, *sizes, _recomputes(call))
        return ((call.directions * call.tokens * each,),)

    def backward(
        self, call: Call, saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        assert _cpu is not None
        rest = saved[0], [in_memory(g) for g in grads], needs, torch.get_num_threads()
        try:
            return _cpu.backward(*_arguments(call), *rest)  # type: ignore[no-any-return]
        except ValueError:
            call.check()  # a module may have become another, as by double(), since forward
            try:
                return _cpu.backward(*_arguments(_contiguous(call)), *rest)  # type: ignore[no-any-return]
            except ValueError as error:
                raise RuntimeError(str(error)) from None


_COMPUTES_IN = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float32,
}


class batch_invariant:  # noqa: N801 (used as a function)
    """Make each sequence's results independent of the batch around it, to the bit, on the C++ engine.

    Outputs, final states and the gradients of input and initial states of a sequence then are the same bits whether it
    runs alone or among others, at any number of threads. (A padded or packed batch counts as its sequences.) Without it
    they may differ in the last bits, as small and large batches go ways of their own. The mode costs a single step of
    one or two rows up to half as much again, and batches of twelve or more 1-6% of their inference.

    ``fusedrnn.batch_invariant(True)`` holds from then on in the whole process; ``with fusedrnn.batch_invariant(True):``
    until the end of the block. :func:`fusedrnn.explain` tells whether a call runs so. Other engines know no such mode.

    Raises:
        RuntimeError: there is no C++ engine.
    """

    def __init__(self, enabled: bool) -> None:
        if _cpu is None:
            raise RuntimeError(f"batch_invariant needs the engine cpu: {_missing}")
        self._before = _cpu.set_batch_invariant(enabled)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        assert _cpu is not None
        _cpu.set_batch_invariant(self._before)


def _recomputes(call: Call) -> bool:
    """Zoneout leaves states that do not tell what the cell has computed: backward must compute that again."""
    return call.recompute or bool(call.zoneout)


def _arguments(call: Call) -> tuple[object, ...]:
    along = call.batch_sizes, call.lengths, call.resets
    seed = None if call.seed is None else int(call.seed)
    masks = call.h_mask, call.zoneout, seed, _recomputes(call)
    return call.cell.name, call.input, *along, call.hx, call.reset_state, call.weights, *masks


def _contiguous(call: Call) -> Call:
    """The kernels want weights, states, batch sizes, lengths and masks contiguous, and the input's features side
    by side.
    """
    return call.with_tensors(list(map(in_memory, call.tensors()))).with_along(list(map(in_memory, call.along())))


#: The usual one-layer call in a single step, and its backward, see ``route.express``; None without the compiled module.
express = None if _cpu is None else _cpu.express
express_backward = None if _cpu is None else _cpu.express_backward
#: How a call of ``express`` lies, by name.
LAYOUTS = (
    {} if _cpu is None else {name: getattr(_cpu.Layout, name) for name in ("time_major", "batch_first", "one_step")}
)
