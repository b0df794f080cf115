"""Dropout of recurrent networks, and what forward saves: every engine against the oracle, and as users call them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import emulated
import numpy as np
import oracle
import pytest
import torch
from pairwise import pairwise
from support import ENGINES, TARGETS, Target, assert_near, flat, has_kernel, rounding, threads, to_numpy
from support import kernels as kernels_of
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import route
from fusedrnn.bench.memory import saved_bytes
from fusedrnn.cells import CELLS as OURS
from fusedrnn.dropouts import Dropouts, stays
from fusedrnn.engines.base import Call

ON_OFF = (True, False)
KINDS = ("RNN", "LSTM", "GRU")


def test_lots():
    """The published numbers of the generator; the lots are its first 24 bits against the rate."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [int(x) for x in oracle.splitmix64(1234567, np.arange(4))] == published
    place = np.arange(100_000)
    for seed, rate in ((1234567, 0.1), (2**63 - 2, 0.9), (0, 0.5), (5, 0.0), (5, 1.0)):
        want = (oracle.splitmix64(seed, place) >> np.uint64(40)) < rate * 2**24
        got = stays(rate, torch.tensor(seed), torch.from_numpy(place)).numpy()
        assert np.array_equal(got, want)
        assert abs(got.mean() - rate) < 0.01


@dataclass(frozen=True, kw_only=True)
class Case:
    target: Target
    cell: str
    dtype: torch.dtype
    mask: bool
    zoneout: str  # "none", "drawn", "mean"
    recompute: bool
    lengths: bool
    resets: bool
    hx: bool
    every_state: bool
    directions: int
    threads: int
    shape: tuple[int, int, int, int]  # T, B, I, H
    projected: bool
    seed: int

    def __str__(self) -> str:
        return "-".join(f"{field.name}_{getattr(self, field.name)}" for field in fields(self))


OPTIONS = {
    "mask": ON_OFF,
    "zoneout": ("none", "drawn", "mean"),
    "recompute": ON_OFF,
    "lengths": ON_OFF,
    "resets": ON_OFF,
    "hx": ON_OFF,
    "every_state": ON_OFF,
    "directions": (1, 2),
    "threads": (1, 2, 3),
    "shape": (
        (1, 1, 3, 3),
        (7, 3, 5, 6),
        (300, 1, 4, 7),
        (9, 33, 3, 5),
        (40, 8, 7, 37),
        (12, 5, 37, 130),
        (70, 24, 9, 18),
    ),
    "projected": ON_OFF,
}


def sample() -> list[Case]:
    kernels = kernels_of(torch.float32, torch.float64, torch.bfloat16, targets=(*TARGETS, emulated.TARGET))
    kernels = [(t, c, d) for t, c, d in kernels if has_kernel(t, d) and t.engine != "torch"]
    cases = []
    for seed, case in enumerate(pairwise({"kernel": kernels} | OPTIONS)):
        target, cell, dtype = case.pop("kernel")
        case["projected"] &= cell == "lstm" and (case["zoneout"] == "none" or target.engine != "cpu")
        if target.engine == "cuda":  # its kernels take no more than that
            case["projected"] = case["every_state"] = False
        if target is emulated.TARGET and case["shape"][3] * case["shape"][0] > 100:  # slow there
            case["shape"] = (6, 9, 3, 10)
        cases.append(Case(target=target, cell=cell, dtype=dtype, seed=seed, **case))
    return cases


