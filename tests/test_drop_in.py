"""The modules stand in for torch.nn's: same weights, same results, same life in a larger program."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support import (
    CELL_KINDS,
    ENGINES,
    KINDS,
    SEQUENCE_KINDS,
    assert_equal,
    backward,
    build,
    call_of,
    flat,
    instruction_set,
    loss_of,
    run_script,
    the_long_way,
    twins,
)
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import fusedrnn

# Stock torch says so of itself, at the first such call.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

T, B, I, H = 6, 4, 5, 7
LENGTHS = {"sorted": [6, 4, 4, 1], "unsorted": [2, 6, 1, 5]}


@pytest.fixture(params=KINDS)
def kind(request):
    """Every module."""
    return request.param


@pytest.fixture(params=SEQUENCE_KINDS)
def sequence_kind(request):
    return request.param


def batch_of(kind):
    return (B,) if kind in CELL_KINDS else (T, B)


def pack(x, order, batch_first=False):
    return pack_padded_sequence(x, torch.tensor(LENGTHS[order]), batch_first, enforce_sorted=order == "sorted")


class TestConstruction:
    def test_same_initial_weights(self, kind):
        theirs, ours = twins(kind, I, H)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert_equal(dict(ours.state_dict()), dict(theirs.state_dict()))

    @pytest.mark.parametrize("options", [{}, {"bias": False}, {"dtype": torch.float64}, {"device": "meta"}], ids=str)
    def test_same_appearance(self, kind, options):
        if kind in SEQUENCE_KINDS:
            options = options | {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.25}
        theirs, ours = twins(kind, I, H, **options)
        assert repr(ours) == repr(theirs)
        assert isinstance(ours, type(theirs))
        assert type(ours).__name__ == type(theirs).__name__
        plain = {key: value for key, value in vars(theirs).items() if isinstance(value, int | float | str)}
        assert plain == {key: getattr(ours, key) for key in plain}
        assert [(n, p.shape, p.dtype, p.device) for n, p in ours.named_parameters()] == [
            (n, p.shape, p.dtype, p.device) for n, p in theirs.named_parameters()
        ]

    def test_all_weights_and_flatten_parameters(self, sequence_kind):
        theirs, ours = twins(sequence_kind, I, H, 2)
        ours.flatten_parameters()
        assert_equal(ours.all_weights, theirs.all_weights)

    def test_state_dict_both_ways(self, kind):
        theirs, ours = twins(kind, I, H)
        other, another = build(torch.nn, kind, I, H), build(fusedrnn, kind, I, H)
        for module in (theirs, ours):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter)
        other.load_state_dict(ours.state_dict())
        another.load_state_dict(theirs.state_dict())
        assert_equal(dict(other.state_dict()), dict(ours.state_dict()))
        assert_equal(dict(another.state_dict()), dict(theirs.state_dict()))

    def test_reset_parameters_called_from_the_constructor_of_a_subclass(self):
        class Mine(fusedrnn.LSTM):
            def reset_parameters(self):
                for parameter in self.parameters():
                    torch.nn.init.constant_(parameter, 0.5)

        assert all((p == 0.5).all() for p in Mine(I, H).parameters())


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
class TestSameResults:
    """Outputs, states and gradients as torch.nn's, in float64 to the precision that a sum's order leaves."""

    @pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
    def test_cell(self, engine, train, hx):
        for kind in CELL_KINDS:
            theirs, ours = (module.train(train) for module in twins(kind, I, H, dtype=torch.float64))
            for rows in ((), (B,)):
                call = call_of(ours, *rows, requires_grad=True)
                call = call if hx else call[:1]
                assert_close(backward(ours, *call), backward(theirs, *call))

    @pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "time_first"])
    @pytest.mark.parametrize("layout", ["dense", "unbatched", "sorted", "unsorted"])
    def test_sequence(self, engine, sequence_kind, layout, batch_first, train):
        theirs, ours = (
            module.train(train)
            for module in twins(
                sequence_kind, I, H, 2, bidirectional=True, batch_first=batch_first, dtype=torch.float64
            )
        )
        x, hx = call_of(ours, *(T,) if layout == "unbatched" else (T, B), requires_grad=True)
        x = x.transpose(0, 1) if batch_first and layout != "unbatched" else x
        given = pack(x, layout, batch_first) if layout in LENGTHS else x
        for call in ((given,), (given, hx), (given, None)):
            assert_close(backward(ours, *call), backward(theirs, *call))

    @pytest.mark.parametrize("layout", ["dense", "unsorted"])
    def test_dropout_with_the_same_seed(self, engine, sequence_kind, layout, train):
        theirs, ours = (
            module.train(train) for module in twins(sequence_kind, I, H, 3, dropout=0.4, dtype=torch.float64)
        )
        x, hx = call_of(ours, T, B, requires_grad=True)
        call = (pack(x, layout) if layout in LENGTHS else x, hx)
        results = []
        for module in (theirs, ours, ours):
            torch.manual_seed(2)
            results.append(backward(module, *call))
        assert_close(results[1], results[0])
        assert_equal(results[2], results[1])
        assert train == (not torch.equal(ours(*call)[0][0], ours(*call)[0][0]))


class TestShortWay:
    """One layer or step of training goes straight to autograd, with the results of the long way."""

    @pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
    @pytest.mark.parametrize(
        "options", [{}, {"batch_first": True}, {"bidirectional": True}, {"bias": False}], ids="".join
    )
    def test_sequence(self, sequence_kind, options, hx, monkeypatch):
        module = build(fusedrnn, sequence_kind, I, H, **options)
        x, states = call_of(module, T, B, requires_grad=True)
        x = x.transpose(0, 1) if options.get("batch_first") else x
        self.same_as_the_long_way(module, (x, states) if hx else (x,), monkeypatch)

    @pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
    def test_cell(self, bias, hx, monkeypatch):
        for kind in CELL_KINDS:
            module = build(fusedrnn, kind, I, H, bias=bias)
            x, states = call_of(module, B, requires_grad=True)
            self.same_as_the_long_way(module, (x, states) if hx else (x,), monkeypatch)

    def same_as_the_long_way(self, module, call, monkeypatch):
        with the_long_way():
            want = backward(module, *call)
        monkeypatch.setattr(fusedrnn.functional, "run", None)
        assert_equal(backward(module, *call), want)
        monkeypatch.undo()

    @pytest.mark.parametrize(
        ("module", "x"),
        [
            (fusedrnn.LSTM(I, H, 2), torch.randn(T, B, I)),
            (fusedrnn.LSTM(I, H).half(), torch.randn(T, B, I).half()),
            (fusedrnn.LSTM(I, H).requires_grad_(False), torch.randn(T, B, I)),
            (fusedrnn.LSTM(I, H, zoneout=0.1), torch.randn(T, B, I)),
            (fusedrnn.LSTM(I, H), torch.randn(T, I)),
            (fusedrnn.LSTMCell(I, H), torch.randn(I)),
        ],
        ids=["layers", "float16", "frozen", "zoneout", "unbatched", "unbatched cell"],
    )
    def test_other_calls_do_not(self, module, x, monkeypatch):
        monkeypatch.setattr("fusedrnn.route._apply_express", None)
        module(x)

    @pytest.mark.parametrize("kind", ["LSTM", "batch_first", "GRU", "LSTMCell", "GRUCell"])
    def test_whatever_is_asked_of_its_gradients(self, kind):
        first = kind == "batch_first"
        module = build(
            fusedrnn, "LSTM" if first else kind, I, H, dtype=torch.float64, **{"batch_first": True} if first else {}
        )
        step = kind in CELL_KINDS
        x, hx = call_of(module, *(B,) if step else (T, B), requires_grad=True)
        states = hx if isinstance(hx, tuple) else (hx,)
        x = x.detach().transpose(0, 1).contiguous().requires_grad_() if first else x

        def run(x, *states):
            return flat(module(x, states if len(states) > 1 else states[0]))

        tensors = (x, *states)
        outputs = run(*tensors)
        assert all(type(o.grad_fn).__name__ == "ExpressBackward" for o in outputs)
        assert torch.autograd.gradcheck(run, tensors, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(run, tensors)
        # Gradients that are marked, or have no memory of their own for each value.
        for grads in (
            [torch.ones(()).double().expand_as(o) for o in outputs],
            [torch.randn(*o.shape, dtype=torch.complex128).conj().imag for o in outputs],
            [torch._efficientzerotensor(o.shape, dtype=o.dtype) for o in outputs],
        ):
            plain = [g.clone(memory_format=torch.contiguous_format) + 0 for g in grads]
            want = torch.autograd.grad(outputs, tensors, plain, retain_graph=True)
            assert_equal(torch.autograd.grad(outputs, tensors, grads, retain_graph=True), want)

    def test_what_torch_func_has_left_behind(self):
        left, module, x = [], fusedrnn.LSTM(I, H), torch.randn(T, B, I)
        torch.func.grad(lambda x: left.append(x) or x.sum())(x)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert_equal(module(left[0]), module(x))


class TestPacked:
    @pytest.mark.parametrize("order", LENGTHS)
    def test_packed_in_packed_out(self, engine, sequence_kind, order):
        module = build(fusedrnn, sequence_kind, I, H)
        packed = pack(torch.randn(T, B, I), order)
        output, _ = module(packed)
        assert isinstance(output, PackedSequence)
        for got, given in zip(output[1:], packed[1:], strict=True):
            assert got is given

    def test_gradient_with_respect_to_packed_data(self, engine, sequence_kind):
        theirs, ours = twins(sequence_kind, I, H, dtype=torch.float64)
        data = torch.randn(9, I, dtype=torch.float64, requires_grad=True)
        packed = PackedSequence(data, torch.tensor([4, 3, 2]))
        assert_close(backward(ours, packed), backward(theirs, packed))


class TestCopies:
    """Whatever makes a module out of a module."""

    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
    )
    def test_duplicate(self, engine, kind, duplicate):
        module = build(fusedrnn, kind, I, H)
        call = call_of(module, *batch_of(kind))
        other = duplicate(module)
        assert type(other) is type(module)
        assert_equal(other(*call), module(*call))
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert next(module.parameters()).any()
        assert not torch.equal(flat(other(*call))[0], flat(module(*call))[0])

    def test_save_and_load(self, kind):
        module = build(fusedrnn, kind, I, H)
        call = call_of(module, *batch_of(kind))
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        assert_equal(torch.load(file, weights_only=False)(*call), module(*call))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_to_dtype(self, engine, kind, dtype):
        theirs, ours = (module.to(dtype) for module in twins(kind, I, H))
        call = call_of(ours, *batch_of(kind), requires_grad=True)
        got, expected = backward(ours, *call), backward(theirs, *call)
        assert {t.dtype for t in got.values()} == {dtype}
        # torch rounds after each operation, we at the end of a layer: some units in the last place.
        tolerance = 0 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
        for name, want in expected.items():
            assert_close(got[name], want, rtol=1e-7 + tolerance, atol=1e-7 + tolerance * want.abs().max().item())

    def test_module_keeps_running_through_changes_of_dtype(self, engine, kind):
        module = build(fusedrnn, kind, I, H)
        call = call_of(module, *batch_of(kind))
        before = module(*call)
        module.double()
        assert {t.dtype for t in flat(module(*call_of(module, *batch_of(kind))))} == {torch.float64}
        assert_equal(module.float()(*call), before)


def weight_names(kind):
    return ("weight_ih", "weight_hh") if kind in CELL_KINDS else ("weight_ih_l0", "weight_hh_l0")


class TestWeights:
    """Weights that are not what the constructor put there."""

    def test_data_assigned(self, engine, kind):
        theirs, ours = twins(kind, I, H, dtype=torch.float64)
        call = call_of(ours, *batch_of(kind), requires_grad=True)
        ours(*call)
        for name in weight_names(kind):
            new = torch.randn_like(getattr(ours, name))
            for module in (theirs, ours):
                getattr(module, name).data = new
        assert_close(backward(ours, *call), backward(theirs, *call))

    def test_edited_in_place_between_calls(self, engine, kind):
        theirs, ours = twins(kind, I, H, dtype=torch.float64)
        call = call_of(ours, *batch_of(kind), requires_grad=True)
        for module in (theirs, ours):
            module(*call)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(1.5)
        assert_close(backward(ours, *call), backward(theirs, *call))

    def test_replaced_by_a_tensor_that_is_no_parameter(self, engine, kind):
        """As weight drop does."""
        theirs, ours = twins(kind, I, H, dtype=torch.float64)
        call = call_of(ours, *batch_of(kind))
        name = weight_names(kind)[1]
        raw = torch.nn.Parameter(getattr(ours, name).detach())
        mask = torch.arange(raw.shape[1]) % 2
        grads = []
        for module in (theirs, ours):
            delattr(module, name)
            setattr(module, name, raw * mask)
            grads.append(torch.autograd.grad(loss_of(module(*call)), [raw, *module.parameters()]))
        assert_close(*grads)
        assert grads[0][0].any()

    @pytest.mark.parametrize("kind", CELL_KINDS | SEQUENCE_KINDS)
    @pytest.mark.parametrize(
        "parametrization", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
    )
    def test_parametrized(self, engine, kind, parametrization):
        """torch.nn's modules run on with the weights they were parametrized from: compare with the plain equivalent."""
        theirs, ours = (module.eval() for module in twins(kind, I, H, dtype=torch.float64))
        call = call_of(ours, *batch_of(kind), requires_grad=True)
        name = weight_names(kind)[1]
        parametrization(ours, name)
        assert isinstance(ours, type(theirs))
        with torch.no_grad():
            for parameter in ours.parametrizations[name].parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        weight = getattr(ours, name)
        expected = torch.func.functional_call(theirs, {name: weight}, call)
        got = ours(*call)
        assert_close(got, expected)
        originals = [p for p in ours.parametrizations[name].parameters() if p.requires_grad]
        assert_close(torch.autograd.grad(loss_of(got), originals), torch.autograd.grad(loss_of(expected), originals))
        parametrize.remove_parametrizations(ours, name)
        assert_close(ours(*call), expected)

    def test_functional_call(self, engine, kind):
        theirs, ours = twins(kind, I, H, dtype=torch.float64)
        call = call_of(ours, *batch_of(kind))
        before = ours(*call)
        weights = {name: torch.randn_like(p).requires_grad_() for name, p in ours.named_parameters()}
        results = [torch.func.functional_call(module, weights, call) for module in (theirs, ours)]
        assert_close(*results)
        assert_close(*(torch.autograd.grad(loss_of(r), list(weights.values())) for r in results))
        assert_equal(ours(*call), before)

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "LSTM_projected"])  # its shapes differ
    def test_tied(self, engine, kind):
        """One parameter in two places gets the gradients of both."""
        theirs, ours = twins(kind, H, H, dtype=torch.float64)
        call = call_of(ours, *batch_of(kind))
        for module in (theirs, ours):
            ih, hh = weight_names(kind)
            setattr(module, hh, getattr(module, ih))
        assert_close(backward(ours, *call), backward(theirs, *call))

    def test_exactly_the_gradients_that_are_wanted(self, engine, kind):
        """Of the input, of one state, of one parameter alone."""
        theirs, ours = (module.requires_grad_(False) for module in twins(kind, I, H, dtype=torch.float64))
        x, hx = call_of(ours, *batch_of(kind))
        assert not any(t.requires_grad for t in flat(ours(x, hx)))
        shared = [(tensor, tensor) for tensor in flat((x, hx))]
        for pair in (*shared, *zip(theirs.parameters(), ours.parameters(), strict=True)):
            for tensor in pair:
                tensor.requires_grad_()
            expected, got = (backward(module, x, hx) for module in (theirs, ours))
            assert sum(name.startswith("gradient") for name in got) == 1
            assert_close(got, expected)
            for tensor in pair:
                tensor.requires_grad_(False)


