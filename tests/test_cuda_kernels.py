"""The CUDA kernels over the emulator, against the oracle: the recurrence with every option that a kernel has, and that
bugs planted in the hardware's primitives are found. What needs a GPU is in test_cuda.py."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise as pairs
from itertools import product

import emulated
import numpy as np
import oracle
import pytest
import torch
from pairwise import pairwise
from support import CELLS, assert_near, to_numpy

import fusedrnn.cells
from fusedrnn.engines.base import Call
from fusedrnn.engines.cuda import Plan, Recurrence, Tokens
from fusedrnn.route import run as run_layer

DTYPES = {
    "f32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
}
#: The unit of rounding of what is multiplied.
EPS = {arithmetic: torch.finfo(dtype).eps for arithmetic, dtype in DTYPES.items()} | {"tf32": 2.0**-10}

#: Paths through the kernels: name, warps that share rows and sums, sequences of a CTA, and how CTAs exchange h.
PATHS = {
    "one_cta_rows": ("one_cta", 2, 1, 0, "counter"),
    "one_cta_sums": ("one_cta", 1, 2, 8, "counter"),
    "one_cta_both": ("one_cta", 4, 2, 0, "counter"),
    "grid": ("grid", 1, 2, 0, "counter"),
    "grid_slices": ("grid", 1, 1, 8, "counter"),
    "grid_rows": ("grid", 2, 1, 8, "counter"),
    "flags": ("grid", 1, 2, 0, "flags"),
    "flags_slices": ("grid", 1, 1, 8, "flags"),
    "flags_rows": ("grid", 2, 1, 8, "flags"),
    "per_step": ("per_step", 0, 0, 0, "counter"),
}
PERSISTENT = [arithmetic for arithmetic in DTYPES if arithmetic != "f64"]
KERNELS = [
    *product(CELLS, PERSISTENT, [path for path in PATHS if path != "per_step"]),
    *product(CELLS, DTYPES, ["per_step"]),
]
ON_OFF = (True, False)
OPTIONS = {
    "directions": (1, 2),
    "tokens": ("dense", "lengths", "packed"),
    "resets": ON_OFF,
    "hx": ON_OFF,
    "bias": ON_OFF,
    "mask": ON_OFF,
    "zoneout": ("none", "drawn", "mean"),
    "loss": ("both", "output", "final"),
    "schedule": ("in_order", "reversed", "random", "ahead"),
    "T": (1, 2, 5),
    "B": (1, 3, 9, 17),
    "H": (1, 5, 16, 19, 70),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One recurrence. What is not said stays as in ``OPTIONS``."""

    cell: str
    arithmetic: str
    path: str
    directions: int = 1
    tokens: str = "dense"
    resets: bool = False
    hx: bool = True
    bias: bool = True
    mask: bool = False  # of h
    zoneout: str = "none"
    loss: str = "both"
    schedule: str = "in_order"
    T: int = 3
    B: int = 3
    H: int = 5
    seed: int = 0

    def __str__(self) -> str:
        return "-".join(f"{field.name}_{getattr(self, field.name)}" for field in fields(self))

    def possible(self) -> bool:
        """Whether one CTA of so few warps, or all CTAs at once, can hold all units."""
        try:
            self.plan(False), self.plan(True)
        except RuntimeError as error:
            if "kernel can run this call" not in str(error):
                raise
            return False
        return True

    def plan(self, backward: bool) -> Plan:
        native = emulated.module()
        path, row_groups, k_groups, slice_, exchange = PATHS[self.path]
        arithmetic = getattr(native.Arithmetic, self.arithmetic)
        sizes = native.Sizes(self.cell, arithmetic, backward, self.T, self.B, self.H, self.directions)
        wish = {"path": getattr(native.Path, path), "exchange": getattr(native.Exchange, exchange)}
        wish |= {"row_groups": row_groups, "k_groups": k_groups, "slice": slice_}
        return Plan(sizes, native.plan(sizes, 0, **wish))


