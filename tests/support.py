"""What several test files share: which engines there are, a case of the recurrent networks' options, its comparison
with the oracle, and scripts run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from itertools import product
from operator import gt
from types import ModuleType
from typing import Any

import numpy as np
import oracle
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn.engines import listener
from fusedrnn.torch_state import tf32_in_rnns

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_READY = tuple(name for name, state in fusedrnn.info().engines.items() if state.startswith("ready"))
ENGINES = tuple(name for name in _READY if name != "cuda")  # those for tensors on the CPU
MODULES = ("RNN", "LSTM", "GRU")
CELL_MODULES = ("RNNCell", "LSTMCell", "GRUCell")

#: The kinds of modules: class and options.
SEQUENCE_KINDS = {
    "RNN_tanh": ("RNN", {}),
    "RNN_relu": ("RNN", {"nonlinearity": "relu"}),
    "LSTM": ("LSTM", {}),
    "LSTM_projected": ("LSTM", {"proj_size": 3}),
    "GRU": ("GRU", {}),
}
CELL_KINDS = {
    "RNNCell_tanh": ("RNNCell", {}),
    "RNNCell_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
}
KINDS = SEQUENCE_KINDS | CELL_KINDS


@dataclass(frozen=True)
class Target:
    """An engine, and for the compiled one an instruction set."""

    engine: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.engine if self.isa is None else f"{self.engine}.{self.isa}"

    @property
    def device(self) -> str:
        """Where its tensors are."""
        return "cuda" if self.engine == "cuda" else "cpu"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everything inside the block runs on it, float32 in full precision."""
        isa = instruction_set(self.isa) if self.isa else nullcontext()
        with fusedrnn.engine(self.engine), isa, tf32_in_rnns(False):
            yield


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """The compiled engine on one of its instruction sets."""
    from fusedrnn import _cpu

    before = _cpu.isa()
    _cpu.set_isa(name)
    try:
        yield
    finally:
        _cpu.set_isa(before)


def _targets() -> Iterator[Target]:
    for engine in _READY:
        if engine == "cpu":
            from fusedrnn import _cpu

            yield from (Target(engine, isa) for isa in _cpu.isas())
        else:
            yield Target(engine)


TARGETS = tuple(_targets())


def kernels(*dtypes: torch.dtype, targets: Sequence[Target] = TARGETS) -> list[tuple[Target, str, torch.dtype]]:
    """What is compiled or chosen once: (target, cell, dtype), of every cell.

    Without repetition: an instruction set that adds to another only products of bfloat16 shares all other kernels.
    """
    return [
        (target, cell, dtype)
        for target, cell, dtype in product(targets, CELLS, dtypes)
        if dtype == torch.bfloat16 or target.isa != "avx512bf16"
    ]


