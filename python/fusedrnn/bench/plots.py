"""Results as pictures."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from .contestants import FUSEDRNN, TORCH
from .grid import ALL_SHAPES
from .results import BEST_PEER, Group, Results, is_stock
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


def draw_all(results: Results, path: Path) -> list[Path]:
    """Draw what a run on the CPU showed, beside its JSON: ratios to torch.nn and to the best peer, and the limit.

    Args:
        results: with a grid.
        path: of the JSON.

    Returns:
        paths of the PNGs.
    """
    paths = [path.with_suffix(".png"), *(path.with_name(f"{path.stem}-{what}.png") for what in ("peers", "limit"))]
    heat_map(results, paths[0])
    heat_map(results, paths[1], against=BEST_PEER)
    limits(results, paths[2])
    return paths


def heat_map(results: Results, path: Path, groups: list[Group] | None = None, against: str = TORCH) -> None:
    """Draw the ratios, shapes by groups.

    Args:
        results: with a grid.
        path: of the PNG.
        groups: which, if not all.
        against: torch.nn, or ``BEST_PEER``.
    """
    groups, shapes = groups or results.groups(), _shapes(results)
    found = {(m.shape, m.group): m for m in results.grid}
    figure = Figure(figsize=(3.4 + 0.72 * len(groups), 2.6 + 0.3 * len(shapes)), layout="constrained")
    axes = figure.add_subplot()

    def ratio(shape: str, group: Group) -> float | None:
        m = found.get((shape, group))
        return None if m is None else m.ratio if against == TORCH else m.peer_ratio

    logs = [[_log(ratio(shape, group)) for group in groups] for shape in shapes]
    norm = TwoSlopeNorm(0, math.log2(_SLOWEST), math.log2(_FASTEST))
    image = axes.imshow(logs, cmap="RdBu", norm=norm, aspect="auto")
    for row, shape in enumerate(shapes):
        for column, group in enumerate(groups):
            m, value = found.get((shape, group)), ratio(shape, group)
            if m is not None:
                text = "none" if value is None else f"{value:.2f}{mark(m.engine)}"
                strong = abs(norm(logs[row][column]) - 0.5) > 0.3
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if strong else "black")
    labels = [f"{g.cell}\n{g.mode}\n{g.how}" for g in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=8)
    axes.set_yticks(range(len(shapes)), [f"{s}  ({ALL_SHAPES[s].kind})" for s in shapes], fontsize=8)
    axes.set_ylabel("shape: T x B x I x H")
    figure.supxlabel(_caption(results), fontsize=8)
    note = f"\n{mark('torch')} stock torch ran" if any(is_stock(m.engine) for m in results.grid) else ""
    who = TORCH if against == TORCH else f"the {BEST_PEER}"
    figure.suptitle(f"{who}'s time / fusedrnn's\nabove 1 (blue) fusedrnn is faster{note}", fontsize=11)
    ticks = [-2, -1, 0, 1, 2, 3, 4]
    bar = figure.colorbar(image, ax=axes, ticks=ticks, fraction=0.04)
    bar.ax.set_yticklabels([f"{2.0**tick:g}" for tick in ticks])
    _save(figure, path)


def _log(ratio: float | None) -> float:
    return math.nan if ratio is None else math.log2(ratio)


def limits(results: Results, path: Path) -> None:
    """Draw the percentage of the machine's limit that fusedrnn, the best peer and torch.nn reach, a panel a group.

    Args:
        results: with a grid.
        path: of the PNG.
    """
    groups, shapes = results.groups(), _shapes(results)
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(2 + (1.5 + 0.28 * len(shapes)) * columns, 2.2 + 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, group in zip(panels, groups, strict=False):
        found = results.of(group)
        for who, style in ((FUSEDRNN, "o"), (BEST_PEER, "_"), (TORCH, "x")):
            points = [(shapes.index(m.shape), m.percent(m.best_peer if who == BEST_PEER else who)) for m in found]
            known = [(place, percent) for place, percent in points if percent is not None]
            axes.plot([p for p, _ in known], [v for _, v in known], style, label=who, markersize=6)
        axes.axhline(100, color="black", linewidth=1)
        axes.set_title(str(group), fontsize=9)
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
        axes.set_xticks(range(len(shapes)), shapes, rotation=90, fontsize=7)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    panels[0].legend(fontsize=8)
    figure.supylabel("percent of the machine's limit")
    figure.supxlabel(f"shape: T x B x I x H\n{_caption(results)}", fontsize=8)
    _save(figure, path)


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
