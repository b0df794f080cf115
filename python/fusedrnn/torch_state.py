"""Questions to torch for which it has no public function, all in one place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function,
)
from torch.autograd import forward_ad
from torch.nn import Parameter

Function = TypeVar("Function", bound=Callable[..., Any])

#: Of the tensors, and None in their places, that mean no more than their memory.
PLAIN_TYPES = frozenset({Tensor, Parameter, type(None)})
# As torch._C._AutoDispatchBelowAutograd excludes them.
_AUTOGRAD_KEYS = tuple(
    getattr(torch._C.DispatchKey, name) for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")
)
VMAP_RULES = hasattr(torch.library, "register_vmap")
# What every call asks, bound once.
_is_compiling = torch.compiler.is_compiling
_functorch_level = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead
is_any_autocast_enabled = torch._C._is_any_autocast_enabled


def unusual_mode() -> str | None:
    """Why a kernel that reads memory by pointer may not run now on any tensor, or None if it may.

    Inside torch.compile, torch.func transforms, forward-mode differentiation and dispatch modes (fake tensors)
    tensors may have no memory, or more meaning than their memory.
    """
    if _is_compiling() or _tracing_state() is not None:
        return "torch is compiling or tracing"
    if _functorch_level() is not None:
        return "inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "inside forward-mode differentiation"
    if _dispatch_modes():
        return "inside a torch dispatch mode"
    return None


def why_not_plain(tensors: Iterable[Tensor | None]) -> str | None:
    """Why a kernel that reads memory by pointer may not run on these tensors now, or None if it may."""
    unusual = unusual_mode()
    if unusual is not None:
        return unusual
    tensors = tuple(tensors)
    if not PLAIN_TYPES.issuperset(map(type, tensors)):
        subclass = next(type(t) for t in tensors if type(t) not in PLAIN_TYPES)
        return f"the tensor subclass {subclass.__name__}"
    return None


def why_operators_do_not_apply(tensors: Iterable[Tensor | None]) -> str | None:
    """Why a tensor among these would not know what to do with an operator of ours, or None if all would.

    Subclasses that handle the dispatcher's operators themselves (masked, distributed, quantised tensors) know torch's
    own. Those of torch's own tracers know them all.

    Raises:
        TypeError: one is not a tensor.
    """
    if torch.compiler.is_compiling():
        return None
    if not VMAP_RULES and _functorch_level() is not None:
        return "operators have no rules for torch.func before torch 2.5"
    for tensor in tensors:
        kind: Any = type(tensor)
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"input, states and weights must be Tensors, not {kind.__name__}")
        if (
            tensor is not None
            and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
            and not kind.__module__.startswith("torch._subclasses.")
        ):
            return f"the tensor subclass {kind.__name__} handles torch's own operators only"
    return None


def plain(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The tensors without subclasses that only rename them."""
    if PLAIN_TYPES.issuperset(map(type, tensors)):
        return tensors
    return [t if type(t) in PLAIN_TYPES else t.as_subclass(Tensor) for t in tensors]  # type: ignore[union-attr]


def in_memory(tensor: Tensor | None) -> Tensor | None:
    """The tensor contiguous, and with memory that holds its values.

    Torch only marks some as negated or as zeros, and what torch.func has left behind only refers to a tensor.
    """
    if tensor is None:
        return None
    if _is_wrapped(tensor):
        tensor = _unwrap_if_dead(tensor)
    marked = tensor.is_neg() or tensor._is_zerotensor()
    return tensor.clone(memory_format=torch.contiguous_format) if marked else tensor.contiguous()


def in_forward_mode(tensors: Iterable[Tensor | None] = ()) -> bool:
    """Whether forward-mode derivatives are about: at any level of torch.func, or on one of these tensors.

    torch.compile enters forward mode without telling torch.autograd.forward_ad; it is then among the dispatch modes.
    """
    if forward_ad._current_level >= 0:
        return True
    levels = torch._C._functorch.get_interpreter_stack() or ()
    if any(level.key() == torch._C._functorch.TransformType.Jvp for level in levels):
        return True
    return _dispatch_modes() > 0 and _has_tangent(tensors)


def has_tangent(tensors: Iterable[Tensor | None]) -> bool:
    """Whether any of these tensors carries a forward-mode derivative at the level of torch.func that is looking."""
    tensors = tuple(tensors)
    return in_forward_mode(tensors) and _has_tangent(tensors)


