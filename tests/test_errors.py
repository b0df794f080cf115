"""Wrong calls, one fault at a time: the error that torch.nn gives, in words that name the fault, at every level."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import CELL_MODULES, MODULES, the_long_way
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn

T, B, I, H, L, D = 5, 3, 4, 6, 2, 2

# Stock torch says so of itself, at the first such call.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


@pytest.fixture(params=MODULES)
def name(request):
    return request.param


@pytest.fixture(params=CELL_MODULES)
def cell_name(request):
    return request.param


def first(hx, change):
    """``hx`` with its first, perhaps only, state changed."""
    return (change(hx[0]), *hx[1:]) if isinstance(hx, tuple) else change(hx)


def last(hx, change):
    """``hx`` with its last, perhaps only, state changed."""
    return (*hx[:-1], change(hx[-1])) if isinstance(hx, tuple) else change(hx)


def every(hx, change):
    """``hx`` with all its states changed."""
    return tuple(map(change, hx)) if isinstance(hx, tuple) else change(hx)


def pack(x, lengths=(5, 3, 2)):
    return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=lengths[0] == T)


def values(*shape, **kwargs):
    return torch.randn(*shape, **kwargs)


@dataclass(frozen=True)
class Fault:
    """What is done to a good call, and what the message must name.

    Attributes:
        spoil: ``(input, hx) -> (input, hx)``.
        says: a regular expression, searched in the message regardless of case.
        ours: the error where torch raises another by accident, or none, for the modules in ``where``.
    """

    spoil: Callable[[Any, Any], tuple[Any, Any]]
    says: str
    ours: type[Exception] = RuntimeError
    where: tuple[str, ...] = ()


SEQUENCE_FAULTS = {
    "features": Fault(lambda x, hx: (values(T, B, I + 1), hx), r"input.*4.*5"),
    "features_unbatched": Fault(lambda x, hx: (values(T, I + 1), None), r"input.*4.*5"),
    "rank_0": Fault(lambda x, hx: (values(()), None), "input to be 2D or 3D, got 0D"),
    "rank_1": Fault(lambda x, hx: (values(I), hx), "input to be 2D or 3D, got 1D"),
    "rank_4": Fault(lambda x, hx: (values(1, T, B, I), hx), "input to be 2D or 3D, got 4D"),
    "no_steps": Fault(lambda x, hx: (x[:0], hx), "sequence length to be larger than 0"),
    "float64": Fault(lambda x, hx: (x.double(), hx), r"dtype.*float64"),
    "float16": Fault(lambda x, hx: (x.half(), None), r"dtype.*float16"),
    "integer": Fault(lambda x, hx: (x.long(), hx), r"dtype.*int64"),
    "boolean": Fault(lambda x, hx: (x > 0, hx), r"dtype.*bool"),
    "complex": Fault(lambda x, hx: (x.cfloat(), hx), r"dtype.*complex64"),
    "meta": Fault(lambda x, hx: (x.to("meta"), hx), "meta"),
    "list": Fault(lambda x, hx: (x.tolist(), hx), "list"),
    "numpy": Fault(lambda x, hx: (x.numpy(), hx), "ndarray"),
    "none": Fault(lambda x, hx: (None, hx), "NoneType"),
    "hx_width": Fault(lambda x, hx: (x, first(hx, lambda h: values(L * D, B, H + 1))), r"\(4, 3, 6\).*4, 3, 7"),
    "hx_batch": Fault(lambda x, hx: (x, first(hx, lambda h: values(L * D, B + 1, H))), r"\(4, 3, 6\).*4, 4, 6"),
    "hx_one_row": Fault(lambda x, hx: (x, first(hx, lambda h: values(L * D, 1, H))), r"\(4, 3, 6\).*4, 1, 6"),
    "hx_layers": Fault(lambda x, hx: (x, first(hx, lambda h: values(L, B, H))), r"\(4, 3, 6\).*2, 3, 6"),
    "hx_last_width": Fault(lambda x, hx: (x, last(hx, lambda h: values(L * D, B, H + 1))), r"\(4, 3, 6\).*4, 3, 7"),
    "hx_last_batch": Fault(lambda x, hx: (x, last(hx, lambda h: values(L * D, B + 1, H))), r"\(4, 3, 6\).*4, 4, 6"),
    "hx_last_layers": Fault(lambda x, hx: (x, last(hx, lambda h: values(L, B, H))), r"\(4, 3, 6\).*2, 3, 6"),
    "hx_rank_4": Fault(lambda x, hx: (x, first(hx, lambda h: h[None])), "hx( and cx)? should also be 3-D.*4-D"),
    "hx_unbatched": Fault(lambda x, hx: (x, every(hx, lambda h: h[:, 0])), "hx( and cx)? should also be 3-D.*2-D"),
    "hx_last_unbatched": Fault(lambda x, hx: (x, last(hx, lambda h: h[:, 0])), "hx( and cx)? should also be 3-D.*2-D"),
    "unbatched_but_hx": Fault(lambda x, hx: (x[:, 0], hx), "hx( and cx)? should also be 2-D.*3-D"),
    "unbatched_hx_layers": Fault(
        lambda x, hx: (x[:, 0], every(hx, lambda h: values(L, H))), r"\(4, 1, 6\).*\[2, 1, 6\]"
    ),
    "unbatched_hx_width": Fault(
        lambda x, hx: (x[:, 0], every(hx, lambda h: values(L * D, H + 1))), r"\(4, 1, 6\).*\[4, 1, 7\]"
    ),
    "hx_float64": Fault(lambda x, hx: (x, first(hx, torch.Tensor.double)), "float64|double"),
    "hx_last_float64": Fault(lambda x, hx: (x, last(hx, torch.Tensor.double)), "float64|double"),
    "hx_float16": Fault(lambda x, hx: (x, first(hx, torch.Tensor.half)), "float16|half"),
    "hx_integer": Fault(lambda x, hx: (x, first(hx, torch.Tensor.long)), "int64|long"),
    "hx_complex": Fault(lambda x, hx: (x, first(hx, torch.Tensor.cfloat)), "complex"),
    "hx_meta": Fault(lambda x, hx: (x, first(hx, lambda h: h.to("meta"))), "device.*meta"),
    "hx_number": Fault(lambda x, hx: (x, 3.0), "float"),
    "hx_pair_of_pairs": Fault(lambda x, hx: (x, (hx, hx)), "tuple"),
    "hx_empty": Fault(lambda x, hx: (x, ()), "tuple"),
    "hx_too_few": Fault(lambda x, hx: (x, hx[:1]), r"tuple|\(4, 3, 6\).*1, 3, 6"),
    "hx_too_many": Fault(
        lambda x, hx: (x, (*hx, hx[0]) if isinstance(hx, tuple) else (hx, hx)), "two hidden states|tuple"
    ),
    "hx_of_another_kind": Fault(lambda x, hx: (x, hx[0] if isinstance(hx, tuple) else (hx,)), "hx should be|tuple|2-D"),
    "packed_features": Fault(lambda x, hx: (pack(values(T, B, I + 1)), hx), r"input.*4.*5", where=("LSTM",)),
    "packed_float64": Fault(lambda x, hx: (pack(x.double()), hx), r"dtype.*float64", ours=ValueError, where=("LSTM",)),
    "packed_integer": Fault(lambda x, hx: (pack(x.long()), hx), r"dtype.*int64", ours=ValueError, where=("LSTM",)),
    "packed_hx_width": Fault(
        lambda x, hx: (pack(x), first(hx, lambda h: values(L * D, B, H + 1))), r"\(4, 3, 6\).*4, 3, 7"
    ),
    "packed_hx_batch": Fault(
        lambda x, hx: (pack(x), first(hx, lambda h: values(L * D, B + 1, H))), r"\(4, 3, 6\).*4, 4, 6"
    ),
    "packed_hx_rank": Fault(
        lambda x, hx: (pack(x), first(hx, lambda h: h[:, 0])),
        r"\(4, 3, 6\).*4, 6",
        ours=RuntimeError,
        where=("LSTM",),
    ),
    "packed_unsorted_hx_batch": Fault(
        lambda x, hx: (pack(x, (1, 3, 2)), first(hx, lambda h: values(L * D, B - 1, H))), "size|range|index|bounds"
    ),
    "packed_hx_of_another_kind": Fault(
        lambda x, hx: (pack(x), hx[0] if isinstance(hx, tuple) else (hx, hx)),
        r"tuple|\(4, 3, 6\)",
        where=("LSTM",),
    ),
}

CELL_FAULTS = {
    "features": Fault(lambda x, hx: (values(B, I + 1), hx), r"input.*5.*4"),
    "features_unbatched": Fault(lambda x, hx: (values(I + 1), None), r"input.*5.*4"),
    "rank_0": Fault(lambda x, hx: (values(()), None), "input to be 1D or 2D, got 0D"),
    "rank_3": Fault(lambda x, hx: (values(1, B, I), hx), "input to be 1D or 2D, got 3D"),
    "float64": Fault(lambda x, hx: (x.double(), hx), "dtype.*float64"),
    "float16": Fault(lambda x, hx: (x.half(), None), "dtype.*float16"),
    "integer": Fault(lambda x, hx: (x.long(), hx), "dtype.*int64|no kernel for torch.int64"),
    "complex": Fault(lambda x, hx: (x.cfloat(), hx), "dtype.*complex64|no kernel for torch.complex64"),
    "meta": Fault(lambda x, hx: (x.to("meta"), hx), "meta"),
    "list": Fault(lambda x, hx: (x.tolist(), hx), "list"),
    "none": Fault(lambda x, hx: (None, hx), "NoneType"),
    "hx_width": Fault(lambda x, hx: (x, first(hx, lambda h: values(B, H + 1))), "h_?0.*7|6.*h_?0"),
    "hx_batch": Fault(lambda x, hx: (x, first(hx, lambda h: values(B + 1, H))), "h_?0.*4"),
    "hx_one_row": Fault(lambda x, hx: (x, first(hx, lambda h: values(1, H))), "h_?0.*1"),
    "hx_last_width": Fault(lambda x, hx: (x, last(hx, lambda h: values(B, H + 1))), "[hc]_?0.*7"),
    "hx_last_batch": Fault(lambda x, hx: (x, last(hx, lambda h: values(B + 1, H))), "[hc]_?0.*4"),
    "hx_rank_0": Fault(lambda x, hx: (x, first(hx, lambda h: values(()))), "h.* 1D or 2D, got 0D"),
    "hx_rank_3": Fault(lambda x, hx: (x, first(hx, lambda h: h[None])), "h.* 1D or 2D, got 3D"),
    "hx_unbatched": Fault(lambda x, hx: (x, every(hx, lambda h: h[0])), "h.* 2-D, got 1-D"),
    "unbatched_but_hx": Fault(lambda x, hx: (x[0], hx), "h.* 1-D, got 2-D"),
    "hx_float64": Fault(lambda x, hx: (x, first(hx, torch.Tensor.double)), "h_?0.*float64"),
    # torch.nn.LSTMCell would return float64 states.
    "hx_last_float64": Fault(lambda x, hx: (x, last(hx, torch.Tensor.double)), "[hc]_?0.*float64", where=("LSTMCell",)),
    "hx_integer": Fault(lambda x, hx: (x, first(hx, torch.Tensor.long)), "h_?0.*int64"),
    "hx_complex": Fault(lambda x, hx: (x, first(hx, torch.Tensor.cfloat)), "h_?0.*complex64"),
    "hx_meta": Fault(lambda x, hx: (x, first(hx, lambda h: h.to("meta"))), "device.*meta"),
    "hx_number": Fault(lambda x, hx: (x, 3.0), "float"),
    "hx_pair_of_pairs": Fault(lambda x, hx: (x, (hx, hx)), "tuple"),
    "hx_empty": Fault(lambda x, hx: (x, ()), "two hidden states|tuple"),
    "hx_too_few": Fault(lambda x, hx: (x, hx[:1]), "two hidden states|tuple|h_?0.*1"),
    "hx_too_many": Fault(
        lambda x, hx: (x, (*hx, hx[0]) if isinstance(hx, tuple) else (hx, hx)), "two hidden states|tuple"
    ),
    "hx_of_another_kind": Fault(lambda x, hx: (x, hx[0] if isinstance(hx, tuple) else (hx,)), "tuple"),
}


def sequence_call(name):
    h = values(L * D, B, H)
    return values(T, B, I), (h, values(L * D, B, H)) if name == "LSTM" else h


def cell_call(name):
    h = values(B, H)
    return values(B, I), (h, values(B, H)) if name == "LSTMCell" else h


def raised_by(call):
    with pytest.raises(Exception) as info:  # noqa: PT011 - which one is the question
        call()
    return info.value


def same_fault(theirs, ours, name, fault, call):
    """Both modules refuse the call spoiled by the fault, with the same error, and leave its tensors as they were."""
    given = fault.spoil(*call)
    before = copy.deepcopy(given)
    expected = fault.ours if name in fault.where else type(raised_by(lambda: theirs(*given)))
    error = raised_by(lambda: ours(*given))
    assert type(error) is expected, repr(error)
    assert re.search(fault.says, str(error), re.IGNORECASE | re.DOTALL), str(error)
    torch.testing.assert_close(given, before, rtol=0, atol=0)


@pytest.mark.parametrize("fault", SEQUENCE_FAULTS)
def test_sequence_module(engine, name, fault):
    theirs, ours = (getattr(library, name)(I, H, L, bidirectional=True) for library in (torch.nn, fusedrnn))
    same_fault(theirs, ours, name, SEQUENCE_FAULTS[fault], sequence_call(name))


@pytest.mark.parametrize("fault", CELL_FAULTS)
def test_cell_module(engine, cell_name, fault):
    theirs, ours = (getattr(library, cell_name)(I, H) for library in (torch.nn, fusedrnn))
    same_fault(theirs, ours, cell_name, CELL_FAULTS[fault], cell_call(cell_name))


# The first of two layers' states are those of one.
@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no_gradients"])
@pytest.mark.parametrize("fault", sorted(SEQUENCE_FAULTS.keys() - {"hx_too_few"}))
def test_one_layer(name, fault, gradients):
    """The short ways of such calls refuse what the long way does."""
    module, (x, hx) = getattr(fusedrnn, name)(I, H), sequence_call(name)
    given = SEQUENCE_FAULTS[fault].spoil(x, every(hx, lambda h: h[:1]))
    same_fault_by_the_long_way(module, given, gradients)


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no_gradients"])
@pytest.mark.parametrize("fault", CELL_FAULTS)
def test_one_step(cell_name, fault, gradients):
    module, given = getattr(fusedrnn, cell_name)(I, H), CELL_FAULTS[fault].spoil(*cell_call(cell_name))
    same_fault_by_the_long_way(module, given, gradients)


def same_fault_by_the_long_way(module, given, gradients):
    with torch.set_grad_enabled(gradients):
        error = raised_by(lambda: module(*given))
        with the_long_way():
            again = raised_by(lambda: module(*given))
    assert (type(again), str(again)) == (type(error), str(error))


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no_gradients"])
@pytest.mark.parametrize("hx", [torch.zeros(2, 1, B, H), (torch.zeros(1, B, H), None)], ids=["tensor", "half"])
def test_states_of_an_lstm(hx, gradients):
    module = fusedrnn.LSTM(I, H)
    with torch.set_grad_enabled(gradients):
        error = raised_by(lambda: module(values(T, B, I), hx))
    assert type(error) is type(raised_by(lambda: torch.nn.LSTM(I, H)(values(T, B, I), hx)))


LARGER = {
    "dtype": torch.Tensor.double,
    "rank": lambda weight: values(*weight.shape, 2),
    "shape": lambda weight: values(*weight.shape[:-1], weight.shape[-1] + 1),
    "device": lambda weight: weight.to("meta"),
}


@pytest.mark.parametrize("spoil", LARGER)
@pytest.mark.parametrize("weight", ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"])
def test_weight_of_sequence_module(engine, weight, spoil):
    """torch.nn's modules have many different errors here, or none: ours name the weight."""
    module, spoiled = fusedrnn.LSTM(I, H, proj_size=2), f"{weight}_l0"
    setattr(module, spoiled, torch.nn.Parameter(LARGER[spoil](getattr(module, spoiled).detach())))
    refusal = ValueError if (weight, spoil) == ("weight_ih", "dtype") else RuntimeError
    with pytest.raises(refusal, match=f"{weight}|weight dtype|on meta"):
        module(values(T, B, I))


