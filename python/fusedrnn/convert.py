"""Turn the recurrent modules of an existing model into fusedrnn's, and back; or all of torch.nn's, for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.nn.utils import parametrize

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
_NAMES = frozenset(stock.__name__ for stock in _OURS)
#: What a subclass may not redefine, if the forward of ours is to do what the subclass's own would.
_OF_FORWARD = frozenset({"forward", "__call__", "check_input", "check_forward_args", "check_hidden_size"})
#: What each class becomes and was, those included that ``_class_for`` has made for subclasses.
_AFTER, _BEFORE = dict(_OURS), dict(_STOCK)


@dataclass(frozen=True)
class Finding:
    """One recurrent module of a model.

    Attributes:
        name: its name in the model, as ``named_modules`` gives it; empty for the model itself.
        kind: its class.
        verdict: ``"fusedrnn"`` (it is ours already), ``"convertible"`` (``convert`` changes it) or ``"left alone"``.
        reason: why it is left alone and what to do; empty otherwise.
    """

    name: str
    kind: str
    verdict: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({self.kind}): {self.verdict}" + (f", {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Survey:
    """The recurrent modules of a model. Printing it is what it is for."""

    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings)) or "no recurrent module"


def survey(model: torch.nn.Module) -> Survey:
    """Tell what :func:`convert` does, or did, with each recurrent module inside ``model``, and why.

    Args:
        model: any module, a recurrent one itself included. It is not changed.

    Returns:
        a :class:`Survey`; ``str`` of it is a text to read.
    """
    found = ((name, module, _judge(module)) for name, module in model.named_modules())
    return Survey(tuple(Finding(name, _kind(m), verdict[0], verdict[1]) for name, m, verdict in found if verdict))


def _kind(module: torch.nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _judge(module: torch.nn.Module) -> tuple[str, str] | None:
    """Verdict and reason, None for a module that is not recurrent."""
    kind = type(module)
    if isinstance(module, tuple(_STOCK)):
        return "fusedrnn", ""
    if isinstance(module, torch.jit.ScriptModule):
        if getattr(module, "original_name", None) not in _NAMES:
            return None
        return "left alone", "scripted: it runs without Python; convert the model before torch.jit instead"
    if not isinstance(module, tuple(_OURS)):
        if kind.__name__ in _NAMES and ".quant" in kind.__module__:
            return "left alone", "quantised: fusedrnn has no kernel for its weights"
        return None
    if parametrize.is_parametrized(module):
        return "left alone", "parametrised: convert the model before registering parametrizations"
    of_subclass = kind.__mro__[: kind.__mro__.index(_stock_base(kind))]
    if any(base.__name__ == "FSDPModule" for base in of_subclass):
        return "left alone", "sharded: convert the model before fully_shard"
    redefined = sorted(name for name in _OF_FORWARD if any(name in vars(base) for base in of_subclass))
    if redefined:
        base = _stock_base(kind).__name__
        return "left alone", f"a subclass with its own {redefined[0]}: derive it from fusedrnn.{base} instead"
    if "forward" in vars(module):
        return "left alone", "its forward has been replaced"
    return "convertible", ""


def _stock_base(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    return next(base for base in kind.__mro__ if base in _OURS)


def _class_for(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class of ours that stands in for torch.nn's or, with all that it has of its own, for a subclass of it."""
    if kind in _AFTER:
        return _AFTER[kind]

    def reduce(self: torch.nn.Module, protocol: int) -> tuple[object, ...]:
        return _restore, (kind,), object.__reduce_ex__(self, 2)[2]

    made = type(
        kind.__name__,
        (_OURS[_stock_base(kind)], kind),
        {
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
            "__reduce_ex__": reduce,
        },
    )
    _AFTER[kind], _BEFORE[made] = made, kind
    return made


def _restore(kind: type[torch.nn.Module]) -> torch.nn.Module:
    """An empty converted instance, for pickle and copy, which can't find a class that was made here by its name."""
    made = _class_for(kind)
    return made.__new__(made)


def convert(model: Model, *, verbose: bool = False) -> Model:
    """Make every torch.nn.RNN, LSTM, GRU and their cells inside ``model`` run on fusedrnn.

    The modules change their class in place and stay the same objects: parameters, optimizers that hold them, hooks,
    train or eval mode, state_dict and sharing are untouched, and ``isinstance`` finds the class they had still.
    Subclasses with a forward of their own, parametrised, sharded, quantised and scripted modules are left alone:
    :func:`survey` names them. For code that asks ``type(m) is torch.nn.LSTM`` there is :func:`patch`.

    Args:
        model: any module, a recurrent one itself included.
        verbose: print what was converted, what was left alone, and why.

    Returns:
        ``model``.
    """
    changed = []
    for name, module in model.named_modules():
        if _judge(module) == ("convertible", ""):
            changed.append(Finding(name, _kind(module), "converted"))
            module.__class__ = _class_for(type(module))  # type: ignore[assignment]
    if verbose:
        names = {finding.name for finding in changed}
        rest = [finding for finding in survey(model).findings if finding.name not in names]
        print(Survey((*changed, *rest)))
    return model


def revert(model: Model) -> Model:
    """Undo :func:`convert`: make every module of fusedrnn.nn inside ``model`` the torch.nn module of the same name.

    Subclasses that were converted get their class back; those derived from fusedrnn's classes are left alone, and so
    are modules with a learned initial state or dropouts that torch.nn's do not have, those with parametrizations, which
    torch.nn's ignore, and sharded ones.

    Args:
        model: any module, a recurrent one itself included.

    Returns:
        ``model``.
    """
    for module in model.modules():
        before = _BEFORE.get(type(module))
        if before is not None and not {"learn_initial_state", "dropouts"} & vars(module).keys():
            module.__class__ = before  # type: ignore[assignment]
    return model


class _Exchange:
    """Our methods in the place of torch.nn's, from the first block that opens to the last that ends.

    The blocks of several threads may overlap in any order.
    """

    def __init__(self) -> None:
        self.lock, self.blocks = threading.Lock(), 0
        self.stock: dict[tuple[type[torch.nn.Module], str], object] = {}

    def open(self) -> None:
        with self.lock:
            self.blocks += 1
            if self.blocks > 1:
                return
            for stock, ours in _OURS.items():
                for name in ("forward", "__prepare_scriptable__"):
                    self.stock[stock, name] = vars(stock).get(name)
                    setattr(stock, name, getattr(ours, name))

    def end(self) -> None:
        with self.lock:
            self.blocks -= 1
            if self.blocks:
                return
            for (stock, name), method in self.stock.items():
                if method is None:
                    delattr(stock, name)
                else:
                    setattr(stock, name, method)


_exchange = _Exchange()


@contextmanager
def patch() -> Iterator[None]:
    """Run torch.nn.RNN, LSTM, GRU and their cells on fusedrnn inside the block, for code that can't be edited.

    The classes stay themselves and only their ``forward`` is exchanged, so it holds for modules made before and inside
    the block, for names bound at import, for subclasses that call ``super().forward``, and for code that asks
    ``type(m) is torch.nn.LSTM``. It holds for the whole process, all threads included, until the block ends; of blocks
    inside one another, or open in several threads at once, until the last of them ends.
    """
    _exchange.open()
    try:
        yield
    finally:
        _exchange.end()
