"""The record of a benchmark run: what was measured, where, and the means over it."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__, installation
from ..engines import cpu
from ..report import explain, info
from .contestants import FUSEDRNN, TORCH
from .grid import ALL_SHAPES, GPU_KINDS, KINDS, PRECISIONS, Shape
from .peers import JAX, ONNXRUNTIME, OPENVINO, rivals

if TYPE_CHECKING:
    from .driver import Outcome

#: From this ratio on a cell does not count as lost: less than what two runs of one program may differ by.
EVEN = 0.97
#: Stands for the fastest of the others in each cell.
BEST_PEER = "best peer"
#: Combined name of the engine that stands for stock torch, see ``engines_of``.
_STOCK_ENGINE = "torch"


def engines_of(module: torch.nn.Module, *inputs: object) -> str:
    """The engines that serve a call, joined by ``+`` if its layers differ, as ``explain`` says."""
    return "+".join(sorted({decision.engine for decision in explain(module, *inputs).decisions}))


def is_stock(engine: str) -> bool:
    """Whether stock torch did any part of the work, so that the time is not fusedrnn's."""
    return _STOCK_ENGINE in engine.split("+")


@dataclass(frozen=True)
class Group:
    """What one table, one column of the heat map and one mean are about: a cell and mode on a number of threads, or on
    a GPU in a precision, launched by the program or replayed from a CUDA graph."""

    cell: str
    mode: str
    threads: int | None
    precision: str | None = None
    replay: bool = False

    @property
    def how(self) -> str:
        """Such as ``2 threads`` or ``bf16 graph``."""
        if self.threads is None:
            return f"{self.precision} graph" if self.replay else f"{self.precision}"
        return f"{self.threads} thread{'s' if self.threads > 1 else ''}"

    def __str__(self) -> str:
        return f"{self.cell} {self.mode}, {self.how}"


@dataclass(frozen=True)
class Measurement:
    """One cell of the grid.

    Attributes:
        shape: a name in ``grid.ALL_SHAPES``.
        threads: of the CPU; None on a GPU.
        dtype: a name in ``grid.DTYPES``, on a GPU in ``grid.PRECISIONS``.
        engine: who served fusedrnn's call.
        flops: of one call.
        ms: median milliseconds of each contestant; one whose results were wrong was not timed and is missing.
        spread: interquartile range as a part of the median.
        rounds: number of samples of each.
        ratio: torch.nn's time over fusedrnn's, above 1 if fusedrnn is faster; None if one of them is missing.
        disagreement: largest difference from torch.nn's results, as a part of a tensor's largest value.
        elsewhere: cores that other processes kept busy meanwhile; None if unknown.
        replay: whether a CUDA graph was replayed.
        kernel: what the engine says of its kernel.
        floor: milliseconds below which no kernel is expected to get; None if unknown, see ``limits``.
        errors: of a contestant that could not run, what it said.
        refused: names in ``errors`` that offer no such thing.
        ratios: each other contestant's time over fusedrnn's: quartiles over the rounds.
        repeated: turns taken again because other processes used the cores.
        commit: of the code that was measured, if known.
    """

    cell: str
    shape: str
    mode: str
    threads: int | None
    dtype: str
    engine: str
    flops: int
    ms: dict[str, float]
    spread: dict[str, float]
    rounds: int
    ratio: float | None
    disagreement: dict[str, float]
    elsewhere: float | None
    replay: bool = False
    kernel: str = ""
    floor: float | None = None
    errors: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    refused: list[str] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    repeated: int = 0

    @property
    def group(self) -> Group:
        on_gpu = self.dtype in PRECISIONS
        return Group(self.cell, self.mode, self.threads, self.dtype if on_gpu else None, self.replay)

    @property
    def grid_shape(self) -> Shape:
        return ALL_SHAPES[self.shape]

    def per_step(self, ms: float | None) -> float | None:
        """Microseconds per time step of a call that takes milliseconds."""
        return None if ms is None else 1e3 * ms / self.grid_shape.T

    @property
    def credited(self) -> float | None:
        """The ratio as the means count it: where stock torch ran, its noise earns nothing, its overhead counts."""
        return min(1.0, self.ratio) if self.ratio is not None and is_stock(self.engine) else self.ratio

    @property
    def best_peer(self) -> str | None:
        """The fastest of those that fusedrnn is measured against here; None if there is none."""
        return min(rivals(list(self.ms), self.grid_shape.T, self.mode), key=self.ms.__getitem__, default=None)

    @property
    def peer_ratio(self) -> float | None:
        """The best peer's time over fusedrnn's: below 1 the peer wins."""
        quartiles = self.ratios.get(self.best_peer or "")
        return quartiles[1] if quartiles else None

    @property
    def holds(self) -> bool | None:
        """Whether the rounds' spread excludes that the best peer is faster by more than noise; None if unknown."""
        quartiles = self.ratios.get(self.best_peer or "")
        return quartiles[0] >= EVEN if quartiles else None

    def percent(self, contestant: str | None) -> float | None:
        """How much of the machine's limit a contestant reaches."""
        if self.floor is None or contestant not in self.ms:
            return None
        return 100 * self.floor / self.ms[contestant]

    def gflops(self, contestant: str) -> float:
        """Billions of floating-point operations per second."""
        return self.flops / self.ms[contestant] / 1e6


