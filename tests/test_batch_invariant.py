"""A sequence's results do not depend on the batch around it, where that is asked for: not by a bit."""

from __future__ import annotations

import pytest
import torch
from support import SEQUENCE_KINDS, TARGETS, build, run_script, threads

import fusedrnn

COMPILED = [target for target in TARGETS if target.engine == "cpu"]
#: One row goes the way of the few; 40 rows of a small layer project their inputs within the step.
T, I, H, MOST = 9, 21, 37, 40
#: So large that several threads share the units of few rows, and that products take K in several stretches.
LARGE = 260

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


def run(module, x, first, last, count):
    """Of rows [first, last) of x the output without and with gradients, the gradient of the input, the final states."""
    x = x[:, first:last].contiguous()
    with threads(count):
        with torch.no_grad():
            plain, _ = module(x)
        x.requires_grad_()
        output, final = module(x)
        final = final if isinstance(final, tuple) else (final,)
        (d_x,) = torch.autograd.grad(output.square().sum(), x)
    return [tensor.detach() for tensor in (plain, output, d_x, *final)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SEQUENCE_KINDS)
@pytest.mark.parametrize("target", COMPILED, ids=str)
def test_rows_alone_and_among_others(target, kind, dtype):
    module, x = build(fusedrnn, kind, I, H, bidirectional=True, dtype=dtype), torch.randn(T, MOST, I, dtype=dtype)
    with target.running(), fusedrnn.batch_invariant(True):
        together = run(module, x, 0, MOST, 2)
        for first, last, count in ((0, 1, 1), (0, 1, 2), (7, 10, 1), (7, 10, 2), (3, 16, 2), (20, 39, 1)):
            for whole, part in zip(together, run(module, x, first, last, count), strict=True):
                assert torch.equal(whole[:, first:last], part), (first, last, count)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {}),
        ("GRU", {}),
        ("RNN", {}),
        ("LSTM", {"save": "states", "proj_size": 100}),
        ("GRU", {"save": "states", "num_layers": 2}),
        ("LSTM", {"zoneout": 0.2}),
    ],
    ids=str,
)
def test_large_layers(kind, options):
    module, x = getattr(fusedrnn, kind)(LARGE, LARGE, **options).eval(), torch.randn(T, MOST, LARGE)
    with fusedrnn.batch_invariant(True):
        together = run(module, x, 0, MOST, 2)
        for first, last, count in ((0, 1, 1), (0, 1, 2), (5, 7, 2), (3, 16, 2)):
            for whole, part in zip(together, run(module, x, first, last, count), strict=True):
                assert torch.equal(whole[:, first:last], part), (first, last, count)


@pytest.mark.parametrize("target", COMPILED, ids=str)
def test_cells(target):
    module, x = fusedrnn.LSTMCell(I, H), torch.randn(MOST, I)
    with target.running(), fusedrnn.batch_invariant(True), torch.no_grad():
        together = module(x)
        for first, last in ((0, 1), (5, 13), (2, 40)):
            for whole, part in zip(together, module(x[first:last]), strict=True):
                assert torch.equal(whole[first:last], part)


def test_lengths():
    module, x = fusedrnn.GRU(I, H), torch.randn(T, MOST, I)
    lengths = torch.randint(1, T + 1, (MOST,))
    with fusedrnn.batch_invariant(True), torch.no_grad():
        together, _ = module(x, lengths=lengths)
        for b, length in enumerate(lengths.tolist()):
            assert torch.equal(together[:length, b], module(x[:length, b])[0])


def test_the_mode():
    module, x = fusedrnn.GRU(I, H), torch.randn(T, 1, I)
    assert "batch-invariant" not in str(fusedrnn.explain(module, x))
    with fusedrnn.batch_invariant(True):
        assert "batch-invariant" in str(fusedrnn.explain(module, x))
        with fusedrnn.batch_invariant(False):
            assert "batch-invariant" not in str(fusedrnn.explain(module, x))
        assert "batch-invariant" in str(fusedrnn.explain(module, x))
    assert "batch-invariant" not in str(fusedrnn.explain(module, x))


def test_without_the_engine():
    script = run_script(
        """
        import sys
        sys.modules["fusedrnn._cpu"] = None
        import fusedrnn
        try:
            fusedrnn.batch_invariant(True)
        except RuntimeError as error:
            assert "batch_invariant needs the engine cpu" in str(error), error
        else:
            raise AssertionError("no error")
        """
    )
    assert script.returncode == 0, script.stderr