@pytest.mark.parametrize("spoil", LARGER)
@pytest.mark.parametrize("weight", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
def test_weight_of_cell_module(engine, cell_name, weight, spoil):
    module = getattr(fusedrnn, cell_name)(I, H)
    setattr(module, weight, torch.nn.Parameter(LARGER[spoil](getattr(module, weight).detach())))
    with pytest.raises(RuntimeError, match=f"{weight}|on meta"):
        module(values(B, I))


@pytest.mark.parametrize("part", ["input", "hx"])
@pytest.mark.parametrize("kind", [*MODULES, *CELL_MODULES])
def test_sparse(engine, kind, part):
    """torch.nn's modules happen to take some sparse tensors: ours may as well or refuse, but not read their memory."""
    if kind in CELL_MODULES:
        module, (x, hx) = getattr(fusedrnn, kind)(I, H), cell_call(kind)
    else:
        module, (x, hx) = getattr(fusedrnn, kind)(I, H, L, bidirectional=True), sequence_call(kind)
    expected = module(x, hx)
    x, hx = (x.to_sparse(), hx) if part == "input" else (x, first(hx, torch.Tensor.to_sparse))
    with suppress(RuntimeError):
        torch.testing.assert_close(module(x, hx), expected)


def lstm_weights(features=I):
    return [values(4 * H, features), values(4 * H, H), values(4 * H), values(4 * H)]


def sizes(*values, **kwargs):
    return torch.tensor(values, **kwargs)


FUNCTIONAL_FAULTS = {
    "weights_of_numpy": (
        TypeError,
        "must be Tensors, not ndarray",
        lambda lstm: lstm(values(T, B, I), None, [w.numpy() for w in lstm_weights()]),
    ),
    "no_weight_ih": (
        RuntimeError,
        "weight_ih must be a matrix",
        lambda lstm: lstm(values(T, B, I), None, [None, *lstm_weights()[1:]]),
    ),
    "no_layers": (
        ValueError,
        "num_layers must be at least 1, got 0",
        lambda lstm: lstm(values(T, B, I), None, [], num_layers=0),
    ),
    "rank": (ValueError, "2D or 3D, got 4D", lambda lstm: lstm(values(1, T, B, I), None, lstm_weights())),
    "features": (RuntimeError, r"5.*weight_ih.*4", lambda lstm: lstm(values(T, B, I + 1), None, lstm_weights())),
    "no_steps": (RuntimeError, "sequence length", lambda lstm: lstm(values(0, B, I), None, lstm_weights())),
    "dtype": (RuntimeError, "float32.*float64", lambda lstm: lstm(values(T, B, I).double(), None, lstm_weights())),
    "hx_width": (
        RuntimeError,
        r"h_0 of shape \(1, 3, 6\), got \(1, 3, 7\)",
        lambda lstm: lstm(values(T, B, I), (values(1, B, H + 1), values(1, B, H)), lstm_weights()),
    ),
    "hx_rank": (
        RuntimeError,
        "c_0 should also be 3-D, got 2-D",
        lambda lstm: lstm(values(T, B, I), (values(1, B, H), values(B, H)), lstm_weights()),
    ),
    "hx_layers": (
        RuntimeError,
        r"h_0 of shape \(2,",
        lambda lstm: lstm(values(T, B, I), (values(1, B, H),) * 2, lstm_weights() + lstm_weights(H), num_layers=2),
    ),
    "too_few_weights": (RuntimeError, "4 weights.*got 3", lambda lstm: lstm(values(T, B, I), None, lstm_weights()[:3])),
    "weights_of_one_layer_for_two": (
        RuntimeError,
        "8 weights.*got 4",
        lambda lstm: lstm(values(T, B, I), None, lstm_weights(), num_layers=2),
    ),
    "weights_in_another_order": (
        RuntimeError,
        "weight_hh|weight_ih",
        lambda lstm: lstm(values(T, B, I), None, lstm_weights()[::-1]),
    ),
    "dropout": (
        ValueError,
        r"dropout must be in \[0, 1\], got 1.5",
        lambda lstm: lstm(values(T, B, I), None, lstm_weights(), dropout=1.5),
    ),
    "batch_sizes_dtype": (
        RuntimeError,
        "batch_sizes.*int64",
        lambda lstm: lstm(values(3, I), None, lstm_weights(), batch_sizes=sizes(2, 1, dtype=torch.int32)),
    ),
    "batch_sizes_sum": (
        RuntimeError,
        "batch_sizes add up to 3.*4",
        lambda lstm: lstm(values(4, I), None, lstm_weights(), batch_sizes=sizes(2, 1)),
    ),
    "batch_sizes_rise": (
        RuntimeError,
        "batch_sizes.*rise",
        lambda lstm: lstm(values(3, I), None, lstm_weights(), batch_sizes=sizes(1, 2)),
    ),
    "batch_sizes_zero": (
        RuntimeError,
        "batch_sizes.*positive",
        lambda lstm: lstm(values(3, I), None, lstm_weights(), batch_sizes=sizes(2, 1, 0)),
    ),
    "batch_sizes_empty": (
        RuntimeError,
        "sequence length|batch_sizes",
        lambda lstm: lstm(values(0, I), None, lstm_weights(), batch_sizes=sizes(dtype=torch.int64)),
    ),
    "batch_sizes_negative": (
        RuntimeError,
        "batch_sizes.*positive",
        lambda lstm: lstm(values(3, I), None, lstm_weights(), batch_sizes=sizes(4, -1)),
    ),
    "packed_rank": (
        RuntimeError,
        "input must have 2 dimensions",
        lambda lstm: lstm(values(3, 1, I), None, lstm_weights(), batch_sizes=sizes(2, 1)),
    ),
}


@pytest.mark.parametrize("fault", FUNCTIONAL_FAULTS)
def test_function(engine, fault):
    error, says, call = FUNCTIONAL_FAULTS[fault]
    with pytest.raises(error, match=f"(?s){says}"):
        call(fusedrnn.functional.lstm)


def test_unknown_nonlinearity():
    weights = [values(H, I), values(H, H)]
    with pytest.raises(ValueError, match="'sigmoid'"):
        fusedrnn.functional.rnn(values(T, B, I), None, weights, bias=False, nonlinearity="sigmoid")
    with pytest.raises(ValueError, match="'sigmoid'"):
        fusedrnn.functional.rnn_cell(values(B, I), None, *weights, nonlinearity="sigmoid")
    same_error(lambda library: library.RNNCell(I, H, nonlinearity="sigmoid")(values(B, I)))


def test_projection_is_for_an_lstm_only(engine):
    weights = [values(3 * H, I), values(3 * H, 2), values(2, H)]
    with pytest.raises(RuntimeError, match="only supported for LSTM"):
        fusedrnn.functional.network(
            fusedrnn.cells.CELLS["gru"], values(T, B, I), (None,), weights, bias=False, projected=True
        )


@pytest.mark.parametrize("grad", [True, False])
def test_biases_without_dimensions(engine, grad):
    weights = [values(3 * H, I), values(3 * H, H), values(()), values(())]
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"bias_ih of shape \(18,\), got \(\)"):
        fusedrnn.functional.gru_cell(values(B, I), None, *weights)