def has_kernel(target: Target, dtype: torch.dtype) -> bool:
    """Whether the target computes in the dtype itself."""
    return dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and target.engine == "cpu")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch, and the engines with it, on ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One choice of every option that a sequence module has. T steps, B rows, I features, H hidden units."""

    target: Target
    cell: str
    dtype: torch.dtype = torch.float32
    layout: str = "dense"  # or unbatched; sorted, unsorted: packed; cell, unbatched_cell: one step of a cell module
    layers: int = 1
    directions: int = 1
    projected: bool = False
    bias: bool = True
    hx: bool = True
    batch_first: bool = False
    strided: bool = False  # input and states are slices of something larger
    loss: str = "both"  # what the gradient comes from: both, output, final
    threads: int = 1
    T: int = 5
    B: int = 3
    I: int = 4
    H: int = 6
    seed: int = 0  # of all values and lengths

    def __str__(self) -> str:
        def text(name: str, value: object) -> str:
            if isinstance(value, bool):
                return name if value else f"no_{name}"
            if isinstance(value, int):
                return f"{name}{value}"
            return str(value).removeprefix("torch.")

        return "-".join(text(field.name, getattr(self, field.name)) for field in fields(self))

    @property
    def rows(self) -> int:
        return 1 if self.layout.startswith("unbatched") else self.B

    @property
    def width(self) -> int:
        """Of the state h."""
        return (self.H + 1) // 2 if self.projected else self.H

    @property
    def lengths(self) -> np.ndarray | None:
        if self.layout not in ("sorted", "unsorted"):
            return None
        lengths = np.random.default_rng(self.seed).integers(1, self.T + 1, self.B)
        lengths[self.B // 2] = self.T
        return -np.sort(-lengths) if self.layout == "sorted" else lengths

    def module(self) -> torch.nn.Module:
        name = self.cell.split("_")[0].upper()
        own = {"nonlinearity": self.cell.removeprefix("rnn_")} if name == "RNN" else {}
        if self.layout.endswith("cell"):
            own |= {"dtype": self.dtype, "device": self.target.device}
            return getattr(fusedrnn, f"{name}Cell")(self.I, self.H, self.bias, **own)
        if self.projected:
            own["proj_size"] = self.width
        return getattr(fusedrnn, name)(
            self.I,
            self.H,
            self.layers,
            bias=self.bias,
            batch_first=self.batch_first,
            bidirectional=self.directions == 2,
            dtype=self.dtype,
            device=self.target.device,
            **own,
        )


def rounding(target: Target, dtype: torch.dtype, layers: int, fan_in: int, tokens: int) -> float:
    """The error that rounding excuses in a tensor of values or gradients, relative to the largest of them.

    A sum of n products of like size errs by some sqrt(n) units: over the fan-in forward, over rows and steps in the
    weights' gradients, and each layer adds its own. For the types narrower than float32 our own engines add up and
    compute gates in float32, and round what enters and leaves a layer, by half a unit; where kernels multiply bfloat16
    they also round h at every step, what backward needs of the gates, and the gates' gradients: each for itself, so
    that in sums over units and steps these errors cancel, and a result's own rounding is the largest of all. The other
    engines round every operation's result. The largest errors seen over all the cases are about half of this.
    """
    eps = torch.finfo(dtype).eps
    if dtype in (torch.bfloat16, torch.float16) and target.engine in ("cpu", "numba"):
        return 3 * layers * eps
    return eps * layers * (16 + (fan_in**0.5 + tokens**0.5) / 2)


def build(library: ModuleType, kind: str, *args: Any, **options: Any) -> torch.nn.Module:
    """A module of ``torch.nn`` or ``fusedrnn``, with the same initial weights each time."""
    name, own = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return getattr(library, name)(*args, **own, **options)


@contextmanager
def the_long_way():
    """Calls are announced, as to ``explain``, so they take none of the short ways."""
    token = listener.set(lambda call, choice: None)
    try:
        yield
    finally:
        listener.reset(token)


def twins(kind: str, *args: Any, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch.nn's module and ours."""
    return build(torch.nn, kind, *args, **options), build(fusedrnn, kind, *args, **options)


def call_of(module: torch.nn.Module, *batch: int, **options: Any) -> tuple[Tensor, Any]:
    """A random input and random initial states for a module.

    Args:
        batch: (T, B) or (T,) for a sequence module, (B,) or nothing for a cell.
    """
    like = next(module.parameters())
    options = {"dtype": like.dtype, "device": like.device} | options
    if isinstance(module, torch.nn.RNNBase):
        states: tuple[int, ...] = (module.num_layers * (2 if module.bidirectional else 1), *batch[1:])
        widths = (module.proj_size or module.hidden_size, module.hidden_size)
    else:
        states, widths = batch, (module.hidden_size, module.hidden_size)
    x = torch.randn(*batch, module.input_size, **options)
    h, c = (torch.randn(*states, width, **options) for width in widths)
    return x, (h, c) if isinstance(module, torch.nn.LSTM | torch.nn.LSTMCell) else h