def outcome(call):
    """What a call returns or raises."""
    try:
        return call()
    except RuntimeError as error:
        return error


class TestMemory:
    """Whose memory is whose, and when it may change."""

    @pytest.mark.parametrize("edited", [(0,), (1,), (0, 1)], ids=["output", "state", "both"])
    def test_results_edited_in_place(self, engine, kind, edited):
        """Where torch.nn gets gradients after it, ours are the same; elsewhere ours are right or refused, as there."""
        theirs, ours = twins(kind, I, H, dtype=torch.float64)
        call = call_of(ours, *batch_of(kind))

        def grads(module, in_place):
            results = flat(module(*call))
            for k in edited:
                if k < len(results):
                    if in_place:
                        results[k].mul_(3)
                    else:
                        results[k] = results[k] * 3
            return torch.autograd.grad(loss_of(results), list(module.parameters()))

        got = outcome(lambda: grads(ours, in_place=True))
        if isinstance(got, RuntimeError):
            assert "inplace operation" in str(got)
            assert isinstance(outcome(lambda: grads(theirs, in_place=True)), RuntimeError)
        else:
            assert_close(got, grads(theirs, in_place=False))

    @pytest.mark.parametrize("grad", [True, False])
    def test_marked_as_negated_or_zero(self, engine, kind, grad):
        """Of such tensors the memory does not hold the values, or there is none."""
        ours = build(fusedrnn, kind, I, H)
        call = call_of(ours, *batch_of(kind), requires_grad=False)
        marks = [
            (lambda t: torch._neg_view(-t), lambda t: t),
            (lambda t: torch.complex(t, -t).conj().imag, lambda t: t),
        ]
        if engine != "torch":  # stock torch reads what is not there
            marks.append((lambda t: torch._efficientzerotensor(t.shape), torch.zeros_like))
            # Torch adds a view's offset to the address that there is none of.
            marks.append((lambda t: torch._efficientzerotensor((2, *t.shape))[1], torch.zeros_like))
        for mark, same in marks:
            for part in range(2):
                marked, plain = ([tree_map(f, v) if k == part else v for k, v in enumerate(call)] for f in (mark, same))
                with torch.set_grad_enabled(grad):
                    assert_close(ours(*marked), ours(*plain))
        if grad:
            output = flat(ours(*call))[0]
            weight = next(ours.parameters())
            expected = torch.autograd.grad(output, weight, torch.ones_like(output), retain_graph=True)
            assert_close(torch.autograd.grad(output, weight, torch._neg_view(-torch.ones_like(output))), expected)
        negated = build(fusedrnn, kind, I, H)
        for parameter in negated.parameters():
            parameter.data = torch._neg_view(-parameter.detach())
        with torch.set_grad_enabled(grad):
            assert_close(negated(*call), ours(*call))

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("part", ["input", "weight"])
    def test_freed(self, kind, part, grad):
        ours = build(fusedrnn, kind, I, H)
        x, *_ = call_of(ours, *batch_of(kind), requires_grad=False)
        with torch.set_grad_enabled(grad):
            freed = x if part == "input" else next(ours.parameters())
            views = (x, x[1:]) if part == "input" else (x,)
            freed.untyped_storage().resize_(0)
            for given in views:
                with pytest.raises(RuntimeError, match=r"storage has been freed|out of bounds for storage of size 0"):
                    ours(given)

    @pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
    @pytest.mark.parametrize("order", [None, *LENGTHS])
    def test_final_states_own_their_storage(self, engine, sequence_kind, order, grad):
        module = build(fusedrnn, sequence_kind, I, H)
        x, hx = call_of(module, T, B)
        given = pack(x, order) if order else x
        kept = [t.clone() for t in flat(hx)]
        with torch.set_grad_enabled(grad):
            output, final = module(given, hx)
        snapshot = flat(output)[0].clone()
        for state in flat(final):
            with torch.no_grad():
                state.fill_(7)
        assert_equal(flat(output)[0], snapshot)
        assert_equal(flat(hx), kept)
        storages = [t.untyped_storage().data_ptr() for t in (*flat(output), *flat(final), *flat(hx), x)]
        assert len(set(storages)) == len(storages)

    def test_weight_edited_between_forward_and_backward(self, engine, kind):
        module = build(fusedrnn, kind, I, H)
        x, hx = call_of(module, *batch_of(kind), requires_grad=True)
        loss = loss_of(module(x, hx))
        with torch.no_grad():
            getattr(module, weight_names(kind)[1]).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_module_converted_between_forward_and_backward(self, kind):
        module = build(fusedrnn, kind, I, H)
        loss = loss_of(module(*call_of(module, *batch_of(kind))))
        module.double()
        with pytest.raises(RuntimeError, match=r"weight_ih has dtype torch.float64, but input has torch.float32"):
            loss.backward()

    def test_input_edited_between_forward_and_backward(self, engine, kind):
        module = build(fusedrnn, kind, I, H)
        x, hx = call_of(module, *batch_of(kind))
        loss = loss_of(module(x, hx))
        x.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_backward_twice(self, engine, kind):
        module = build(fusedrnn, kind, I, H)
        x, hx = call_of(module, *batch_of(kind), requires_grad=True)
        leaves = [x, *flat([hx]), *module.parameters()]
        loss = loss_of(module(x, hx))
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert_equal(torch.autograd.grad(loss, leaves), first)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, leaves)

    def test_no_grad(self, engine, kind):
        module = build(fusedrnn, kind, I, H)
        call = call_of(module, *batch_of(kind), requires_grad=True)
        expected = module(*call)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                results = module(*call)
                assert all(t.is_inference() == torch.is_inference_mode_enabled() for t in flat(results))
            assert not any(t.requires_grad for t in flat(results))
            assert_close(results, expected)

    def test_inference_tensor_cannot_be_saved_for_backward(self, engine, kind):
        module = build(fusedrnn, kind, I, H)
        with torch.inference_mode():
            call = call_of(module, *batch_of(kind))
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            module(*call)

    def test_state_carried_with_and_without_detaching(self, engine, kind):
        """Truncated backpropagation: gradients of a detached state stop there, of others flow on."""
        theirs, ours = twins(kind, I, H, dtype=torch.float64)
        x, _ = call_of(ours, *batch_of(kind))

        def last(result):
            return result[1] if kind in SEQUENCE_KINDS else result

        def detached(hx):
            return tuple(h.detach() for h in hx) if isinstance(hx, tuple) else hx.detach()

        grads = []
        for module in (theirs, ours):
            state = last(module(x))
            for carried in (state, detached(state)):
                loss = loss_of(module(x, carried))
                grads.append(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True))
        assert_close(grads[2:], grads[:2])
        assert not torch.equal(grads[0][0], grads[1][0])


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("kind", "layout"), [*((kind, "dense") for kind in KINDS), *((kind, "packed") for kind in SEQUENCE_KINDS)]
    )
    def test_dtypes_are_torchs(self, kind, layout, dtype):
        theirs, ours = twins(kind, I, H, dtype=dtype)
        x, hx = call_of(ours, *batch_of(kind), requires_grad=True)
        x = pack(x, "sorted") if layout == "packed" else x
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected, got = outcome(lambda: theirs(x, hx)), ours(x, hx)
        if isinstance(expected, RuntimeError):
            # oneDNN has no LSTM in bfloat16 for processors without support of it; where it has, it returns bfloat16.
            assert "could not create a primitive descriptor" in str(expected)
            assert {t.dtype for t in flat(got)} == {torch.bfloat16}
        else:
            assert [t.dtype for t in flat(got)] == [t.dtype for t in flat(expected)]

    def test_results_and_gradients(self, engine, kind):
        theirs, ours = twins(kind, I, H)
        call = call_of(ours, *batch_of(kind), requires_grad=True)
        expected = backward(theirs, *call)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = backward(ours, *call)
        for name, want in expected.items():
            if name.startswith("gradient"):
                assert got[name].dtype == torch.float32
            assert_close(got[name].float(), want, rtol=0, atol=0.05 * want.abs().max().item())


