"""Truncated backpropagation through time: a long sequence window by window."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence

from .along import checked
from .nn import learned_state


class Window(NamedTuple):
    """One step of :func:`tbptt`.

    Attributes:
        output: of the new steps, laid out as the input; its gradient reaches back k2 steps from the last of them.
        state: after the last of them, detached, shaped as ``hx``: what a call that goes on from there begins with.
        steps: which steps of the input these are.
    """

    output: Tensor
    state: Any
    steps: slice


def tbptt(
    module: torch.nn.Module,
    input: Tensor,
    k1: int,
    k2: int | None = None,
    hx: Any = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Any = None,
) -> Iterator[Window]:
    """Truncated backpropagation through time: every k1 steps, gradients of their outputs through the last k2 steps.

    This is BPTT(h; h') of Williams and Peng (1990) with h = k2 and h' = k1, and TBPTT(k1, k2) of Sutskever (2013).
    Each window's loss may be differentiated, once, and the weights changed, before the next window is asked for::

        for window in fusedrnn.tbptt(rnn, x, 32, 64):
            loss = criterion(head(window.output), target[window.steps])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    The state is carried from window to window and detached: before a window's first step it is the one that an earlier
    window computed. Where k2 > k1 the steps before the new ones are run again, with the weights as they are then, so a
    window costs k2 steps. Memory is that of k2 steps, however long the input is. Masks of dropout are drawn anew for
    each call of the module: where k2 > k1 a window has two, of which the second begins where the next window does.

    Args:
        module: called as ``module(input, hx) -> (output, hx)``, such as those of fusedrnn and torch.nn, compiled or in
            DistributedDataParallel too; in one direction. A module of your own around them that takes (B, T, I) needs
            the attribute ``batch_first`` as well.
        input: (T, B, I), (B, T, I) if ``module.batch_first``, or unbatched (T, I).
        k1: new steps of a window; the last window may have fewer.
        k2: steps that gradients go back, at least k1; None for k1.
        hx: the state before step 0, as ``module`` takes it; gradients reach it from the windows that begin with step 0.
        lengths, resets, reset_state: of the whole input, see :func:`fusedrnn.functional.rnn`; fusedrnn's modules only.

    Returns:
        an iterator over the windows.

    Raises:
        ValueError: k1 or k2 out of range, or the module is bidirectional.
        TypeError: the input is packed or nested, k1 or k2 is no integer, or lengths or resets are not tensors.
        RuntimeError: lengths, resets or reset_state do not fit the whole input.
    """
    k1 = operator.index(k1)
    k2 = k1 if k2 is None else operator.index(k2)
    if k1 < 1:
        raise ValueError(f"k1 must be at least 1, got {k1}")
    if k2 < k1:
        raise ValueError(f"k2 must be at least k1 = {k1}, or the loss of some steps would reach no weights; got {k2}")
    if getattr(_inside(module), "bidirectional", False):
        raise ValueError("tbptt is for one direction: the reverse one begins at the sequence's end")
    if isinstance(input, PackedSequence) or input.is_nested:
        raise TypeError("tbptt takes a padded batch: give lengths instead of a packed or nested one")
    windows = _Windows(module, input, lengths, resets, reset_state)
    windows.check()
    return windows.run(k1, k2, hx)


class _Windows:
    def __init__(
        self,
        module: torch.nn.Module,
        input: Tensor,
        lengths: Tensor | None,
        resets: Tensor | None,
        reset_state: Any,
    ) -> None:
        self.module, self.input, self.lengths, self.resets = module, input, lengths, resets
        self.reset_state = reset_state
        self.dim = 1 if getattr(_inside(module), "batch_first", False) and input.dim() == 3 else 0

    def check(self) -> None:
        """Raise for options that do not fit the whole input: the module sees them cut to a window, where they may."""
        fresh = self.reset_state
        if self.lengths is None and self.resets is None and fresh is None:
            return
        layout = "T" if self.input.dim() == 2 else "BT" if self.dim else "TB"
        states = fresh if fresh is None or isinstance(fresh, tuple | list) else (fresh,)
        checked(self.input, layout, self.lengths, self.resets, states, return_states=False, hx_given=False)
        if self.lengths is not None:
            self.lengths = self.lengths.to(torch.int64)  # of which a window's first step may be subtracted

    def run(self, k1: int, k2: int, hx: Any) -> Iterator[Window]:
        steps = self.input.shape[self.dim]
        start, state, done = 0, hx, 0  # ``state`` is the one before step ``start``
        while done < steps:
            end = min(done + k1, steps)
            # The next window begins inside this one, which is the last to come by there.
            following = max(0, min(end + k1, steps) - k2)
            outputs, now, carried = [], state, state
            for first, last in ((start, following), (following, end)):
                if first < last:
                    output, now = self.piece(first, last, now)
                    outputs.append(output)
                if last == following and following > 0:
                    carried = _each(now, Tensor.detach)
            output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, self.dim)
            new = output.narrow(self.dim, done - start, end - done)
            final = _each(now, Tensor.detach)
            del output, outputs, now  # the caller alone says how long the graph lives
            yield Window(new, final, slice(done, end))
            del new
            start, state, done = following, carried, end

    def piece(self, first: int, last: int, state: Any) -> tuple[Tensor, Any]:
        """Steps [first, last) from the state before them."""
        options: dict[str, Any] = {}
        if self.lengths is not None:
            options["lengths"] = (self.lengths - first).clamp(0, last - first)
        if self.resets is not None:
            options["resets"] = self.resets.narrow(self.dim, first, last - first)
            options["reset_state"] = self.reset_state
            if first > 0:  # a state that is given wins over the resets of a call's first step
                state = self.anew(first, state)
        result: tuple[Tensor, Any] = self.module(self.input.narrow(self.dim, first, last - first), state, **options)
        return result

    def anew(self, step: int, state: Any) -> Any:
        """The state before a step, the reset state where a segment begins with it."""
        assert self.resets is not None
        begins = self.resets.select(self.dim, step)
        if self.lengths is not None:
            begins = begins & (self.lengths.to(begins.device) > step)
        fresh = self.reset_state
        if fresh is None:
            fresh = learned_state(_inside(self.module))
            if fresh is not None:
                unbatched = self.input.dim() == 2
                fresh = tuple(s[:, 0] if unbatched else s for s in fresh)
        fresh = (None,) * 2 if fresh is None else fresh if isinstance(fresh, tuple | list) else (fresh,)
        values = iter(fresh)

        def replaced(old: Tensor) -> Tensor:
            new = next(values)
            return torch.where(begins[..., None], torch.zeros_like(old) if new is None else new, old)

        return _each(state, replaced)


def _inside(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside the wrappers of torch.compile and DistributedDataParallel, which hide its attributes."""
    if isinstance(module, DistributedDataParallel):
        return _inside(module.module)
    compiled: torch.nn.Module | None = getattr(module, "_orig_mod", None)
    return module if compiled is None else _inside(compiled)


def _each(state: Any, change: Any) -> Any:
    """The state, a tensor or a tuple of them, with each tensor changed."""
    return change(state) if isinstance(state, Tensor) else tuple(change(s) for s in state)
