"""The benchmark as a command."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import accuracy, cost, memory, overhead, plots, sequences, tables
from .contestants import FUSEDRNN, TOLERANCE, TORCH, make_task
from .driver import Driver, cores_for
from .grid import MODES, SECTIONS, SHAPES, USUAL_CELLS
from .limits import Rates, cpu_floor, flops, measure_rates
from .results import Finding, Group, Measurement, Results, describe_machine


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
        peers: contestants, of ``peers.PEERS``.
    """

    sections: list[str]
    cells: list[str]
    modes: list[str]
    threads: list[int]
    shapes: list[str]
    dtype: str
    budget: float
    peers: list[str]

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
    rates = _rates(options)
    results.machine["limits"] = {threads: rate.as_dict() for threads, rate in rates.items()}
    for key, value in results.machine.items():
        if key != "limits":
            console.print(f"{key:<10} {value}", markup=False, highlight=False, soft_wrap=True)
    console.print(tables.limits_table(results))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    path = out or _default_path(results, options)
    # Nothing may run beside a contestant: the bar is drawn between cells only.
    with (
        Driver(options.peers) as driver,
        Progress(*columns, console=console, transient=True, auto_refresh=False) as progress,
    ):
        if "grid" in options.sections:
            _grid(results, options, driver, rates, progress, path)
        for section, steps in _sections(options, driver).items():
            if section in options.sections and steps:
                for finding in _track(progress, section, steps):
                    results.findings.append(finding)
                console.print(tables.findings_table(section, results.findings_of(section)))
                results.save(path)
    # Once more at the end: what the machine could do while others had it for a while is no limit.
    rates = {threads: rate.best_of(rates[threads]) for threads, rate in _rates(options).items()}
    results.machine["limits"] = {threads: rate.as_dict() for threads, rate in rates.items()}
    results.grid = [_with_floor(m, rates) for m in results.grid]
    results.save(path)
    console.print(f"results: {path}", soft_wrap=True)
    if results.grid:
        console.print(tables.means_table(results))
        console.print(tables.limit_means_table(results))
        if caution := tables.caution(results):
            console.print(caution, style="yellow")
        console.print(tables.verdict(results), highlight=False)
        for plot in plots.draw_all(results, path):
            console.print(f"plot: {plot}", soft_wrap=True)
    wrong = [m for m in results.grid if FUSEDRNN not in m.ms]
    for m in wrong:
        console.print(f"WRONG: {m.group}, {m.shape}: {tables.fault(m, FUSEDRNN)}", style="red", markup=False)
    return not wrong


def _rates(options: Options) -> dict[int, Rates]:
    """The machine's limits for each number of threads; empty without the compiled module."""
    measured = {threads: measure_rates(cores_for(threads)) for threads in options.threads}
    return {threads: rates for threads, rates in measured.items() if rates is not None}


def _with_floor(m: Measurement, rates: dict[int, Rates]) -> Measurement:
    """The measurement beside what its number of threads allows."""
    if m.threads not in rates:
        return m
    return dataclasses.replace(m, floor=1e3 * cpu_floor(m.cell, m.grid_shape, m.mode, m.dtype, rates[m.threads]))


def _sections(options: Options, driver: Driver) -> dict[str, list[Callable[[], Finding]]]:
    """What each section other than the grid measures, a function for each row."""
    dtype = getattr(torch, options.dtype)
    each = list(product(options.cells, options.modes))
    shapes = list(product(options.cells, options.shapes))
    budget, most = options.budget, max(options.threads)
    return {
        "overhead": [partial(overhead.measure, driver, *names, budget) for names in overhead.CALLS],
        "step": [partial(cost.per_step, driver, *names, budget) for names in each],
        "packed": [
            partial(cost.packed, driver, *names, threads, budget) for names, threads in product(each, options.threads)
        ],
        "lengths": [
            partial(sequences.lengths, *names, count, budget) for names, count in product(each, options.threads)
        ],
        "resets": [partial(sequences.resets, *names, count, budget) for names, count in product(each, options.threads)],
        "memory": [
            *(partial(memory.measure, *names, dtype) for names in shapes),
            *(partial(memory.peak, driver, *names, dtype) for names in shapes if names[1] in memory.PEAK_SHAPES),
        ],
        "first call": [partial(cost.first_call, driver, *names) for names in each],
        "contention": [partial(cost.contention, driver, *names, most) for names in each if most > 1],
        "accuracy": [partial(accuracy.measure, *names, dtype) for names in shapes],
    }