@pytest.mark.filterwarnings("ignore:dropout option adds dropout:UserWarning")
class TestConvert:
    def model(self):
        shared = torch.nn.GRU(I, I)
        return torch.nn.ModuleDict(
            {
                "rnn": torch.nn.RNN(I, H),
                "lstm": torch.nn.LSTM(I, H, 2, dropout=0.3, bidirectional=True),
                "nested": torch.nn.Sequential(torch.nn.Linear(I, I), shared, torch.nn.GRUCell(I, H)),
                "again": shared,
                "rnn_cell": torch.nn.RNNCell(I, H, nonlinearity="relu"),
                "lstm_cell": torch.nn.LSTMCell(I, H, bias=False),
            }
        )

    def test_there_and_back(self):
        model = self.model()
        modules, parameters = list(model.modules()), list(model.parameters())
        classes = [type(m) for m in modules]
        state = {name: t.clone() for name, t in model.state_dict().items()}
        text = repr(model)
        assert fusedrnn.convert(model) is model
        ours = [m for m in model.modules() if isinstance(m, torch.nn.RNNBase | torch.nn.RNNCellBase)]
        assert len(ours) == 6
        assert all(type(m).__module__ == "fusedrnn.nn" for m in ours)
        assert model["again"] is model["nested"][1]
        assert repr(model) == text
        assert fusedrnn.revert(model) is model
        assert [type(m) for m in model.modules()] == classes
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert_equal(dict(model.state_dict()), state)

    def test_a_module_itself(self, kind):
        theirs, ours = twins(kind, I, H, dtype=torch.float64)
        call = call_of(theirs, *batch_of(kind))
        assert type(fusedrnn.convert(theirs)) is type(ours)
        assert_equal(theirs(*call), ours(*call))
        assert type(fusedrnn.revert(theirs)).__module__.startswith("torch.nn")

    def test_twice_is_once(self):
        model = fusedrnn.convert(fusedrnn.convert(self.model()))
        assert type(model["lstm"]) is fusedrnn.LSTM
        assert type(fusedrnn.revert(fusedrnn.revert(model))["lstm"]) is torch.nn.LSTM

    def test_training_goes_on(self, engine):
        """Train flags, hooks and the optimizer's parameters are the module's before and after."""
        model = self.model()
        model["lstm"].eval()
        heard = []
        model["lstm"].register_forward_hook(lambda module, given, result: heard.append(type(module)))
        model["lstm"].register_forward_pre_hook(lambda module, given: (2 * given[0],))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        x = torch.randn(T, B, I)
        expected, _ = model["lstm"](x)
        fusedrnn.convert(model)
        assert not model["lstm"].training
        assert model["rnn"].training
        result, _ = model["lstm"](x)
        assert_close(result, expected)
        assert heard == [torch.nn.LSTM, fusedrnn.LSTM]
        before = model["lstm"].weight_hh_l1.clone()
        result.sum().backward()
        optimizer.step()
        assert not torch.equal(model["lstm"].weight_hh_l1, before)

    def test_subclasses(self):
        """Converted unless their forward is their own; they keep what is, through pickle and copies too."""
        module = Remembering(I, H)
        call = call_of(module, T, B)
        expected = module(*call)
        assert fusedrnn.convert(module) is module
        assert isinstance(module, Remembering)
        assert isinstance(module, fusedrnn.LSTM)
        assert type(module).__name__ == "Remembering"
        assert module.remembers()
        for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(other) is type(module)
            assert_close(other(*call), expected)
            assert len(fusedrnn.explain(other, *call).decisions) == 1
        assert type(fusedrnn.revert(module)) is Remembering

    def test_left_alone(self):
        class Own(torch.nn.LSTM):
            def forward(self, input):
                return super().forward(input)[0]

        class Ours(fusedrnn.LSTM):
            pass

        with pytest.warns(DeprecationWarning, match="torch.jit.script"):
            scripted = torch.jit.script(torch.nn.GRU(I, H))
        replaced = torch.nn.RNN(I, H)
        replaced.forward = lambda x: x
        with pytest.warns(UserWarning, match="quantized tensor creation functions"):
            quantised = torch.ao.nn.quantized.dynamic.LSTM(I, H)
        model = torch.nn.ModuleDict(
            {
                "own": Own(I, H),
                "scripted": scripted,
                "parametrised": parametrizations.weight_norm(torch.nn.GRU(I, H), "weight_hh_l0"),
                "quantised": quantised,
                "replaced": replaced,
                "ours": Ours(I, H),
                "stock": torch.nn.GRUCell(I, H),
            }
        )
        classes = {name: type(m) for name, m in model.items()}
        reasons = {f.name: (f.verdict, f.reason) for f in fusedrnn.survey(model).findings}
        assert reasons.pop("stock") == ("convertible", "")
        assert reasons.pop("ours") == ("fusedrnn", "")
        assert {verdict for verdict, _ in reasons.values()} == {"left alone"}
        for name, word in {
            "own": "own forward",
            "scripted": "scripted",
            "parametrised": "before registering",
            "quantised": "quantised",
            "replaced": "replaced",
        }.items():
            assert word in reasons[name][1]
        fusedrnn.convert(model)
        classes["stock"] = fusedrnn.GRUCell
        assert {name: type(m) for name, m in model.items()} == classes
        assert type(fusedrnn.revert(Ours(I, H))) is Ours

    def test_says_what_it_did(self, capsys):
        fusedrnn.convert(torch.nn.Sequential(torch.nn.LSTM(I, H), torch.nn.Linear(H, H)), verbose=True)
        assert capsys.readouterr().out == "0 (torch.nn.modules.rnn.LSTM): converted\n"
        assert str(fusedrnn.survey(torch.nn.Linear(I, H))) == "no recurrent module"


