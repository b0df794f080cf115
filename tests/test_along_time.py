"""Lengths, resets, reset states, the states of every step: every engine against the oracle, and as users call them."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from operator import itemgetter
from pathlib import Path
from typing import Any

import emulated
import numpy as np
import oracle
import pytest
import torch
from pairwise import pairwise
from support import TARGETS, Target, assert_near, has_kernel, rounding, threads, to_numpy, weights_of
from support import kernels as kernels_of
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn

ON_OFF = (True, False)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One choice of every option along time, and of those of the module that meet them."""

    target: Target
    cell: str
    dtype: torch.dtype
    lengths: bool
    resets: str  # "none", "zeros", "given": the state of the resets
    hx: bool
    states: bool  # of every step
    layers: int
    directions: int
    batch_first: bool
    threads: int
    shape: tuple[int, int, int, int]  # T, B, I, H
    projected: bool = False
    seed: int = 0

    def __str__(self) -> str:
        return "-".join(f"{field.name}_{getattr(self, field.name)}" for field in fields(self))


OPTIONS = {
    "lengths": ON_OFF,
    "resets": ("none", "zeros", "given"),
    "hx": ON_OFF,
    "states": ON_OFF,
    "layers": (1, 2),
    "directions": (1, 2),
    "batch_first": ON_OFF,
    "threads": (1, 2, 3),
    "shape": (
        (1, 1, 3, 3),
        (1, 13, 1, 7),
        (5, 3, 17, 17),
        (9, 33, 3, 5),
        (40, 8, 7, 37),
        (12, 5, 37, 130),
        (20, 40, 65, 66),
    ),
}


def sample() -> list[Case]:
    kernels = kernels_of(torch.float32, torch.float64, torch.bfloat16, targets=(*TARGETS, emulated.TARGET))
    kernels = [(t, c, d) for t, c, d in kernels if has_kernel(t, d) and t.engine != "torch"]  # which has none of this
    cases = []
    for seed, case in enumerate(pairwise({"kernel": kernels, "projected": ON_OFF} | OPTIONS)):
        target, cell, dtype = case.pop("kernel")
        case["projected"] &= cell == "lstm" and case["shape"][3] > 1
        if target.engine == "cuda":  # its kernels take no more than that
            case["states"] = False
            case["resets"] = case["resets"].replace("given", "zeros")
            case["projected"] &= not case["lengths"] and case["resets"] == "none"
        if target is emulated.TARGET and case["shape"][0] >= 12:  # slow there
            case["shape"] = (11, 9, 3, 20)
        cases.append(Case(target=target, cell=cell, dtype=dtype, seed=seed, **case))
    return cases


