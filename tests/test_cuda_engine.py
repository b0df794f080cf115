"""The CUDA engine and the modules above it, over the emulator: all the options of the modules, and bad input."""

from __future__ import annotations

import emulated
import pytest
import torch
from pairwise import pairwise
from support import CELLS, DTYPES, Case, assert_equal, backward, build, check, run_script

import fusedrnn
from fusedrnn import engines
from fusedrnn.engines.cuda import CudaEngine

ON_OFF = (True, False)
OPTIONS = {
    "kernel": [(cell, dtype) for cell in CELLS for dtype in DTYPES],
    "layout": ("dense", "unbatched", "sorted", "unsorted", "cell", "unbatched_cell"),
    "projected": ON_OFF,
    "layers": (1, 2),
    "directions": (1, 2),
    "bias": ON_OFF,
    "hx": ON_OFF,
    "batch_first": ON_OFF,
    "strided": ON_OFF,
    "loss": ("both", "output", "final"),
    "T": (1, 2, 5),
    "B": (1, 3, 9),
    "I": (1, 4, 17),
    "H": (2, 5, 17, 33),
}
CELL_LAYOUTS = ("cell", "unbatched_cell")
IMPOSSIBLE = [
    *({"layout": layout, "B": B} for layout in ("unbatched", "unbatched_cell") for B in OPTIONS["B"][1:]),
    *({"layout": layout, "T": T} for layout in CELL_LAYOUTS for T in OPTIONS["T"][1:]),
    *({"layout": layout, name: 2} for layout in CELL_LAYOUTS for name in ("layers", "directions")),
    *({"layout": layout, "projected": True} for layout in CELL_LAYOUTS),
    *({"layout": layout, "batch_first": True} for layout in CELL_LAYOUTS),
    *({"layout": layout, "loss": loss} for layout in CELL_LAYOUTS for loss in ("output", "final")),
    *({"kernel": (cell, dtype), "projected": True} for cell in CELLS if cell != "lstm" for dtype in DTYPES),
]


def cases() -> list[Case]:
    result = []
    for options in pairwise(OPTIONS, IMPOSSIBLE):
        cell, dtype = options.pop("kernel")
        result.append(Case(target=emulated.TARGET, cell=cell, dtype=dtype, **options))
    return result


@pytest.fixture(autouse=True)
def emulator():
    with emulated.cuda_engine_on_cpu_tensors() as engine:
        yield engine


@pytest.fixture(autouse=True)
def true_float32(monkeypatch):
    monkeypatch.setattr("fusedrnn.engines.cuda.allows_tf32_in_rnn", lambda: False)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_modules(case):
    check(case)


