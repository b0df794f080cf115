"""Who is timed: each contestant turns a task into a function without arguments that does the work once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from ..convert import convert
from .grid import Shape
from .timer import Clock, Timing, interleave, processor_clock

FUSEDRNN, TORCH = "fusedrnn", "torch.nn"

#: Does a task once. Inference returns [output]; training [output, gradient of the input, gradients of the weights].
Run = Callable[[], list[Tensor]]


class NotOfferedError(Exception):
    """A contestant has nothing to run a task with."""


@dataclass(frozen=True)
class Job:
    """A task in a contestant's own terms, ready to run; called, it is a :data:`Run`.

    Attributes:
        call: does the work; this is what is timed.
        tensors: makes what a ``Run`` returns of what ``call`` returned.
    """

    call: Callable[[], Any]
    tensors: Callable[[Any], list[Tensor]] = list

    def __call__(self) -> list[Tensor]:
        return self.tensors(self.call())


@dataclass(frozen=True)
class Task:
    """A cell of the grid with its data, the same for every contestant.

    Attributes:
        module: a torch.nn module: the weights.
        data: (T, B, I), packed (tokens, I), or (B, I) for a module that does one step.
        batch_sizes: of packed data, rows active at each step.
        grad_output: the gradient that reaches the output, shaped as the output; None for inference.
    """

    module: torch.nn.RNNBase | torch.nn.RNNCellBase
    data: Tensor
    batch_sizes: Tensor | None
    grad_output: Tensor | None

    @property
    def training(self) -> bool:
        return self.grad_output is not None

    @property
    def input(self) -> Tensor | PackedSequence:
        return self.data if self.batch_sizes is None else PackedSequence(self.data, self.batch_sizes)


def stock_module(cell: str, I: int, H: int, **options: Any) -> torch.nn.RNNBase:
    """torch.nn's module of a cell."""
    if cell.startswith("rnn_"):
        return torch.nn.RNN(I, H, nonlinearity=cell.removeprefix("rnn_"), **options)
    return (torch.nn.LSTM if cell == "lstm" else torch.nn.GRU)(I, H, **options)


def fused_copy(module: torch.nn.Module) -> torch.nn.Module:
    """The same module with equal weights, run by fusedrnn."""
    return convert(copy.deepcopy(module))


def make_task(cell: str, shape: Shape, mode: str, dtype: torch.dtype, device: torch.device | None = None) -> Task:
    """Weights and data of a cell of the grid; always the same numbers on a device.

    Args:
        cell: a name in ``grid.CELLS``.
        shape: the sizes.
        mode: ``"inference"`` or ``"training"``.
        dtype: of everything.
        device: of everything; None for the CPU.
    """
    torch.manual_seed(0)
    place: dict[str, Any] = {"dtype": dtype, "device": device}
    module = stock_module(cell, shape.I, shape.H, num_layers=shape.layers, bidirectional=shape.bidirectional, **place)
    data, batch_sizes, lengths = torch.randn(shape.T, shape.B, shape.I, **place), None, shape.lengths()
    if lengths is not None:
        data, batch_sizes, *_ = pack_padded_sequence(data, lengths)
    if mode == "inference":
        return Task(module, data, batch_sizes, None)
    grad_output = torch.randn(*data.shape[:-1], shape.directions * shape.H, **place)
    return Task(module, data.requires_grad_(), batch_sizes, grad_output)


def run_module(module: torch.nn.Module, task: Task) -> Job:
    """Forward, and for training backward to the input and the weights. Gradient mode is the caller's."""
    input, leaves = task.input, [task.data, *module.parameters()]

    def output(result: Any) -> Tensor:
        first = result[0] if isinstance(result, tuple) else result
        return first.data if isinstance(first, PackedSequence) else first

    def train() -> list[Tensor]:
        result = output(module(input))
        return [result, *torch.autograd.grad(result, leaves, task.grad_output)]

    return Job(train) if task.training else Job(lambda: module(input), lambda result: [output(result)])


#: The contestants that any process can run and that a GPU knows; the others, in ``peers``, are compared with torch.nn.
CONTESTANTS: dict[str, Callable[[Task], Job]] = {
    FUSEDRNN: lambda task: run_module(fused_copy(task.module), task),
    TORCH: lambda task: run_module(task.module, task),
}

#: By how much two contestants may differ, as a part of a tensor's largest value. torch's kernels round every step to
#: 16 bits, which over a thousand steps adds up.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.3}


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference as a part of the largest value wanted (if that is not zero); infinite if not finite."""
    with torch.no_grad():
        error, scale = float((got - want).abs().max()), float(want.abs().max())
    return error / (scale or 1.0) if math.isfinite(error) else math.inf


def disagreement(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest :func:`difference` of any pair of tensors."""
    return max(map(difference, got, want))


def race(
    runs: dict[str, Run], tolerance: float, budget: float, clock: Clock = processor_clock
) -> tuple[Timing, dict[str, float]]:
    """Compare every contestant's results with torch.nn's, then time those that agree.

    Args:
        runs: the contestants, torch.nn among them, ready to run.
        tolerance: largest difference from torch.nn with which one is timed.
        budget: seconds of timing.
        clock: what tells the time.

    Returns:
        the times of those that agree, and the differences of all.
    """
    want = runs[TORCH]()
    differences = {name: disagreement(run(), want) for name, run in runs.items()}
    agreeing = {name: run for name, run in runs.items() if differences[name] <= tolerance}
    return interleave(agreeing, budget, clock), differences