@dataclass(frozen=True)
class Finding:
    """One row of a section other than the grid.

    Attributes:
        section: a name in ``grid.SECTIONS``.
        what: was measured.
        values: of each contestant, in the section's unit.
        spread: interquartile range as a part of the median, where there is one.
        engine: who served fusedrnn's call.
        errors: of a contestant that could not run, what it said.
        refused: names in ``errors`` that offer no such thing.
    """

    section: str
    what: str
    values: dict[str, float]
    engine: str
    spread: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """torch.nn's value over fusedrnn's: above 1 fusedrnn needs less."""
        if not {FUSEDRNN, TORCH} <= self.values.keys() or not self.values[FUSEDRNN]:
            return None
        return self.values[TORCH] / self.values[FUSEDRNN]


def finding(section: str, what: str, outcome: Outcome, engine: str, unit: float) -> Finding:
    """What a race showed as a row of a section; ``unit``: how many of the section's units make a second."""
    timing = outcome.timing
    return Finding(
        section,
        what,
        {name: unit * timing.median(name) for name in timing.seconds},
        engine,
        {name: timing.spread(name) for name in timing.seconds},
        outcome.faults(),
        outcome.refused,
    )


@dataclass
class Results:
    """Everything that one run measured, and on what."""

    machine: dict[str, Any]
    options: dict[str, Any]
    grid: list[Measurement] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def groups(self) -> list[Group]:
        """The groups of the grid, in the order in which they were measured."""
        return list(dict.fromkeys(m.group for m in self.grid))

    def of(self, group: Group) -> list[Measurement]:
        """The measurements of a group."""
        return [m for m in self.grid if m.group == group]

    def findings_of(self, section: str) -> list[Finding]:
        """The findings of a section."""
        return [finding for finding in self.findings if finding.section == section]

    @property
    def elsewhere(self) -> float | None:
        """Cores that other processes kept busy while the grid was timed, on average; None if unknown."""
        known = [m.elsewhere for m in self.grid if m.elsewhere is not None]
        return statistics.fmean(known) if known else None

    @property
    def title(self) -> str:
        """The machine and the software, in a line."""
        m = self.machine
        where = f"{m['processor']}, {m['cores']} cores, {m['isa']}"
        if "gpu" in m:
            where = f"{m['gpu']}, driver for CUDA {m['driver']}, cuDNN {m['cudnn']}"
        return f"{where}; torch {m['torch']}, fusedrnn {m['fusedrnn']}"

    def save(self, path: Path) -> None:
        """Write JSON, a line for each measurement."""
        path.parent.mkdir(parents=True, exist_ok=True)
        record = dataclasses.asdict(self)
        parts = []
        for key, value in record.items():
            rows = ",\n  ".join(map(json.dumps, value)) if isinstance(value, list) else ""
            parts.append(f'"{key}": ' + (f"[\n  {rows}\n ]" if rows else json.dumps(value)))
        new = path.with_name(f"{path.name}.new")  # whoever stops us midway finds the old file whole
        new.write_text("{\n " + ",\n ".join(parts) + "\n}\n")
        new.replace(path)

    @staticmethod
    def load(path: Path) -> Results:
        """Read what ``save`` wrote.

        Raises:
            OSError, ValueError, KeyError, TypeError: the file is missing or is not such a record.
        """
        record = json.loads(path.read_text())
        return Results(
            record["machine"],
            record["options"],
            [Measurement(**row) for row in record["grid"]],
            [Finding(**row) for row in record.get("findings", [])],
        )


