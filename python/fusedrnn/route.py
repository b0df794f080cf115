"""The route of one call: straight to its engine in plain eager mode, through torch's dispatcher everywhere else."""

from __future__ import annotations

import torch

from . import ops
from .autograd import Layer, forward
from .engines import announce, choose
from .engines.base import Call, Outputs
from .torch_state import refuse_jit_trace, why_not_plain


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
