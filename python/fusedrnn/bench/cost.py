"""What a user pays beside the grid: for a step, for padding, for the first call, for a busy neighbour."""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .contestants import FUSEDRNN, TOLERANCE, TORCH, make_task
from .driver import Driver, Entry, Handle, Outcome, WorkerError, affinity, cores_for
from .grid import ODD, SHAPES, Shape
from .results import Finding, finding

_DTYPE = torch.float32
_SHORT, _LONG = Shape(20, 1, 128, 128, ODD), Shape(220, 1, 128, 128, ODD)
_PACKED = SHAPES["100x32x128x128-packed"]
_FIRST = SHAPES["20x16x128x128"]
_FRESH_PROCESSES = 3
_CONTENDED = SHAPES["100x32x128x128"]
_CONTENDED_CALLS = 30
_CONTENDED_RUNS = 3  # of so many calls: where the kernel puts a thread first decides much of one run


def per_step(driver: Driver, cell: str, mode: str, budget: float) -> Finding:
    """Microseconds that one more step of a long sequence costs, B = 1, on one thread: the difference between two
    lengths divided by the steps between them.

    Args:
        driver: of the contestants' processes.
        cell: a name in ``grid.CELLS``.
        mode: ``"inference"`` or ``"training"``.
        budget: seconds to spend.
    """
    outcomes = []
    for shape in (_SHORT, _LONG):
        task = make_task(cell, shape, mode, _DTYPE)
        outcomes.append(driver.race(driver.entries(task), 1, TOLERANCE[_DTYPE], budget / 2))
    short, long = (outcome.timing for outcome in outcomes)
    names = [name for name in long.seconds if name in short.seconds]
    row = finding("step", f"{cell} {mode}, I = H = {_LONG.H}", outcomes[1], driver.engine(task, 1), 1e6)
    values = {name: 1e6 * (long.median(name) - short.median(name)) / (_LONG.T - _SHORT.T) for name in names}
    return dataclasses.replace(row, values=values, errors=outcomes[0].faults() | row.errors)


def packed(driver: Driver, cell: str, mode: str, threads: int, budget: float) -> Finding:
    """Time per real token of a packed batch as a part of the dense one's, fusedrnn's and torch.nn's.

    Args:
        driver: of the contestants' processes.
        cell: a name in ``grid.CELLS``.
        mode: ``"inference"`` or ``"training"``.
        threads: number of threads.
        budget: seconds to spend.
    """
    sizes = {"packed": _PACKED, "dense": dataclasses.replace(_PACKED, shortest=None)}
    tasks = {how: make_task(cell, shape, mode, _DTYPE) for how, shape in sizes.items()}
    entries = {f"{who} {how}": Entry(who, task) for who in (FUSEDRNN, TORCH) for how, task in tasks.items()}
    outcome = driver.race(entries, threads, None, budget)
    timing, values = outcome.timing, {}
    for who in (FUSEDRNN, TORCH):
        pair = f"{who} packed", f"{who} dense"
        if timing.seconds.keys() >= set(pair):
            values[who] = timing.ratio(*pair) * sizes["dense"].tokens / sizes["packed"].tokens
    what = f"{cell} {mode}, {_PACKED.name}, {threads} thread{'s' if threads > 1 else ''}"
    return Finding("packed", what, values, driver.engine(tasks["packed"], threads), {}, outcome.errors)


def first_call(driver: Driver, cell: str, mode: str) -> Finding:
    """Milliseconds by which the first call in a fresh process is slower than the second, fusedrnn's and torch.nn's, the
    median of some processes.

    Args:
        driver: of the contestants' processes.
        cell: a name in ``grid.CELLS``.
        mode: ``"inference"`` or ``"training"``.
    """
    task = make_task(cell, _FIRST, mode, _DTYPE)
    values, outcome = {}, Outcome()
    for name in (FUSEDRNN, TORCH):
        extra = []
        for _ in range(_FRESH_PROCESSES):
            try:
                with driver.fresh(name, 1) as handle:
                    handle.ask("prepare_autograd")
                    handle.ask("load", "task", task)
                    first, second = handle.ask("time", "task", 2, 1, False).seconds
                extra.append(1e3 * (first - second))
            except WorkerError as error:
                outcome.note(name, error)
        if extra:
            values[name] = statistics.median(extra)
    what = f"{cell} {mode}, {_FIRST.name}"
    return Finding("first call", what, values, driver.engine(task, 1), {}, outcome.errors)


@contextmanager
def _busy(core: int) -> Iterator[None]:
    """A process that never rests, on one core."""
    with affinity([core]):
        program = "print(flush=True)\nwhile True: pass"
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it runs
        yield
    finally:
        process.kill()
        process.communicate()


def contention(driver: Driver, cell: str, mode: str, threads: int) -> Finding:
    """How many times as long as alone on one thread some calls take on average on several threads, while another
    process keeps one of their cores busy: medians of some runs.

    Args:
        driver: of the contestants' processes.
        cell: a name in ``grid.CELLS``.
        mode: ``"inference"`` or ``"training"``.
        threads: number of threads.
    """
    task = make_task(cell, _CONTENDED, mode, _DTYPE)
    values, outcome = {}, Outcome()

    def mean(name: str, count: int, block: Callable[[Handle], float]) -> float:
        handle = driver.handle(name, count)
        handle.ask("load", "task", task)
        try:
            return statistics.median(block(handle) for _ in range(_CONTENDED_RUNS))
        finally:
            if handle.alive:
                handle.ask("drop")

    def calls(handle: Handle) -> float:
        return float(handle.ask("time", "task", _CONTENDED_CALLS, 1, True).mean)

    def disturbed(handle: Handle) -> float:
        with _busy(cores_for(threads)[0]):
            return calls(handle)

    for name in driver.contestants:
        try:
            values[name] = mean(name, threads, disturbed) / mean(name, 1, calls)
        except WorkerError as error:
            outcome.note(name, error)
    what = f"{cell} {mode}, {_CONTENDED.name}, {threads} threads"
    return Finding("contention", what, values, driver.engine(task, threads), {}, outcome.errors, outcome.refused)
