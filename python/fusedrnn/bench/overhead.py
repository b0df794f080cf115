"""What a call costs when there is next to nothing to compute."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .contestants import FUSEDRNN, TORCH, fused_copy
from .grid import MODES
from .results import Overhead, engines_of
from .timer import interleave, torch_threads

_SIZE = 8  # I and H; T and B are 1
_STOCK: dict[str, type[torch.nn.Module]] = {
    "LSTM": torch.nn.LSTM,
    "GRU": torch.nn.GRU,
    "RNN": torch.nn.RNN,
    "LSTMCell": torch.nn.LSTMCell,
    "GRUCell": torch.nn.GRUCell,
    "RNNCell": torch.nn.RNNCell,
}
#: module and mode of each row, in order.
CALLS = [(name, mode) for mode in MODES for name in _STOCK]


def measure(name: str, mode: str, budget: float) -> Overhead:
    """Time one call at T = B = 1, I = H = 8 in float32 on one thread, which is all that such a call can use.

    Args:
        name: a module of torch.nn.
        mode: ``"inference"``, or ``"training"`` for forward and backward to the input and the weights.
        budget: seconds to spend.
    """
    stock = _STOCK[name](_SIZE, _SIZE)
    training = mode == "training"
    shape = (1, 1, _SIZE) if isinstance(stock, torch.nn.RNNBase) else (1, _SIZE)
    input = torch.randn(shape, requires_grad=training)
    modules = {FUSEDRNN: fused_copy(stock), TORCH: stock}
    with torch_threads(1), torch.set_grad_enabled(training):
        timing = interleave({who: _call(module, input, training) for who, module in modules.items()}, budget)
        engine = engines_of(modules[FUSEDRNN], input)
    return Overhead(
        module=name,
        mode=mode,
        us={who: 1e6 * timing.median(who) for who in modules},
        spread={who: timing.spread(who) for who in modules},
        ratio=timing.ratio(TORCH, FUSEDRNN),
        engine=engine,
    )


def _call(module: torch.nn.Module, input: torch.Tensor, training: bool) -> Callable[[], object]:
    if not training:
        return lambda: module(input)
    leaves = [input, *module.parameters()]
    grad = torch.ones(*input.shape[:-1], _SIZE)

    def train() -> object:
        output = module(input)
        return torch.autograd.grad(output[0] if isinstance(output, tuple) else output, leaves, grad)

    return train
