"""A layer as operators of torch: what torch.compile, torch.export, torch.func and torch's modes call and see.

``fusedrnn::layer`` is the operator that the route calls. Where a gradient is wanted its autograd formula calls
``fusedrnn::layer_with_saved``, which also returns what the engine keeps, and whose gradient is
``fusedrnn::layer_backward``, whose own gradient, and so any of a higher order, differentiates the reference engine.
One call is one layer, in both directions if it has two.

For each operator there is here, in torch's terms, a kernel, a fake (shapes only), an autograd rule and a vmap rule.
Forward-mode derivatives take the reference engine, which is made of torch operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd
from .cells import CELLS
from .engines import ENGINES, Choice, announce, choose
from .engines.base import ALONG, Call, Engine, Outputs, Saved
from .torch_state import (
    VMAP_RULES,
    apply_here,
    autograd_enabled_again,
    has_tangent,
    in_forward_mode,
    plain,
    refuse_onnx,
    why_operators_do_not_apply,
)

_LIBRARY: Any = torch.library.Library("fusedrnn", "DEF")  # type: ignore[no-untyped-call]
# The arguments of a Call; the results are those of an engine, without the output if `sequence` is false.
_CALL = (
    "str cell, Tensor input, Tensor?[] hx, Tensor?[] weights, Tensor? batch_sizes, bool sequence, Tensor? lengths, "
    "Tensor? resets, Tensor?[] reset_state, bool every_state, Tensor? h_mask, float[] zoneout, Tensor? seed, "
    "bool recompute"
)
_OPERATORS = torch.ops.fusedrnn
_Tensors = Sequence[Tensor | None]


def layer(call: Call) -> Outputs:
    """Run one layer through the operators."""
    reason = why_operators_do_not_apply(call.tensors())
    if reason is not None:
        return _by_reference(call, reason)
    return _outputs(call.sequence, _OPERATORS.layer.default(*_arguments(call)))


def layer_backward(
    engine: Engine, call: Call, saved: Saved, grads: _Tensors, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradient of one layer through the operators. Arguments and result are those of an engine's backward."""
    found = iter(
        _OPERATORS.layer_backward.default(
            list(grads if call.sequence else grads[1:]), *_arguments(call), list(saved), list(needs), engine.name
        )
    )
    return tuple(next(found) if need else None for need in needs)


def _arguments(call: Call) -> tuple[Any, ...]:
    of_sequence = call.batch_sizes, call.sequence, call.lengths, call.resets
    of_states = list(call.reset_state), call.every_state
    rest = call.h_mask, list(call.zoneout), call.seed, call.recompute
    return call.cell.name, call.input, list(call.hx), list(call.weights), *of_sequence, *of_states, *rest


def _call(
    cell: str,
    input: Tensor,
    hx: _Tensors,
    weights: _Tensors,
    batch_sizes: Tensor | None,
    sequence: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_state: _Tensors | None,
    every_state: bool,
    h_mask: Tensor | None,
    zoneout: Sequence[float] | None,
    seed: Tensor | None,
    recompute: bool,
) -> Call:
    return Call(
        CELLS[cell],
        input,
        tuple(hx),
        tuple(weights),
        batch_sizes,
        sequence,
        lengths,
        resets,
        tuple(reset_state or ()),  # a program compiled ahead of time passes an empty list as None
        every_state,
        h_mask,
        tuple(zoneout or ()),
        seed,
        recompute,
    )


def _outputs(sequence: bool, results: _Tensors) -> Outputs:
    return tuple(results) if sequence else (None, *results)


def _count(call: Call) -> int:
    """How many outputs the operator has."""
    return call.outputs - (not call.sequence)


def _present(outputs: Outputs) -> list[Tensor]:
    return [t for t in outputs if t is not None]


def _by_reference(call: Call, reason: str) -> Outputs:
    """The layer in torch operations, announced as such."""
    engines = [name for name, engine in ENGINES.items() if engine.name != "reference"]
    choice = Choice(ENGINES["reference"], forced=False, declined=dict.fromkeys(engines, reason))
    announce(call, choice)
    return choice.engine.forward(call, save=False)[0]


