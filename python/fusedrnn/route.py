"""The route of one call: straight to its engine in plain eager mode, through torch's dispatcher everywhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .autograd import Express, Layer, forward
from .cells import Cell
from .engines import announce, choose, cpu, is_everyday
from .engines.base import Call, Outputs
from .torch_state import plain_apply, refuse_jit_trace, why_not_plain

# What every call asks, bound once.
_is_grad_enabled = torch.is_grad_enabled
_get_num_threads = torch.get_num_threads
_apply_express = plain_apply(Express)


def run(call: Call) -> Outputs:
    """Run one layer on the engine that suits it, with gradients if they are wanted.

    Raises:
        RuntimeError: the call is wrong, the engine asked for does not support it, or torch.jit is tracing it.
    """
    tensors = call.tensors()
    if why_not_plain(tensors) is not None:
        refuse_jit_trace()
        return ops.layer(call)
    choice = choose(call)
    announce(call, choice)
    engine = choice.engine
    if engine.traceable:
        return engine.forward(call, save=False)[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return Layer.apply(engine, call.without_tensors(), *tensors)  # type: ignore[no-any-return,no-untyped-call]
    return forward(engine, call, save=False)[0]


def express(
    cell: Cell,
    input: Tensor,
    hx: Sequence[Tensor | None],
    weights: Sequence[Tensor | None] | Mapping[str, Tensor | None],
    names: list[str] | None,
    layout: str,
    bias: bool = True,
    projected: bool = False,
    lengths: Tensor | None = None,
) -> Any:
    """A one-layer call without modes or special wishes, straight into the compiled engine.

    It spares a one-step call two thirds of its overhead.

    Args:
        cell: the cell.
        input: (T, B, I), (B, T, I) or (B, I), as ``layout`` says.
        hx: for each state (D, B, width), of one step (B, width), or None.
        weights: of each direction weight_ih, weight_hh, with ``bias`` bias_ih, bias_hh, if ``projected`` weight_hr; or
            the parameters of a module, by name.
        names: of the parameters that are those weights; None for weights in a row.
        layout: ``"time_major"``, ``"batch_first"`` or ``"one_step"``.
        bias, projected: which weights there are.
        lengths: (B,), steps of each row, or None.

    Returns:
        (output, h) or (output, (h, c)); of one step (h,) or (h, c). None if the call is anything but usual, perhaps
        wrong, and must go the long way.
    """
    if not is_everyday():
        return None
    assert cpu.express is not None
    grad, laid_out, threads = _is_grad_enabled(), cpu.LAYOUTS[layout], _get_num_threads()
    result = cpu.express(cell.name, input, hx, weights, names, bias, projected, laid_out, lengths, grad, threads)
    if type(result) is not list:
        return result
    results, tensors = result
    outputs = _apply_express(cell, layout, *results, *tensors)
    if layout == "one_step":
        return outputs
    output, *last = outputs
    return output, last[0] if len(last) == 1 else tuple(last)
