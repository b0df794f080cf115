"""``python -m fusedrnn verify``: is every engine right on this machine?

Every engine, and every instruction set of the C++ engine, runs every kind of layer forwards and backwards, and is
compared with the reference engine in float64 on the same numbers. It needs nothing but torch and NumPy, so that every
installation can be checked.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from . import GRU, LSTM, RNN, engine
from .bench.contestants import difference
from .bench.timer import torch_threads
from .engines import ENGINES, cpu, listener
from .engines.base import Call
from .torch_state import tf32_in_rnns

_MODULES: dict[str, Callable[..., torch.nn.RNNBase]] = {
    "rnn_tanh": RNN,
    "rnn_relu": lambda I, H, **options: RNN(I, H, nonlinearity="relu", **options),
    "lstm": LSTM,
    "lstm projected": lambda I, H, **options: LSTM(I, H, proj_size=H // 3, **options),
    "gru": GRU,
}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LAYOUTS = ("dense", "bidirectional", "packed", "packed bidirectional")
#: T, B, I, H: nothing a multiple of a vector's width; one sequence; enough work for several threads.
_SIZES = ((5, 3, 7, 19), (12, 1, 16, 64), (20, 16, 24, 128))
#: With this seed no relu gets an input so close to zero that rounding in float32 could change its sign, and with it
#: the gradient.
_SEED = 32

#: Allowed error of outputs and of gradients when an engine computes in a dtype. The error is the largest difference
#: from float64 as a part of the tensor's largest value. 16-bit input to an engine that computes in float32 costs one
#: rounding of the results on top; an engine that rounds every step to 16 bits, as torch's own kernels do, and
#: ours with bfloat16, errs more.
_ALLOWED = {
    torch.float64: (1e-13, 1e-13),
    torch.float32: (5e-6, 5e-6),
    torch.float16: (5e-3, 1e-2),
    torch.bfloat16: (3e-2, 5e-2),
}
#: Rounding every step to 16 bits also moves inputs of relu across zero, and the gradient jumps.
_ALLOWED_GRADIENTS_OF_16_BIT_RELU = 5e-1

#: Outputs and gradients of a run by name.
_Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class _Variant:
    """An engine, and for the C++ engine one of its instruction sets."""

    engine: str
    isa: str | None = None

    def __str__(self) -> str:
        return f"{self.engine} {self.isa}" if self.isa else self.engine

    @property
    def device(self) -> str:
        """Where it is checked."""
        return "cuda" if self.engine == "cuda" else "cpu"

    @contextmanager
    def forced(self) -> Iterator[None]:
        # Engines made of torch's operators get one thread: theirs are no kernels of ours to check, and operators as
        # small as these only lose time to a second thread.
        threads = 1 if ENGINES[self.engine].traceable else torch.get_num_threads()
        with engine(self.engine), _instruction_set(self.isa), torch_threads(threads), tf32_in_rnns(False):
            yield


@contextmanager
def _instruction_set(isa: str | None) -> Iterator[None]:
    if isa is None:
        yield
        return
    compiled: Any = cpu._cpu
    before = compiled.isa()
    compiled.set_isa(isa)
    try:
        yield
    finally:
        compiled.set_isa(before)


def _variants(names: Sequence[str]) -> list[_Variant]:
    """What can run on this machine of the engines of these names."""
    variants = []
    for name in names:
        if ENGINES[name].available() is not None:
            continue
        isas: Sequence[str | None] = cpu._cpu.isas() if name == "cpu" and cpu._cpu is not None else (None,)
        variants += [_Variant(name, isa) for isa in isas]
    return variants


@dataclass
class _Case:
    """One layer with its data, and what comes out of it in float64."""

    module: torch.nn.RNNBase
    data: Tensor
    batch_sizes: Tensor | None
    hx: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]

    def to(self, where: torch.dtype | str) -> _Case:
        """In another dtype or on another device."""
        return _Case(
            copy.deepcopy(self.module).to(where),
            self.data.to(where),
            self.batch_sizes,
            tuple(h.to(where) for h in self.hx),
            tuple(g.to(where) for g in self.grads),
        )

    def forward(self, data: Tensor, hx: tuple[Tensor, ...]) -> _Tensors:
        """The layer's outputs."""
        input = data if self.batch_sizes is None else PackedSequence(data, self.batch_sizes)
        output, last = self.module(input, hx if len(hx) > 1 else hx[0])
        last = last if isinstance(last, tuple) else (last,)
        if isinstance(output, PackedSequence):
            output = output.data
        return {"output": output, **dict(zip(("h_n", "c_n"), last, strict=False))}

    def run(self) -> tuple[_Tensors, _Tensors]:
        """Outputs, and gradients of the input, the initial states and the weights."""
        leaves = {"input": self.data, **dict(zip(("h_0", "c_0"), self.hx, strict=False))}
        leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
        outputs = self.forward(leaves["input"], tuple(t for name, t in leaves.items() if name != "input"))
        leaves |= dict(self.module.named_parameters())
        gradients = torch.autograd.grad(tuple(outputs.values()), tuple(leaves.values()), self.grads)
        return outputs, dict(zip(leaves, gradients, strict=True))

    def run_without_gradients(self) -> _Tensors:
        """Outputs of an inference call, which takes another route through the library."""
        with torch.no_grad():
            return self.forward(self.data, self.hx)


