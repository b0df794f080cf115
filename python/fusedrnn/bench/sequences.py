"""Sequences as they are: what resets and lengths cost, beside what one does with torch.nn, which has neither."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .contestants import FUSEDRNN, TOLERANCE, TORCH, Task, disagreement, fused_copy, make_task
from .grid import ODD, Shape
from .results import Finding, engines_of
from .timer import Timing, interleave, torch_threads

_RESETS, _SHARE = Shape(128, 128, 256, 256, ODD), 0.03
_PADDED = Shape(100, 32, 128, 128, ODD)
LOOP, PLAIN = "loop of torch.nn", "without resets"
#: A turn is so long, for what is compared shares a process and its caches: a loop of such calls, not the first of them.
_SAMPLE_SECONDS = 2e-2


def resets(cell: str, mode: str, threads: int, budget: float) -> Finding:
    """Milliseconds of a call with resets to zeros: fusedrnn's, torch.nn's with the batch split at the resets into one
    of padded segments, and torch.nn's step after step in a loop; beside them fusedrnn's without resets.

    Args:
        cell: a name in ``grid.CELLS``.
        mode: ``"inference"`` or ``"training"``.
        threads: number of threads.
        budget: seconds to spend.
    """
    task = make_task(cell, _RESETS, mode, torch.float32)
    begins = torch.rand(_RESETS.T, _RESETS.B, generator=torch.Generator().manual_seed(0)) < _SHARE
    stock, fused = task.module, fused_copy(task.module)
    calls = {
        TORCH: _call(stock, task, partial(_split, begins, stock)),
        FUSEDRNN: _call(fused, task, lambda x: fused(x, resets=begins)[0]),
        LOOP: _call(stock, task, partial(_loop, begins, stock)),
        PLAIN: _call(fused, task, lambda x: fused(x)[0]),
    }
    timing, errors = _race(calls, (TORCH, FUSEDRNN, LOOP), threads, budget)
    what = f"{cell} {mode}, {_RESETS.name}, {_SHARE:.0%} resets, {threads} threads"
    values = {name: 1e3 * timing.median(name) for name in timing.seconds}
    return Finding("resets", what, values, engines_of(fused, task.input), errors=errors)


def _split(begins: Tensor, module: torch.nn.Module, x: Tensor) -> Tensor:
    """The output of torch.nn where each segment is a row of a padded batch, gathered by index: torch's gradients of
    ``pad_sequence`` and of a packed batch take minutes for so many segments."""
    begins = begins.clone()
    begins[0] = True
    first = begins.t().flatten().nonzero().flatten()  # row after row, so that a segment's steps are side by side
    lengths = first.diff(append=torch.tensor([begins.numel()]))
    steps = torch.arange(int(lengths.max()))
    flat = x.transpose(0, 1).flatten(0, 1)
    padded: Tensor = module(flat[(first + steps[:, None]).clamp(max=len(flat) - 1)])[0]
    there = steps < lengths[:, None]
    return padded.transpose(0, 1)[there].view(x.shape[1], x.shape[0], -1).transpose(0, 1)


def _loop(begins: Tensor, module: torch.nn.Module, x: Tensor) -> Tensor:
    """The output of torch.nn called for each step, its state cleared where a segment begins."""
    states, outputs = None, []
    for x_t, begin in zip(x, begins, strict=True):
        if states is not None:
            kept = ~begin[:, None]
            states = tuple(s * kept for s in states) if isinstance(states, tuple) else states * kept
        output, states = module(x_t[None], states)
        outputs.append(output)
    return torch.cat(outputs)


def lengths(cell: str, mode: str, threads: int, budget: float) -> Finding:
    """Time per real token of a padded batch as a part of the dense one's: fusedrnn's with lengths, torch.nn's that
    packs and pads again.

    Args:
        cell: a name in ``grid.CELLS``.
        mode: ``"inference"`` or ``"training"``.
        threads: number of threads.
        budget: seconds to spend.
    """
    task = make_task(cell, _PADDED, mode, torch.float32)
    ends = torch.randint(1, _PADDED.T + 1, (_PADDED.B,), generator=torch.Generator().manual_seed(0))
    stock, fused = task.module, fused_copy(task.module)

    def packed(x: Tensor) -> Tensor:
        rows = stock(pack_padded_sequence(x, ends, enforce_sorted=False))[0]
        return pad_packed_sequence(rows, total_length=len(x))[0]

    dense = {who: f"{who} dense" for who in (TORCH, FUSEDRNN)}
    calls = {
        TORCH: _call(stock, task, packed),
        FUSEDRNN: _call(fused, task, lambda x: fused(x, lengths=ends)[0]),
        dense[TORCH]: _call(stock, task, lambda x: stock(x)[0]),
        dense[FUSEDRNN]: _call(fused, task, lambda x: fused(x)[0]),
    }
    timing, errors = _race(calls, (TORCH, FUSEDRNN), threads, budget)
    share = _PADDED.tokens / int(ends.sum())
    values = {who: share * timing.ratio(who, dense[who]) for who in dense if who in timing.seconds}
    what = f"{cell} {mode}, {_PADDED.name}, {1 / share:.0%} of the tokens, {threads} threads"
    return Finding("lengths", what, values, engines_of(fused, task.input), errors=errors)


def _call(module: torch.nn.Module, task: Task, output: Callable[[Tensor], Tensor]) -> Callable[[], list[Tensor]]:
    """Computes an output, and for training the gradients of input and weights."""
    leaves = [task.data, *module.parameters()]

    def train() -> list[Tensor]:
        result = output(task.data)
        return [result, *torch.autograd.grad(result, leaves, task.grad_output)]

    def infer() -> list[Tensor]:
        with torch.no_grad():
            return [output(task.data)]

    return train if task.training else infer


def _race(
    calls: dict[str, Callable[[], list[Tensor]]], same: Iterable[str], threads: int, budget: float
) -> tuple[Timing, dict[str, str]]:
    """Time them by turns, without those of ``same`` that do not agree with its first."""
    errors = {}
    with torch_threads(threads):
        first, *others = same
        want = calls[first]()
        for name in others:
            off = disagreement(calls[name](), want)
            if off > 10 * TOLERANCE[torch.float32]:  # sums of many rows' gradients, in other orders
                errors[name] = f"off by {off:.0e}"
        agreeing = {name: call for name, call in calls.items() if name not in errors}
        return interleave(agreeing, budget, sample_seconds=_SAMPLE_SECONDS), errors
