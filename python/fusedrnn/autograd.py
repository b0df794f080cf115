"""How autograd sees the engines that are not made of torch operations, and the gradients of any order behind that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cells import Cell
from .engines import ENGINES, cpu
from .engines.base import ALONG, NO_TENSOR, Call, Engine, Outputs, Saved
from .torch_state import in_forward_mode, in_memory, legacy_batched, unusual_mode


def forward(engine: Engine, call: Call, save: bool) -> tuple[Outputs, Saved]:
    """The engine's forward in the dtype that it computes in."""
    dtype = call.input.dtype
    compute = engine.computes_in(dtype)
    if compute == dtype:
        return engine.forward(call, save)
    call.check()  # before conversion hides that dtypes differ
    outputs, saved = engine.forward(call.to(compute), save)
    return tuple(None if t is None else t.to(dtype) for t in outputs), saved


def backward(
    engine: Engine, call: Call, saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The engine's backward in the dtype that it computes in."""
    dtype = call.input.dtype
    compute = engine.computes_in(dtype)
    if compute == dtype:
        return tuple(engine.backward(call, saved, grads, needs))
    converted = [None if g is None else g.to(compute) for g in grads]
    result = engine.backward(call.to(compute), saved, converted, needs)
    return tuple(None if g is None else g.to(dtype) for g in result)


class Layer(torch.autograd.Function):
    """One layer in plain eager mode. Its gradient is the engine's own."""

    @staticmethod
    def forward(ctx: Any, engine: Engine, template: Call, *tensors: Tensor | None) -> Outputs:
        outputs, saved = forward(engine, template.with_tensors(tensors), save=True)
        ctx.engine, ctx.template, ctx.count = engine, template, len(tensors)
        ctx.set_materialize_grads(False)
        # Those of along() too, so that autograd notices if somebody changes them before backward reads them again.
        ctx.save_for_backward(*tensors, *template.along(), *saved)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        tensors, saved = kept[: ctx.count], kept[ctx.count + ALONG :]
        return None, None, *_gradients(ctx.engine, ctx.template, tensors, saved, grads, ctx.needs_input_grad[2:])


def _gradients(
    engine: Engine,
    template: Call,
    tensors: Sequence[Tensor | None],
    saved: Saved,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    """Backward of one layer, whatever torch is doing around it."""
    unusual = unusual_mode() is not None
    if legacy_batched(grads) or (unusual and in_forward_mode()):
        create_graph = unusual or torch.is_grad_enabled()
        return gradient(ENGINES["reference"], template.with_tensors(tensors), grads, needs, create_graph)
    if unusual:
        from . import ops

        return ops.layer_backward(engine, template.with_tensors(tensors), saved, grads, needs)
    if torch.is_grad_enabled():  # create_graph=True: the gradients may be differentiated themselves
        apply = _LayerBackward.apply
        return apply(engine, template, saved, needs, *grads, *tensors)  # type: ignore[no-any-return,no-untyped-call]
    return backward(engine, template.with_tensors(tensors), saved, grads, needs)


class Express(torch.autograd.Function):
    """One layer that the compiled engine has run already, see :func:`fusedrnn.route.express`."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, layout: str, outputs: Outputs, saved: Tensor, *tensors: Tensor | None) -> Outputs:
        ctx.cell, ctx.layout = cell, layout
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, saved)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, saved = ctx.saved_tensors
        cell, layout, needs = ctx.cell, ctx.layout, ctx.needs_input_grad[4:]
        result: Sequence[Tensor | None] | None = None
        if unusual_mode() is None and not torch.is_grad_enabled():
            assert cpu.express_backward is not None
            whole, threads = list(map(in_memory, grads)), torch.get_num_threads()
            result = cpu.express_backward(cell.name, tensors, cpu.LAYOUTS[layout], saved, whole, needs, threads)
        if result is None:
            result = _long_way_back(cell, layout, tensors, saved, grads, needs)
        return None, None, None, None, *result


def _long_way_back(
    cell: Cell,
    layout: str,
    tensors: Sequence[Tensor | None],
    saved: Tensor,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    """Backward of ``Express``, laid out as it, through a ``Call``, which is always (T, B, I)."""
    states = len(cell.states)
    template = Call(cell, NO_TENSOR, (), (), sequence=layout != "one_step")

    def swapped(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.transpose(0, 1)

    def stepped(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.unsqueeze(0)

    with torch.enable_grad():  # there may be derivatives with respect to these
        if layout == "batch_first":
            tensors = swapped(tensors[0]), *tensors[1:]
            grads = swapped(grads[0]), *grads[1:]
        elif layout == "one_step":
            tensors = *map(stepped, tensors[: 1 + states]), *tensors[1 + states :]
            grads = None, *map(stepped, grads)
    result = _gradients(ENGINES["cpu"], template, tensors, (saved,), grads, needs)
    if layout == "batch_first":
        result = swapped(result[0]), *result[1:]
    elif layout == "one_step":
        result = *(None if g is None else g.squeeze(0) for g in result[: 1 + states]), *result[1 + states :]
    return result


def gradient(
    engine: Engine, call: Call, grads: Sequence[Tensor | None], needs: Sequence[bool], create_graph: bool = True
) -> tuple[Tensor | None, ...]:
    """The gradient of one layer by differentiating a traceable engine; it is differentiable itself, if it shall be."""
    with torch.enable_grad():
        outputs, _ = engine.forward(call, save=False)
        given = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o is not None]
        wanted = [t for t, need in zip(call.tensors(), needs, strict=True) if need and t is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in given], wanted, [g for _, g in given], create_graph=create_graph, allow_unused=True
            )
        )
    return tuple(next(found) if need else None for need in needs)


class _LayerBackward(torch.autograd.Function):
    """The gradient of one layer as a function of the outputs' gradients and the layer's tensors.

    Its own gradient, and so those of any higher order, differentiates the reference engine.
    """

    @staticmethod
    def forward(
        ctx: Any, engine: Engine, template: Call, saved: Saved, needs: Sequence[bool], *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        outputs = template.outputs
        ctx.template, ctx.needs, ctx.outputs = template, needs, outputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return backward(engine, template.with_tensors(tensors[outputs:]), saved, tensors[:outputs], needs)

    @staticmethod
    def backward(ctx: Any, *second: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            # Views, so that derivatives are taken with respect to this function's arguments only, not to
            # what one argument may owe another.
            variables = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
        call = ctx.template.with_tensors(variables[ctx.outputs :])
        first = gradient(ENGINES["reference"], call, variables[: ctx.outputs], ctx.needs)
        pairs = [
            (f, s) for f, s in zip(first, second, strict=True) if f is not None and s is not None and f.requires_grad
        ]
        asked = [k for k, need in enumerate(ctx.needs_input_grad[4:]) if need]
        result: list[Tensor | None] = [None] * len(variables)
        if pairs and asked:
            values = torch.autograd.grad(
                [f for f, _ in pairs],
                [variables[k] for k in asked],  # type: ignore[arg-type]
                [s for _, s in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
            for k, value in zip(asked, values, strict=True):
                result[k] = value
        return None, None, None, None, *result
