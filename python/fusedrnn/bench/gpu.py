"""The benchmark of a GPU: a grid too large for one sitting, measured in shards that can be stopped and resumed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .. import explain
from ..engines.cuda import EXCHANGE
from ..torch_state import gpu_driver, tf32_in_rnns
from . import plots, tables
from .contestants import CONTESTANTS, FUSEDRNN, TORCH, Run, Task, fused_copy, make_task, race
from .grid import GPU_SHAPES, MODES, PRECISIONS, USUAL_CELLS, GpuCell
from .limits import floor, flops, peak
from .results import Measurement, Results, describe_machine
from .timer import Clock, gpu_clock

#: Seconds between two writings of the results.
_SAVE_EVERY = 10.0
#: Facts that two sittings must share for their results to stand in one file.
_SAME = ("gpu", "torch", "fusedrnn", "exchange")

GRID = tuple(GpuCell(*names) for names in product(USUAL_CELLS, MODES, PRECISIONS, GPU_SHAPES))


def capture(run: Run) -> Run:
    """Record a call's kernels in a CUDA graph; the result replays them, into the same tensors each time."""
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # torch asks for a few calls on another stream first
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


@dataclass(frozen=True)
class Device:
    """Where to measure, and how: tests put the CPU in a GPU's place.

    Attributes:
        device: of all tensors.
        clock: what tells the time.
        capture: turns a call into the replay of its CUDA graph.
        facts: what the results say of it; ``gpu`` is its name.
        peak_width: of the matrices whose product shows the peak rate.
    """

    device: torch.device
    clock: Clock
    capture: Callable[[Run], Run]
    facts: dict[str, Any]
    peak_width: int = 8192


def this_gpu() -> Device:
    """The current GPU.

    Raises:
        RuntimeError: there is none, or torch cannot use it.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(f"no GPU: torch {torch.__version__} finds no CUDA device on this machine")
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    facts = {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "driver": gpu_driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }
    return Device(device, gpu_clock, capture, facts)


def shard_of(cells: Sequence[GpuCell], index: int, count: int) -> list[GpuCell]:
    """Every ``count``-th cell from the ``index``-th on, counted from 1: all shards get cells of every kind."""
    return list(cells[index - 1 :: count])


@dataclass(frozen=True)
class GpuOptions:
    """What to measure.

    Attributes:
        cells: of the grid.
        budget: seconds of timing for each cell, launched and replayed.
        minutes: after how many to stop before the next cell; None for never.
        fresh: whether to measure anew what the file holds already.
    """

    cells: Sequence[GpuCell]
    budget: float
    minutes: float | None = None
    fresh: bool = False


def run(console: Console, options: GpuOptions, device: Device, out: Path | None) -> bool:
    """Measure what is missing in the results, and write them as JSON, with a table and heat maps beside it.

    Args:
        console: where to print.
        options: what to measure.
        device: where.
        out: path of the JSON; None for ``bench/results/gpu-<name>.json``.

    Returns:
        whether fusedrnn ran and agreed with torch.nn in every cell asked for that is measured by now.

    Raises:
        RuntimeError: the file holds results of another GPU or of other versions.
    """
    begin = saved = monotonic()
    words = re.findall(r"[a-z0-9]+", str(device.facts["gpu"]).lower())
    path = out or Path("bench/results") / f"gpu-{'-'.join(words)}.json"
    results = _take_up(path, device, options.fresh)
    for key, value in results.machine.items():
        console.print(f"{key:<15} {value}", markup=False, highlight=False, soft_wrap=True)
    done = {_cell_of(m) for m in results.grid}
    missing = [cell for cell in options.cells if cell not in done]
    console.print(f"{len(options.cells)} cells asked for, {len(missing)} of them not measured yet")
    left = len(missing)
    try:
        for cell in missing:
            if options.minutes is not None and monotonic() - begin > 60 * options.minutes:
                break
            rows = measure(cell, device, results.machine, options.budget)
            results.grid += rows
            left -= 1
            for m in rows:
                _say(console, m)
            if monotonic() - saved > _SAVE_EVERY:
                results.save(path)
                saved = monotonic()
    finally:
        _sort(results)
        results.save(path)
    path.with_suffix(".md").write_text(tables.gpu_report(results))
    for mode in {group.mode: None for group in results.groups()}:
        groups = [group for group in results.groups() if group.mode == mode]
        plots.heat_map(results, path.with_name(f"{path.stem}-{mode}.png"), groups)
    console.print(tables.means_table(results))
    console.print(f"results: {path}, {path.with_suffix('.md').name}, {path.stem}-*.png", soft_wrap=True)
    if left:
        console.print(f"{left} cells left for want of time: run the same command again", style="yellow")
    asked = set(options.cells)
    wrong = [m for m in results.grid if _cell_of(m) in asked and FUSEDRNN not in m.ms]
    for m in wrong:
        console.print(f"WRONG: {m.group}, {m.shape}: {_fault(m)}", style="red", markup=False)
    return not wrong


def _take_up(path: Path, device: Device, fresh: bool) -> Results:
    """The results that the file holds already, or new ones, on this machine."""
    machine = describe_machine() | device.facts | {"exchange": EXCHANGE}
    rates = {
        name: peak(precision, device.device, device.clock, device.peak_width) for name, precision in PRECISIONS.items()
    }
    results = Results(machine | {"peak": rates}, {})
    if path.exists() and not fresh:
        before = Results.load(path)
        for key in _SAME:
            if before.machine[key] != machine[key]:
                raise RuntimeError(
                    f"{path} holds results of {key} {before.machine[key]}, this is {machine[key]}: "
                    "measure anew (--fresh), or into another file (--out)"
                )
        results.grid = before.grid
    return results


def _cell_of(m: Measurement) -> GpuCell:
    return GpuCell(m.cell, m.mode, m.dtype, m.shape)


def _sort(results: Results) -> None:
    """Put the measurements in the grid's order, whichever shards they came from."""
    place = {cell: k for k, cell in enumerate(GRID)}
    results.grid.sort(key=lambda m: (place.get(_cell_of(m), len(place)), m.replay))