# Kernels: they run on tensors with memory.


def _run(call: Call, choice: Choice, save: bool) -> tuple[list[Tensor], list[Tensor]]:
    call = call.with_tensors(plain(call.tensors()))
    choice.route = "called as an operator of torch (torch.ops.fusedrnn)"
    keeps = save and bool(choice.engine.saved_shapes(call))
    if save and not keeps and not choice.engine.traceable:
        choice.route += "; backward will run forward again"
    announce(call, choice)
    outputs, saved = autograd.forward(choice.engine, call, keeps)
    return [_owned(t, choice.engine) for t in _present(outputs)], list(saved)


def _owned(tensor: Tensor, engine: Engine) -> Tensor:
    """A contiguous tensor with memory of its own: torch operations may return the same memory twice."""
    return tensor.detach().clone(memory_format=torch.contiguous_format) if engine.traceable else tensor.contiguous()


def _layer(*arguments: Any) -> list[Tensor]:
    call = _call(*arguments)
    return _run(call, choose(call), save=False)[0]


def _layer_with_saved(*arguments: Any) -> list[Tensor]:
    call, engine = _call(*arguments[:-1]), ENGINES[arguments[-1]]
    choice = choose(call)
    if choice.engine is not engine:
        choice = Choice(engine, forced=False, declined={choice.engine.name: "another was chosen when torch traced it"})
    outputs, saved = _run(call, choice, save=True)
    return [*outputs, *saved]


def _layer_backward(grads: _Tensors, *arguments: Any) -> list[Tensor]:
    *of_call, saved, needs, name = arguments
    call, engine = _call(*of_call), ENGINES[name]
    tensors = plain(call.tensors())
    grads = plain(grads) if call.sequence else [None, *plain(grads)]
    if engine.traceable:
        with autograd_enabled_again():
            variables = [
                None if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)
            ]
            found = autograd.gradient(engine, call.with_tensors(variables), grads, needs)
    else:
        call = call.with_tensors(tensors)
        if not saved:
            saved = autograd.forward(engine, call, save=True)[1]
        found = autograd.backward(engine, call, tuple(saved), grads, needs)
    return [
        torch.zeros_like(t, memory_format=torch.contiguous_format) if g is None else _owned(g, engine)
        for t, g, need in zip(tensors, found, needs, strict=True)
        if need and t is not None
    ]


# Fakes: the shapes of the results.


def _layer_fake(*arguments: Any) -> list[Tensor]:
    refuse_onnx()
    call = _call(*arguments)
    batch: Any = call.input.shape[1] if call.batch_sizes is None and call.input.dim() == 3 else None
    if call.batch_sizes is not None:
        h = call.h_mask if call.hx[0] is None else call.hx[0]
        batch = torch.library.get_ctx().new_dynamic_size() if h is None else h.shape[1]
    call.check(batch)
    output = [call.input.new_empty((*call.input.shape[:-1], call.directions * call.output_size))]
    states = [call.input.new_empty((call.directions, batch, width)) for width in call.widths()]
    widths = call.widths()[1:] if call.every_state else ()
    every = [call.input.new_empty((*call.input.shape[:-1], call.directions * width)) for width in widths]
    return output * call.sequence + every + states


def _layer_with_saved_fake(*arguments: Any) -> list[Tensor]:
    call, engine = _call(*arguments[:-1]), ENGINES[arguments[-1]]
    dtype = engine.computes_in(call.input.dtype)
    saved = [call.input.new_empty(shape, dtype=dtype) for shape in engine.saved_shapes(call)]
    return _layer_fake(*arguments[:-1]) + saved


def _layer_backward_fake(grads: _Tensors, *arguments: Any) -> list[Tensor]:
    *of_call, _, needs, _ = arguments
    tensors = _call(*of_call).tensors()
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need and t is not None]


# Autograd rules. What torch.library.register_autograd makes is refused by torch.func, hence kernels of our own.


