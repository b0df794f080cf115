"""The CUDA engine: our kernels run the recurrence, torch the products that do not depend on time.

Forward: ``gates_x = x W_ih^T + b_ih`` for all tokens, then one kernel through time. Backward: one kernel through time
that leaves the gradients of the gates, then the products that make of them the gradients of weights and input. Both run
on the caller's stream, in memory of torch's allocator, and wait for nothing, so that a CUDA graph can record them; but
for packed batches, whose sizes come from the CPU.

bfloat16 and float16 are multiplied on tensor cores and added up in float32; gates and the cell state are float32. What
is kept for backward is in the caller's dtype but for the cell state. float32 is computed as ``torch.backends.cudnn``
says: in full precision or in tf32.

A projection, h = W_hr (o tanh(c)), is folded into the recurrent weights: W_hh h = (W_hh W_hr) (o tanh(c)), so that the
kernels know nothing of it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..cells import Cell
from ..installation import load
from ..torch_state import allows_tf32_in_products, allows_tf32_in_rnn, in_memory, set_tf32_in_products
from .base import WEIGHTS_PER_DIRECTION, Call, Outputs, Saved

T = TypeVar("T")

_cuda, _missing = load("_cuda")

_ARITHMETIC = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
_LEAST_CAPABILITY = (8, 0)
_EXCHANGES = ("counter", "flags")
#: How the CTAs of a grid know that each other's h is there (csrc/cuda/exchange.h), until measurements on GPUs decide.
EXCHANGE = os.environ.get("FUSEDRNN_CUDA_EXCHANGE", _EXCHANGES[0])
if EXCHANGE not in _EXCHANGES:
    raise ValueError(f"FUSEDRNN_CUDA_EXCHANGE: unknown exchange {EXCHANGE!r}; choose one of {', '.join(_EXCHANGES)}")
#: Rows of weights begin at multiples of this many bytes, and end in zeros.
_BLOCK_BYTES = 64


class CudaEngine:
    """See the module's docstring.

    Args:
        module: ``fusedrnn._cuda``; the tests give one that runs the same kernels without a GPU.
        device_type: of the tensors that it takes.
    """

    name = "cuda"
    traceable = False
    recomputes = False

    def __init__(self, module: ModuleType | None = _cuda, device_type: str = "cuda") -> None:
        self._module, self._device_type = module, device_type
        self._unavailable = _why_unavailable(module)
        self._refusing: set[int] = set()  # GPUs that did not launch a plan of many CTAs at once
        self.plan = lru_cache(maxsize=4096)(self._plan)
        self._capability = cache(lambda device: module.device(device)["capability"])  # type: ignore[union-attr]

    def available(self) -> str | None:
        return self._unavailable

    def supports(self, call: Call) -> str | None:
        if call.input.device.type != self._device_type:
            return f"input is on {call.input.device}"
        if call.input.dtype not in _ARITHMETIC:
            return f"no kernel for {call.input.dtype}"
        if call.input.layout != torch.strided:
            return f"no kernel for {call.input.layout} input"
        if call.batch == 0:
            return "an empty batch"
        if call.every_state:
            return "no kernel that returns the cell state of every step"
        if call.weights[4] is not None and (call.h_mask is not None or call.zoneout):
            return "no kernel for a projection with recurrent dropout or zoneout"
        if any(state is not None for state in call.reset_state):
            return "no kernel for resets to a state other than zeros"
        if call.weights[4] is not None and (call.lengths is not None or call.resets is not None):
            return "no kernel for a projection with lengths or resets"
        if call.batch_sizes is not None and call.resets is not None:
            return "no kernel for resets of a packed batch"
        capability = self._capability(_index(call.input.device))
        if capability < _LEAST_CAPABILITY:
            major, minor = capability
            return f"the GPU has compute capability {major}.{minor}, the kernels need {_LEAST_CAPABILITY[0]}.0"
        return None

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def describe(self, call: Call) -> str:
        plan = self.plan(*self._sizes(call), False)
        precision = f", {self._arithmetic(call.input.dtype)} products" if call.input.dtype == torch.float32 else ""
        return f"CUDA kernels{precision}, {plan}"

    def forward(self, call: Call, save: bool) -> tuple[Outputs, Saved]:
        call.check()
        with _plain_torch(self._device_type), _products_like_rnn(self._arithmetic(call.input.dtype)):
            return self._forward(call, save)

    def saved_shapes(self, call: Call) -> tuple[tuple[int, ...], ...]:
        return ()  # part of what it keeps is the output itself, which an operator must not return twice

    def backward(
        self, call: Call, saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        with _plain_torch(self._device_type), _products_like_rnn(self._arithmetic(call.input.dtype)):
            return self._backward(call, saved, grads, needs)

    def _arithmetic(self, dtype: torch.dtype) -> str:
        return "tf32" if dtype == torch.float32 and allows_tf32_in_rnn() else _ARITHMETIC[dtype]

    def _sizes(self, call: Call) -> tuple[Any, ...]:
        arithmetic = self._arithmetic(call.input.dtype)
        sizes = (call.cell.name, arithmetic, call.time, call.batch, call.hidden_size, call.directions)
        return _index(call.input.device), *sizes

    def _plan(
        self, device: int, cell: str, arithmetic: str, T: int, B: int, H: int, directions: int, backward: bool
    ) -> Any:
        assert self._module is not None
        sizes = self._module.Sizes(cell, getattr(self._module.Arithmetic, arithmetic), backward, T, B, H, directions)
        if device not in self._refusing:
            return Plan(sizes, self._module.plan(sizes, device, exchange=getattr(self._module.Exchange, EXCHANGE)))
        native = self._module.plan(sizes, device, path=self._module.Path.per_step)
        return Plan(sizes, native, " (the GPU refused to run all CTAs at once)")

    def _run(self, call: Call, backward: bool, recurrence: Callable[[Plan], T]) -> T:
        """A recurrence with its plan; from the first refused launch on that of one launch per step."""
        assert self._module is not None
        device, *sizes = self._sizes(call)
        try:
            return recurrence(self.plan(device, *sizes, backward))
        except self._module.LaunchRefused:
            self._refusing.add(device)
            self.plan.cache_clear()
            return recurrence(self.plan(device, *sizes, backward))

    def _recurrence(self, call: Call, tokens: Tokens) -> Recurrence:
        layer = self._module, call.cell, tokens, call.hidden_size, call.directions
        seed = None if call.seed is None else call.seed.to(call.input.device)
        return Recurrence(*layer, *_cuts(call), in_memory(call.h_mask), call.zoneout, seed)

    def _forward(self, call: Call, save: bool) -> tuple[Outputs, Saved]:
        D, H, R, B = call.directions, call.hidden_size, call.output_size, call.batch
        x, tokens = _tokens(call.input), Tokens.of(call)
        projected = call.weights[4] is not None
        gates_x = x.new_empty((D, len(x), len(call.cell.gates) * H))
        for d in range(D):
            w_ih, w_hh, b_ih, _, _ = _given(call, d)
            if b_ih is None:
                torch.mm(x, w_ih.t(), out=gates_x[d])
            else:
                torch.addmm(b_ih, x, w_ih.t(), out=gates_x[d])
            if projected and call.hx[0] is not None:
                gates_x[d].index_add_(0, tokens.first(d), call.hx[0][d] @ w_hh.t())
        hx = (None, *call.hx[1:]) if projected else call.hx
        output = x.new_empty((*call.input.shape[:-1], D * R))
        hidden = x.new_empty((len(x), D * H)) if projected else output
        recurrence = self._recurrence(call, tokens)
        weights, biases = _recurrent(call), _biases(call)
        final, kept = self._run(
            call, False, lambda plan: recurrence.forward(plan, gates_x, weights, biases, hx, hidden, save)
        )
        if projected:
            rows = _tokens(output)
            h_n = x.new_empty((D, B, R))
            for d in range(D):
                w_hr = _given(call, d)[4]
                rows[:, d * R : (d + 1) * R] = hidden[:, d * H : (d + 1) * H] @ w_hr.t()
                torch.mm(final[0][d], w_hr.t(), out=h_n[d])
            final[0] = h_n
        return (output if call.sequence else None, *final), (output, hidden, *kept) if save else ()

    def _backward(
        self, call: Call, saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        D, H, R, G = call.directions, call.hidden_size, call.output_size, len(call.cell.gates)
        assert self._module is not None
        facts = self._module.cell_facts(call.cell.name)
        slots, from_input = facts["slots"], facts["input_slot"]
        x, tokens = _tokens(_without_padding(call)), Tokens.of(call)
        output, hidden, *kept = _tokens(saved[0]), _tokens(saved[1]), *saved[2:]
        projected = call.weights[4] is not None
        d_output = None if grads[0] is None else grads[0].reshape(len(x), D * R)
        d_final, hx = list(grads[1:]), call.hx
        d_hidden = d_output
        if projected:
            hx = (None, *call.hx[1:])
            w_hr = [_given(call, d)[4] for d in range(D)]
            if d_output is not None:
                d_hidden = torch.cat([d_output[:, d * R : (d + 1) * R] @ w_hr[d] for d in range(D)], 1)
            if d_final[0] is not None:
                d_final[0] = torch.stack([d_final[0][d] @ w_hr[d] for d in range(D)])
        recurrence = self._recurrence(call, tokens)
        weights = _recurrent(call)
        d_slots, d_initial = self._run(
            call, True, lambda plan: recurrence.backward(plan, weights, hx, hidden, kept, d_hidden, d_final)
        )

        # In the slots of the input's products gates may lie in another order than in the weights.
        reordered = from_input != list(range(G))
        in_order = [from_input.index(slot) for slot in range(G)]
        results: list[Tensor | None] = [None] * len(needs)
        if needs[0]:
            d_input = x.new_zeros(x.shape) if D > 1 else x.new_empty(x.shape)
        for d in range(D):
            w_ih, w_hh, _, _, _ = _given(call, d)
            d_in = d_slots[d, :, :G].flatten(1)
            d_rec = d_slots[d, :, slots - G :].flatten(1)
            first = 1 + len(hx) + d * WEIGHTS_PER_DIRECTION
            need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_w_hr = needs[first : first + WEIGHTS_PER_DIRECTION]
            if needs[0]:
                w = w_ih.view(G, H, -1)[in_order].flatten(0, 1) if reordered else w_ih
                d_input.addmm_(d_in, w, beta=1 if D > 1 else 0)
            if need_w_ih:
                d_w = d_in.t() @ x
                results[first] = d_w.view(G, H, -1)[from_input].flatten(0, 1) if reordered else d_w
            if need_b_ih:
                d_b = d_in.sum(0)
                results[first + 2] = d_b.view(G, H)[from_input].flatten() if reordered else d_b
            if need_b_hh:
                results[first + 3] = d_rec.sum(0)
            if need_w_hh:
                h, h0 = output[:, d * R : (d + 1) * R], call.hx[0]
                if call.h_mask is not None:
                    h, h0 = tokens.of_sequences(call.h_mask[d]) * h, None if h0 is None else h0 * call.h_mask
                results[first + 1] = tokens.product_with_previous(d, *_entering(call, d, d_rec), h, h0)
            if projected and (need_w_hr or needs[1]):
                d_previous = d_rec @ w_hh  # of the h that entered each token
                if needs[1]:
                    d_h0 = d_previous[tokens.first(d)]
                    results[1] = d_h0[None] if d == 0 else torch.cat([results[1], d_h0[None]])  # type: ignore[list-item]
                if need_w_hr:
                    d_h = tokens.to_previous(d, d_previous)
                    if d_output is not None:
                        d_h += d_output[:, d * R : (d + 1) * R]
                    if grads[1] is not None:
                        d_h.index_add_(0, tokens.last(d), grads[1][d])
                    results[first + 4] = d_h.t() @ hidden[:, d * H : (d + 1) * H]
        if needs[0]:
            results[0] = d_input.view(call.input.shape)
        for k, d_state in enumerate(d_initial, 1):
            if needs[k] and not (projected and k == 1):
                results[k] = d_state
        return results


@dataclass(frozen=True)
class Plan:
    """How the kernels divide a call of some sizes."""

    sizes: Any
    native: Any
    why: str = ""

    def __str__(self) -> str:
        return f"{self.native}{self.why}"


@dataclass
class Recurrence:
    """One layer's recurrence on the kernels: from the input's products to h, and back. All tensors are contiguous.

    Attributes:
        module: the bindings.
        cell: which cell.
        tokens: which (step, sequence) pairs there are.
        H: hidden units.
        D: directions.
        resets: (T, B) uint8: nothing passes from step t - 1 to step t, nor back, where it is not zero.
        lengths: (B,) int64, steps of each sequence of a dense batch.
        h_mask: (D, B, H), factors of h on its way into the recurrent products.
        zoneout: the rate of each state, or nothing.
        seed: int64 (), of the lots of zoneout; without it their expectation takes their place.
    """

    module: ModuleType | None
    cell: Cell
    tokens: Tokens
    H: int
    D: int
    resets: Tensor | None = None
    lengths: Tensor | None = None
    h_mask: Tensor | None = None
    zoneout: Sequence[float] = ()
    seed: Tensor | None = None

    def forward(
        self,
        plan: Plan,
        gates_x: Tensor,
        w_hh: Sequence[Tensor],
        b_hh: Sequence[Tensor | None],
        hx: Sequence[Tensor | None],
        output: Tensor,
        save: bool,
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Run all steps.

        Args:
            plan: of these sizes.
            gates_x: (D, tokens, G*H), W_ih x + b_ih.
            w_hh: for each direction (G*H, H).
            b_hh: for each direction (G*H) or None.
            hx: for each state (D, B, H) or None for zeros.
            output: where h goes, (T, B, D*H) or (tokens, D*H).
            save: whether backward follows.

        Returns:
            the final states (D, B, H), and what backward needs besides.
        """
        assert self.module is not None
        tokens, H, D = self.tokens, self.H, self.D
        facts = self.module.cell_facts(self.cell.name)
        final = [gates_x.new_empty((D, tokens.B, H)) for _ in self.cell.states]
        nothing = gates_x.new_empty(0)
        keeps, has_c = save and facts["kept"] > 0, save and facts["states"] > 1
        kept = gates_x.new_empty((D, tokens.count, facts["kept"], H)) if keeps else nothing
        real = _real(gates_x.dtype)
        cells = gates_x.new_empty((D, tokens.count, H), dtype=real) if has_c else nothing
        zoned_out = save and any(self.zoneout)
        computed = gates_x.new_empty((D, tokens.count, len(final), H), dtype=real) if zoned_out else nothing
        weights = [_in_blocks(w) for w in w_hh]
        hx = list(map(in_memory, hx))
        b_hh = list(map(in_memory, b_hh))
        scratch = gates_x.new_empty(plan.native.scratch_bytes, dtype=torch.uint8)
        self.module.forward(
            **self._common(plan, scratch),
            gates_x=gates_x.data_ptr(),
            w_hh=_addresses(weights),
            w_stride=weights[0].stride(0),
            b_hh=_addresses(b_hh),
            initial=_addresses(hx),
            output=output.data_ptr(),
            output_step=D * H * tokens.B,
            output_row=D * H,
            final=_addresses(final),
            kept=kept.data_ptr(),
            cells=cells.data_ptr(),
            computed=computed.data_ptr(),
        )
        return final, (kept, cells, computed)

    def backward(
        self,
        plan: Plan,
        w_hh: Sequence[Tensor],
        hx: Sequence[Tensor | None],
        output: Tensor,
        kept: Sequence[Tensor],
        d_output: Tensor | None,
        d_final: Sequence[Tensor | None],
    ) -> tuple[Tensor, list[Tensor]]:
        """Run all steps back.

        Args:
            plan: of these sizes.
            w_hh: as in ``forward``.
            hx: as in ``forward``.
            output: of forward, (tokens, D*H).
            kept: what forward returned last.
            d_output: (tokens, D*H) or None for zeros.
            d_final: for each state (D, B, H) or None for zeros.

        Returns:
            gradients by slot (D, tokens, slots, H) and of the initial states (D, B, H).
        """
        assert self.module is not None
        tokens, H, D = self.tokens, self.H, self.D
        d_slots = output.new_empty((D, tokens.count, self.module.cell_facts(self.cell.name)["slots"], H))
        d_initial = [output.new_empty((D, tokens.B, H)) for _ in self.cell.states]
        weights = [_in_blocks(w.t()) for w in w_hh]
        hx = list(map(in_memory, hx))
        d_final = list(map(in_memory, d_final))
        d_output = in_memory(d_output)
        scratch = output.new_empty(plan.native.scratch_bytes, dtype=torch.uint8)
        self.module.backward(
            **self._common(plan, scratch),
            w_hh_t=_addresses(weights),
            w_stride=weights[0].stride(0),
            initial=_addresses(hx),
            output=output.data_ptr(),
            output_step=D * H * tokens.B,
            output_row=D * H,
            kept=kept[0].data_ptr(),
            cells=kept[1].data_ptr(),
            computed=kept[2].data_ptr(),
            d_output=_address(d_output),
            d_output_step=D * H * tokens.B,
            d_output_row=D * H,
            d_final=_addresses(d_final),
            d_slots=d_slots.data_ptr(),
            d_initial=_addresses(d_initial),
        )
        return d_slots, d_initial

    def _common(self, plan: Plan, scratch: Tensor) -> dict[str, Any]:
        return {
            "sizes": plan.sizes,
            "plan": plan.native,
            "device": _index(scratch.device),
            "stream": torch.cuda.current_stream(scratch.device).cuda_stream if scratch.is_cuda else 0,
            "scratch": scratch.data_ptr(),
            "tokens": self.tokens.count,
            "starts": _address(self.tokens.starts),
            "lengths": _address(self.lengths),
            "resets": _address(self.resets),
            "h_mask": _address(self.h_mask),
            "zoneout": list(self.zoneout),
            "seed": _address(self.seed),
        }


