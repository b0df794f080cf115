"""Derivatives of every order and kind, by engine: numerically, and against torch.nn in float64."""

from __future__ import annotations

import pytest
import torch
from support import CELL_KINDS, KINDS, SEQUENCE_KINDS, build, call_of, flat, loss_of, twins
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close

import fusedrnn

# Stock torch says so of itself, at the first such call.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

I, H = 2, 4
#: Modules and how they are called.
CALLS = [
    *((kind, layout) for kind in SEQUENCE_KINDS for layout in ("dense", "packed")),
    *((k, "cell") for k in CELL_KINDS),
]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def batch_of(kind):
    return (2,) if kind in CELL_KINDS else (3, 2)


def packed(x):
    return PackedSequence(x.flatten(0, 1)[:5], torch.tensor([2, 2, 1]))


def function_of(module, layout, hx):
    """The module as a function of tensors: input, states, parameters."""
    names = [name for name, _ in module.named_parameters()]
    count = len(flat([hx]))

    def function(x, *rest):
        given = packed(x) if layout == "packed" else x
        states = rest[:count] if isinstance(hx, tuple) else rest[0]
        return flat(torch.func.functional_call(module, dict(zip(names, rest[count:], strict=True)), (given, states)))

    return function


def variables_of(module, call):
    return [t.detach().requires_grad_() for t in (*flat(call), *module.parameters())]


@pytest.mark.parametrize(("kind", "layout"), CALLS)
class TestNumerically:
    def test_first_derivatives(self, engine, kind, layout):
        module = build(fusedrnn, kind, I, H, dtype=torch.float64)
        call = call_of(module, *batch_of(kind))
        assert gradcheck(lambda *v: tuple(function_of(module, layout, call[1])(*v)), variables_of(module, call))

    def test_second_derivatives(self, engine, kind, layout):
        module = build(fusedrnn, kind, I, H, dtype=torch.float64)
        call = call_of(module, *batch_of(kind))
        function = function_of(module, layout, call[1])
        assert gradgradcheck(lambda *v: tuple(function(*v)), variables_of(module, call), fast_mode=True)


def derivatives(module, call, order):
    """Gradients of a number made of the gradients of the order before, and first of the results."""
    variables = [*flat(call), *module.parameters()]
    tensors = flat(module(*call))
    for _ in range(order):
        loss = loss_of([torch.sin(t) for t in tensors])
        grads = torch.autograd.grad(loss, variables, create_graph=True, allow_unused=True)
        tensors = [torch.zeros_like(v) if g is None else g for v, g in zip(variables, grads, strict=True)]
    return tensors


class TestHigherOrders:
    @pytest.mark.parametrize("order", [1, 2, 3])
    @pytest.mark.parametrize(("kind", "layout"), CALLS)
    def test_as_torchs(self, engine, kind, layout, order):
        theirs, ours = twins(kind, I, H, dtype=torch.float64)
        x, hx = call_of(ours, *batch_of(kind), requires_grad=True)
        call = (packed(x) if layout == "packed" else x, hx)
        assert_close(derivatives(ours, call, order), derivatives(theirs, call, order))

    @pytest.mark.parametrize("kind", SEQUENCE_KINDS)
    def test_through_layers_and_directions(self, engine, kind):
        theirs, ours = twins(kind, I, H, 2, bidirectional=True, dtype=torch.float64)
        call = call_of(ours, 3, 2, requires_grad=True)
        assert_close(derivatives(ours, call, 2), derivatives(theirs, call, 2))

    def test_gradient_penalty(self, engine, kind):
        """The gradient of the squared norm of the input's gradient, from one result at a time."""
        theirs, ours = twins(kind, I, H, dtype=torch.float64)
        x, hx = call_of(ours, *batch_of(kind))
        x.requires_grad_()
        for parameter in (*theirs.parameters(), *ours.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        for k in range(len(flat(ours(x, hx)))):
            for module in (theirs, ours):
                module.zero_grad(set_to_none=False)
                (grad,) = torch.autograd.grad(flat(module(x, hx))[k].sum(), x, create_graph=True)
                grad.square().sum().backward()
            assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])

    def test_graph_made_but_not_used(self, engine, kind):
        """create_graph changes no first derivative."""
        module = build(fusedrnn, kind, I, H)
        call = call_of(module, *batch_of(kind), requires_grad=True)
        loss, variables = loss_of(module(*call)), [*flat(call), *module.parameters()]
        plain = torch.autograd.grad(loss, variables, retain_graph=True)
        assert_close(torch.autograd.grad(loss, variables, create_graph=True), plain)


