"""Results as tables: for the terminal with rich, for the README in markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .contestants import FUSEDRNN, TORCH
from .grid import GPU_KINDS, KINDS, ODD, SHAPES, TRAINING
from .results import Group, Means, Measurement, Memory, Overhead, Results, is_stock, means

#: Behind every number that stock torch, not fusedrnn, is to thank for.
STOCK_MARK = "*"
STOCK_NOTE = f"{STOCK_MARK} stock torch ran, not fusedrnn's kernels; in means such a ratio never counts as more than 1"
#: How to read the tables of the grid.
LEGEND = (
    f"shape: T x B x I x H; spread: interquartile range / median of the time; ratio: {TORCH}'s time / {FUSEDRNN}'s, "
    f"above 1 fusedrnn is faster; {ODD} shapes are outside the means"
)
_BUSY = 0.1  # cores of other work beyond which the numbers come with a caution
_NOISY = 0.2  # a spread beyond this is coloured: read such a time with caution


def mark(engine: str) -> str:
    """The mark that a number served by ``engine`` carries, if any."""
    return STOCK_MARK if is_stock(engine) else ""


def caution(results: Results) -> str | None:
    """A warning if the machine had other work: it slows contestants that use all cores far more than others."""
    if results.elsewhere is None or results.elsewhere < _BUSY:
        return None
    return f"Other processes kept {results.elsewhere:.1f} cores busy while these times were taken: do not rely on them."


def _note(engines: Iterable[str]) -> str | None:
    return STOCK_NOTE if any(map(is_stock, engines)) else None


def _contestants(rows: Iterable[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _spread(value: float) -> str:
    return f"[yellow]{value:.0%}[/]" if value > _NOISY else f"{value:.0%}"


def _ratio(value: float | None, engine: str = "") -> str:
    return "wrong" if value is None else f"{value:.2f}{mark(engine)}"


def group_table(group: Group, rows: list[Measurement]) -> Table:
    """All shapes of one group: milliseconds and spread of each contestant, ratio, GF/s."""
    table = Table(
        box=SIMPLE_HEAD,
        title=f"{group}, {rows[0].dtype}",
        caption=_note(m.engine for m in rows),
    )
    names = _contestants(m.ms | m.disagreement for m in rows)
    table.add_column("shape")
    table.add_column("kind")
    for name in names:
        table.add_column(f"{name}\nms", justify="right", no_wrap=True)
        table.add_column("spread", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("fusedrnn\nGF/s", justify="right", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    for m in rows:
        times = []
        for name in names:
            if name in m.ms:
                times += [f"{m.ms[name]:.3f}", _spread(m.spread[name])]
            else:
                times += [f"[red]off by {m.disagreement[name]:.0e}[/]", ""]
        speed = f"{m.gflops(FUSEDRNN):.1f}" if FUSEDRNN in m.ms else ""
        table.add_row(m.shape, m.grid_shape.kind, *times, _ratio(m.ratio, m.engine), speed, m.engine)
    return table


def _mean_cells(results: Results) -> tuple[list[str], list[tuple[Group, list[str]]]]:
    """Headings and rows of the table of means, the same for terminal and README."""
    by_group: dict[Group, Means] = {group: means(results.of(group)) for group in results.groups()}
    kinds = [kind for kind in (*KINDS, *GPU_KINDS) if any(kind in m.by_kind for m in by_group.values())]
    rows = []
    for group, m in by_group.items():
        cells = [f"{m.by_kind[kind]:.2f}" if kind in m.by_kind else "" for kind in kinds]
        cells.append("" if m.all is None else f"{m.all:.2f}")
        cells.append("" if m.worst is None else f"{_ratio(m.worst.ratio, m.worst.engine)} at {m.worst.shape}")
        cells.append(f"{m.fused} of {m.count}")
        rows.append((group, cells))
    return [*kinds, "all", "worst", "run by fusedrnn"], rows


def means_table(results: Results) -> Table:
    """Geometric means of the ratios, a row for each group."""
    headings, rows = _mean_cells(results)
    table = Table(
        box=SIMPLE_HEAD,
        title="torch.nn's time / fusedrnn's, geometric means",
        caption=_note(m.engine for m in results.grid),
    )
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for group, cells in rows:
        table.add_row(str(group), *cells)
    return table


def overhead_table(rows: list[Overhead]) -> Table:
    """Microseconds of one call at T = B = 1, I = H = 8."""
    table = Table(
        box=SIMPLE_HEAD,
        title="One call at T = B = 1, I = H = 8, float32, 1 thread",
        caption=_note(row.engine for row in rows),
    )
    names = _contestants(row.us for row in rows)
    for heading in ("module", "mode"):
        table.add_column(heading)
    for name in names:
        table.add_column(f"{name}\nus", justify="right")
        table.add_column("spread", justify="right")
    table.add_column("ratio", justify="right")
    for row in rows:
        times = [cell for name in names for cell in (f"{row.us[name]:.1f}", _spread(row.spread[name]))]
        table.add_row(row.module, row.mode, *times, _ratio(row.ratio, row.engine))
    return table


def memory_table(rows: list[Memory]) -> Table:
    """MiB that a training step saves for backward."""
    table = Table(
        box=SIMPLE_HEAD,
        title="Saved for backward by one training step, weights left out",
        caption=_note(row.engine for row in rows),
    )
    names = _contestants(dict.fromkeys(row.bytes, 0.0) for row in rows)
    table.add_column("cell")
    table.add_column("shape")
    for name in names:
        table.add_column(f"{name}\nMiB", justify="right")
    table.add_column("fusedrnn / torch.nn", justify="right")
    for row in rows:
        sizes = [f"{row.bytes[name] / 2**20:.2f}" for name in names]
        table.add_row(row.cell, row.shape, *sizes, _ratio(row.bytes[FUSEDRNN] / row.bytes[TORCH], row.engine))
    return table


def markdown(results: Results) -> str:
    """The README's section of numbers: the machine, the means, a call's overhead, memory; whatever was measured."""
    machine, options = results.machine, results.options
    commit = f" at {machine['commit']}" if machine["commit"] else ""
    dtype = f"{options['dtype']}; " if "dtype" in options else ""
    parts = [f"{results.title}{commit}; {dtype}{machine['date']}."]
    if results.grid:
        headings, rows = _mean_cells(results)
        parts.append("torch.nn's time / fusedrnn's (above 1 fusedrnn is faster), geometric means:")
        if warning := caution(results):
            parts.append(warning)
        parts.append(_markdown_table(["", *headings], [[str(group), *cells] for group, cells in rows]))
    if results.overhead:
        parts.append("One call at T = B = 1, I = H = 8, 1 thread, microseconds:")
        lines = [
            [o.module, o.mode, f"{o.us[FUSEDRNN]:.1f}", f"{o.us[TORCH]:.1f}", _ratio(o.ratio, o.engine)]
            for o in results.overhead
        ]
        parts.append(_markdown_table(["module", "mode", FUSEDRNN, TORCH, "ratio"], lines))
    if saved := [row for row in results.memory if SHAPES[row.shape].kind == TRAINING]:
        parts.append(f"Saved for backward by one training step, MiB, weights left out ({TRAINING}):")
        parts.append(_markdown_table(*_memory_cells(saved)))
    rows_of_all: tuple[Measurement | Overhead | Memory, ...] = (*results.grid, *results.overhead, *saved)
    note = _note(row.engine for row in rows_of_all)
    return "\n\n".join(parts if note is None else [*parts, _escape(note)])


def gpu_report(results: Results) -> str:
    """Everything measured on a GPU in markdown: the means, then a table for each cell, mode and precision."""
    peaks = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in results.machine["peak"].items())
    parts = [
        f"# {results.machine['gpu']}",
        markdown(results),
        f"Below: microseconds per time step of a whole layer, its input product included; ratio: {TORCH}'s time / "
        f"{FUSEDRNN}'s at equal precision, above 1 {FUSEDRNN} is faster; graph: the same call replayed from a CUDA "
        f"graph; floor: the products at the rate of a large square one on this GPU (TFLOP/s: {peaks}), and one "
        "exchange of the state between multiprocessors per step and pass, an estimate.",
    ]
    eager = [group for group in results.groups() if not group.replay]
    for group in eager:
        replays = {m.shape: m for m in results.of(dataclasses.replace(group, replay=True))}
        parts.append(f"## {group}")
        columns = [name + how for how in ("", " graph") for name in (FUSEDRNN, TORCH, "ratio")]
        rows = [
            [m.shape, *_per_step(m), *_per_step(replays.get(m.shape)), _number(m.per_step(m.floor)), m.kernel]
            for m in results.of(group)
        ]
        parts.append(_markdown_table(["shape", *columns, "floor", "kernel"], rows))
    return "\n\n".join(parts) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _per_step(m: Measurement | None) -> list[str]:
    """Microseconds per step of fusedrnn and torch.nn, or what kept them from running, and the ratio."""
    if m is None:
        return ["", "", ""]

    def cell(name: str) -> str:
        if name in m.ms:
            return _number(m.per_step(m.ms[name]))
        return f"off by {m.disagreement[name]:.0e}" if name in m.disagreement else m.errors.get(name, "")

    return [cell(FUSEDRNN), cell(TORCH), "" if m.ratio is None else _ratio(m.ratio, m.engine)]


def _memory_cells(rows: list[Memory]) -> tuple[list[str], list[list[str]]]:
    """A row for each shape, two columns for each cell."""
    cells = list(dict.fromkeys(row.cell for row in rows))
    found = {(row.cell, row.shape): row for row in rows}
    table = []
    for shape in dict.fromkeys(row.shape for row in rows):
        line = [shape]
        for cell in cells:
            row = found[cell, shape]
            line += [
                f"{row.bytes[name] / 2**20:.2f}{mark(row.engine) * (name == FUSEDRNN)}" for name in (FUSEDRNN, TORCH)
            ]
        table.append(line)
    return ["shape", *(f"{cell} {name}" for cell in cells for name in (FUSEDRNN, TORCH))], table


def _escape(text: str) -> str:
    return text.replace("*", "\\*")


def _markdown_table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