def _fault(m: Measurement) -> str:
    """Why fusedrnn was not timed."""
    if FUSEDRNN in m.errors:
        return m.errors[FUSEDRNN]
    if TORCH in m.errors:
        return f"{TORCH} could not run: {m.errors[TORCH]}"
    return f"fusedrnn is off by {m.disagreement[FUSEDRNN]:.1e} from {TORCH}"


def _say(console: Console, m: Measurement) -> None:
    """One line for a measurement."""
    if FUSEDRNN in m.ms:
        ratio = "" if m.ratio is None else f", ratio {m.ratio:.2f}{tables.mark(m.engine)}"
        text = f"{m.per_step(m.ms[FUSEDRNN]):.2f} us per step{ratio}"
    else:
        text = _fault(m)
    console.print(f"{m.group}, {m.shape}: {text}", markup=False, highlight=False, soft_wrap=True)


def measure(cell: GpuCell, device: Device, machine: dict[str, Any], budget: float) -> list[Measurement]:
    """Measure one cell of the grid: launched by the program, and replayed from a CUDA graph.

    Args:
        cell: what to measure.
        device: where.
        machine: its facts, ``peak`` among them: floating-point operations per second at each precision.
        budget: seconds of timing for each of the two.
    """
    precision, shape = PRECISIONS[cell.precision], GPU_SHAPES[cell.shape]
    task = make_task(cell.cell, shape, cell.mode, precision.dtype, device.device)
    rows = []
    with tf32_in_rnns(precision.tf32), torch.set_grad_enabled(task.training):
        for replay in (False, True):
            rows.append(_measure(cell, task, device, machine, budget, replay))
            if device.device.type == "cuda":
                torch.cuda.empty_cache()  # a graph's memory is of no use to the next one
    return rows


def _measure(
    cell: GpuCell, task: Task, device: Device, machine: dict[str, Any], budget: float, replay: bool
) -> Measurement:
    precision, shape = PRECISIONS[cell.precision], GPU_SHAPES[cell.shape]
    runs: dict[str, Run] = {}
    errors: dict[str, str] = {}
    differences: dict[str, float] = {}
    ms: dict[str, float] = {}
    spread: dict[str, float] = {}
    ratio, rounds, elsewhere = None, 0, None
    engine = kernel = ""
    try:
        decisions = explain(fused_copy(task.module), task.input).decisions
        engine = "+".join(dict.fromkeys(d.engine for d in decisions))
        kernel = "+".join(dict.fromkeys(d.kernel for d in decisions))
    except RuntimeError as error:
        errors[FUSEDRNN] = _first_line(error)
    for name, prepare in CONTESTANTS.items():
        try:
            call = prepare(task)
            runs[name] = device.capture(call) if replay else call
            runs[name]()
        except RuntimeError as error:  # a kernel that cannot be launched or captured, or no memory: part of the result
            runs.pop(name, None)
            errors[name] = _first_line(error)
    if TORCH in runs:
        timing, differences = race(runs, precision.tolerance, budget, device.clock)
        ms = {name: 1e3 * timing.median(name) for name in timing.seconds}
        spread = {name: timing.spread(name) for name in timing.seconds}
        ratio = timing.ratio(TORCH, FUSEDRNN) if FUSEDRNN in ms else None
        rounds, elsewhere = timing.rounds, timing.elsewhere
    return Measurement(
        cell=cell.cell,
        shape=cell.shape,
        mode=cell.mode,
        threads=None,
        dtype=cell.precision,
        engine=engine,
        flops=flops(cell.cell, shape, cell.mode),
        ms=ms,
        spread=spread,
        rounds=rounds,
        ratio=ratio,
        disagreement={name: error for name, error in differences.items() if name != TORCH},
        elsewhere=elsewhere,
        replay=replay,
        kernel=kernel,
        floor=1e3 * floor(cell.cell, shape, cell.mode, machine["peak"][cell.precision]),
        errors=errors,
        commit=machine["commit"],
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
