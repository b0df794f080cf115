"""Turn the recurrent modules of an existing model into fusedrnn's, and back."""

from __future__ import annotations

from typing import TypeVar

import torch

from . import nn

Model = TypeVar("Model", bound=torch.nn.Module)

_OURS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.RNN: nn.RNN,
    torch.nn.LSTM: nn.LSTM,
    torch.nn.GRU: nn.GRU,
    torch.nn.RNNCell: nn.RNNCell,
    torch.nn.LSTMCell: nn.LSTMCell,
    torch.nn.GRUCell: nn.GRUCell,
}
_STOCK = {ours: stock for stock, ours in _OURS.items()}


def _change_classes(model: Model, classes: dict[type[torch.nn.Module], type[torch.nn.Module]]) -> Model:
    for module in model.modules():
        target = classes.get(type(module))
        if target is not None:
            module.__class__ = target  # type: ignore[assignment]
    return model


def convert(model: Model) -> Model:
    """Make every torch.nn.RNN, LSTM, GRU and their cells inside ``model`` run on fusedrnn.

    The modules change their class in place and stay the same objects: parameters, optimizers that hold them, hooks,
    train or eval mode, state_dict and sharing are untouched. Modules of other classes, subclasses of torch.nn's
    included, are left alone: they may have a forward of their own.

    Args:
        model: any module, a recurrent one itself included.

    Returns:
        ``model``.
    """
    return _change_classes(model, _OURS)


def revert(model: Model) -> Model:
    """Undo :func:`convert`: make every module of fusedrnn.nn inside ``model`` the torch.nn module of the same name.

    Args:
        model: any module, a recurrent one itself included.

    Returns:
        ``model``.
    """
    return _change_classes(model, _STOCK)