@pytest.mark.parametrize("case", sample(), ids=str)
def test_engines(case):
    """Outputs, states and all gradients are those of each segment run alone."""
    torch.manual_seed(case.seed)
    rng = np.random.default_rng(case.seed)
    T, B, I, H = case.shape
    D, place = case.directions, {"dtype": case.dtype, "device": case.target.device}
    name, own = case.cell.split("_")[0].upper(), {}
    if name == "RNN":
        own["nonlinearity"] = case.cell.removeprefix("rnn_")
    if case.projected:
        own["proj_size"] = R = (H + 1) // 2
    else:
        R = H
    module = getattr(fusedrnn, name)(
        I, H, case.layers, batch_first=case.batch_first, bidirectional=D == 2, **own, **place
    )
    cell = oracle.CELLS[case.cell]
    widths = [R, H][: len(cell.states)]

    def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, dtype=torch.float64)).to(**place).requires_grad_()

    x = leaf(T, B, I, scale=min(1.0, (H / I) ** 0.5))
    hx = [leaf(case.layers * D, B, width) for width in widths] if case.hx else []
    reset_state = [leaf(case.layers * D, B, width) for width in widths] if case.resets == "given" else []
    lengths = rng.integers(0, T + 1, B) if case.lengths else None
    resets = rng.random((T, B)) < 0.3 if case.resets != "none" else None

    def laid_out(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(0, 1) if case.batch_first else tensor

    def hidden(states: list[torch.Tensor]) -> Any:
        return None if not states else tuple(states) if name == "LSTM" else states[0]

    # What lies behind a row's end is not read: NaN there must reach nothing.
    given = x
    if lengths is not None:
        behind = torch.from_numpy(np.arange(T)[:, None] >= lengths).to(case.target.device)
        given = torch.where(behind[..., None], torch.nan, x)
    with case.target.running(), threads(case.threads):
        result = module(
            laid_out(given),
            hidden(hx),
            lengths=None if lengths is None else torch.from_numpy(lengths),
            resets=None if resets is None else laid_out(torch.from_numpy(resets).to(case.target.device)),
            reset_state=hidden(reset_state),
            return_states=case.states,
        )
        final = list(result[1]) if name == "LSTM" else [result[1]]
        outputs = {"output": laid_out(result[0])} | {f"{s}_n": f for s, f in zip(cell.states, final, strict=True)}
        if case.states:
            for layer in range(case.layers):
                outputs[f"h of layer {layer}"] = laid_out(result[2].h[layer])
                if name == "LSTM":
                    outputs[f"c of layer {layer}"] = laid_out(result[2].c[layer])
            assert name == "LSTM" or result[2].c is None
        d_outputs = {k: torch.randn_like(value) for k, value in outputs.items()}
        torch.autograd.backward(list(outputs.values()), list(d_outputs.values()))

    cut = None if resets is None else resets.copy()
    if cut is not None and case.hx:
        cut[0] = False  # the state that the caller gives begins the first segment
    d = {k: to_numpy(value) for k, value in d_outputs.items()}

    def truth(cell: oracle.Cell) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        run = oracle.Network(
            cell,
            to_numpy(x),
            lengths,
            [to_numpy(h) for h in hx] or None,
            weights_of(module),
            directions=D,
            resets=cut,
            reset_state=[to_numpy(s) for s in reset_state] or None,
        )
        d_steps = [[d[f"{s} of layer {layer}"] for s in cell.states] for layer in range(case.layers) if case.states]
        d_x, d_hx, d_weights = run.backward(d["output"], [d[f"{s}_n"] for s in cell.states], d_steps)
        want = {"output": run.output} | {f"{s}_n": f for s, f in zip(cell.states, run.final, strict=True)}
        for layer, steps in enumerate(run.steps):
            want |= {f"{s} of layer {layer}": value for s, value in zip(cell.states, steps, strict=True)}
        grads = {"input": d_x} | dict(enumerate(d_hx if case.hx else []))
        grads |= {f"reset {k}": g for k, g in enumerate(run.d_reset_state) if reset_state}
        return want, grads | {f"weight {k}": g for k, g in enumerate(g for w in d_weights for g in w if g is not None)}

    want, d_want = truth(cell)
    tolerance = rounding(case.target, case.dtype, case.layers, I + H, T * B)
    for key, value in outputs.items():
        assert_near(key, to_numpy(value), want[key], tolerance * max(np.abs(want[key]).max(), 0.1))
    leaves = dict(zip(d_want, [x, *hx, *reset_state, *module.parameters()], strict=True))
    share = 0.25 * max(np.abs(g).max() for g in d_want.values())
    allowed = {key: tolerance * (np.abs(g).max() + share) for key, g in d_want.items()}
    if case.cell == "rnn_relu":  # within rounding of its kink the slope may be 0 or 1: allow what drawing lots changes
        draws = [truth(oracle.Relu(tolerance / 4, seed))[1] for seed in range(8)]
        for key, g in d_want.items():
            allowed[key] += 3 * max(np.abs(draw[key] - g).max() for draw in draws)
    for key, g in d_want.items():
        got = leaves[key].grad
        assert_near(f"gradient of {key}", np.zeros_like(g) if got is None else to_numpy(got), g, allowed[key])


LENGTHS = torch.tensor([3, 7, 1, 5, 2])


def lstm(**options: Any) -> torch.nn.Module:
    return fusedrnn.LSTM(4, 6, 2, bidirectional=True, dtype=torch.float64, **options)


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def along_engine(engine):
    if engine == "torch":
        pytest.skip("stock torch has nothing of this")
    return engine


def test_lengths_equal_a_packed_sequence(along_engine):
    module, x = lstm(), values(7, 5, 4)
    output, final = module(x, lengths=LENGTHS.to(torch.int32))
    packed, final_packed = module(pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
    torch.testing.assert_close(output, pad_packed_sequence(packed)[0])
    torch.testing.assert_close(final, final_packed)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("batch_first", ON_OFF)
def test_lengths_without_gradients(along_engine, kind, batch_first):
    """A way of its own, straight into the compiled engine; whatever is wrong is told as on the other."""
    module = getattr(fusedrnn, kind)(4, 6, bidirectional=True, batch_first=batch_first)
    x, hx = torch.randn(5, 7, 4), torch.randn(2, 5 if batch_first else 7, 6)
    hx = (hx, hx.flip(0)) if kind == "LSTM" else hx
    steps, rows = (7, 5) if batch_first else (5, 7)
    lengths = torch.arange(rows) % (steps + 1)
    for given in (None, hx):
        want = module(x, given, lengths=lengths)
        with torch.no_grad():
            torch.testing.assert_close(module(x, given, lengths=lengths), want)
            torch.testing.assert_close(module(x, given, lengths=lengths.to(torch.int32)), want)
    faults = [(lengths + steps, "from 0 to the"), (lengths[1:], "lengths of shape"), (0, "must be a Tensor")]
    for wrong, message in faults:
        with torch.no_grad(), pytest.raises((TypeError, RuntimeError), match=message):
            module(x, lengths=wrong)


def test_states_of_a_packed_sequence(along_engine):
    module, x = lstm(), values(7, 5, 4)
    _, _, states = module(x, lengths=LENGTHS, return_states=True)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    _, _, states_packed = module(packed, return_states=True)
    for got, want in zip((*states_packed.h, *states_packed.c), (*states.h, *states.c), strict=True):
        torch.testing.assert_close(pad_packed_sequence(got)[0], want)


def test_jagged(along_engine):
    module, x = lstm(batch_first=True), values(5, 7, 4)
    rows = [x[b, :length].clone().requires_grad_() for b, length in enumerate(LENGTHS)]
    resets = torch.rand(5, 7) < 0.3
    jagged = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    of_rows = torch.nested.nested_tensor_from_jagged(
        torch.cat([resets[b, :length] for b, length in enumerate(LENGTHS)]), jagged.offsets()
    )
    output, final = module(jagged, resets=of_rows)
    want, want_final = module(x, lengths=LENGTHS, resets=resets)
    assert output.is_nested
    for got, padded, length in zip(output.unbind(), want, LENGTHS, strict=True):
        torch.testing.assert_close(got, padded[:length])
    torch.testing.assert_close(final, want_final)
    (grad,) = torch.autograd.grad(output.values().sum(), rows[0])
    assert grad.abs().sum() > 0


def test_unbatched(along_engine):
    module, x, resets = lstm(), values(7, 4), torch.rand(7) < 0.4
    fresh = values(4, 6), values(4, 6)
    options = {"lengths": torch.tensor(5), "resets": resets, "reset_state": fresh, "return_states": True}
    output, (h_n, c_n), states = module(x, **options)
    want, (want_h, want_c), want_states = module(
        x[:, None],
        lengths=torch.tensor([5]),
        resets=resets[:, None],
        reset_state=tuple(s[:, None] for s in fresh),
        return_states=True,
    )
    torch.testing.assert_close((output, h_n, c_n), (want[:, 0], want_h[:, 0], want_c[:, 0]))
    torch.testing.assert_close(states.c[0], want_states.c[0][:, 0])


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("given", ON_OFF)
@pytest.mark.parametrize("batched", ON_OFF)
def test_cells(along_engine, kind, given, batched):
    """A reset of a cell, which has no step 0, replaces the state that it is given."""
    cell = getattr(fusedrnn, kind)(4, 6, dtype=torch.float64)
    resets = torch.tensor([True, False, True, False, False]) if batched else torch.tensor(True)
    shape = (5,) if batched else ()
    x, states = values(*shape, 4), [values(*shape, 6) for _ in range(2 if kind == "LSTMCell" else 1)]
    fresh = [values(*(1,) * len(shape), 6) for _ in states]
    pack = tuple if kind == "LSTMCell" else itemgetter(0)
    got = cell(x, pack(states), resets=resets, reset_state=pack(fresh) if given else None)
    zeros = [torch.zeros_like(f) for f in fresh]
    replaced = [torch.where(resets[..., None], f, s) for s, f in zip(states, fresh if given else zeros, strict=True)]
    torch.testing.assert_close(got, cell(x, pack(replaced)))


def test_state_at_step_zero(along_engine):
    """An hx that is given begins the first segment, whatever the resets; without one it is the reset state."""
    module, x = fusedrnn.GRU(4, 6, dtype=torch.float64), values(3, 2, 4)
    hx, fresh, resets = values(1, 2, 6), values(1, 1, 6), torch.tensor([[True, False]] * 3)
    plain = module(x[:1], hx)[0]
    torch.testing.assert_close(module(x, hx, resets=resets, reset_state=fresh)[0][:1], plain)
    output = module(x, resets=resets, reset_state=fresh)[0]
    torch.testing.assert_close(output[0, 0], module(x[:1, :1], fresh)[0][0, 0])
    torch.testing.assert_close(output[0, 1], module(x[:1, 1:])[0][0, 0])


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_learned_initial_state(along_engine, kind):
    """It stands for zeros where no state is given, and begins segments; as a parameter it lives with the module."""
    torch.manual_seed(1)
    module = getattr(fusedrnn, kind)(4, 6, 2, dtype=torch.float64, learn_initial_state=True)
    torch.manual_seed(1)
    stock = getattr(fusedrnn, kind)(4, 6, 2, dtype=torch.float64)
    names = ["initial_h", "initial_c"] if kind == "LSTM" else ["initial_h"]
    assert set(module.state_dict()) - set(stock.state_dict()) == set(names)
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in stock.state_dict().items())
    assert "learn_initial_state=True" in repr(module)
    x, resets = values(5, 3, 4), torch.rand(5, 3) < 0.3
    torch.testing.assert_close(module(x), stock(x))
    learned = [torch.nn.init.normal_(getattr(module, name)) for name in names]
    hx = tuple(state.detach().expand(-1, 3, -1) for state in learned)
    hx = hx if kind == "LSTM" else hx[0]
    torch.testing.assert_close(module(x), stock(x, hx))
    torch.testing.assert_close(module(x, resets=resets), stock(x, hx, resets=resets, reset_state=hx))
    torch.testing.assert_close(module(x[:, 0])[0], module(x)[0][:, 0])
    module(x, resets=resets)[0].sum().backward()
    assert all(state.grad is not None and state.grad.abs().sum() > 0 for state in learned)
    module.reset_parameters()
    assert all(not state.any() for state in learned)
    assert type(fusedrnn.revert(module)) is getattr(fusedrnn, kind)  # torch.nn's have no such state


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lengths": [1, 2]}, TypeError, "lengths must be a Tensor, not list"),
        ({"lengths": torch.tensor([1.0, 2.0])}, RuntimeError, "lengths must be integers, got torch.float32"),
        ({"lengths": torch.tensor([1, 2, 3])}, RuntimeError, r"Expected lengths of shape \(2,\)"),
        ({"lengths": torch.tensor([1, 6])}, RuntimeError, "from 0 to the 5 steps of the input, got 6"),
        ({"lengths": torch.tensor([-1, 5])}, RuntimeError, "from 0 to the 5 steps of the input, got -1"),
        ({"lengths": torch.tensor([1, 2], device="meta")}, RuntimeError, "input is on cpu, but lengths on meta"),
        ({"resets": [[True]]}, TypeError, "resets must be a Tensor"),
        ({"resets": torch.zeros(5, 2)}, RuntimeError, "resets must be of dtype torch.bool, got torch.float32"),
        ({"resets": torch.zeros(2, 5, dtype=torch.bool)}, RuntimeError, r"Expected resets of shape \(5, 2\)"),
        ({"resets": torch.zeros(5, 2, dtype=torch.bool, device="meta")}, RuntimeError, "resets on meta"),
    ],
)
def test_errors(options, error, message):
    for kind in ("RNN", "LSTM", "GRU"):
        with pytest.raises(error, match=message):
            getattr(fusedrnn, kind)(4, 6)(torch.randn(5, 2, 4), **options)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("grad", [True, False])
