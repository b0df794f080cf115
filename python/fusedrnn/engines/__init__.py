"""The engines, in order of preference, and how one is chosen for a call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from ..torch_state import is_any_autocast_enabled, unusual_mode
from . import cpu
from .base import Call, Engine
from .cpu import CpuEngine
from .cuda import CudaEngine
from .numba import NumbaEngine
from .reference import ReferenceEngine
from .torch import TorchEngine

_IN_ORDER: tuple[Engine, ...] = (CpuEngine(), CudaEngine(), NumbaEngine(), TorchEngine(), ReferenceEngine())
#: Automatic choice takes the first that is available and supports the call.
ENGINES = {engine.name: engine for engine in _IN_ORDER}
AUTO = "auto"

_forced: ContextVar[str] = ContextVar("fusedrnn_engine")


def _checked(name: str, origin: str) -> str:
    if name != AUTO and name not in ENGINES:
        raise ValueError(f"{origin}: unknown engine {name!r}; choose one of {', '.join([AUTO, *ENGINES])}")
    return name


_default = _checked(os.environ.get("FUSEDRNN_ENGINE", AUTO), "FUSEDRNN_ENGINE")


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Run every call inside the block on one engine; a call it does not support raises RuntimeError.

    The choice belongs to the current thread or asynchronous task. A backward pass always runs on the
    engine of its forward pass. The environment variable FUSEDRNN_ENGINE sets the default at import.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"numba"``, ``"torch"``, ``"reference"`` or ``"auto"``.

    Raises:
        ValueError: there is no engine of that name.
    """
    token = _forced.set(_checked(name, "fusedrnn.engine"))
    try:
        yield
    finally:
        _forced.reset(token)


@dataclass
class Choice:
    """Which engine serves a call, why the ones before it did not, and which way the call came if not directly."""

    engine: Engine
    forced: bool
    declined: dict[str, str] = field(default_factory=dict)
    route: str | None = None


def choose(call: Call) -> Choice:
    """The engine that serves ``call`` now. It depends on the tensors' dtype, device and layout, not on their values.

    Raises:
        RuntimeError: the engine asked for does not support the call; the message says why.
    """
    name = _forced.get(_default)
    if name != AUTO:
        objection = _objection(ENGINES[name], call)
        if objection is not None:
            raise RuntimeError(f"engine {name!r} was asked for but does not support this call: {objection}")
        return Choice(ENGINES[name], forced=True)
    declined: dict[str, str] = {}
    for candidate in ENGINES.values():
        objection = _objection(candidate, call)
        if objection is None:
            return Choice(candidate, forced=False, declined=declined)
        declined[candidate.name] = objection
    raise AssertionError("the reference engine supports every call")


def _objection(candidate: Engine, call: Call) -> str | None:
    return candidate.available() or candidate.supports(call)


#: While set, every call is reported to it: this is how ``explain`` listens.
listener: ContextVar[Callable[[Call, Choice], None] | None] = ContextVar("fusedrnn_listener", default=None)


def is_everyday() -> bool:
    """Whether a call that the compiled engine supports may go straight there: the choice is automatic, nobody listens,
    and torch is in no mode, autocast's among them, that has to see it."""
    return (
        unusual_mode() is None  # first, for torch.compile would not understand the rest
        and cpu.express is not None
        and _forced.get(_default) == AUTO
        and listener.get() is None
        and not is_any_autocast_enabled()
    )


def announce(call: Call, choice: Choice) -> None:
    """Tell the listener, if there is one."""
    listen = listener.get()
    if listen is not None:
        listen(call, choice)