def flat(result: Any) -> list[Tensor]:
    """All the tensors of what a module takes or returns, of a PackedSequence the data."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result if part is not None for tensor in flat(part)]


def loss_of(result: Any) -> Tensor:
    """A number to which every element of a result adds its own share."""
    return sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in flat(result))


def backward(module: torch.nn.Module, *call: Any) -> dict[str, Tensor]:
    """Run a module forward and backward: its results, and the gradients of the call's tensors and the parameters."""
    result = module(*call)
    leaves = {f"argument {k}": t for k, t in enumerate(flat(call))} | dict(module.named_parameters())
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(loss_of(result), list(wanted.values()), allow_unused=True)
    results = {f"result {k}": t.detach() for k, t in enumerate(flat(result))}
    return results | {f"gradient of {name}": g for name, g in zip(wanted, grads, strict=True) if g is not None}


def assert_equal(got: Any, want: Any) -> None:
    """Bit by bit."""
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def run_script(script: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def error_of(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max(initial=0.0))


def assert_near(name: str, got: np.ndarray, want: np.ndarray, allowed: float) -> None:
    assert got.shape == want.shape, f"{name} has shape {got.shape}, expected {want.shape}"
    error = error_of(got, want)
    assert error <= allowed, f"{name} is off by {error:.3g}, {allowed:.3g} are allowed"


def random_leaf(
    *shape: int, dtype: torch.dtype, strided: bool, scale: float = 1.0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """A random tensor that wants a gradient, and how a module gets it: itself, or a copy with gaps in its memory."""
    leaf = (scale * torch.randn(*shape, dtype=torch.float64)).to(device, dtype).requires_grad_()
    if not strided:
        return leaf, leaf
    gapped = torch.zeros(*(2 * n for n in shape), dtype=dtype, device=device)
    view = gapped[tuple(slice(None, None, 2) for _ in shape)]
    return leaf, view.copy_(leaf)


def weights_of(module: torch.nn.Module) -> list[oracle.Weights]:
    """The weights of a module, as the oracle takes them."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for name, parameter in module.named_parameters():
        kind, _, of_layer = name.partition("_l")
        groups.setdefault(of_layer, {})[kind] = to_numpy(parameter)
    return [oracle.Weights(**group) for group in groups.values()]


def check(case: Case) -> None:
    """Compare outputs, final states and all gradients of a case with the oracle."""
    torch.manual_seed(case.seed)
    module, cell = case.module(), oracle.CELLS[case.cell]
    batch, states = case.rows, case.layers * case.directions
    widths = [case.width, case.H][: len(cell.states)]

    # Wide input to few units saturates them, and gradients through 1 - tanh^2 are then all rounding error.
    scale = min(1.0, (case.H / case.I) ** 0.5)
    place: dict[str, Any] = {"dtype": case.dtype, "device": case.target.device}
    x, x_given = random_leaf(case.T, batch, case.I, strided=case.strided, scale=scale, **place)
    h0 = [random_leaf(states, batch, width, strided=case.strided, **place) for width in widths if case.hx]
    d_output = torch.randn(case.T, batch, case.directions * case.width, **place)
    d_final = [torch.randn(states, batch, width, **place) for width in widths]
    if case.loss == "output":
        d_final = [torch.zeros_like(d) for d in d_final]
    if case.loss == "final":
        d_output = torch.zeros_like(d_output)
    arguments = dict(zip(("input", "h_0", "c_0"), [x, *(leaf for leaf, _ in h0)], strict=False))
    before = {name: to_numpy(t) for name, t in arguments.items()}

    def truth(
        cell: oracle.Cell, round_: Callable[[np.ndarray], np.ndarray] = np.asarray
    ) -> tuple[oracle.Network, list[np.ndarray]]:
        """The oracle's run and its gradients, those of the arguments first, then those of the parameters."""
        initial = [round_(before[f"{name}_0"]) for name in cell.states] if case.hx else None
        weights = [oracle.Weights(*(w if w is None else round_(w) for w in layer)) for layer in weights_of(module)]
        run = oracle.Network(cell, round_(before["input"]), case.lengths, initial, weights, directions=case.directions)
        d_x, d_initial, d_weights = run.backward(round_(to_numpy(d_output)), [round_(to_numpy(d)) for d in d_final])
        return run, [d_x, *(d_initial if case.hx else []), *(d for w in d_weights for d in w if d is not None)]

    def draw(seed: int) -> list[np.ndarray]:
        """Gradients where lots are drawn for every value's last half unit, and for relu's slope next to its kink."""
        rng = np.random.default_rng(seed)
        half = torch.finfo(case.dtype).eps / 2
        return truth(
            oracle.Relu(tolerance / 4, seed) if case.cell == "rnn_relu" else cell,
            lambda values: values * rng.uniform(1 - half, 1 + half, values.shape),
        )[1]

    with case.target.running(), threads(case.threads), _named_after(case):
        output, final = _call(case, module, x_given, [given for _, given in h0])
        assert {t.dtype for t in (output, *final)} == {case.dtype}
        outputs = ([output] if case.loss != "final" else []) + (final if case.loss != "output" else [])
        d_outputs = ([d_output] if case.loss != "final" else []) + (d_final if case.loss != "output" else [])
        torch.autograd.backward(outputs, d_outputs)

        run, d_expected = truth(cell)
        tolerance = rounding(case.target, case.dtype, case.layers, case.I + case.H, case.T * case.rows)
        # Values are of the order of one: below a tenth an error is no longer measured by the value itself.
        assert_near("output", to_numpy(output), run.output, tolerance * max(np.abs(run.output).max(), 0.1))
        for name, got, want in zip(cell.states, final, run.final, strict=True):
            assert_near(f"{name}_n", to_numpy(got), want, tolerance * max(np.abs(want).max(), 0.1))

        # A gradient that is small because large terms cancel keeps their error: hence the share of the largest one.
        share = 0.25 * max(np.abs(d).max() for d in d_expected)
        allowed = [tolerance * (np.abs(d).max() + share) for d in d_expected]
        leaves = arguments | dict(module.named_parameters())
        for name, leaf in leaves.items():
            assert leaf.grad is not None, f"{name} has no gradient"
            assert leaf.grad.dtype == case.dtype
        grads = [to_numpy(leaf.grad) for leaf in leaves.values()]
        if any(map(gt, map(error_of, grads, d_expected), allowed)):
            # Where all of the terms cancel, or relu is at its kink, allow what rounding the given values would change.
            draws = [draw(seed) for seed in range(8)]
            for k, want in enumerate(d_expected):
                allowed[k] += 3 * max(np.abs(drawn[k] - want).max() for drawn in draws)
        for name, grad, want, limit in zip(leaves, grads, d_expected, allowed, strict=True):
            assert_near(f"gradient of {name}", grad, want, limit)
        for name, leaf in arguments.items():
            assert np.array_equal(to_numpy(leaf), before[name]), f"{name} was changed"


def _call(case: Case, module: torch.nn.Module, x: Tensor, h0: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Call the module in the case's layout; results in the oracle's: (T, B, features), (states, B, width)."""

    def states(hx: Tensor | tuple[Tensor, Tensor]) -> list[Tensor]:
        return list(hx) if case.cell == "lstm" else [hx]

    is_cell, unbatched = case.layout.endswith("cell"), case.layout.startswith("unbatched")
    if is_cell:
        x, h0 = x.squeeze(0), [h.squeeze(0) for h in h0]
    if unbatched:
        x, h0 = x.squeeze(-2), [h.squeeze(-2) for h in h0]
    elif case.batch_first:
        x = x.transpose(0, 1)
    if case.lengths is not None:
        x = pack_padded_sequence(
            x, torch.tensor(case.lengths), case.batch_first, enforce_sorted=case.layout == "sorted"
        )
    hx = None if not h0 else tuple(h0) if case.cell == "lstm" else h0[0]
    if is_cell:
        final = states(module(x, hx))
        output = final[0]
    else:
        output, final = module(x, hx)
        final = states(final)
    if case.lengths is not None:
        output, _ = pad_packed_sequence(output, case.batch_first)
    if unbatched:
        output, final = output.unsqueeze(-2), [state.unsqueeze(-2) for state in final]
    elif case.batch_first:
        output = output.transpose(0, 1)
    return (output[None], [state[None] for state in final]) if is_cell else (output, final)


@contextmanager
def _named_after(case: object) -> Iterator[None]:
    """Failures inside the block tell the case: one test may loop over many."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the case {case}")
        raise
