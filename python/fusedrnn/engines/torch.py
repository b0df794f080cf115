"""Stock torch: serves devices for which there is no kernel of ours. Every table and ``explain`` mark it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Call, Outputs, Saved


class TorchEngine:
    name = "torch"
    traceable = True
    recomputes = False

    def available(self) -> str | None:
        return None

    def supports(self, call: Call) -> str | None:
        option = call.option_along_time()
        if option is not None:
            return f"stock torch has no {option}"
        return None

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def describe(self, call: Call) -> str:
        return "stock torch.nn kernels, not fusedrnn's"

    def forward(self, call: Call, save: bool) -> tuple[Outputs, Saved]:
        call.check()
        hx = tuple(
            call.input.new_zeros(call.directions, call.batch, width) if state is None else state
            for state, width in zip(call.hx, call.widths(), strict=True)
        )
        network = getattr(torch._VF, call.cell.name)
        weights = [w for w in call.weights if w is not None]
        bias, bidirectional = call.weights[2] is not None, call.directions == 2
        states = hx if len(hx) > 1 else hx[0]
        train = torch.is_grad_enabled()  # without dropout it only tells cuDNN to prepare for backward
        if call.batch_sizes is None:
            result = network(call.input, states, weights, bias, 1, 0.0, train, bidirectional, False)
        else:
            result = network(call.input, call.batch_sizes, states, weights, bias, 1, 0.0, train, bidirectional)
        return result, ()

    def saved_shapes(self, call: Call) -> tuple[tuple[int, ...], ...]:
        return ()

    def backward(
        self, call: Call, saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        raise NotImplementedError("autograd differentiates stock torch itself")
