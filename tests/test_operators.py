"""The operators of torch that a layer is wherever torch looks inside: torch's own tests of them, and their rules."""

from __future__ import annotations

import pytest
import torch
from support import CELLS, ENGINES
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck
from torch.testing import assert_close

import fusedrnn
from fusedrnn.torch_state import VMAP_RULES

# torch says this of its own insides.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")

#: What torch could not do yet when it had no vmap rules for operators, which is before 2.5.
later_torch = pytest.mark.skipif(not VMAP_RULES, reason="torch 2.4 cannot")

OPERATORS = torch.ops.fusedrnn
# lengths, resets, reset_state, every_state, h_mask, zoneout, seed, recompute
NOTHING_ALONG = (None, None, [], False, None, [], None, False)
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
T, B, I, H = 4, 2, 3, 5
#: In the place of NOTHING_ALONG: a mask of h, zoneout with its seed, gates computed again.
MASKED = (None, None, [], False, torch.ones(1, B, H, dtype=torch.float64), [0.5], torch.tensor(3), True)


def arguments(
    cell, directions=1, hx=True, projected=False, sizes=None, sequence=True, dtype=torch.float64, along=NOTHING_ALONG
):
    """The arguments of ``fusedrnn::layer``, wanting gradients."""

    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    states, width = 1 + (cell == "lstm"), 2 if projected else H
    rows = (sum(sizes),) if sizes else (T if sequence else 1, B)
    initial = [leaf(directions, B, size) for size in (width, H)[:states]] if hx else [None] * states
    gates = GATES[cell] * H
    weights = [
        tensor
        for _ in range(directions)
        for tensor in (
            *(leaf(gates, I), leaf(gates, width), leaf(gates), leaf(gates)),
            leaf(width, H) if projected else None,
        )
    ]
    return cell, leaf(*rows, I), initial, weights, torch.tensor(sizes) if sizes else None, sequence, *along


def leaves(args):
    return [t for t in (args[1], *args[2], *args[3]) if t is not None]


def backward_arguments(args, engine):
    with torch.no_grad():
        results = OPERATORS.layer_with_saved(*args, engine)
    count = args[5] + len(args[2])
    grads = [torch.randn_like(t, requires_grad=True) for t in results[:count]]
    needs = [t is not None for t in (args[1], *args[2], *args[3])]
    return grads, *args, [t.detach() for t in results[count:]], needs, engine


CASES = {
    "rnn_tanh": {},
    "lstm_projected_both_ways": {"directions": 2, "projected": True},
    "gru_without_state": {"hx": False},
    "gru_packed": {"sizes": [2, 2, 1]},
    "lstm_one_step": {"sequence": False},
    "gru_masked": {"along": MASKED},
}


@later_torch
@pytest.mark.parametrize("case", ["rnn_tanh", "lstm_projected_both_ways", "gru_packed", "gru_masked"])
def test_opcheck(case):
    args = arguments(next(cell for cell in CELLS if case.startswith(cell)), **CASES[case])
    opcheck(OPERATORS.layer.default, args)
    opcheck(OPERATORS.layer_with_saved.default, (*args, "cpu"))
    # The reference, and so a second derivative, can't be traced without the values of a packed sequence's lengths.
    detached = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, backward_arguments(args, "cpu"))
    opcheck(OPERATORS.layer_backward.default, detached if args[4] is not None else backward_arguments(args, "cpu"))


@pytest.mark.full
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_in_full(cell, directions, hx, projected, engine):
    if projected and cell != "lstm":
        return
    args = arguments(cell, directions, hx, projected)
    opcheck(OPERATORS.layer_with_saved.default, (*args, engine))
    opcheck(OPERATORS.layer_backward.default, backward_arguments(args, engine))


@pytest.mark.parametrize("cell", CELLS)
def test_fakes_are_what_is_real(engine, cell):
    """The shapes and dtypes of the results, of what each engine saves too."""
    from torch._subclasses import FakeTensorMode

    for dtype in (torch.float32, torch.bfloat16):
        args = arguments(cell, directions=2, dtype=dtype)
        real = OPERATORS.layer_with_saved(*args, engine)
        mode = FakeTensorMode()
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
        with mode:
            results = OPERATORS.layer_with_saved(*fake, engine)
        assert [(t.shape, t.stride(), t.dtype) for t in results] == [(t.shape, t.stride(), t.dtype) for t in real]


@pytest.mark.skipif("numba" not in ENGINES, reason="numba keeps as much as the lengths say, which has no fake")
def test_a_forward_that_backward_repeats_is_announced():
    class Named(torch.Tensor):
        """Reaches the operators."""

    module, x = fusedrnn.GRU(I, H), torch.randn(T, B, I).as_subclass(Named)
    with fusedrnn.engine("numba"):
        for lengths, grad in ((torch.tensor([4, 2]), True), (torch.tensor([4, 2]), False), (None, True)):
            with torch.set_grad_enabled(grad):
                (decision,) = fusedrnn.explain(module, x, lengths=lengths).decisions
            announced = any("backward will run forward again" in reason for reason in decision.reasons)
            assert announced == (lengths is not None and grad)


@pytest.mark.parametrize("case", CASES)
def test_derivatives(case):
    args = arguments(next(cell for cell in CELLS if case.startswith(cell)), **CASES[case])
    variables = leaves(args)

    def layer(*values):
        rest = iter(values)
        given = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: next(rest), args[1:4])
        return tuple(OPERATORS.layer(args[0], *given, *args[4:]))

    assert gradcheck(layer, variables)
    assert gradgradcheck(layer, variables, fast_mode=True)