@pytest.mark.parametrize("case", sample(), ids=str)
def test_engines(case):
    """Outputs, states and all gradients of a layer, with the masks frozen."""
    torch.manual_seed(case.seed)
    rng = np.random.default_rng(case.seed)
    T, B, I, H = case.shape
    D, cell = case.directions, OURS[case.cell]
    R = (H + 1) // 2 if case.projected else H
    G, widths = len(cell.gates), [R, H][: len(cell.states)]

    def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, dtype=torch.float64)).to(case.dtype).requires_grad_()

    x = leaf(T, B, I, scale=min(1.0, (H / I) ** 0.5))
    hx = [leaf(D, B, width) for width in widths] if case.hx else []
    weights: list[torch.Tensor | None] = []
    for _ in range(D):
        scale = 0.5 * H**-0.5  # or a network of hundreds of steps is chaotic, and rounding grows
        weights += [leaf(G * H, I, scale=scale), leaf(G * H, R, scale=scale), leaf(G * H), leaf(G * H)]
        weights.append(leaf(R, H, scale=scale) if case.projected else None)
    lengths = rng.integers(0, T + 1, B) if case.lengths else None
    resets = rng.random((T, B)) < 0.2 if case.resets else None
    if resets is not None:
        resets[0] = False
    mask = 2.0 * rng.integers(0, 2, (D, B, R)) if case.mask else None
    rates = () if case.zoneout == "none" else (0.3, 0.6)[: len(widths)]
    seed = 2**62 + case.seed
    drawn = seed if case.zoneout == "drawn" else None
    shares = oracle.zoneout(rates, drawn, (D, T, B, H), widths) if rates else None

    call = Call(
        cell,
        x,
        tuple(hx) if hx else (None,) * len(widths),
        tuple(weights),
        lengths=None if lengths is None else torch.from_numpy(lengths),
        resets=None if resets is None else torch.from_numpy(resets),
        every_state=case.every_state and len(widths) > 1,
        h_mask=None if mask is None else torch.from_numpy(mask).to(case.dtype),
        zoneout=rates,
        seed=torch.tensor(seed) if case.zoneout == "drawn" else None,
        recompute=case.recompute,
    )
    with case.target.running(), threads(case.threads):
        outputs = list(route.run(call))
        d_outputs = [torch.randn_like(t) for t in outputs]
        torch.autograd.backward(outputs, d_outputs)

    def truth(cell: oracle.Cell) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        of_directions = [
            oracle.Weights(*(None if w is None else to_numpy(w) for w in weights[5 * d : 5 * d + 5])) for d in range(D)
        ]
        run = oracle.Network(
            cell,
            to_numpy(x),
            lengths,
            [to_numpy(h) for h in hx] or None,
            of_directions,
            directions=D,
            resets=resets,
            mask=mask,
            stays=shares,
        )
        d = [to_numpy(t) for t in d_outputs]
        every = d[1 : -len(widths)]
        steps = [[np.zeros_like(d[0]), *every]] if every else []
        d_x, d_hx, d_weights = run.backward(d[0], d[-len(widths) :], steps)
        want = [run.output, *(run.steps[0][1:] if every else []), *run.final]
        grads = {"input": d_x} | {f"hx {k}": g for k, g in enumerate(d_hx if hx else [])}
        return want, grads | {f"weight {k}": g for k, g in enumerate(g for w in d_weights for g in w if g is not None)}

    want, d_want = truth(oracle.CELLS[case.cell])
    tolerance = rounding(case.target, case.dtype, 1, I + H, T * B)
    for k, (got, right) in enumerate(zip(outputs, want, strict=True)):
        assert_near(f"output {k}", to_numpy(got), right, tolerance * max(np.abs(right).max(), 0.1))
    share = 0.25 * max(np.abs(g).max() for g in d_want.values())
    if case.dtype == torch.bfloat16:  # backward keeps gates rounded: a slope such as 1 - h^2 errs by half a unit of one
        share += 0.1 * max(float(d.abs().max()) for d in d_outputs)
    allowed = {key: tolerance * (np.abs(g).max() + share) for key, g in d_want.items()}
    if case.cell == "rnn_relu":  # within rounding of its kink the slope may be 0 or 1: allow what drawing lots changes
        draws = [truth(oracle.Relu(tolerance / 4, seed))[1] for seed in range(8)]
        for key, g in d_want.items():
            allowed[key] += 3 * max(np.abs(draw[key] - g).max() for draw in draws)
    leaves = [x, *hx, *(w for w in weights if w is not None)]
    for tensor, (key, g) in zip(leaves, d_want.items(), strict=True):
        assert_near(f"gradient of {key}", to_numpy(tensor.grad), g, allowed[key])


ALL: dict[str, Any] = {
    "variational_dropout": 0.3,
    "recurrent_dropout": 0.2,
    "zoneout": 0.4,
    "weight_dropout": 0.1,
}