def run(case: Case) -> None:
    """Forward and backward on the emulated kernels, compared with the oracle."""
    native = emulated.module()
    torch.manual_seed(case.seed)
    rng = np.random.default_rng(case.seed)
    dtype, T, B, H, D = DTYPES[case.arithmetic], case.T, case.B, case.H, case.directions
    cell = fusedrnn.cells.CELLS[case.cell]
    G, S = len(cell.gates), len(cell.states)

    lengths = np.full(B, T)
    if case.tokens != "dense":
        lengths = rng.integers(1, T + 1, B)
        lengths[0] = T
    if case.tokens == "packed":
        lengths = -np.sort(-lengths)
    resets = rng.integers(0, 3, (T, B)) == 0 if case.resets else np.zeros((T, B), bool)

    def values(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)

    x = values(D, T, B, G * H)
    w_hh, b_hh = values(D, G * H, H, scale=H**-0.5), values(D, G * H) if case.bias else None
    hx = [values(D, B, H) if case.hx else None for _ in range(S)]
    h_mask = torch.from_numpy(2.0 * rng.integers(0, 2, (D, B, H))).to(dtype) if case.mask else None
    rates = () if case.zoneout == "none" else (0.25, 0.625)[:S]
    lots = 2**62 + case.seed if case.zoneout == "drawn" else None
    shares = oracle.zoneout(rates, lots, (D, T, B, H), [H] * S) if rates else None
    d_output = values(T, B, D * H)
    d_final = [values(D, B, H) for _ in range(S)]
    if case.loss == "output":
        d_final = [torch.zeros_like(d) for d in d_final]
    if case.loss == "final":
        d_output = torch.zeros_like(d_output)

    there = torch.from_numpy(np.arange(T)[:, None] < lengths)
    if case.tokens == "packed":
        sizes = there.sum(1)
        starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        tokens = Tokens(T, B, int(sizes.sum()), x.device, sizes, starts)
    else:
        tokens = Tokens(T, B, T * B, x.device)

    def in_memory(rows: torch.Tensor) -> torch.Tensor:
        """(T, B, n) as the kernels take it: (tokens, n)."""
        return (rows[there] if case.tokens == "packed" else rows.flatten(0, 1)).contiguous()

    def from_memory(rows: torch.Tensor) -> np.ndarray:
        if case.tokens != "packed":
            return to_numpy(rows.unflatten(0, (T, B)))
        padded = np.zeros((T, B, rows.shape[1]))
        padded[there.numpy()] = to_numpy(rows)
        return padded

    recurrence = Recurrence(
        native,
        cell,
        tokens,
        H,
        D,
        resets=torch.from_numpy(resets.astype(np.uint8)) if case.resets else None,
        lengths=torch.from_numpy(lengths) if case.tokens == "lengths" else None,
        h_mask=h_mask,
        zoneout=rates,
        seed=None if lots is None else torch.tensor(lots),
    )
    native.schedule(getattr(native.Schedule, case.schedule), case.seed)
    output = x.new_empty((tokens.count, D * H))
    final, kept = recurrence.forward(
        case.plan(False),
        torch.stack([in_memory(x[d]) for d in range(D)]),
        list(w_hh),
        [None] * D if b_hh is None else list(b_hh),
        hx,
        output,
        save=True,
    )
    d_slots, d_initial = recurrence.backward(
        case.plan(True),
        list(w_hh),
        hx,
        output,
        kept,
        None if case.loss == "final" else in_memory(d_output),
        [None if case.loss == "output" else d for d in d_final],
    )

    def truth(cell: oracle.Cell) -> dict[str, np.ndarray]:
        """What should come out. The oracle knows no resets: it runs each piece between them on its own."""
        want = {
            "output": np.zeros((T, B, D * H)),
            "gradient of gates_x": np.zeros((T, B, D, G * H)),
            "gradient of b_hh": np.zeros((D, G * H)),
            "final": np.zeros((S, D, B, H)),
            "gradient of hx": np.zeros((S, D, B, H)),
        }
        for d, b in product(range(D), range(B)):
            bias = np.zeros(G * H) if b_hh is None else to_numpy(b_hh[d])
            weights = oracle.Weights(np.eye(G * H), to_numpy(w_hh[d]), np.zeros(G * H), bias)
            own = slice(d * H, (d + 1) * H)
            cuts = [0, *(t for t in range(1, lengths[b]) if resets[t, b]), lengths[b]]
            pieces = [slice(*ends) for ends in pairs(cuts)]
            for piece in pieces:
                enters = piece is pieces[0 if d == 0 else -1] and not (d == 0 and resets[0, b])
                leaves = piece is pieces[-1 if d == 0 else 0]
                part = oracle.Direction(
                    cell,
                    to_numpy(x[d, piece, b : b + 1]),
                    np.array([piece.stop - piece.start]),
                    [to_numpy(h[d, b : b + 1]) if enters and case.hx else np.zeros((1, H)) for h in hx],
                    weights,
                    reverse=d == 1,
                    mask=None if h_mask is None else to_numpy(h_mask[d, b : b + 1]),
                    stays=None if shares is None else [share[d, piece, b : b + 1] for share in shares],
                )
                d_x, d_states, d_w = part.backward(
                    to_numpy(d_output[piece, b : b + 1, own]), [to_numpy(g[d, b : b + 1]) * leaves for g in d_final]
                )
                want["output"][piece, b, own] = part.output[:, 0]
                want["gradient of gates_x"][piece, b, d] = d_x[:, 0]
                want["gradient of b_hh"][d] += d_w.bias_hh
                for s in range(S):
                    want["final"][s, d, b] += part.final[s][0] * leaves
                    want["gradient of hx"][s, d, b] += d_states[s][0] * enters
        return want

    facts = native.cell_facts(case.cell)
    wide = d_slots.to(torch.float64)
    of_input, of_recurrent = wide[:, :, facts["input_slot"]].flatten(2), wide[:, :, facts["slots"] - G :].flatten(2)
    got = {
        "output": from_memory(output),
        "gradient of gates_x": np.stack([from_memory(of_input[d]) for d in range(D)], 2),
        "gradient of b_hh": to_numpy(of_recurrent.sum(1)),
        "final": np.stack([to_numpy(state) for state in final]),
        "gradient of hx": np.stack([to_numpy(state) for state in d_initial]),
    }
    want, tolerance = truth(oracle.CELLS[case.cell]), 16 * EPS[case.arithmetic]
    share = max(0.25 * np.abs(value).max() for name, value in want.items() if name.startswith("gradient"))
    allowed = {name: tolerance * max(np.abs(value).max(), share, 0.1) for name, value in want.items()}
    allowed["gradient of b_hh"] *= (T * B) ** 0.5
    if case.cell == "rnn_relu":  # within rounding of its kink the slope may be 0 or 1: allow what drawing lots changes
        draws = [truth(oracle.Relu(tolerance / 4, seed)) for seed in range(8)]
        for name, value in want.items():
            allowed[name] += 3 * max(np.abs(draw[name] - value).max() for draw in draws)
    for name, value in want.items():
        assert_near(name, got[name], value, allowed[name])


