"""What a training step keeps from forward until backward."""

from __future__ import annotations

import torch
from torch import Tensor

from .contestants import FUSEDRNN, TORCH, fused_copy, make_task
from .grid import SHAPES
from .results import Memory, engines_of


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


def measure(cell: str, shape: str, dtype: torch.dtype) -> Memory:
    """Compare what fusedrnn and torch.nn save for one training step.

    Args:
        cell: a name in ``grid.CELLS``.
        shape: a name in ``grid.SHAPES``.
        dtype: of everything.
    """
    task = make_task(cell, SHAPES[shape], "training", dtype)
    modules = {FUSEDRNN: fused_copy(task.module), TORCH: task.module}
    return Memory(
        cell=cell,
        shape=shape,
        bytes={who: saved_bytes(module, task.input) for who, module in modules.items()},
        engine=engines_of(modules[FUSEDRNN], task.input),
    )