def test_tf32_is_less_exact_and_says_so(monkeypatch):
    module, x = fusedrnn.GRU(8, 16), torch.randn(4, 3, 8)
    with fusedrnn.engine("cuda"):
        exact, said = module(x)[0], str(fusedrnn.explain(module, x))
        monkeypatch.setattr("fusedrnn.engines.cuda.allows_tf32_in_rnn", lambda: True)
        rounded, said_then = module(x)[0], str(fusedrnn.explain(module, x))
    error = (exact - rounded).abs().max()
    assert 1e-6 < error < 2e-3
    assert "f32 products" in said
    assert "tf32 products" not in said
    assert "tf32 products" in said_then


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_equal_on_every_schedule(cell, dtype):
    """Sums have one order, whichever thread comes first."""
    native = emulated.module()
    module = build(fusedrnn, {"RNN": "RNN_tanh"}.get(cell, cell), 5, 20, bidirectional=True, dtype=dtype)
    x = torch.randn(2, 9, 5, dtype=dtype, requires_grad=True)
    runs = []
    for schedule in (native.Schedule.in_order, native.Schedule.reversed, native.Schedule.random, native.Schedule.ahead):
        native.schedule(schedule, 1)
        with fusedrnn.engine("cuda"):
            output, _ = module(x)
        runs.append((output, *torch.autograd.grad(output.sum(), [x, *module.parameters()])))
    for run in runs[1:]:
        assert_equal(run, runs[0])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["input", "hx", "weight_hh_l0", "weight_ih_l0"])
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize(
    "kernel", ["persistent, one CTA", "persistent grid,", "persistent grid with flags", "per step"]
)
def test_nan_and_infinity_end_in_nan_where_torch_has_it(cell, where, poison, kernel, monkeypatch):
    H = 150 if "grid" in kernel else 20
    monkeypatch.setattr("fusedrnn.engines.cuda.EXCHANGE", "flags" if "flags" in kernel else "counter")
    emulated.module().set_device(cooperative=kernel != "per step")
    ours, theirs = (build(library, {"RNN": "RNN_tanh"}.get(cell, cell), 3, H) for library in (fusedrnn, torch.nn))
    x, h = torch.randn(4, 2, 3), torch.randn(1, 2, H)
    for module in (ours, theirs):
        if where.startswith("weight"):
            getattr(module, where).data[1, 1] = poison
    if where == "input":
        x[1, 0, 0] = poison
    if where == "hx":
        h[0, 0, 2] = poison
    hx = (h, torch.zeros_like(h)) if cell == "LSTM" else h
    with fusedrnn.engine("cuda"):
        assert kernel in str(fusedrnn.explain(ours, x, hx))
        got = ours(x, hx)[0]
    want = theirs(x, hx)[0]
    assert torch.isnan(got).any() == torch.isnan(want).any()
    assert_equal(torch.isnan(got), torch.isnan(want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_nan_that_means_nothing_does_not_hang(dtype, monkeypatch):
    """With flags a place of the ring is empty while all its bits are set: a value of these bits becomes another NaN."""
    if dtype == torch.float64:
        pytest.skip("has no grid of CTAs")
    monkeypatch.setattr("fusedrnn.engines.cuda.EXCHANGE", "flags")
    module, h, native = fusedrnn.RNN(3, 150, dtype=dtype), torch.zeros(1, 2, 150, dtype=dtype), emulated.module()
    h.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])[0, 0, 4] = -1
    x = torch.zeros(2, 2, 3, dtype=dtype)
    with fusedrnn.engine("cuda"):
        assert "persistent grid with flags" in str(fusedrnn.explain(module, x, h))
        output = module(x, h)[0]
        native.fault(native.Fault.put)
        with pytest.raises(RuntimeError, match="deadlock"):
            module(x, h)
    assert output[:, 0].isnan().all()
    assert output[:, 1].isfinite().all()


def test_second_derivatives():
    module = build(fusedrnn, "GRU", 2, 3, dtype=torch.float64)
    with fusedrnn.engine("cuda"):
        assert torch.autograd.gradgradcheck(
            lambda x: module(x)[0], torch.randn(2, 2, 2, dtype=torch.float64).requires_grad_()
        )


def test_saved_output_changed_in_place_is_noticed():
    module, x = fusedrnn.LSTM(3, 4), torch.randn(2, 2, 3, requires_grad=True)
    with fusedrnn.engine("cuda"):
        output, _ = module(x)
    with torch.no_grad():
        output.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_explain_names_path_and_division():
    module = fusedrnn.LSTM(3, 100)
    with fusedrnn.engine("cuda"):
        said = str(fusedrnn.explain(module, torch.randn(4, 3, 3)))
    assert "engine cuda: CUDA kernels, f32 products, persistent grid" in said
    with fusedrnn.engine("cuda"):
        assert "one launch per step" in str(fusedrnn.explain(module.double(), torch.randn(4, 3, 3).double()))


def test_unknown_exchange_is_named():
    done = run_script("import fusedrnn", FUSEDRNN_CUDA_EXCHANGE="pigeons")
    assert "FUSEDRNN_CUDA_EXCHANGE: unknown exchange 'pigeons'; choose one of counter, flags" in done.stderr


