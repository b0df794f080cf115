"""The command line: ``python -m fusedrnn info | verify | demo | bench | bench-gpu``."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import __version__, info
from .bench.contestants import CONTESTANTS
from .bench.grid import CELLS, DTYPES, MODES, QUICK, SECTIONS, SHAPES, TELLING, USUAL_CELLS
from .bench.peers import PEERS, installed
from .engines import ENGINES

if TYPE_CHECKING:
    from rich.console import Console

#: Exit status when a command cannot run for want of an optional package, a GPU or a file; 1: it ran and found a fault.
_CANNOT_RUN = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None for ``sys.argv``'s.

    Returns:
        exit status: 0, 1 if the command found a fault, 2 if an optional package, a file or the GPU is missing.
    """
    options = _parser().parse_args(arguments)
    missing = _missing(options.needs)
    if missing:
        print(
            f"fusedrnn {options.command} needs {' and '.join(missing)}: pip install fusedrnn[cli]",
            file=sys.stderr,
        )
        return _CANNOT_RUN
    command: Callable[[argparse.Namespace], int] = options.run
    return command(options)


def _missing(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if find_spec(name) is None]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedrnn", description="Fused RNN, LSTM and GRU kernels for PyTorch."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("info", help="versions, processor, instruction sets, engines, and what is missing")
    command.set_defaults(run=_info, needs=())

    command = commands.add_parser("verify", help="check outputs and gradients of every engine on this machine")
    command.add_argument("--engines", type=_some_of(tuple(ENGINES)), help=f"of {', '.join(ENGINES)}")
    command.add_argument("--quick", action="store_true", help="only the smallest size")
    command.set_defaults(run=_verify, needs=())

    command = commands.add_parser("demo", help="train a small language model with torch.nn and with fusedrnn")
    command.add_argument("--steps", type=_positive, default=300, help="training steps of each model (default: 300)")
    command.add_argument("--seed", type=_seed, default=0, help="of weights and sampled text (default: 0)")
    command.add_argument("--out", type=_new_plot, default=Path("demo.png"), help="the plot (default: demo.png)")
    command.set_defaults(run=_demo, needs=("rich", "matplotlib"))

    command = commands.add_parser("bench", help="time fusedrnn against its peers; tables, plot and JSON")
    command.add_argument("--only", type=_some_of(SECTIONS), help=f"of {', '.join(SECTIONS)} (default: all)")
    command.add_argument("--cells", type=_some_of(CELLS), default=list(USUAL_CELLS), help=f"of {', '.join(CELLS)}")
    command.add_argument("--modes", type=_some_of(MODES), default=list(MODES), help=f"of {', '.join(MODES)}")
    command.add_argument("--threads", type=_threads, help="such as 1,2 (default: one, and as many as torch uses)")
    command.add_argument("--shapes", type=_shapes, help=f"all, or of {', '.join(SHAPES)} (default: all)")
    command.add_argument("--dtype", choices=DTYPES, default="float32")
    command.add_argument("--peers", type=_some_of(tuple(PEERS)), help=f"of {', '.join(PEERS)} (default: the installed)")
    command.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}; a small part of the budget")
    command.add_argument("--budget", type=_duration, help="seconds of timing per cell (default: 0.6; 0.2 with --quick)")
    command.add_argument("--out", type=_new_file, help="results (default: bench/results/cpu-<processor>.json)")
    command.add_argument(
        "--render", type=Path, metavar="RESULTS", help="measure nothing: make the README's table and plot"
    )
    command.add_argument(
        "--plot", type=_new_plot, default=Path("docs/speed.png"), help="of --render (default: docs/speed.png)"
    )
    command.set_defaults(run=_bench, needs=("rich", "matplotlib"))

    command = commands.add_parser("bench-gpu", help="time fusedrnn against torch.nn on a GPU, in shards; tables, JSON")
    command.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="I-th of N parts (default: 1/1)")
    command.add_argument("--telling", action="store_true", help="twelve cells of the grid instead of all")
    command.add_argument("--budget", type=_duration, default=0.2, help="seconds of timing per cell (default: 0.2)")
    command.add_argument("--minutes", type=_duration, help="stop after so many; the same command goes on from there")
    command.add_argument("--fresh", action="store_true", help="forget the results that the file holds")
    command.add_argument("--out", type=_new_file, help="results (default: bench/results/gpu-<name>.json)")
    command.set_defaults(run=_bench_gpu, needs=("rich", "matplotlib"))
    return parser


def _shard(text: str) -> tuple[int, int]:
    """Parse ``I/N``."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shard: expected I/N with 1 <= I <= N")
    return int(index), int(count)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _duration(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**63 - 1")
    return int(text)


def _new_file(text: str) -> Path:
    """A file to write. Whether it can be written is better known before the work than after it."""
    path = Path(text)
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not nearest.is_dir() or not os.access(path if path.exists() else nearest, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written as a file")
    return path


def _new_plot(text: str) -> Path:
    path = _new_file(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png, .svg or .pdf")
    return path


def _threads(text: str) -> list[int]:
    return [_positive(word) for word in text.split(",")]


def _some_of(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"unknown name {name!r}; choose from {', '.join(choices)}")
        return names

    return parse


def _shapes(text: str) -> list[str]:
    return list(SHAPES) if text == "all" else _some_of(tuple(SHAPES))(text)


def _info(options: argparse.Namespace) -> int:
    print(info())
    missing = _missing(("rich", "matplotlib"))
    if missing:
        print(f"missing: {' and '.join(missing)}, which demo and bench need: pip install fusedrnn[cli]")
    return 0


def _console() -> Console:
    """Where to print; a file or pipe has no width of its own, and gets enough for the tables."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


def _verify(options: argparse.Namespace) -> int:
    from .verify import verify

    return 0 if verify(options.engines, options.quick) else 1


def _demo(options: argparse.Namespace) -> int:
    from .demo import demo

    return 0 if demo(_console(), options.steps, options.seed, options.out) else 1


def _bench(options: argparse.Namespace) -> int:
    from .bench.results import Results
    from .bench.run import Options, render, run

    if options.render is not None:
        try:
            results = Results.load(options.render)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"fusedrnn bench: {options.render} holds no results of bench: {error!r}", file=sys.stderr)
            return _CANNOT_RUN
        render(_console(), results, options.plot)
        return 0
    wanted = Options(
        sections=options.only or list(SECTIONS),
        cells=options.cells,
        modes=options.modes,
        threads=options.threads or sorted({1, torch.get_num_threads()}),
        shapes=options.shapes or list(QUICK if options.quick else SHAPES),
        dtype=options.dtype,
        budget=options.budget if options.budget is not None else 0.2 if options.quick else 0.6,
        peers=_contestants(options.peers),
    )
    return 0 if run(_console(), wanted, options.out) else 1


def _contestants(wanted: list[str] | None) -> list[str]:
    """Those asked for, fusedrnn and torch.nn always among them."""
    return [name for name in PEERS if name in (wanted or installed()) or name in CONTESTANTS]


def _bench_gpu(options: argparse.Namespace) -> int:
    from .bench import gpu

    cells = gpu.shard_of(TELLING if options.telling else gpu.GRID, *options.shard)
    wanted = gpu.GpuOptions(cells, options.budget, options.minutes, options.fresh)
    try:
        return 0 if gpu.run(_console(), wanted, gpu.this_gpu(), options.out) else 1
    except RuntimeError as error:
        print(f"fusedrnn bench-gpu: {error}", file=sys.stderr)
        return _CANNOT_RUN


if __name__ == "__main__":
    sys.exit(main())