# Forward mode compiles some of torch's own decompositions so.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
class TestTransforms:
    """torch.func, forward mode and batched gradients: operators with rules for them, or the reference."""

    def test_explain_says_so(self):
        module, heard = fusedrnn.GRU(I, H), []
        torch.func.vmap(lambda x: heard.append(fusedrnn.explain(module, x)) or x)(torch.randn(5, 3, 2, I))
        (decision,) = heard[0].decisions
        assert decision.engine == "cpu"
        assert "B=10" in decision.layer  # the five members are more rows of one call
        assert "called as an operator of torch (torch.ops.fusedrnn)" in decision.reasons
        with forward_ad.dual_level():
            (decision,) = fusedrnn.explain(module, torch.randn(3, 2, I)).decisions
        assert decision.engine == "reference"
        assert "not cpu: inside forward-mode differentiation" in decision.reasons

    def test_vmap_over_inputs(self, kind):
        module = build(fusedrnn, kind, I, H, dtype=torch.float64)
        x, hx = call_of(module, *batch_of(kind))
        inputs = torch.randn(5, *x.shape, dtype=x.dtype)
        got = torch.func.vmap(lambda x: tuple(flat(module(x, hx))))(inputs)
        assert_close(list(got), [torch.stack(ts) for ts in zip(*(flat(module(x, hx)) for x in inputs), strict=True)])

    def test_vmap_over_an_ensemble(self, kind):
        theirs = [build(torch.nn, kind, I, H, dtype=torch.float64) for _ in range(3)]
        for module in theirs:
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter)
        weights, buffers = torch.func.stack_module_state(theirs)
        skeleton = build(fusedrnn, kind, I, H, device="meta")
        x, hx = call_of(theirs[0], *batch_of(kind))
        got = torch.func.vmap(lambda w, b: tuple(flat(torch.func.functional_call(skeleton, (w, b), (x, hx)))))(
            weights, buffers
        )
        assert_close(list(got), [torch.stack(ts) for ts in zip(*(flat(m(x, hx)) for m in theirs), strict=True)])

    def test_gradient_of_each_sample(self, kind):
        module = build(fusedrnn, kind, I, H, dtype=torch.float64)
        x, hx = call_of(module, *batch_of(kind))
        inputs, weights = torch.randn(5, *x.shape, dtype=x.dtype), dict(module.named_parameters())

        def loss(weights, x):
            return loss_of(torch.func.functional_call(module, weights, (x, hx)))

        got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, inputs)
        for name, grads in got.items():
            for x, grad in zip(inputs, grads, strict=True):
                assert_close(grad, torch.autograd.grad(loss(weights, x), weights[name])[0])

    def test_jvp_is_adjoint_to_backward(self, kind):
        """<u, J v> = <J' u, v>, by torch.func and by dual numbers."""
        module = build(fusedrnn, kind, I, H, dtype=torch.float64)
        x, hx = call_of(module, *batch_of(kind), requires_grad=True)
        v, results = torch.randn_like(x), flat(module(x, hx))
        u = [torch.randn_like(r) for r in results]
        expected = (torch.autograd.grad(results, x, u)[0] * v).sum()
        _, tangents = torch.func.jvp(lambda x: tuple(flat(module(x, hx))), (x,), (v,))
        assert_close(sum((a * b).sum() for a, b in zip(u, tangents, strict=True)), expected)
        with forward_ad.dual_level():
            duals = flat(module(forward_ad.make_dual(x, v), hx))
            tangents = [forward_ad.unpack_dual(d).tangent for d in duals]
            assert_close(sum((a * b).sum() for a, b in zip(u, tangents, strict=True)), expected)

    def test_jacobians_and_hessians(self, kind):
        theirs, ours = twins(kind, I, H, dtype=torch.float64)
        x, hx = call_of(ours, *batch_of(kind))

        def of(module):
            return lambda x: loss_of([torch.sin(t) for t in flat(module(x, hx))])

        expected = torch.autograd.functional.hessian(of(theirs), x)
        assert_close(torch.func.hessian(of(ours))(x), expected)
        assert_close(torch.func.jacrev(torch.func.jacrev(of(ours)))(x), expected)
        assert_close(torch.autograd.functional.hessian(of(ours), x), expected)

    def test_gradients_of_a_batch_of_vectors(self, engine, kind):
        """Backward under vmap, as ``torch.autograd.functional.jacobian(..., vectorize=True)`` runs it."""
        module = build(fusedrnn, kind, I, H, dtype=torch.float64)
        x, hx = call_of(module, *batch_of(kind), requires_grad=True)
        result = flat(module(x, hx))[0]
        vectors = torch.randn(3, *result.shape, dtype=result.dtype)
        (got,) = torch.autograd.grad(result, x, vectors, is_grads_batched=True, retain_graph=True)
        assert not got.requires_grad
        expected = [torch.autograd.grad(result, x, v, retain_graph=True)[0] for v in vectors]
        assert_close(got, torch.stack(expected))
