"""What a call costs when there is next to nothing to compute."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .contestants import TOLERANCE, Task
from .driver import Driver
from .grid import MODES
from .results import Finding, finding

_SIZE = 8  # I and H; T and B are 1
_STOCK: dict[str, Callable[[int, int], torch.nn.RNNBase | torch.nn.RNNCellBase]] = {
    "LSTM": torch.nn.LSTM,
    "GRU": torch.nn.GRU,
    "RNN": torch.nn.RNN,
    "LSTMCell": torch.nn.LSTMCell,
    "GRUCell": torch.nn.GRUCell,
    "RNNCell": torch.nn.RNNCell,
}
#: module and mode of each row, in order.
CALLS = [(name, mode) for mode in MODES for name in _STOCK]


def measure(driver: Driver, name: str, mode: str, budget: float) -> Finding:
    """Time one call at T = B = 1, I = H = 8 in float32 on one thread, which is all that such a call can use.

    Args:
        driver: of the contestants' processes.
        name: a module of torch.nn.
        mode: ``"inference"``, or ``"training"`` for forward and backward to the input and the weights.
        budget: seconds to spend.
    """
    torch.manual_seed(0)
    module = _STOCK[name](_SIZE, _SIZE)
    shape = (1, 1, _SIZE) if isinstance(module, torch.nn.RNNBase) else (1, _SIZE)
    training = mode == "training"
    task = Task(module, torch.randn(shape, requires_grad=training), None, torch.randn(shape) if training else None)
    outcome = driver.race(driver.entries(task), 1, TOLERANCE[torch.float32], budget)
    return finding("overhead", f"{name} {mode}", outcome, driver.engine(task, 1), 1e6)