class Remembering(torch.nn.LSTM):
    """A subclass that changes everything but the forward."""

    def reset_parameters(self):
        super().reset_parameters()
        self.bias_ih_l0.data[self.hidden_size : 2 * self.hidden_size] += 2

    def remembers(self):
        return True


class TestPatch:
    def test_everything_of_torch_inside_the_block(self, kind):
        class Doubling(torch.nn.GRU):
            def forward(self, input):
                return 2 * super().forward(input)[0]

        theirs, _ = twins(kind, I, H, dtype=torch.float64)
        call = call_of(theirs, *batch_of(kind), requires_grad=True)
        doubling, x = Doubling(I, H), torch.randn(T, B, I)
        expected, doubled = backward(theirs, *call), doubling(x)
        forward = type(theirs).forward
        with fusedrnn.patch():
            assert len(fusedrnn.explain(theirs, *call).decisions) == 1
            assert fusedrnn.explain(theirs, *call).stock == ()
            assert_close(backward(theirs, *call), expected)
            assert_close(doubling(x), doubled)
            assert type(theirs) is getattr(torch.nn, type(theirs).__name__)
            with fusedrnn.patch():
                pass
            assert len(fusedrnn.explain(theirs, *call).decisions) == 1
        assert type(theirs).forward is forward
        assert fusedrnn.explain(theirs, *call).decisions == ()

    def test_ends_with_an_exception(self):
        before = {name: dict(vars(getattr(torch.nn, name))) for name in ("LSTM", "GRUCell")}
        with pytest.raises(KeyError), fusedrnn.patch():
            raise KeyError
        assert before == {name: dict(vars(getattr(torch.nn, name))) for name in ("LSTM", "GRUCell")}

    def test_ends_with_the_last_of_overlapping_blocks(self):
        """As threads may leave them, in another order than they entered them."""
        before, ours = torch.nn.LSTM.forward, fusedrnn.LSTM.forward
        first, second = fusedrnn.patch(), fusedrnn.patch()
        first.__enter__()
        second.__enter__()
        assert torch.nn.LSTM.forward is ours
        first.__exit__(None, None, None)
        assert torch.nn.LSTM.forward is ours
        second.__exit__(None, None, None)
        assert torch.nn.LSTM.forward is before


