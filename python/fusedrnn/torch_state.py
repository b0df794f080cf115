"""Questions to torch for which it has no public function, all in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_PLAIN_TYPES = frozenset({Tensor, Parameter, type(None)})
_functorch_level = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state


def unusual_mode() -> str | None:
    """Why a kernel that reads memory by pointer may not run now on any tensor, or None if it may.

    Inside torch.compile, torch.func transforms, forward-mode differentiation and dispatch modes (fake tensors)
    tensors may have no memory, or more meaning than their memory.
    """
    if torch.compiler.is_compiling() or _tracing_state() is not None:
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
    if not _PLAIN_TYPES.issuperset(map(type, tensors)):
        subclass = next(type(t) for t in tensors if type(t) not in _PLAIN_TYPES)
        return f"the tensor subclass {subclass.__name__}"
    return None


def batched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether any of the gradients stands for many: ``torch.autograd.grad(..., is_grads_batched=True)``, or vmap."""
    is_legacy = torch._C._functorch.is_legacy_batchedtensor
    return why_not_plain(tensors) is not None or any(t is not None and is_legacy(t) for t in tensors)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast prescribes on the device, None where autocast is off."""
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(device_type):
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