def _has_tangent(tensors: Iterable[Tensor | None]) -> bool:
    return any(t is not None and torch._VF._unpack_dual(t, level=0).tangent is not None for t in tensors)  # type: ignore[attr-defined]


def legacy_batched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether any of the gradients stands for many, as in ``torch.autograd.grad(..., is_grads_batched=True)``.

    That is an older vmap than torch.func's, and no operator can have a rule for it.
    """
    is_legacy = torch._C._functorch.is_legacy_batchedtensor
    return any(t is not None and is_legacy(t) for t in tensors)


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The ``apply`` of the Function without what it does for torch.func's sake, which takes 4 us.

    For use where torch.func is not at work, or where it has been seen to; and not on what it has left behind.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc,no-any-return]


def apply_here(function: type[torch.autograd.Function], *arguments: Any) -> tuple[Tensor, ...]:
    """Apply the Function inside a kernel that the dispatcher called for autograd, whoever called the dispatcher.

    ``Function.apply`` would hand the call to all levels of torch.func, but the kernel runs at one of them already.
    """
    apply = plain_apply(function)
    if _functorch_level() is None:
        return apply(*arguments)  # type: ignore[no-any-return]
    with enable_single_level_autograd_function():
        return apply(*arguments)  # type: ignore[no-any-return]


@contextmanager
def autograd_enabled_again() -> Iterator[None]:
    """Autograd records inside the block, though a kernel of an operator runs below it."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


NO_OPERATORS_THERE = (
    "{} does not know the operators of fusedrnn: call fusedrnn.revert(model) first, which makes its modules those of "
    "torch.nn again, and fusedrnn.convert(model) afterwards (or leave fusedrnn.patch())"
)


def refuse_jit_trace() -> None:
    """Raise RuntimeError if torch.jit.trace is at work."""
    if _tracing_state() is not None:
        raise RuntimeError(NO_OPERATORS_THERE.format("torch.jit.trace"))


def refuse_onnx() -> None:
    """Raise RuntimeError if torch.onnx.export is at work. Only a program that exports has imported torch.onnx."""
    if "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
        raise RuntimeError(NO_OPERATORS_THERE.format("torch.onnx.export"))


def constant_while_compiling(function: Function) -> Function:
    """Mark a function whose result torch.compile takes as it is while it compiles, without reading the function.

    ``torch.compiler.assume_constant_result`` does only this, but imports Dynamo, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast prescribes on the device, None where autocast is off."""
    if not is_any_autocast_enabled() or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


@contextmanager
def tf32_in_rnns(allowed: bool) -> Iterator[None]:
    """Whether recurrent networks on a GPU may multiply float32 in tf32 inside the block. The setting is the process's.

    From torch 2.9 on it is ``torch.backends.cudnn.rnn.fp32_precision``; a torch that has both minds being asked for
    the older ``torch.backends.cudnn.allow_tf32``.
    """
    backend = torch.backends.cudnn
    holder, name, value = (
        (backend.rnn, "fp32_precision", "tf32" if allowed else "ieee")
        if hasattr(backend, "rnn")
        else (backend, "allow_tf32", allowed)
    )
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def gpu_driver() -> str:
    """The newest CUDA version that the GPU's driver supports, such as ``13.0``; empty without a driver."""
    version = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else 0
    return f"{version // 1000}.{version % 1000 // 10}" if version else ""


def allows_tf32_in_rnn() -> bool:
    """Whether float32 recurrent networks on CUDA may round what they multiply to tf32."""
    cudnn = torch.backends.cudnn
    rnn = getattr(cudnn, "rnn", None)  # torch 2.9
    return bool(cudnn.allow_tf32) if rnn is None else rnn.fp32_precision == "tf32"


def allows_tf32_in_products() -> bool:
    """Whether float32 matrix products on CUDA may round what they multiply to tf32."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # torch 2.9
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


def set_tf32_in_products(allowed: bool) -> Callable[[], None]:
    """Set what ``allows_tf32_in_products`` tells, for all threads; returns a function that puts the setting back."""
    matmul = torch.backends.cuda.matmul
    name, value = (
        ("fp32_precision", "tf32" if allowed else "ieee")
        if hasattr(matmul, "fp32_precision")
        else ("allow_tf32", allowed)
    )
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    return lambda: setattr(matmul, name, before)