class TestExplain:
    def test_says_which_engine_ran_every_layer(self, engine):
        module = fusedrnn.LSTM(I, H, 2, bidirectional=True, proj_size=3)
        explanation = fusedrnn.explain(module, torch.randn(T, B, I))
        assert [d.engine for d in explanation.decisions] == [engine, engine]
        first, second = (d.layer for d in explanation.decisions)
        for fact in (
            "lstm",
            f"T={T}",
            f"B={B}",
            f"I={I}",
            f"H={H}",
            "float32",
            "cpu",
            "projected to 3",
            "bidirectional",
        ):
            assert fact in first
        assert "I=6" in second
        text = str(explanation)
        assert f"engine {engine}" in text
        assert "asked for" in text

    def test_says_packed_and_cells(self):
        explanation = fusedrnn.explain(fusedrnn.GRU(I, H), pack(torch.randn(T, B, I), "unsorted"))
        assert "packed" in str(explanation)
        assert "T=1" in str(fusedrnn.explain(fusedrnn.GRUCell(I, H), torch.randn(B, I)))

    def test_says_why_not_the_preferred_engine(self):
        module = fusedrnn.GRU(I, H, device="meta")
        (decision,) = fusedrnn.explain(module, torch.randn(T, B, I, device="meta")).decisions
        assert decision.engine == "torch"
        assert "not cpu: input is on meta" in decision.reasons
        assert "stock torch" in decision.kernel

    @pytest.mark.parametrize(
        ("name", "dtype"), [("cpu", torch.float16), ("numba", torch.float16), ("numba", torch.bfloat16)]
    )
    def test_says_what_is_converted(self, name, dtype):
        with fusedrnn.engine(name):
            explanation = fusedrnn.explain(fusedrnn.GRU(I, H, dtype=dtype), torch.randn(T, B, I, dtype=dtype))
        assert f"{dtype} is converted to torch.float32" in str(explanation)

    def test_says_how_bfloat16_is_multiplied(self):
        from fusedrnn import _cpu

        module, x = fusedrnn.GRU(I, H, dtype=torch.bfloat16), torch.randn(T, B, I).bfloat16()
        for isa in _cpu.isas():
            with fusedrnn.engine("cpu"), instruction_set(isa):
                (decision,) = fusedrnn.explain(module, x).decisions
            assert isa in decision.kernel
            assert not decision.reasons or decision.reasons == ("asked for by fusedrnn.engine or FUSEDRNN_ENGINE",)
            assert ("factors of bfloat16" in decision.kernel) == (isa == "avx512bf16")
            assert ("factors widened from bfloat16" in decision.kernel) == (isa != "avx512bf16")

    def test_names_modules_that_are_not_ours(self):
        model = torch.nn.ModuleDict({"theirs": torch.nn.GRU(I, H), "ours": fusedrnn.GRU(I, H)})
        model.forward = lambda x: (model["theirs"](x), model["ours"](x))
        explanation = fusedrnn.explain(model, torch.randn(T, B, I))
        assert explanation.stock == ("theirs",)
        assert len(explanation.decisions) == 1
        assert "convert" in str(explanation)

    def test_no_recurrent_layer(self):
        assert str(fusedrnn.explain(torch.nn.Linear(2, 3), torch.randn(4, 2))) == "no recurrent layer ran"

    def test_leaves_no_trace(self):
        module = fusedrnn.LSTM(I, H, 2, dropout=0.5)
        state = torch.get_rng_state()
        fusedrnn.explain(module, torch.randn(T, B, I, generator=torch.Generator().manual_seed(0)))
        assert_equal(torch.get_rng_state(), state)
        with pytest.raises(RuntimeError, match="input"):
            fusedrnn.explain(module, torch.randn(T, B, I + 1))
        with pytest.raises(RuntimeError, match="input"):
            module(torch.randn(T, B, I + 1))
        assert len(fusedrnn.explain(module, torch.randn(T, B, I), hx=None).decisions) == 2


