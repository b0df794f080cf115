"""Results as tables: for the terminal with rich, for the README in markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from .contestants import FUSEDRNN, TORCH
from .grid import GPU_KINDS, KINDS, ODD
from .peers import PEERS
from .results import BEST_PEER, EVEN, Finding, Group, Means, Measurement, Results, is_stock, limit_means, means

#: Behind every number that stock torch, not fusedrnn, is to thank for.
STOCK_MARK = "*"
STOCK_NOTE = f"{STOCK_MARK} stock torch ran, not fusedrnn's kernels; in means such a ratio never counts as more than 1"
#: How to read the tables of the grid.
LEGEND = (
    f"shape: T x B x I x H; behind a time, in percent, the interquartile range / the median; x {TORCH}, x best peer: "
    f"its time / {FUSEDRNN}'s, above 1 {FUSEDRNN} is faster; < marks a peer that is faster beyond the noise; limit: of "
    f"what this machine's arithmetic and caches allow, {FUSEDRNN} and the best peer; busy: cores that other processes "
    f"used; {ODD} shapes are outside the means"
)
#: The sections beside the grid: what their numbers are.
SECTION_TITLES = {
    "overhead": "One call at T = B = 1, I = H = 8, float32, 1 thread, microseconds",
    "step": "One more step of a long sequence, B = 1, float32, 1 thread, microseconds",
    "packed": "Time per real token of a packed batch / of a dense one, float32",
    "lengths": "Time per real token of a batch with lengths (torch.nn: packed, padded again) / of a dense one, float32",
    "resets": "Resets to zeros (torch.nn: split into segments; called step by step), milliseconds, float32",
    "memory": "A training step, 1 thread, MiB, weights left out",
    "first call": "The first call in a fresh process, milliseconds more than the second, float32, 1 thread",
    "contention": "Mean time of 30 calls beside a process that keeps one core busy / alone on 1 thread, float32",
    "accuracy": "Error of a training step against float64: root mean square, worst of its tensors, machine epsilons",
}
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


def _spread(value: float) -> str:
    return f"[yellow]{value:.0%}[/]" if value > _NOISY else f"{value:.0%}"


def _ratio(value: float | None, engine: str = "") -> str:
    return "wrong" if value is None else f"{value:.2f}{mark(engine)}"


def fault(m: Measurement, name: str) -> str:
    """Why a contestant was not timed."""
    if name in m.refused:
        return "-"
    return m.errors.get(name) or (f"off by {m.disagreement[name]:.0e}" if name in m.disagreement else "")


def peer_ratio(m: Measurement) -> str:
    """The best peer's time over ours, whose it is, and a mark if it is lost."""
    if m.peer_ratio is None:
        return ""
    return f"{m.peer_ratio:.2f} {m.best_peer}{'' if m.holds else ' <'}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def group_table(group: Group, rows: list[Measurement]) -> Table:
    """All shapes of one group: milliseconds and spread of each contestant, ratios, percent of the limit."""
    title = f"{group}, {rows[0].dtype}"
    table = Table(box=SIMPLE_HEAD, title=title, caption=_note(m.engine for m in rows), padding=(0, 1, 0, 0))
    names = [name for name in PEERS if any(name in m.ms or name in m.disagreement or name in m.errors for m in rows)]
    table.add_column("shape", no_wrap=True)
    for name in names:
        table.add_column(f"{name}\nms", justify="right")
    for heading in (f"x\n{TORCH}", "x best peer", "limit\n%", "busy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for m in rows:
        times = [
            f"{m.ms[name]:.3f} {_spread(m.spread[name])}" if name in m.ms else f"[red]{escape(fault(m, name))}[/]"
            for name in names
        ]
        peer = peer_ratio(m)
        percents = " / ".join(_percent(m.percent(name)) for name in (FUSEDRNN, m.best_peer))
        busy = "" if m.elsewhere is None else f"{m.elsewhere:.2f}"
        table.add_row(
            m.shape,
            *times,
            _ratio(m.ratio, m.engine),
            f"[red]{peer}[/]" if m.holds is False else peer,
            percents,
            f"[yellow]{busy}[/]" if (m.elsewhere or 0.0) > _BUSY else busy,
        )
    return table


def limits_table(results: Results) -> Table:
    """What the machine's arithmetic and caches allow, as measured."""
    table = Table(box=SIMPLE_HEAD, title="This machine's limits: arithmetic in GF/s, reading in GB/s by KiB per thread")
    limits = results.machine["limits"]
    table.add_column("threads")
    rates = list(limits.values())
    if rates:
        for heading in (*rates[0]["flops"], *(f"{int(size) >> 10}" for size in rates[0]["read"])):
            table.add_column(heading, justify="right")
    for threads, rate in limits.items():
        values = (*rate["flops"].values(), *rate["read"].values())
        table.add_row(str(threads), *(f"{value / 1e9:.0f}" for value in values))
    return table


def _limit_cells(results: Results) -> tuple[list[str], list[tuple[Group, list[str]]]]:
    """Headings and rows of percent of the limit: fusedrnn, the best peer of each cell, torch.nn."""
    by_group = {
        group: [limit_means(results.of(group), who) for who in (FUSEDRNN, BEST_PEER, TORCH)]
        for group in results.groups()
    }
    kinds = [kind for kind in KINDS if any(kind in found for means in by_group.values() for found in means)]
    rows = []
    for group, found in by_group.items():
        triples = [[_percent(who.get(kind)) for who in found] for kind in kinds]
        rows.append((group, [" / ".join(triple) if any(triple) else "" for triple in triples]))
    return kinds, rows


def limit_means_table(results: Results) -> Table:
    """Percent of the machine's limit, geometric means over each class of shapes, a row for each group."""
    headings, rows = _limit_cells(results)
    title = f"Percent of the machine's limit, geometric means: {FUSEDRNN} / {BEST_PEER} / {TORCH}"
    table = Table(box=SIMPLE_HEAD, title=title)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for group, cells in rows:
        table.add_row(str(group), *cells)
    return table


def verdict(results: Results) -> str:
    """In how many cells fusedrnn is at least even with the best peer, and which it loses."""
    judged = [m for m in results.grid if m.holds is not None]
    lost = [m for m in judged if not m.holds]
    text = (
        f"At least even with the best peer in {len(judged) - len(lost)} of {len(judged)} cells"
        f" (lower quartile of the rounds' ratios at least {EVEN})"
    )
    lines = []
    for m in lost:
        assert m.peer_ratio is not None
        ahead = "is ahead" if m.peer_ratio < 1 else "may be ahead, it varied"
        lines.append(f"  {m.group}, {m.shape}: {m.best_peer} {ahead}, ratio {m.peer_ratio:.2f}")
    return "\n".join([f"{text}{':' if lost else '.'}", *lines])


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


def _finding_cells(rows: list[Finding]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a section, the same for terminal and README."""
    mentioned = list(dict.fromkeys(name for row in rows for name in (*row.values, *row.errors)))
    names = [name for name in PEERS if name in mentioned] + [name for name in mentioned if name not in PEERS]

    def cell(row: Finding, name: str) -> str:
        if name in row.values:
            return f"{row.values[name]:.3g}"
        return "-" if name in row.refused else row.errors.get(name, "")

    lines = [
        [row.what, *(cell(row, name) for name in names), "" if row.ratio is None else _ratio(row.ratio, row.engine)]
        for row in rows
    ]
    return ["", *names, f"{TORCH} / {FUSEDRNN}"], lines


def findings_table(section: str, rows: list[Finding]) -> Table:
    """One section beside the grid."""
    headings, lines = _finding_cells(rows)
    table = Table(box=SIMPLE_HEAD, title=SECTION_TITLES[section], caption=_note(row.engine for row in rows))
    for k, heading in enumerate(headings):
        table.add_column(heading, justify="right" if k else "left")
    for line in lines:
        table.add_row(*map(escape, line))
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
    if any(m.floor is not None and m.threads for m in results.grid):
        headings, rows = _limit_cells(results)
        parts.append(
            f"Percent of the machine's limit (arithmetic and caches, measured in the same run), geometric means: "
            f"{FUSEDRNN} / best peer of each cell / {TORCH}:"
        )
        parts.append(_markdown_table(["", *headings], [[str(group), *cells] for group, cells in rows]))
        parts.append(verdict(results).replace("\n  ", "\n- "))
    for section, title in SECTION_TITLES.items():
        if found := results.findings_of(section):
            parts += [f"{title}:", _markdown_table(*_finding_cells(found))]
    note = _note([*(m.engine for m in results.grid), *(finding.engine for finding in results.findings)])
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


def _escape(text: str) -> str:
    return text.replace("*", "\\*")


def _markdown_table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