@dataclass
class Tokens:
    """The (step, sequence) pairs of a call, in the order of memory.

    Attributes:
        T, B: steps and sequences.
        count: how many pairs there are.
        device: where index tensors are wanted.
        sizes: of a packed batch the sequences active at each step, int64 on the CPU; else None.
        starts: of a packed batch the number of pairs before each step, (T + 1) on the device; else None.
    """

    T: int
    B: int
    count: int
    device: torch.device
    sizes: Tensor | None = None
    starts: Tensor | None = None
    _previous: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(call: Call) -> Tokens:
        device, sizes = call.input.device, call.batch_sizes
        if sizes is None:
            return Tokens(call.time, call.batch, call.time * call.batch, device)
        starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        return Tokens(call.time, call.batch, int(starts[-1]), device, sizes, _upload(starts, device))

    def first(self, d: int) -> Tensor:
        """Each sequence's first pair in direction ``d``."""
        return self._at_end(d == 1)

    def last(self, d: int) -> Tensor:
        """Each sequence's last pair in direction ``d``."""
        return self._at_end(d == 0)

    def _at_end(self, end: bool) -> Tensor:
        rows = torch.arange(self.B)
        if end and self.sizes is None:
            rows += self.count - self.B
        elif end:
            assert self.sizes is not None
            lengths = (self.sizes[:, None] > rows).sum(0)
            rows += (self.sizes.cumsum(0) - self.sizes)[lengths - 1]
        return _upload(rows, self.device)

    def previous(self, d: int) -> Tensor:
        """For each pair of a packed batch B + the one before it in direction ``d``; if it is first, its sequence."""
        if d not in self._previous:
            assert self.sizes is not None
            starts = self.sizes.cumsum(0) - self.sizes
            steps = torch.repeat_interleave(torch.arange(self.T), self.sizes)
            row = torch.arange(self.count) - starts[steps]
            before = steps - 1 if d == 0 else steps + 1
            there = (before >= 0) & (before < self.T)
            before = before.clamp(0, self.T - 1)
            there &= row < self.sizes[before]
            self._previous[d] = _upload(torch.where(there, self.B + starts[before] + row, row), self.device)
        return self._previous[d]

    def of_sequences(self, values: Tensor) -> Tensor:
        """For each pair the row of its sequence in ``values`` (B, n)."""
        if self.sizes is None:
            return values.repeat(self.T, 1)
        starts = self.sizes.cumsum(0) - self.sizes
        rows = torch.arange(self.count) - torch.repeat_interleave(starts, self.sizes)
        return values[_upload(rows, self.device)]

    def product_with_previous(self, d: int, left: Tensor, first: Tensor | None, h: Tensor, h0: Tensor | None) -> Tensor:
        """left^T (tokens, m) times the h (tokens, R) that entered each pair: at first h0 (D, B, R), zeros if None.

        ``first`` (B, m) are the rows of ``left`` at each sequence's first pair, where that is not at an end of time.
        """
        if self.sizes is not None:
            start = h.new_zeros((self.B, h.shape[1])) if h0 is None else h0[d]
            return left.t() @ torch.cat([start, h])[self.previous(d)]
        n = self.count - self.B
        own, before, at_end = (left[self.B :], h[:n], left[: self.B]) if d == 0 else (left[:n], h[self.B :], left[n:])
        first = at_end if first is None else first
        product = own.t() @ before
        return product if h0 is None else product.addmm_(first.t(), h0[d])

    def to_previous(self, d: int, d_h: Tensor) -> Tensor:
        """Gradients (tokens, R) of the h that entered each pair, as those of the pairs that they came from."""
        if self.sizes is None:
            none = torch.zeros_like(d_h[: self.B])
            return torch.cat([d_h[self.B :], none] if d == 0 else [none, d_h[: self.count - self.B]])
        result = d_h.new_zeros((self.B + self.count, d_h.shape[1]))
        return result.index_copy_(0, self.previous(d), d_h)[self.B :]


