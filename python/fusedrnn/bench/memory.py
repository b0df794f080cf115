"""What a training step keeps from forward until backward, and the most that it uses."""

from __future__ import annotations

import torch
from torch import Tensor

from .contestants import FUSEDRNN, TORCH, fused_copy, make_task
from .driver import Driver, Outcome, WorkerError
from .grid import ODD, SHAPES, Shape
from .results import Finding, engines_of

#: Where ``peak`` is measured: it takes a fresh process for each contestant.
PEAK_SHAPES = ("100x32x128x128", "100x32x512x512")


def saved_bytes(module: torch.nn.Module, input: object) -> int:
    """Bytes that autograd saves in one forward call, each storage counted once, the module's weights left out.

    Args:
        module: any module.
        input: its argument.
    """
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module(input)
    del result  # until here the graph held what was saved, so no two storages had the same address
    return sum(size for address, size in kept.items() if address not in weights)


def measure(cell: str, shape: str, dtype: torch.dtype) -> Finding:
    """Compare what fusedrnn and torch.nn save for one training step, in MiB.

    Args:
        cell: a name in ``grid.CELLS``.
        shape: a name in ``grid.SHAPES``.
        dtype: of everything.
    """
    task = make_task(cell, SHAPES[shape], "training", dtype)
    modules = {FUSEDRNN: fused_copy(task.module), TORCH: task.module}
    values = {who: saved_bytes(module, task.input) / 2**20 for who, module in modules.items()}
    return Finding("memory", f"{cell} {shape}: saved for backward", values, engines_of(modules[FUSEDRNN], task.input))


def peak(driver: Driver, cell: str, shape: str, dtype: torch.dtype) -> Finding:
    """Compare by how much a training step makes a process grow at most, in MiB: its results and all that it uses on
    the way. Each contestant has run a small step of the cell before, which loads what it needs.

    Args:
        driver: of the contestants' processes.
        cell: a name in ``grid.CELLS``.
        shape: a name in ``grid.SHAPES``.
        dtype: of everything.
    """
    small = make_task(cell, Shape(2, 2, 8, 8, ODD), "training", dtype)
    task = make_task(cell, SHAPES[shape], "training", dtype)
    values: dict[str, float] = {}
    outcome = Outcome()
    for name in driver.contestants:
        try:
            with driver.fresh(name, 1) as handle:
                handle.ask("load", "small", small)
                handle.ask("results", "small")
                handle.ask("load", "step", task)
                values[name] = handle.ask("peak", "step") / 2**20
        except WorkerError as error:
            outcome.note(name, error)
    what = f"{cell} {shape}: most in use during a step"
    return Finding("memory", what, values, driver.engine(task, 1), {}, outcome.errors, outcome.refused)