def _wants_gradient(tensors: _Tensors) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _below_autograd(operator: Callable[..., list[Tensor]], *arguments: Any) -> list[Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _inside_function(operator: Callable[..., list[Tensor]], *arguments: Any) -> tuple[Tensor, ...]:
    """The operator below the level of a Function, which disables gradients for levels of torch.func below it too."""
    with torch.enable_grad():
        return tuple(_below_autograd(operator, *arguments))


def _refuse_tangents(tensors: _Tensors) -> None:
    if has_tangent(tensors):
        raise NotImplementedError(
            "fusedrnn: torch has traced this layer for reverse-mode gradients, and the traced operator has no "
            "forward-mode derivative; take the derivative of the module itself, not of what was traced from it"
        )


def _layer_autograd(*arguments: Any) -> list[Tensor]:
    call = _call(*arguments)
    tensors = call.tensors()
    if in_forward_mode(tensors):
        return _present(_by_reference(call, "inside forward-mode differentiation"))
    if not _wants_gradient(tensors):
        return _below_autograd(_OPERATORS.layer.default, *_arguments(call))
    return list(_with_gradient(call, tensors, choose(call).engine.name)[: _count(call)])


def _layer_with_saved_autograd(*arguments: Any) -> list[Tensor]:
    call, engine = _call(*arguments[:-1]), arguments[-1]
    tensors = call.tensors()
    _refuse_tangents(tensors)
    if not _wants_gradient(tensors):
        return _below_autograd(_OPERATORS.layer_with_saved.default, *arguments)
    return list(_with_gradient(call, tensors, engine))


def _with_gradient(call: Call, tensors: _Tensors, engine: str) -> tuple[Tensor, ...]:
    return apply_here(_LayerWithSaved, engine, call.without_tensors(), *call.along(), *tensors)


class _LayerWithSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, engine: str, template: Call, *along_and_tensors: Tensor | None) -> tuple[Tensor, ...]:
        operator = _OPERATORS.layer_with_saved.default
        results = _inside_function(operator, *_arguments(_restored(template, along_and_tensors)), engine)
        ctx.engine, ctx.template, ctx.count = engine, template, len(along_and_tensors)
        saved = results[_count(template) :]
        ctx.save_for_backward(*along_and_tensors, *saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        call = _restored(ctx.template, kept[: ctx.count])
        saved, needs = tuple(kept[ctx.count :]), ctx.needs_input_grad[2 + ALONG :]
        of_outputs = _outputs(call.sequence, grads[: _count(call)])
        if in_forward_mode((*grads, *call.tensors())):
            result = _reference_gradient(call, of_outputs, needs)
        else:
            result = layer_backward(ENGINES[ctx.engine], call, saved, of_outputs, needs)
        return None, None, *(None,) * ALONG, *result


def _layer_backward_autograd(grads: _Tensors, *arguments: Any) -> list[Tensor]:
    *of_call, saved, needs, engine = arguments
    call = _call(*of_call)
    tensors = (*grads, *call.tensors())
    _refuse_tangents(tensors)
    if not _wants_gradient(tensors):
        return _below_autograd(_OPERATORS.layer_backward.default, grads, *arguments)
    template = call.without_tensors()
    return list(apply_here(_LayerBackward, engine, template, saved, needs, *call.along(), *tensors))


class _LayerBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        engine: str,
        template: Call,
        saved: Sequence[Tensor],
        needs: Sequence[bool],
        *along_and_tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.template, ctx.needs = template, needs
        ctx.save_for_backward(*along_and_tensors)
        ctx.set_materialize_grads(False)
        grads, call = _LayerBackward._split(template, along_and_tensors)
        operator = _OPERATORS.layer_backward.default
        return _inside_function(operator, list(grads), *_arguments(call), saved, needs, engine)

    @staticmethod
    def _split(template: Call, along_and_tensors: _Tensors) -> tuple[_Tensors, Call]:
        along, tensors, grads = along_and_tensors[:ALONG], along_and_tensors[ALONG:], _count(template)
        return tensors[:grads], _restored(template, [*along, *tensors[grads:]])

    @staticmethod
    def backward(ctx: Any, *second: Tensor | None) -> tuple[Tensor | None, ...]:
        along, tensors = ctx.saved_tensors[:ALONG], ctx.saved_tensors[ALONG:]
        asked = [k for k, need in enumerate(ctx.needs_input_grad[4 + ALONG :]) if need]
        given = [k for k, s in enumerate(second) if s is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)

        def first(*variables: Tensor) -> tuple[Tensor, ...]:
            substituted = _substituted(tensors, asked, variables)
            grads, call = _LayerBackward._split(ctx.template, [*along, *substituted])
            found = _reference_gradient(call, _outputs(call.sequence, grads), ctx.needs)
            present = [g for g in found if g is not None]
            return tuple(present[k] for k in given)

        pull = torch.func.vjp(first, *(tensors[k] for k in asked))[1]
        values = dict(zip(asked, pull(tuple(second[k] for k in given)), strict=True))
        return *(None,) * (4 + ALONG), *(values.get(k) for k in range(len(tensors)))


def _restored(template: Call, along_and_tensors: _Tensors) -> Call:
    """The call again, when autograd has kept all its tensors: those of torch.func's levels must not hide elsewhere."""
    return template.with_tensors(along_and_tensors[ALONG:]).with_along(along_and_tensors[:ALONG])


def _substituted(tensors: _Tensors, places: Sequence[int], values: Sequence[Tensor]) -> list[Tensor | None]:
    result = list(tensors)
    for place, value in zip(places, values, strict=True):
        result[place] = value
    return result


def _reference_gradient(call: Call, grads: _Tensors, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradient of one layer by differentiating the reference, differentiable itself, inside transforms too."""
    tensors = call.tensors()
    wanted = [k for k, need in enumerate(needs) if need]

    def outputs(*variables: Tensor) -> tuple[Tensor, ...]:
        of_variables = call.with_tensors(_substituted(tensors, wanted, variables))
        results = ENGINES["reference"].forward(of_variables, save=False)[0]
        return tuple(o for o, g in zip(results, grads, strict=True) if o is not None and g is not None)

    pull = torch.func.vjp(outputs, *(tensors[k] for k in wanted))[1]
    found = iter(pull(tuple(g for g in grads if g is not None)))
    return tuple(next(found) if need else None for need in needs)


# Rules for vmap. Rows of one batch do not know of each other, so where the weights are shared and no gradient is summed
# over the rows, all members of the mapped dimension become more rows of one call. Otherwise there is a call for each.


def _rows(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(..., rows, features) for each of ``size`` members as (..., rows * size, features)."""
    if tensor is None:
        return None
    if dim is None:
        expanded = tensor.unsqueeze(-2).expand(*tensor.shape[:-1], size, tensor.shape[-1])
    else:
        expanded = tensor.movedim(dim, -2)
    return expanded.flatten(-3, -2)


def _as_rows(size: int, dims: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """The arguments of a call for all members at once."""
    cell, input, hx, weights, batch_sizes, sequence, lengths, resets, reset_state, every_state, *rest = arguments
    h_mask, zoneout, seed, recompute = rest
    return [
        cell,
        _rows(input, dims[1], size),
        [_rows(h, dim, size) for h, dim in zip(hx, dims[2], strict=True)],
        weights,
        None if batch_sizes is None else batch_sizes * size,
        sequence,
        _marks(lengths, dims[6], size),
        _marks(resets, dims[7], size),
        [_rows(h, dim, size) for h, dim in zip(reset_state, dims[8], strict=True)],
        every_state,
        _rows(h_mask, dims[10], size),
        zoneout,
        seed,
        recompute,
    ]


def _marks(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(..., rows) for each of ``size`` members as (..., rows * size)."""
    rows = _rows(None if tensor is None else tensor.unsqueeze(-1), dim, size)
    return None if rows is None else rows.squeeze(-1).contiguous()


def _members_of_rows(results: Sequence[Tensor], size: int) -> tuple[list[Tensor], list[int]]:
    split = [t.view(*t.shape[:-2], -1, size, t.shape[-1]) for t in results]
    return split, [t.dim() - 2 for t in split]


def _one_by_one(
    operator: Callable[..., list[Tensor]], size: int, dims: Sequence[Any], arguments: Sequence[Any]
) -> tuple[list[Tensor], list[int]]:
    runs = [operator(*_member(arguments, dims, k)) for k in range(size)]
    results = [torch.stack(values) for values in zip(*runs, strict=True)]
    return results, [0] * len(results)


def _member(arguments: Sequence[Any], dims: Sequence[Any], k: int) -> list[Any]:
    """The arguments of member k of the mapped dimension."""

    def select(argument: Any, dim: Any) -> Any:
        if isinstance(dim, list | tuple):
            return _member(argument, dim, k)
        return argument if dim is None else argument.select(dim, k)

    return [select(argument, dim) for argument, dim in zip(arguments, dims, strict=True)]


def _mapped(dims: Sequence[Any]) -> bool:
    """Whether any of the tensors is mapped over."""
    return any(_mapped(dim) if isinstance(dim, list | tuple) else dim is not None for dim in dims)


def _apart(dims: Sequence[Any], arguments: Sequence[Any]) -> bool:
    """Whether the members of a mapped call cannot be rows of one: their weights differ, or the lengths of a packed
    batch, or each draws lots of its own."""
    return _mapped(dims[3:5]) or arguments[12] is not None


def _layer_vmap(info: Any, dims: Sequence[Any], *arguments: Any) -> tuple[list[Tensor], list[int]]:
    operator = _OPERATORS.layer.default
    if _apart(dims, arguments):
        return _one_by_one(operator, info.batch_size, dims, arguments)
    return _members_of_rows(operator(*_as_rows(info.batch_size, dims, arguments)), info.batch_size)


def _layer_with_saved_vmap(info: Any, dims: Sequence[Any], *arguments: Any) -> tuple[list[Tensor], list[int]]:
    """Nothing is saved: backward may divide the members among calls in another way, and so computes it anew."""
    return _layer_vmap(info, dims[:-1], *arguments[:-1])


def _layer_backward_vmap(info: Any, dims: Sequence[Any], *arguments: Any) -> tuple[list[Tensor], list[int]]:
    grads, *of_call, saved, needs, engine = arguments
    operator = _OPERATORS.layer_backward.default
    of_weights = 1 + len(of_call[2])
    sums_rows = any(needs[of_weights : of_weights + len(of_call[3])])
    dims_of_call, (_, *dims_of_rest) = dims[1 : 1 + len(of_call)], dims[1 + len(of_call) :]
    if _apart(dims_of_call, of_call) or sums_rows:
        if _mapped(dims_of_call):
            saved = []
        dims_one_by_one = [dims[0], *dims_of_call, [None] * len(saved), *dims_of_rest]
        return _one_by_one(operator, info.batch_size, dims_one_by_one, [grads, *of_call, saved, needs, engine])
    rows = [_rows(g, dim, info.batch_size) for g, dim in zip(grads, dims[0], strict=True)]
    results = operator(rows, *_as_rows(info.batch_size, dims_of_call, of_call), [], needs, engine)
    return _members_of_rows(results, info.batch_size)


# The kernels take any strides. Older releases of torch do not know the second tag, and act so without.
_TAGS = tuple(getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "flexible_layout") if hasattr(torch.Tag, name))


def _register(name: str, schema: str, kernel: Any, fake: Any, autograd_rule: Any, vmap_rule: Any) -> None:
    _LIBRARY.define(name + schema, tags=_TAGS)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, autograd_rule, "Autograd")
    torch.library.register_fake(f"fusedrnn::{name}", fake, lib=_LIBRARY)
    if VMAP_RULES:
        torch.library.register_vmap(f"fusedrnn::{name}", vmap_rule, lib=_LIBRARY)


_register("layer", f"({_CALL}) -> Tensor[]", _layer, _layer_fake, _layer_autograd, _layer_vmap)
_register(
    "layer_with_saved",
    f"({_CALL}, str engine) -> Tensor[]",
    _layer_with_saved,
    _layer_with_saved_fake,
    _layer_with_saved_autograd,
    _layer_with_saved_vmap,
)
_register(
    "layer_backward",
    f"(Tensor?[] grads, {_CALL}, Tensor[] saved, bool[] needs, str engine) -> Tensor[]",
    _layer_backward,
    _layer_backward_fake,
    _layer_backward_autograd,
    _layer_backward_vmap,
)
