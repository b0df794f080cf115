"""torch.compile beyond the table of tests/test_compatibility.py: what it may meet, and what it must leave alone."""

from __future__ import annotations

import os

import pytest
import torch
from support import assert_equal, call_of, run_script, twins
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

import fusedrnn
from fusedrnn.torch_state import VMAP_RULES

T, B, I, H = 4, 3, 6, 5
#: What torch could not do yet when it had no vmap rules for operators, which is before 2.5.
later_torch = pytest.mark.skipif(not VMAP_RULES, reason="torch 2.4 cannot")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning"),
]


@pytest.fixture(autouse=True)
def forget():
    torch.compiler.reset()


def compiled(function, **options):
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


class TestStockTorch:
    def test_is_refused_as_before(self):
        with pytest.raises(Exception, match="RNN, GRU"):
            compiled(torch.nn.LSTM(I, H))(torch.randn(T, B, I))
        assert not torch._dynamo.config.allow_rnn

    @pytest.mark.parametrize("first", ["torch._dynamo", "fusedrnn"])
    def test_whoever_is_imported_first(self, first):
        result = run_script(
            f"""
            import torch, {first}, sys
            assert ("torch._dynamo" in sys.modules) == ({first!r} == "torch._dynamo")
            import fusedrnn
            module, x = fusedrnn.LSTM(3, 4), torch.randn(2, 1, 3)
            torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))
            try:
                torch.compile(torch.nn.LSTM(3, 4), backend="eager", fullgraph=True)(x)
            except Exception as error:
                print(type(error).__name__)
            """
        )
        assert result.stdout == "Unsupported\n", result.stderr

    def test_is_compiled_inside_patch(self):
        module, x = torch.nn.LSTM(I, H), torch.randn(T, B, I)
        expected = module(x)
        with fusedrnn.patch():
            assert_close(compiled(module)(x), expected)


def test_graph_has_one_operator_for_each_layer():
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(n.target) for n in graph.graph.nodes if "fusedrnn" in str(n.target)])
        return graph.forward

    module = fusedrnn.LSTM(I, H, num_layers=3, bidirectional=True)
    run = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    for steps in (5, 500):
        run(torch.randn(steps, B, I))
    assert graphs == [["fusedrnn.layer.default"] * 3]


@later_torch
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("hx", [True, False])
def test_packed_sequence_as_argument(hx, enforce_sorted):
    module = fusedrnn.GRU(I, H, num_layers=2, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(T, B, I), torch.tensor([4, 2, 1]), enforce_sorted=enforce_sorted)
    call = (packed, torch.randn(4, B, H)) if hx else (packed,)
    assert_close(compiled(module)(*call), module(*call))


class Packing(torch.nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0])[0]