def module_of(kind: str, *args: Any, **options: Any) -> torch.nn.Module:
    torch.manual_seed(1)
    return getattr(fusedrnn, kind)(4, 6, *args, dtype=torch.float64, **options)


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def seeded(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    return call(*args, **options)


@pytest.fixture(params=[*(engine for engine in ENGINES if engine != "torch"), "emulated"])
def dropping_engine(request):
    target = emulated.TARGET if request.param == "emulated" else Target(request.param)
    with target.running():
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_under_a_seed_on_every_engine_and_thread_count(dropping_engine, kind):
    module, x = module_of(kind, 2, bidirectional=True, **ALL), values(7, 5, 4)
    with fusedrnn.engine("reference"):
        want = flat(seeded(module, x))
    for count in (1, 2):
        with threads(count):
            torch.testing.assert_close(flat(seeded(module, x)), want)
    assert not torch.allclose(flat(module(x))[0], want[0])  # another seed, other masks
    with torch.no_grad():
        torch.testing.assert_close(flat(seeded(module, x)), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ALL)
def test_evaluation(kind, option):
    """Nothing is dropped; zoneout takes its expectation, in streaming too."""
    module, x = module_of(kind, 2, **{option: ALL[option]}).eval(), values(7, 5, 4)
    plain = module_of(kind, 2)
    want = plain(x)[0]
    got, final = module(x)
    if option != "zoneout":
        torch.testing.assert_close(got, want)
    else:
        assert not torch.allclose(got, want)
    state, outputs = None, []
    for x_t in x:
        output, state = module.train().stream(x_t, state)
        outputs.append(output)
    torch.testing.assert_close(torch.stack(outputs), got)
    torch.testing.assert_close(state.hx(), final)


def test_zoneout_of_one_keeps_the_state():
    module, x = module_of("LSTM", zoneout=(1.0, 1.0)), values(7, 5, 4)
    hx = values(1, 5, 6), values(1, 5, 6)
    for training in ON_OFF:
        output, final = module.train(training)(x, hx)
        torch.testing.assert_close(final, hx)
        torch.testing.assert_close(output, hx[0].expand(7, -1, -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_units_that_stay_do_so_whatever_the_cell_computed(dropping_engine, kind, broken):
    """And those that don't forget what they were."""
    module, x, h = module_of(kind, zoneout=0.5), values(1, 8, 4), values(1, 8, 6)
    x[:, :4] = float("nan")
    h[:, 4:] = broken
    hx = (h, h.clone()) if kind == "LSTM" else h
    with fusedrnn.engine("reference"):
        want = flat(seeded(module, x, hx))
    assert want[0][0, :4].isnan().any()
    assert want[0][0, :4].isfinite().any()
    torch.testing.assert_close(flat(seeded(module, x, hx)), want, equal_nan=True)


def test_one_variational_mask_for_a_sequence():
    """A feature of the input is there at every step, doubled, or at none."""
    module = module_of("RNN", variational_dropout=0.5, bias=False)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(6, 4))
        module.weight_hh_l0.zero_()
    seen = module(torch.full((7, 50, 4), 0.5, dtype=torch.float64))[0][..., :4].atanh()
    assert torch.equal(seen.gt(0).any(0), seen.gt(0).all(0))
    torch.testing.assert_close(seen[seen > 0], torch.ones_like(seen[seen > 0]))
    assert 0.3 < seen.gt(0).double().mean() < 0.7


def test_weight_dropout():
    """What is left of weight_hh is scaled up; the parameter stays as it is, and dropped elements have no gradient."""
    module, x = module_of("GRU", weight_dropout=0.5), values(7, 5, 4)
    before = module.weight_hh_l0.detach().clone()
    seeded(module, x)[0].sum().backward()
    assert torch.equal(module.weight_hh_l0, before)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(before, 0.5)
    assert torch.equal(module.weight_hh_l0.grad == 0, dropped == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_unbatched(dropping_engine, kind):
    """Rows of a packed batch have the masks of the sorted padded one. Lots of zoneout count its rows alike."""
    module, x, lengths = module_of(kind, 2, **ALL), values(7, 3, 4), torch.tensor([7, 5, 2])
    padded = flat(seeded(module, x, lengths=lengths))
    packed, final = seeded(module, pack_padded_sequence(x, lengths))
    torch.testing.assert_close(pad_packed_sequence(packed)[0], padded[0])
    torch.testing.assert_close(flat(final), padded[1:])
    torch.testing.assert_close(seeded(module, x[:, 0])[0], seeded(module, x[:, :1])[0][:, 0])


#: Every option along time, for a batch (3, 2).
ALONG: dict[str, Any] = {
    "lengths": torch.tensor([3, 2]),
    "resets": torch.tensor([[False, True], [True, False], [False, True]]),
    "return_states": True,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("along", [{}, ALONG], ids=["plain", "along"])
def test_derivatives_with_frozen_masks(kind, along):
    module, x = module_of(kind, 2, **ALL, save="states"), values(3, 2, 4).requires_grad_()
    hx = tuple(values(2, 2, 6).requires_grad_() for _ in range(2 if kind == "LSTM" else 1))

    def call(x: torch.Tensor, *hx: torch.Tensor) -> Any:
        return tuple(flat(seeded(module, x, hx if kind == "LSTM" else hx[0], **along)))

    torch.autograd.gradcheck(call, (x, *hx), fast_mode=True)
    torch.autograd.gradgradcheck(call, (x, *hx), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    compile_and_compare(kind)


def test_compile_on_every_engine(dropping_engine):
    compile_and_compare("GRU")


def compile_and_compare(kind: str) -> None:
    module, x = module_of(kind, 2, **ALL, save="states"), values(3, 2, 4).requires_grad_()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    want, got = (flat(seeded(m, x, **ALONG)) for m in (module, compiled))
    torch.testing.assert_close(got, want)
    losses = [sum(t.square().sum() for t in result) for result in (got, want)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, (x, *module.parameters())) for loss in losses))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_export(kind):
    """The lots are drawn anew in each call, as torch's dropout is."""
    module, x = module_of(kind, 2, **ALL, save="states"), values(3, 2, 4)
    exported = torch.export.export(module, (x,), ALONG).module()
    torch.testing.assert_close(flat(seeded(exported, x, **ALONG)), flat(seeded(module, x, **ALONG)))


@pytest.mark.parametrize("given", ON_OFF)
def test_compile_packed(given):
    """The number of rows, which shapes masks, is a value that torch.compile does not know."""
    module, hx = module_of("GRU", 2, **ALL), values(2, 3, 6) if given else None
    packed = pack_padded_sequence(values(7, 3, 4), torch.tensor([7, 5, 2]))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    want, got = (flat(seeded(m, packed, hx)) for m in (module, compiled))
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(result[0].square().sum(), list(module.parameters())) for result in (got, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("budget", [0, 2**30])
def test_compile_by_budget(budget):
    """The budget of when it was compiled decides."""
    torch._dynamo.reset()
    module, x = module_of("GRU", save="auto"), values(5, 3, 4)
    with fusedrnn.save_budget(budget):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        got = torch.autograd.grad(compiled(x)[0].square().sum(), list(module.parameters()))
    want = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
    torch.testing.assert_close(got, want)


def test_vmap():
    """As torch's dropout: told to differ, members draw lots of their own; told nothing, it is refused."""
    module, x = module_of("LSTM", recurrent_dropout=0.5, zoneout=0.5), values(3, 1, 1, 4).expand(3, 4, 1, 4)

    def call(x: torch.Tensor) -> torch.Tensor:
        return module(x)[0]

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(call, in_dims=1)(x)
    different = torch.vmap(call, in_dims=1, randomness="different")(x)
    assert len({tuple(t.flatten().tolist()) for t in different}) == 4
    same = torch.vmap(call, in_dims=1, randomness="same")(x)
    torch.testing.assert_close(same, same[:1].expand_as(same))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_gradients_under_vmap(kind):
    module, x = module_of(kind, 2, **ALL, save="states"), values(2, 3, 2, 4)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return sum(t.square().sum() for t in flat(module(x, **ALONG)))

    gradient = torch.func.grad(loss)
    torch.manual_seed(3)
    many = torch.vmap(gradient, randomness="same")(x)
    for of_one, one in zip(many, x, strict=True):
        torch.testing.assert_close(of_one, seeded(gradient, one))


def test_bfloat16():
    module = fusedrnn.LSTM(4, 6, **ALL, dtype=torch.bfloat16)
    x = torch.randn(5, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    assert module(x)[0].dtype == torch.bfloat16
    module(x)[0].sum().backward()
    with torch.autocast("cpu"):
        assert fusedrnn.GRU(4, 6, **ALL)(torch.randn(5, 3, 4))[0].sum().isfinite()


def test_as_functions():
    module, x = module_of("LSTM", **ALL), values(5, 3, 4)
    torch.manual_seed(3)
    output, _ = fusedrnn.functional.lstm(
        x, None, module._flat_weights, dropouts=Dropouts(0.3, 0.2, 0.4, 0.1), training=True
    )
    torch.testing.assert_close(output, seeded(module, x)[0])


def test_what_modules_say_of_it():
    module = fusedrnn.LSTM(4, 6, recurrent_dropout=0.2, zoneout=(0.1, 0.0), save="auto")
    assert repr(module) == "LSTM(4, 6, recurrent_dropout=0.2, zoneout=(0.1, 0.0), save='auto')"
    assert repr(fusedrnn.LSTM(4, 6)) == "LSTM(4, 6)"
    assert set(module.state_dict()) == set(torch.nn.LSTM(4, 6).state_dict())
    assert type(fusedrnn.revert(module)) is fusedrnn.LSTM  # torch.nn's have no such dropout
    text = str(fusedrnn.explain(module, torch.randn(3, 2, 4)))
    assert "recurrent dropout, zoneout" in text
    if "cpu" in text:
        projected = fusedrnn.LSTM(4, 6, proj_size=3, zoneout=0.1)
        assert "not cpu: no kernel for zoneout with a projection" in str(
            fusedrnn.explain(projected, torch.randn(3, 2, 4))
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recurrent_dropout": 1.5}, "recurrent dropout must be in"),
        ({"variational_dropout": -0.1}, "variational dropout must be in"),
        ({"weight_dropout": 2}, "weight dropout must be in"),
        ({"zoneout": (0.1, 1.1)}, "zoneout must be in"),
        ({"zoneout": (0.1, 0.2, 0.3)}, "zoneout of LSTM needs one rate, or one for each of h, c"),
        ({"save": "none"}, "save must be one of 'all', 'states', 'auto', got 'none'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        fusedrnn.LSTM(4, 6, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variational_dropout": "a"}, "variational dropout must be a number, got 'a'"),
        ({"weight_dropout": ()}, r"weight dropout must be a number, got \(\)"),
        ({"zoneout": [0.1, 0.2]}, r"zoneout must be a number or a tuple, got \[0.1, 0.2\]"),
    ],
)
def test_rates_that_are_no_numbers(options, message):
    with pytest.raises(TypeError, match=message):
        fusedrnn.LSTM(4, 6, **options)


@pytest.mark.parametrize("budget", [-1, float("nan")])
def test_impossible_budgets(budget):
    with pytest.raises(ValueError, match="save_budget must be a number of bytes, at least 0"):
        fusedrnn.save_budget(budget)


def test_wrong_shapes_are_told_as_without_dropouts():
    with pytest.raises(RuntimeError, match=r"input.size.*got 5"):
        module_of("GRU", **ALL)(values(3, 2, 5))


SAVING = [c for c in ("RNN", "LSTM", "GRU") if "cpu" in {t.engine for t in TARGETS}]


@pytest.mark.parametrize("kind", SAVING)
def test_states_saved_alone(kind):
    """As much as the states for each token, and the same gradients."""
    x = torch.randn(50, 8, 16)
    modules = [getattr(fusedrnn, kind)(16, 32, save=save) for save in ("all", "states", "auto")]
    for module in modules[1:]:
        module.load_state_dict(modules[0].state_dict())
    saved = [saved_bytes(module, x) - x.numel() * 4 for module in modules]
    states = 2 if kind == "LSTM" else 1
    assert saved[1] <= states * 50 * 8 * 32 * 4 + 4096
    assert saved[2] == saved[0]
    with fusedrnn.save_budget(1000):
        assert saved_bytes(modules[2], x) - x.numel() * 4 == saved[1]
    grads = [torch.autograd.grad(m(x)[0].square().sum(), list(m.parameters())) for m in modules]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)
    again = "backward computes the gates again"
    assert [again in str(fusedrnn.explain(m, x)) for m in modules] == [False, True, False]


@pytest.mark.parametrize("I", [2, 130])
@pytest.mark.parametrize("H", [82, 100, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_one_row_computed_again(kind, H, I):
    """One row is multiplied with panels of fewer units at some sizes, and backward computes all of them again."""
    module = getattr(fusedrnn, kind)(I, H, save="states" if kind in SAVING else "all", zoneout=0.3).eval()
    x = torch.randn(5, 2, I)
    gradients = []
    for batch in (x[:, :1], x):
        output, _ = module(batch)
        gradients.append(torch.autograd.grad(output[:, 0].sum(), list(module.parameters())))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_engines_that_save_everything_say_so():
    with fusedrnn.engine("reference"):
        text = str(fusedrnn.explain(fusedrnn.GRU(4, 6, save="states"), torch.randn(3, 2, 4)))
    assert "keeps everything for backward, whatever save says" in text


@pytest.mark.skipif(not SAVING, reason="the C++ engine is missing")
def test_a_million_steps():
    """T has no limit: forward and backward of one sequence."""
    module, x = fusedrnn.GRU(1, 4, save="states"), torch.randn(1_000_000, 1, 1)
    output, _ = module(x)
    output[-1].sum().backward()
    short = fusedrnn.GRU(1, 4)
    short.load_state_dict(module.state_dict())
    want, _ = short(x[-1000:])  # what came before is forgotten
    want[-1].sum().backward()
    torch.testing.assert_close(output[-1], want[-1])
    torch.testing.assert_close(module.weight_hh_l0.grad, short.weight_hh_l0.grad, rtol=1e-3, atol=1e-5)
