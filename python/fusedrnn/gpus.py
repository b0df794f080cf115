"""The GPUs of this machine, and how the CUDA kernels divide the work on each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, product
from typing import Any

import torch

from .cells import CELLS
from .torch_state import gpu_driver

#: What the table of paths is made for: steps, sequences, widths.
_T, _B = 256, 16
_WIDTHS = (32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096)
_ARITHMETICS = ("f32", "tf32", "bf16", "f16", "f64")
_PASSES = {"forward": False, "backward": True}


def describe_gpus() -> dict[str, str]:
    """Name, compute capability and size of each GPU that torch sees, and the CUDA versions; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    rows = {"CUDA": f"driver for {gpu_driver()}, torch's runtime {torch.version.cuda}"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows[f"GPU {index}"] = (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
            f"{gpu.total_memory / 2**30:.0f} GiB"
        )
    return rows


def describe_paths(engine: Any, device: int) -> dict[str, str]:
    """Which path each cell, arithmetic and width takes on a GPU, for 16 sequences.

    Args:
        engine: the CUDA engine, ready.
        device: number of the GPU.

    Returns:
        such as ``{"lstm bf16 forward": "one cta to H 128, grid to H 1536, then per step"}``.
    """
    rows = {}
    for cell, arithmetic, (name, backward) in product(CELLS, _ARITHMETICS, _PASSES.items()):
        runs = list(_runs(engine, device, cell, arithmetic, backward))
        words = [f"{path} to H {last}" for path, last in runs[:-1]]
        path = runs[-1][0]
        rows[f"{cell} {arithmetic} {name}"] = ", ".join([*words, f"then {path}" if words else path])
    return rows


def _runs(engine: Any, device: int, cell: str, arithmetic: str, backward: bool) -> Iterator[tuple[str, int]]:
    """The paths from narrow to wide, each with the last of the widths that takes it."""

    def path(H: int) -> str:
        plan = engine.plan(device, cell, arithmetic, _T, _B, H, 1, backward)
        name = str(plan.native.path.name).replace("_", " ")
        return f"{name} with flags" if name == "grid" and plan.native.exchange.name == "flags" else name

    for name, widths in groupby(_WIDTHS, path):
        yield name, list(widths)[-1]
