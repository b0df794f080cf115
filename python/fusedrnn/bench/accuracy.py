"""How far results are from those computed in float64."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor

from .contestants import FUSEDRNN, TORCH, fused_copy, make_task, run_module
from .grid import SHAPES
from .results import Finding, engines_of


def _error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference as a part of the root mean square of what is wanted."""
    got, want = got.detach(), want.detach()
    return float((got.double() - want).norm() / (want.norm() or 1.0))


def measure(cell: str, shape: str, dtype: torch.dtype) -> Finding:
    """The relative error of a training step's output and gradients, the largest of any tensor, against torch.nn in
    float64 from the same weights and data, in units of the dtype's precision.

    Args:
        cell: a name in ``grid.CELLS``.
        shape: a name in ``grid.SHAPES``.
        dtype: of weights and data.
    """
    task = make_task(cell, SHAPES[shape], "training", dtype)
    assert task.grad_output is not None
    exact = dataclasses.replace(
        task,
        module=copy.deepcopy(task.module).double(),
        data=task.data.detach().double().requires_grad_(),
        grad_output=task.grad_output.double(),
    )
    want = run_module(exact.module, exact)()
    values = {}
    fused = fused_copy(task.module)
    for name, module in ((FUSEDRNN, fused), (TORCH, task.module)):
        got = run_module(module, task)()
        values[name] = max(map(_error, got, want)) / torch.finfo(dtype).eps
    return Finding("accuracy", f"{cell} {shape}", values, engines_of(fused, task.input))
