"""What training keeps from forward until backward, as a test: an LSTM may not need more than torch.nn's."""

from __future__ import annotations

import pytest
import torch

from fusedrnn.bench.contestants import FUSEDRNN, TORCH
from fusedrnn.bench.grid import SHAPES
from fusedrnn.bench.memory import measure


@pytest.mark.parametrize("shape", SHAPES)
def test_lstm_saves_no_more_than_torch(shape: str) -> None:
    saved = measure("lstm", shape, torch.float32).values
    assert saved[FUSEDRNN] <= saved[TORCH]
