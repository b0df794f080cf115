"""The route of one call: straight to its engine in plain eager mode, through torch's dispatcher everywhere else."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .autograd import Layer, forward
from .cells import CELLS, Cell
from .engines import announce, choose
from .engines.base import NO_TENSOR, Call, Outputs
from .engines.cpu import CpuEngine
from .torch_state import PLAIN_TYPES, refuse_jit_trace, why_not_plain

_CPU = CpuEngine()
_TEMPLATES = {
    (cell, sequence): Call(cell, NO_TENSOR, (), (), sequence=sequence)
    for cell in CELLS.values()
    for sequence in (False, True)
}


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


def run_everyday_training(cell: Cell, *tensors: Tensor | None, sequence: bool = True) -> Outputs | None:
    """What ``run`` does, in less time, with the most common call in training: without options along time, dropout and
    the like, where ``is_everyday`` and gradients are enabled.

    Args:
        cell: the cell.
        tensors: those of the call, in the order of ``Call.tensors``.
        sequence: whether the output of every step is wanted.

    Returns:
        None if the call is of another kind after all.

    Raises:
        RuntimeError: the call is wrong.
    """
    plain = PLAIN_TYPES.issuperset(map(type, tensors))
    if not plain or not _CPU.runs_directly(tensors[0]) or not any(t is not None and t.requires_grad for t in tensors):  # type: ignore[arg-type]
        return None
    return Layer.apply(_CPU, _TEMPLATES[cell, sequence], *tensors)  # type: ignore[no-any-return,no-untyped-call]