def _why_unavailable(module: ModuleType | None) -> str | None:
    if module is None:
        return _missing or "the compiled module is missing"
    if module.device_count() == 0:
        runtime, driver = (version // 1000 for version in module.versions())
        if 0 < driver < runtime:
            return (
                f"the GPU's driver is for CUDA {driver}, the kernels were built with CUDA {runtime}: update the driver"
            )
        return "no GPU"
    return None


def _index(device: torch.device) -> int:
    return device.index or 0


def _tokens(input: Tensor) -> Tensor:
    """(tokens, features), whether the input is packed or dense."""
    return input if input.dim() == 2 else input.flatten(0, 1)


def _cuts(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """Resets and lengths as the kernels take them. Nobody has looked at lengths on a GPU: those outside are clamped."""
    resets = None if call.resets is None else call.resets.to(torch.uint8).contiguous()
    return resets, _clamped_lengths(call)


def _clamped_lengths(call: Call) -> Tensor | None:
    return None if call.lengths is None else call.lengths.to(call.input.device).clamp(0, call.time)


def _without_padding(call: Call) -> Tensor:
    """The input with zeros behind each sequence's end, where it may hold NaN, which times zero is NaN."""
    lengths = _clamped_lengths(call)
    if lengths is None:
        return call.input
    behind = torch.arange(call.time, device=lengths.device)[:, None] >= lengths
    return call.input.masked_fill(behind[..., None], 0)


def _entering(call: Call, d: int, d_rec: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of the recurrent products where something entered them: zeros where a segment starts from zeros.

    And of these in reverse with lengths the rows at each sequence's first step, which is its last in time.
    """
    lengths = _clamped_lengths(call)
    if call.resets is not None:
        cut = call.resets if d == 0 else torch.cat([call.resets[1:], torch.zeros_like(call.resets[:1])])
        if d == 1 and lengths is not None:  # behind a sequence's end nothing is reset
            cut = cut & (torch.arange(1, call.time + 1, device=lengths.device)[:, None] < lengths)
        d_rec = d_rec.masked_fill(cut.reshape(-1, 1), 0)
    if d == 0 or lengths is None:
        return d_rec, None
    last = (lengths - 1).clamp(min=0) * call.batch + torch.arange(call.batch, device=lengths.device)
    return d_rec, d_rec[last]


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _given(call: Call, d: int) -> tuple[Any, ...]:
    """The weights of a direction, to be used where the layer is known to have them."""
    return call.of_direction(d)


def _recurrent(call: Call) -> list[Tensor]:
    """For each direction what h or, before a projection, o tanh(c) is multiplied with."""
    groups = [call.of_direction(d) for d in range(call.directions)]
    return [w_hh if w_hr is None else w_hh @ w_hr for _, w_hh, _, _, w_hr in groups]  # type: ignore[misc,operator]


def _biases(call: Call) -> list[Tensor | None]:
    return [call.of_direction(d)[3] for d in range(call.directions)]


def _in_blocks(matrix: Tensor) -> Tensor:
    """The matrix with rows side by side in memory, each a multiple of ``_BLOCK_BYTES`` long and zero at its end."""
    matrix = matrix.resolve_neg()
    rows, columns = matrix.shape
    block = _BLOCK_BYTES // matrix.element_size()
    width = -(-columns // block) * block
    if matrix.is_contiguous() and width == columns and matrix.data_ptr() % _BLOCK_BYTES == 0:
        return matrix
    padded = matrix.new_empty((rows, width))
    padded[:, :columns] = matrix
    padded[:, columns:] = 0
    return padded


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device, without waiting for the copy."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [_address(t) for t in tensors]


@contextmanager
def _plain_torch(device_type: str) -> Iterator[None]:
    """No autograd, whose work this engine does, and no autocast, which would take the products to another dtype."""
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


_changing_precision = threading.RLock()


@contextmanager
def _products_like_rnn(arithmetic: str) -> Iterator[None]:
    """torch's float32 products in the block are as precise as recurrent networks are to be.

    torch has a setting for each of the two, and no way to choose for one product. Where they differ, the setting of
    products changes while the block enqueues its work; a product that another thread starts meanwhile sees it.
    """
    tf32 = arithmetic == "tf32"
    if arithmetic not in ("f32", "tf32") or allows_tf32_in_products() == tf32:
        yield
        return
    with _changing_precision:
        before = set_tf32_in_products(tf32)
        try:
            yield
        finally:
            before()
