"""A sequence piece by piece: truncated backpropagation through time against its definition, and streaming inference."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from support import assert_near, build, flat, to_numpy, weights_of

import fusedrnn

KINDS = {"RNN_tanh": "rnn_tanh", "LSTM": "lstm", "LSTM_projected": "lstm", "GRU": "gru"}
T, B, I, H = 11, 3, 4, 6


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def module_of(kind: str, *args: Any, **options: Any) -> torch.nn.Module:
    return build(fusedrnn, kind, I, H, *args, dtype=torch.float64, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k1", "k2"), [(1, 1), (3, 3), (2, 5), (4, 7), (5, 100), (20, 20)])
def test_gradients_are_those_of_the_definition(engine, kind, k1, k2):
    """BPTT(h; h'): every k1 steps the errors of the last k1 steps go back through the last k2 steps."""
    module, x = module_of(kind, 2), values(T, B, I)
    cell, weights = oracle.CELLS[KINDS[kind]], weights_of(module)
    d_output = values(T, B, module.proj_size or H)
    whole = oracle.Network(cell, to_numpy(x), None, None, weights)
    want = [np.zeros_like(to_numpy(p)) for p in module.parameters()]
    for done in range(0, T, k1):
        end = min(done + k1, T)
        start = max(0, end - k2)
        before = oracle.Network(cell, to_numpy(x[:start]), None, None, weights).final if start else None
        run = oracle.Network(cell, to_numpy(x[start:end]), None, before, weights)
        d_steps = to_numpy(d_output[start:end]).copy()
        d_steps[: done - start] = 0
        _, _, d_weights = run.backward(d_steps, [np.zeros_like(s) for s in run.final])
        found = [g for w in d_weights for g in w if g is not None]
        want = [total + d for total, d in zip(want, found, strict=True)]
    outputs, covered = [], []
    for window in fusedrnn.tbptt(module, x, k1, k2):
        (window.output * d_output[window.steps]).sum().backward()
        outputs.append(window.output.detach())
        covered += range(T)[window.steps]
        assert not any(s.requires_grad for s in flat(window.state))
    assert covered == list(range(T))
    assert_near("output", to_numpy(torch.cat(outputs)), whole.output, 1e-12)
    for state, final in zip(flat(window.state), whole.final, strict=True):
        assert_near("final state", to_numpy(state), final, 1e-12)
    for (name, parameter), gradient in zip(module.named_parameters(), want, strict=True):
        assert_near(f"gradient of {name}", to_numpy(parameter.grad), gradient, 1e-10)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_windows_with_lengths_and_resets(batch_first, learned, given):
    """The windows' outputs are those of the whole sequence, also where a segment begins with a window."""
    module = module_of("LSTM", 2, batch_first=batch_first, learn_initial_state=learned)
    for name in ("initial_h", "initial_c") if learned else ():
        torch.nn.init.normal_(getattr(module, name))
    x, resets, lengths = values(T, B, I), torch.rand(T, B) < 0.4, torch.tensor([T, 0, 7])
    options: dict[str, Any] = {"lengths": lengths, "resets": resets.t() if batch_first else resets}
    if given:
        options["reset_state"] = values(2, 1, H), values(2, 1, H)
    x = x.transpose(0, 1) if batch_first else x
    want, final = module(x, **options)
    time = 1 if batch_first else 0
    for k1, k2 in ((1, 1), (2, 5), (3, 3)):
        windows = list(fusedrnn.tbptt(module, x, k1, k2, **options))
        torch.testing.assert_close(torch.cat([w.output for w in windows], time), want)
        torch.testing.assert_close(windows[-1].state, final)


def test_windows_of_an_unbatched_input_and_of_torch(engine):
    x, hx = values(T, I), values(1, H)
    ours = module_of("GRU")
    stock = build(torch.nn, "GRU", I, H, dtype=torch.float64)
    resets = torch.rand(T) < 0.4
    for module in (ours, stock):
        output = torch.cat([w.output for w in fusedrnn.tbptt(module, x, 2, 3, hx)])
        torch.testing.assert_close(output, stock(x, hx)[0])
    if engine != "torch":
        windows = fusedrnn.tbptt(ours, x, 2, 3, hx, resets=resets)
        torch.testing.assert_close(torch.cat([w.output for w in windows]), ours(x, hx, resets=resets)[0])


def test_windows_of_a_wrapped_module():
    """What a compiled module hides, such as its learned initial state, counts as if it were not wrapped."""
    module = module_of("GRU", batch_first=True, learn_initial_state=True)
    torch.nn.init.normal_(module.initial_h)
    x, resets = values(B, T, I), torch.rand(B, T) < 0.4
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        output = torch.cat([w.output for w in fusedrnn.tbptt(compiled, x, 4, resets=resets)], 1)
    torch.testing.assert_close(output, module(x, resets=resets)[0])


def test_gradient_of_the_initial_state():
    """It reaches a given state from the windows that begin with step 0, and from no other."""
    module, x, hx = module_of("GRU"), values(T, B, I), values(1, B, H).requires_grad_()
    windows = fusedrnn.tbptt(module, x, 2, 4, hx)
    assert [torch.autograd.grad(w.output.sum(), hx, allow_unused=True)[0] is None for w in windows] == [
        False,
        False,
        *[True] * 4,
    ]


def test_weights_may_change_between_windows():
    module, x = module_of("LSTM"), values(T, B, I)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for window in fusedrnn.tbptt(module, x, 2, 5):
        optimizer.zero_grad()
        window.output.square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("k1", "k2", "message"), [(0, None, "k1 must be at least 1, got 0"), (4, 3, "k2 must be at least k1 = 4")]
)
def test_wrong_windows(k1, k2, message):
    with pytest.raises(ValueError, match=message):
        fusedrnn.tbptt(module_of("GRU"), values(T, B, I), k1, k2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_windows_with_lengths_of_few_bits(dtype):
    """A window's first step is subtracted from them, which these cannot hold."""
    module, x, lengths = module_of("GRU"), values(300, 2, I), torch.tensor([100, 3], dtype=dtype)
    output = torch.cat([w.output for w in fusedrnn.tbptt(module, x, 50, lengths=lengths)])
    torch.testing.assert_close(output, module(x, lengths=lengths)[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lengths": torch.tensor([1, 12, 3])}, RuntimeError, "lengths must be from 0 to the 11 steps .* got 12"),
        ({"lengths": torch.tensor([1, -2, 3])}, RuntimeError, "lengths must be from 0 to the 11 steps .* got -2"),
        ({"lengths": [1, 2, 3]}, TypeError, "lengths must be a Tensor, not list"),
        ({"resets": torch.zeros(13, 3, dtype=torch.bool)}, RuntimeError, r"Expected resets of shape \(11, 3\)"),
        ({"reset_state": torch.zeros(1, 1, 6)}, RuntimeError, "reset_state is given without resets"),
        ({"k2": 2.5}, TypeError, "'float' object cannot be interpreted as an integer"),
    ],
)
def test_options_that_do_not_fit_the_whole_input(options, error, message):
    """Cut to a window they would."""
    with pytest.raises(error, match=message):
        fusedrnn.tbptt(module_of("GRU"), values(11, 3, I), 2, **options)


def test_what_windows_are_not_for():
    with pytest.raises(ValueError, match="for one direction"):
        fusedrnn.tbptt(module_of("GRU", bidirectional=True), values(T, B, I), 2)
    packed = torch.nn.utils.rnn.pack_sequence([values(3, I)])
    with pytest.raises(TypeError, match="give lengths instead of a packed"):
        fusedrnn.tbptt(module_of("GRU"), packed, 2)


@pytest.mark.parametrize("kind", ["RNN_tanh", "RNN_relu", "LSTM", "LSTM_projected", "GRU"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_stream(engine, kind, bias, batched, given):
    """Step by step it gives what forward gives at once; it takes and returns the state as forward does."""
    module = module_of(kind, 2, bias=bias, dropout=0.5).eval()
    x = values(T, B, I) if batched else values(T, I)
    hx = tuple(torch.randn_like(s) for s in flat(module(x)[1])) if given else None
    hx = hx[0] if given and not kind.startswith("LSTM") else hx
    want, final = module(x, hx)
    outputs, state = [], hx
    module.train()  # no dropout in streaming
    for x_t in x:
        output, state = module.stream(x_t, state)
        outputs.append(output)
    assert not output.requires_grad
    torch.testing.assert_close(torch.stack(outputs), want)
    torch.testing.assert_close(state.hx(), final)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_stream_with_resets(learned, batched):
    module = module_of("LSTM", 2, learn_initial_state=learned)
    for name in ("initial_h", "initial_c") if learned else ():
        torch.nn.init.normal_(getattr(module, name))
    x, resets = (values(T, B, I), torch.rand(T, B) < 0.4) if batched else (values(T, I), torch.rand(T) < 0.4)
    state, outputs = None, []
    for t in range(T):
        output, state = module.stream(x[t], state, resets[t])
        outputs.append(output)
    torch.testing.assert_close(torch.stack(outputs), module(x, resets=resets)[0])


def test_stream_errors():
    with pytest.raises(RuntimeError, match="the reverse direction begins at the sequence's end"):
        module_of("GRU", bidirectional=True).stream(values(B, I))
    with pytest.raises(RuntimeError, match="Expected h of 2 layers"):
        module_of("GRU", 2).stream(values(B, I), values(1, B, H))
    with pytest.raises(RuntimeError, match="input has inconsistent input_size"):
        module_of("GRU", 2).stream(values(B, I + 1))
    for layers in (1, 3):
        _, state = module_of("GRU", layers).stream(values(B, I))
        with pytest.raises(RuntimeError, match=f"Expected a state of 2 layers, got one of {layers}"):
            module_of("GRU", 2).stream(values(B, I), state)
    with pytest.raises(RuntimeError, match="lstm expects two hidden states, got 3"):
        module_of("LSTM", 2).stream(values(B, I), (values(2, B, H),) * 3)
