"""Lets torch.compile trace our modules, which it refuses for the name of their base class.

Dynamo, the part of torch.compile that reads Python, refuses every instance of torch.nn.RNN, LSTM and GRU unless
``torch._dynamo.config.allow_rnn`` is set, because it would unroll torch's own. Ours are instances too and become one
operator each, so the setting is on while Dynamo takes in a module of ours, and as the user left it for all others.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_BUILDER = "torch._dynamo.variables.builder"


def allow(is_ours: Callable[[torch.nn.Module], bool]) -> None:
    """Have Dynamo trace modules of ours. It takes a second to import, so if it has not been imported, wait."""

    def patch(builder: Any) -> None:
        builder.VariableBuilder.wrap_module = _with_allow_rnn(builder.VariableBuilder.wrap_module, is_ours)

    if _BUILDER in sys.modules:
        patch(sys.modules[_BUILDER])
    else:
        sys.meta_path.insert(0, _AfterImport(_BUILDER, patch))


def _with_allow_rnn(wrap_module: Callable[..., Any], is_ours: Callable[[torch.nn.Module], bool]) -> Callable[..., Any]:
    @wraps(wrap_module)
    def wrapper(self: Any, value: torch.nn.Module) -> Any:
        if not is_ours(value):
            return wrap_module(self, value)
        from torch._dynamo import config

        with config.patch(allow_rnn=True):  # type: ignore[attr-defined]
            return wrap_module(self, value)

    return wrapper


class _AfterImport(MetaPathFinder):
    """Calls a function on a module as soon as somebody else imports it."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