def test_reset_state_without_resets(kind, grad):
    fresh = torch.zeros(2, 6) if kind.endswith("Cell") else torch.zeros(1, 2, 6)
    x = torch.zeros(2, 4) if kind.endswith("Cell") else torch.zeros(5, 2, 4)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="reset_state is given without resets"):
        getattr(fusedrnn, kind)(4, 6)(x, reset_state=(fresh, fresh) if "LSTM" in kind else fresh)


def test_reset_state_of_a_wrong_shape():
    resets = torch.zeros(5, 2, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="Expected h of reset_state of shape"):
        fusedrnn.GRU(4, 6)(torch.randn(5, 2, 4), resets=resets, reset_state=torch.randn(1, 2, 5))
    with pytest.raises(TypeError, match="reset_state must be like hx"):
        fusedrnn.LSTM(4, 6)(torch.randn(5, 2, 4), resets=resets, reset_state=torch.randn(1, 2, 6))


def test_packed_and_jagged_have_lengths_already():
    x = torch.randn(5, 2, 4)
    packed = pack_padded_sequence(x, torch.tensor([5, 3]))
    with pytest.raises(RuntimeError, match="a PackedSequence takes neither lengths nor resets"):
        fusedrnn.GRU(4, 6)(packed, lengths=torch.tensor([5, 3]))
    jagged = torch.nested.nested_tensor([x[:, 0], x[:3, 1]], layout=torch.jagged)
    with pytest.raises(RuntimeError, match="a jagged input has lengths of its own"):
        fusedrnn.GRU(4, 6)(jagged, lengths=torch.tensor([5, 3]))
    with pytest.raises(TypeError, match="resets must be a Tensor, not list"):
        fusedrnn.GRU(4, 6)(jagged, resets=[True])


