"""The grid of ``python -m fusedrnn bench`` as pytest benchmarks: ``pytest bench -k "gru and training"``.

For looking at single cells with pytest-benchmark's options. These runs are not interleaved: compare contestants with
``python -m fusedrnn bench``.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fusedrnn.bench.contestants import CONTESTANTS, make_task
from fusedrnn.bench.grid import MODES, SHAPES, USUAL_CELLS


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", USUAL_CELLS)
@pytest.mark.benchmark(max_time=0.2, min_rounds=3)
def test_layer(benchmark: BenchmarkFixture, cell: str, mode: str, shape: str, contestant: str) -> None:
    benchmark.group = f"{cell} {mode} {shape}"
    task = make_task(cell, SHAPES[shape], mode, torch.float32)
    with torch.set_grad_enabled(task.training):
        benchmark(CONTESTANTS[contestant](task))
