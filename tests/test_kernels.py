"""Every kernel against the oracle: engine and instruction set x cell x dtype, with all the options of the modules."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from pairwise import pairwise
from support import CELLS, DTYPES, Case, check, has_kernel, instruction_set, kernels

import fusedrnn
from fusedrnn import _cpu, cells
from fusedrnn.bench import accuracy

# Stock torch says so of itself, at the first such call.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

#: No other option may be left untried on any of them.
KERNELS = kernels(*DTYPES)

#: Around the widths of vectors (4, 8, 16) and of blocks of columns (up to 64), and none a multiple of them.
WIDTHS = (1, 3, 7, 17, 37, 65)
#: Around blocks of rows (of 6 or 8) and groups of four of them.
BATCHES = (1, 2, 3, 5, 8, 13, 33)
STEPS = (1, 2, 5, 40)
ON_OFF = (True, False)

OF_ALL = {"bias": ON_OFF, "hx": ON_OFF, "strided": ON_OFF, "threads": (1, 2, 3), "B": BATCHES, "I": WIDTHS, "H": WIDTHS}
OF_SEQUENCES = OF_ALL | {
    "layout": ("dense", "unbatched", "sorted", "unsorted"),
    "layers": (1, 2, 3),
    "directions": (1, 2),
    "batch_first": ON_OFF,
    "loss": ("both", "output", "final"),
    "T": STEPS,
}
IMPOSSIBLE = [
    *({"layout": layout, "B": B} for layout in ("unbatched", "unbatched_cell") for B in BATCHES[1:]),
    {"projected": True, "H": 1},  # a projection is narrower than what it projects
]


def sample(kernels, options):
    """Cases with every value of every option on every kernel, and every pair of values on some."""
    cases = []
    for case in pairwise({"kernel": kernels} | options, IMPOSSIBLE):
        target, cell, dtype = case.pop("kernel")
        shape = dict(zip("TBIH", case.pop("shape"), strict=True)) if "shape" in case else {}
        cases.append(Case(target=target, cell=cell, dtype=dtype, **shape, **case))
    return cases


SEQUENCES = [
    *sample([kernel for kernel in KERNELS if kernel[1] != "lstm"], OF_SEQUENCES),
    *sample([kernel for kernel in KERNELS if kernel[1] == "lstm"], OF_SEQUENCES | {"projected": ON_OFF}),
]
STEPS_OF_CELLS = sample(KERNELS, OF_ALL | {"layout": ("cell", "unbatched_cell"), "T": (1,)})


@pytest.mark.parametrize("name", ["cpu", "numba"])
def test_engine_is_ready(name):
    """All the tests here run on the engines that there are: none may be missing unnoticed."""
    assert fusedrnn.info().engines[name].startswith("ready")


@pytest.mark.parametrize("case", SEQUENCES, ids=str)
def test_sequence(case):
    check(case)


@pytest.mark.parametrize("case", STEPS_OF_CELLS, ids=str)
def test_cell(case):
    check(case)


#: T, B, I, H of calls that are worth sharing among threads, or longer than what is kept in a cache at a time. The
#: second has weights so large that threads add up their gradients together and divide units, not rows, and that one
#: thread alone fetches them ahead; the last, products that every dtype cuts in several stretches.
LARGE = [
    (20, 70, 130, 130),
    (24, 21, 300, 400),
    (12, 1, 65, 130),
    (12, 5, 37, 130),
    (9, 26, 40, 67),
    (150, 7, 6, 65),
    (600, 2, 5, 9),
    (3, 9, 2100, 20),
]
OF_LARGE = {
    "shape": LARGE,
    "threads": (1, 2, 3, 5),
    "layout": ("dense", "unsorted"),
    "directions": (1, 2),
    "hx": ON_OFF,
    "loss": ("both", "output", "final"),
}
OWN_KERNELS = [(target, cell, dtype) for target, cell, dtype in KERNELS if has_kernel(target, dtype)]


@pytest.mark.parametrize("case", sample(OWN_KERNELS, OF_LARGE), ids=str)
def test_large(case):
    check(case)


BLOCKED = [kernel for kernel in OWN_KERNELS if kernel[0].isa]


@pytest.mark.parametrize(("target", "cell", "dtype"), BLOCKED, ids=str)
def test_every_tail_of_a_block(target, cell, dtype):
    """Each number of columns up to a block's and each number of rows up to a block's, but not all pairs."""
    for H in range(1, 67):
        check(Case(target=target, cell=cell, dtype=dtype, T=2, B=1 + H % 13, I=1 + 5 * H % 67, H=H))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("target", "cell", "dtype"), BLOCKED, ids=str)
def test_two_copies(target, cell, dtype, threads):
    """Each thread has some 240 KB of recurrent weights, so that on some processors steps read two copies by turns."""
    gates, projected = len(cells.CELLS[cell].gates), cell == "lstm" and threads == 2
    weights = threads * (240 << 10) // dtype.itemsize // gates
    H = int((2 * weights if projected else weights) ** 0.5)
    sizes = {"T": 66, "B": 3 - threads, "I": 9, "H": H, "directions": 2}
    check(Case(target=target, cell=cell, dtype=dtype, threads=threads, projected=projected, **sizes))


@pytest.mark.full
@pytest.mark.parametrize(("target", "cell", "dtype"), BLOCKED, ids=str)
def test_every_pair_of_tails(target, cell, dtype):
    for B, H in product(range(1, 14), range(1, 67)):
        check(Case(target=target, cell=cell, dtype=dtype, T=2, B=B, I=1 + (B + 5 * H) % 67, H=H))


@pytest.mark.full
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 3), (2, 2, 3, 7), (5, 3, 7, 17), (40, 5, 17, 2), (5, 8, 37, 65), (2, 13, 65, 37), (5, 33, 17, 17)],
    ids=str,
)
@pytest.mark.parametrize(("target", "cell", "dtype"), KERNELS, ids=str)
def test_the_whole_product(target, cell, dtype, shape):
    """All of the options that combine in a layer's structure; the others vary along."""
    rng = np.random.default_rng(0)
    options = ("layout", "layers", "directions", "bias", "hx", "batch_first")
    for values in product(*(OF_SEQUENCES[option] for option in options), ON_OFF if cell == "lstm" else [False]):
        check(
            Case(
                target=target,
                cell=cell,
                dtype=dtype,
                **dict(zip((*options, "projected"), values, strict=True)),
                **dict(zip("TBIH", shape, strict=True)),
                strided=bool(rng.integers(2)),
                loss=str(rng.choice(OF_SEQUENCES["loss"])),
                threads=int(rng.integers(1, 4)),
            )
        )


@pytest.mark.parametrize("isa", _cpu.isas())
@pytest.mark.parametrize("cell", CELLS)
def test_long_sums_are_accurate(cell, isa):
    """Gradients of weights add up 3,200 tokens: in long chains of additions they are off by 4.5 to 5 machine epsilons,
    in short ones by 2 to 2.5, torch's by 2.5 to 7.
    """
    with instruction_set(isa):
        errors = accuracy.measure(cell, "100x32x128x128", torch.float32).values
    assert errors["fusedrnn"] < 3
