"""How much arithmetic a cell of the grid needs, and how fast this machine can do it at best."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier
from typing import Any

import torch

from ..cells import CELLS
from ..engines import cpu
from .grid import Precision, Shape
from .timer import Clock

#: Seconds in which the multiprocessors of a GPU hand the state to each other through its cache. An estimate on paper
#: for Hopper, not a measurement.
_EXCHANGE = 0.45e-6
_PEAK_WIDTH = 8192

#: What is read again and again to measure how fast reading is, bytes per thread: from every L1 cache to memory, powers
#: of two and one size between, for a cache of 1 MB delivers 768 KB much faster than all that it holds.
_READ_SIZES = tuple(size for power in range(14, 28) for size in (1 << power, 3 << power - 1))
_ITEM = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


def flops(cell: str, shape: Shape, mode: str) -> int:
    """Floating-point operations of the matrix products, where nearly all of the time should go.

    Forward multiplies the input and the state of every token by their weights; backward does as much twice again,
    for the gradients of the activations and for those of the weights. The gates' own arithmetic is not counted.

    Args:
        cell: a name in ``grid.CELLS``.
        shape: tokens, I, H, layers and directions.
        mode: ``"inference"`` or ``"training"``.

    Returns:
        2 * tokens * (I + H) * gates * H for each layer and direction, three times that for training.
    """
    features = [shape.I] + [shape.directions * shape.H] * (shape.layers - 1)
    gates = len(CELLS[cell].gates)
    forward = sum(2 * shape.tokens * (I + shape.H) * gates * shape.H * shape.directions for I in features)
    return forward * (3 if mode == "training" else 1)


def peak(precision: Precision, device: torch.device, clock: Clock, width: int = _PEAK_WIDTH) -> float:
    """Floating-point operations per second of torch's product of two large square matrices.

    Args:
        precision: of the product.
        device: where to measure.
        clock: what tells the time.
        width: of the matrices.
    """
    a, b = (torch.randn(width, width, dtype=precision.dtype, device=device) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision.tf32 else "highest")
    try:
        clock(lambda: a @ b, 3)
        return 2.0 * width**3 / clock(lambda: a @ b, 10)
    finally:
        torch.set_float32_matmul_precision(before)


def floor(cell: str, shape: Shape, mode: str, rate: float) -> float:
    """Seconds in which a GPU could run a cell of the grid at best.

    All products at ``rate``, though the recurrent ones are thin, and between the steps of each pass an exchange of the
    state: a bound for what needs more than one multiprocessor.

    Args:
        cell: a name in ``grid.CELLS``.
        shape: the sizes.
        mode: ``"inference"`` or ``"training"``.
        rate: floating-point operations per second, see ``peak``.
    """
    passes = 2 if mode == "training" else 1
    return flops(cell, shape, mode) / rate + passes * shape.T * shape.layers * _EXCHANGE


@dataclass(frozen=True)
class Rates:
    """How fast some cores of the CPU are at best, all together.

    Attributes:
        threads: how many.
        flops: floating-point operations per second of multiply-adds, by dtype. bfloat16 is of its own instruction with
            float32 sums, and missing where there is none.
        read: bytes per second, by the bytes that each thread reads again and again.
    """

    threads: int
    flops: dict[str, float]
    read: dict[int, float]

    def peak(self, dtype: str) -> float:
        """Floating-point operations per second at a dtype; the short ones are computed in float32 if need be."""
        return self.flops.get(dtype, self.flops["float32"])

    def bandwidth(self, share: float) -> float:
        """Bytes per second at the smallest measured size in which each thread's share fits, or the largest.

        What can be had of more memory can be had of less, so a larger size that was read faster counts instead: the
        machine had other work when it read the smaller one.
        """
        return max(rate for size, rate in self.read.items() if size >= min(share, max(self.read)))

    def best_of(self, other: Rates) -> Rates:
        """The higher of each of two measurements: other work on the machine can only lower one."""
        flops = {dtype: max(rate, other.flops[dtype]) for dtype, rate in self.flops.items()}
        return Rates(self.threads, flops, {size: max(rate, other.read[size]) for size, rate in self.read.items()})

    def as_dict(self) -> dict[str, Any]:
        """For JSON, where keys are strings."""
        return {"flops": self.flops, "read": {str(size): rate for size, rate in self.read.items()}}


def measure_rates(cores: Sequence[int], seconds: float = 0.05) -> Rates | None:
    """Measure some cores at work together.

    Args:
        cores: numbers of the cores, one for each thread.
        seconds: for each of about thirty probes.

    Returns:
        None if the compiled module, which holds the probes, is missing.
    """
    module = cpu._cpu
    if module is None:
        return None
    start = Barrier(len(cores))

    def on(core: int, probe: Callable[[], float | None]) -> float | None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, [core])  # of this thread only
        start.wait()
        return probe()

    with ThreadPoolExecutor(len(cores)) as pool:

        def together(probe: Callable[[], float | None]) -> float | None:
            rates = list(pool.map(lambda core: on(core, probe), cores))
            return None if None in rates else sum(rate for rate in rates if rate is not None)

        flops = {}
        for dtype in ("float32", "float64", "bfloat16"):
            rate = together(lambda dtype=dtype: module.probe_multiply_adds(dtype, seconds))  # type: ignore[misc]
            if rate is not None:
                flops[dtype] = rate
        read = {}
        for size in _READ_SIZES:
            read[size] = together(lambda size=size: module.probe_read(size, seconds)) or 0.0  # type: ignore[misc]
    return Rates(len(cores), flops, read)


def cpu_floor(cell: str, shape: Shape, mode: str, dtype: str, rates: Rates) -> float:
    """Seconds in which the CPU could run a cell of the grid at best.

    For batches, all products at the peak of multiply-adds. A single sequence must read the recurrent weights at every
    step of each pass, so there it is the products that need not wait for a step (of the inputs, and in training those
    for the input's and all weights' gradients) at the peak, and the reading at the bandwidth of the cache level where
    each thread's share of the weights fits. That is measured from end to end; who turns back at each end finds a part
    in a nearer cache, and may be faster where the weights just about fill one.

    Args:
        cell: a name in ``grid.CELLS``.
        shape: the sizes.
        mode: ``"inference"`` or ``"training"``.
        dtype: a name in ``grid.DTYPES``.
        rates: of the cores that it may use.
    """
    if shape.B > 1:
        return flops(cell, shape, mode) / rates.peak(dtype)
    gates, training = len(CELLS[cell].gates), mode == "training"
    seconds = 0.0
    for layer in range(shape.layers):
        I = shape.I if layer == 0 else shape.directions * shape.H
        outputs = gates * shape.H * shape.directions
        products = 2 * shape.tokens * outputs * (3 * I + shape.H if training else I)
        weights = outputs * shape.H * _ITEM[dtype]
        passes = 2 if training else 1
        seconds += products / rates.peak(dtype)
        seconds += passes * shape.T * weights / rates.bandwidth(weights / rates.threads)
    return seconds