def test_no_sequences(along_engine):
    """An empty batch is no fault, and keeps its steps."""
    module, x = lstm(), values(7, 0, 4)
    resets = torch.zeros(7, 0, dtype=torch.bool)
    output, final, states = module(x, lengths=torch.zeros(0, dtype=torch.int64), resets=resets, return_states=True)
    assert output.shape == states.h[-1].shape == module(x)[0].shape
    assert [state.shape for state in final] == [state.shape for state in module(x)[1]]
    output.sum().backward()
    assert not module.weight_ih_l0.grad.any()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_nested_tensors_of_another_kind():
    rows = [torch.randn(3, 4), torch.randn(2, 4)]
    for nested, message in (
        (torch.nested.nested_tensor(rows, layout=torch.strided), "layout torch.jagged"),
        (torch.nested.nested_tensor_from_jagged(torch.cat(rows), torch.tensor([0, 2, 4])), "span its 5 rows, got 4"),
        (torch.nested.nested_tensor_from_jagged(rows[0][:1], torch.tensor([0, 2])), "span its 1 rows, got 2"),
    ):
        for kind in ("RNN", "LSTM", "GRU"):
            with pytest.raises(RuntimeError, match=message):
                getattr(fusedrnn, kind)(4, 6)(nested)


def test_stock_torch_refuses():
    with fusedrnn.engine("torch"), pytest.raises(RuntimeError, match="stock torch has no lengths"):
        fusedrnn.GRU(4, 6)(torch.randn(5, 2, 4), lengths=torch.tensor([5, 3]))