def test_one_bias_without_the_other(engine):
    with pytest.raises(RuntimeError, match="bias_ih and bias_hh"):
        fusedrnn.functional.gru_cell(values(B, I), None, values(3 * H, I), values(3 * H, H), values(3 * H))


def same_error(call):
    """What torch.nn raises, to the letter."""
    theirs, ours = (raised_by(lambda library=library: call(library)) for library in (torch.nn, fusedrnn))
    assert (type(ours), str(ours)) == (type(theirs), str(theirs))


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 0},
        {"hidden_size": -1},
        {"hidden_size": 2.0},
        {"hidden_size": "4"},
        {"input_size": -1},
        {"num_layers": 0},
        {"num_layers": 1.5},
        {"dropout": -0.1},
        {"dropout": 2},
        {"dropout": True},
        {"dropout": "much"},
        {"proj_size": -1},
        {"proj_size": H},
        {"nonlinearity": "sigmoid"},
        {"no_such_option": 1},
    ],
    ids=str,
)
def test_constructor(name, options):
    same_error(lambda library: getattr(library, name)(**{"input_size": I, "hidden_size": H} | options))


@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_constructor_refuses_projection(name):
    same_error(lambda library: getattr(library, name)(I, H, proj_size=2))


@pytest.mark.parametrize("options", [{"hidden_size": -1}, {"hidden_size": "4"}, {"no_such_option": 1}], ids=str)
def test_cell_constructor(cell_name, options):
    same_error(lambda library: getattr(library, cell_name)(**{"input_size": I, "hidden_size": H} | options))