def test_info():
    info = fusedrnn.info()
    text = str(info)
    assert info.versions == {
        "fusedrnn": fusedrnn.__version__,
        "torch": torch.__version__,
        "python": info.versions["python"],
    }
    assert info.threads == torch.get_num_threads()
    for fact in (*info.versions.values(), info.processor, *info.engines.values(), *info.engines):
        assert fact in text


class TestEngineChoice:
    def used(self):
        (decision,) = fusedrnn.explain(fusedrnn.GRU(I, H), torch.randn(T, B, I)).decisions
        return decision.engine

    def test_nests_and_ends(self):
        automatic = self.used()
        with fusedrnn.engine("reference"):
            with fusedrnn.engine("torch"):
                assert self.used() == "torch"
                with fusedrnn.engine("auto"):
                    assert self.used() == automatic
                assert self.used() == "torch"
            assert self.used() == "reference"
        assert self.used() == automatic

    def test_ends_with_an_exception(self):
        automatic = self.used()
        with pytest.raises(KeyError), fusedrnn.engine("reference"):
            raise KeyError
        assert self.used() == automatic

    def test_automatic_choice_is_the_compiled_engine(self):
        assert self.used() == "cpu"

    @pytest.mark.parametrize("name", ["gpu", "", "CPU"])
    def test_unknown(self, name):
        with pytest.raises(ValueError, match=f"unknown engine '{name}'; choose one of auto, cpu, cuda, numba"):
            fusedrnn.engine(name).__enter__()

    @pytest.mark.parametrize("name", ["cpu", "numba"])
    def test_forced_but_unable(self, name):
        module = fusedrnn.GRU(I, H, device="meta")
        with (
            fusedrnn.engine(name),
            pytest.raises(RuntimeError, match=f"engine '{name}' was asked for .* input is on meta"),
        ):
            module(torch.randn(T, B, I, device="meta"))
        module, x = fusedrnn.GRUCell(I, H), torch.randn(3, B, I)
        with fusedrnn.engine(name):
            assert_close(torch.func.vmap(module)(x), torch.stack([module(rows) for rows in x]))

    def test_backward_runs_on_the_engine_of_forward(self, kind):
        module = build(fusedrnn, kind, I, H)
        call = call_of(module, *batch_of(kind))
        for name in ENGINES:
            with fusedrnn.engine(name):
                loss = loss_of(module(*call))
                expected = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
            with fusedrnn.engine("reference"):
                assert_equal(torch.autograd.grad(loss, list(module.parameters())), expected)