@pytest.mark.filterwarnings("ignore:Backwards compatibility. New undefined gradient:UserWarning")
@pytest.mark.parametrize("nesting", ["reverse over reverse", "three times"])
def test_nested_transforms_of_all_arguments(nesting):
    """Against autograd's own nesting on the reference engine."""
    args = arguments("gru")
    variables = [t.detach() for t in leaves(args)]
    directions = [torch.randn_like(t) for t in variables]

    def loss(*values):
        results = OPERATORS.layer("gru", values[0], [values[1]], [*values[2:], None], None, True, *NOTHING_ALONG)
        return sum(torch.sin(t).sum() for t in results)

    def along(function):
        gradient = torch.func.grad(function, tuple(range(len(variables))))
        return lambda *values: sum((g * d).sum() for g, d in zip(gradient(*values), directions, strict=True))

    def by_autograd(order):
        values = [t.clone().requires_grad_() for t in variables]
        with fusedrnn.engine("reference"):
            out, (h,), _ = fusedrnn.functional.sequence(
                fusedrnn.cells.CELLS["gru"], values[0], (values[1],), values[2:]
            )
        number = torch.sin(out).sum() + torch.sin(h).sum()
        for _ in range(order):
            grads = torch.autograd.grad(number, values, create_graph=True)
            number = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
        return torch.autograd.grad(number, values)

    function, order = (along(loss), 1) if nesting == "reverse over reverse" else (along(along(loss)), 2)
    got = torch.func.grad(function, tuple(range(len(variables))))(*variables)
    assert_close(list(got), list(by_autograd(order)))


class TestForwardMode:
    """An operator of torch without a rule for it would return a tangent of zero without a word."""

    def test_layer_called_directly(self):
        args = arguments("lstm")
        v = torch.randn_like(args[1])
        results = OPERATORS.layer(*args)
        u = [torch.randn_like(t) for t in results]
        expected = (torch.autograd.grad(results, args[1], u)[0] * v).sum()
        with forward_ad.dual_level():
            duals = OPERATORS.layer(args[0], forward_ad.make_dual(args[1].detach(), v), *args[2:])
            tangents = [forward_ad.unpack_dual(t).tangent for t in duals]
        assert_close(sum((a * b).sum() for a, b in zip(u, tangents, strict=True)), expected)

    def test_what_is_traced_for_backward_refuses(self):
        args = arguments("gru")
        traced = backward_arguments(args, "cpu")
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(args[1].detach(), torch.ones_like(args[1]))
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                OPERATORS.layer_with_saved(args[0], dual, *args[2:], "cpu")
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                OPERATORS.layer_backward(traced[0], args[0], dual, *traced[3:])

    def test_backward_of_a_call_made_outside(self):
        """Tangents of the results' gradients alone."""
        module = fusedrnn.GRU(I, H, dtype=torch.float64)
        x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
        out, _ = module(x)
        u, v = torch.randn_like(out), torch.randn_like(out)
        with forward_ad.dual_level():
            (grad,) = torch.autograd.grad(out, x, forward_ad.make_dual(u, v), retain_graph=True)
            tangent = forward_ad.unpack_dual(grad).tangent
        assert_close(tangent, torch.autograd.grad(out, x, v)[0])


class TestVmap:
    @later_torch
    def test_lengths_shared_by_the_members(self):
        cell, x, *rest = arguments("gru", sizes=[2, 2, 1])
        xs = torch.randn(3, *x.shape, dtype=x.dtype)
        got = torch.func.vmap(lambda x: tuple(OPERATORS.layer(cell, x, *rest)))(xs)
        expected = [OPERATORS.layer(cell, x, *rest) for x in xs]
        assert_close(list(got), [torch.stack(r) for r in zip(*expected, strict=True)])

    def test_nested(self):
        module = fusedrnn.LSTM(I, H, dtype=torch.float64)
        x = torch.randn(2, 3, T, B, I, dtype=torch.float64)
        got = torch.func.vmap(torch.func.vmap(lambda x: module(x)[0]))(x)
        assert_close(got, torch.stack([torch.stack([module(b)[0] for b in a]) for a in x]))

    def test_gradient_through_it(self):
        module = fusedrnn.LSTM(I, H, dtype=torch.float64)
        x = torch.randn(3, T, B, I, dtype=torch.float64)
        mapped = torch.func.vmap(lambda x: module(x)[0])(x)
        expected = torch.stack([module(member)[0] for member in x])
        got, want = (torch.autograd.grad(t.sin().sum(), list(module.parameters())) for t in (mapped, expected))
        assert_close(got, want)

    @pytest.mark.parametrize("mapped", ["vectors", "inputs"])
    def test_vjp_of_many_vectors_and_inputs(self, mapped):
        """Saved values serve many vectors of one forward; many inputs are computed anew."""
        module = fusedrnn.GRU(I, H, dtype=torch.float64)
        weights = {name: p.detach() for name, p in module.named_parameters()}
        x = torch.randn(3, T, B, I, dtype=torch.float64)
        u = torch.randn(3, T, B, H, dtype=torch.float64)

        def run(x):
            return torch.func.vjp(lambda w, x: torch.func.functional_call(module, w, (x,))[0], weights, x)[1]

        if mapped == "vectors":
            got, expected = torch.func.vmap(run(x[0]))(u), [run(x[0])(v) for v in u]
        else:
            got, expected = (
                torch.func.vmap(lambda x, v: run(x)(v))(x, u),
                [run(a)(v) for a, v in zip(x, u, strict=True)],
            )
        stacked = torch.utils._pytree.tree_map(lambda *ts: torch.stack(ts), *expected)
        assert_close(got, stacked)
