"""The compiled C++ engine for the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .base import Call, Outputs, Saved

_cpu: ModuleType | None
try:
    from .. import _cpu  # type: ignore[attr-defined,no-redef]

    _import_error = ""
except ImportError as error:
    _cpu, _import_error = None, str(error)


class CpuEngine:
    name = "cpu"
    traceable = False

    def available(self) -> str | None:
        if _cpu is None:
            return f"the compiled module is missing ({_import_error})"
        return None

    def supports(self, call: Call) -> str | None:
        if not call.input.is_cpu:
            return f"input is on {call.input.device}"
        if call.input.dtype not in _COMPUTES_IN:
            return f"no kernel for {call.input.dtype}"
        if call.input.layout != torch.strided:
            return f"no kernel for {call.input.layout} input"
        return None

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        return _COMPUTES_IN[dtype]

    def describe(self, call: Call) -> str:
        assert _cpu is not None
        return f"C++ kernels, {_cpu.isa()}, up to {torch.get_num_threads()} threads"

    def forward(self, call: Call, save: bool) -> tuple[Outputs, Saved]:
        assert _cpu is not None
        input, D = _readable(call.input), call.directions
        try:
            T, B, tokens, H, R, kept = _cpu.measure(call.cell.name, input, call.batch_sizes, call.hx, call.weights)
        except ValueError as error:
            call.check()
            raise RuntimeError(str(error)) from None
        dtype = input.dtype
        output = None
        if call.sequence:
            output = torch.empty((T, B, D * R) if call.batch_sizes is None else (tokens, D * R), dtype=dtype)
        final = [torch.empty((D, B, R), dtype=dtype)]
        final += [torch.empty((D, B, H), dtype=dtype) for _ in call.cell.states[1:]]
        saved = ()
        if save:
            saved = (torch.empty(kept, dtype=dtype),)
        _cpu.forward(
            call.cell.name,
            input,
            call.batch_sizes,
            call.hx,
            call.weights,
            output,
            final,
            saved[0] if save else None,
            torch.get_num_threads(),
        )
        return (output, *final), saved

    def backward(
        self, call: Call, saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        assert _cpu is not None
        results = [
            torch.empty(t.shape, dtype=t.dtype) if need and t is not None else None
            for t, need in zip(call.tensors(), needs, strict=True)
        ]
        _cpu.backward(
            call.cell.name,
            _readable(call.input),
            call.batch_sizes,
            call.hx,
            call.weights,
            saved[0],
            [None if g is None else g.contiguous() for g in grads],
            results,
            torch.get_num_threads(),
        )
        return results


_COMPUTES_IN = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def _readable(input: Tensor) -> Tensor:
    """The kernels take any strides along time and batch, but features side by side."""
    return input if input.stride(-1) == 1 or input.shape[-1] <= 1 else input.contiguous()