def _track(progress: Progress, title: str, steps: Sequence[Callable[[], Finding]]) -> Iterator[Finding]:
    bar = progress.add_task(title, total=len(steps))
    for step in steps:
        progress.refresh()
        yield step()
        progress.advance(bar)
    progress.remove_task(bar)


def _grid(
    results: Results, options: Options, driver: Driver, rates: dict[int, Rates], progress: Progress, path: Path
) -> None:
    groups = [Group(*key) for key in product(options.cells, options.modes, options.threads)]
    progress.console.print(f"\n{tables.LEGEND}")
    bar = progress.add_task("", total=len(groups) * len(options.shapes))
    for group in groups:
        for shape in options.shapes:
            progress.update(bar, description=f"{group}, {shape}", refresh=True)
            results.grid.append(_with_floor(measure(driver, group, shape, options.dtype, options.budget), rates))
            progress.advance(bar)
        results.save(path)
        progress.console.print(tables.group_table(group, results.of(group)))
    progress.remove_task(bar)


def measure(driver: Driver, group: Group, shape: str, dtype: str, budget: float) -> Measurement:
    """Measure one cell of the grid: compare every contestant's results with torch.nn's, then time those that agree.

    Args:
        driver: of the contestants' processes.
        group: cell, mode and threads.
        shape: a name in ``grid.SHAPES``.
        dtype: a name in ``grid.DTYPES``.
        budget: seconds of timing.
    """
    assert group.threads is not None
    sizes = SHAPES[shape]
    task = make_task(group.cell, sizes, group.mode, getattr(torch, dtype))
    outcome = driver.race(driver.entries(task), group.threads, TOLERANCE[task.data.dtype], budget)
    timing = outcome.timing
    ratios = {
        name: list(timing.ratios(name, FUSEDRNN))
        for name in timing.seconds
        if name != FUSEDRNN and FUSEDRNN in timing.seconds
    }
    return Measurement(
        cell=group.cell,
        shape=shape,
        mode=group.mode,
        threads=group.threads,
        dtype=dtype,
        engine=driver.engine(task, group.threads),
        flops=flops(group.cell, sizes, group.mode),
        ms={name: 1e3 * timing.median(name) for name in timing.seconds},
        spread={name: timing.spread(name) for name in timing.seconds},
        rounds=timing.rounds,
        ratio=ratios[TORCH][1] if TORCH in ratios else None,
        disagreement={name: difference for name, difference in outcome.differences.items() if name != TORCH},
        elsewhere=timing.elsewhere,
        errors=outcome.errors,
        refused=outcome.refused,
        ratios=ratios,
        repeated=outcome.repeated,
    )


def _default_path(results: Results, options: Options) -> Path:
    words = ["cpu", *re.findall(r"[a-z0-9]+", results.machine["processor"].lower())]
    words += [options.dtype] if options.dtype != "float32" else []
    words += ["partial"] if options.partial else []
    return Path("bench/results") / f"{'-'.join(words)}.json"


def render(console: Console, results: Results, plot: Path) -> None:
    """Print the README's tables in markdown and draw its plot.

    Args:
        console: where to say what was drawn.
        results: of a run.
        plot: path of the PNG to write.
    """
    print(tables.markdown(results))
    if results.grid:
        plots.speed(results, plot)
        plots.limits(results, plot.with_name("limit.png"))
        console.print(f"plots: {plot}, limit.png beside it", soft_wrap=True)
