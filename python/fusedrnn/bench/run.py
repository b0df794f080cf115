"""The benchmark as a command."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import memory, overhead, plots, tables
from .contestants import CONTESTANTS, FUSEDRNN, TOLERANCE, TORCH, fused_copy, make_task, race
from .grid import MODES, SECTIONS, SHAPES, USUAL_CELLS
from .limits import flops
from .results import Group, Measurement, Results, describe_machine, engines_of
from .timer import torch_threads


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        sections: of ``grid.SECTIONS``.
        cells: of ``grid.CELLS``.
        modes: of ``grid.MODES``.
        threads: numbers of threads.
        shapes: names in ``grid.SHAPES``.
        dtype: of ``grid.DTYPES``.
        budget: seconds of timing for each cell of the grid.
    """

    sections: list[str]
    cells: list[str]
    modes: list[str]
    threads: list[int]
    shapes: list[str]
    dtype: str
    budget: float

    @property
    def partial(self) -> bool:
        """Whether the results lack something that a full run has."""
        pairs = ((SECTIONS, self.sections), (MODES, self.modes), (SHAPES, self.shapes), (USUAL_CELLS, self.cells))
        return any(not set(full) <= set(chosen) for full, chosen in pairs)


def run(console: Console, options: Options, out: Path | None) -> bool:
    """Measure, print tables, write the results as JSON and the grid as a PNG beside it.

    Args:
        console: where to print.
        options: what to measure.
        out: path of the JSON; None for ``bench/results/cpu-<processor>.json``, with the dtype in its name if that is
            not float32, and ``partial`` if the run is, so that it never replaces a full one.

    Returns:
        whether fusedrnn's results agreed with torch.nn's everywhere.
    """
    results = Results(describe_machine(), dataclasses.asdict(options))
    for key, value in results.machine.items():
        console.print(f"{key:<10} {value}", markup=False, highlight=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        if "grid" in options.sections:
            _grid(results, options, progress)
        if "overhead" in options.sections:
            for name, mode in progress.track(overhead.CALLS, description="overhead"):
                results.overhead.append(overhead.measure(name, mode, options.budget))
            console.print(tables.overhead_table(results.overhead))
        if "memory" in options.sections:
            for cell, shape in progress.track(list(product(options.cells, options.shapes)), description="memory"):
                results.memory.append(memory.measure(cell, shape, getattr(torch, options.dtype)))
            console.print(tables.memory_table(results.memory))
    path = out or _default_path(results, options)
    results.save(path)
    console.print(f"results: {path}", soft_wrap=True)
    if results.grid:
        console.print(tables.means_table(results))
        if caution := tables.caution(results):
            console.print(caution, style="yellow")
        plots.heat_map(results, path.with_suffix(".png"))
        console.print(f"plot: {path.with_suffix('.png')}", soft_wrap=True)
    wrong = [m for m in results.grid if FUSEDRNN not in m.ms]
    for m in wrong:
        error = m.disagreement[FUSEDRNN]
        console.print(f"WRONG: {m.group}, {m.shape}: fusedrnn is off by {error:.1e} from torch.nn", style="red")
    return not wrong


def _grid(results: Results, options: Options, progress: Progress) -> None:
    groups = [Group(*key) for key in product(options.cells, options.modes, options.threads)]
    progress.console.print(f"\n{tables.LEGEND}")
    bar = progress.add_task("", total=len(groups) * len(options.shapes))
    for group in groups:
        for shape in options.shapes:
            progress.update(bar, description=f"{group}, {shape}")
            results.grid.append(measure(group, shape, options.dtype, options.budget))
            progress.advance(bar)
        progress.console.print(tables.group_table(group, results.of(group)))


def measure(group: Group, shape: str, dtype: str, budget: float) -> Measurement:
    """Measure one cell of the grid: compare every contestant's results with torch.nn's, then time those that agree.

    Args:
        group: cell, mode and threads.
        shape: a name in ``grid.SHAPES``.
        dtype: a name in ``grid.DTYPES``.
        budget: seconds of timing.
    """
    assert group.threads is not None
    task = make_task(group.cell, SHAPES[shape], group.mode, getattr(torch, dtype))
    with torch_threads(group.threads), torch.set_grad_enabled(task.training):
        runs = {name: prepare(task) for name, prepare in CONTESTANTS.items()}
        timing, differences = race(runs, TOLERANCE[task.data.dtype], budget)
        engine = engines_of(fused_copy(task.module), task.input)
    return Measurement(
        cell=group.cell,
        shape=shape,
        mode=group.mode,
        threads=group.threads,
        dtype=dtype,
        engine=engine,
        flops=flops(group.cell, SHAPES[shape], group.mode),
        ms={name: 1e3 * timing.median(name) for name in timing.seconds},
        spread={name: timing.spread(name) for name in timing.seconds},
        rounds=timing.rounds,
        ratio=timing.ratio(TORCH, FUSEDRNN) if FUSEDRNN in timing.seconds else None,
        disagreement={name: differences[name] for name in runs if name != TORCH},
        elsewhere=timing.elsewhere,
    )


def _default_path(results: Results, options: Options) -> Path:
    words = ["cpu", *re.findall(r"[a-z0-9]+", results.machine["processor"].lower())]
    words += [options.dtype] if options.dtype != "float32" else []
    words += ["partial"] if options.partial else []
    return Path("bench/results") / f"{'-'.join(words)}.json"


def render(console: Console, path: Path, plot: Path) -> None:
    """Print the README's tables in markdown and draw its plot from a run's JSON.

    Args:
        console: where to say what was drawn.
        path: of the JSON.
        plot: path of the PNG to write.
    """
    results = Results.load(path)
    print(tables.markdown(results))
    if results.grid:
        plots.speed(results, plot)
        console.print(f"plot: {plot}", soft_wrap=True)