def test_constructor_warns_of_dropout_without_a_layer_after_it(name):
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        getattr(fusedrnn, name)(I, H, dropout=0.5)


@pytest.mark.parametrize("lengths", [None, sizes(3, 4)])
@pytest.mark.parametrize("grad", [True, False])
def test_too_large(name, lengths, grad):
    """Without the memory for it the error is torch's, though some of the memory is not."""
    x = values(1, 1, 1).expand(1 << 58, 2, 1)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"can't allocate memory|overflow"):
        getattr(fusedrnn, name)(1, 1)(x, lengths=lengths)


def test_no_rows(engine, name):
    """An empty batch is no fault."""
    theirs, ours = (getattr(library, name)(I, H, L, bidirectional=True) for library in (torch.nn, fusedrnn))
    x, hx = sequence_call(name)
    x, hx = x[:, :0].requires_grad_(), every(hx, lambda h: h[:, :0])
    for states in (None, hx):
        torch.testing.assert_close(ours(x, states), theirs(x, states))
    # Without elements any strides are contiguous.
    ours(x, every(hx, lambda h: h.repeat(1, 1, 2)[..., ::2]))[0].sum().backward()
    assert x.grad.shape == x.shape
    assert all(not p.grad.any() for p in ours.parameters())


def test_no_rows_of_a_cell(engine, cell_name):
    theirs, ours = (getattr(library, cell_name)(I, H) for library in (torch.nn, fusedrnn))
    x, hx = cell_call(cell_name)
    for states in (None, every(hx, lambda h: h[:0])):
        torch.testing.assert_close(ours(x[:0], states), theirs(x[:0], states))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 1e-40])
@pytest.mark.parametrize("place", ["input", "hx", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0"])
@pytest.mark.parametrize("kind", ["RNN_tanh", "RNN_relu", "LSTM", "GRU"])
def test_extreme_values(engine, kind, place, value):
    """NaN, infinity, the huge and the subnormal go where they go in torch.nn, and stay in their row."""
    name, _, nonlinearity = kind.partition("_")
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    theirs, ours = (getattr(library, name)(I, 19, **options) for library in (torch.nn, fusedrnn))
    ours.load_state_dict(theirs.state_dict())
    h = values(1, B, 19)
    x, hx = values(T, B, I), (h, values(1, B, 19)) if name == "LSTM" else h
    with torch.no_grad():
        if place == "input":
            x[1, 1, 0] = value
        elif place == "hx":
            h[0, 1, 0] = value
        else:
            for module in (theirs, ours):
                getattr(module, place).view(-1)[0] = value
    x.requires_grad_()
    expected, got = theirs(x, hx), ours(x, hx)
    # Where large numbers cancel, float32 keeps few digits.
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5, equal_nan=True)
    got[0].sum().backward()
