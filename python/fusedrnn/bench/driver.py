"""Runs contestants in processes of their own, by turns: while one works, the others are stopped.

Thread pools spin for a while when they have nothing to do, and two of them in one process, or on the same cores, slow
each other down. So every contestant and number of threads has a process of its own, on as many cores as threads,
stopped by a signal except during its turn.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from time import perf_counter
from typing import Any

from torch import Tensor

from .contestants import FUSEDRNN, TORCH, Task, disagreement
from .peers import PEERS
from .timer import Timing, busy_elsewhere
from .worker import Slice

#: What a contestant's process runs.
_MAIN = "from fusedrnn.bench.worker import main; main()"
#: A turn takes about so long: long against what stopping and starting costs.
_TURN = 5e-3
#: From this duration on a call needs no warming up.
_LONG = 2e-2
_MIN_ROUNDS, _FEW_ROUNDS, _MAX_ROUNDS = 5, 3, 200
#: A race goes on beyond its budget, for so many rounds at most, while the quartiles of the two fastest contestants'
#: ratio are further apart than this part of it.
_UNSETTLED, _PATIENT_ROUNDS = 0.04, 15
#: Contestants that take so many times as long as the fastest one get no more than the least number of rounds.
_HOPELESS = 4
#: A short turn in which the process waited for a core more than this part of the time is repeated, at most so often.
_POLLUTED, _REPEATS = 0.02, 2
#: An answer that takes longer is taken for a hang.
_PATIENCE = 300.0


class WorkerError(Exception):
    """A contestant could not do what it was asked.

    Attributes:
        expected: it said that it offers no such thing; otherwise it failed.
    """

    def __init__(self, what: str, expected: bool = False):
        super().__init__(what)
        self.expected = expected


@contextmanager
def affinity(cores: Sequence[int]) -> Iterator[None]:
    """Let what is started inside the block run on these cores only."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cores_for(threads: int) -> list[int]:
    """The last cores of this process's, as many as threads: the first often serve the system's interrupts."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    return sorted(os.sched_getaffinity(0))[-threads:]


class Handle:
    """A contestant's process, as its driver sees it. Stopped unless it has something to do."""

    def __init__(self, name: str, threads: int):
        self._pipe, theirs = Pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        count = str(threads)
        environment = os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count} | PEERS[name].settings(threads)
        command = [sys.executable, "-c", _MAIN, name, count, str(theirs.fileno())]
        with theirs, affinity(cores_for(threads)):
            self._process = subprocess.Popen(
                command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                stdout=self._errors, stderr=self._errors,
            )  # fmt: skip

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of ``worker.Worker`` there, and stop the process again.

        Raises:
            WorkerError: it failed; or the process crashed or hung, and is no more.
        """
        self.begin(method, *arguments)
        return self.end()

    def begin(self, method: str, *arguments: Any) -> None:
        """The first half of ``ask``, so that several can work at once."""
        self._signal(signal.SIGCONT)
        with suppress(OSError):  # it is dead: `end` tells
            self._pipe.send_bytes(pickle.dumps((method, arguments)))

    def end(self) -> Any:
        """The second half of ``ask``."""
        try:
            if not self._pipe.poll(_PATIENCE):
                self.close()
                raise WorkerError(f"no answer in {_PATIENCE:.0f} s")
            well, answer = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            self._process.wait()
            words = self._last_words()
            self.close()
            raise WorkerError(f"crashed: {words}") from None
        self._stop()
        if not well:
            expected, what = answer
            raise WorkerError(what, expected)
        return answer

    @property
    def alive(self) -> bool:
        """Whether the process is there, as far as is known."""
        return self._process.returncode is None

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()
        self._errors.close()

    def _signal(self, number: signal.Signals) -> None:
        if self.alive:
            self._process.send_signal(number)

    def _stop(self) -> None:
        self._signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _last_words(self) -> str:
        code = self._process.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{how}, {lines[-1]}" if lines else how


@dataclass(frozen=True)
class Entry:
    """Who runs what in a race."""

    contestant: str
    task: Task


def _settled(seconds: Mapping[str, list[float]]) -> bool:
    """Whether more rounds would hardly tell more of who is faster."""
    timing = Timing(seconds, None)
    fast, *others = sorted(seconds, key=timing.median)
    if not others:
        return True
    low, middle, high = timing.ratios(others[0], fast)
    return high - low <= _UNSETTLED * middle


@dataclass
class Outcome:
    """What a race showed.

    Attributes:
        timing: of those that agreed.
        differences: of everyone that ran from the one who is right, as a part of a tensor's largest value.
        errors: of those that could not run, what they said.
        refused: names in ``errors`` that offer no such thing: no fault of theirs.
        repeated: turns that were taken again because others used the cores.
    """

    timing: Timing = field(default_factory=lambda: Timing({}, None))
    differences: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    repeated: int = 0

    def note(self, label: str, error: WorkerError) -> None:
        """Keep why someone could not run."""
        self.errors[label] = str(error)
        if error.expected:
            self.refused.append(label)

    def faults(self) -> dict[str, str]:
        """Why each of those that were not timed was not."""
        off = {name: f"off by {d:.0e}" for name, d in self.differences.items() if name not in self.timing.seconds}
        return off | self.errors


class Driver:
    """Starts contestants' processes as they are needed, keeps them, and ends them with the block::

    with Driver(["fusedrnn", "torch.nn"]) as driver:
        outcome = driver.race(driver.entries(task), threads=2, tolerance=1e-4, budget=1.0)
    """

    def __init__(self, contestants: Sequence[str]):
        self.contestants = list(contestants)
        self._handles: dict[tuple[str, int], Handle] = {}

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()

    def handle(self, contestant: str, threads: int) -> Handle:
        """A contestant's process; a new one if it is dead."""
        key = contestant, threads
        if key not in self._handles or not self._handles[key].alive:
            self._handles[key] = Handle(contestant, threads)
        return self._handles[key]

    @staticmethod
    @contextmanager
    def fresh(contestant: str, threads: int) -> Iterator[Handle]:
        """A process that has not done anything yet, for one use."""
        handle = Handle(contestant, threads)
        try:
            yield handle
        finally:
            handle.close()

    def entries(self, task: Task) -> dict[str, Entry]:
        """Everyone at the same task."""
        return {name: Entry(name, task) for name in self.contestants}

    def engine(self, task: Task, threads: int) -> str:
        """The engines of fusedrnn that serve a task, or why that cannot be told."""
        try:
            return str(self.handle(FUSEDRNN, threads).ask("engine", task))
        except WorkerError as error:
            return str(error)

    def race(
        self, entries: Mapping[str, Entry], threads: int, tolerance: float | None, budget: float, reference: str = TORCH
    ) -> Outcome:
        """Compare results, then time those that agree by turns.

        Args:
            entries: who runs what, by a label of each.
            threads: of each.
            tolerance: largest difference from the reference with which one is timed; None to compare nothing.
            budget: seconds of timing; a few rounds are run all the same.
            reference: the label of the entry that is right.
        """
        outcome = Outcome()
        handles = {label: self.handle(entry.contestant, threads) for label, entry in entries.items()}
        self._each(handles, outcome, lambda label: ("load", label, entries[label].task))
        # One by one: a contestant that finds a core busy may remember it for a second, and be timed so.
        results = self._each(handles, outcome, lambda label: ("results", label), at_once=False)
        agreeing = self._agreeing(results, tolerance, reference, outcome)
        self._take_turns({label: handles[label] for label in agreeing}, budget, outcome)
        for handle in set(handles.values()):
            with suppress(WorkerError):  # if it crashes now, the next race begins with a new one
                if handle.alive:
                    handle.ask("drop")
        return outcome

    @staticmethod
    def _each(
        handles: Mapping[str, Handle],
        outcome: Outcome,
        question: Callable[[str], tuple[Any, ...]],
        at_once: bool = True,
    ) -> dict[str, Any]:
        """Ask all that have not failed yet: different processes at once, if they may, one process's labels one after
        another."""
        answers: dict[str, Any] = {}
        waiting = [label for label in handles if label not in outcome.errors]
        while waiting:
            batch = list({handles[label]: label for label in reversed(waiting)}.values()) if at_once else waiting[:1]
            for label in batch:
                handles[label].begin(*question(label))
            for label in batch:
                try:
                    answers[label] = handles[label].end()
                except WorkerError as error:
                    outcome.note(label, error)
            waiting = [label for label in waiting if label not in batch]
        return {label: answers[label] for label in handles if label in answers}

    @staticmethod
    def _agreeing(
        results: Mapping[str, list[Tensor]], tolerance: float | None, reference: str, outcome: Outcome
    ) -> list[str]:
        if tolerance is None:
            return list(results)
        if reference not in results:
            return []
        outcome.differences = {label: disagreement(got, results[reference]) for label, got in results.items()}
        return [label for label, difference in outcome.differences.items() if difference <= tolerance]

    @staticmethod
    def _take_turns(handles: Mapping[str, Handle], budget: float, outcome: Outcome) -> None:
        calls: dict[str, float] = {}
        for label, handle in handles.items():
            try:
                call = handle.ask("time", label, 1, 1, False).mean
                calls[label] = call if call > _LONG else handle.ask("time", label, 1, 1, True).mean
            except WorkerError as error:
                outcome.note(label, error)
        if not calls:
            return
        slow = _HOPELESS * min(calls.values())
        least = _MIN_ROUNDS if budget > _MIN_ROUNDS * sum(calls.values()) else _FEW_ROUNDS
        seconds: dict[str, list[float]] = {label: [] for label in calls}
        order, foreign, passed, begin = list(calls), 0.0, 0.0, perf_counter()
        told = True
        for done in range(_MAX_ROUNDS):
            if done >= least:
                if perf_counter() > begin + budget and (done >= _PATIENT_ROUNDS or _settled(seconds)):
                    break
                order = [label for label in order if calls[label] <= slow]
            for label in list(order):
                repeats = max(1, round(_TURN / calls[label]))
                try:
                    for attempt in range(1 + _REPEATS):
                        start, busy = perf_counter(), busy_elsewhere()
                        turn: Slice = handles[label].ask("time", label, 1, repeats, calls[label] < _LONG)
                        clean = turn.waiting is None or turn.waiting <= _POLLUTED
                        if clean or attempt == _REPEATS or calls[label] > _LONG:
                            break
                        outcome.repeated += 1
                except WorkerError as error:
                    outcome.note(label, error)
                    order.remove(label)
                    del seconds[label]
                    continue
                seconds[label].append(turn.mean)
                now = busy_elsewhere()
                told = told and busy is not None and now is not None
                if busy is not None and now is not None:
                    foreign += now - busy - turn.processor
                passed += perf_counter() - start
            order.reverse()
        outcome.timing = Timing(seconds, max(0.0, foreign) / passed if told and passed else None)
