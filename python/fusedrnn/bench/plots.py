"""Results as pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from .grid import ALL_SHAPES
from .results import Group, Results, is_stock
from .tables import caution, mark

#: Ratios beyond these look alike: colours are for what can be told apart.
_SLOWEST, _FASTEST = 1 / 4, 16


def _caption(results: Results) -> str:
    words = [results.title.replace("; ", "\n"), results.options.get("dtype"), results.machine["date"]]
    text = ", ".join(filter(None, words))
    warning = caution(results)
    return text if warning is None else f"{text}\n{warning}"


def _shapes(results: Results) -> list[str]:
    """The shapes that were measured, in the grid's order."""
    measured = {m.shape for m in results.grid}
    return [name for name in ALL_SHAPES if name in measured]


def heat_map(results: Results, path: Path, groups: list[Group] | None = None) -> None:
    """Draw the ratios, shapes by groups.

    Args:
        results: with a grid.
        path: of the PNG.
        groups: which, if not all.
    """
    groups, shapes = groups or results.groups(), _shapes(results)
    found = {(m.shape, m.group): m for m in results.grid}
    figure = Figure(figsize=(3.4 + 0.72 * len(groups), 2.6 + 0.3 * len(shapes)), layout="constrained")
    axes = figure.add_subplot()
    logs = [[_log_ratio(found.get((shape, group))) for group in groups] for shape in shapes]
    norm = TwoSlopeNorm(0, math.log2(_SLOWEST), math.log2(_FASTEST))
    image = axes.imshow(logs, cmap="RdBu", norm=norm, aspect="auto")
    for row, shape in enumerate(shapes):
        for column, group in enumerate(groups):
            m = found.get((shape, group))
            if m is not None:
                text = "wrong" if m.ratio is None else f"{m.ratio:.2f}{mark(m.engine)}"
                strong = abs(norm(logs[row][column]) - 0.5) > 0.3
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if strong else "black")
    labels = [f"{g.cell}\n{g.mode}\n{g.how}" for g in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=8)
    axes.set_yticks(range(len(shapes)), [f"{s}  ({ALL_SHAPES[s].kind})" for s in shapes], fontsize=8)
    axes.set_ylabel("shape: T x B x I x H")
    figure.supxlabel(_caption(results), fontsize=8)
    note = f"\n{mark('torch')} stock torch ran" if any(is_stock(m.engine) for m in results.grid) else ""
    figure.suptitle(f"torch.nn's time / fusedrnn's: above 1 (blue) fusedrnn is faster{note}", fontsize=11)
    ticks = [-2, -1, 0, 1, 2, 3, 4]
    bar = figure.colorbar(image, ax=axes, ticks=ticks, fraction=0.04)
    bar.ax.set_yticklabels([f"{2.0**tick:g}" for tick in ticks])
    _save(figure, path)


def _log_ratio(measurement: Any) -> float:
    return math.nan if measurement is None or measurement.ratio is None else math.log2(measurement.ratio)


def speed(results: Results, path: Path) -> None:
    """Draw the README's picture: the ratio of every shape, one panel for each mode, at the most threads measured.

    Args:
        results: with a grid.
        path: of the PNG.
    """
    shapes = _shapes(results)
    threads = max(m.threads or 0 for m in results.grid)
    modes = list(dict.fromkeys(m.mode for m in results.grid))
    cells = list(dict.fromkeys(m.cell for m in results.grid))
    figure = Figure(figsize=(11, 1.2 + 3.2 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.8 / len(cells)
    for axes, mode in zip(panels, modes, strict=True):
        axes.axhline(1, color="black", linewidth=1)
        for k, cell in enumerate(cells):
            rows = [
                m for m in results.grid if (m.mode, m.cell, m.threads) == (mode, cell, threads) and m.ratio is not None
            ]
            centres = [shapes.index(m.shape) + (k - (len(cells) - 1) / 2) * width for m in rows]
            ratios = [m.ratio for m in rows]
            bars = axes.bar(centres, [r - 1 for r in ratios if r is not None], width, bottom=1, label=cell)
            for bar, m in zip(bars, rows, strict=True):
                if is_stock(m.engine):
                    bar.set_alpha(0.3)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylabel(f"{mode}\ntorch.nn's time / fusedrnn's")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
    for kind in dict.fromkeys(ALL_SHAPES[shape].kind for shape in shapes):
        places = [place for place, shape in enumerate(shapes) if ALL_SHAPES[shape].kind == kind]
        middle = (places[0] + places[-1]) / 2
        panels[0].text(middle, 1.02, kind, transform=panels[0].get_xaxis_transform(), ha="center", fontsize=8)
        for axes in panels:
            axes.axvline(places[0] - 0.5, color="grey", linewidth=0.5)
    panels[0].legend(ncols=len(cells))
    pale = "; pale: stock torch ran" if any(is_stock(m.engine) for m in results.grid) else ""
    figure.suptitle(f"Above 1 fusedrnn is faster than torch.nn ({threads} thread{'s' if threads > 1 else ''}{pale})")
    panels[-1].set_xticks(range(len(shapes)), [s.replace("-", "\n") for s in shapes], rotation=90, fontsize=8)
    panels[-1].set_xlabel("shape: T x B x I x H")
    figure.supxlabel(_caption(results), fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