def test_resets_changed_before_backward_are_noticed():
    resets = torch.zeros(5, 2, dtype=torch.bool)
    output = fusedrnn.GRU(4, 6)(torch.randn(5, 2, 4), resets=resets)[0]
    resets[2] = True
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.fixture
def problem():
    """A call with everything, as a function of tensors, and these."""
    module = fusedrnn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64)

    def call(x, h, c, lengths, resets):
        fresh = h[:, :1], c[:, :1]
        output, final, states = module(x, (h, c), lengths=lengths, resets=resets, reset_state=fresh, return_states=True)
        return output, *final, states.c[0]

    tensors = [values(4, 3, 3), values(4, 3, 4), values(4, 3, 4)]
    return call, [t.requires_grad_() for t in tensors], torch.tensor([4, 0, 3]), torch.rand(4, 3) < 0.4


def test_second_derivatives(problem):
    call, leaves, lengths, resets = problem
    leaves = [leaf[:2].detach().requires_grad_() for leaf in leaves[:1]] + leaves[1:]
    torch.autograd.gradgradcheck(
        lambda *tensors: call(*tensors, lengths.clamp(max=2), resets[:2]), leaves, fast_mode=True
    )


def test_compile(problem):
    call, leaves, *along = problem
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    want, got = call(*leaves, *along), compiled(*leaves, *along)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(sum(t.square().sum() for t in result), leaves) for result in (got, want)]
    torch.testing.assert_close(*grads)


