"""A contestant in a process of its own.

It answers the driver's questions over a pipe until that closes. Between two questions the driver stops it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .contestants import Job, NotOfferedError, Task, fused_copy
from .peers import PEERS
from .results import engines_of

#: Calls are repeated untimed for so long, or until one took longer, before they are timed: whoever ran before has
#: taken the caches, and this process was stopped. (Of training steps of 0.26 ms the first took 0.8, the sixth 0.28.)
_WARM_SECONDS = 4e-3


@dataclass(frozen=True)
class Slice:
    """What one turn showed.

    Attributes:
        seconds: per call, of each sample.
        waiting: cores' worth of time that this process's threads wanted to run and did not get one; None where the
            system does not tell.
        processor: seconds of all cores that this process used, warming up included.
    """

    seconds: list[float]
    waiting: float | None
    processor: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seconds)


def _waited() -> float | None:
    """Seconds that the threads of this process waited for a core."""
    try:
        return sum(int(f.read_text().split()[1]) for f in Path("/proc/self/task").glob("*/schedstat")) / 1e9
    except (OSError, IndexError):
        return None


class Worker:
    """The answers to the driver's questions; see ``driver.Handle`` for who asks."""

    def __init__(self, name: str, threads: int):
        self._prepare, self._threads = PEERS[name].prepare, threads
        self._jobs: dict[str, tuple[Job, bool]] = {}
        torch.set_num_threads(threads)

    def load(self, label: str, task: Task) -> None:
        """Keep a task, ready to run, under a name."""
        self._jobs[label] = self._prepare(task, self._threads), task.training

    def drop(self) -> None:
        """Forget all tasks."""
        self._jobs.clear()
        if "jax" in sys.modules:
            sys.modules["jax"].clear_caches()
        gc.collect()

    def results(self, label: str) -> list[torch.Tensor]:
        """What one call returns."""
        job, training = self._jobs[label]
        with torch.set_grad_enabled(training):
            return [tensor.detach() for tensor in job()]

    def time(self, label: str, samples: int, repeats: int, warm: bool) -> Slice:
        """Time a task: every sample is the mean of a number of calls."""
        job, training = self._jobs[label]
        call, seconds = job.call, []
        with torch.set_grad_enabled(training):
            used = time.process_time()
            gc.collect()
            gc.disable()
            begin = time.perf_counter()
            while warm and time.perf_counter() < begin + _WARM_SECONDS:
                call()
            waited, begin = _waited(), time.perf_counter()
            for _ in range(samples):
                start = time.perf_counter()
                for _ in range(repeats):
                    call()
                seconds.append((time.perf_counter() - start) / repeats)
            passed, now = time.perf_counter() - begin, _waited()
            gc.enable()
        waiting = None if waited is None or now is None else max(0.0, now - waited) / passed
        return Slice(seconds, waiting, time.process_time() - used)

    def prepare_autograd(self) -> None:
        """Let torch import what it does when backward is given a gradient for the first time (SymPy, 0.2 s), whatever
        there is to differentiate. A loss is one number and needs none."""
        x = torch.ones(1, requires_grad=True)
        torch.autograd.grad(2 * x, x, torch.ones(1))

    def peak(self, label: str) -> int:
        """Bytes by which the process's memory grows at most while a task runs.

        Raises:
            NotOfferedError: the system does not tell.
        """
        status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
        if not clear.exists():
            raise NotOfferedError("this system does not tell the most memory used")

        def kilobytes(field: str) -> int:
            return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free already must not hide what is needed
        clear.write_text("5")  # resets the high-water mark
        before = kilobytes("VmRSS")
        job, training = self._jobs[label]
        with torch.set_grad_enabled(training):
            kept = job.call()
        del kept
        return 1024 * (kilobytes("VmHWM") - before)

    def engine(self, task: Task) -> str:
        """The engines of fusedrnn that serve a task."""
        with torch.set_grad_enabled(task.training):
            return engines_of(fused_copy(task.module), task.input)


def serve(connection: Connection, worker: Worker) -> None:
    """Answer until the pipe closes: a question is a method's name and its arguments, an answer whether it went well,
    and the result or (whether that was to be expected, what was wrong)."""
    while True:
        try:
            method, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        answer: tuple[bool, Any]
        try:
            ask: Callable[..., Any] = getattr(worker, method)
            answer = True, ask(*arguments)
        except NotOfferedError as refusal:
            answer = False, (True, str(refusal))
        except Exception as error:
            answer = False, (False, "".join(traceback.format_exception_only(error)).strip().splitlines()[0])
        connection.send_bytes(pickle.dumps(answer))


def main() -> None:
    """What the process runs; its arguments are a contestant, a number of threads, and the pipe's file descriptor."""
    name, threads, descriptor = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if sys.platform == "linux":  # a stopped process would outlive a driver that is killed
        die_with_parent = 1
        ctypes.CDLL(None).prctl(die_with_parent, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver is who minds the keyboard
    gc.freeze()  # what importing left need not be looked at before every turn
    serve(Connection(descriptor), Worker(name, threads))
    os._exit(0)  # some contestants' threads do not end by themselves
