"""Timing that a noisy machine disturbs little: contestants take turns, and only medians count."""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch

_SAMPLE_SECONDS = 2e-3  # a sample repeats a shorter call until the clock's own cost is nothing
_MIN_ROUNDS = 5
_MAX_ROUNDS = 1000


#: A clock: calls a function a number of times and tells the seconds per call.
Clock = Callable[[Callable[[], object], int], float]


def processor_clock(call: Callable[[], object], count: int) -> float:
    """The time that passes until the calls have returned."""
    start = perf_counter()
    for _ in range(count):
        call()
    return (perf_counter() - start) / count


def gpu_clock(call: Callable[[], object], count: int) -> float:
    """The time that passes on the GPU, by CUDA events on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / count


@dataclass(frozen=True)
class Timing:
    """What the clock said.

    Attributes:
        seconds: per call of each contestant, one value for each round.
        elsewhere: cores that other processes kept busy meanwhile, on average; None where Linux does not tell.
    """

    seconds: Mapping[str, list[float]]
    elsewhere: float | None

    @property
    def rounds(self) -> int:
        return min(map(len, self.seconds.values()), default=0)

    def median(self, name: str) -> float:
        """Median over rounds, in seconds."""
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> float:
        """Interquartile range as a part of the median."""
        low, _, high = statistics.quantiles(self.seconds[name], n=4, method="inclusive")
        return (high - low) / self.median(name)

    def ratio(self, slow: str, fast: str) -> float:
        """How many times as long ``slow`` takes as ``fast``: the median of the rounds' ratios."""
        return self.ratios(slow, fast)[1]

    def ratios(self, slow: str, fast: str) -> tuple[float, float, float]:
        """The quartiles of the rounds' ratios, over the rounds that both ran."""
        rounds = [s / f for s, f in zip(self.seconds[slow], self.seconds[fast], strict=False)]
        low, middle, high = statistics.quantiles(rounds, n=4, method="inclusive")
        return low, middle, high


def interleave(
    calls: Mapping[str, Callable[[], object]],
    budget: float,
    clock: Clock = processor_clock,
    sample_seconds: float = _SAMPLE_SECONDS,
) -> Timing:
    """Time functions by turns: in every round each is called once, or often enough for the clock, in changing order.

    So whatever slows the machine down for a while slows all of them alike.

    Args:
        calls: functions without arguments by name.
        budget: seconds to spend; at least five rounds are run all the same.
        clock: what tells the time.
        sample_seconds: a sample repeats a shorter call for so long.
    """
    repeats = {}
    for name, call in calls.items():
        clock(call, 1)  # the first call allocates and compiles
        repeats[name] = max(1, round(sample_seconds / clock(call, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    with _no_garbage_collection():
        busy, begin = busy_elsewhere(), perf_counter()
        for done in range(_MAX_ROUNDS):
            if done >= _MIN_ROUNDS and perf_counter() >= begin + budget:
                break
            for name in order:
                seconds[name].append(clock(calls[name], repeats[name]))
            order.reverse()
        elsewhere = None if busy is None else max(0.0, (busy_elsewhere() or 0.0) - busy) / (perf_counter() - begin)
    return Timing(seconds, elsewhere)


def busy_elsewhere() -> float | None:
    """A clock of other work: seconds of all cores that went to anything but this process, a hypervisor's other guests
    included."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, *interrupts = map(int, file.readline().split()[1:9])
    except OSError:
        return None
    mine = os.times()
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - mine.user - mine.system


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch, and so fusedrnn, use ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