def test_vmap(problem):
    call, leaves, lengths, resets = problem
    many = [torch.stack([t.detach(), 2 * t.detach()]) for t in leaves]
    many += [torch.stack([lengths, lengths.flip(0)]), torch.stack([resets, ~resets])]

    def loss(*tensors):
        return sum(t.square().sum() for t in call(*tensors))

    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    for function in (call, gradient):
        mapped = torch.vmap(function)(*many)
        for k in range(2):
            torch.testing.assert_close(tuple(t[k] for t in mapped), function(*(t[k] for t in many)))


def test_export(problem):
    _, leaves, *along = problem

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = fusedrnn.GRU(3, 4, dtype=torch.float64)

        def forward(self, x, lengths, resets):
            return self.rnn(x, lengths=lengths, resets=resets)[0]

    module, x = Module(), leaves[0].detach()
    exported = torch.export.export(module, (x, *along)).module()
    torch.testing.assert_close(exported(x, *along), module(x, *along))


@pytest.mark.parametrize("page", ["docs/sequences.md", "README.md"])
def test_the_examples_of_the_documentation(page):
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / page).read_text(), re.DOTALL):
        if "torch.distributed" not in block:  # for torchrun
            exec(block, names)


def test_debug():
    """It holds until its block ends, or without one from then on; on the CPU lengths are checked in any case."""
    from fusedrnn import along

    before = along._debugging.get()
    with fusedrnn.debug(True):
        assert along._debugging.get()
        with fusedrnn.debug(False):
            assert not along._debugging.get()
        assert along._debugging.get()
    assert along._debugging.get() == before


@pytest.mark.gpu
def test_lengths_on_a_gpu_are_checked_while_debugging():
    module, x = fusedrnn.GRU(4, 6, device="cuda"), torch.randn(5, 2, 4, device="cuda")
    wrong = torch.tensor([-3, 9], device="cuda")
    with fusedrnn.debug(True), pytest.raises(RuntimeError, match="from 0 to the 5 steps of the input, got -3"):
        module(x, lengths=wrong)
    clamped = module(x, lengths=wrong)
    torch.testing.assert_close(clamped, module(x, lengths=torch.tensor([0, 5])))