def test_a_launch_that_fails_names_itself_and_the_next_one_works():
    module, x = fusedrnn.LSTM(3, 20), torch.randn(2, 2, 3)
    native = emulated.module()
    with fusedrnn.engine("cuda"):
        native.fault(native.Fault.launch)
        with pytest.raises(RuntimeError, match="the launch failed"):
            module(x)
        native.fault()
        assert module(x)[0].isfinite().all()


def test_where_all_ctas_at_once_are_refused_steps_are_launched_one_by_one_from_then_on():
    module, x, native = fusedrnn.LSTM(3, 20), torch.randn(2, 2, 3, requires_grad=True), emulated.module()
    with fusedrnn.engine("cuda"):
        want = backward(module, x)
        assert "persistent" in str(fusedrnn.explain(module, x))
        output, _ = module(x)
        native.fault(native.Fault.cooperative_launch)
        (grad,) = torch.autograd.grad(output.sum(), x)  # the refusal in backward
        torch.testing.assert_close(grad, torch.autograd.grad(module(x)[0].sum(), x)[0])
        torch.testing.assert_close(backward(module, x), want)
        said = str(fusedrnn.explain(module, x))
    assert "one launch per step" in said
    assert "(the GPU refused to run all CTAs at once)" in said


def test_without_room_for_all_ctas_at_once_steps_are_launched_one_by_one():
    module, x = fusedrnn.LSTM(3, 100), torch.randn(2, 2, 3)
    emulated.module().set_device(cooperative=False)
    with fusedrnn.engine("cuda"):
        assert "one launch per step" in str(fusedrnn.explain(module, x))


@pytest.mark.parametrize(
    ("dtype", "reason"), [(torch.float8_e4m3fn, "no kernel for torch.float8_e4m3fn"), (torch.int32, "torch.int32")]
)
def test_unsupported_dtype_is_named(dtype, reason, emulator):
    call = _call(torch.zeros(2, 2, 3).to(dtype))
    assert reason in emulator.supports(call)


def test_too_old_gpu_is_named(emulator):
    emulated.module().set_device(capability=(7, 5))
    reason = CudaEngine(emulated.module(), "cpu").supports(_call(torch.zeros(2, 2, 3)))
    assert reason == "the GPU has compute capability 7.5, the kernels need 8.0"


def test_other_device_is_named():
    real = CudaEngine(emulated.module())
    assert real.supports(_call(torch.zeros(2, 2, 3))) == "input is on cpu"


def test_missing_module_is_named():
    assert "compiled module is missing" in CudaEngine(None).available()


def test_sizes_beyond_what_kernels_count_are_named():
    native = emulated.module()
    sizes = native.Sizes("lstm", native.Arithmetic.f32, False, 1, 1 << 40, 8, 1)
    with pytest.raises(RuntimeError, match=r"a batch of 1099511627776 sequences .* more than the kernels can count"):
        native.plan(sizes, 0)


def test_mixed_dtypes_are_named():
    module = fusedrnn.LSTM(3, 4)
    module.weight_hh_l0.data = module.weight_hh_l0.data.double()
    with fusedrnn.engine("cuda"), pytest.raises((RuntimeError, ValueError), match="dtype"):
        module(torch.randn(2, 2, 3))


def _call(x: torch.Tensor) -> engines.base.Call:
    weights = (torch.zeros(16, 3), torch.zeros(16, 4), None, None, None)
    return engines.base.Call(fusedrnn.cells.CELLS["lstm"], x, (None, None), weights)


def test_operators():
    """Compiled, the engine runs as an operator whose backward runs forward again."""
    torch.manual_seed(0)
    model, x = fusedrnn.LSTM(5, 9, bidirectional=True), torch.randn(4, 3, 5, requires_grad=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    with fusedrnn.engine("cuda"):
        for run in (model, compiled):
            output, (h, c) = run(x)
            loss = output.square().sum() + h.sum() + c.square().sum()
            results.append([output, h, c, *torch.autograd.grad(loss, [x, *model.parameters()])])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