@pytest.fixture(autouse=True)
def emulator():
    """The emulator in its plain state, and memory that is not written stays NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    with emulated.cuda_engine_on_cpu_tensors() as engine:
        yield engine
    torch.use_deterministic_algorithms(before)


def sample() -> list[Case]:
    """Every two values of every two options on some kernel, and every kernel often, with options drawn at random."""
    result = [tuple(options.items()) for options in pairwise({"kernel": KERNELS} | OPTIONS)]
    draw = np.random.default_rng(0)
    for kernel in KERNELS * 4:
        result.append((("kernel", kernel), *((name, draw.choice(values)) for name, values in OPTIONS.items())))
    cases = []
    for seed, ((_, (cell, arithmetic, path)), *options) in enumerate(result):
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in options}
        cases.append(Case(cell=cell, arithmetic=arithmetic, path=path, seed=seed, **plain))
    return cases


SAMPLE = sample()


@pytest.mark.parametrize(("cell", "arithmetic"), list(product(CELLS, DTYPES)))
def test_kernels(cell, arithmetic):
    ran = set()
    for case in SAMPLE:
        if (case.cell, case.arithmetic) == (cell, arithmetic) and case.possible():
            check(case)
            ran.add(case.path)
    assert ran == {path for c, a, path in KERNELS if (c, a) == (cell, arithmetic)}


def check(case: Case) -> None:
    try:
        run(case)
    except Exception as error:
        error.add_note(f"in {case}")
        raise


@pytest.mark.parametrize("shared_kilobytes", [227, 20, 12])
@pytest.mark.parametrize(("cell", "arithmetic"), list(product(("lstm", "gru"), PERSISTENT)))
def test_weights_beyond_registers(cell, arithmetic, shared_kilobytes):
    """Where registers are full weights lie in shared memory, and where that is full they are read at each step."""
    emulated.module().set_device(processors=64, shared_bytes=shared_kilobytes << 10)
    H = 260 if DTYPES[arithmetic].itemsize == 2 else 132
    case = Case(cell=cell, arithmetic=arithmetic, path="grid_rows", T=2, B=2, H=H)
    plan = str(case.plan(True))
    assert ("shared memory" in plan, "L2 cache" in plan) == (True, shared_kilobytes < 227)
    check(case)


@pytest.mark.parametrize("T", [31, 32, 70])
@pytest.mark.parametrize("cell", ["lstm", "rnn_tanh"])
def test_graphs_of_steps_serve_one_call_after_another(cell, T):
    """Launches per step are recorded by the dozen, and the record is used for other lengths, widths and directions."""
    for seed, options in enumerate([{"H": 5}, {"H": 3, "B": 2, "resets": True}, {"H": 5, "tokens": "packed"}]):
        check(Case(cell=cell, arithmetic="f32", path="per_step", T=T + seed, seed=seed, **options))


@pytest.mark.parametrize("schedule", OPTIONS["schedule"])
@pytest.mark.parametrize("arithmetic", PERSISTENT)
def test_places_of_the_ring_are_used_again(arithmetic, schedule):
    """More steps than the ring has buffers, with flags that must be emptied in time."""
    for seed, (cell, path) in enumerate([("lstm", "flags"), ("gru", "flags_slices"), ("rnn_tanh", "flags_rows")]):
        sizes = {"T": 19, "B": 9, "H": 19, "directions": 1 + seed % 2}
        check(Case(cell=cell, arithmetic=arithmetic, path=path, schedule=schedule, seed=seed, **sizes))


#: What the emulator or, where only the values are wrong, the comparison says of each planted bug.
BUGS = {
    "sync": "race|before it was written|before a copy|deadlock|divergence",
    "arrive": "race",
    "wait": "race",
    "fragment": "is off by",
    "buffer": "race|is off by|before it was written|deadlock",
    "copy_wait": "before a copy to it was waited for",
    "fence": "race",
    "empty": "a place that is not empty",
    "full": "is off by|never emptied",
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("schedule", OPTIONS["schedule"])
@pytest.mark.parametrize(
    ("bug", "path", "arithmetic"),
    [
        ("sync", "one_cta_both", "f32"),
        ("sync", "grid", "bf16"),
        ("sync", "per_step", "f64"),
        ("arrive", "grid", "f16"),
        ("wait", "grid", "tf32"),
        ("fragment", "one_cta_both", "bf16"),
        ("fragment", "grid", "tf32"),
        ("fragment", "per_step", "f16"),
        ("buffer", "one_cta_both", "bf16"),
        ("buffer", "grid", "f32"),
        ("buffer", "per_step", "f32"),
        ("copy_wait", "per_step", "bf16"),
        ("sync", "flags", "f32"),
        ("buffer", "flags", "f16"),
        ("fence", "flags", "bf16"),
        ("empty", "flags", "tf32"),
        ("full", "flags", "bf16"),
    ],
)
def test_planted_bugs_are_found(bug, path, arithmetic, schedule, seed):
    """A primitive that does not do its work, in any one of a thread's calls of it, is noticed on every schedule.

    One fence that is left out does no harm where another follows in time, nor that a place is not emptied or awaited
    that is empty or full anyway: these fail in every call.
    """
    native = emulated.module()
    B, H = (9, 70) if path == "per_step" else (3, 19)  # enough stages of copies, and columns in a second tile
    T = 12 if path == "flags" else 2  # the ring has eight buffers
    case = Case(cell="lstm", arithmetic=arithmetic, path=path, schedule=schedule, T=T, B=B, H=H, seed=seed)
    if schedule == "in_order":
        check(case)
    native.fault(getattr(native.Fault, bug), -1 if bug in ("fence", "empty", "full") else seed)
    with pytest.raises((RuntimeError, AssertionError), match=BUGS[bug]):
        run(case)


ALONG_TIME = {
    "lengths": ON_OFF,
    "resets": ON_OFF,
    "hx": ON_OFF,
    "directions": (1, 2),
    "sizes": ((1, 3, 4, 5), (5, 9, 3, 19), (7, 1, 6, 16)),
}


@pytest.mark.parametrize("cell", CELLS)
def test_options_along_time_of_a_layer(cell):
    """The engine's own work around the kernels: the same as the reference, padding that is NaN included."""
    for seed, case in enumerate(pairwise(ALONG_TIME)):
        torch.manual_seed(seed)
        T, B, I, H = case["sizes"]
        D, of = case["directions"], fusedrnn.cells.CELLS[cell]
        G, kind = len(of.gates), {"dtype": torch.float64, "requires_grad": True}
        shapes = [(G * H, I), (G * H, H), (G * H,), (G * H,), None] * D
        weights = tuple(None if shape is None else torch.randn(*shape, **kind) for shape in shapes)
        hx = tuple(torch.randn(D, B, H, **kind) if case["hx"] else None for _ in of.states)
        x = torch.randn(T, B, I, **kind)
        lengths = torch.randint(0, T + 1, (B,)) if case["lengths"] else None
        resets = torch.rand(T, B) < 0.4 if case["resets"] else None
        behind = torch.zeros(T, B) if lengths is None else torch.where(torch.arange(T)[:, None] < lengths, 0, torch.nan)
        leaves = [t for t in (x, *hx, *weights) if t is not None]
        found = {}
        for engine in ("reference", "cuda"):
            with fusedrnn.engine(engine):
                results = run_layer(Call(of, x + behind[..., None], hx, weights, lengths=lengths, resets=resets))
            torch.manual_seed(seed)
            grads = torch.autograd.grad(results, leaves, [torch.randn_like(r) for r in results])
            found[engine] = [*results, *grads]
        torch.testing.assert_close(found["cuda"], found["reference"], msg=lambda m, case=case: f"{case}: {m}")