@dataclass(frozen=True)
class Means:
    """Geometric means of the credited ratios of one group.

    Attributes:
        by_kind: for each kind of shape that was measured.
        all: over all shapes that count; None if none was measured.
        worst: the measurement with the lowest credited ratio among them.
        fused: how many of the shapes that count have a ratio that is all fusedrnn's work.
        count: how many shapes that count were measured, those with wrong results included.
    """

    by_kind: dict[str, float]
    all: float | None
    worst: Measurement | None
    fused: int
    count: int


def means(measurements: Iterable[Measurement]) -> Means:
    """Means over those measurements whose shape counts and that have a ratio."""
    rows = [(m, m.credited) for m in measurements if m.grid_shape.counts]
    valid = [(m, ratio) for m, ratio in rows if ratio is not None]
    by_kind = {}
    for kind in (*KINDS, *GPU_KINDS):
        ratios = [ratio for m, ratio in valid if m.grid_shape.kind == kind]
        if ratios:
            by_kind[kind] = statistics.geometric_mean(ratios)
    return Means(
        by_kind=by_kind,
        all=statistics.geometric_mean([ratio for _, ratio in valid]) if valid else None,
        worst=min(valid, key=lambda pair: pair[1])[0] if valid else None,
        fused=sum(not is_stock(m.engine) for m, _ in valid),
        count=len(rows),
    )


def describe_machine() -> dict[str, Any]:
    """Everything about machine and software that a reader of the numbers may ask for."""
    return {
        "processor": info().processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": _caches(),
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedrnn": __version__,
        "peers": {name: version(name) for name in (ONNXRUNTIME, OPENVINO, JAX) if find_spec(name)},
        "isa": "no compiled module" if cpu._cpu is None else cpu._cpu.isa(),
        "commit": _commit() or installation.commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _caches() -> dict[str, str]:
    """Sizes of the first core's caches, such as ``{"L2": "1024K"}``; empty where Linux does not tell."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        sizes[f"L{level}{kind[0].lower() if kind != 'Unified' else ''}"] = size
    return sizes


def _commit() -> str | None:
    """The commit that this package was run from, ``-dirty`` if files differ; None outside a checkout of it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=here, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", Path(__file__).name
        )  # a package installed inside another checkout is not its
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return None


def limit_means(measurements: Iterable[Measurement], who: str) -> dict[str, float]:
    """Geometric means of the percentage of the machine's limit, for each kind of shape.

    Args:
        measurements: of one group.
        who: a contestant, or ``BEST_PEER`` for the best one of each cell.
    """
    found: dict[str, list[float]] = {}
    for m in measurements:
        percent = m.percent(m.best_peer if who == BEST_PEER else who)
        if percent is not None and m.grid_shape.counts:
            found.setdefault(m.grid_shape.kind, []).append(percent)
    return {kind: statistics.geometric_mean(values) for kind, values in found.items()}