def _case(cell: str, dtype: torch.dtype, layout: str, size: tuple[int, int, int, int]) -> _Case:
    """Random data of a dtype, as float64 numbers that the dtype can hold."""
    T, B, I, H = size
    bidirectional = "bidirectional" in layout
    torch.manual_seed(_SEED)
    module = _MODULES[cell](I, H, bidirectional=bidirectional)
    D, R = 2 if bidirectional else 1, module.proj_size or H
    data, batch_sizes = torch.randn(T, B, I), None
    if "packed" in layout:
        data, batch_sizes, *_ = pack_padded_sequence(data, torch.linspace(T, 1, B).long())
    widths = (R, H) if module.mode == "LSTM" else (R,)
    hx = tuple(torch.randn(D, B, width) for width in widths)
    grads = (torch.randn(*data.shape[:-1], D * R), *(torch.randn_like(h) for h in hx))
    return _Case(module, data, batch_sizes, hx, grads).to(dtype).to(torch.float64)


def _truth(case: _Case) -> tuple[Call, _Tensors, _Tensors]:
    """The call that the case makes, and its outputs and gradients from the reference engine."""
    calls: list[Call] = []
    token = listener.set(lambda call, choice: calls.append(call))
    try:
        with _Variant("reference").forced():
            outputs, gradients = case.run()
    finally:
        listener.reset(token)
    return calls[0], outputs, gradients


@dataclass
class _Row:
    """One line of the table: the worst over layouts and sizes."""

    variant: _Variant
    cell: str
    dtype: torch.dtype
    outputs: float = 0.0
    gradients: float = 0.0
    checked: int = 0
    failures: list[str] = field(default_factory=list)
    unsupported: set[str] = field(default_factory=set)

    def allowed(self) -> tuple[float, float]:
        """Tolerance for outputs and for gradients."""
        compute = ENGINES[self.variant.engine].computes_in(self.dtype)
        outputs, gradients = _ALLOWED[compute]
        if self.cell == "rnn_relu" and compute.itemsize == 2:
            gradients = _ALLOWED_GRADIENTS_OF_16_BIT_RELU
        rounding = torch.finfo(self.dtype).eps if compute != self.dtype else 0.0
        return outputs + rounding, gradients + rounding

    def check(self, case: _Case, where: str, outputs: _Tensors, gradients: _Tensors) -> None:
        """Run the case and compare it with the true outputs and gradients."""
        self.checked += 1
        try:
            with self.variant.forced():
                case = case.to(self.variant.device)
                got_outputs, got_gradients = case.run()
                got_inference = case.run_without_gradients()
        except Exception as error:  # whatever it is, the user should see it in the table, not instead of it
            self.outputs = self.gradients = float("inf")
            self.failures.append(f"{where}: {type(error).__name__}: {error}")
            return
        allowed_outputs, allowed_gradients = self.allowed()
        compared = [(name, got, outputs[name], allowed_outputs) for name, got in got_outputs.items()]
        compared += [
            (f"{name} without gradients", got, outputs[name], allowed_outputs) for name, got in got_inference.items()
        ]
        for name, got, want, allowed in compared:
            self.outputs = max(self.outputs, self._judge(f"{where}: {name}", got, want, allowed))
        for name, got in got_gradients.items():
            judged = self._judge(f"{where}: gradient of {name}", got, gradients[name], allowed_gradients)
            self.gradients = max(self.gradients, judged)

    def _judge(self, what: str, got: Tensor, want: Tensor, allowed: float) -> float:
        error = difference(got.to(want.device), want)
        if not error <= allowed:
            self.failures.append(f"{what} is off by {error:.1e}, allowed are {allowed:.1e}")
        return error

    def cells(self) -> tuple[str, ...]:
        """The line as the table shows it."""
        labels = str(self.variant), self.cell, str(self.dtype).removeprefix("torch.")
        remark = f"not supported: {'; '.join(sorted(self.unsupported))}" if self.unsupported else ""
        if not self.checked:
            return *labels, "", "", "", remark
        allowed = " / ".join(f"{value:.0e}" for value in self.allowed())
        verdict = f"{'FAIL' if self.failures else 'pass'} {remark}".rstrip()
        return *labels, f"{self.outputs:.1e}", f"{self.gradients:.1e}", allowed, verdict


