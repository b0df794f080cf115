"""Lengths, resets, reset states and the states of every step: every engine against the oracle, and as users call them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from pairwise import pairwise
from support import CELLS, TARGETS, Target, assert_near, threads, to_numpy, weights_of
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
    kernels = [(t, c, d) for t in TARGETS for c in CELLS for d in (torch.float32, torch.float64)]
    kernels = [kernel for kernel in kernels if kernel[0].engine != "torch"]  # which has none of all this
    cases = []
    for seed, case in enumerate(pairwise({"kernel": kernels, "projected": ON_OFF} | OPTIONS)):
        target, cell, dtype = case.pop("kernel")
        case["projected"] &= cell == "lstm" and case["shape"][3] > 1
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
    tolerance = torch.finfo(case.dtype).eps * case.layers * (16 + ((I + H) ** 0.5 + (T * B) ** 0.5) / 2)
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