USED = """
    import fusedrnn, torch
    (decision,) = fusedrnn.explain(fusedrnn.GRU(3, 4), torch.randn(2, 1, 3)).decisions
    print(decision.engine, decision.kernel)
"""


class TestEnvironment:
    def test_engine(self):
        result = run_script(USED, FUSEDRNN_ENGINE="reference")
        assert result.stdout.startswith("reference "), result.stderr

    def test_unknown_engine(self):
        result = run_script("import fusedrnn", FUSEDRNN_ENGINE="gpu")
        assert result.returncode != 0
        assert "ValueError: FUSEDRNN_ENGINE: unknown engine 'gpu'; choose one of auto, cpu" in result.stderr

    def test_instruction_set(self):
        result = run_script(USED, FUSEDRNN_ISA="baseline")
        assert result.stdout.startswith("cpu "), result.stderr
        assert "baseline" in result.stdout

    def test_unknown_instruction_set(self):
        result = run_script(USED, FUSEDRNN_ISA="sse9")
        assert result.returncode != 0
        assert "FUSEDRNN_ISA is sse9, but this machine runs only: " in result.stderr
        assert "baseline" in result.stderr

    def test_info_with_an_unknown_instruction_set(self):
        result = run_script("import fusedrnn; print(fusedrnn.info())", FUSEDRNN_ISA="sse9")
        assert "sse9" in result.stdout, result.stderr