def verify(names: Sequence[str] | None = None, quick: bool = False) -> bool:
    """Check every engine that can run here and print a table of errors.

    Args:
        names: of engines, if not all.
        quick: only the smallest of the sizes.

    Returns:
        whether every error is within its tolerance, and every engine that ``names`` asks for could be checked.
    """
    start = perf_counter()
    # The torch engine says so at its first projected LSTM. It concerns torch's speed only.
    warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
    variants = _variants(names or list(ENGINES))
    sizes = _SIZES[:1] if quick else _SIZES
    rows = {
        (variant, cell, dtype): _Row(variant, cell, dtype)
        for variant, cell, dtype in product(variants, _MODULES, _DTYPES)
    }
    cases = list(product(_MODULES, _DTYPES, _LAYOUTS, sizes))
    for done, (cell, dtype, layout, size) in enumerate(cases):
        if sys.stderr.isatty():
            print(f"\rverifying: {done} of {len(cases)}", end="\r", file=sys.stderr, flush=True)
        case = _case(cell, dtype, layout, size)
        call, outputs, gradients = _truth(case)
        case = case.to(dtype)
        where = f"{layout}, T={size[0]} B={size[1]} I={size[2]} H={size[3]}"
        for variant in variants:
            row = rows[variant, cell, dtype]
            objection = ENGINES[variant.engine].supports(call.to(dtype).on(variant.device))
            if objection is None:
                row.check(case, where, outputs, gradients)
            else:
                row.unsupported.add(objection)
    print(f"Largest difference from float64, as a part of the tensor's largest value: worst of {', '.join(_LAYOUTS)},")
    print(f"each in {len(sizes)} size{'s' if len(sizes) > 1 else ''}\n")
    headings = ("engine", "cell", "dtype", "outputs", "gradients", "allowed", "verdict")
    _print_table([headings, *(row.cells() for row in rows.values())])
    unchecked = {name: ENGINES[name].available() for name in names or ENGINES}
    unchecked = {name: reason for name, reason in unchecked.items() if reason is not None}
    for name, reason in unchecked.items():
        print(f"engine {name} was not checked: {reason}")
    failed = [row for row in rows.values() if row.failures]
    for row in failed:
        more = f" (and {len(row.failures) - 1} more)" if len(row.failures) > 1 else ""
        print(f"FAIL {row.variant} {row.cell} {row.dtype}: {row.failures[0]}{more}")
    print(
        f"{len(rows) - len(failed)} of {len(rows)} rows without failure; {torch.get_num_threads()} threads, "
        f"{perf_counter() - start:.0f} s"
    )
    return not failed and not (names and unchecked)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest text, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = (3, 4, 5)
    for before, row in zip([rows[0], *rows], rows, strict=False):
        if before[0] != row[0]:
            print()
        cells = [
            text.rjust(width) if k in numbers else text.ljust(width)
            for k, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