@pytest.mark.parametrize("strict", [True, False])
def test_lengths_instead_in_an_exported_program(strict):
    theirs, ours = twins("LSTM", I, H)
    rows = torch.export.Dim("B", min=2)
    shapes = {"input": {0: torch.export.Dim("T", min=2), 1: rows}, "lengths": {0: rows}}
    call, lengths = (torch.randn(T, B, I),), {"lengths": torch.tensor([2, 4, 1])}
    program = torch.export.export(ours, call, lengths, dynamic_shapes=shapes, strict=strict)
    x, lengths = torch.randn(T + 2, B + 1, I), torch.tensor([3, 6, 1, 2])
    assert_close(program.module()(x, lengths=lengths)[0], Packing(theirs)(x, lengths))


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside):
    module, x = fusedrnn.LSTM(I, H), torch.randn(T, B, I)

    def run(x):
        if not inside:
            return module(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        got, expected = compiled(run)(x), run(x)
    assert got[0].dtype == torch.bfloat16
    assert_close(got, expected)


def test_functional():
    module, x = fusedrnn.GRU(I, H), torch.randn(T, B, I)
    run = compiled(lambda x, weights: fusedrnn.functional.gru(x, None, weights))
    assert_close(run(x, list(module.parameters())), module(x))


def test_wrong_input_is_named():
    with pytest.raises(Exception, match="input has inconsistent input_size"):
        compiled(fusedrnn.LSTM(I, H))(torch.randn(T, B, I + 1))
    with pytest.raises(Exception, match="Expected h_0 of shape"):
        compiled(fusedrnn.GRU(I, H))(torch.randn(T, B, I), torch.randn(1, B + 1, H))


def test_dropout_under_a_seed():
    module = fusedrnn.LSTM(I, H, num_layers=3, dropout=0.5)
    run, x = compiled(module), torch.randn(T, B, I)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(run(x))
    assert_equal(results[0], results[1])
    assert not torch.equal(run(x)[0], results[0][0])


class TestEngines:
    def test_explain_sees_through(self):
        module, x = fusedrnn.GRU(I, H), torch.randn(T, B, I)
        run = compiled(module)
        (decision,) = fusedrnn.explain(run, x).decisions
        assert decision.engine == "cpu"
        assert "called as an operator of torch (torch.ops.fusedrnn)" in decision.reasons

    def test_forced(self, engine):
        """Without gradients the choice is made at each call; with them it is fixed from the tracing on."""
        module, x = fusedrnn.GRU(I, H), torch.randn(T, B, I)
        run, expected = compiled(module), module(x)
        (decision,) = fusedrnn.explain(run, x).decisions
        assert decision.engine == engine
        with torch.no_grad():
            assert_close(run(x), expected)
        with fusedrnn.engine("auto"):
            (decision,) = fusedrnn.explain(run, x).decisions
            assert decision.engine == engine
            with torch.no_grad():
                (decision,) = fusedrnn.explain(run, x).decisions
                assert decision.engine == "cpu"


class TestForwardMode:
    def function(self):
        module = fusedrnn.GRU(I, H, dtype=torch.float64).requires_grad_(False)
        return lambda x: module(x)[0]

    def along(self, function, x, v):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, v))).tangent

    @later_torch
    @pytest.mark.parametrize("where", ["jvp outside", "jvp inside", "jacfwd inside", "dual inside", "dual outside"])
    def test_never_zero(self, where):
        function, x = self.function(), torch.randn(T, B, I, dtype=torch.float64)
        v = torch.randn_like(x)
        expected = torch.func.jvp(function, (x,), (v,))[1]
        assert expected.any()
        if where == "jvp outside":
            run = torch.compile(function, backend="aot_eager")
            run(x)
            got = torch.func.jvp(run, (x,), (v,))[1]
        elif where == "jvp inside":
            got = compiled(lambda x: torch.func.jvp(function, (x,), (v,))[1])(x)
        elif where == "jacfwd inside":
            got = (compiled(torch.func.jacfwd(function))(x) * v).sum((-1, -2, -3))
        elif where == "dual inside":
            got = compiled(lambda x: self.along(function, x, v))(x)
        else:
            run = torch.compile(function, backend="aot_eager")
            run(x)
            got = self.along(run, x, v)
        assert_close(got, expected)


@later_torch
# torch's own access.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_autograd():
    module, x = fusedrnn.GRU(I, H), torch.randn(T, B, I)

    def step(x):
        loss = module(x)[0].sum()
        loss.backward()
        return loss

    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(step, backend="aot_eager")(x)
    got = [p.grad for p in module.parameters()]
    assert_close(got, list(torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))))


def test_ahead_of_time_package(tmp_path):
    """A package of AOTInductor, loaded where the operators can be found."""
    module = fusedrnn.LSTM(I, H, num_layers=2).eval()
    x, path = torch.randn(T, B, I), os.fspath(tmp_path / "model.pt2")
    dims = {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=(dims,))
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        (call,) = (call_of(module, T + 3, B + 1)[:1],)
        assert_close(torch._inductor.aoti_load_package(path)(*call), module(*call))
